"""The order of training: a pure function of (seed, epoch), cut into global steps.

Lightning sees one long epoch of exactly the micro-batches that are left. Which packs a micro-batch holds
follows from its number alone, so that resuming is starting at another number; nothing about order is saved.
(Stock mid-epoch resume repeats some rows and never shows others, silently.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from draftsmith.artifacts import fingerprint
from draftsmith.contracts import Batch
from draftsmith.data.pack import best_fit, collate, counts
from draftsmith.data.rows import Row


class Steps(Dataset):
    """Micro-batch m of this process, for m = 0, 1, …: step m // accumulate, its part m % accumulate.

    A global step holds world * accumulate * batch_size packs, consecutive in the endless stream of epochs;
    process r takes every world-th of them, so that every world size sees the same global steps.
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
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rows, self.length, self.seed = rows, length, seed
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.packs = best_fit([len(r.ids) for r in rows], length)
        per_row = [counts(r, horizon) for r in rows]
        self.counts_PK = torch.stack([torch.stack([per_row[i] for i in p]).sum(0) for p in self.packs])

    @property
    def packs_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.world

    def packs_of_step(self, step: int) -> list[int]:
        """The pack numbers of a global step, in order; a step may straddle two epochs."""
        n, first = len(self.packs), step * self.packs_per_step
        return [order(self.seed, i // n, n)[i % n] for i in range(first, first + self.packs_per_step)]

    def __getitem__(self, m: int) -> Batch:
        step, part = divmod(m, self.accumulate)
        everyone = self.packs_of_step(step)
        per_part = self.batch_size * self.world
        mine = everyone[part * per_part : (part + 1) * per_part][self.rank :: self.world]
        packs = [[self.rows[i] for i in self.packs[p]] for p in mine]
        return collate(packs, self.length, self.counts_PK[everyone].sum(0))


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """The permutation of range(n) for an epoch."""
    key = int(fingerprint(["order", seed, epoch])[:15], 16)
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(key)).tolist())


class RowsModule(L.LightningDataModule):
    """Serves the micro-batches of steps start..stop-1; rank and world are read when the loader is made."""

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
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.rows, self.start, self.stop, self.num_workers = rows, start, stop, num_workers
        self.shape = {
            "length": length,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "horizon": horizon,
            "seed": seed,
        }

    def steps(self) -> Steps:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Steps(self.rows, rank=rank, world=world, **self.shape)

    def train_dataloader(self) -> DataLoader:
        a = self.shape["accumulate"]
        return DataLoader(
            self.steps(),
            batch_size=None,
            sampler=range(self.start * a, self.stop * a),
            num_workers=self.num_workers,
            collate_fn=_whole,
            generator=torch.Generator(),  # else it would draw a seed from the caller's
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


def _whole(batch: Any) -> Any:
    """A micro-batch is made whole by Steps; there is nothing left to collate."""
    return batch
