"""What a gate is worth, by hand: ranks, reliability, costs, bounds, and the choice of a threshold."""

import random

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import gating, measure, tree
from draftsmith.decoding.engine import Generation
from draftsmith.decoding.gates import Fixed, Oracle
from draftsmith.decoding.gating import Costs, Hearing, Trial
from draftsmith.decoding.measure import Result
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.stats import Stats
from draftsmith.drafting import fill
from draftsmith.growth import Warp
from draftsmith.roles import Partial, Proposal, Verdict

PROMPTS = [[1, 3, 2, 2, 3, 0], [4, 1]]
HOW = {"max_new_tokens": 25, "eos_ids": frozenset(), "repeats": 1, "rules": Rules(), "seed": 0}

# Ranks and reliability


def test_auc_equals_brute_force_over_pairs_with_ties():
    rng = random.Random(0)
    for _ in range(100):
        said = [rng.choice([0.1, 0.2, 0.5, 0.5, 0.9, rng.random()]) for _ in range(rng.randrange(2, 30))]
        right = [rng.random() < 0.5 for _ in said]
        pairs = [(a, b) for a, x in zip(said, right, strict=True) for b, y in zip(said, right, strict=True) if x > y]
        told = gating.auc(torch.tensor(said), torch.tensor(right))
        if not pairs:
            assert told is None
        else:
            assert told == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_auc_of_one_kind_is_unknown():
    assert gating.auc(torch.tensor([0.1, 0.9]), torch.tensor([True, True])) is None
    assert gating.auc(torch.tensor([0.1, 0.9]), torch.tensor([False, False])) is None
    assert gating.auc(torch.tensor([]), torch.tensor([], dtype=torch.bool)) is None
    assert gating.auc(torch.tensor([0.1, 0.9]), torch.tensor([False, True])) == 1.0


def test_calibration_by_hand():
    said, right = [0.05, 0.55, 0.51, 0.95, 1.0], [False, True, False, True, True]
    told = gating.calibration(said, right)
    assert (told["drafts"], told["accepted"], told["auc"]) == (5, 0.6, 1.0)
    assert told["brier"] == pytest.approx((0.05**2 + 0.45**2 + 0.51**2 + 0.05**2 + 0) / 5)
    assert [bin["count"] for bin in told["curve"]] == [1, 2, 2]  # 1.0 belongs to the last bin; empty ones are left out
    assert [bin["predicted"] for bin in told["curve"]] == pytest.approx([0.05, 0.53, 0.975])
    assert [bin["accepted"] for bin in told["curve"]] == [0.0, 0.5, 1.0]
    assert told["ece"] == pytest.approx((0.05 + 2 * 0.03 + 2 * 0.025) / 5)


def test_calibration_of_true_and_of_false_chances():
    rng = random.Random(1)
    said = [rng.random() for _ in range(20_000)]
    right = [rng.random() < s for s in said]
    assert gating.calibration(said, right)["ece"] < 0.02
    assert gating.calibration([s**3 for s in said], right)["ece"] > 0.2  # the same ranks
    assert gating.calibration([s**3 for s in said], right)["auc"] == pytest.approx(
        gating.calibration(said, right)["auc"]
    )


def test_calibration_of_nothing():
    told = gating.calibration([], [])
    assert (told["drafts"], told["accepted"], told["auc"], told["brier"], told["ece"]) == (0, None, None, None, 0)
    assert told["curve"] == []


def verdict(accepted):
    return Verdict(torch.arange(accepted + 1), 0)


