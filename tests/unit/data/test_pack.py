"""Packing whole rows, and what a micro-batch of packs looks like."""

import random

import pytest
import torch

from draftsmith.data.pack import best_fit, collate, counts
from draftsmith.data.rows import Row
from draftsmith.targets import count_targets


def random_rows(rng: random.Random, count: int, longest: int) -> list[Row]:
    def row(i: int) -> Row:
        size = rng.randint(1, longest)
        return Row(str(i), [rng.randrange(50) for _ in range(size)], [rng.randint(0, 1) for _ in range(size)])

    return [row(i) for i in range(count)]


@pytest.mark.parametrize("seed", range(100))
def test_every_row_once_and_never_over_the_room(seed: int) -> None:
    rng = random.Random(seed)
    room = rng.randint(1, 60)
    lengths = [rng.randint(1, room) for _ in range(rng.randint(0, 80))]
    bins = best_fit(lengths, room)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= room for b in bins)
    assert bins == best_fit(lengths, room)


@pytest.mark.parametrize("seed", range(30))
def test_each_row_goes_into_the_fullest_bin_that_takes_it(seed: int) -> None:
    """Against a scan over all bins, longest rows first: the same fills."""
    rng = random.Random(seed)
    room, lengths = 40, [rng.randint(1, 40) for _ in range(50)]
    fills: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [b for b, used in enumerate(fills) if used + size <= room]
        if fits:
            fills[max(fits, key=lambda b: fills[b])] += size
        else:
            fills.append(size)
    assert sorted(sum(lengths[i] for i in b) for b in best_fit(lengths, room)) == sorted(fills)


def test_chat_lengths_leave_little_room() -> None:
    rng = random.Random(0)
    lengths = [min(512, int(rng.lognormvariate(4.5, 0.7)) + 1) for _ in range(2000)]
    assert sum(lengths) > 0.98 * 512 * len(best_fit(lengths, 512))


@pytest.mark.parametrize("seed", range(40))
def test_collate(seed: int) -> None:
    """Documents one after the other, positions from 0 in each, padding behind; and the counts that single
    rows add up to are those of the packed batch."""
    rng = random.Random(seed)
    rows = random_rows(rng, 12, 9)
    length, horizon = 20, 5
    packs = [[rows[i] for i in b] for b in best_fit([len(r.ids) for r in rows], length)]
    counts_K = torch.stack([counts(r, horizon) for r in rows]).sum(0)
    batch = collate(packs, length, counts_K)
    for b, pack in enumerate(packs):
        cells = [(i, m, p, d) for d, r in enumerate(pack) for p, (i, m) in enumerate(zip(r.ids, r.mask, strict=True))]
        cells += [(0, 0, 0, -1)] * (length - len(cells))
        found = (batch.tokens_BT, batch.mask_BT, batch.positions_BT, batch.documents_BT)
        assert list(zip(*(t[b].tolist() for t in found), strict=True)) == cells
    assert torch.equal(count_targets(batch.mask_BT, batch.documents_BT, horizon), counts_K)
    assert batch.counts_K is counts_K


def test_counts_of_one_row() -> None:
    assert counts(Row("", [1, 2, 3, 4], [0, 1, 0, 1]), 5).tolist() == [2, 2, 1, 1, 0, 0]
    assert counts(Row("", [], []), 2).tolist() == [0, 0, 0]
