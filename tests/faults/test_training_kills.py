"""Trainings killed at random moments, or stopped by signals: the same command ends with the weights of one left alone,
after the same steps on the same rows.

DRAFTSMITH_KILLS: how many trainings of each kind (make test-faults-long: 50). DRAFTSMITH_SEED: other moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts
from draftsmith.signals import SIGNALS
from tests.integration.conftest import Fork, finish, micro, training  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
KILLS = int(os.environ.get("DRAFTSMITH_KILLS", "3"))
STEPS, EPOCH = 48, 8  # the micro base's 16 packs, two a step
RUN = Path("run")


class Training:
    """One run, in a folder of its own; the same command as often as it takes."""

    def __init__(self, folder: Path, command: list[str], **environment: str) -> None:
        self.folder, self.run, self.command, self.environment = folder, folder / RUN, command, environment
        folder.mkdir(exist_ok=True)

    def start(self) -> Fork:
        return Fork(str(HERE / "recorded.py"), *self.command, cwd=self.folder, **self.environment)

    def ended(self) -> str:
        code, output = finish(self.start())
        assert code == 0, output
        return output

    def stopped(self, rng: random.Random, seconds: float, number: int) -> tuple[int | None, str]:
        """(exit code, output) of a start that meets the signal at a random moment of its `seconds`, mostly of its
        steps; None where it was over before."""
        process, began, lines = self.start(), time.monotonic(), self.run / "metrics.jsonl"
        at_step = rng.randint(1, STEPS - 1) if rng.random() < 0.8 else 0
        later = rng.uniform(0, 0.1 if at_step else seconds)
        while process.poll() is None:
            written = lines.read_bytes().count(b"\n") if at_step and lines.exists() else 0
            if written >= at_step and (at_step or time.monotonic() - began > later):
                break
            time.sleep(0.002)
        if at_step:
            time.sleep(later)
        over = process.poll() is not None
        if not over:
            os.kill(process.pid, number)
        code, output = finish(process)
        return (None if over else code), output

    @property
    def weights(self) -> str:
        return artifacts.file_sha256(self.run / "heads" / "medusa" / "model.safetensors")

    @property
    def losses(self) -> list[tuple[int, str]]:
        """(step, loss as it is written, which is to the last bit)."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], repr(line["train/medusa/loss"])) for line in lines]

    @property
    def served(self) -> dict[int, list[str]]:
        """step -> documents; a step that was trained again after a kill must have had the same ones."""
        found: dict[int, list[str]] = {}
        for line in (self.folder / "served.jsonl").read_text().splitlines():
            step, documents = json.loads(line).values()
            assert found.setdefault(step, documents) == documents, f"step {step} had other rows the second time"
        return found


@pytest.fixture(scope="module")
def command(training: list[str]) -> list[str]:  # noqa: F811
    return [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=3", f"run_dir={RUN}"]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, float]:
    """A run left alone, and how many seconds the second one took."""
    folder = tmp_path_factory.mktemp("whole")
    Training(folder / "first", command).ended()
    run, began = Training(folder / "whole", command), time.monotonic()
    run.ended()
    per_epoch: dict[int, Counter[str]] = defaultdict(Counter)
    for step, documents in run.served.items():
        per_epoch[(step - 1) // EPOCH].update(documents)
    rows = set(per_epoch[0])
    assert len(rows) == 2 * EPOCH
    assert all(epoch == Counter(dict.fromkeys(rows, 1)) for epoch in per_epoch.values())  # each once per epoch
    return run, time.monotonic() - began


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A folder on another file system than the tests' own, for $TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder
        assert os.listdir(folder) == [], "litter in $TMPDIR"


def exact(run: Training, whole: Training) -> None:
    assert run.weights == whole.weights
    assert run.losses == whole.losses
    assert run.served == whole.served
    left = [str(p.relative_to(run.run)) for p in run.run.rglob(".*") if p.name != ".lock"]
    assert not left, f"litter: {left}"


def test_kill_9_at_random_moments(
    whole: tuple[Training, float], command: list[str], tmp_path: Path, elsewhere: str, capsys: Any
) -> None:
    """Two kills each; every second run with $TMPDIR on another file system."""
    rng = random.Random(os.environ.get("DRAFTSMITH_SEED", "0"))
    kills, resumed, unread, done, n = 0, 0, 0, 0, 0
    while done < KILLS:
        run = Training(tmp_path / f"run-{n}", command, **({"TMPDIR": elsewhere} if n % 2 else {}))
        n += 1
        killed = 0
        for _ in range(2):
            code, output = run.stopped(rng, whole[1], signal.SIGKILL)
            if code is None:
                break
            assert code == -signal.SIGKILL, output
            killed += 1
        output = run.ended()
        resumed += "resuming after step" in output
        unread += "checkpoint skipped" in output
        exact(run, whole[0])
        kills, done = kills + killed, done + bool(killed)
    with capsys.disabled():
        told = f"{done} trainings, {kills} kills, {resumed} resumed, {unread} checkpoints unreadable"
        print(f"\n    {told}: weights, losses and rows of every step equal", end="")
    assert unread == 0
    assert resumed > done / 2


def test_signals_at_random_moments(
    whole: tuple[Training, float], command: list[str], tmp_path: Path, capsys: Any
) -> None:
    """Each ends by 75 with the command that goes on, at most one step late, and nothing of it is lost."""
    rng, codes, n = random.Random(os.environ.get("DRAFTSMITH_SEED", "1")), Counter[Any](), 0
    while codes[75] < KILLS:
        run, number = Training(tmp_path / f"run-{n}", command), rng.choice(SIGNALS)
        n += 1
        code, output = run.stopped(rng, whole[1], number)
        codes[code] += 1
        assert code in (75, 0, None), f"{number.name}: {output}"
        if code == 75:
            assert output.splitlines()[-1].startswith("resume: ")
            assert f"run_dir={RUN}" in output.splitlines()[-1]
            if "stopped by a signal after step" in output:
                trained = max(run.served)
                saved = json.loads((run.run / "checkpoints" / "last").read_text())["checkpoint"]
                assert int(saved.removeprefix("step-")) == trained == run.losses[-1][0]
        run.ended()
        exact(run, whole[0])
        assert n < 5 * KILLS
    with capsys.disabled():
        print(f"\n    {n} trainings met a signal, {codes[75]} ended by 75: resumed equal to the bit", end="")
