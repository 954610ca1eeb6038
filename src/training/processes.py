"""Which of how many processes this one is, how they are started, and how they fail together.

torchrun and the deepspeed launcher say who a process is in RANK, LOCAL_RANK, WORLD_SIZE; srun says it in SLURM_…
Nobody starts others from the middle of a run: a command that wants several processes and was not started by a
launcher becomes the launcher (`launch`), so that there is one way to be several.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from draftsmith import room
from draftsmith.config import LAUNCHED
from draftsmith.errors import (
    ConfigError,
    DataError,
    DraftsmithError,
    Interrupted,
    NumericsError,
    PeerError,
    ResourceError,
)

T = TypeVar("T")

BEAT = 1.0  # seconds between the signs of life that a process gives
LEAVE = 600  # seconds that a stopping process may take for its checkpoint
OVER, GRACE = "over", 5.0  # the key that says a process was given up, and the seconds it has to leave by itself
PORT = 29400  # of the first process, plus the last digits of the SLURM job's number
# What torch says when a process that it talks to is gone or silent; there is no exception type for it under gloo.
GONE = re.compile(
    r"closed by peer|timed? ?out|connection (reset|refused|was closed)|connectFullMesh|broken pipe|gloo|NCCL|"
    r"failed to (recv|send)|sendBytes|recvValue|TCPStore",
    re.IGNORECASE,
)
KINDS: dict[int, type[DraftsmithError]] = {
    kind.exit_code: kind for kind in (ConfigError, DataError, NumericsError, ResourceError, PeerError, Interrupted)
}


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`; number `local` of the `per_node` on its node."""

    rank: int = 0
    world: int = 1
    local: int = 0
    per_node: int = 1


def place() -> Place:
    """What the launcher says; Place() where there is none."""
    e = os.environ
    if "RANK" in e and "WORLD_SIZE" in e:
        world = int(e["WORLD_SIZE"])
        per_node = e.get("LOCAL_WORLD_SIZE") or e.get("LOCAL_SIZE") or world  # torchrun's, deepspeed's
        return Place(int(e["RANK"]), world, int(e.get("LOCAL_RANK", "0")), int(per_node))
    if "SLURM_STEP_NUM_TASKS" in e and "SLURM_PROCID" in e:  # inside srun; the batch script itself is no task
        world, nodes = int(e["SLURM_STEP_NUM_TASKS"]), int(e.get("SLURM_STEP_NUM_NODES", "1"))
        return Place(int(e["SLURM_PROCID"]), world, int(e.get("SLURM_LOCALID", "0")), max(1, world // nodes))
    return Place()


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return place().rank == 0


def own_device(device: str) -> str:
    """`cuda` is this process's own one where several run on a node."""
    here = place()
    return f"cuda:{here.local}" if device == "cuda" and here.per_node > 1 else device


def adopt(trainer: Any) -> None:
    """Writes into the `trainer` group how many processes the launcher started; ConfigError where it says otherwise."""
    here = place()
    asked = trainer.devices * trainer.num_nodes
    if here.world == 1 or asked == here.world:
        return
    if asked > 1:
        raise ConfigError(
            f"trainer.devices={trainer.devices}, trainer.num_nodes={trainer.num_nodes}: the launcher started"
            f" {here.world} processes; leave both out, or start {asked}"
        )
    if here.world % here.per_node:
        raise ConfigError(f"trainer.devices: {here.world} processes, {here.per_node} here; start as many on each node")
    trainer.devices, trainer.num_nodes = here.per_node, here.world // here.per_node


def wants_launch(devices: int, num_nodes: int) -> bool:
    """Whether this command is one process that is to be several; ConfigError for several nodes."""
    if place().world > 1 or devices * num_nodes == 1:
        return False
    if num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}: one command starts the processes of one node; start one per node with"
            " scripts/torchrun.sh, scripts/deepspeed.sh or scripts/slurm.sbatch"
        )
    return True


