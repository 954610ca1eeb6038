"""scripts/slurm.sbatch with stand-ins for Slurm's commands: which answers of a run queue the job again. The same with a
real Slurm is tests/cluster/test_slurm.py; that a run stopped by SIGUSR1 goes on exactly, test_training_kills.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT

pytestmark = pytest.mark.faults

SCRIPT = ROOT / "scripts/slurm.sbatch"
GIVEN = ["run_dir=some where", "head=[medusa]"]
COMMANDS = {
    # what Slurm tells of the job, and a note of what it was asked
    "scontrol": 'echo "$@" >> "$HERE/asked"\necho "JobId=71 Command=$ROOT/scripts/slurm.sbatch X=1"',
    "srun": 'shift\nexec "$@"',  # one task, here
    "sleep": "true",
    "venv/bin/python": 'printf "%s\\n" "$@" >> "$HERE/ran"\nexit "$(cat "$HERE/answer")"',
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name, body in COMMANDS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def life(here: Path, answer: int) -> tuple[int, str]:
    """(exit code, what it said) of the job, whose tasks answer so."""
    (here / "answer").write_text(str(answer))
    own = {"HERE": str(here), "ROOT": str(ROOT), "VENV": str(here / "venv"), "SLURM_JOB_ID": "71"}
    environment = {**os.environ, **own, "PATH": f"{here}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SCRIPT), *GIVEN], env=environment, cwd=here, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def requeues(here: Path) -> list[str]:
    return [line for line in (here / "asked").read_text().splitlines() if "requeue" in line]


def test_a_run_that_was_stopped_is_queued_again_once_under_its_number_and_its_command(here: Path) -> None:
    code, said = life(here, 75)
    assert code == 75
    assert "stopped with its checkpoint saved; queued again" in said
    assert requeues(here) == ["requeue 71"]
    code, said = life(here, 0)  # Slurm starts the same script with the same arguments
    assert (code, said) == (0, "")
    assert requeues(here) == ["requeue 71"]
    ran = (here / "ran").read_text().splitlines()
    assert ran == ["-m", "draftsmith.train", *GIVEN] * 2


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 4, 5, 6, 137])
def test_every_other_answer_ends_the_job(here: Path, answer: int) -> None:
    code, said = life(here, answer)
    assert code == answer
    assert "queued again" not in said
    assert requeues(here) == []
