"""Two at work in one folder, folders that move, symbolic links, and a machine whose clock and name change."""
# ruff: noqa: F401, F811 (fixtures are imported, and asked for by name)

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts, prepare
from draftsmith.errors import ConfigError, ResourceError
from tests.faults.resuming import alone, command, content, folder, losses, stopped, trained, weights
from tests.integration.conftest import call, micro, training

pytestmark = pytest.mark.faults

SHORT = ["decoding.max_new_tokens=8", "repeats=1", "threads=1"]


def exact(run: Path, alone: Any) -> None:
    assert weights(run) == weights(alone())
    assert losses(run) == losses(alone())


# --- row 33: two in one folder


@pytest.fixture(scope="module")
def rows(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows that the micro base wrote."""
    folder = tmp_path_factory.mktemp("distilled")
    code, output = call("distill", *distil(micro), "out=rows", cwd=folder)
    assert code == 0, output
    return folder / "rows"


def distil(micro: Path) -> list[str]:
    asked = [f"data.prompts.path={micro / 'prompts.jsonl'}", "data.generation.max_new_tokens=12"]
    return ["base=hf", f"base.path={micro / 'base'}", "data=prompts", *asked]


@pytest.mark.parametrize("verb", ["train", "train, begun", "distill", "capture", "label", "sweep"])
def test_the_second_of_two_in_one_folder_is_refused_with_who_holds_it(
    verb: str, micro: Path, rows: Path, command: list[str], folder: Path
) -> None:
    base = ["base=hf", f"base.path={micro / 'base'}"]
    given = {
        "train": command,
        "distill": [*distil(micro), "out=run"],
        "capture": [*base, f"rows={rows}", "out=run"],
        "label": [*base, "companion=hf", f"companion.path={micro / 'base'}", f"rows={rows}", "out=run"],
        "sweep": ["each={}", "compare=[medusa]", "trials=1", "run_dir=run"],
    }[verb.partition(",")[0]]
    if verb != "train, begun":
        shutil.rmtree(folder / "run")
        (folder / "run").mkdir()
    before = content(folder / "run")
    with prepare.held(folder / "run"):
        code, output = call(verb.partition(",")[0], *given, cwd=folder)
    assert code == 2, output
    assert f"run: is being written by process {os.getpid()} on {platform.node()}" in output
    assert content(folder / "run") == before


HOLDS = """
import multiprocessing, sys, time
from pathlib import Path
from draftsmith import prepare
with prepare.held(Path("run")):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that holds tmp_path/run, and the pid of a worker that it has started."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    yield process, worker
    for pid in (worker, process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_killed_process_lets_go_at_once_though_its_worker_lives_on(
    holder: tuple[subprocess.Popen, int], tmp_path: Path
) -> None:
    process, worker = holder
    with pytest.raises(ConfigError, match=f"is being written by process {process.pid} on "):
        with prepare.held(tmp_path / "run"):
            pass
    process.kill()
    process.wait()
    os.kill(worker, 0)  # it is there
    with prepare.held(tmp_path / "run"):
        assert (tmp_path / "run/.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_whose_lock_it_is_does_not_hang_on_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file only tells who: a live holder is refused under the name it had, and what a dead one wrote, on this
    machine under another name or on another machine, holds nobody up."""
    monkeypatch.setattr(platform, "node", lambda: "before")
    with prepare.held(tmp_path):
        monkeypatch.setattr(platform, "node", lambda: "after")
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on before$"), prepare.held(tmp_path):
            pass
        assert prepare.is_held(tmp_path)
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    assert not prepare.is_held(tmp_path)
    with prepare.held(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on after"


def test_of_two_that_publish_one_folder_the_later_one_stays_whole(tmp_path: Path) -> None:
    """Exports and evaluations hold no folder: each appears whole, and the one that was overtaken says so."""
    target = tmp_path / "export"

    def write(kind: str, meanwhile: Callable[[], None]) -> None:
        with artifacts.publish(target, kind=kind) as temporary:
            (temporary / "a").write_text(kind)
            meanwhile()

    with pytest.raises(ResourceError, match="export: cannot write"):
        write("first", lambda: write("second", lambda: None))
    assert artifacts.verify(target)["kind"] == "second"
    assert (target / "a").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


# --- row 34: what moves


def test_a_run_that_moved_between_kill_and_start_goes_on(folder: Path, command: list[str], alone: Any) -> None:
    (folder / "far").mkdir()
    shutil.move(folder / "run", folder / "far/away")
    output = trained(folder, *command, "run_dir=far/away")
    assert "resuming after step 4 of 20" in output
    exact(folder / "far/away", alone)


def test_a_run_that_moved_after_its_end_is_all_there(
    micro: Path, alone: Any, command: list[str], tmp_path: Path, capsys: Any
) -> None:
    """evaluate, export, report, start_from, the API, and `train` again, from where it lies now."""
    shutil.copytree(alone(), tmp_path / "first/run")
    shutil.move(tmp_path / "first/run", tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert "already complete" in trained(tmp_path, *command, "run_dir=second")
    asked = f"prompts.path={micro / 'prompts.jsonl'}"
    for verb, given in (
        ("evaluate", ["run_dir=second", asked, *SHORT]),
        ("export", ["run_dir=second", "exporter=native", "out=exported"]),
        ("report", ["run_dirs=[second]"]),
        ("train", [*command, "run_dir=third", "trainer.max_steps=1", "start_from={medusa: second/heads/medusa}"]),
    ):
        code, output = call(verb, *given, cwd=tmp_path)
        assert code == 0, output
    shutil.move(tmp_path / "exported", tmp_path / "carried")

    from draftsmith import generate, load_base, load_head

    base = load_base(str(micro / "base"))
    plain = generate(base, [11, 12, 13], max_new_tokens=8).tokens
    for head in ("second/heads/medusa", "carried"):
        assert (
            generate(base, [11, 12, 13], head=load_head(tmp_path / head, base=base), max_new_tokens=8).tokens == plain
        )


@pytest.fixture
def moved(micro: Path, folder: Path) -> list[str]:
    """The base and the rows somewhere else, and how they are given now."""
    shutil.copytree(micro / "base", folder / "models/base")
    (folder / "sets").mkdir()
    shutil.copy(micro / "rows.jsonl", folder / "sets/rows.jsonl")
    return ["base.path=models/base", "data.path=sets/rows.jsonl"]


def test_a_base_and_rows_that_moved_are_known_by_their_contents(
    folder: Path, command: list[str], moved: list[str], alone: Any, micro: Path
) -> None:
    output = trained(folder, *command, *moved)
    table = [line.split() for line in output.splitlines()]
    for key, now in (("base.path", "models/base"), ("data.path", "sets/rows.jsonl")):
        assert [now, "moved"] in [line[-2:] for line in table if line[:1] == [key]]
    assert f"changed after step 4: base.path: {micro / 'base'} -> models/base, data.path: " in output
    exact(folder / "run", alone)
    assert "path: models/base" in (folder / "run/config.yaml").read_text()  # where evaluate and export look
    changed = json.loads((folder / "run/provenance.json").read_text())["changed"]
    assert [sorted(c["keys"]) for c in changed] == [["base.path", "data.path"]]
    code, output = call("export", "run_dir=run", "exporter=native", "out=out", cwd=folder)
    assert code == 0, output


def test_a_complete_run_is_complete_wherever_its_base_lies_but_not_on_another_one(
    folder: Path, command: list[str], moved: list[str], alone: Any, tmp_path: Path
) -> None:
    shutil.rmtree(folder / "run")
    shutil.copytree(alone(), folder / "run")
    before = content(folder / "run")
    assert "already complete" in trained(folder, *command, *moved)
    weights = folder / "models/base/model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-3] ^= 1
    weights.write_bytes(flipped)
    code, output = call("train", *command, *moved, cwd=folder)
    assert code == 3, output
    assert "run: complete, but on another base than " in output
    (folder / "sets/rows.jsonl").write_text((folder / "sets/rows.jsonl").read_text() + "\n" * 2 + "{}\n")
    code, output = call("train", *command, *moved[1:], cwd=folder)
    assert code == 3, output
    assert "complete, but with other data than there is now" in output
    reports = {"report.html", "report.md"}
    assert {k: v for k, v in content(folder / "run").items() if k not in reports} == {
        k: v for k, v in before.items() if k not in reports
    }


def test_through_symbolic_links(folder: Path, command: list[str], micro: Path, alone: Any) -> None:
    shutil.move(folder / "run", folder / "real")
    (folder / "run").symlink_to("real")
    (folder / "base").symlink_to(micro / "base")
    (folder / "rows.jsonl").symlink_to(micro / "rows.jsonl")
    trained(folder, *command, "base.path=base", "data.path=rows.jsonl")
    assert (folder / "run").is_symlink()
    exact(folder / "real", alone)


def test_no_link_is_ever_made(folder: Path, command: list[str], alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have none."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    trained(folder, *command)
    exact(folder / "run", alone)
    code, output = call("export", "run_dir=run", "exporter=portable", "out=out", cwd=folder)
    assert code == 0, output
    assert [p for p in folder.rglob("*") if p.is_symlink() or (p.is_file() and p.stat().st_nlink > 1)] == []


def test_a_clock_that_runs_backwards_and_another_host_name_change_nothing(
    folder: Path, command: list[str], alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is the one of the highest step, whatever its file's time says."""
    now = [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return cls.fromtimestamp(back(), tz)

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr("draftsmith.training.callbacks.datetime", Past)
    for owner, name in ((platform, "node"), (socket, "gethostname")):
        monkeypatch.setattr(owner, name, lambda: "renamed")
    for number, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (4e9 + number, 4e9 + number))  # in the future, and the earliest last
    output = trained(folder, *command)
    assert "resuming after step 4 of 20" in output
    exact(folder / "run", alone)
    times = [json.loads(line)["time"] for line in (folder / "run/events.jsonl").read_text().splitlines()]
    assert times != sorted(times)
    code, output = call("report", "run_dirs=[run]", cwd=folder)
    assert code == 0, output


def places(value: Any, needle: str, at: str = "") -> Iterator[str]:
    """The keys under which a text stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, needle, f"{at}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from places(inner, needle, at)
    elif isinstance(value, str) and needle in value:
        yield at


def test_nothing_but_the_name_of_the_base_tells_where_things_lay(
    folder: Path, micro: Path, command: list[str], moved: list[str]
) -> None:
    """Everything is given relative to the working folder. The base's full path alone is told, for people and for who
    evaluates from another folder; nobody needs it (the tests above)."""
    shutil.copy(micro / "prompts.jsonl", folder / "sets/prompts.jsonl")
    base = ["base=hf", "base.path=models/base"]
    trained(folder, *command, *moved)
    for verb, given in (
        ("distill", [*distil(micro), *base, "data.prompts.path=sets/prompts.jsonl", "out=rows"]),
        ("capture", [*base, "rows=rows", "out=store"]),
        ("label", [*base, "companion=hf", "companion.path=models/base", "rows=rows", "out=labels"]),
        ("export", ["run_dir=run", "exporter=native", "out=native"]),
        ("export", ["run_dir=run", "exporter=portable", "out=portable"]),
        ("export", ["run_dir=run", "exporter=vllm_medusa", "out=vllm"]),
    ):
        code, output = call(verb, *given, cwd=folder)
        assert code == 0, output
    told: set[str] = set()
    for name in ("run/heads", "run/checkpoints", "rows", "store", "labels", "native", "portable", "vllm"):
        found = [p for p in (folder / name).rglob("*") if p.is_file()]
        assert len(found) >= 2
        for path in (p for p in found if str(folder).encode() in p.read_bytes()):
            if path.suffix == ".json":
                told |= set(places(json.loads(path.read_text()), str(folder)))
            else:
                assert path.name == "README.md", path
                lines = [line for line in path.read_text().splitlines() if str(folder) in line]
                assert all(str(folder / "models/base") in line for line in lines), path
    assert told == {"base.path", "companion.path", "base_model_name_or_path"}  # the last in a form of another's
    for name in ("provenance.json", "config.yaml", "metrics.jsonl"):
        assert str(folder) not in (folder / "run" / name).read_text()
