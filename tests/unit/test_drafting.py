"""Trees filled level by level, against a walk over paths; who may end it, and what is drawn."""

import random
from typing import Any

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding import tree
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.drafting import Ancestors, fill, fill_rows
from draftsmith.errors import ConfigError
from draftsmith.growth import Level, TreeShape, Warp, draw
from draftsmith.roles import Partial, State

VOCABULARY = 11
ROOT = torch.tensor([1.0, 2.0, 3.0])  # what the drafter thinks after reading the root


def logits_after(path: tuple[int, ...]) -> torch.Tensor:
    """Some distribution that depends on every token of the path."""
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return torch.randn(VOCABULARY, generator=generator)


def read(paths: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, hidden) after these paths; the hidden state is the path's own too."""
    logits_AV = torch.stack([logits_after(path) for path in paths])
    return logits_AV, logits_AV[:, :3] * 2


def state_of(shape: TreeShape, **more: Any) -> State:
    return State([7], 7, Capture(), shape, **more)


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
        return read(paths) if paths else None

    proposal = fill(state_of(shape), logits_after((7,)), ROOT, deeper)
    assert proposal.parents_N is shape.parents_N
    assert proposal.tokens_N.tolist() == by_path(shape, 7)
    assert proposal.drawn_NV is None


def test_stopping_leaves_out_whole_levels() -> None:
    shape = tree.by_widths([2, 2, 1])
    for stop_at in (1, 2, 3):
        asked = []

        def deeper(level, tokens_C, stop_at=stop_at, asked=asked):
            asked.append(len(tokens_C))
            return None if len(asked) == stop_at else read([(7,)] * len(level.expanded_A))

        proposal = fill(state_of(shape), torch.zeros(VOCABULARY), ROOT, deeper)
        assert asked == [2, 4, 4][:stop_at]
        assert len(proposal.tokens_N) == len(proposal.parents_N) == [3, 7, 11][stop_at - 1]


def test_columns_may_stand_for_other_ids() -> None:
    ids_V = torch.arange(VOCABULARY) * 3 + 1
    logits_V = logits_after((7,))
    proposal = fill(state_of(tree.by_widths([3])), logits_V, ROOT, lambda level, tokens_C: None, ids_V)
    assert proposal.tokens_N.tolist() == [7, *(3 * logits_V.argsort(descending=True)[:3] + 1).tolist()]


def test_the_root_alone() -> None:
    proposal = fill(state_of(tree.chain(0)), torch.zeros(VOCABULARY), ROOT, lambda level, tokens_C: None)
    assert proposal.tokens_N.tolist() == [7]


def test_more_candidates_than_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 3 of a drafter with 3 candidates"):
        fill(state_of(tree.by_widths([4])), torch.zeros(3), ROOT, lambda level, tokens_C: None)


# Gates


