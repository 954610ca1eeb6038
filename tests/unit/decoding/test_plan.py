import torch

from draftsmith.decoding import tree
from draftsmith.decoding.plan import PLANS_KEPT, Plans

SHAPE = tree.by_widths([2, 2])


def test_the_mask_is_the_whole_prefix_and_the_ancestors_at_any_length():
    plan = Plans(SHAPE).of(SHAPE.parents_N)
    own_NN = tree.ancestor_mask(SHAPE.parents_N)
    for length in (0, 1, 300, 7, 299, 2000, 0):
        expected = torch.cat([torch.ones(len(own_NN), length, dtype=torch.bool), own_NN], 1)
        assert torch.equal(plan.mask(length), expected[None])
    assert not plan.causal
    assert (plan.nodes, plan.depth, plan.depths_BN.tolist()) == (7, 2, [SHAPE.depths_N.tolist()])


def test_a_plan_is_made_once_per_tree_and_few_are_kept():
    plans = Plans(SHAPE)
    whole, two = plans.of(SHAPE.parents_N), plans.of(torch.tensor([-1, 0]))
    assert plans.of(SHAPE.parents_N) is whole
    assert plans.of(torch.tensor([-1, 0])) is two
    assert two.causal
    for count in range(2, 3 * PLANS_KEPT):
        assert plans.of(torch.arange(-1, count)).depth == count
    assert len(plans._others) == PLANS_KEPT
    assert plans.of(SHAPE.parents_N) is whole


def test_parents_written_over_in_place_are_seen():
    plans, parents_N = Plans(SHAPE), torch.tensor([-1, 0, 1])
    assert plans.of(parents_N).depth == 2
    parents_N[2] = 0
    assert plans.of(parents_N).depth == 1
    assert plans.of(torch.tensor([-1, 0, 1])).parents_N.tolist() == [-1, 0, 1]
