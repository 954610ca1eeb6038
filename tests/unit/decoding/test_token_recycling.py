"""Token recycling against a dictionary and a breadth-first search in plain Python."""

import random

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding.drafters.token_recycling import TokenRecycling, TokenRecyclingConfig
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import by_widths, chain, from_paths
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import State

VOCABULARY = 12
BUSHY = from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 1, 0], [0, 1, 2], [2, 0, 1]])
SHAPES = {"chain": chain(4), "full": by_widths([3, 2, 1]), "bushy": BUSHY}


def read_of(rng, count):
    tokens = [rng.randrange(VOCABULARY) for _ in range(count)]
    g = torch.Generator().manual_seed(rng.randrange(10**6))
    return torch.tensor(tokens), torch.randn(count, VOCABULARY, generator=g)


def state_of(read, root, shape, **more):
    return State([0, root], root, Capture(), shape, read=read, **more)


def slow(known, drafted, shape):
    """(tokens, how many are fillers), node by node; a level of which nothing is known ends the tree. Fillers may be any
    ids, so they are those of `drafted`."""
    tokens, filled = drafted[:1], 0
    parents, ranks, depths = (t.tolist() for t in (shape.parents_N, shape.ranks_N, shape.depths_N))
    for depth in range(1, shape.depth + 1):
        level = [n for n, d in enumerate(depths) if d == depth]
        if not any(tokens[parents[n]] in known for n in level):
            break
        for n in level:
            above = tokens[parents[n]]
            tokens.append(known[above][ranks[n]] if above in known else drafted[n])
            filled += above not in known
    return tokens, filled


@pytest.mark.parametrize("name", SHAPES)
def test_the_tree_is_the_matrix_followed_from_the_root(name):
    rng, shape, whole, fillers = random.Random(0), SHAPES[name], 0, 0
    for _ in range(100):
        drafter, known = TokenRecycling(TokenRecyclingConfig(candidates=4)), {}
        for _ in range(4):
            tokens_N, logits_NV = read_of(rng, rng.randrange(1, 7))
            for token, row in zip(tokens_N.tolist(), logits_NV.tolist(), strict=True):
                known[token] = sorted(range(VOCABULARY), key=lambda t: -row[t])
            root = rng.randrange(VOCABULARY)
            proposal = drafter.propose(None, state_of((tokens_N, logits_NV), root, shape))
            got = proposal.tokens_N.tolist()
            want, filled = slow(known, got, shape)
            assert got == want
            assert all(0 <= token < VOCABULARY for token in got)
            assert got[0] == root
            assert proposal.parents_N.tolist() == shape.parents_N[: len(want)].tolist()
            whole += len(want) == shape.nodes
            fillers += filled
    assert whole > 50
    assert (fillers > 10) == (name != "chain")


def test_the_last_of_equal_tokens_counts():
    drafter = TokenRecycling(TokenRecyclingConfig(candidates=1))
    says = torch.eye(VOCABULARY)[[3, 9, 5, 7]]
    read = torch.tensor([1, 2, 1, 2]), says
    assert drafter.propose(None, state_of(read, 1, chain(1))).tokens_N.tolist() == [1, 5]
    assert drafter.propose(None, state_of((torch.tensor([1]), says[:1]), 2, chain(1))).tokens_N.tolist() == [2, 7]
    assert drafter.propose(None, state_of((torch.tensor([1]), says[:1]), 1, chain(1))).tokens_N.tolist() == [1, 3]


def test_a_token_never_read_ends_the_draft():
    drafter = TokenRecycling(TokenRecyclingConfig())
    read = torch.tensor([1, 4]), torch.eye(VOCABULARY)[[4, 6]]
    for root, drafted in [(5, [5]), (4, [4, 6]), (1, [1, 4, 6])]:
        assert drafter.propose(None, state_of(read, root, chain(6))).tokens_N.tolist() == drafted


