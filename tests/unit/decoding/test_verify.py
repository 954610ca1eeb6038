import math
import random
from itertools import product

import pytest
import torch

from draftsmith.decoding import tree, verify
from draftsmith.errors import ConfigError
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


# A drawn chain: q_2[a] and p_2[a] are the distributions after the first token a

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


def emitted(p1, p2, q1, q2, generator, judge=verify.recursive):
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
        verdict = verify.recursive(proposal, torch.stack([P1, P2[a]]), generator)
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
        verdict = verify.recursive(proposal, chances_NV, generator)
        return Verdict(verdict.path_A, pick(chances_NV[verdict.accepted], generator))

    for judge in (gullible, simple):
        generator, count_V = torch.Generator().manual_seed(1), torch.zeros(V)
        for _ in range(COUNT):
            count_V[emitted(P1, P2, Q1, Q2, generator, judge)[0][0]] += 1
        assert chance_of(count_V, P1) < 1e-6


# Trees, exactly: all draws and all coins, in plain python. A draw is a list of (token, the row it was drawn from).


def exact(rows):
    return torch.tensor(rows, dtype=torch.float64)


def over(p, given):
    left = [max(a - b, 0.0) for a, b in zip(p, given, strict=True)]
    return [a / sum(left) for a in left] if sum(left) > 0 else p


def shared(p, q, rho=1.0):
    return [min(a / rho, b) for a, b in zip(p, q, strict=True)]


def one_by_one(p, drawn):
    """Recursive rejection: for each child the chance of accepting it when it is tried, and what is left for the bonus
    if none is."""
    chances = []
    for x, q in drawn:
        chances.append(min(1.0, p[x] / q[x]) if q[x] else 0.0)
        p = over(p, q)
    return chances, p


def least_rho(p, q, k):
    """1 - (1 - beta)^k = rho beta."""
    low, high = 1.0, float(k)
    for _ in range(100):
        middle = (low + high) / 2
        beta = sum(shared(p, q, middle))
        low, high = (low, middle) if 1 - (1 - beta) ** k <= middle * beta + 1e-15 else (middle, high)
    return high


def by_one_threshold(p, drawn):
    """SpecTr's k-sequential selection."""
    if not drawn:
        return [], p
    q, k = drawn[0][1], len(drawn)
    rho = least_rho(p, q, k)
    beta = sum(shared(p, q, rho))
    given = [a * (1 - (1 - beta) ** k) / beta if beta else 0.0 for a in shared(p, q, rho)]
    return [min(1.0, p[x] / (rho * q[x])) for x, _ in drawn], over(p, given)


def all_draws(q, count, distinct):
    """(probability, draw) of every draw; without replacement the rows lack the earlier tokens, and are zeros when
    nothing is left."""
    found = [(1.0, [])]
    for _ in range(count):
        longer = []
        for chance, drawn in found:
            gone = {x for x, _ in drawn} if distinct else ()
            row = [0.0 if v in gone else c for v, c in enumerate(q)]
            row = [c / sum(row) for c in row] if sum(row) else row
            tokens = [v for v, c in enumerate(row) if c] or [0]
            longer += [(chance * (row[v] or 1.0), [*drawn, (v, row)]) for v in tokens]
        found = longer
    return found


def coins(p, drawn, rule):
    """(probability, the accepted child or None, what the bonus is drawn from), of every outcome of one node."""
    chances, left = rule(p, drawn)
    stay = 1.0
    for child, chance in enumerate(chances):
        yield stay * chance, child, None
        stay *= 1 - chance
    yield stay, None, left


RULES = {
    "recursive, iid": (verify.recursive, one_by_one, False),
    "recursive, distinct": (verify.recursive, one_by_one, True),
    "spectr, iid": (verify.spectr, by_one_threshold, False),
}
rules = pytest.mark.parametrize(("verifier", "rule", "distinct"), RULES.values(), ids=RULES)
counts = pytest.mark.parametrize("count", [1, 2, 3])


def tables(seed, vocab=4, after=False):
    """p and q, or p(. | a) and q(. | a) for every first token a. Of every four seeds one has equal p and q, one lacks
    tokens in q, one in p."""
    generator = torch.Generator().manual_seed(seed)
    size = (vocab, vocab) if after else (vocab,)
    p, q = (1.5 * torch.randn(2, *size, generator=generator, dtype=torch.float64)).softmax(-1)
    p = only(p, slice(1, None)) if seed % 4 == 1 else p
    q = only(q, slice(0, vocab - 1)) if seed % 4 == 2 else p if seed % 4 == 3 else q
    return p.tolist(), q.tolist()


