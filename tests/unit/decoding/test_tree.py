import random

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError


def random_parents(rng, count):
    return [-1] + [rng.randrange(node) for node in range(1, count)]


def lineage(parents, node):
    """The slow oracle: the node and everyone above it."""
    return [node] if node == 0 else [*lineage(parents, parents[node]), node]


def test_from_paths_orders_by_length_then_lexicographically():
    shape = tree.from_paths([[0, 0], [1], [0]])
    assert shape.parents_N.tolist() == [-1, 0, 0, 1]
    assert shape.depths_N.tolist() == [0, 1, 1, 2]
    assert shape.ranks_N.tolist() == [0, 0, 1, 0]
    assert (shape.depth, shape.width) == (2, 2)


def test_from_paths_rebuilds_every_random_tree_of_ranks():
    rng = random.Random(0)
    for _ in range(200):
        paths = {()}
        for _ in range(rng.randrange(20)):
            paths.add((*rng.choice(sorted(paths)), rng.randrange(4)))
        given = [list(p) for p in paths - {()}]
        rng.shuffle(given)
        shape = tree.from_paths(given)
        parents, ranks = shape.parents_N.tolist(), shape.ranks_N.tolist()
        rebuilt = [tuple(ranks[n] for n in lineage(parents, node)[1:]) for node in range(len(parents))]
        assert rebuilt == sorted(paths, key=lambda p: (len(p), p))
        assert shape.depths_N.tolist() == [len(p) for p in rebuilt]
        assert torch.equal(tree.depths(shape.parents_N), shape.depths_N)


@pytest.mark.parametrize(
    ("paths", "named"),
    [([[0], [1, 0]], r"\[1, 0\].*prefix \[1\]"), ([[0], [0]], "twice"), ([[]], "rank path"), ([[-1]], "-1")],
)
def test_from_paths_names_the_bad_path(paths, named):
    with pytest.raises(ConfigError, match=named):
        tree.from_paths(paths)


def test_chain_and_full_trees():
    assert tree.chain(0).parents_N.tolist() == [-1]
    assert tree.chain(3).parents_N.tolist() == [-1, 0, 1, 2]
    assert tree.chain(3).width == 1
    assert tree.by_widths([2, 2]).parents_N.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match=r"decoding\.depth"):
        tree.chain(-1)


def test_cut_leaves_the_tree_of_the_shorter_paths():
    paths = [[0], [1], [2], [0, 0], [1, 1], [0, 0, 2]]
    for depth in range(4):
        cut = tree.from_paths(paths).cut(depth)
        expected = tree.from_paths([p for p in paths if len(p) <= depth])
        assert all(torch.equal(vars(cut)[k], vars(expected)[k]) for k in vars(cut))
    mixed = tree.TreeShape(torch.tensor([-1, 0, 1, 2, 0, 4]), torch.tensor([0, 1, 2, 3, 1, 2]), torch.arange(6))
    assert mixed.cut(2).parents_N.tolist() == [-1, 0, 1, 0, 3]
    assert mixed.cut(2).ranks_N.tolist() == [0, 1, 2, 4, 5]


def test_config_takes_a_depth_or_paths_and_checks_early():
    assert tree.TreeConfig().shape(3).depth == 3
    assert tree.TreeConfig(depth=2).shape(3).depth == 2
    assert tree.TreeConfig(paths=[[0], [1], [0, 0]]).shape(9).parents_N.tolist() == [-1, 0, 0, 1]
    with pytest.raises(ConfigError, match="only one"):
        tree.TreeConfig(depth=1, paths=[[0]])
    with pytest.raises(ConfigError, match="prefix"):
        tree.TreeConfig(paths=[[0, 0]])


def test_ancestor_mask_depths_and_is_chain_equal_the_slow_oracle():
    rng = random.Random(1)
    for _ in range(300):
        parents = random_parents(rng, rng.randrange(1, 30))
        parents_N, count = torch.tensor(parents), len(parents)
        expected = [[m in lineage(parents, n) for m in range(count)] for n in range(count)]
        assert tree.ancestor_mask(parents_N).tolist() == expected
        assert tree.depths(parents_N).tolist() == [len(lineage(parents, n)) - 1 for n in range(count)]
        assert tree.is_chain(parents_N) == (parents == [n - 1 for n in range(count)])


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, -1], [-1, 0, 3, 0]])
def test_parents_that_are_no_tree_fail(parents):
    with pytest.raises(AssertionError):
        tree.depths(torch.tensor(parents))


def test_check_26_the_logits_of_every_path_equal_its_own_causal_forward(toy_base):
    base, rng = toy_base(), random.Random(2)
    for _ in range(30):
        prompt = [rng.randrange(7) for _ in range(rng.randrange(1, 9))]
        parents = random_parents(rng, rng.randrange(1, 12))
        tokens, parents_N = [rng.randrange(7) for _ in parents], torch.tensor(parents)
        kv = base.new_kv()
        base.capture(Needs(final=True), torch.tensor([prompt]), kv=kv)
        prefix = torch.ones(len(parents), len(prompt), dtype=torch.bool)
        logits_NV = base.capture(
            Needs(logits=True),
            torch.tensor([tokens]),
            positions_BQ=len(prompt) + tree.depths(parents_N)[None],
            mask_BQS=torch.cat([prefix, tree.ancestor_mask(parents_N)], 1)[None],
            kv=kv,
        ).logits[0]
        for node in range(len(parents)):
            alone = base.logits(prompt + [tokens[n] for n in lineage(parents, node)])
            torch.testing.assert_close(logits_NV[node], alone, rtol=0, atol=1e-12)
