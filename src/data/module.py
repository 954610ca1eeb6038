"""The order of training: a pure function of (seed, epoch), cut into global steps.

Lightning sees one long epoch of exactly the micro-batches that are left. Which packs a micro-batch holds
follows from its number alone, so that resuming is starting at another number; nothing about order is saved.
(Stock mid-epoch resume repeats some rows and never shows others, silently.)
"""

from __future__ import annotations

import bisect
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from draftsmith import signals
from draftsmith.contracts import Batch
from draftsmith.data.pack import best_fit, collate, epoch_packs
from draftsmith.data.rows import Row, Rows
from draftsmith.data.store import Store
from draftsmith.errors import DataError


class Steps(Dataset):
    """Micro-batch m of this process, for m = 0, 1, …: step m // accumulate, its part m % accumulate.

    A global step holds world * accumulate * batch_size packs, consecutive in the endless stream of epochs;
    process r takes every world-th of them, so that every world size sees the same global steps.
    weights_N: how often each row is seen per epoch; once where it is left out. store: the rows' captures. one_batch:
    every step is the first one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        length: int,
        batch_size: int,
        accumulate: int,
        horizon: int,
        seed: int,
        weights_N: np.ndarray | None = None,
        packing: bool = True,
        one_batch: bool = False,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.packing, self.one_batch, self.store = packing, one_batch, store
        self.rows, self.length, self.seed = Rows.of(rows), length, seed
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.weights_N = np.ones(len(rows)) if weights_N is None else weights_N
        self.counts_NK = torch.from_numpy(self.rows.counts(horizon))
        self.ends = [0]  # where epoch e begins in the stream of packs; as far as anyone asked
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    @property
    def packs_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.world

    def packs(self, epoch: int) -> list[list[int]]:
        """The packs of an epoch, as row numbers, in order."""
        if self._epoch[0] != epoch:
            made = epoch_packs(self.rows.lengths_N, self.weights_N, self.length, self.seed, epoch, self.packing)
            if not made and not epoch:  # a later epoch may have none of a few rows of small weight
                raise DataError("data: no row to train on")
            self._epoch = (epoch, made)
            if len(self.ends) == epoch + 1:
                self.ends.append(self.ends[-1] + len(made))
        return self._epoch[1]

    def total(self, epochs: float) -> float:
        """How many packs so many epochs hold."""
        whole, part = divmod(epochs, 1.0)
        while len(self.ends) <= whole + (part > 0):
            self.packs(len(self.ends) - 1)
        return self.ends[int(whole)] + (part * (self.ends[int(whole) + 1] - self.ends[int(whole)]) if part else 0)

    def packs_of_step(self, step: int) -> list[list[int]]:
        """The packs of a global step, in order; a step may straddle two epochs."""
        first = step * self.packs_per_step
        found = []
        for i in range(first, first + self.packs_per_step):
            while self.ends[-1] <= i:
                self.packs(len(self.ends) - 1)
            epoch = bisect.bisect_right(self.ends, i) - 1
            found.append(self.packs(epoch)[i - self.ends[epoch]])
        return found

    def __getitem__(self, m: int) -> Batch:
        step, part = divmod(m, self.accumulate)
        everyone = self.packs_of_step(0 if self.one_batch else step)
        per_part = self.batch_size * self.world
        mine = everyone[part * per_part : (part + 1) * per_part][self.rank :: self.world]
        counts_K = self.counts_NK[[n for pack in everyone for n in pack]].sum(0)
        return served(self.rows, mine, self.length, counts_K, self.store)


def served(
    rows: Rows, packs: Sequence[Sequence[int]], length: int, counts_K: torch.Tensor, store: Store | None
) -> Batch:
    """The micro-batch of these packs of row numbers, with what a store kept of it."""
    batch = collate([[rows[n] for n in pack] for pack in packs], length, counts_K)
    if store is not None:
        batch.seen = store.seen_of(rows, packs, length)
    return batch


class Ahead(Dataset):
    """The same micro-batches; while one is used, a thread reads the next. In a loader's worker, which runs ahead by
    itself, there is no thread."""

    def __init__(self, steps: Steps, stop: int) -> None:
        self.steps, self.stop = steps, stop
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Batch]] | None = None

    def __getitem__(self, m: int) -> Batch:
        if get_worker_info() is not None:
            return self.steps[m]
        self._pool = self._pool or ThreadPoolExecutor(1)
        waiting, self._next = self._next, None
        found = waiting[1] if waiting and waiting[0] == m else self._pool.submit(self.steps.__getitem__, m)
        batch = found.result()
        if m + 1 < self.stop:
            self._next = (m + 1, self._pool.submit(self.steps.__getitem__, m + 1))
        return batch


class RowsModule(L.LightningDataModule):
    """Serves the micro-batches of steps start..stop-1; rank and world are read when the loader is made. store: the
    rows' captures; measured_store: those of the measured rows."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        length: int,
        batch_size: int,
        accumulate: int,
        horizon: int,
        seed: int,
        start: int,
        stop: int,
        weights_N: np.ndarray | None = None,
        packing: bool = True,
        one_batch: bool = False,
        measured: Sequence[Row] = (),
        num_workers: int = 0,
        store: Store | None = None,
        measured_store: Store | None = None,
    ) -> None:
        super().__init__()
        self.measured_store = measured_store
        self.measured = Rows.of(measured)
        self.rows, self.start, self.stop, self.num_workers = rows, start, stop, num_workers
        self.shape: dict[str, Any] = {
            "length": length,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "horizon": horizon,
            "seed": seed,
            "weights_N": weights_N,
            "packing": packing,
            "one_batch": one_batch,
            "store": store,
        }

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def steps(self) -> Steps:
        rank, world = self._place()
        return Steps(self.rows, rank=rank, world=world, **self.shape)

    def ids_of(self, step: int) -> list[str]:
        """The rows of a global step, 0-based, of all processes: each by its place in its source and its id."""
        steps = self.steps()
        rows = [steps.rows[n] for pack in steps.packs_of_step(0 if steps.one_batch else step) for n in pack]
        return [f"{row.source} {row.id}".strip() for row in rows]

    def validation(self) -> Iterator[Batch]:
        """The rows that are measured and never learned: this process's micro-batches, with the counts of all of
        them. Every process has equally many, the last ones perhaps empty."""
        rank, world = self._place()
        length, size = self.shape["length"], self.shape["batch_size"]
        packs = best_fit(self.measured.lengths_N.tolist(), length)
        counts_K = torch.from_numpy(self.measured.counts(self.shape["horizon"]).sum(0))
        packs += [[]] * (-len(packs) % (size * world))
        mine = packs[rank::world]
        for at in range(0, len(mine), size):
            yield served(self.measured, mine[at : at + size], length, counts_K, self.measured_store)

    def train_dataloader(self) -> DataLoader:
        a, steps = self.shape["accumulate"], self.steps()
        return DataLoader(
            steps if steps.store is None else Ahead(steps, self.stop * a),
            batch_size=None,
            sampler=range(self.start * a, self.stop * a),
            num_workers=self.num_workers,
            worker_init_fn=_deaf,
            collate_fn=_whole,
            generator=torch.Generator(),  # else it would draw a seed from the caller's
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


def _deaf(worker: int) -> None:
    """A signal that everybody gets, as from a terminal, is the main process's to answer, which tells its workers."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _whole(batch: Any) -> Any:
    """A micro-batch is made whole by Steps; there is nothing left to collate."""
    return batch
