"""Trees filled level by level, against a walk over paths."""

import random

import pytest
import torch

from draftsmith.decoding import tree
from draftsmith.heads.drafting import Ancestors, fill
from draftsmith.roles import TreeShape

VOCABULARY = 11


def logits_after(path: tuple[int, ...]) -> torch.Tensor:
    """Some distribution that depends on every token of the path."""
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return torch.randn(VOCABULARY, generator=generator)


def random_tree(seed: int) -> TreeShape:
    rng = random.Random(seed)
    paths: list[tuple[int, ...]] = []
    for _ in range(rng.randrange(1, 20)):
        above = rng.choice([(), *paths])
        ranks = [rank for rank in range(4) if (*above, rank) not in paths]
        if ranks and len(above) < 5:
            paths.append((*above, rng.choice(ranks)))
    return tree.from_paths(paths)


def by_path(shape: TreeShape, root: int) -> list[int]:
    """Node by node: the ranks-th best token after the path above it."""
    paths = [(root,)]
    for parent, rank in zip(shape.parents_N.tolist()[1:], shape.ranks_N.tolist()[1:], strict=True):
        best = logits_after(paths[parent]).argsort(descending=True)
        paths.append((*paths[parent], int(best[rank])))
    return [path[-1] for path in paths]


@pytest.mark.parametrize("seed", range(40))
def test_every_node_follows_its_own_parent(seed: int) -> None:
    shape = random_tree(seed)
    paths = [(7,)]  # of the expanded nodes of the last level

    def deeper(level, tokens_C):
        nonlocal paths
        below = [(*paths[of], token) for of, token in zip(level.of_C.tolist(), tokens_C.tolist(), strict=True)]
        paths = [below[i] for i in level.expanded_A.tolist()]
        return torch.stack([logits_after(path) for path in paths]) if paths else None

    tokens_N, parents_N = fill(shape, 7, logits_after((7,)), deeper)
    assert parents_N is shape.parents_N
    assert tokens_N.tolist() == by_path(shape, 7)


def test_stopping_leaves_out_whole_levels() -> None:
    shape = tree.by_widths([2, 2, 1])
    for stop_at in (1, 2, 3):
        asked = []

        def deeper(level, tokens_C, stop_at=stop_at, asked=asked):
            asked.append(len(tokens_C))
            return None if len(asked) == stop_at else torch.zeros(len(level.expanded_A), VOCABULARY)

        tokens_N, parents_N = fill(shape, 7, torch.zeros(VOCABULARY), deeper)
        assert asked == [2, 4, 4][:stop_at]
        assert len(tokens_N) == len(parents_N) == [3, 7, 11][stop_at - 1]


def test_columns_may_stand_for_other_ids() -> None:
    ids_V = torch.arange(VOCABULARY) * 3 + 1
    logits_V = logits_after((7,))
    tokens_N, _ = fill(tree.by_widths([3]), 7, logits_V, lambda level, tokens_C: None, ids_V)
    assert tokens_N.tolist() == [7, *(3 * logits_V.argsort(descending=True)[:3] + 1).tolist()]


def test_the_root_alone() -> None:
    assert fill(tree.chain(0), 7, torch.zeros(VOCABULARY), lambda level, tokens_C: None)[0].tolist() == [7]


@pytest.mark.parametrize("seed", range(20))
def test_levels_hold_every_node_once_below_its_parent(seed: int) -> None:
    shape = random_tree(seed)
    above, expanded, parents = [0], [0], shape.parents_N.tolist()
    nodes_so_far = [0]
    for depth, level in enumerate(shape.levels, start=1):
        nodes = list(range(level.nodes.start, level.nodes.stop))
        nodes_so_far += nodes
        assert (shape.depths_N[level.nodes] == depth).all()
        assert [above[i] for i in level.above_C] == [expanded[i] for i in level.of_C] == [parents[n] for n in nodes]
        assert level.ranks_C.tolist() == shape.ranks_N[level.nodes].tolist()
        above, expanded = nodes, [nodes[i] for i in level.expanded_A]
        assert expanded == [n for n in nodes if n in parents]
    assert nodes_so_far == list(range(len(parents)))


@pytest.mark.parametrize("seed", range(20))
def test_ancestors_are_the_trees_own(seed: int) -> None:
    """All nodes read: level by level the rows of the ancestor mask, the root being one of the slots before."""
    shape, past = random_tree(seed), 5
    whole = tree.ancestor_mask(shape.parents_N)
    ancestors = Ancestors(torch.device("cpu"))
    for level in shape.levels:
        mask = ancestors.below(level.above_C, past)
        assert mask[..., :past].all()
        assert torch.equal(mask[0, :, past:], whole[level.nodes, 1 : level.nodes.stop])
