"""scripts/slurm.sbatch, submitted to a real Slurm whose two nodes are this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .conftest import SCRIPTS, Training, needs, saved, until

pytestmark = pytest.mark.cluster
needs("slurmctld", "slurmd", "munged", "sbatch")

STEPS = 1000  # slurmctld looks at time limits every 30 s: the steps after the first checkpoint must take longer
CONF = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={here}/munge.sock,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser=root
SlurmdUser=root
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=3,bf_interval=3
ReturnToService=2
MailProg=/bin/true
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A controller and two nodes; all of it lies in one folder and ends with `down`."""

    here: Path
    environment: dict[str, str] = field(default_factory=dict)

    def up(self) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.here / name).mkdir()
        key = self.here / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        port = free_ports()
        where = {"host": socket.gethostname().split(".")[0], "here": self.here, "port": port}
        (self.here / "slurm.conf").write_text(CONF.format(first=port + 1, last=port + 2, **where))
        # n1 and n2 are no names that resolve: where the processes meet is told.
        reach = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        own = {"SLURM_CONF": str(self.here / "slurm.conf"), "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, **reach}
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.ask("munged", "--force", *[f"--{option}={self.here / 'munge'}.{end}" for option, end in files.items()])
        self.ask("slurmctld")
        for node in ("n1", "n2"):
            self.ask("slurmd", "-N", node)
        until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "idle nodes", 60)

    def down(self) -> None:
        if (self.here / "slurmctld.pid").exists():
            with contextlib.suppress(subprocess.SubprocessError):
                self.ask("scancel", "--full", "--signal=KILL", "--user=root")
                time.sleep(1)
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                stop(int((self.here / f"{name}.pid").read_text()))

    def ask(self, *command: object) -> str:
        given = {"env": self.environment, "cwd": self.here, "text": True, "timeout": 60}
        told = subprocess.run([str(c) for c in command], capture_output=True, **given)  # type: ignore[call-overload]
        if told.returncode:
            raise subprocess.SubprocessError(f"{command}: {told.stdout} {told.stderr}")
        return told.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        told = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S+)", told))


def free_ports() -> int:
    """The first of three neighbours that nobody listens on."""
    for port in range(17100, 18000, 3):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for n in range(3):
                own = held.enter_context(socket.socket())
                own.bind(("0.0.0.0", port + n))
            return port
    raise AssertionError("no three free ports")


def stop(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.up()
        yield slurm
    finally:
        slurm.down()


Submit = Callable[[list[str]], str]


@pytest.fixture
def submit(slurm: Slurm) -> Iterator[Submit]:
    """submit(overrides): the number of a job of two nodes with a task each; cancelled when the test ends."""
    numbers: list[str] = []

    def send(overrides: list[str]) -> str:
        how = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=30", f"--output={slurm.here}/%j.out"]
        numbers.append(slurm.ask("sbatch", *how, SCRIPTS / "slurm.sbatch", *overrides))
        return numbers[-1]

    yield send
    for number in numbers:
        with contextlib.suppress(subprocess.SubprocessError):  # it has ended
            slurm.ask("scancel", "--full", "--signal=KILL", number)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_time_limits_signal_saves_and_queues_the_job_again(
    strategy: str, training: Training, slurm: Slurm, submit: Submit, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    overrides = training.overrides(folder, STEPS, strategy=strategy, **{"trainer.checkpoint_every": 50})
    number = submit(overrides)
    log = slurm.here / f"{number}.out"

    def state() -> dict[str, str]:
        found = slurm.job(number)
        assert found["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), log.read_text()
        return found

    until(saved(folder, 50), "the first checkpoint", 180)
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=2")  # at most 120 s are left: the signal is due
    until(lambda: state()["Restarts"] == "1", "the second life", 100)
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    told = log.read_text()
    assert re.search(r"stopped by a signal after step \d+ of 1000, checkpoint saved", told)
    codes = re.findall(r"tasks? \S+: (.*)", told)  # of both tasks, together or one after the other
    assert set(codes) == {"Exited with exit code 75"}
    assert "slurm.sbatch: stopped with its checkpoint saved; queued again" in told
    assert not (folder / "COMPLETE.json").exists()

    until(lambda: state()["JobState"] == "COMPLETED", "the end", 300)
    assert slurm.job(number)["ExitCode"] == "0:0"
    assert re.search(r"resuming after step \d+ of 1000", log.read_text())
    print(log.read_text())
    training.check(folder, STEPS)


def test_a_run_that_fails_is_not_queued_again(training: Training, slurm: Slurm, submit: Submit, tmp_path: Path) -> None:
    number = submit(training.overrides(tmp_path / "run", 20, **{"trainer.devices": 3}))
    until(lambda: slurm.job(number)["JobState"] == "FAILED", "the end", 120)
    found = slurm.job(number)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert "the launcher started 2 processes" in (slurm.here / f"{number}.out").read_text()
