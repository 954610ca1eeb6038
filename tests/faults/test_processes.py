"""Two processes of which one is killed, hangs or cannot write: nobody waits for ever, and nothing is lost.

DRAFTSMITH_KILLS: five times as many as runs are killed (make test-faults-long: 50).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts import file_sha256
from tests.integration.conftest import finish, micro, start, training  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults

PAIR = Path(__file__).parents[1] / "integration" / "pair.py"
KILLS = max(1, int(os.environ.get("DRAFTSMITH_KILLS", "3")) // 5)
TIMEOUT = 8  # strategy.timeout of the cases that hang


class Two:
    """torchrun with two processes at the cases of pair.py."""

    def __init__(self, folder: Path, *cases: str) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(PAIR), str(folder), *cases],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """The process numbers of both, as far as they are there, in their order."""
        told = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {}
        for pid in told.read_text().split() if told.exists() else []:
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # gone meanwhile
                continue
            for line in environment:
                if line.startswith(b"RANK="):
                    found[int(line[5:])] = int(pid)
        return [found[r] for r in sorted(found)]

    def end(self, seconds: float = 120) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            output, _ = self.process.communicate()
            pytest.fail(f"still there after {seconds} s: {output[-3000:]}")
        return self.process.returncode, output


def wait_for(path: Path, run: Two, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert run.process.poll() is None, run.end()[1]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_of_a_process(tmp_path: Path, capsys: Any) -> None:
    """At random moments, of a random process, ZeRO-2 and DDP in turn; then the same command to its end."""
    rng = random.Random(os.environ.get("DRAFTSMITH_SEED", "0"))
    code, output = Two(tmp_path, "long-zero2", "long-ddp").end()
    assert code == 0, output
    ends = {name: file_sha256(tmp_path / f"{name}.safetensors") for name in ("long-zero2", "long-ddp")}
    kills, resumed = 0, 0
    for n in range(KILLS):
        case = f"long-{rng.choice(['zero2', 'ddp'])}"
        for _ in range(rng.choice([1, 2])):
            run = Two(tmp_path, f"{case}@killed-{n}")
            checkpoints = tmp_path / f"killed-{n}" / "checkpoints"
            before = set(checkpoints.glob("step-*"))
            deadline = time.monotonic() + 90
            while run.process.poll() is None and set(checkpoints.glob("step-*")) <= before:
                assert time.monotonic() < deadline, "no checkpoint came"
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 1.0))
            ranks = run.ranks()
            if run.process.poll() is not None or len(ranks) < 2:
                run.end()
                break
            os.kill(rng.choice(ranks), signal.SIGKILL)
            kills += 1
            code, output = run.end(60)
            assert code != 0, output
        code, output = Two(tmp_path, f"{case}@killed-{n}").end()
        assert code == 0, output
        resumed += "resuming after step" in output
        assert file_sha256(tmp_path / f"killed-{n}.safetensors") == ends[case], case
        steps = [json.loads(line)["step"] for line in (tmp_path / f"killed-{n}" / "metrics.jsonl").open()]
        assert steps == list(range(1, len(steps) + 1))
    with capsys.disabled():
        print(f"\n    {KILLS} runs, {kills} kills, {resumed} resumed: weights equal to the bit", end="", flush=True)
    assert kills
    assert resumed


def test_a_process_that_hangs(tmp_path: Path) -> None:
    """The other one names it and the step, and it leaves by itself: within the timeout and ten seconds."""
    run = Two(tmp_path, "hang")
    wait_for(tmp_path / "hanging", run)
    began = time.monotonic()
    code, output = run.end(60)
    assert time.monotonic() - began < TIMEOUT + 10 + 4  # the launcher's own leave-taking
    assert code != 0
    assert re.search(r"process 1 hangs in step 4; the others waited in \w+ of step 4", output), output
    assert "PeerError" in output
    assert "process 1: the others gave it up in step 4" in output


def test_a_commands_process_that_dies_is_named(training: list[str], tmp_path: Path) -> None:  # noqa: F811
    """`draftsmith train trainer.devices=2`, whose second process is killed: code 6 and its name."""
    command = [*training, "trainer.devices=2", "data.batch_size=1", "strategy=ddp", f"strategy.timeout={TIMEOUT}"]
    command += ["trainer.max_steps=2000", "trainer.checkpoint_every=5", "run_dir=run"]
    process = start([sys.executable, "-m", "draftsmith.train", *command], tmp_path)
    until = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    second = next(rank for rank in children(process.pid) if b"RANK=1" in environment(rank))
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    code, output = finish(process)
    assert time.monotonic() - began < TIMEOUT + 10 + 5  # the launcher's own leave-taking
    assert code == 6, output
    assert re.search(r"error: process 1 (was killed by SIGKILL|died)", output), output
    assert "Traceback" not in output


def children(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in told.split()]


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_a_save_that_fails_fails_everywhere(tmp_path: Path) -> None:
    """The first process cannot write; both end by that, and the pointer stays where it was."""
    code, output = Two(tmp_path, "full").end()
    assert code != 0
    assert "rank 0 ends by ResourceError: No space" in output
    assert "rank 1 ends by ResourceError: process 0: No space" in output
    checkpoints = tmp_path / "full" / "checkpoints"
    assert json.loads((checkpoints / "last").read_text()) == {"checkpoint": "step-00000004"}
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000002", "step-00000004"]


def test_a_loss_of_one_process_that_is_not_finite_is_everybodys(tmp_path: Path) -> None:
    """Under DDP all leave the step out, and hold equal weights (pair.py looks); DeepSpeed stops everywhere."""
    code, output = Two(tmp_path, "inf-ddp", "inf-zero2").end()
    assert code != 0
    assert (tmp_path / "inf-ddp.json").exists(), output  # it ended
    (line,) = map(json.loads, (tmp_path / "inf-ddp" / "nonfinite.jsonl").open())
    assert (line["step"], len(line["rows"])) == (4, 4)  # of both processes and both micro-batches
    assert "rank 0 ends by Diverged: all heads: gradient norm nan; head: loss " in output
    assert json.loads((tmp_path / "inf-zero2" / "nonfinite.jsonl").read_text())["step"] == 4
    assert "rank 1 ends by Diverged" in output
    assert not list((tmp_path / "inf-zero2").glob("checkpoints/step-0000000[4-9]"))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_everywhere(tmp_path: Path) -> None:
    code, output = Two(tmp_path, "half-ddp").end()
    assert code == 0, output
    run = tmp_path / "half-ddp" / "checkpoints"
    state = run / "step-00000009" / "state.json"
    state.write_text(state.read_text().replace('"base"', '"base "'))
    code, output = Two(tmp_path, "half-ddp").end()
    assert code == 0, output  # damaged: passed over with a warning, and trained again from the start
    assert "checkpoint skipped" in output