def test_only_drafts_that_were_put_to_the_test_are_heard():
    """Of four judged drafts, those up to the first refused one."""
    hearing = Hearing(lambda partial: [torch.tensor([0.9, 0.1]), *(torch.tensor([c]) for c in (0.8, 0.7, 0.6))])
    proposal = Proposal(torch.zeros(6, dtype=torch.long), tree.chain(5).parents_N)
    for accepted, said, right in (
        (0, [0.9], [False]),
        (2, [0.9, 0.8, 0.7], [True, True, False]),
        (4, [0.9, 0.8, 0.7, 0.6], [True] * 4),
        (5, [0.9, 0.8, 0.7, 0.6], [True] * 4),  # the fifth was not judged
    ):
        hearing.said, hearing.right = [], []
        assert not hearing.stop(None, Partial())
        hearing.watch(proposal, verdict(accepted))
        assert hearing.said == pytest.approx(said)
        assert hearing.right == right
    hearing.watch(proposal, verdict(3))  # a step without a draft that could be judged
    assert len(hearing.said) == 4


# Costs


def test_the_rate_by_hand():
    """Three steps of chains of at most 3, of which 3, 1 and 2 levels were drafted and 2, 0, 2 kept: 6 levels, of which
    the one at depth 3 was not asked about, and 7 tokens."""
    stats = Stats()
    for offered, accepted in ((3, 2), (1, 0), (2, 2)):
        stats.record(offered, accepted)
    assert Costs(level=0.2, step=1.0, ask=0.1).rate(stats, 3) == pytest.approx(7 / (3 * 1.0 + 6 * 0.2 + 5 * 0.1))
    assert Costs(0.2, 1.0, 0.0).rate(stats, 3) == pytest.approx(7 / 4.2)
    one = Stats()
    one.record(1, 1)
    assert Costs(0.2, 1.0, 0.1).rate(one, 1) == pytest.approx(2 / 1.2)  # nobody is asked about a single level


def test_the_threshold_of_the_theory():
    """c2 / (c1 + c2) (arXiv 2405.19715): cheap drafts are worth a try, dear ones are not."""
    assert Costs(level=0.25, step=0.75, ask=0.0).threshold == 0.75
    assert Costs(level=0.2, step=0.75, ask=0.05).threshold == 0.75
    assert Costs(level=0.0, step=1.0, ask=0.0).threshold == 1.0


# Judging, on the toy


class Guessing:
    """The base's own token, or now and then another: decided by the text alone, so that it drafts the same under every
    gate."""

    gated = True
    needs, max_depth = Needs(), 8

    def propose(self, base, state):
        path = []

        def after(path):
            logits_V = base.logits([*state.tokens, *path])
            wrong = hash((len(state.tokens) + len(path), 5)) % 4 == 0
            return (-logits_V if wrong else logits_V)[None]

        def deeper(level, tokens_C):
            path.append(int(tokens_C[0]))
            return (after(path), torch.zeros(1, 1)) if len(level.expanded_A) else None

        return fill(state, after(path)[0], torch.zeros(1), deeper)


def seconds_of(stats, drafts=0.1, ask=0.0, first=0.0):
    """What such a run would take: 1 a step, 0.1 a drafted level."""
    levels = sum(stats.offered_by_depth)
    return stats.steps * (1 + first) + drafts * levels + ask * levels


@pytest.fixture
def by_counts(monkeypatch):
    """measure.measure decodes for real; its seconds are counts times costs. by_counts: what it was asked."""
    inner, asked = measure.measure, []

    def counted(base, prompts, contenders, outside, **how):
        asked.append((list(contenders), how))
        results = inner(base, prompts, contenders, outside, **how)
        for result in results.values():
            result.seconds = seconds_of(result.stats)
        return results

    monkeypatch.setattr(measure, "measure", counted)
    return asked