def launch(arguments: Sequence[str], devices: int) -> None:
    """Runs Python with these arguments as `devices` processes on this machine, by torchrun's own agent, until all of
    them end. What they answer is this process's answer, by an error that has been told; PeerError if one was killed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    for name in [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # tables of failures: the processes say what went wrong
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=f"draftsmith-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        shutdown_timeout=LEAVE,
    )
    try:
        elastic_launch(how, sys.executable)(*arguments)
    except ChildFailedError as e:
        rank, first = e.get_first_failure()
        if first.exitcode > 0:  # it has said why
            raise _told(first.exitcode, f"process {rank} answered {first.exitcode}") from e
        name = signal.Signals(-first.exitcode).name
        raise PeerError(f"process {rank} was killed by {name}; the same command goes on after the last save") from e
    except SignalException as e:  # the agent has passed it on and waited
        raise _told(Interrupted.exit_code, f"stopped by {signal.Signals(e.sigval).name}") from e


def _told(code: int, text: str) -> DraftsmithError:
    """The error with this exit code, which another process has said."""
    error = KINDS.get(code, DraftsmithError)(text)
    error.exit_code, error.told = code, True
    return error


@contextlib.contextmanager
def joined(accelerator: str, timeout: float, *, alone: bool = False) -> Iterator[Watch]:
    """Meets the other processes; inside, collectives work, and a lost process is a PeerError that names it. timeout:
    seconds that one may take at most. alone: even if there are no others, for an engine that wants to be asked.

    The group stays until the process ends: DeepSpeed keeps it in mind, and a next run finds it.
    """
    import datetime

    import torch
    import torch.distributed as dist

    here, waiting = place(), datetime.timedelta(seconds=timeout)
    if accelerator == "gpu":
        torch.cuda.set_device(here.local)  # where NCCL's collectives put what they exchange
    if not dist.is_initialized() and (here.world > 1 or alone):
        backend = "nccl" if accelerator == "gpu" else "gloo"
        # DeepSpeed makes groups of its own without saying how long they wait: torch's default is theirs.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = waiting
        if here.world == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=waiting)
        else:
            _meet(here, backend, waiting)
        atexit.register(dist.destroy_process_group)
    watch = Watch()
    try:
        yield watch
    except Exception as e:
        ours = isinstance(e, DraftsmithError)
        if here.world > 1 and isinstance(e, RuntimeError) and not ours and GONE.search(str(e)):
            raise watch.blame(e) from e
        watch.tell(*_words(e))
        raise
    finally:
        watch.close()


def _meet(here: Place, backend: str, waiting: Any) -> None:
    import torch.distributed as dist

    e = os.environ
    if "RANK" not in e:  # srun
        e.update(RANK=str(here.rank), WORLD_SIZE=str(here.world), LOCAL_RANK=str(here.local))
        e.update(LOCAL_WORLD_SIZE=str(here.per_node), GROUP_RANK=str(here.rank // here.per_node))
    if "MASTER_ADDR" not in e:
        e["MASTER_ADDR"] = _first_host() if "SLURM_STEP_NODELIST" in e else "127.0.0.1"
    e.setdefault("MASTER_PORT", str(PORT + int(e.get("SLURM_JOB_ID", "0")) % 1000))
    try:
        dist.init_process_group(backend, timeout=waiting)
    except (RuntimeError, ValueError) as error:
        where = f"{e['MASTER_ADDR']}:{e['MASTER_PORT']}"
        raise PeerError(f"process {here.rank} of {here.world}: cannot meet the others at {where}: {error}") from None


def _first_host() -> str:
    nodes = os.environ["SLURM_STEP_NODELIST"]
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        raise PeerError(f"SLURM_STEP_NODELIST={nodes}: scontrol cannot name its hosts ({e}); set MASTER_ADDR") from None
    return told.stdout.split()[0]


def together(work: Callable[[], T]) -> T:
    """work() on this process; if it fails on any, it fails on all, with that process's error. Collective."""
    import torch.distributed as dist

    if place().world == 1:
        return work()
    failed: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as e:
        failed = e
    found: list[Any] = [None] * place().world
    dist.all_gather_object(found, None if failed is None else _words(failed))
    if failed is not None:
        raise failed
    for rank, other in enumerate(found):
        if other is not None:
            raise _told(other[0], f"process {rank}: {other[1]}")
    return cast(T, result)


def by_first(work: Callable[[], T]) -> T:
    """work(), by the first process alone: its result on every process, and its error. Collective."""
    return from_first(together(lambda: work() if is_first() else cast(T, None)))


def _words(error: Exception) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, DraftsmithError):
        return error.exit_code, str(error)
    code = ResourceError.exit_code if isinstance(error, OSError) or room.exhausted(error) else 1
    return code, f"{type(error).__name__}: {error}"


