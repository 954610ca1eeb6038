"""How tokens are taken and which trees they make, against slow oracles over paths."""

import heapq
import itertools
import math
import random
from functools import cache

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding import tree
from draftsmith.decoding.goodness import chi_square
from draftsmith.decoding.policies.beam import Beam, conditioned
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Shape, Warp, draw, gumbel, scores, uniforms, without_earlier
from draftsmith.roles import Proposal, State


def host(seed):
    return torch.Generator().manual_seed(seed)


# Warp


def slow_warp(logits, temperature, top_k, top_p):
    """Tokens from the best down, the lower id first: keep top_k, then until they have top_p together."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[:top_k]
    total, kept, sofar = sum(weights[v] for v in order), [], 0.0
    for v in order:
        if sofar >= top_p:
            break
        kept.append(v)
        sofar += weights[v] / total
    total = sum(weights[v] for v in kept)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(logits))]


@pytest.mark.parametrize("seed", range(60))
def test_warp_equals_the_slow_oracle(seed):
    rng = random.Random(seed)
    vocabulary = rng.choice([1, 2, 5, 12])
    ties = seed % 3 == 0
    logits = [[float(rng.randrange(4)) if ties else rng.gauss(0, 2) for _ in range(vocabulary)] for _ in range(3)]
    told = rng.choice([0.3, 1.0, 2.0]), rng.choice([None, 1, 3, 40]), rng.choice([1.0, 0.83, 0.31, 1e-6])
    chances_NV = Warp(*told).chances(torch.tensor(logits, dtype=torch.float64))
    for row, chances_V in zip(logits, chances_NV.tolist(), strict=True):
        expected = slow_warp(row, *told)
        assert chances_V == pytest.approx(expected, abs=1e-14)
        assert [c > 0 for c in chances_V] == [c > 0 for c in expected]


def test_of_equal_logits_the_lower_ids_stay():
    tied = torch.zeros(1, 5)
    assert Warp(1.0, top_k=2).chances(tied).tolist() == [[0.5, 0.5, 0, 0, 0]]
    assert Warp(1.0, top_p=0.5).chances(torch.zeros(1, 4)).tolist() == [[0.5, 0.5, 0, 0]]
    assert Warp(1.0, top_p=0.51).chances(torch.zeros(1, 4))[0, 3] == 0
    assert Warp(1.0, top_k=1).chances(torch.tensor([[0.0, 3, 3]])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("warp", [Warp(0.7), Warp(1.0, top_k=4), Warp(1.3, top_p=0.6), Warp(1.0, 6, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_warped_alike_on_either_side(warp, dtype):
    """The base warps a whole tree, a drafter a level: equal logits are equal distributions, ties of bf16 included."""
    logits_NV = torch.randn(6, 300, generator=host(0)).to(dtype)
    whole_NV, before_NV = warp.chances(logits_NV), logits_NV.clone()
    assert whole_NV.dtype == torch.float64
    for n in range(6):
        assert torch.equal(whole_NV[n], warp.chances(logits_NV[n, None])[0])
    assert torch.equal(logits_NV, before_NV)
    assert torch.allclose(whole_NV.sum(1), torch.ones(6).double(), atol=1e-14)


@pytest.mark.parametrize(
    ("told", "key"),
    [({"temperature": -1}, "temperature=-1"), ({"temperature": math.inf}, "temperature=inf"), ({"top_k": 0}, "top_k=0")]
    + [({"top_p": p}, f"top_p={p}") for p in (0, 1.1)],
)
def test_what_is_no_warp_is_refused(told, key):
    with pytest.raises(ConfigError, match=key):
        Warp(**told)


# Draws


def test_nothing_without_probability_is_drawn_however_rounding_falls():
    generator, last = host(0), 1 - 2.0**-53
    for scale in (1.0, 1 / 3, 1e-300, 7e5):
        chances_NV = torch.rand(200, 9, generator=generator, dtype=torch.float64)
        chances_NV[torch.rand(200, 9, generator=generator) < 0.5] = 0
        chances_NV = chances_NV[chances_NV.sum(1) > 0]
        chances_NV = chances_NV / chances_NV.sum(1, keepdim=True) * scale
        for number in (0.0, 5e-324, 0.5, last):
            tokens_N = draw(chances_NV, torch.full((len(chances_NV),), number, dtype=torch.float64))
            assert bool((chances_NV.gather(1, tokens_N[:, None]) > 0).all())
        assert torch.equal(tokens_N, 8 - (chances_NV.flip(1) > 0).int().argmax(1))  # u near 1: the last that has any


def test_uniforms_are_the_hosts_and_below_one():
    u_AB = uniforms((300, 40), torch.zeros(1), host(4))
    assert u_AB.dtype == torch.float64
    assert 0 <= u_AB.min() < u_AB.max() < 1
    assert torch.equal(u_AB, torch.rand(300, 40, generator=host(4), dtype=torch.float64))


def slow_without(chances, columns):
    """One column after the other, each drawn from what is left."""
    rows, left = [], list(chances)
    for column in columns:
        rows.append([c / sum(left) for c in left] if left[column] else [0.0] * len(left))
        left[column] = 0.0
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_what_was_left_to_draw_from(seed):
    rng = random.Random(seed)
    vocabulary = rng.choice([1, 3, 8])
    chances_AV = torch.randn(4, vocabulary, generator=host(seed), dtype=torch.float64).softmax(-1)
    chances_AV[:, rng.sample(range(vocabulary), vocabulary // 3)] = 0
    columns_AR = scores(chances_AV, host(seed)).topk(rng.randrange(1, vocabulary + 1), dim=-1).indices
    rows, draws = columns_AR.shape
    of_C, order_C = (torch.tensor(t) for t in zip(*itertools.product(range(rows), range(draws)), strict=True))
    left_ARV = without_earlier(chances_AV, columns_AR, of_C, order_C).unflatten(0, (rows, draws))
    for chances, columns, left in zip(chances_AV.tolist(), columns_AR.tolist(), left_ARV.tolist(), strict=True):
        for got, expected in zip(left, slow_without(chances, columns), strict=True):
            assert got == pytest.approx(expected, abs=1e-14)


def test_the_largest_scores_are_draws_without_replacement():
    """The first two: q(a) q(b) / (1 - q(a)). What has no probability comes last."""
    draws, q_V = 20000, torch.tensor([0.4, 0.05, 0.25, 0, 0.3], dtype=torch.float64)
    two_N2 = scores(q_V.expand(draws, 5), host(0)).topk(2, dim=-1).indices
    counts = (two_N2[:, 0] * 5 + two_N2[:, 1]).bincount(minlength=25)
    expected_VV = q_V[:, None] * q_V / (1 - q_V[:, None])
    assert chi_square(counts, expected_VV.fill_diagonal_(0).flatten()) > 1e-3
    assert chi_square(counts, (q_V[:, None] * q_V).fill_diagonal_(0).flatten()) < 1e-6  # it can tell
    assert (scores(q_V.expand(100, 5), host(1)).argsort(-1)[:, 0] == 3).all()


def test_noise_given_its_maximum():
    """conditioned: the order stays, the largest is as told, and the whole follows the law of Gumbels of these means
    whose maximum happened to be that: below it, independent and cut off."""
    means_V, top, draws = torch.tensor([-0.5, -1.5, -2.0], dtype=torch.float64), 0.3, 4000
    noisy_AV = means_V + gumbel((draws, 3), means_V, host(0))
    moved_AV = conditioned(noisy_AV, torch.full((draws,), top).double())
    assert torch.equal(moved_AV.argsort(-1), noisy_AV.argsort(-1))
    assert (moved_AV.max(-1).values == torch.tensor(top).double()).all()
    below = moved_AV[moved_AV.argmax(-1) == 0, 1]
    # P(G < x | G < top) of a Gumbel of mean m is exp(-exp(m - x) + exp(m - top)): uniform as a number
    uniform = (-(means_V[1] - below).exp() + (means_V[1] - top).exp()).exp()
    assert chi_square((uniform * 10).long().bincount(minlength=10), torch.ones(10)) > 1e-3


# Trees: a drafter whose logits depend on the whole path

VOCABULARY = 6


@cache
def logits_after(path):
    return 1.5 * torch.randn(VOCABULARY, generator=host(abs(hash(path)) % 2**31), dtype=torch.float64)


def chances_after(path):
    return logits_after(path).softmax(-1).tolist()


def grown(shape: Shape, draws=None, seed=0, world=0, warp=None) -> Proposal:
    """world: the first token, so that different ones are different drafters."""
    paths = [(world,)]

    def deeper(level, tokens_C):
        nonlocal paths
        below = [(*paths[of], token) for of, token in zip(level.of_C.tolist(), tokens_C.tolist(), strict=True)]
        paths = [below[i] for i in level.expanded_A.tolist()]
        return (torch.stack([logits_after(path) for path in paths]), torch.zeros(len(paths), 1)) if paths else None

    warp = warp or Warp(temperature=1.0)
    state = State([world], world, Capture(), shape, warp=warp, draws=draws or "best", generator=host(seed))
    return fill(state, logits_after((world,)), torch.zeros(1), deeper)


def paths_of(proposal):
    """Each node's path, from the root."""
    paths = [(int(proposal.tokens_N[0]),)]
    for parent, token in zip(proposal.parents_N.tolist()[1:], proposal.tokens_N.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def check_rows(proposal):
    """Row n is what node n was drawn from, given its earlier siblings: none twice."""
    seen = {}
    for n, path in enumerate(paths_of(proposal)[1:], start=1):
        parent = int(proposal.parents_N[n])
        row = [0.0 if v in seen.get(parent, []) else c for v, c in enumerate(chances_after(path[:-1]))]
        assert proposal.drawn_NV[n].tolist() == pytest.approx([c / sum(row) for c in row], abs=1e-12)
        assert path[-1] not in seen.get(parent, [])
        seen.setdefault(parent, []).append(path[-1])


def random_tree(seed):
    rng = random.Random(seed)
    paths = []
    for _ in range(rng.randrange(1, 16)):
        above = rng.choice([(), *paths])
        rank = sum(path[:-1] == above and len(path) == len(above) + 1 for path in paths)
        if rank < 4 and len(above) < 4:
            paths.append((*above, rank))
    return tree.from_paths(paths)


@pytest.mark.parametrize("seed", range(20))
def test_a_static_tree_tells_what_its_tokens_were_drawn_from(seed):
    shape = random_tree(seed)
    proposal = grown(shape, "iid", seed)
    assert proposal.parents_N is shape.parents_N
    for n, path in enumerate(paths_of(proposal)[1:], start=1):
        assert proposal.drawn_NV[n].tolist() == pytest.approx(chances_after(path[:-1]), abs=1e-12)
    proposal = grown(shape, "distinct", seed)
    assert proposal.parents_N is shape.parents_N
    check_rows(proposal)


@pytest.mark.parametrize("draws", ["iid", "distinct"])
def test_a_static_trees_tokens_follow_what_it_tells(draws):
    """The root's two children, and the child of the second."""
    shape, world, count = tree.from_paths([[0], [1], [1, 0]]), 1, 1000
    first_V = torch.tensor(chances_after((world,)), dtype=torch.float64)
    pairs_VV, third_VV = torch.zeros(2, VOCABULARY, VOCABULARY)
    for seed in range(count):
        _, a, b, c = grown(shape, draws, seed, world).tokens_N.tolist()
        pairs_VV[a, b] += 1
        third_VV[b, c] += 1
    expected_VV = first_V[:, None] * first_V
    if draws == "distinct":
        expected_VV = (expected_VV / (1 - first_V[:, None])).fill_diagonal_(0)
    after_VV = torch.tensor([chances_after((world, b)) for b in range(VOCABULARY)], dtype=torch.float64)
    assert chi_square(pairs_VV, expected_VV) > 1e-3
    assert chi_square(third_VV, expected_VV.sum(0)[:, None] * after_VV) > 1e-3


def test_the_warp_is_the_drafters_too():
    for draws in ("iid", "distinct"):
        proposal = grown(tree.by_widths([2, 2]), draws, warp=Warp(0.5, top_k=2))
        assert bool(((proposal.drawn_NV[1:] > 0).sum(1) <= 2).all())


def test_when_nothing_is_left_to_draw_the_row_is_zeros():
    proposal = grown(tree.by_widths([4]), "distinct", warp=Warp(1.0, top_k=2))
    assert (proposal.drawn_NV > 0).sum(1).tolist() == [0, 2, 1, 0, 0]


# EAGLE-2, DySpec, beam


def best_after(path, count):
    """(probability, token) of the best tokens, in order."""
    return sorted(((c, v) for v, c in enumerate(chances_after(path))), reverse=True)[:count]


def slow_beams(world, width, top_k, depth):
    """(cumulative probability, path) of everything drafted, level by level, `width` beams being gone on from."""
    levels, beam = [], [(1.0, (world,))]
    for _ in range(depth):
        level = [(above * c, (*path, v)) for above, path in beam for c, v in best_after(path, top_k)]
        beam = sorted(level, reverse=True)[:width]
        levels.append(level)
    return levels


@pytest.mark.parametrize("world", range(12))
@pytest.mark.parametrize(
    ("nodes", "depth", "top_k"), [(1, 3, 2), (2, 3, 3), (9, 3, 2), (12, 4, 3), (40, 3, 6), (30, 5, 6), (30, 5, 10)]
)
def test_by_probability_keeps_the_likeliest_of_everything(world, nodes, depth, top_k):
    proposal = grown(ByProbability(nodes, depth, top_k), world=world)
    everything = [node for level in slow_beams(world, top_k, top_k, depth) for node in level]
    likeliest = sorted(everything, reverse=True)[: nodes - 1]
    assert sorted(paths_of(proposal)) == sorted([(world,), *(path for _, path in likeliest)])
    assert (proposal.parents_N[1:] < torch.arange(1, len(proposal.parents_N))).all()


def test_a_smaller_proposal_is_part_of_a_larger():
    larger = {nodes: set(paths_of(grown(ByProbability(nodes, 4, 4), world=3))) for nodes in (2, 5, 11, 30)}
    assert larger[2] < larger[5] < larger[11] < larger[30]


def slow_dyspec(world, nodes, depth, siblings):
    """The paper's algorithm 1 with the best token in a draw's place: a heap of slots. A slot's token leaves its
    parent's distribution, which is normalised again; its child slot has v R(y), its next sibling v (1 - R(y))."""
    heap, kept = [(-1.0, (world,), chances_after((world,)), 0)], [(world,)]
    while heap and len(kept) < nodes:
        value, above, left, order = heapq.heappop(heap)
        token = max(range(VOCABULARY), key=left.__getitem__)
        path, chance = (*above, token), left[token]
        kept.append(path)
        if len(path) <= depth:
            heapq.heappush(heap, (value * chance, path, chances_after(path), 0))
        rest = [0.0 if v == token else c for v, c in enumerate(left)]
        if order + 1 < siblings and sum(rest) > 0:
            rest = [c / sum(rest) for c in rest]
            heapq.heappush(heap, (value * (1 - chance), above, rest, order + 1))
    return kept


@pytest.mark.parametrize("world", range(12))
@pytest.mark.parametrize(
    ("nodes", "depth", "siblings"), [(1, 3, 4), (2, 3, 4), (9, 3, 2), (12, 4, 10), (40, 3, 6), (25, 6, 4)]
)
def test_dyspec_is_the_papers_greedy_expansion(world, nodes, depth, siblings):
    proposal = grown(DySpec(nodes, depth, siblings), world=world)
    assert sorted(paths_of(proposal)) == sorted(slow_dyspec(world, nodes, depth, siblings))


@pytest.mark.parametrize("seed", range(40))
def test_dyspec_drawn_has_the_likeliest_slots_for_the_tokens_it_drew(seed):
    """No slot that is left out, below a node or beside one, is worth more than one that is in."""
    depth, siblings, world = 3, 4, seed % 7
    proposal = grown(DySpec(10, depth, siblings), "distinct", seed, world)
    assert len(proposal.tokens_N) == 10
    check_rows(proposal)
    reached, left, taken, slots = {(world,): 1.0}, {}, {}, []
    for path in paths_of(proposal)[1:]:
        above = path[:-1]
        slots.append(left.setdefault(above, reached[above]))
        reached[path] = reached[above] * chances_after(above)[path[-1]]
        left[above] -= reached[path]
        taken[above] = taken.get(above, 0) + 1
    out = [left.get(path, reached[path]) for path in reached if len(path) <= depth and taken.get(path, 0) < siblings]
    assert min(slots) >= max(out) - 1e-12


@pytest.mark.parametrize("world", range(12))
@pytest.mark.parametrize(("width", "depth"), [(1, 3), (3, 1), (3, 4), (10, 3)])
def test_beam_of_best_tokens_is_plain_beam_search(world, width, depth):
    found = sorted(paths_of(grown(Beam(width, depth), world=world))[1:])
    levels = slow_beams(world, width, width, depth)
    assert found == sorted(path for level in levels for _, path in sorted(level, reverse=True)[:width])


def test_a_drawn_beams_leaves_are_paths_drawn_without_replacement():
    """Two leaves {s, t} of depth 2: p(s) p(t) / (1 - p(s)) + p(t) p(s) / (1 - p(t)) (Kool et al. 2019)."""
    world, count, vocabulary = 2, 800, VOCABULARY
    first, after = chances_after((world,)), [chances_after((world, a)) for a in range(vocabulary)]
    p_S = (torch.tensor(first)[:, None] * torch.tensor(after)).flatten().double()
    seen_SS = torch.zeros(len(p_S), len(p_S))
    for seed in range(count):
        proposal = grown(Beam(2, 2), "distinct", seed, world)
        assert len(proposal.tokens_N) == 5
        if seed < 50:
            check_rows(proposal)
        s, t = sorted(a * vocabulary + b for _, a, b in paths_of(proposal)[3:])
        seen_SS[s, t] += 1
    ordered_SS = (p_S[:, None] * p_S / (1 - p_S[:, None])).fill_diagonal_(0)
    assert chi_square(seen_SS, (ordered_SS + ordered_SS.T).triu(1)) > 1e-3


@pytest.mark.parametrize("shape", [Beam(2, 2), DySpec(6, 2), ByProbability(6, 2)])
def test_trees_that_cannot_be_drawn_so_are_refused(shape):
    with pytest.raises(ConfigError, match="drafts=iid"):
        grown(shape, "iid")


def test_eagle2_takes_best_tokens_only():
    with pytest.raises(ConfigError, match="drafts=distinct"):
        grown(ByProbability(6, 2), "distinct")


@pytest.mark.parametrize("shape", [Beam(3, 3), DySpec(9, 3), ByProbability(9, 3)], ids=lambda s: type(s).__name__)
def test_a_cut_tree_ends_there_and_none_is_larger_than_it_says(shape):
    for depth in range(5):
        cut = shape.cut(depth)
        assert cut.depth == min(depth, 3)
        for draws in (None,) if isinstance(shape, ByProbability) else (None, "distinct"):
            proposal = grown(cut, draws)
            deepest = max(map(len, paths_of(proposal))) - 1
            assert deepest == cut.depth or (deepest < cut.depth and not isinstance(shape, Beam))
            assert len(proposal.tokens_N) <= cut.nodes <= cut.drafted or cut.depth == 0


def test_what_a_slot_of_dyspec_is_worth_has_no_trace_of_its_own_token():
    """Not in the last bit either: where values tie, it would decide who stays."""
    logits_AV = torch.tensor([[0.35, 0.35, 0.2, 0.1]], dtype=torch.float64).log()
    worth = {}
    for seed in range(300):
        growing = DySpec(nodes=8, depth=1, siblings=4).grow("distinct", Warp(1.0), host(seed))
        columns = growing.next(logits_AV).columns_C.tolist()
        for n, value in enumerate(torch.cat(growing.slots).tolist()):
            worth.setdefault(tuple(columns[:n]), set()).add(value)  # by what was drawn before
    assert len(worth) > 20
    assert {len(values) for values in worth.values()} == {1}