@rules
@counts
@pytest.mark.parametrize("seed", range(8))
def test_the_rules_themselves_emit_p(rule, distinct, count, seed, verifier):
    """Of the first token, to 1e-12."""
    p, q = tables(seed)
    emitted = [0.0] * 4
    for chance, drawn in all_draws(q, count, distinct):
        for coin, child, left in coins(p, drawn, rule):
            for v in range(4):
                emitted[v] += chance * coin * (left[v] if child is None else float(v == drawn[child][0]))
    assert emitted == pytest.approx(p, abs=1e-12)


@counts
@pytest.mark.parametrize("seed", range(8))
def test_as_much_is_accepted_as_the_papers_say(seed, count):
    """§11.19 for one child: sum min(p, q); for SpecTr's k children 1 - (1 - beta)^k, at least that of one."""
    p, q = tables(seed)

    def accepted(rule):
        return sum(
            chance * sum(coin for coin, child, _ in coins(p, drawn, rule) if child is not None)
            for chance, drawn in all_draws(q, count, False)
        )

    rho = least_rho(p, q, count)
    beta = sum(shared(p, q, rho))
    assert accepted(by_one_threshold) == pytest.approx(1 - (1 - beta) ** count, abs=1e-12)
    if count == 1:
        assert accepted(one_by_one) == pytest.approx(sum(shared(p, q)), abs=1e-12)
        assert accepted(by_one_threshold) == pytest.approx(sum(shared(p, q)), abs=1e-12)


@pytest.fixture
def scripted_coins(monkeypatch):
    """(verdict, what the bonus is drawn from) of a verifier whose numbers are given, one per node."""

    def ask(verifier, proposal, chances_NV, numbers):
        left = []

        def drawing(left_NV, uniform_N):
            assert uniform_N.tolist() == [numbers[0]]
            left.append((left_NV[0] / left_NV.sum()).tolist())
            return left_NV.argmax(-1)

        monkeypatch.setattr(verify, "uniforms", lambda size, like, generator: exact(numbers))
        monkeypatch.setattr(verify, "draw", drawing)
        verdict = verifier(proposal, chances_NV, None)
        assert len(left) == 1
        return verdict.path_A.tolist(), left[0]

    return ask


WIDE = 3


def proposal_of(children, distinct, p1, q1, p2, q2):
    """Every (probability, tokens, rows, parents, children of each node) of a tree whose root has len(children)
    children, the i-th of them children[i] of its own."""
    parents = [-1, *[0] * len(children), *[1 + i for i, own in enumerate(children) for _ in range(own)]]
    below = [[n for n, parent in enumerate(parents) if parent == node] for node in range(len(parents))]
    for chance, first in all_draws(q1, len(children), distinct):
        each = [all_draws(q2[x], own, distinct) for (x, _), own in zip(first, children, strict=True)]
        for second in product(*each):
            drawn = [*first, *(one for _, own in second for one in own)]
            yield (
                math.prod([chance, *(c for c, _ in second)]),
                [0, *(x for x, _ in drawn)],
                [r for _, r in drawn],
                below,
            )


SHAPES = {"chain 1": [0], "two": [0, 0], "three": [0, 0, 0], "chain 2": [1], "two levels": [2, 1]}


