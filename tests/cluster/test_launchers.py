"""scripts/torchrun.sh and scripts/deepspeed.sh on one node: restarts, signals, exit codes, rows by several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import FAULT, SCRIPTS, Training, finish, needs, saved, until, workers

pytestmark = pytest.mark.cluster
needs("pgrep", "ps", root=False)

Begin = Callable[..., subprocess.Popen]


def test_a_killed_process_is_started_anew(training: Training, run: Begin, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = training.overrides(folder, FAULT, strategy="zero2")
    process = run([SCRIPTS / "torchrun.sh", *overrides], NPROC="2", MAX_RESTARTS="1")
    until(saved(folder), "the first checkpoint", 180, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, told = finish(process)
    assert code == 0, told
    assert "resuming after step" in told
    training.check(folder, FAULT)


def test_torchrun_passes_a_signal_on_and_the_same_command_goes_on(
    training: Training, run: Begin, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [SCRIPTS / "torchrun.sh", *training.overrides(folder, FAULT, strategy="ddp")]
    process = run(command, NPROC="2")
    until(saved(folder), "the first checkpoint", 180, process)
    process.send_signal(signal.SIGUSR1)
    code, told = finish(process)
    assert code == 1, told  # whatever its processes answered
    assert "checkpoint saved; the same command resumes" in told
    code, told = finish(run(command, NPROC="2"))
    assert code == 0, told
    training.check(folder, FAULT)


def test_deepspeeds_launcher_answers_75_for_a_run_that_a_signal_stopped(
    training: Training, run: Begin, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    command = [SCRIPTS / "deepspeed.sh", *training.overrides(folder, FAULT, strategy="zero2")]
    process = run(command, HOSTFILE=str(tmp_path / "hosts"))
    until(saved(folder), "the first checkpoint", 180, process)
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 75, told
    assert "checkpoint saved; the same command resumes" in told
    code, told = finish(run(command, HOSTFILE=str(tmp_path / "hosts")))
    assert code == 0, told
    training.check(folder, FAULT)


def test_two_processes_write_the_rows_that_one_writes(micro: Path, run: Begin, tmp_path: Path) -> None:
    from draftsmith.data.rows import verified

    overrides = [
        "base=hf",
        f"base.path={micro / 'base'}",
        "data=prompts",
        f"data.prompts.path={micro / 'prompts.jsonl'}",
    ]
    overrides += ["data.generation.max_new_tokens=16", "data.generation.shard_rows=8", "threads=1"]
    alone = run([sys.executable, "-m", "draftsmith.distill", *overrides, f"out={tmp_path / 'one'}"])
    code, told = finish(alone)
    assert code == 0, told
    several = run([SCRIPTS / "torchrun.sh", *overrides, f"out={tmp_path / 'two'}"], NPROC="2", VERB="distill")
    code, told = finish(several)
    assert code == 0, told
    for folder in ("one", "two"):
        verified(tmp_path / folder)
    one, two = (sorted((tmp_path / f).glob("rows-*.parquet")) for f in ("one", "two"))
    assert len(one) == 5  # 40 prompts
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
