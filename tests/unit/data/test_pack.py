"""Packing whole rows, which rows an epoch has, and what a micro-batch of packs looks like."""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.data.pack import WINDOW, best_fit, collate, epoch_packs, of_epoch, order
from draftsmith.data.rows import Row, Rows
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.targets import count_targets
from draftsmith.training.fit import new_head

PINNED = (7, 6, 2, 0, 3, 5, 1, 4)  # recorded with torch 2.13


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


def chat_lengths(seed: int, count: int, room: int, mean: float) -> np.ndarray:
    """Lognormal, as chats are: sigma 0.6, this mean, cut to the room."""
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - 0.6**2 / 2, 0.6, count)
    return np.clip(np.rint(drawn), 1, room).astype(int)


@pytest.mark.parametrize(("room", "mean"), [(256, 0.53 * 256), (2048, 0.53 * 2048), (2048, 1139)])
def test_chat_lengths_leave_little_room(room: int, mean: float) -> None:
    """2000 rows: 98 % full. Sixteen of them, of which no two may go together: at most one sequence more than
    any packing needs."""
    for seed in range(5):
        lengths_N = chat_lengths(seed, 2000, room, mean)
        packs = epoch_packs(lengths_N, np.ones(2000), room, seed, 0)
        assert lengths_N.sum() > 0.98 * room * len(packs)
        few_N = lengths_N[:16]
        needed = max(math.ceil(few_N.sum() / room), int((few_N > room // 2).sum()))
        assert len(epoch_packs(few_N, np.ones(16), room, seed, 0)) <= needed + 1


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


WEIGHTS = (0.5, 1.0, 2.25)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (7, 3, 5), (1, 1, 1), (0, 0, 3), (101, 50, 77)])
def test_every_row_as_often_as_its_weight_says(sizes: tuple[int, ...]) -> None:
    """Over four epochs exactly; in each of them within one of it, and equally many in total but for rounding."""
    weights_N = np.repeat(WEIGHTS, sizes)
    np.random.default_rng(0).shuffle(weights_N)
    total = Counter[int]()
    for epoch in range(4):
        rows = of_epoch(weights_N, 5, epoch)
        seen = Counter(rows.tolist())
        assert all(math.floor(w) <= seen[n] <= math.ceil(w) for n, w in enumerate(weights_N))
        assert abs(len(rows) - weights_N.sum()) < len(WEIGHTS)
        assert np.array_equal(rows, of_epoch(weights_N, 5, epoch))
        total += seen
    assert [total[n] for n in range(len(weights_N))] == (4 * weights_N).tolist()


@pytest.mark.parametrize("weight", [0.1, 0.29, 0.07, 1 / 3, 1e-5])
def test_small_weights_add_up(weight: float) -> None:
    """Over many epochs no row is forgotten, however few there are."""
    for n in (1, 3, 10):
        epochs = round(2 / weight) if weight > 1e-3 else 3
        total = Counter(i for e in range(epochs) for i in of_epoch(np.full(n, weight), 0, e).tolist())
        assert abs(sum(total.values()) - n * weight * epochs) <= 1
        assert max(total.values()) - min(total[i] for i in range(n)) <= 1


@pytest.mark.parametrize("n", [40, 2 * WINDOW + 100])
def test_the_packs_of_an_epoch(n: int) -> None:
    """Every row once, none too long, other neighbours in another epoch, and nothing but seed and epoch decides."""
    lengths_N = np.random.default_rng(0).integers(1, 20, n)
    epochs = [epoch_packs(lengths_N, np.ones(n), 40, 3, e) for e in range(3)]
    for packs in epochs:
        assert sorted(i for pack in packs for i in pack) == list(range(n))
        assert max(int(lengths_N[pack].sum()) for pack in packs) <= 40
    pairs = [{frozenset((a, b)) for p in packs for a in p for b in p if a < b} for packs in epochs]
    assert all(len(pairs[a] & pairs[b]) < len(pairs[a]) / 2 for a, b in ((0, 1), (1, 2), (0, 2)))
    assert epoch_packs(lengths_N, np.ones(n), 40, 3, 1) == epochs[1]
    assert epoch_packs(lengths_N, np.ones(n), 40, 4, 1) != epochs[1]


@pytest.mark.parametrize("seed", range(40))
def test_collate(seed: int) -> None:
    """Documents one after the other, positions from 0 in each, padding behind; and the counts that single
    rows add up to are those of the packed batch."""
    rng = random.Random(seed)
    rows = random_rows(rng, 12, 9)
    length, horizon = 20, 5
    packs = [[rows[i] for i in b] for b in best_fit([len(r.ids) for r in rows], length)]
    counts_K = torch.from_numpy(Rows.of(rows).counts(horizon).sum(0))
    batch = collate(packs, length, counts_K)
    for b, pack in enumerate(packs):
        cells = [(i, m, p, d) for d, r in enumerate(pack) for p, (i, m) in enumerate(zip(r.ids, r.mask, strict=True))]
        cells += [(0, 0, 0, -1)] * (length - len(cells))
        found = (batch.tokens_BT, batch.mask_BT, batch.positions_BT, batch.documents_BT)
        assert list(zip(*(t[b].tolist() for t in found), strict=True)) == cells
    assert torch.equal(count_targets(batch.mask_BT, batch.documents_BT, horizon), counts_K)
    assert batch.counts_K is counts_K


@pytest.mark.parametrize("seed", range(30))
def test_counts_of_rows_are_those_of_the_targets(seed: int) -> None:
    """Also of rows that were selected, cut or given another mask."""
    rng = random.Random(seed)
    rows, horizon = random_rows(rng, 15, 9), rng.randint(0, 6)
    held = Rows.of(rows)
    mask = np.array([rng.randint(0, 1) for _ in held.mask], np.uint8)
    chosen = np.array(rng.sample(range(15), 8))
    for some in (held, held.learned(mask), held.truncated(4), held.select(chosen), held.truncated(3).select(chosen)):
        for row, counts_K in zip(some, some.counts(horizon), strict=True):
            mask_BT = torch.from_numpy(np.array(row.mask, bool))[None]
            wanted_K = count_targets(mask_BT, torch.zeros(mask_BT.shape, dtype=torch.long), horizon)
            assert counts_K.tolist() == wanted_K.tolist()
        assert some.learns().tolist() == [bool(np.asarray(r.mask)[2:].any()) for r in some]


def test_counts_of_one_row() -> None:
    rows = Rows.of([Row("a", [1, 2, 3, 4], [0, 1, 0, 1]), Row("b", [], [])])
    assert rows.counts(5).tolist() == [[2, 2, 1, 1, 0, 0], [0] * 6]


def test_documents_do_not_see_each_other(tiny_base: Any, noisy: Any) -> None:
    """Other tokens in one document of a packed batch change its own captures and its own part of the loss, and
    nothing of the other documents'."""
    base = tiny_base("llama")
    head = noisy(new_head(Medusa, MedusaConfig(num_heads=2), "medusa", base, 0), 0.1)
    rng = random.Random(1)
    sizes = ((7, 9, 5), (12, 8))
    packs = [[Row("", [rng.randrange(60) for _ in range(n)], [1] * n) for n in some] for some in sizes]
    needs = head.needs | Needs(hidden=frozenset((1, 2)), final=True, logits=True)

    def run(packs: list[list[Row]], only: tuple[int, int] | None = None) -> tuple[Any, torch.Tensor, float]:
        """The captures, the documents, and the loss over all documents or only over (sequence, document)."""
        batch = collate(packs, 24, torch.ones(head.horizon + 1, dtype=torch.long))
        seen = base.capture(needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        if only is not None:
            here_BT = torch.zeros_like(batch.mask_BT)
            here_BT[only[0]] = batch.documents_BT[only[0]] == only[1]
            batch.mask_BT = batch.mask_BT & here_BT
        return seen, batch.documents_BT, head.loss(base, seen, batch, measure=False).sum.item()

    documents = [(b, d) for b, s in enumerate(sizes) for d in range(len(s))]
    before, documents_BT, _ = run(packs)
    losses = {at: run(packs, at)[2] for at in documents}
    for at in documents:
        changed = [list(pack) for pack in packs]
        old = changed[at[0]][at[1]]
        changed[at[0]][at[1]] = Row(old.id, [(i + 1 + rng.randrange(58)) % 60 for i in old.ids], old.mask)
        after, _, _ = run(changed)
        mine_BT = documents_BT == at[1]
        mine_BT[1 - at[0]] = False
        others_BT = (documents_BT >= 0) & ~mine_BT
        found = [(before.hidden[n], after.hidden[n]) for n in (1, 2)]
        found += [(before.final, after.final), (before.logits, after.logits)]
        for a, b in found:
            assert (a[others_BT] - b[others_BT]).abs().max() <= 1e-6 * a.abs().max()
            assert ((a[mine_BT] - b[mine_BT]).abs().amax(-1) > 1e-3).all()
        for other in documents:
            moved = abs(run(changed, other)[2] - losses[other])
            assert (moved > 1e-3) if other == at else (moved <= 1e-6 * max(1, losses[other]))