@rules
@pytest.mark.parametrize("children", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_verifier_follows_the_rule_and_emits_p(verifier, rule, distinct, children, seed, scripted_coins):
    """At every node the coin falls at the rule's own chance, from both sides to 1e-9, and the bonus is drawn from the
    rule's own rest, to 1e-12; so that the first two tokens are distributed as p(a) p(b | a), summed over all draws."""
    (p1, q1), (p2, q2) = tables(seed, WIDE), tables(seed + 4, WIDE, after=True)
    emitted = [[0.0] * WIDE for _ in range(WIDE)]
    for chance, tokens, rows, below in proposal_of(children, distinct, p1, q1, p2, q2):
        parents = [-1] * len(tokens)
        for node, mine in enumerate(below):
            for child in mine:
                parents[child] = node
        p_of = [p1, *(p2[x] if parent == 0 else p1 for x, parent in zip(tokens[1:], parents[1:], strict=True))]
        drawn_NV = exact([[0.0] * WIDE, *rows])
        proposal = Proposal(torch.tensor(tokens), torch.tensor(parents), drawn_NV=drawn_NV)
        for coin, path, numbers, left in walks(0, below, tokens, [None, *rows], p_of, rule):
            told = [0.5] * len(tokens)
            for node, number in numbers.items():
                told[node] = number
            got = scripted_coins(verifier, proposal, exact(p_of), told)
            assert got[0] == [0, *path]
            assert got[1] == pytest.approx(left, abs=1e-12)
            text = [tokens[node] for node in path]
            for a, b in product(range(WIDE), repeat=2):
                rest = [*text, *[None] * 2][:2]
                at = [left[a] if rest[0] is None else float(rest[0] == a)]
                after = p2[a] if rest[0] is None else left
                at.append(after[b] if rest[1] is None else float(rest[1] == b))
                emitted[a][b] += chance * coin * math.prod(at)
    for a in range(WIDE):
        assert emitted[a] == pytest.approx([p1[a] * c for c in p2[a]], abs=1e-12)


def walks(node, below, tokens, rows, p_of, rule):
    """(probability, accepted nodes, numbers just on the right side of every coin, the rest) of every way down."""
    drawn = [(tokens[child], rows[child]) for child in below[node]]
    chances, left = rule(p_of[node], drawn)
    stay, numbers = 1.0, {}
    for child, chance in zip(below[node], chances, strict=True):
        if chance > 1e-9:
            for coin, path, more, rest in walks(child, below, tokens, rows, p_of, rule):
                yield stay * chance * coin, [child, *path], {**numbers, child: chance - 1e-9, **more}, rest
        if chance > 1 - 1e-9:
            return
        stay *= 1 - chance
        numbers = {**numbers, child: chance + 1e-9}
    yield stay, [], numbers, left


@pytest.mark.parametrize("seed", range(40))
def test_the_selections_rho_is_the_least_that_gives_no_token_too_much(seed):
    rng = random.Random(seed)
    p, q = tables(seed, rng.choice([2, 5, 9]))
    for count in (1, 2, 3, 10):
        rho, factor = verify.selection(exact(p), exact(q), count)
        beta = sum(shared(p, q, rho))
        assert 1 <= rho <= count
        assert 1 - (1 - beta) ** count <= rho * beta + 1e-14
        least = least_rho(p, q, count)
        assert rho * beta == pytest.approx(least * sum(shared(p, q, least)), abs=1e-13)  # what it accepts
        assert factor == pytest.approx(sum((1 - beta) ** i for i in range(count)), abs=1e-11) or count == 1


def test_a_selection_where_p_and_q_share_nothing_and_where_they_are_one():
    p, q = exact([[1.0, 0, 0], [0, 0.25, 0.75]])
    assert verify.selection(p, q, 3) == (3.0, 3.0)
    rho, factor = verify.selection(q, q, 3)
    assert (rho, factor) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))  # rounded, it is 1 up to there


def test_spectr_refuses_siblings_of_different_distributions():
    rows = exact([[0.0, 0, 0], [0.5, 0.25, 0.25], [0, 0.5, 0.5]])
    proposal = Proposal(torch.tensor([0, 0, 1]), torch.tensor([-1, 0, 0]), drawn_NV=rows)
    with pytest.raises(ConfigError, match=r"accept=spectr: .* drafts=iid"):
        verify.spectr(proposal, torch.full((3, 3), 1 / 3).double(), None)


def test_what_there_was_nothing_to_draw_for_is_passed_over(scripted_coins):
    rows = exact([[0.0, 0], [1, 0], [0, 0]])
    proposal = Proposal(torch.tensor([0, 0, 1]), torch.tensor([-1, 0, 0]), drawn_NV=rows)
    p_NV = exact([[0.25, 0.75]] * 3)
    path, left = scripted_coins(verify.recursive, proposal, p_NV, [0.5, 0.26, 0.0])
    assert (path, left) == ([0], [0.0, 1.0])


def test_drafts_of_fewer_tokens_than_the_base_has_and_a_root_beyond_them():
    generator = torch.Generator().manual_seed(0)
    rows = exact([[0.0, 0], [0.5, 0.5], [0.5, 0.5]])
    p_NV = exact([[0.0, 0.0, 0.0, 0.0, 1.0]] * 3)
    proposal = Proposal(torch.tensor([4, 0, 1]), torch.tensor([-1, 0, 0]), drawn_NV=rows)
    for verifier in (verify.recursive, verify.spectr):
        verdict = verifier(proposal, p_NV, generator)
        assert (verdict.path_A.tolist(), verdict.bonus) == ([0], 4)


