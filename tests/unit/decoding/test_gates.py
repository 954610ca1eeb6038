"""The gates without weights, level by level, in chains and trees that are drafted for real."""

import itertools

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import generate
from draftsmith.decoding.gates import Confidence, Fixed, GateConfig, Oracle
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.roles import Partial

PROMPT = [1, 3, 2, 2, 3, 0]
SHAPES = {
    "chain": tree.chain(5),
    "tree": tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]),
    "full": tree.by_widths([3, 2, 2]),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


class Guessing:
    """Level by level, the base's own logits after each path with noise on them: right at times. It keeps its steps."""

    gated = True
    needs, max_depth = Needs(), 8

    def __init__(self, noise=10.0, seed=0):
        self.noise, self.generator, self.steps = noise, torch.Generator().manual_seed(seed), []

    def propose(self, base, state):
        paths = [[]]

        def after(path):
            logits_V = base.logits([*state.tokens, *path])
            noise_V = torch.randn(len(logits_V), generator=self.generator, dtype=torch.float64)
            return 0.15 * (logits_V + self.noise * noise_V)  # the base's own are far apart

        def deeper(level, tokens_C):
            nonlocal paths
            above = [paths[i] for i in level.of_C.tolist()]
            below = [[*path, int(token)] for path, token in zip(above, tokens_C, strict=True)]
            paths = [below[i] for i in level.expanded_A.tolist()]
            return (torch.stack([after(p) for p in paths]), torch.zeros(len(paths), 1)) if paths else None

        proposal = fill(state, after([]), torch.zeros(1), deeper)
        self.steps.append((list(state.tokens), proposal))
        return proposal


def depth_of(proposal):
    return int(tree.depths(proposal.parents_N).max())


def run(base, gate, shape, count=40, **more):
    drafter = Guessing(**more)
    out = generate(base, PROMPT, drafter=drafter, shape=shape, gate=gate, max_new_tokens=count)
    assert out.tokens == base.continuation(PROMPT, count)
    return drafter.steps, out


@every_shape
@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_fixed_drafts_so_many_levels(toy_base, shape, depth):
    steps, _ = run(toy_base(), Fixed(depth), shape)
    assert {depth_of(proposal) for _, proposal in steps} == {min(depth, shape.depth)}


@every_shape
def test_the_oracle_stops_exactly_where_nothing_right_may_be_gone_on_from(toy_base, shape):
    base = toy_base(vocab=5)
    text = PROMPT + base.continuation(PROMPT, 57)
    steps, _ = run(base, Oracle(text), shape)
    parents, depths = shape.parents_N.tolist(), shape.depths_N.tolist()
    found = set()
    for tokens, proposal in steps:
        rest, drafted = text[len(tokens) :], proposal.tokens_N.tolist()
        right = [True]
        for node in range(1, len(drafted)):
            right.append(right[parents[node]] and drafted[node] == rest[depths[node] - 1])
        deepest = depth_of(proposal)
        goes_on = [any(right[n] and n in parents for n in range(len(drafted)) if depths[n] == d) for d in range(99)]
        assert all(goes_on[:deepest])  # it did not go on from nothing
        assert deepest == shape.depth or not goes_on[deepest]  # nor stop short of what would be kept
        found.add(deepest)
    assert len(found) >= min(shape.depth, 3)


@pytest.mark.parametrize(("shape", "best"), [(SHAPES["chain"], 5), (SHAPES["tree"], 3), (SHAPES["full"], 3)])
def test_the_oracle_keeps_what_no_gate_would_keep(toy_base, shape, best):
    """With the same drafts as without it, it loses nothing: no draft that would be kept is left out."""
    base = toy_base(vocab=5)
    text = PROMPT + base.continuation(PROMPT, 57)
    (_, free), (_, stopped) = run(base, None, shape, noise=0.0), run(base, Oracle(text), shape, noise=0.0)
    assert free.stats.accepted_by_depth == stopped.stats.accepted_by_depth
    assert free.tokens_per_step == best + 1  # how deep the path of best tokens goes


def test_beyond_the_text_it_was_told_the_oracle_stops(toy_base):
    base = toy_base()
    told = base.continuation(PROMPT, 8)
    steps, _ = run(base, Oracle(PROMPT + told), tree.chain(3), noise=0.0, count=20)
    for tokens, proposal in steps:
        left = len(PROMPT) + len(told) - len(tokens)
        assert depth_of(proposal) == min(3, max(left, 0) + 1)
    assert {depth_of(p) for _, p in steps} == {1, 3} | {depth_of(p) for _, p in steps}


def test_the_oracle_notes_every_level_once(toy_base):
    """Asked about two levels at a time it says the same."""
    levels, text = tree.chain(4).levels, [9, 5, 6, 0]
    state = type("Told", (), {"tokens": [9]})()
    tokens = [torch.tensor([t]) for t in (5, 6, 7)]
    for asked in ((1, 2, 3), (2, 3), (3,)):
        partial, gate = Partial(), Oracle(text)
        for n in asked:
            partial.levels, partial.tokens = levels[:n], tokens[:n]
            assert gate.stop(state, partial) == (n == 3)
        assert [bool(t) for t in partial.notes] == [True, True, False]


@every_shape
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_confidence_stops_after_the_first_level_without_a_sure_draft(toy_base, shape, threshold):
    """Softmax in fp64 of what the drafter said, over the newest nodes that have children."""
    surest = []

    class Written(Confidence):
        def stop(self, state, partial):
            level = partial.levels[-1]
            chances = [
                float(partial.logits_AV[level.of_C[i]].double().softmax(-1)[partial.columns_C[i]])
                for i in level.expanded_A.tolist()
            ]
            assert partial.surest == pytest.approx(max(chances), rel=1e-5)
            stops = super().stop(state, partial)
            assert stops == (max(chances) < threshold)
            surest.append((len(partial.levels), stops))
            return stops

    steps, _ = run(toy_base(), Written(threshold), shape)
    assert {stops for _, stops in surest} == {True, False}
    ends = [depth for depth, stops in surest if stops]
    assert sum(depth_of(p) < shape.depth for _, p in steps) == sum(depth < shape.depth for depth in ends)
    assert all(b == a + 1 or b == 1 for (a, _), (b, _) in itertools.pairwise(surest))


def test_check_10_confidence_zero_never_stops_above_one_always(toy_base):
    """§11.10 (Kangaroo's eta)."""
    for threshold, depth in ((0.0, 5), (1.01, 1)):
        steps, _ = run(toy_base(), Confidence(threshold), tree.chain(5))
        assert {depth_of(proposal) for _, proposal in steps} == {depth}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "guess"}, "kind='guess'"),
        ({"kind": "fixed", "depth": 0}, "depth=0"),
        ({"kind": "acceptance", "min_depth": 0}, "min_depth=0"),
        ({"kind": "acceptance", "threshold": 0.0}, "threshold=0.0"),
        ({"kind": "acceptance", "threshold": 1.0}, "threshold=1.0"),
        ({"kind": "confidence", "threshold": -0.5}, "threshold=-0.5"),
        ({"kind": "confidence"}, "threshold: null; gate=confidence wants"),
    ],
)
def test_what_a_gate_cannot_be_is_named(settings, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        GateConfig(**settings)


def test_gates_that_can_be():
    for settings in ({"kind": "fixed"}, {"kind": "oracle"}, {"kind": "acceptance"}):
        assert GateConfig(**settings).threshold is None
    assert GateConfig("confidence", threshold=0.6).threshold == 0.6
