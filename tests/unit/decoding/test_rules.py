"""How a text's tokens come about: the rules themselves, and that the engine's texts are distributed as the base's."""

import itertools
import random

import pytest
import torch

from draftsmith.decoding import tree, verify
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.decoding.rules import Chance, Rules
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import Proposal

PROMPT = [1, 3, 2, 2, 3, 0]
T = 12.0  # the toy's logits are far apart
CPU = torch.device("cpu")
SHAPES = {"root": tree.chain(0), "chain": tree.chain(4), "full": tree.by_widths([3, 2, 2])}
BUSHY = tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])


class Whim:
    """Stops at random, or by what the newest draft happens to be: what a gate that knows the drawn tokens may do."""

    def __init__(self, looks, seed=0):
        self.rng, self.looks, self.said = random.Random(seed), looks, set()

    def stop(self, state, partial):
        stops = int(partial.tokens[-1][0]) % 2 == 0 if self.looks else self.rng.random() < 0.4
        self.said.add(stops)
        return stops


# The rules


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"drafts": "some"}, "drafts='some': choose best, iid, distinct"),
        ({"accept": "all"}, "accept='all': choose exact, spectr, typical"),
        ({"accept": "spectr", "drafts": "distinct"}, "accept=spectr: .*give drafts=iid"),
        ({"accept": "spectr"}, "accept=spectr: .*give drafts=iid"),
        ({"accept": "typical"}, "accept=typical: .*temperature above 0"),
        ({"drafts": "iid"}, "drafts=iid: .*temperature above 0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"delta": 1.5}, "delta=1.5"),
    ],
)
def test_rules_that_do_not_fit_are_refused(told, says):
    with pytest.raises(ConfigError, match=says):
        Rules(**told)


