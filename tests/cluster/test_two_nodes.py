"""Two nodes, as two network namespaces with a cable between them, train together; one of them is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import FAULT, SCRIPTS, Training, finish, needs, said, saved, until

pytestmark = pytest.mark.cluster
needs("ip")

TWO_NODES = SCRIPTS / "two_nodes.sh"
Begin = Callable[..., subprocess.Popen]


@pytest.fixture
def nodes() -> Iterator[None]:
    told = subprocess.run([TWO_NODES, "up"], capture_output=True, text=True)
    if told.returncode:
        subprocess.run([TWO_NODES, "down"], check=True)
        pytest.skip(f"no network namespaces here: {told.stderr.strip()}")
    yield
    subprocess.run([TWO_NODES, "down"], check=True)


def both(run: Begin, *overrides: str, script: str = "torchrun.sh", **environment: str) -> list[subprocess.Popen]:
    command = [SCRIPTS / script, *overrides]
    return [run([TWO_NODES, "on", n, *command], **{"NPROC": "1", **environment}) for n in (0, 1)]


def carried() -> int:
    """Bytes that came over the cable to node 0."""
    told = subprocess.run([TWO_NODES, "on", "0", "cat", "/proc/net/dev"], capture_output=True, text=True, check=True)
    found = re.search(r"dscable0:\s*(\d+)", told.stdout)
    assert found
    return int(found[1])


def kill(node: int) -> None:
    """As if its power went: nothing that runs there has time for a word."""
    told = subprocess.run(["ip", "netns", "pids", f"draftsmith-{node}"], capture_output=True, text=True, check=True)
    for pid in map(int, told.stdout.split()):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.usefixtures("nodes")
def test_two_nodes_make_what_one_process_makes(strategy: str, training: Training, run: Begin, tmp_path: Path) -> None:
    for process in both(run, *training.overrides(tmp_path / "run", 20, strategy=strategy)):
        code, told = finish(process)
        assert code == 0, told
    training.check(tmp_path / "run", 20)
    assert carried() > 1_000_000  # 20 steps of gradients
    print(f"{strategy}: {carried():,} bytes over the cable")


@pytest.mark.usefixtures("nodes")
def test_a_node_without_the_name_of_its_cable_cannot_meet_the_other(
    training: Training, run: Begin, tmp_path: Path
) -> None:
    command = ["env", "-u", "GLOO_SOCKET_IFNAME", SCRIPTS / "torchrun.sh"]
    command += training.overrides(tmp_path / "run", 20, strategy="ddp", **{"strategy.timeout": 20})
    started = [run([TWO_NODES, "on", n, *command], NPROC="1") for n in (0, 1)]
    refused = "cannot meet the others at 10.77.0.1:"  # by whichever of them called an address that is the other's own
    until(lambda: any(refused in said(process) for process in started), "a refusal", 60)


@pytest.mark.parametrize("lost", [1, 0])
@pytest.mark.usefixtures("nodes")
def test_a_killed_node_is_named_and_the_same_command_goes_on(
    lost: int, training: Training, run: Begin, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    overrides = training.overrides(folder, FAULT, strategy="zero2", **{"strategy.timeout": 20})
    started = both(run, *overrides)
    until(saved(folder), "the first checkpoint", 180, *started)
    kill(lost)
    code, told = finish(started[1 - lost], 50)  # the timeout, what blaming takes, and leaving
    assert code == 1, told  # torchrun's; its process's own stands in its table, unless it lost the rendezvous too
    assert "exitcode  : 6" in told or lost == 0
    assert re.search(f"^error: .*process {lost} (died|is gone)", told, re.MULTILINE), told
    assert not (folder / "COMPLETE.json").exists()

    for process in both(run, *overrides):
        code, told = finish(process)
        assert code == 0, told
    training.check(folder, FAULT)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.usefixtures("nodes")
def test_a_pulled_cable_is_noticed_on_both_sides(strategy: str, training: Training, run: Begin, tmp_path: Path) -> None:
    """No connection is closed: only time tells."""
    folder = tmp_path / "run"
    first, second = both(run, *training.overrides(folder, 3000, strategy=strategy, **{"strategy.timeout": 20}))
    until(saved(folder), "the first checkpoint", 180, first)
    subprocess.run(["ip", "-n", "draftsmith-1", "link", "set", "dscable1", "down"], check=True)
    code, told = finish(first, 60)
    assert code == 1, told
    assert "error: process 1 died: no sign of life" in told
    until(lambda: "process 0 is gone" in said(second), "the second node's word", 60)  # its torchrun waits on


@pytest.mark.usefixtures("nodes")
def test_deepspeeds_launcher_on_both_nodes(training: Training, run: Begin, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    overrides = training.overrides(tmp_path / "run", 20, strategy="zero3")
    for process in both(run, *overrides, script="deepspeed.sh", HOSTFILE=str(tmp_path / "hosts")):
        code, told = finish(process)
        assert code == 0, told
    training.check(tmp_path / "run", 20)
