import random

import pytest
import torch

from draftsmith.decoding import tree
from draftsmith.decoding.plan import PLANS_KEPT, Plans, together
from draftsmith.decoding.policies.dyspec import DySpec

SHAPE, CPU = tree.by_widths([2, 2]), torch.device("cpu")


def test_the_mask_is_the_whole_prefix_and_the_ancestors_at_any_length():
    plan = Plans(SHAPE, CPU).of(SHAPE.parents_N)
    own_NN = tree.ancestor_mask(SHAPE.parents_N)
    for length in (0, 1, 300, 7, 299, 2000, 0):
        expected = torch.cat([torch.ones(len(own_NN), length, dtype=torch.bool), own_NN], 1)
        assert torch.equal(plan.mask(length), expected[None])
    assert not plan.causal
    assert (plan.nodes, plan.depth, plan.depths_BN.tolist()) == (7, 2, [SHAPE.depths_N.tolist()])


def test_a_plan_is_made_once_per_tree_and_few_are_kept():
    plans = Plans(SHAPE, CPU)
    whole, two = plans.of(SHAPE.parents_N), plans.of(torch.tensor([-1, 0]))
    assert plans.of(SHAPE.parents_N) is whole
    assert plans.of(torch.tensor([-1, 0])) is two
    assert two.causal
    for count in range(2, 3 * PLANS_KEPT):
        assert plans.of(torch.arange(-1, count)).depth == count
    assert len(plans._others) == PLANS_KEPT
    assert plans.of(SHAPE.parents_N) is whole


def test_parents_written_over_in_place_are_seen():
    plans, parents_N = Plans(SHAPE, CPU), torch.tensor([-1, 0, 1])
    assert plans.of(parents_N).depth == 2
    parents_N[2] = 0
    assert plans.of(parents_N).depth == 1
    assert plans.of(torch.tensor([-1, 0, 1])).parents_N.tolist() == [-1, 0, 1]


def test_a_tree_that_grows_has_no_plan_beforehand():
    plans = Plans(DySpec(6, 3), CPU)
    assert plans.of(torch.tensor([-1, 0, 0])).depths == [0, 1, 1]


# Rows together


def sees(parents, lengths, slots, b, n, s):
    """The slow oracle: whether node n of row b sees slot s."""
    if s < slots:
        return s < lengths[b]
    if n >= len(parents[b]):
        return s - slots == n  # a filler sees itself, so that no row of the mask is empty
    while n >= 0:
        if n == s - slots:
            return True
        n = parents[b][n]
    return False


def depth_of(parents, node):
    return 0 if node <= 0 else 1 + depth_of(parents, parents[node])


def check(parents, lengths, plans):
    slots, nodes = max(lengths), max(map(len, parents))
    positions_BN, mask_BNS = together([plans.of(torch.tensor(p)) for p in parents], lengths, slots)
    depths = [[depth_of(p, n) if n < len(p) else 0 for n in range(nodes)] for p in parents]
    expected = [[n + d for d in row] for n, row in zip(lengths, depths, strict=True)]
    assert positions_BN.expand(len(parents), -1).tolist() == expected
    rows = range(len(parents))
    told = [
        [[sees(parents, lengths, slots, b, n, s) for s in range(slots + nodes)] for n in range(nodes)] for b in rows
    ]
    assert mask_BNS.dtype == torch.bool
    assert mask_BNS.expand(len(parents), -1, -1).tolist() == told


def test_random_trees_over_ragged_texts_equal_the_slow_oracle():
    rng, plans = random.Random(0), Plans(SHAPE, CPU)
    for _ in range(100):
        rows = rng.randrange(1, 5)
        alike = [-1] + [rng.randrange(n) for n in range(1, rng.randrange(1, 7))]
        parents = [
            alike if rng.random() < 0.5 else [-1] + [rng.randrange(n) for n in range(1, rng.randrange(1, 7))]
            for _ in range(rows)
        ]
        lengths = [rng.randrange(1, 9)] * rows if rng.random() < 0.3 else [rng.randrange(1, 9) for _ in range(rows)]
        if len(set(lengths)) > 1 or parents != [list(range(-1, len(parents[0]) - 1))] * rows:
            check(parents, lengths, plans)


@pytest.mark.parametrize("rows", [1, 3])
def test_equal_chains_after_equal_texts_need_no_mask(rows):
    plan = Plans(tree.chain(3), CPU).of(torch.tensor([-1, 0, 1, 2]))
    positions_BN, mask_BNS = together([plan] * rows, [5] * rows, 5)
    assert mask_BNS is None
    assert positions_BN.tolist() == [[5, 6, 7, 8]]
    assert together([plan] * 2, [5, 4], 5)[1] is not None
