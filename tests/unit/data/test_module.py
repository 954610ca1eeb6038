"""The order of training: nothing but a function of seed and step."""

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.contracts import Batch
from draftsmith.data.module import RowsModule, Steps
from draftsmith.data.rows import Row, Rows
from draftsmith.errors import DataError
from draftsmith.targets import count_targets

LENGTH, HORIZON = 16, 4


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """23 rows whose first token tells them apart; long enough that few share a pack."""
    rng = random.Random(0)
    sizes = [rng.randint(5, 14) for _ in range(23)]
    return [Row(str(i), [i + 1] * n, [int(rng.random() < 0.6) for _ in range(n)]) for i, n in enumerate(sizes)]


def steps(rows: list[Row], **settings: Any) -> Steps:
    return Steps(
        rows, **{"length": LENGTH, "batch_size": 2, "accumulate": 1, "horizon": HORIZON, "seed": 7, **settings}
    )


def texts(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.tokens_BT.tolist()]


def same(a: Batch, b: Batch) -> bool:
    pairs = list(zip(vars(a).values(), vars(b).values(), strict=True))
    assert all((x is None) == (y is None) for x, y in pairs)
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs if x is not None)


def ids(batch: Batch) -> list[int]:
    """The rows of a micro-batch, by their first token."""
    starts = (batch.positions_BT == 0) & (batch.documents_BT >= 0)
    return [int(i) - 1 for i in batch.tokens_BT[starts]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_every_row_once_per_epoch(rows: list[Row], batch_size: int) -> None:
    """As a multiset over several epochs, also where a step straddles two of them."""
    stream = steps(rows, batch_size=batch_size)
    assert stream.packs_per_step == batch_size
    ends = [int(stream.total(e)) for e in range(5)]
    epochs = [stream.packs(e) for e in range(4)]
    assert ends == [0, *np.cumsum([len(p) for p in epochs])]
    seen = [p for s in range(ends[-1] // batch_size + 1) for p in stream.packs_of_step(s)][: ends[-1]]
    assert seen == [p for packs in epochs for p in packs]
    assert all(sorted(i for p in packs for i in p) == list(range(len(rows))) for packs in epochs)
    assert len({tuple(map(tuple, packs)) for packs in epochs}) == 4
    shown = Counter(i for s in range(ends[-1] // batch_size) for i in ids(stream[s]))
    shown.update(i for p in seen[ends[-1] // batch_size * batch_size :] for i in p)
    assert shown == Counter([*range(len(rows))] * 4)


WEIGHTS = np.array([0.5, 1.0, 2.25, 0.5] * 5 + [1.0] * 3)


def test_weighted_rows_in_four_epochs(rows: list[Row]) -> None:
    stream = steps(rows, weights_N=WEIGHTS)
    seen = [Counter(i for pack in stream.packs(e) for i in pack) for e in range(4)]
    total = sum(seen, Counter())
    assert [total[n] for n in range(len(rows))] == (4 * WEIGHTS).tolist()
    assert all(abs(s[n] - w) < 1 for s in seen for n, w in enumerate(WEIGHTS))
    whole = int(stream.total(4)) // 2
    packs = [pack for e in range(4) for pack in stream.packs(e)][: 2 * whole]
    assert Counter(i for m in range(whole) for i in ids(stream[m])) == Counter(i for pack in packs for i in pack)


def test_epochs_of_few_rows_of_small_weight(rows: list[Row]) -> None:
    """One row every third epoch: the epochs between are empty, and the stream goes on."""
    stream = steps(rows[:1], weights_N=np.array([1 / 3]), batch_size=1)
    assert [len(stream.packs(e)) for e in range(4)] == [1, 0, 0, 1]
    assert [stream.packs_of_step(s) for s in range(5)] == [[[0]]] * 5
    assert stream.total(3) == 1
    with pytest.raises(DataError, match="no row to train on"):
        steps([]).packs(0)


def test_how_many_packs_so_many_epochs_hold(rows: list[Row]) -> None:
    """In any order of asking; a fraction is that of its own epoch."""
    weights = {"weights_N": WEIGHTS}
    sizes = [len(steps(rows, **weights).packs(e)) for e in range(4)]
    for epochs in (0.0, 0.25, 1.0, 1.5, 3.0, 3.9):
        whole = int(epochs)
        wanted = sum(sizes[:whole]) + (epochs - whole) * (sizes[whole] if epochs > whole else 0)
        assert steps(rows, **weights).total(epochs) == pytest.approx(wanted)
    backwards = steps(rows, **weights)
    assert [len(backwards.packs(e)) for e in (3, 1, 2, 0)] == [sizes[e] for e in (3, 1, 2, 0)]
    assert backwards.total(4) == sum(sizes)


@pytest.mark.parametrize("seed", range(5))
def test_any_step_of_any_stream_is_the_same(rows: list[Row], seed: int) -> None:
    """Whatever was asked before: resuming at a step is asking for it."""
    rng = random.Random(seed)
    straight = steps(rows, weights_N=WEIGHTS, batch_size=3)
    whole = [straight.packs_of_step(s) for s in range(40)]
    jumping = steps(rows, weights_N=WEIGHTS, batch_size=3)
    for step in rng.sample(range(40), 12):
        assert jumping.packs_of_step(step) == whole[step]
        assert steps(rows, weights_N=WEIGHTS, batch_size=3).packs_of_step(step) == whole[step]


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
        assert sorted(i for part in parts for i in ids(part)) == sorted(ids(whole))
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


def module(rows: list[Row], start: int, stop: int, **more: Any) -> RowsModule:
    settings = {"length": LENGTH, "batch_size": 2, "accumulate": 3, "horizon": HORIZON, "seed": 7}
    return RowsModule(rows, start=start, stop=stop, **{**settings, **more})


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


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 23])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_measured_row_once_over_all_processes(rows: list[Row], world: int, count: int, batch_size: int) -> None:
    """With equally many batches on each, the last ones perhaps empty, and the counts of all."""
    served: list[list[Batch]] = []
    for rank in range(world):
        one = module(rows, 0, 1, measured=rows[:count], batch_size=batch_size)
        one.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
        served.append(list(one.validation()))
        assert all(same(a, b) for a, b in zip(served[rank], one.validation(), strict=True))
    assert len({len(batches) for batches in served}) == 1
    every = [batch for batches in served for batch in batches]
    assert sorted(i for batch in every for i in ids(batch)) == list(range(count))
    counts_K = torch.from_numpy(Rows.of(rows[:count]).counts(HORIZON).sum(0))
    assert all(torch.equal(batch.counts_K, counts_K) for batch in every)
    total_K = sum((count_targets(b.mask_BT, b.documents_BT, HORIZON) for b in every), torch.zeros_like(counts_K))
    assert torch.equal(total_K, counts_K)
    assert all(b.tokens_BT.shape == (batch_size, LENGTH) for b in every)


def test_without_packing_a_sequence_holds_one_row(rows: list[Row]) -> None:
    """As many targets as packed, all rows once per epoch, the rest of each sequence padding."""
    how: dict[str, Any] = {"length": LENGTH, "accumulate": 1, "horizon": 3, "seed": 0}
    apart = Steps(rows, batch_size=len(rows), packing=False, **how)
    assert sorted(apart.packs(0)) == [[n] for n in range(len(rows))]
    assert apart.packs(0) != apart.packs(1)
    together = Steps(rows, batch_size=1, **how)
    packed = [together[m] for m in range(len(together.packs(0)))]
    assert torch.equal(apart[0].counts_K, sum(batch.counts_K for batch in packed))
    assert int((apart[0].documents_BT >= 0).sum()) == sum(len(row.ids) for row in rows)
    assert int(apart[0].documents_BT.max()) == 0
