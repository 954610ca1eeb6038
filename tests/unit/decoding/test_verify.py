import math
import random

import pytest
import torch

from draftsmith.decoding import tree, verify
from draftsmith.roles import Proposal, Verdict


def slow(tokens, parents, best):
    """Walk every root path; keep the longest valid one, the first of several."""
    kept = [0]
    for node in range(len(tokens)):
        path = [node]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        good = all(tokens[n] == best[parents[n]] for n in path[1:])
        if good and len(path) > len(kept):
            kept = path
    return kept, best[kept[-1]]


def check(tokens, parents, best):
    verdict = verify.greedy(Proposal(torch.tensor(tokens), torch.tensor(parents)), torch.tensor(best))
    assert (verdict.path_A.tolist(), verdict.bonus) == slow(tokens, parents, best)
    assert verdict.accepted == len(verdict.path_A) - 1
    return verdict


def test_greedy_equals_the_slow_oracle_on_random_trees():
    rng, lengths = random.Random(0), set()
    for _ in range(600):
        count, vocab = rng.randrange(1, 20), rng.choice([1, 2, 3, 5])  # few tokens: doubles among siblings
        parents = [-1] + [rng.randrange(node) for node in range(1, count)]
        best = [rng.randrange(vocab) for _ in range(count)]
        lengths.add(check([rng.randrange(vocab) for _ in range(count)], parents, best).accepted)
    assert lengths >= {0, 1, 2, 3, 4}


def test_greedy_equals_the_slow_oracle_on_random_chains():
    rng = random.Random(1)
    for _ in range(200):
        parents = tree.chain(rng.randrange(8)).parents_N.tolist()
        check([rng.randrange(2) for _ in parents], parents, [rng.randrange(2) for _ in parents])


def test_root_alone_keeps_itself_and_the_bonus():
    assert check([3], [-1], [5]).bonus == 5


def test_of_two_equal_siblings_the_longer_then_the_first_is_kept():
    assert check([9, 4, 4], [-1, 0, 0], [4, 0, 0]).path_A.tolist() == [0, 1]
    assert check([9, 4, 4, 7], [-1, 0, 0, 2], [4, 0, 7, 1]).path_A.tolist() == [0, 2, 3]


def test_a_right_token_below_a_wrong_one_is_not_kept():
    assert check([9, 1, 2], [-1, 0, 1], [5, 2, 2]).accepted == 0


# Drawn tokens: q_2[a] and p_2[a] are the distributions after the first token a

G = torch.Generator().manual_seed(0)
V = 8


def soft(*shape, sharpness=1.5):
    return (sharpness * torch.randn(*shape, generator=G, dtype=torch.float64)).softmax(-1)


def only(row, where):
    """The distribution with nothing outside `where`."""
    kept = torch.zeros_like(row)
    kept[..., where] = row[..., where]
    return kept / kept.sum(-1, keepdim=True)


P1, P2, Q1, Q2 = soft(V), soft(V, V), soft(V), soft(V, V)
LOW, HIGH = slice(0, 4), slice(4, 8)
PAIRS = {
    "any": (P1, P2, Q1, Q2),
    "equal": (P1, P2, P1, P2),
    "disjoint": (only(P1, LOW), only(P2, HIGH), only(Q1, HIGH), only(Q2, LOW)),
    "overlapping": (only(P1, slice(0, 5)), only(P2, slice(2, 8)), only(Q1, slice(3, 8)), only(Q2, LOW)),
    "smaller vocabulary": (P1, P2, soft(5), soft(V, 5)),
}
COUNT = 3000


def pick(row, generator):
    return int(torch.multinomial(row, 1, generator=generator))


def emitted(p1, p2, q1, q2, generator, judge=verify.drawn):
    """(the first two tokens of the text, how many drafts of a chain of two were kept)"""
    a = pick(q1, generator)
    b = pick(q2[a], generator)
    proposal = Proposal(
        torch.tensor([0, a, b]), torch.tensor([-1, 0, 1]), drawn_NV=torch.stack([torch.zeros_like(q1), q1, q2[a]])
    )
    verdict = judge(proposal, torch.stack([p1, p2[a], torch.full((V,), 1 / V).double()]), generator)
    assert verdict.path_A.tolist() == list(range(verdict.accepted + 1))
    text = [*[a, b][: verdict.accepted], verdict.bonus]
    if len(text) < 2:  # the next step, of the root alone
        root = Proposal(torch.tensor([text[0]]), torch.tensor([-1]), drawn_NV=torch.zeros(1, len(q1)).double())
        text.append(judge(root, p2[text[0]][None], generator).bonus)
    return text[:2], verdict.accepted