def from_first(value: T) -> T:
    """The first process's value, on every process. Collective."""
    import torch.distributed as dist

    if place().world == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def spread(tensor: Any) -> Any:
    """The tensor, overwritten by the first process's. Collective."""
    import torch.distributed as dist

    if place().world > 1:
        dist.broadcast(tensor, src=0)
    return tensor


Signs = list[tuple[int, int, int]]


class Watch:
    """Signs of life through the processes' store: once a second every process writes a number that grows, how many
    hooks of a step (batch, backward, end) it has passed, and its step. Whoever is left alone in a collective says so
    there, and reads whose number stands still, or who says nothing and has not come as far."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.here, self.step, self.passed = place(), 1, 0
        self.leaving = False  # it ends by itself, after something that must not be cut short
        self._end = threading.Event()
        self._store: Any = None
        if self.here.world > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # a connection of its own: the main thread may be waiting in the other
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def at(self, step: int) -> None:
        """A hook of this step has been passed."""
        self.step, self.passed = step, self.passed + 1

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: so is whoever held it, as the others will notice
            while not self._end.wait(BEAT if count else 0):
                self._store.set(f"alive/{self.here.rank}", f"{count} {self.passed} {self.step}")
                count += 1
                if self._store.check([OVER]) and not self.leaving and not self._end.wait(GRACE) and not self.leaving:
                    print(f"error: process {self.here.rank}: the others gave it up in step {self.step}", flush=True)
                    os._exit(PeerError.exit_code)

    def close(self) -> None:
        self._end.set()
        if self._store is not None:
            self._thread.join(2 * BEAT)  # a store whose machine is unreachable answers nothing, not even an error

    def tell(self, code: int, text: str) -> None:
        """Leaves the words of this process's own failure for those that will miss it."""
        if self._store is not None:
            _within(BEAT, lambda: self._store.set(f"failed/{self.here.rank}", f"{code} {text}"))

    def blame(self, error: BaseException) -> DraftsmithError:
        """Who is to blame for a collective that failed here: what a process that failed has said, or PeerError."""
        where = f"{_collective(error)} of step {self.step}"
        found = _within(10 * BEAT, lambda: self._look(where))
        if found is None:
            return PeerError(f"process 0 is gone: nobody answers for it in {where}")
        before, after, silent, failed = found
        for rank, words in failed.items():
            code, _, text = words.partition(" ")
            return _told(int(code), f"process {rank}: {text}")
        dead = [r for r in silent if after[r] == before[r]]
        if dead:
            return PeerError(f"process {_listed(dead)} died: no sign of life while the others waited in {where}")
        if silent:
            late = [r for r in silent if after[r][1] == min(after[n][1] for n in silent)]
            steps = _listed([after[r][2] for r in late])
            return PeerError(f"process {_listed(late)} hangs in step {steps}; the others waited in {where}")
        return PeerError(f"{where} failed though all processes live: {' '.join(str(error).split())[:300]}")

    def _look(self, where: str) -> tuple[Signs, Signs, list[int], dict[int, str]]:
        """Everybody's signs now and after three beats, who has said nothing meanwhile, and who has failed how."""
        self._store.set(f"left/{self.here.rank}", where)
        before = self._read()
        time.sleep(3 * BEAT)
        after, everyone = self._read(), range(self.here.world)
        silent = [r for r in everyone if not self._store.check([f"left/{r}"])]
        failed = {r: self._store.get(f"failed/{r}").decode() for r in everyone if self._store.check([f"failed/{r}"])}
        self._store.set(OVER, where)
        if not self.here.rank:
            time.sleep(3 * BEAT)  # the store may be this process's, and others still want to look
        return before, after, silent, failed

    def _read(self) -> Signs:
        """(count, passed, step) of every process; -1 of one that never gave a sign."""
        keys = [f"alive/{r}" for r in range(self.here.world)]
        told = [self._store.get(k).decode().split() if self._store.check([k]) else ("-1",) * 3 for k in keys]
        return [(int(count), int(passed), int(step)) for count, passed, step in told]


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """work()'s result; None where it fails or takes longer: a call into a lost store may never return."""
    found: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _collective(error: BaseException) -> str:
    """Which collective failed, by the innermost call into torch.distributed."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if "/torch/distributed/" in f.filename and f.name not in ("wrapper", "wait")]
    return inside[-1] if inside else "the reduction of gradients"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