def test_only_typical_acceptance_is_lossy_and_only_no_temperature_is_greedy():
    warm = Warp(0.5)
    assert [Rules(warm, "iid", a).lossy for a in ("exact", "spectr", "typical")] == [False, False, True]
    assert [Rules(Warp(t)).greedy for t in (0.0, 0.5)] == [True, False]


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_temperature_that_cannot_be_is_refused(toy_base, temperature):
    with pytest.raises(ConfigError, match="temperature="):
        generate(toy_base(), PROMPT, max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("warp", [Warp(0.7), Warp(1.3, top_k=3), Warp(2.0, top_p=0.6)], ids=["all", "top_k", "top_p"])
def test_a_positions_token_is_where_the_cumulative_distribution_passes_its_number(warp):
    g, chance = torch.Generator().manual_seed(0), Chance(Rules(warp), 5, 40, CPU)
    numbers = torch.rand(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64).tolist()
    for _ in range(100):
        logits_NV = 2 * torch.randn(3, 9, generator=g)
        positions = torch.randint(40, (3,), generator=g).tolist()
        expected = []
        for logits, position in zip(warp.chances(logits_NV).tolist(), positions, strict=True):
            passed = [v for v in range(9) if sum(logits[: v + 1]) > numbers[position]]
            expected.append(passed[0])
        assert chance.choose(logits_NV, positions).tolist() == expected


def test_greedy_takes_the_first_of_equal_logits():
    logits_NV = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert Chance(Rules(), 0, 4, CPU).choose(logits_NV, [0, 1]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rules", "judge"),
    [
        (Rules(Warp(0.8), "iid"), verify.recursive),
        (Rules(Warp(0.8), "distinct"), verify.recursive),
        (Rules(Warp(0.8), "iid", "spectr"), verify.spectr),
        (Rules(Warp(0.8), "iid", "typical"), verify.typical),
    ],
    ids=["iid", "distinct", "spectr", "typical"],
)
def test_a_drawn_proposal_is_judged_by_its_rule_with_the_texts_own_generator(rules, judge):
    g = torch.Generator().manual_seed(0)
    for seed in range(20):
        drawn_NV = torch.rand(1, 5, generator=g, dtype=torch.float64).softmax(-1).expand(4, -1)
        proposal = Proposal(torch.randint(5, (4,), generator=g), torch.tensor([-1, 0, 0, 1]), drawn_NV=drawn_NV)
        logits_NV = torch.randn(4, 5, generator=g)
        chance, own = Chance(rules, seed, 9, CPU), torch.Generator().manual_seed(seed)
        torch.rand(9, generator=own, dtype=torch.float64)  # the positions' numbers come first
        verdict, expected = (
            chance.verdict(proposal, logits_NV, [3, 4, 4, 5]),
            judge(proposal, rules.warp.chances(logits_NV), own),
        )
        assert (verdict.path_A.tolist(), verdict.bonus) == (expected.path_A.tolist(), expected.bonus)


def test_a_chosen_proposal_is_compared_with_the_positions_tokens():
    rules, g = Rules(Warp(0.8)), torch.Generator().manual_seed(0)
    for seed in range(20):
        proposal = Proposal(torch.randint(3, (4,), generator=g), torch.tensor([-1, 0, 0, 1]))
        logits_NV, chance = torch.randn(4, 3, generator=g), Chance(rules, seed, 9, CPU)
        verdict = chance.verdict(proposal, logits_NV, [3, 4, 4, 5])
        expected = verify.greedy(proposal, chance.choose(logits_NV, [3, 4, 4, 5]))
        assert (verdict.path_A.tolist(), verdict.bonus) == (expected.path_A.tolist(), expected.bonus)


# Texts


def counted(base, prompt, size, count, rows=50, **how):
    """Over `count` seeds, how often each text of `size` tokens came; and what was accepted."""
    vocab = base.spec.vocab_size
    counts, accepted = torch.zeros([vocab] * size), 0
    for first in range(0, count, rows):
        seeds = list(range(first, min(first + rows, count)))
        for out in decode(base, [prompt] * len(seeds), seeds=seeds, max_new_tokens=size, **how):
            counts[tuple(out.tokens)] += 1
            accepted += out.stats.accepted
    return counts, accepted


def joint(base, prompt, warp):
    """Exactly p(a) p(b | a) p(c | ab), and what it would be if c did not know b."""
    vocab = base.spec.vocab_size
    p_VVV = torch.zeros(vocab, vocab, vocab, dtype=torch.float64)
    apart_VVV = torch.zeros_like(p_VVV)
    for a, b in itertools.product(range(vocab), repeat=2):
        p_V, p_of_a_V, p_of_ab_V = (warp.chances(base.logits([*prompt, *more])[None])[0] for more in ([], [a], [a, b]))
        p_VVV[a, b], apart_VVV[a, b] = p_V[a] * p_of_a_V[b] * p_of_ab_V, p_V[a] * p_of_a_V[b] * p_of_a_V
    assert float(p_VVV.sum()) == pytest.approx(1)
    return p_VVV, apart_VVV


def test_check_29_sampled_tokens_follow_the_bases_distribution(toy_base, chance_of):
    """§11.29: the first token over seeds."""
    base = toy_base()
    p_V, (counts_V, _) = (base.logits(PROMPT) / T).softmax(-1), counted(base, PROMPT, 1, 2000, rules=Rules(Warp(T)))
    assert chance_of(counts_V, p_V) > 1e-3
    assert chance_of(counts_V, (base.logits(PROMPT) / (1.5 * T)).softmax(-1)) < 1e-6  # it can tell


@pytest.mark.parametrize("gate", ["alone", None, "whim", "look"])
def test_check_29_drawn_drafts_leave_the_joint_distribution_as_it_is(toy_base, gate, chance_of, tabled):
    """§11.29: the prefill's token and the two after it, over seeds, exactly the base's, wherever drafting is stopped,
    and without any."""
    base, count, prompt = toy_base(vocab=3, max_positions=12), 1500, [1, 2, 0, 2]
    p_VVV, apart_VVV = joint(base, prompt, Warp(T))
    drafter = None if gate == "alone" else tabled(3)
    whim = Whim(gate == "look") if gate in ("whim", "look") else None
    told = {"drafters": drafter, "shape": drafter and tree.chain(3), "gates": whim, "rules": Rules(Warp(T))}
    counts_VVV, accepted = counted(base, prompt, 3, count, **told)
    assert chance_of(counts_VVV, p_VVV) > 1e-3
    assert chance_of(counts_VVV, apart_VVV) < 1e-6  # it can tell
    assert accepted > 0.2 * count or not drafter
    assert whim is None or whim.said == {True, False}


@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        (BUSHY, Rules(Warp(T), "iid")),
        (BUSHY, Rules(Warp(T), "distinct")),
        (BUSHY, Rules(Warp(T), "iid", "spectr")),
        (BUSHY, Rules(Warp(T, top_p=0.8), "distinct")),
        (DySpec(5, 3, 3), Rules(Warp(T, top_k=2), "distinct")),
        (Beam(2, 3), Rules(Warp(T), "distinct")),
    ],
    ids=["iid", "distinct", "spectr", "top_p", "dyspec_top_k", "beam"],
)
def test_check_29_drawn_trees_do_too(toy_base, shape, rules, chance_of, tabled):
    base, count, prompt = toy_base(vocab=3, max_positions=12), 1000, [1, 2, 0, 2]
    p_VVV, apart_VVV = joint(base, prompt, rules.warp)
    gate = None if isinstance(shape, DySpec) else Whim(True)
    told = {"drafters": tabled(3, scale=1.0), "shape": shape, "rules": rules, "gates": gate}
    counts_VVV, accepted = counted(base, prompt, 3, count, **told)
    assert chance_of(counts_VVV, p_VVV) > 1e-3
    assert chance_of(counts_VVV, apart_VVV) < 1e-6 or rules.warp != Warp(T)
    assert not counts_VVV[p_VVV == 0].any()
    assert accepted > 0.4 * count
    assert gate is None or gate.said == {True, False}


