"""Nothing that somebody else wrote is run: of all the things of malicious.py, at every door that reads such a thing,
none writes its canary, and what is refused is named."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import hydra
import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from integration.conftest import call, micro, training  # noqa: F401 (fixtures)
from integration.conftest import draftsmith as command
from safetensors.torch import load_file

import draftsmith
from draftsmith import artifacts, prepare
from draftsmith.base import outlines
from draftsmith.errors import DataError
from draftsmith.exporters import published
from draftsmith.heads.medusa import Medusa, MedusaConfig

from . import malicious as bad

pytestmark = pytest.mark.faults

TRIED: set[tuple[str, str]] = set()  # (door, fixture)
SECRET = "hunter2-hunter2-hunter2"


def tried(door: str, name: str, canary: Path) -> None:
    """The fixture was at the door; and it did not work."""
    TRIED.add((door, name))
    assert not canary.exists(), f"{name} was run at the door {door}"


def refused(door: str, name: str, canary: Path, work: Callable[[], Any], words: str) -> None:
    """DataError in one line that says `words` (a pattern)."""
    with pytest.raises(DataError) as e:
        work()
    assert re.search(words, str(e.value)), str(e.value)
    assert e.value.exit_code == 3
    tried(door, name, canary)


def told(door: str, name: str, canary: Path, found: tuple[int, str], words: str, code: int = 3) -> None:
    """The command ended with that code and says `words`."""
    assert found[0] == code, found[1]
    assert re.search(words, found[1]), found[1]
    assert "Traceback" not in found[1]
    tried(door, name, canary)


@pytest.fixture(scope="module")
def base(micro: Path) -> Any:
    return draftsmith.load_base(micro / "base")


@pytest.fixture(scope="module")
def head(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native") / "head"
    return draftsmith.save_head(folder, Medusa(MedusaConfig(num_heads=2), base.spec), name="medusa", base=base)


@pytest.fixture(scope="module")
def short(training: list[str]) -> list[str]:
    return [*training, "trainer.max_steps=2", "trainer.checkpoint_every=1"]


@pytest.fixture(scope="module")
def finished(short: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = call("train", *short, "run_dir=run", cwd=folder)
    assert code == 0, output
    return folder / "run"


# The payloads are live


def test_a_reader_that_trusts_them_writes_the_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, work: Callable[[Path], Any]) -> None:
        canary = tmp_path / re.sub(r"\W", "-", name)
        with contextlib.suppress(Exception):  # what comes after the payload is of no interest
            work(canary)
        assert canary.exists(), name

    written("torch", lambda c: torch.load(bad.checkpoint(tmp_path / "a.pt", c), weights_only=False))
    written("pickle", lambda c: pickle.loads(bad.pickled(c)))
    written("yaml", lambda c: yaml.unsafe_load(bad.yaml_tag(c)))
    for name, text in bad.TEMPLATES.items():
        written(name, lambda c, text=text: jinja2.Environment().from_string(text(c)).render(messages=[{}]))
    from hydra._internal.instantiate import _instantiate2

    asks = _instantiate2._authorize_target_name  # ours, where a command ran in this process before
    monkeypatch.setattr(_instantiate2, "_authorize_target_name", getattr(asks, "__wrapped__", asks))
    for name, node in bad.INSTANTIATED.items():
        written(name, lambda c, node=node: hydra.utils.instantiate(node(c, tmp_path)))
    written("shell", lambda c: subprocess.run(f"true {bad.words(c)}", shell=True, stderr=subprocess.DEVNULL))

    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def remote(canary: Path) -> None:
        folder = tmp_path / "remote"
        folder.mkdir()
        bad.auto_map(folder, canary)
        AutoConfig.from_pretrained(folder, trust_remote_code=True)

    written("remote code", remote)


# A base


@pytest.mark.parametrize("name", bad.BASES)
def test_a_base(name: str, micro: Path, base: Any, tmp_path: Path) -> None:
    make, words, everywhere = bad.BASES[name]
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(micro / "base", folder)
    make(folder, canary)
    doors = {
        "load_base": lambda: draftsmith.load_base(folder),
        "load_companion": lambda: draftsmith.load_companion(folder, base=base),
        "a base without its weights": lambda: outlines.outline(str(folder)),
    }
    for door, work in doors.items():
        if words and (everywhere or door != "a base without its weights"):
            refused(door, name, canary, work, words)
        else:  # it holds what nobody asks for: it loads, and that stays unread
            work()
            tried(door, name, canary)


@pytest.mark.parametrize("name", ["an index of pickles", "code of its own", "HTML as model.safetensors"])
def test_a_base_at_the_verbs(name: str, micro: Path, head: Path, short: list[str], tmp_path: Path) -> None:
    make, words, _ = bad.BASES[name]
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(micro / "base", folder)
    make(folder, canary)
    chosen = ["base=hf", f"base.path={folder}"]
    prompts = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "out=rows"]
    told("train", name, canary, call("train", *short, *chosen[1:], "run_dir=run", cwd=tmp_path), words)
    told("evaluate", name, canary, call("evaluate", *chosen, f"load=[{head}]", "run_dir=e", cwd=tmp_path), words)
    told("export", name, canary, call("export", *chosen, f"load=[{head}]", "out=o", "run_dir=x", cwd=tmp_path), words)
    told(
        "adopt",
        name,
        canary,
        call("adopt", *chosen, f"path={head}", "kind=medusa", "out=a", cwd=tmp_path),
        words + "|own",
    )
    told("distill", name, canary, call("distill", *chosen, *prompts, cwd=tmp_path), words)
    assert not any((tmp_path / made).exists() for made in ("run/heads", "o", "a", "rows/manifest.json"))


def test_code_that_may_run_is_named_with_its_revision(
    micro: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = prepare.BaseConfig(path=str(micro / "base"), revision="abc123", trust_remote_code=True)
    for work in (prepare.load_base, prepare.outline):
        work(settings)
        line = f"trust_remote_code: running the code that {micro / 'base'} at revision abc123 brings"
        assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", bad.TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(
    name: str,
    micro: Path,
    short: list[str],
    tmp_path: Path,
) -> None:
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(micro / "base", folder)
    bad.chat_template(bad.TEMPLATES[name])(folder, canary)
    chosen = [*short, f"base.path={folder}", f"data.path={micro / 'chats.jsonl'}", "run_dir=run"]
    told("train on chats", name, canary, call("train", *chosen, cwd=tmp_path), r"template")
    prompts = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "out=rows"]
    found = call("distill", "base=hf", f"base.path={folder}", *prompts, cwd=tmp_path)
    told("distill", name, canary, found, r"template")


# An adapter


@pytest.mark.parametrize("name", bad.ADAPTERS)
def test_an_adapter(name: str, micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = bad.ADAPTERS[name]
    canary = tmp_path / "canary"
    make(tmp_path / "adapter", canary)
    monkeypatch.syspath_prepend(str(tmp_path))  # as where python -m is started
    work = lambda: draftsmith.load_base(micro / "base", adapter=tmp_path / "adapter")  # noqa: E731
    refused("base.adapter", name, canary, work, words)


# A head of ours


@pytest.mark.parametrize("name", bad.HEADS)
def test_a_native_head(name: str, micro: Path, base: Any, head: Path, tmp_path: Path) -> None:
    make, words = bad.HEADS[name]
    folder, canary = tmp_path / "head", tmp_path / "canary"
    shutil.copytree(head, folder)
    make(folder, canary)
    refused("load_head", name, canary, lambda: draftsmith.load_head(folder, base=base), words)
    chosen = ["base=hf", f"base.path={micro / 'base'}", f"load=[{folder}]", "run_dir=x"]
    told("export", name, canary, call("export", *chosen, "out=out", cwd=tmp_path), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pickle as model.safetensors", "_target_: os.system", "a link out of the folder"])
def test_a_native_head_at_the_other_verbs(
    name: str,
    micro: Path,
    head: Path,
    short: list[str],
    tmp_path: Path,
) -> None:
    make, words = bad.HEADS[name]
    folder, canary = tmp_path / "head", tmp_path / "canary"
    shutil.copytree(head, folder)
    make(folder, canary)
    chosen = ["base=hf", f"base.path={micro / 'base'}", "run_dir=x"]
    told("evaluate", name, canary, call("evaluate", *chosen, f"load=[{folder}]", cwd=tmp_path), words)
    told("tune", name, canary, call("tune", *chosen, f"load=[{folder}]", cwd=tmp_path), words)
    start = f"start_from={{medusa: {folder}}}"
    told("start_from", name, canary, call("train", *short, start, "heads.medusa.num_heads=2", cwd=tmp_path), words)
    judge = ["head=[acceptance]", f"drafter={folder}"]
    told("drafter", name, canary, call("train", *short, *judge, cwd=tmp_path), words)


def test_folders_and_snapshots_that_are_links_still_load(base: Any, head: Path, tmp_path: Path) -> None:
    """A link to the whole folder is the user's; in the hub's cache every file is one, to the blobs beside it."""
    (tmp_path / "linked").symlink_to(head, target_is_directory=True)
    draftsmith.load_head(tmp_path / "linked", base=base)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    for path in (p for p in head.rglob("*") if p.is_file()):
        blob = blobs / artifacts.file_sha256(path)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(head)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    draftsmith.load_head(snapshot, base=base)
    model = Path(base.spec.path)
    cached = tmp_path / "models--c--d" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    for path in model.iterdir():
        (cached / path.name).symlink_to(path)
    draftsmith.load_base(cached)


# Published weights


@pytest.mark.parametrize("name", bad.PUBLISHED)
def test_published_weights(name: str, micro: Path, base: Any, tmp_path: Path) -> None:
    make, words = bad.PUBLISHED[name]
    folder, canary = tmp_path / "theirs", tmp_path / "canary"
    folder.mkdir()
    make(folder, canary)
    refused("load_published", name, canary, lambda: draftsmith.load_published(folder, "medusa", base=base), words)
    chosen = ["base=hf", f"base.path={micro / 'base'}", f"path={folder}", "kind=medusa", "out=out"]
    told("adopt", name, canary, call("adopt", *chosen, cwd=tmp_path), words)
    assert not (tmp_path / "out").exists()


def test_the_command_that_converts_a_pickle_runs_nothing_of_it(tmp_path: Path) -> None:
    """Neither the pickle, nor the words in its name."""
    canary = tmp_path / "canary"
    folder = tmp_path / f"a'\"; touch {canary.name}; $(touch {canary.name}) `touch {canary.name}`\n#"
    folder.mkdir()
    said = published.conversion(bad.checkpoint(folder / "medusa_lm_head.pt", canary))
    done = subprocess.run(["bash", "-c", said.replace("python", sys.executable, 1)], cwd=tmp_path, capture_output=True)
    assert b"Weights only load failed" in done.stderr
    tried("the printed conversion", "shell words in a folder's name", canary)


# A run of somebody else's


@pytest.mark.parametrize("name", bad.RUNS)
def test_a_run(name: str, finished: Path, short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words, doors = bad.RUNS[name]
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(finished, folder)
    make(folder, canary)
    monkeypatch.setenv("EVIL_SECRET", SECRET)
    verbs = {
        "evaluate": ["run_dir=run"],
        "export": ["run_dir=run"],
        "tune": ["run_dir=run"],
        "report": ["run_dirs=[run]"],
        "train": [*short, "run_dir=run"],
    }
    for verb in doors:
        found = call(verb, *verbs[verb], cwd=tmp_path)
        told(verb, name, canary, found, words)
        assert SECRET not in found[1]
    assert all(SECRET.encode() not in p.read_bytes() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", bad.CHECKPOINTS)
def test_a_checkpoint(name: str, finished: Path, short: list[str], tmp_path: Path) -> None:
    """It is passed over, with a warning that names it; the run goes on from what is its own."""
    make, words = bad.CHECKPOINTS[name]
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "heads")
    (folder / "COMPLETE.json").unlink()
    make(folder / "checkpoints" / "step-00000002", canary)
    found = call("train", *short, "run_dir=run", cwd=tmp_path)
    told("resume", name, canary, found, words, code=0)
    assert "step-00000002" in found[1]
    made = [load_file(run / "heads" / "medusa" / "model.safetensors") for run in (folder, finished)]
    assert all(torch.equal(t, made[1][key]) for key, t in made[0].items())


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock"])
def test_a_run_adds_to_nothing_that_its_folder_only_links_to(
    name: str, finished: Path, short: list[str], tmp_path: Path
) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "heads")
    (folder / "COMPLETE.json").unlink()
    (folder / name).unlink()
    (folder / name).symlink_to(victim)
    victim.write_text("private\n")
    told(
        "train", f"{name} is a link", tmp_path / "no", call("train", *short, "run_dir=run", cwd=tmp_path), r"is a link"
    )
    assert victim.read_text() == "private\n"


# A command line, a job's yaml


@pytest.mark.parametrize("target", bad.TARGETS)
@pytest.mark.parametrize("key", ["heads.medusa", "optimizer", "exporter"])
def test_a_target_on_the_command_line(key: str, target: str, short: list[str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    value = target.replace("CANARY", str(canary))
    if key == "exporter":
        found = call("export", "run_dir=none", f"exporter._target_={value}", cwd=tmp_path)
    else:
        found = call("train", *short, f"{key}._target_={value}", "run_dir=run", cwd=tmp_path)
    told(f"{key}._target_", target, canary, found, rf"{key}\._target_: ", code=2)
    assert not (tmp_path / "run" / "heads").exists()


@pytest.mark.parametrize("name", bad.JOBS)
def test_a_jobs_yaml(name: str, short: list[str], tmp_path: Path) -> None:
    """Under -m, where a launcher is made as well."""
    text, words = bad.JOBS[name]
    canary = tmp_path / "canary"
    bad.checkpoint(tmp_path / "evil.pt", canary)
    (tmp_path / "job.yaml").write_text(text(canary, tmp_path))
    grid = ["-m", "--config-dir", ".", "--config-name", "job", *short, "run_dir=run", "seed=1"]
    found = command("train", *grid, cwd=tmp_path)
    told("--config-dir", name, canary, found, words, code=2)
    assert "error: " in found[1]


def test_words_of_a_command_are_printed_so_that_a_shell_runs_none(tmp_path: Path) -> None:
    """The line that says how to go on, given back to a shell: the same arguments, and nothing else."""
    canary = tmp_path / "canary"
    words = [f"run_dir=$(touch {canary})", f"experiment=`touch {canary}`; touch {canary}", f"a=b\n touch {canary} #"]
    code = "import sys; from draftsmith import config; sys.argv[1:] = eval(sys.stdin.read());"
    code += "config._say_how_to_resume('train')"
    done = subprocess.run([sys.executable, "-c", code], input=repr(words), capture_output=True, text=True, check=True)
    line = done.stderr.partition("resume: ")[2]
    (tmp_path / "draftsmith").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    (tmp_path / "draftsmith").chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    again = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=path, capture_output=True, text=True, check=True)
    assert again.stdout.split("\0")[:-1] == ["train", *words]
    tried("the printed command", "shell words on a command line", canary)


# Rows


def test_rows_elsewhere(short: list[str], tmp_path: Path) -> None:
    """What `datasets` saved says which files are its own."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "outside.arrow").write_text("private")
    for name in ("../outside.arrow", str(tmp_path / "outside.arrow")):
        (tmp_path / "rows" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        found = call("train", *short, "data.path=rows", "run_dir=run", cwd=tmp_path)
        told(
            "data.path", f"state.json lists {name[:3]}", tmp_path / "no", found, r"state\.json: lists .*no file of this"
        )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_columns_type_is_not_unpickled(suffix: str, short: list[str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    bad.pickled_type(tmp_path / f"rows{suffix}", canary)
    found = call("train", *short, f"data.path=rows{suffix}", "run_dir=run", cwd=tmp_path)
    told("data.path", f"a pickled extension type in {suffix}", canary, found, r"rows\.")


def peak() -> int:
    """The most memory that this process held since clear_refs was last written, in MB."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell a process's peak of memory")
def test_a_bomb_is_refused_before_it_is_unpacked(short: list[str], tmp_path: Path) -> None:
    """Hundreds of megabytes in a thousandth of that; what is held at any time is a few longest lines, or nothing."""
    bad.bomb(tmp_path / "rows.jsonl.gz", 300)
    huge = pa.array([b"a" * (80 << 20)] * 2, pa.large_binary()).cast(pa.large_string())
    pq.write_table(pa.table({"text": huge}), tmp_path / "rows.parquet", compression="zstd", use_dictionary=False)
    del huge
    pa.default_memory_pool().release_unused()
    refusals = (("jsonl.gz", "is no row", 250), ("parquet", r"unpack to 16\d,\d{3},\d{3} bytes", 100))
    for end, words, most in refusals:
        assert (tmp_path / f"rows.{end}").stat().st_size < 2 << 20
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        found = call("train", *short, f"data.path=rows.{end}", "run_dir=run", cwd=tmp_path)
        told("data.path", f"a bomb in {end}", tmp_path / "no", found, words)
        assert peak() - before < most


# What others read


MARKUP = "<script>alert(1)</script>"


def test_what_a_run_says_is_text_in_its_report(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("experiment: null", f"experiment: '{MARKUP} {{{{ 7 * 191 }}}} [a](b:c)'"))
    bad.change(folder / "provenance.json", command=["draftsmith", MARKUP, "{{ 7 * 191 }}", "</code>"])
    found = call("report", "run_dirs=[run]", cwd=tmp_path)
    told("report", "markup in a configuration", tmp_path / "no", found, "report.html", code=0)
    html = (folder / "report.html").read_text()
    assert MARKUP not in html
    assert "1337" not in html + (folder / "report.md").read_text()
    assert "&lt;script&gt;" in html
    assert re.search(r"Content-Security-Policy.*default-src 'none'", html)


def test_a_heads_name_opens_no_yaml_of_its_card(base: Any, head: Path, tmp_path: Path) -> None:
    name = f'medusa\n---\nlicense: mit\n"evil": !!python/name:os.system\n{MARKUP}'
    loaded = draftsmith.load_head(head, base=base)
    card = (draftsmith.save_head(tmp_path / "again", loaded, name=name) / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert set(front) <= {"library_name", "pipeline_tag", "base_model", "base_model_relation", "tags"}
    tried("a model's card", "YAML in a head's name", tmp_path / "no")


# A server


class Elsewhere(BaseHTTPRequestHandler):
    """Sends whoever asks to another place, and writes down who came there."""

    came: list[tuple[str, str | None]] = []  # noqa: RUF012
    to = ""

    def do_GET(self) -> None:
        self.came.append((self.path, self.headers.get("Authorization")))
        self.send_response(307 if self.to else 200)
        self.send_header("Location", self.to + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        return None


@contextlib.contextmanager
def serving(to: str = "") -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    kind = type("Here", (Elsewhere,), {"came": [], "to": to})
    server = HTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind.came
    finally:
        server.shutdown()
        server.server_close()


def test_a_key_does_not_follow_a_redirect(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL_KEY", SECRET)
    with serving() as (thief, stolen), serving(thief) as (server, asked):
        prompts = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "out=rows"]
        how = ["data.generation.engine=server", f"data.generation.server.urls=[{server}/v1]"]
        how += ["data.generation.server.api_key_env=EVIL_KEY", "data.generation.server.patience=1"]
        code, output = call("distill", "base=hf", f"base.path={micro / 'base'}", *prompts, *how, cwd=tmp_path)
    assert code == 6, output
    assert asked
    assert asked[0][1] == f"Bearer {SECRET}"  # whom it is meant for is told
    assert not stolen
    assert SECRET not in output
    tried("a server's answer", "a redirect", tmp_path / "no")


def test_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    doors, fixtures = {door for door, _ in TRIED}, {name for _, name in TRIED}
    assert len(fixtures) > 100
    with capsys.disabled():
        print(
            f"\n    {len(fixtures)} malicious fixtures at {len(doors)} doors ({len(TRIED)} pairs): 0 canaries touched",
            end="",
        )
