"""The order of training: nothing but a function of seed and step."""

import random
from collections import Counter

import pytest
import torch

from draftsmith.contracts import Batch
from draftsmith.data.module import RowsModule, Steps, order
from draftsmith.data.rows import Row
from draftsmith.targets import count_targets

LENGTH, HORIZON = 16, 4
PINNED = (7, 6, 2, 0, 3, 5, 1, 4)  # recorded with torch 2.13


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """23 rows whose first token tells them apart; long enough that few share a pack."""
    rng = random.Random(0)
    sizes = [rng.randint(5, 14) for _ in range(23)]
    return [Row(str(i), [i + 1] * n, [int(rng.random() < 0.6) for _ in range(n)]) for i, n in enumerate(sizes)]


def steps(rows: list[Row], **settings: int) -> Steps:
    return Steps(
        rows, **{"length": LENGTH, "batch_size": 2, "accumulate": 1, "horizon": HORIZON, "seed": 7, **settings}
    )


def texts(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tokens_BT.tolist()]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_every_pack_once_per_epoch(rows: list[Row], batch_size: int) -> None:
    """As a multiset over several epochs, also where a step straddles two of them."""
    stream = steps(rows, batch_size=batch_size)
    n = len(stream.packs)
    epochs = batch_size  # then whole steps fill whole epochs
    seen = [p for s in range(epochs * n // batch_size) for p in stream.packs_of_step(s)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len({tuple(seen[e * n : (e + 1) * n]) for e in range(epochs)}) == epochs
    shown = Counter(text for s in range(len(seen) // batch_size) for text in texts(stream[s]))
    assert set(shown.values()) == {epochs}
    assert len(shown) == n


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert order(3, 1, 50) == order(3, 1, 50)
    state = torch.random.get_rng_state()
    order.cache_clear()
    torch.manual_seed(99)
    first = order(3, 1, 50)
    torch.random.set_rng_state(state)
    order.cache_clear()
    assert order(3, 1, 50) == first
    assert len({order(seed, epoch, 50) for seed in range(4) for epoch in range(4)}) == 16
    assert sorted(first) == list(range(50))


def test_order_is_pinned() -> None:
    """A change of it would make every stored checkpoint resume on other rows."""
    assert order(0, 0, 8) == PINNED


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_world_size_sees_the_same_global_steps(rows: list[Row], world: int, accumulate: int) -> None:
    """The packs of a step, over all processes and micro-batches, with the same counts on each."""
    one = steps(rows, batch_size=8)
    split = {"batch_size": 8 // world // accumulate, "accumulate": accumulate, "world": world}
    ranks = [steps(rows, rank=r, **split) for r in range(world)]
    for step in range(9):
        whole = one[step]
        parts = [r[step * accumulate + a] for r in ranks for a in range(accumulate)]
        assert Counter(t for part in parts for t in texts(part)) == Counter(texts(whole))
        assert all(torch.equal(part.counts_K, whole.counts_K) for part in parts)


def test_accumulation_only_splits(rows: list[Row]) -> None:
    """n x 1 and 1 x n: the same packs in the same order."""
    whole, parts = steps(rows, batch_size=6), steps(rows, batch_size=2, accumulate=3)
    for step in range(10):
        assert texts(whole[step]) == [t for a in range(3) for t in texts(parts[3 * step + a])]


def test_counts_are_the_global_step_s(rows: list[Row]) -> None:
    """§11.37: the normaliser is the whole step's, over micro-batches, ranks and an epoch's edge."""
    one, two = (steps(rows, batch_size=2, accumulate=3, rank=r, world=2) for r in (0, 1))
    for step in range(8):
        parts = [s[3 * step + a] for s in (one, two) for a in range(3)]
        want = sum(count_targets(p.mask_BT, p.documents_BT, HORIZON) for p in parts)
        assert all(torch.equal(p.counts_K, want) for p in parts)


def test_a_micro_batch_is_always_the_same(rows: list[Row]) -> None:
    a, b = steps(rows), steps(rows)
    assert all(same(a[m], b[m]) for m in (5, 0, 33, 5))
    assert not same(a[0], steps(rows, seed=8)[0])


def module(rows: list[Row], start: int, stop: int, **more: int) -> RowsModule:
    settings = {"length": LENGTH, "batch_size": 2, "accumulate": 3, "horizon": HORIZON, "seed": 7}
    return RowsModule(rows, start=start, stop=stop, **settings, **more)


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8])
def test_resuming_serves_the_suffix(rows: list[Row], start: int) -> None:
    """From the middle of an epoch, over its edge, and with nothing left."""
    whole = list(module(rows, 0, 8).train_dataloader())
    rest = list(module(rows, start, 8).train_dataloader())
    assert len(whole) == 24
    assert len(rest) == 24 - 3 * start
    assert all(same(a, b) for a, b in zip(whole[3 * start :], rest, strict=True))


def test_workers_change_nothing(rows: list[Row]) -> None:
    alone, helped = (list(module(rows, 1, 4, num_workers=n).train_dataloader()) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_batches_keep_their_type_and_go_to_the_device(rows: list[Row]) -> None:
    made = module(rows, 0, 1)
    batch = next(iter(made.train_dataloader()))
    assert isinstance(batch, Batch)
    assert made.transfer_batch_to_device(batch, torch.device("meta"), 0).tokens_BT.is_meta