def test_a_gate_that_is_the_oracle_recovers_everything(toy_base, by_counts):
    base = toy_base()
    texts = {tuple(p): p + base.continuation(p, 45) for p in PROMPTS}

    class Knows:
        """The oracle of whichever text this is."""

        def stop(self, state, partial):
            text = next(t for p, t in texts.items() if tuple(state.tokens[: len(p)]) == p)
            return Oracle(text).stop(state, partial)

    told = Trial(base, Guessing(), 5, HOW).bounds(Knows(), PROMPTS)
    assert told["recovered"] == pytest.approx(1)
    assert told["regret"] == pytest.approx(0)
    assert set(told["by_length"]) == {*(f"fixed_{k}" for k in range(1, 6)), "gate", "oracle"}
    speeds = {name: row["tokens_per_second"] for name, row in told["by_length"].items()}
    assert told["best_fixed"] == max((f"fixed_{k}" for k in range(1, 6)), key=speeds.get)
    assert len({speeds[f"fixed_{k}"] for k in range(1, 6)}) == 5
    assert told["oracle_over_best_fixed"] == pytest.approx(speeds["oracle"] / speeds[told["best_fixed"]])
    assert told["oracle_over_best_fixed"] > 1
    assert told["over_best_fixed"] == pytest.approx(told["oracle_over_best_fixed"])
    assert [how["repeats"] for _, how in by_counts] == [1]  # one run, interleaved


def test_a_gate_that_is_a_fixed_length_recovers_nothing_or_less(toy_base, by_counts):
    base = toy_base()
    judge = Trial(base, Guessing(), 4, HOW)
    best = int(judge.bounds(Fixed(1), PROMPTS)["best_fixed"].removeprefix("fixed_"))
    told = judge.bounds(Fixed(best), PROMPTS)
    assert told["recovered"] == pytest.approx(0)
    assert told["over_best_fixed"] == pytest.approx(1)
    for k in range(1, 5):
        told = judge.bounds(Fixed(k), PROMPTS)
        speeds = {name: row["tokens_per_second"] for name, row in told["by_length"].items()}
        gap = speeds["oracle"] - speeds[f"fixed_{best}"]
        assert told["recovered"] == pytest.approx((speeds[f"fixed_{k}"] - speeds[f"fixed_{best}"]) / gap)
        assert told["regret"] == pytest.approx(1 - speeds[f"fixed_{k}"] / speeds["oracle"])
        assert told["by_length"][f"fixed_{k}"]["drafts_per_step"] == k
        assert told["by_length"]["gate"] == pytest.approx(told["by_length"][f"fixed_{k}"])


def test_where_the_oracle_gains_nothing_there_is_nothing_to_recover(monkeypatch):
    def told(base, prompts, contenders, outside, **how):
        speeds = {"autoregressive": 4.0, "fixed_1": 8.0, "fixed_2": 10.0, "gate": 9.0, "oracle": 10.0}
        assert [*speeds][1:] == [*contenders]
        stats = Stats(steps=4, accepted_by_depth=[2], offered_by_depth=[4])
        return {name: Result([[0] * 20], [stats], 20 / speed) for name, speed in speeds.items()}

    monkeypatch.setattr(measure, "measure", told)
    found = Trial(None, None, 2, HOW).bounds(Fixed(1), PROMPTS)
    assert found["best_fixed"] == "fixed_2"
    assert found["recovered"] is None
    assert found["over_best_fixed"] == pytest.approx(0.9)
    assert found["regret"] == pytest.approx(0.1)
    assert found["by_length"]["gate"] == pytest.approx(
        {"tokens_per_step": 1.5, "drafts_per_step": 1.0, "tokens_per_second": 9.0, "speedup": 2.25}
    )


def test_sampled_text_has_no_oracle(toy_base, by_counts):
    told = Trial(toy_base(), Guessing(), 2, {**HOW, "rules": Rules(Warp(8.0))}).bounds(Fixed(1), PROMPTS)
    assert set(told["by_length"]) == {"fixed_1", "fixed_2", "gate"}
    assert set(told) == {"by_length", "best_fixed", "over_best_fixed"}


def test_every_fixed_length_is_what_it_says(toy_base):
    base = toy_base()
    for k, (name, contender) in enumerate(Trial(base, Guessing(), 4, HOW).fixed().items(), start=1):
        stats = measure.measure(base, PROMPTS, {name: contender}, {}, **HOW)[name].stats
        assert name == f"fixed_{k}"
        assert stats.offered_by_depth[:k] == [stats.steps] * k
        assert sum(stats.offered_by_depth) == k * stats.steps


