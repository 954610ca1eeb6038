"""Packing: whole rows into sequences of fixed length, so that no forward is spent on padding.

Documents (= rows) never share a sequence's attention; their positions restart. Rows are never split. Which rows
an epoch has and which share a sequence is a function of (rows, weights, seed, epoch) alone, before any process
takes its part.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from draftsmith.artifacts import fingerprint
from draftsmith.contracts import Batch
from draftsmith.data.rows import Row

WINDOW = 4096  # rows that are packed together: enough to fill sequences, few enough that neighbours change


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `room`: longest first, each into the fullest bin it fits.

    Deterministic; every index once. (Best-fit decreasing leaves about 1 % empty on chat lengths.)
    """
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(space, (lengths[i], -1))
        if at == len(space):
            bins.append([i])
            bisect.insort(space, (room - lengths[i], len(bins) - 1))
        else:
            free, b = space.pop(at)
            bins[b].append(i)
            bisect.insort(space, (free - lengths[i], b))
    return bins


@functools.lru_cache(maxsize=8)
def order(seed: int, epoch: int, n: int, what: str = "order") -> tuple[int, ...]:
    """The permutation of range(n) for an epoch."""
    key = int(fingerprint([what, seed, epoch])[:15], 16)
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(key)).tolist())


def of_epoch(weights_N: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, each as often as its weight says: 2.25 is twice, and once more in every fourth epoch;
    the rows of one weight take turns."""
    chosen = []
    for weight in np.unique(weights_N):
        mine = np.flatnonzero(weights_N == weight)
        whole, part = divmod(Fraction(str(float(weight))), 1)
        chosen += [mine] * int(whole)
        if part:
            turn = np.array(order(seed, 0, len(mine), f"weight {weight}"))
            begin, end = (math.ceil(part * len(mine) * e) for e in (epoch, epoch + 1))
            chosen.append(mine[turn[np.arange(begin, end) % len(mine)]])
    return np.concatenate(chosen) if chosen else np.array([], dtype=np.int64)


def epoch_packs(
    lengths_N: np.ndarray, weights_N: np.ndarray, room: int, seed: int, epoch: int, packing: bool = True
) -> list[list[int]]:
    """The packed sequences of an epoch, as row numbers, in the order they are trained on; or one for each row."""
    rows = of_epoch(weights_N, seed, epoch)
    rows = rows[list(order(seed, epoch, len(rows), "rows"))]
    if not packing:
        return [[int(row)] for row in rows]
    packs = []
    for at in range(0, len(rows), WINDOW):
        some = rows[at : at + WINDOW]
        packs += [[int(some[i]) for i in bin] for bin in best_fit(lengths_N[some].tolist(), room)]
    return [packs[i] for i in order(seed, epoch, len(packs))]


def collate(packs: Sequence[Sequence[Row]], length: int, counts_K: torch.Tensor) -> Batch:
    """One micro-batch: each pack's rows one after the other, padding at the end (document -1, id 0)."""
    shape = (len(packs), length)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    documents, mask = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
    labels = torch.full(shape, float("nan")) if any(row.labels is not None for pack in packs for row in pack) else None
    for b, pack in enumerate(packs):
        at = 0
        for d, row in enumerate(pack):
            span = slice(at, at + len(row.ids))
            tokens[b, span] = torch.from_numpy(np.array(row.ids, dtype=np.int64))
            mask[b, span] = torch.from_numpy(np.array(row.mask, dtype=bool))
            positions[b, span] = torch.arange(len(row.ids))
            documents[b, span] = d
            if labels is not None and row.labels is not None:
                labels[b, span] = torch.from_numpy(np.array(row.labels, dtype=np.float32))
            at += len(row.ids)
    return Batch(tokens, positions, documents, mask, counts_K, labels)
