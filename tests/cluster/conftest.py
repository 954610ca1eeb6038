"""A micro base and its rows, the run of one process that all others must equal, and commands that end with the test."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # a tied random base repeats its last token, which says nothing
}
EQUAL = 1e-5  # weights and relative losses of two processes against those of one: sums in another order
FAULT = 60  # steps of a run that something happens to
BATCH = 4  # packs in a step, over all processes


@pytest.fixture(scope="session")
def micro(micro_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro base, 32 rows (as many packs: 8 steps an epoch) and prompts."""
    return micro_maker(tmp_path_factory.mktemp("micro"), SHAPE, rows=32, prompts=40)


@dataclass(frozen=True)
class Training:
    """Overrides that train a head on the micro base, and what one process makes of them."""

    micro: Path
    folder: Path

    def overrides(self, run: Path, steps: int, processes: int = 2, **more: Any) -> list[str]:
        keys = {
            "base": "hf",
            "base.path": self.micro / "base",
            "data": "jsonl",
            "data.path": self.micro / "rows.jsonl",
            "data.length": 64,
            "data.batch_size": BATCH // processes,
            "trainer.threads": 1,
            "trainer.epochs": "null",
            "trainer.log_every": 1,
            "trainer.max_steps": steps,
            "trainer.checkpoint_every": 10,
            "run_dir": run,
        }
        return [f"{key}={value}" for key, value in {**keys, **more}.items()]

    def alone(self, steps: int) -> Path:
        """The uninterrupted run of one process."""
        run = self.folder / f"alone-{steps}"
        if not (run / "COMPLETE.json").exists():
            command = [sys.executable, "-m", "draftsmith.train", *self.overrides(run, steps, processes=1)]
            code, told = finish(start(command, self.folder))
            assert code == 0, told
        return run

    def check(self, run: Path, steps: int) -> None:
        """The run is complete, and what one process makes, step by step."""
        from safetensors.torch import load_file

        theirs, ours = (losses(r) for r in (self.alone(steps), run))
        assert [step for step, _ in ours] == list(range(1, steps + 1))  # none twice, none missing
        worst = max(abs(a - b) / a for (_, a), (_, b) in zip(theirs, ours, strict=True))
        assert worst < EQUAL
        theirs_w, ours_w = (load_file(r / "heads" / "medusa" / "model.safetensors") for r in (self.alone(steps), run))
        apart = max(float((theirs_w[name] - ours_w[name]).abs().max()) for name in theirs_w)
        assert apart < EQUAL
        print(f"{run.name}: {steps} steps, losses within {worst:.1e}, weights within {apart:.1e} of one process's")


@pytest.fixture(scope="session")
def training(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(micro, tmp_path_factory.mktemp("alone"))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["train/medusa/loss"]) for m in map(json.loads, (run / "metrics.jsonl").open())]


def start(command: list[Any], cwd: Path, **environment: str) -> subprocess.Popen:
    """The command in a session of its own, as a user starts it; stderr joins stdout, in cwd/<number>.log."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "DRAFTSMITH_CACHE": str(cwd / "cache"), "VENV": sys.prefix}
    log = open(cwd / f"{len(list(cwd.glob('*.log')))}.log", "w+")  # noqa: SIM115 (its end is read in finish)
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**own, **environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    process.log = log  # type: ignore[attr-defined]
    return process


def finish(process: Any, seconds: float = 240) -> tuple[int, str]:
    """(exit code, output); what is not over by then is killed, and the test fails with what it said."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"not over after {seconds} s; it said: {said(process)[-4000:]}")
    return process.returncode, said(process)


def said(process: Any) -> str:
    return Path(process.log.name).read_text(errors="replace")


def end(process: Any) -> None:
    """Kills the command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(tuple(map(int, line.split())) for line in found.splitlines())
    below, new = [], {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        below += sorted(new)
    return below


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """run(command, **environment): a process that does not outlive the test."""
    started: list[subprocess.Popen] = []

    def begin(command: list[Any], **environment: str) -> subprocess.Popen:
        started.append(start(command, tmp_path, **environment))
        return started[-1]

    yield begin
    for process in started:
        end(process)


def workers(process: Any, verb: str = "train") -> dict[int, int]:
    """rank -> pid of the processes that train, by their own environment."""
    found = {}
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
            if command[1:3] == [b"-u", b"-m"] and f"draftsmith.{verb}".encode() in command and rank:
                found[int(rank[1])] = pid
    return found


def until(condition: Callable[[], Any], what: str, seconds: float = 180, *alive: Any) -> Any:
    """Waits for something true; fails where it never comes or where a process that should live has ended."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        for process in alive:
            assert process.poll() is None, f"ended before {what}: {said(process)[-4000:]}"
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.05)
    return found


def saved(run: Path, step: int = 10) -> Callable[[], bool]:
    """Whether the checkpoint of that step, or a later one, is complete."""
    return lambda: any(int(p.parent.name[5:]) >= step for p in run.glob("checkpoints/step-*/COMPLETE.json"))


def needs(*programs: str, root: bool = True) -> None:
    """Skips the module, and says why, where this machine cannot run it."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed", allow_module_level=True)
    if root and os.geteuid() != 0:
        pytest.skip("needs root", allow_module_level=True)
    missing = [p for p in programs if shutil.which(p) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-cluster installs them", allow_module_level=True)
