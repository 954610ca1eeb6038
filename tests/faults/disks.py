# ruff: noqa: F811 (fixtures of another module are imported, and then are names of parameters)
"""Small disks that fill up when they are told to, and what every verb makes of the same few rows on a large one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from integration.conftest import micro, training  # noqa: F401

from draftsmith import artifacts, config

STEPS = 12
LOGS = {"metrics.jsonl", "events.jsonl", ".lock", ".seal.lock"}  # appended to, or taken anew
PAGE = 4096


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def fill(self) -> None:
        with open(self.filler, "ab", buffering=0) as f, contextlib.suppress(OSError):
            for size in (2**20, PAGE):
                with contextlib.suppress(OSError):
                    while f.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        self.filler.unlink()

    def used(self) -> int:
        told = os.statvfs(self.folder)
        return (told.f_blocks - told.f_bfree) * told.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """disk(mount options): a Disk at tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Disk:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
        return Disk(folder)

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def command(verb: str, *overrides: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """(exit code, output) of a verb, as its main() would answer, in this process."""
    told = io.StringIO()
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as m:
        for name, value in {"DRAFTSMITH_CACHE": str(cwd / "cache"), **environment}.items():
            m.setenv(name, value)
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            run = import_module(f"draftsmith.{verb}").run
            code = config._guarded(lambda: run(config.compose(verb, overrides)), verb, debug=False)
    return code, told.getvalue()


def error_of(code: int, output: str) -> str:
    """The one line of a command that the disk refused."""
    assert code == 5, output
    assert "Traceback" not in output
    (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
    return line


def at(m: pytest.MonkeyPatch, place: str, number: int, act: Callable[[], Any]) -> None:
    """Does act() before the number-th call of a function, named by its module."""
    module, _, name = place.rpartition(".")
    try:
        owner = import_module(module)
    except ModuleNotFoundError:
        owner = getattr(import_module(module.rpartition(".")[0]), module.rpartition(".")[2])
    real, calls = getattr(owner, name), [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*given, **named)

    m.setattr(owner, name, counted)


def content(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in LOGS and p.parent.name != "journal"
    }


def check_whole(folder: Path) -> None:
    """Nothing of a temporary name, and nothing under a final one that is not complete."""
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name or p.name in (".rehearsal", ".old")]
    for manifest in (*folder.rglob("manifest.json"), *folder.rglob("COMPLETE.json")):
        if "files" in json.loads(manifest.read_text()):
            artifacts.verify(manifest.parent, manifest=manifest.name)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


# --- the verbs, and what each of them makes of the same few rows


class Made(NamedTuple):
    """What is there before a verb runs, and what each of them leaves when it is left alone."""

    folder: Path
    base: list[str]
    training: list[str]

    def overrides(self, verb: str, place: Path) -> list[str]:
        """That make the verb write into `place`."""
        rows = f"rows={self.folder / 'distill'}"
        asked = f"data.prompts.path={self.folder / 'base' / 'prompts.jsonl'}"
        companion = ["companion=hf", self.base[1].replace("base.", "companion.")]
        generation = [f"data.generation.{k}" for k in ("max_new_tokens=8", "shard_rows=2", "batch_size=2")]
        quick = ["prompts.synthetic=2", "repeats=1", "baselines=few", "decoding.max_new_tokens=4", "threads=1"]
        load = [f"load=[{self.folder / 'train' / 'heads' / 'medusa'}]", *self.base]
        return {
            "train": [*self.training, f"run_dir={place}"],
            "distill": [*self.base, "data=prompts", asked, *generation, f"out={place}"],
            "capture": [*self.base, rows, "store.shard_rows=2", f"out={place}"],
            "label": [*self.base, *companion, rows, f"out={place}"],
            "export": [*load, "exporter=reference", f"out={place}"],
            "adopt": [*self.base, f"path={self.folder / 'export'}", "kind=medusa", f"out={place}"],
            "evaluate": [*load, *quick, f"run_dir={place}"],
        }[verb]


VERBS = ("train", "distill", "capture", "label", "export", "adopt", "evaluate")


@pytest.fixture(scope="module")
def made(micro: Path, training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "base").symlink_to(micro)
    steps = [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=2"]
    found = Made(folder, ["base=hf", f"base.path={micro / 'base'}"], steps)
    for verb in VERBS:
        code, output = command(verb, *found.overrides(verb, folder / verb), cwd=folder)
        assert code == 0, output
    return found


def equal(verb: str, mine: Path, alone: Path) -> None:
    """The result is that of a run left alone; reports, times and figures of speed aside."""
    if verb == "train":
        for name in ("heads/medusa/model.safetensors", "heads/medusa/capsule.safetensors"):
            assert (mine / name).read_bytes() == (alone / name).read_bytes(), name
        logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (mine, alone)]
        losses = [[(x["step"], x["train/medusa/loss"]) for x in log] for log in logs]
        assert losses[0] == losses[1]
    elif verb == "evaluate":
        told = [json.loads((f / "evaluation.json").read_text())["heads"]["medusa"] for f in (mine, alone)]
        assert told[0]["tokens_per_step"] == told[1]["tokens_per_step"]
    else:
        names = {"README.md", "config.json", "manifest.json"} if verb == "adopt" else set()  # its name is its folder's
        both = [{k: v for k, v in content(f).items() if k not in names} for f in (mine, alone)]
        assert both[0] == both[1]