@pytest.fixture(scope="module", params=PAIRS.values(), ids=list(PAIRS))
def run(request):
    generator = torch.Generator().manual_seed(1)
    pair_VV, kept = torch.zeros(V, V), []
    for _ in range(COUNT):
        (a, b), accepted = emitted(*request.param, generator)
        pair_VV[a, b] += 1
        kept.append(accepted)
    return request.param, pair_VV, kept


def test_check_29_what_is_emitted_is_distributed_as_p(run, chance_of):
    """§11.29: the first token, and the first two together."""
    (p1, p2, _, _), pair_VV, _ = run
    assert chance_of(pair_VV.sum(1), p1) > 1e-3
    assert chance_of(pair_VV, p1[:, None] * p2) > 1e-3


def test_check_19_as_much_is_accepted_as_p_and_q_share(run):
    """§11.19: E[min(1, p / q)] = sum min(p, q), and along the chain the product of what is kept."""
    (p1, p2, q1, q2), _, kept = run
    q1, q2 = (torch.nn.functional.pad(q, (0, V - q.shape[-1])) for q in (q1, q2))
    first_V = torch.minimum(p1, q1)
    both = float(first_V @ torch.minimum(p2, q2).sum(1))
    for depth, expected in ((1, float(first_V.sum())), (2, both)):
        share = sum(k >= depth for k in kept) / COUNT
        assert abs(share - expected) <= 4 * math.sqrt(max(expected * (1 - expected), 0) / COUNT) + 1e-9


def test_nothing_is_emitted_that_p_does_not_have(run):
    (p1, p2, _, _), pair_VV, _ = run
    assert float(pair_VV[(p1[:, None] * p2) == 0].sum()) == 0


def test_check_29_after_the_last_draft_comes_the_bases_own_token(chance_of):
    """§11.29: a chain of one; where it is kept, the bonus is drawn from what follows it."""
    generator, pair_VV, kept = torch.Generator().manual_seed(2), torch.zeros(V, V), 0
    for _ in range(COUNT):
        a = pick(P1, generator)
        drawn_NV = torch.stack([torch.zeros_like(P1), P1])
        proposal = Proposal(torch.tensor([0, a]), torch.tensor([-1, 0]), drawn_NV=drawn_NV)
        verdict = verify.drawn(proposal, torch.stack([P1, P2[a]]), generator)
        kept += verdict.accepted
        pair_VV[a, verdict.bonus] += 1
    assert kept == COUNT
    assert chance_of(pair_VV, P1[:, None] * P2) > 1e-3


def test_a_verifier_that_keeps_too_much_or_draws_too_simply_is_found_out(chance_of):
    """The tests above could not fail otherwise."""

    def gullible(proposal, chances_NV, generator):
        kept = len(proposal.tokens_N) - 1
        return Verdict(torch.arange(kept + 1), pick(chances_NV[kept], generator))

    def simple(proposal, chances_NV, generator):  # draws the bonus from p itself after a refusal
        verdict = verify.drawn(proposal, chances_NV, generator)
        return Verdict(verdict.path_A, pick(chances_NV[verdict.accepted], generator))

    for judge in (gullible, simple):
        generator, count_V = torch.Generator().manual_seed(1), torch.zeros(V)
        for _ in range(COUNT):
            count_V[emitted(P1, P2, Q1, Q2, generator, judge)[0][0]] += 1
        assert chance_of(count_V, P1) < 1e-6


def test_drawn_tokens_are_a_chain_and_a_seed_gives_one_verdict():
    drawn_NV = torch.full((3, V), 1 / V).double()
    branches = Proposal(torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0]), drawn_NV=drawn_NV)
    with pytest.raises(AssertionError, match="chain"):
        verify.drawn(branches, drawn_NV, None)
    chain = Proposal(torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1]), drawn_NV=drawn_NV)
    told = [verify.drawn(chain, torch.stack([P1, Q1, P1]), torch.Generator().manual_seed(s)) for s in (5, 5)]
    assert told[0].path_A.tolist() == told[1].path_A.tolist()
    assert told[0].bonus == told[1].bonus