def test_equal_distributions_accept_the_first_child_always():
    generator = torch.Generator().manual_seed(0)
    for verifier in (verify.recursive, verify.spectr):
        for a, b in product(range(4), repeat=2):
            rows = exact([[0.0] * 4, *[[0.1, 0.2, 0.3, 0.4]] * 2])
            proposal = Proposal(torch.tensor([0, a, b]), torch.tensor([-1, 0, 0]), drawn_NV=rows)
            assert verifier(proposal, rows[[1, 1, 1]], generator).path_A.tolist() == [0, 1]


@pytest.mark.parametrize("verifier", [verify.recursive, verify.spectr])
def test_a_seed_gives_one_verdict_and_takes_one_number_per_node(verifier):
    rows = torch.full((4, V), 1 / V).double()
    proposal = Proposal(torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 0, 0, 1]), drawn_NV=rows)
    generator, told = torch.Generator(), []
    for _ in range(2):
        generator.manual_seed(5)
        told.append(verifier(proposal, torch.stack([P1, Q1, P1, Q1]), generator))
        rest = torch.rand((), generator=generator, dtype=torch.float64)
    assert told[0].path_A.tolist() == told[1].path_A.tolist()
    assert told[0].bonus == told[1].bonus
    assert torch.rand(5, generator=generator.manual_seed(5), dtype=torch.float64)[4] == rest


def test_what_was_not_drawn_has_no_distribution_to_be_verified_by():
    with pytest.raises(AssertionError, match="drawn"):
        verify.recursive(Proposal(torch.tensor([0, 1]), torch.tensor([-1, 0])), torch.ones(2, 2).double() / 2, None)


# Typical acceptance


def slow_typical(tokens, parents, p, epsilon, delta):
    """Every root path whose tokens all pass; the longest, of those the likeliest."""
    best = (0, 0.0, [0])
    for node in range(1, len(tokens)):
        path = [node]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        logs = []
        for n in path[1:]:
            row = p[parents[n]]
            entropy = -sum(c * math.log(c) for c in row if c)
            if row[tokens[n]] > min(epsilon, delta * math.exp(-entropy)):
                logs.append(math.log(row[tokens[n]]))
        if len(logs) == len(path) - 1 and (len(logs), sum(logs)) > best[:2]:
            best = (len(logs), sum(logs), path)
    return best[2]


def test_typical_equals_the_slow_oracle_on_random_trees():
    rng, lengths, generator = random.Random(0), set(), torch.Generator().manual_seed(0)
    for _ in range(300):
        count, vocab = rng.randrange(1, 16), rng.choice([2, 3, 5])
        parents = [-1] + [rng.randrange(node) for node in range(1, count)]
        tokens = [rng.randrange(vocab) for _ in range(count)]
        p = (2 * torch.randn(count, vocab, generator=generator, dtype=torch.float64)).softmax(-1)
        told = {"epsilon": rng.choice([0.09, 0.3, 0.6]), "delta": rng.choice([0.3, 0.9])}
        verdict = verify.typical(Proposal(torch.tensor(tokens), torch.tensor(parents)), p, generator, **told)
        assert verdict.path_A.tolist() == slow_typical(tokens, parents, p.tolist(), *told.values())
        lengths.add(verdict.accepted)
    assert lengths >= {0, 1, 2, 3, 4}


def lone(token, row):
    """Whether typical acceptance, as Medusa sets it, keeps this one draft."""
    proposal = Proposal(torch.tensor([0, token]), torch.tensor([-1, 0]))
    return bool(verify.typical(proposal, exact([row] * 2), None).accepted)


def test_check_28_typical_acceptance_of_the_uniform_and_of_the_certain():
    """§11.28: 1 / V > 0.3 / V always; a one-hot p has the threshold min(0.09, 0.3)."""
    for vocab in (2, 3, 10, 1000):
        assert lone(vocab - 1, [1 / vocab] * vocab)
    assert lone(0, [1.0, 0.0])
    assert not lone(1, [1.0, 0.0])
    assert lone(1, [0.909, 0.091])
    assert not lone(1, [0.911, 0.089])


def test_typical_draws_the_bonus_after_the_last_accepted_token(chance_of):
    generator, counts_V = torch.Generator().manual_seed(0), torch.zeros(V)
    proposal = Proposal(torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 0]))
    chances_NV = torch.stack([only(P1, 2), P2[0], P2[1]])
    for _ in range(COUNT):
        verdict = verify.typical(proposal, chances_NV, generator)
        assert verdict.path_A.tolist() == [0, 2]
        counts_V[verdict.bonus] += 1
    assert chance_of(counts_V, P2[1]) > 1e-3
