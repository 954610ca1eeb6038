"""A killed run, started again by the same command, ends with the weights of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from draftsmith.artifacts import file_sha256

from .conftest import Fork, draftsmith, finish

STEPS = 40
EPOCH = 8  # steps: the fixture's 16 packs, two a step


def only(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def weights(run: Path) -> str:
    return file_sha256(run / "heads" / "medusa" / "model.safetensors")


def log(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line: a duplicate or missing step would show."""
    return [(m["step"], m["train/medusa/loss"]) for m in map(json.loads, (run / "metrics.jsonl").open())]


@pytest.fixture(scope="module")
def command(training: list[str]) -> list[str]:
    return [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=4"]


@pytest.fixture(scope="module")
def reference(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = draftsmith("train", *command, cwd=folder)
    assert code == 0, output
    return only(folder)


def kill_when(folder: Path, command: list[str], checkpoint: str, number: int) -> tuple[int, str]:
    """Starts the run and sends the signal as soon as that checkpoint is complete."""
    process = Fork("train", *command, cwd=folder)
    seal = f"runs/*/checkpoints/{checkpoint}/COMPLETE.json"
    deadline = time.monotonic() + 120
    while not list(folder.glob(seal)):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"{checkpoint} never came"
        time.sleep(0.001)
    os.kill(process.pid, number)
    return finish(process)


def test_kill_9_mid_epoch_and_after_an_epochs_last_step(command: list[str], reference: Path, tmp_path: Path) -> None:
    for step in (EPOCH // 2, EPOCH):
        code, output = kill_when(tmp_path, command, f"step-{step:08d}", signal.SIGKILL)
        assert code == -signal.SIGKILL, output
        assert not (only(tmp_path) / "heads").exists()
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert code == 0, output
    assert "resuming after step" in output
    run = only(tmp_path)  # the command named no run_dir: the default one was found again
    assert run.name == reference.name
    assert weights(run) == weights(reference)
    assert log(run) == log(reference)
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert (code, "already complete" in output) == (0, True)


def test_sigterm_saves_exits_75_and_resumes(command: list[str], reference: Path, tmp_path: Path) -> None:
    code, output = kill_when(tmp_path, command, "step-00000004", signal.SIGTERM)
    assert code == 75, output
    assert "the same command resumes" in output
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert code == 0, output
    assert weights(only(tmp_path)) == weights(reference)
    assert log(only(tmp_path)) == log(reference)


def test_a_damaged_checkpoint_is_passed_over(command: list[str], reference: Path, tmp_path: Path) -> None:
    kill_when(tmp_path, command, "step-00000008", signal.SIGKILL)
    newest = sorted(only(tmp_path).glob("checkpoints/step-*/medusa.safetensors"))[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[-3] ^= 1
    newest.write_bytes(bytes(damaged))
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert code == 0, output
    assert "checkpoint skipped" in output
    assert weights(only(tmp_path)) == weights(reference)