def test_a_drawn_tree_that_is_cut_at_the_end_takes_no_gate(toy_base, tabled):
    """Whether a level follows decides what of the one before it stays; a gate that sees the draws would choose."""
    told = {"drafters": tabled(3), "shape": DySpec(5, 3, 3), "gates": Whim(True)}
    with pytest.raises(ConfigError, match="gate: Whim sees what is drawn"):
        decode(toy_base(vocab=3), [[1, 2]], max_new_tokens=3, rules=Rules(Warp(T), "distinct"), **told)
    decode(toy_base(vocab=3), [[1, 2]], max_new_tokens=3, rules=Rules(Warp(T), "best"), **told)


def test_typical_acceptance_is_told_from_an_exact_rule(toy_base, chance_of, tabled):
    base, count, prompt = toy_base(vocab=3, max_positions=12), 600, [1, 2, 0, 2]
    p_VVV, _ = joint(base, prompt, Warp(T))
    rules = Rules(Warp(T), "iid", "typical", epsilon=0.1)
    counts_VVV, _ = counted(base, prompt, 3, count, drafters=tabled(3), shape=tree.chain(3), rules=rules)
    assert chance_of(counts_VVV, p_VVV) < 1e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("warp", [Warp(T), Warp(T, top_k=3, top_p=0.9)], ids=["all", "cut"])
def test_a_seed_decides_the_text_whatever_is_drafted_and_wherever_it_stops(toy_base, shape, warp, tabled):
    base, changed = toy_base(vocab=5), 0
    drafter = tabled(5)
    drafter.table = base.lm_head_weight @ base.lm_head_weight.T  # anything with ranks
    for seed in range(4):
        how = {"max_new_tokens": 30, "rules": Rules(warp, "best"), "seed": seed}
        alone = generate(base, PROMPT, **how)
        assert len(set(alone.tokens)) > 2
        for gate in (None, Whim(False), Whim(True)):
            out = generate(base, PROMPT, drafter=drafter, shape=shape, gate=gate, **how)
            assert out.tokens == alone.tokens
            changed += out.steps != alone.steps
    assert changed or not shape.depth


def test_a_seed_means_one_text_and_another_seed_another(toy_base, tabled):
    base, drafter = toy_base(), tabled(7)

    def texts(**how):
        return [tuple(generate(base, PROMPT, max_new_tokens=12, seed=s, **how).tokens) for s in (0, 1, 2, 0)]

    for how in ({"temperature": T}, {"temperature": T, "drafter": drafter, "shape": tree.chain(3)}):
        a, b, c, again = texts(**how)
        assert len({a, b, c}) == 3
        assert again == a
        assert texts(**how)[0] == a
    assert len(set(texts())) == 1  # greedy knows no chance


def test_nearly_no_temperature_is_greedy(toy_base, tabled):
    base, answer = toy_base(), toy_base().continuation(PROMPT, 30)
    assert generate(base, PROMPT, max_new_tokens=30, temperature=1e-6, seed=3).tokens == answer
    for drafts in ("iid", "distinct"):
        how = {"drafter": tabled(7), "shape": BUSHY, "rules": Rules(Warp(1e-6), drafts), "seed": 3}
        assert generate(base, PROMPT, max_new_tokens=30, **how).tokens == answer