class Watching:
    """Stops at the given ask (1, 2, …; 0: never), and keeps what it saw at each."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.partials: list[Partial] = []
        self.surest: list[float] = []

    def stop(self, state: State, partial: Partial) -> bool:
        seen = {k: list(v) if isinstance(v, list) else v for k, v in vars(partial).items()}
        self.partials.append(Partial(**seen))  # as it is now: it grows
        self.surest.append(partial.surest)
        return len(self.partials) == self.stop_at


class Walk:
    """A `deeper` that follows paths, and keeps what it was asked."""

    def __init__(self) -> None:
        self.paths: list[tuple[int, ...]] = [(7,)]
        self.asked: list[tuple[list[int], int]] = []  # (tokens, how many of them have children)

    def __call__(self, level: Level, tokens_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        self.asked.append((tokens_C.tolist(), len(level.expanded_A)))
        if not len(level.expanded_A):
            return None
        below = [(*self.paths[of], token) for of, token in zip(level.of_C.tolist(), tokens_C.tolist(), strict=True)]
        self.paths = [below[i] for i in level.expanded_A.tolist()]
        return read(self.paths)


@pytest.mark.parametrize("seed", range(20))
def test_a_gate_is_asked_after_each_level_that_has_children(seed: int) -> None:
    shape, gate, walk = random_tree(seed), Watching(), Walk()
    proposal = fill(state_of(shape), logits_after((7,)), ROOT, walk, gate=gate)
    assert proposal.tokens_N.tolist() == by_path(shape, 7)
    assert [len(p.levels) for p in gate.partials] == list(range(1, shape.depth))
    assert [tokens for tokens, _ in walk.asked] == [proposal.tokens_N[level.nodes].tolist() for level in shape.levels]


@pytest.mark.parametrize("stop_at", [1, 2])
def test_the_level_a_gate_ends_with_is_still_passed_on_without_children(stop_at: int) -> None:
    shape, gate, walk = tree.by_widths([2, 2, 1]), Watching(stop_at), Walk()
    proposal = fill(state_of(shape), logits_after((7,)), ROOT, walk, gate=gate)
    nodes = [3, 7][stop_at - 1]
    assert proposal.tokens_N.tolist() == by_path(shape, 7)[:nodes]
    assert proposal.parents_N.tolist() == shape.parents_N.tolist()[:nodes]
    assert len(gate.partials) == stop_at
    assert [expanded for _, expanded in walk.asked] == [*[2, 4][: stop_at - 1], 0]
    assert [len(tokens) for tokens, _ in walk.asked] == [2, 4][:stop_at]
    assert all(len(level.expanded_A) for level in shape.levels[:2])  # the shape itself is as it was


def test_the_states_gate_comes_before_the_drafters_own() -> None:
    shape, given, own = tree.chain(3), Watching(2), Watching(1)
    assert len(fill(state_of(shape, gate=given), logits_after((7,)), ROOT, Walk(), gate=own).tokens_N) == 3
    assert (len(given.partials), len(own.partials)) == (2, 0)


@pytest.mark.parametrize("renamed", [False, True], ids=["base ids", "ids_V"])
@pytest.mark.parametrize("seed", range(20))
def test_what_a_gate_sees(seed: int, renamed: bool) -> None:
    shape, gate = random_tree(seed), Watching()
    ids_V = torch.arange(VOCABULARY).flip(0) + 3 if renamed else None
    proposal = fill(state_of(shape), logits_after((7,)), ROOT, Walk(), ids_V, gate=gate)
    paths = [(7,)]
    for parent, token in zip(shape.parents_N.tolist()[1:], proposal.tokens_N.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    children = set(shape.parents_N.tolist())
    for n, partial in enumerate(gate.partials, start=1):
        nodes = [range(level.nodes.start, level.nodes.stop) for level in partial.levels]
        assert [level.nodes for level in partial.levels] == [level.nodes for level in shape.levels[:n]]
        assert [t.tolist() for t in partial.tokens] == [[paths[i][-1] for i in level] for level in nodes]
        known = [[read([paths[i]])[1][0] for i in level if i in children] for level in nodes[:-1]]
        assert len(partial.hidden) == n
        assert torch.equal(partial.hidden[0], ROOT[None])
        assert all(torch.equal(a, torch.stack(b)) for a, b in zip(partial.hidden[1:], known, strict=True))
        columns = partial.columns_C if ids_V is None else ids_V[partial.columns_C]
        assert columns.tolist() == partial.tokens[-1].tolist()
        chances = [
            float(logits_after(paths[i][:-1]).softmax(-1)[column])
            for i, column in zip(nodes[-1], partial.columns_C.tolist(), strict=True)
            if i in children
        ]
        assert gate.surest[n - 1] == pytest.approx(max(chances), rel=1e-6)


# Several rows at once


class Walks:
    """A deeper of `fill_rows` over paths, row by row."""

    def __init__(self, roots: list[int]) -> None:
        self.paths: list[tuple[int, ...]] = [(root,) for root in roots]
        self.rows: list[list[int]] = []

    def __call__(self, of_M: torch.Tensor, tokens_M: torch.Tensor, rows_M: torch.Tensor) -> Any:
        told = zip(of_M.tolist(), tokens_M.tolist(), strict=True)
        self.paths = [(*self.paths[of], token) for of, token in told]
        assert [path[0] for path in self.paths] == [10 + row for row in rows_M.tolist()]  # the root tells the row
        self.rows.append(rows_M.tolist())
        return read(self.paths)


@pytest.mark.parametrize("seed", range(20))
def test_rows_filled_together_are_what_each_is_alone(seed: int) -> None:
    """Trees of different shapes, static and grown, and gates that stop some rows earlier."""
    rng = random.Random(seed)
    shapes = [random_tree(seed + 100 * b) for b in range(4)]
    shapes[1] = ByProbability(nodes=6, depth=3, top_k=2)  # type: ignore[call-overload]
    gates = [Watching(rng.choice([0, 1, 2])) for _ in range(4)]
    states = [
        State([10 + b], 10 + b, Capture(), shape, gate=gate)
        for b, (shape, gate) in enumerate(zip(shapes, gates, strict=True))
    ]
    alone = []
    for state, gate in zip(states, gates, strict=True):
        walk = Walk()
        walk.paths = [(state.root,)]
        alone.append(fill(state, logits_after((state.root,)), ROOT, walk))
        gate.partials = []
    walks = Walks([10, 11, 12, 13])
    logits_BV = torch.stack([logits_after((10 + b,)) for b in range(4)])
    together = fill_rows(states, logits_BV, ROOT.expand(4, -1), walks)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.tokens_N, other.tokens_N)
        assert torch.equal(one.parents_N, other.parents_N)
    assert len(walks.rows) <= 4
    assert all(rows == sorted(rows) for rows in walks.rows)


# Draws


def test_drawn_tokens_follow_the_distribution_they_are_told_with() -> None:
    """A chi-square over a small vocabulary, level by level; each row of drawn_NV is the softmax at the temperature of
    the logits after that very path."""
    shape, draws, temperature = tree.chain(2), 4000, 0.7
    state = state_of(shape, warp=Warp(temperature=temperature), generator=torch.Generator().manual_seed(0))
    first_V = (logits_after((7,))[:4].double() / temperature).softmax(-1)
    second_VV = torch.stack([(logits_after((7, v))[:4].double() / temperature).softmax(-1) for v in range(4)])
    seen_VV = torch.zeros(4, 4)
    for _ in range(draws):
        walk = Walk()
        proposal = fill(
            state,
            logits_after((7,))[:4],
            ROOT,
            lambda level, tokens_C, walk=walk: (out := walk(level, tokens_C)) and (out[0][:, :4], out[1]),
            draws="iid",
        )
        _, one, two = proposal.tokens_N.tolist()
        seen_VV[one, two] += 1
        assert proposal.drawn_NV.shape == (3, 4)
        torch.testing.assert_close(proposal.drawn_NV[1:], torch.stack([first_V, second_VV[one]]))
    expected_VV = draws * first_V[:, None] * second_VV
    assert expected_VV.min() > 5
    assert ((seen_VV - expected_VV).square() / expected_VV).sum() < 37.7  # 15 degrees of freedom, 0.1 %


def test_drawn_levels_left_out_have_no_rows() -> None:
    shape, state = tree.chain(3), state_of(tree.chain(3), gate=Watching(2), warp=Warp(temperature=1.0))
    proposal = fill(state, logits_after((7,)), ROOT, Walk(), draws="iid")
    assert len(shape.parents_N) == 4
    assert len(proposal.tokens_N) == len(proposal.drawn_NV) == 3


def test_the_seed_decides_what_is_drawn() -> None:
    def tokens(seed: int) -> list[int]:
        state = state_of(tree.chain(4), warp=Warp(temperature=1.0), generator=torch.Generator().manual_seed(seed))
        return fill(state, logits_after((7,)), ROOT, Walk(), draws="iid").tokens_N.tolist()

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(5)}) > 1


def test_temperature_0_and_drafters_that_choose_never_draw() -> None:
    shape, generator = tree.chain(3), torch.Generator().manual_seed(0)
    before = generator.get_state()
    for temperature, draws in ((0.0, "iid"), (1.0, None)):
        state = state_of(shape, warp=Warp(temperature=temperature), generator=generator)
        proposal = fill(state, logits_after((7,)), ROOT, Walk(), draws=draws)
        assert proposal.tokens_N.tolist() == by_path(shape, 7)
        assert proposal.drawn_NV is None
    assert torch.equal(generator.get_state(), before)


def test_a_draw_is_where_the_cumulative_distribution_passes_the_number() -> None:
    chances_CV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    uniforms = torch.rand(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert {tuple(draw(chances_CV, u_C).tolist()) for u_C in uniforms} == {(1, 2), (3, 2)}  # never what has no chance
    assert draw(chances_CV, torch.tensor([0.2499, 0.0], dtype=torch.float64)).tolist() == [1, 2]
    assert draw(chances_CV, torch.tensor([0.25, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [3, 2]


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
