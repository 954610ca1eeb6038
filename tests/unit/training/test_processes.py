"""Who a process is, as each launcher tells it, and what a lost one is called. Several real ones: tests/integration/
test_strategies.py, tests/faults/test_processes.py, tests/cluster."""

from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.errors import ConfigError, PeerError, ResourceError
from draftsmith.training import processes
from draftsmith.training.processes import Place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}  # the script itself


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*TORCHRUN, *DEEPSPEED, *SRUN, *SBATCH}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("told", "want"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(5, 8, 1, 4)),
        (DEEPSPEED, Place(1, 2, 1, 2)),
        (SRUN, Place(3, 4, 1, 2)),
        (SBATCH, Place(0, 1, 0, 1)),
    ],
)
def test_place(told: dict[str, str], want: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert processes.place() == want
    assert processes.is_first() == (want.rank == 0)
    assert processes.own_device("cuda") == (f"cuda:{want.local}" if want.per_node > 1 else "cuda")
    assert processes.own_device("cpu") == "cpu"


def test_the_launcher_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    left_out = SimpleNamespace(devices=1, num_nodes=1)
    processes.adopt(left_out)
    assert (left_out.devices, left_out.num_nodes) == (4, 2)
    processes.adopt(SimpleNamespace(devices=4, num_nodes=2))
    with pytest.raises(ConfigError, match=r"trainer\.devices=3.*started 8 processes; leave both out, or start 3"):
        processes.adopt(SimpleNamespace(devices=3, num_nodes=1))
    assert not processes.wants_launch(4, 2)


def test_one_command_starts_one_node() -> None:
    assert not processes.wants_launch(1, 1)
    assert processes.wants_launch(2, 1)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: .*scripts/torchrun\.sh"):
        processes.wants_launch(2, 2)


def test_alone_everything_is_itself() -> None:
    def fail() -> None:
        raise ConfigError("mine")

    assert processes.together(lambda: 3) == 3
    with pytest.raises(ConfigError, match=r"^mine$"):
        processes.together(fail)
    assert processes.from_first("x") == "x"
    with pytest.raises(RuntimeError, match="Connection closed by peer"), processes.joined("cpu", 5):
        raise RuntimeError("Connection closed by peer")  # a server's, perhaps: there is no other process


class Store:
    """What the others wrote before and after three seconds."""

    def __init__(self, before: dict[str, str], after: dict[str, str]) -> None:
        self.values, self.after = dict(before), after

    def check(self, keys: list[str]) -> bool:
        return all(k in self.values for k in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def wait(self, seconds: float) -> None:
        self.values |= self.after


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (("9 30 8", "9 30 8"), ("9 30 8", "12 30 8"), "process 1 died: no sign of life"),
        (("9 24 6", "12 24 6"), ("9 30 8", "left"), "process 1 hangs in step 6; the others waited in"),
        (("9 24 6", "12 24 6"), ("9 30 8", "12 30 8"), "process 1 hangs in step 6"),
        (("9 30 8", "left"), ("9 30 8", "left"), "failed though all processes live: Timed out"),
    ],
    ids=["dead", "hanging", "late", "a network"],
)
def test_blame(one: Any, two: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = processes.Watch()
    watch.here, watch.step, watch.passed = Place(0, 3), 8, 30
    before = {"alive/0": "9 30 8", "alive/1": one[0], "alive/2": two[0]}
    after = {"alive/0": "12 30 8"}
    for rank, (_, now) in ((1, one), (2, two)):
        if now == "left":
            after |= {f"alive/{rank}": "12 30 8", f"left/{rank}": "…"}
        else:
            after[f"alive/{rank}"] = now
    watch._store = store = Store(before, after)
    monkeypatch.setattr(processes.time, "sleep", store.wait)
    error = watch.blame(RuntimeError("Timed out waiting 8000ms for recv operation"))
    assert isinstance(error, PeerError)
    assert not error.told
    assert says in str(error)
    assert "step 8" in str(error)
    assert store.check([processes.OVER])


def test_who_failed_has_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words and its exit code, said once."""
    watch = processes.Watch()
    watch.here = Place(0, 2)
    signs = {"alive/0": "9 30 8", "alive/1": "9 30 8"}
    watch._store = store = Store(signs, {"failed/1": "5 /disk: cannot write metrics"})
    monkeypatch.setattr(processes.time, "sleep", store.wait)
    error = watch.blame(RuntimeError("Connection closed by peer"))
    assert isinstance(error, ResourceError)
    assert (str(error), error.told) == ("process 1: /disk: cannot write metrics", True)


def test_as_many_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="6 processes, 4 here; start as many on each node"):
        processes.adopt(SimpleNamespace(devices=1, num_nodes=1))


def test_a_store_that_is_gone() -> None:
    class Gone:
        def set(self, *_: Any) -> None:
            raise RuntimeError("Broken pipe")

    watch = processes.Watch()
    watch.here, watch._store = Place(1, 2), Gone()
    assert "process 0 is gone" in str(watch.blame(RuntimeError("Connection reset")))