@pytest.mark.parametrize(
    ("shape", "draws"),
    [
        (SHAPES["full"], "iid"),
        (SHAPES["full"], "distinct"),
        (ByProbability(8, 3, 4), None),
        (DySpec(8, 3, 4), "distinct"),
        (DySpec(8, 3, 4), "best"),
        (Beam(3, 3), "distinct"),
        (Beam(3, 3), None),
    ],
)
def test_every_kind_of_tree_and_of_drawing(shape, draws):
    rng, g, most = random.Random(1), torch.Generator().manual_seed(0), 0
    for _ in range(60):
        drafter = TokenRecycling(TokenRecyclingConfig(candidates=4))
        read, root = read_of(rng, 6), rng.randrange(VOCABULARY)
        warp = Warp(0.8) if draws else Warp()
        proposal = drafter.propose(None, state_of(read, root, shape, draws=draws, warp=warp, generator=g))
        ids = proposal.tokens_N
        assert int(ids[0]) == root
        assert int(ids.min()) >= 0
        assert int(ids.max()) < VOCABULARY
        assert len(ids) <= shape.nodes
        most = max(most, len(ids))
        assert (proposal.drawn_NV is not None) == (draws in ("iid", "distinct") and len(ids) > 1)
        if proposal.drawn_NV is not None:
            assert bool(torch.isfinite(proposal.drawn_NV).all())
            own_N = proposal.drawn_NV[1:].gather(1, ids[1:, None])[:, 0]
            sums_N = proposal.drawn_NV[1:].sum(-1)
            assert bool(((own_N > 0) & ((sums_N - 1).abs() < 1e-9) | (sums_N == 0)).all())
    assert most > 5


def test_a_small_vocabulary_has_fewer_candidates_and_no_rank_is_made_up():
    drafter = TokenRecycling(TokenRecyclingConfig(candidates=8))
    read = torch.tensor([1]), torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    assert len(drafter.propose(None, state_of(read, 1, by_widths([3]))).tokens_N) == 4
    with pytest.raises(ConfigError, match="3 candidates"):
        drafter.propose(None, state_of(read, 1, by_widths([4])))


@pytest.mark.parametrize("shape", [chain(5), by_widths([3, 2, 2])], ids=["chain", "tree"])
def test_lossless_in_the_engine_and_refused_drafts_are_remembered(toy_base, shape):
    base, prompt = toy_base(), [1, 2, 3, 0]
    drafter = TokenRecycling(TokenRecyclingConfig())
    reads, update = [], drafter.update
    drafter.update = lambda tokens_N, logits_NV: (reads.append(tokens_N.tolist()), update(tokens_N, logits_NV))
    proposals = []
    out = generate(
        base, prompt, drafter=drafter, shape=shape, max_new_tokens=40, watch=lambda p, v: proposals.append(p)
    )
    assert out.tokens == base.continuation(prompt, 40)
    assert reads == [prompt, *(p.tokens_N.tolist() for p in proposals[:-1])]
    assert sum(map(len, reads)) > len(prompt) + 40  # so some of them were refused


def test_faster_on_a_base_that_looks_at_its_last_token_only(toy_base):
    base, prompt = toy_base(), [1, 2, 3, 0]
    one = torch.randint(-9, 10, (7, 12), generator=torch.Generator().manual_seed(1)).double()
    base.table = torch.zeros_like(base.table)
    here = torch.arange(64)
    base.table[:, here, here] = one[:, None]
    out = generate(base, prompt, drafter=TokenRecycling(TokenRecyclingConfig()), max_new_tokens=50)
    assert out.tokens == base.continuation(prompt, 50)
    assert out.tokens_per_step > 4


def test_cold_as_new_and_warm_when_kept(toy_base):
    base, prompt = toy_base(), [1, 2, 3, 0]

    def first(drafter):
        told = []
        generate(base, prompt, drafter=drafter, max_new_tokens=40, watch=lambda p, v: told.append(p.tokens_N.tolist()))
        return told[0]

    kept = TokenRecycling(TokenRecyclingConfig())
    cold, warm = first(kept), first(kept)
    assert len(cold) < len(warm)
    assert first(TokenRecycling(TokenRecyclingConfig())) == cold


@pytest.mark.parametrize("drafts", ["best", "iid", "distinct"])
def test_rows_of_a_batch_and_a_temperature(tiny_base, drafts):
    base, prompts = tiny_base(), [[7], [3, 1, 4, 1, 5, 9], [11, 12, 13, 11, 12]]
    rules = Rules(Warp(0.7), drafts)
    drafters = [TokenRecycling(TokenRecyclingConfig()) for _ in prompts]
    told = {"shape": by_widths([2, 2]), "max_new_tokens": 20, "rules": rules}
    out = decode(base, prompts, drafters=drafters, seeds=[1, 2, 3], **told)
    assert [len(g.tokens) for g in out] == [20] * 3
    if drafts == "best":  # then the text is that of no drafter at all
        plain = decode(base, prompts, max_new_tokens=20, rules=rules, seeds=[1, 2, 3])
        assert [g.tokens for g in out] == [g.tokens for g in plain]


@pytest.mark.parametrize("field", ["depth", "candidates"])
def test_a_bad_config_names_its_field(field):
    with pytest.raises(ConfigError, match=f"token_recycling.{field}"):
        TokenRecyclingConfig(**{field: 0})