def test_costs_are_the_line_through_the_fixed_lengths(monkeypatch):
    """draft seconds per step 0.3 + 0.1 k; with the gate asked after three of four levels, 0.06 more; all else 1.5 + 0.5
    a step. Three repeats: seconds are sums over them."""
    drafts = {**{f"fixed_{k}": 0.3 + 0.1 * k for k in range(1, 5)}, "gate": 0.7 + 0.06, "autoregressive": 0.0}

    def told(base, prompts, contenders, outside, **how):
        assert how["repeats"] == 3
        seconds = {"verify_seconds": 10 * 3 * 1.5, "other_seconds": 10 * 3 * 0.5}
        stats = {
            n: Stats(steps=10, draft_seconds=10 * 3 * drafts[n], **seconds) for n in ("autoregressive", *contenders)
        }
        return {name: Result([], [own], 1.0) for name, own in stats.items()}

    monkeypatch.setattr(measure, "measure", told)
    costs = Trial(None, None, 4, {**HOW, "repeats": 3}).costs(Fixed(9), PROMPTS)
    assert (costs.level, costs.step, costs.ask) == pytest.approx((0.1, 0.3 + 2.0, 0.02))
    drafts["gate"] = 0.1  # noise must not make asking pay
    assert Trial(None, None, 4, {**HOW, "repeats": 3}).costs(Fixed(9), PROMPTS).ask == 0
    drafts["gate"] = 0.5
    costs = Trial(None, None, 1, {**HOW, "repeats": 3}).costs(Fixed(9), PROMPTS)
    assert costs.level == pytest.approx(0.4)
    assert costs.step == pytest.approx(2.0)


def test_the_best_threshold_is_chosen_by_counts_and_costs(toy_base):
    """Gates that stop at 1, 2, 3, 4 levels: each one's counts times the costs."""
    base = toy_base()
    judge, lengths = Trial(base, Guessing(), 4, HOW), {0.1: 1, 0.2: 2, 0.3: 3, 0.4: 4}
    chosen = set()
    for costs in (Costs(0.001, 1.0, 0.0), Costs(0.2, 1.0, 0.05), Costs(1.0, 1.0, 0.0), Costs(0.0, 1.0, 1.0)):
        best, table = judge.choose(lambda t: Fixed(lengths[t]), list(lengths), costs, PROMPTS)
        assert [row["threshold"] for row in table] == list(lengths)
        for row, k in zip(table, lengths.values(), strict=True):
            stats = judge.run(Fixed(k), PROMPTS)
            assert row["drafts_per_step"] == sum(stats.offered_by_depth) / stats.steps == k
            assert row["tokens_per_step"] == stats.tokens_per_step
            asked = stats.steps * min(k, 3)
            due = stats.steps * costs.step + k * stats.steps * costs.level + asked * costs.ask
            assert row["tokens_per_second"] == pytest.approx((stats.steps + stats.accepted) / due)
        assert best == max(table, key=lambda row: row["tokens_per_second"])["threshold"]
        chosen.add(best)
    assert len(chosen) > 1  # costs decide


def test_a_run_counts_all_prompts_and_tells_who_watches(toy_base, monkeypatch):
    base, steps = toy_base(), []
    stats = Trial(base, Guessing(), 3, HOW).run(Fixed(2), PROMPTS, lambda proposal, verdict: steps.append(verdict))
    assert len(steps) == stats.steps
    assert sum(v.accepted for v in steps) == stats.accepted
    assert stats.emitted == 25 * len(PROMPTS)
    seen = []

    def generate(base, prompt, **how):
        seen.append(how)
        return Generation([1], Stats(steps=1), "length")

    monkeypatch.setattr(gating, "generate", generate)
    rules = Rules(Warp(0.7))
    Trial(base, Guessing(), 3, {**HOW, "rules": rules, "seed": 9}).run(Fixed(2), PROMPTS)
    assert [(how["rules"], how["seed"], how["shape"].depth) for how in seen] == [(rules, 9, 3)] * 2
