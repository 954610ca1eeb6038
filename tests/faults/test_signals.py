"""Signals at the moments that are hard: before the first step, twice, in the midst of a save, while a tracker is waited
for. Each ends by 75 with the command that goes on, and what was complete stays so."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts, signals
from draftsmith.signals import SIGNALS
from tests.integration.conftest import Fork, draftsmith, finish, micro, training  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults

STEPS = 30


@pytest.fixture(scope="module")
def command(training: list[str]) -> list[str]:  # noqa: F811
    return [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=5", "run_dir=run"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    code, output = draftsmith("train", *command, cwd=folder)
    assert code == 0, output
    return weights(folder)


def weights(folder: Path) -> str:
    return artifacts.file_sha256(folder / "run" / "heads" / "medusa" / "model.safetensors")


def wait(process: Fork, seen: Callable[[], Any], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not seen():
        assert process.poll() is None, process.finish(1)[1]
        assert time.monotonic() < until
        time.sleep(0.001)


def saved(folder: Path) -> list[str]:
    """Checkpoints under their final names, each of them whole."""
    names = sorted(p.name for p in (folder / "run" / "checkpoints").glob("step-*"))
    for name in names:
        artifacts.verify(folder / "run" / "checkpoints" / name, manifest="COMPLETE.json")
    return names


def goes_on(command: list[str], folder: Path, whole: str) -> None:
    code, output = draftsmith("train", *command, cwd=folder)
    assert code == 0, output
    assert weights(folder) == whole


def says_how(output: str, verb: str) -> None:
    line = output.splitlines()[-1]
    assert line.startswith(f"resume: draftsmith {verb} "), output
    assert "Traceback" not in output
    assert shlex.split(line)[-1].partition("=")[0] in ("run_dir", "out")


@pytest.mark.parametrize("number", SIGNALS, ids=[s.name for s in SIGNALS])
def test_before_the_first_step(command: list[str], whole: str, tmp_path: Path, number: int) -> None:
    """There is nothing to save yet: it ends at once."""
    process = Fork("train", *command, cwd=tmp_path)
    wait(process, (tmp_path / "run" / ".lock").exists)
    os.kill(process.pid, number)
    code, output = finish(process)
    assert code == 75, output
    says_how(output, "train")
    assert saved(tmp_path) == []
    goes_on(command, tmp_path, whole)


def test_twice_leaves_at_once(command: list[str], whole: str, tmp_path: Path) -> None:
    """In the midst of a save that takes a minute: a first signal would wait for it, a second one does not."""
    process = Fork(str(Path(__file__).with_name("slow_save.py")), *command, cwd=tmp_path)
    wait(process, (tmp_path / "saving").exists)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    code, output = process.finish(10)
    assert code == 75, output
    assert "checkpoint saved" not in output
    assert saved(tmp_path) == ["step-00000005"]
    goes_on(command, tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_whole_process_group_with_a_loaders_worker(
    command: list[str], whole: str, tmp_path: Path, number: int
) -> None:
    """A terminal and Slurm send a signal to everybody; a worker that died of it would take the run along."""
    process = Fork("train", *command, "data.num_workers=1", cwd=tmp_path)
    wait(process, lambda: saved(tmp_path))
    os.killpg(process.pid, number)
    code, output = finish(process)
    assert code == 75, output
    assert "checkpoint saved" in output
    goes_on(command, tmp_path, whole)


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As SIGINT is for what a script starts in its background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for handled in (signals.noted, lambda: signals.handled(lambda *_: None)):
            with handled():
                assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_the_midst_of_a_save(command: list[str], whole: str, tmp_path: Path) -> None:
    """The save that is under way ends, then the one that the signal asks for."""
    process = Fork("train", *command, cwd=tmp_path)
    wait(process, lambda: list((tmp_path / "run" / "checkpoints").glob(".step-*.tmp-*")))
    os.kill(process.pid, signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output
    says_how(output, "train")
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert saved(tmp_path)[-1] == f"step-{step:08d}"
    assert f"stopped by a signal after step {step} of {STEPS}, checkpoint saved" in output
    goes_on(command, tmp_path, whole)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("at", ["stopped", "complete"])
def test_while_a_tracker_is_waited_for(command: list[str], whole: str, tmp_path: Path, silent: str, at: str) -> None:
    """Stopped by a first signal, or with all its steps made, it waits for a tracker that says nothing: another signal
    waits no longer."""
    tracked = [*command, "logger=mlflow", f"logger.uri={silent}", "logger.patience=300"]
    process = Fork("train", *tracked, cwd=tmp_path)
    if at == "stopped":
        wait(process, lambda: saved(tmp_path))
        os.kill(process.pid, signal.SIGTERM)
        events = tmp_path / "run" / "events.jsonl"
        wait(process, lambda: '"stopped"' in events.read_text())
    else:
        wait(process, (tmp_path / "run" / "COMPLETE.json").exists)
    time.sleep(0.5)  # into the wait
    assert process.poll() is None
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    code, output = process.finish(20)
    assert time.monotonic() - began < 10
    assert code == 75, output
    goes_on(command, tmp_path, whole)


def test_every_other_verb_says_how_it_goes_on(micro: Path, tmp_path: Path) -> None:  # noqa: F811
    """distill by the base itself, in its own loop; capture, which has none."""
    base = ["base=hf", f"base.path={micro / 'base'}", "threads=1"]
    asked = [*base, "data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "data.generation.batch_size=1"]
    asked += ["data.generation.max_new_tokens=40", "data.generation.shard_rows=2", "out=rows"]
    process = Fork("distill", *asked, cwd=tmp_path)
    wait(process, lambda: list((tmp_path / "rows").glob("journal/*.jsonl")))
    os.kill(process.pid, signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output
    says_how(output, "distill")
    assert draftsmith("distill", *asked, cwd=tmp_path)[0] == 0
    capture = [*base, "rows=rows", "out=store"]
    process = Fork("capture", *capture, cwd=tmp_path)
    wait(process, (tmp_path / "store" / ".lock").exists)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    says_how(output, "capture")
    code, output = draftsmith("capture", *capture, cwd=tmp_path)
    assert code == 0, output
    artifacts.verify(tmp_path / "store")
