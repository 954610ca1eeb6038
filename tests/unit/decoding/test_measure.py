"""The referee's arithmetic: terms, medians, interleaving, batches, distinct n-grams."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.decoding import measure, tree
from draftsmith.decoding.engine import Generation
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.stats import Stats
from draftsmith.growth import Warp


def test_terms_by_hand() -> None:
    """100 plain steps of 2 ms and 0.2 ms beside; 40 steps with 120 drafts accepted, 3 + 1 + 0.5 ms each."""
    plain = Stats(steps=100, verify_seconds=0.2, other_seconds=0.01, draft_seconds=0.01)
    own = Stats(steps=40, accepted_by_depth=[40, 40, 40], verify_seconds=0.12, draft_seconds=0.04, other_seconds=0.02)
    found = measure.terms(own, plain, repeats=1)
    assert found["tokens_per_step"] == 4
    assert found["plain_forward_seconds"] == pytest.approx(2e-3)
    assert (found["verify_cost"], found["draft_cost"], found["overhead"]) == pytest.approx((1.5, 0.5, 0.25))
    assert found["plain_overhead"] == pytest.approx(0.1)
    assert found["predicted_speedup"] == pytest.approx(4 * 1.1 / 2.25)


def test_terms_do_not_depend_on_the_number_of_repeats() -> None:
    once = Stats(steps=10, accepted_by_depth=[5], verify_seconds=0.3, draft_seconds=0.1, other_seconds=0.1)
    plain = Stats(steps=10, verify_seconds=0.2, other_seconds=0.1)
    more = [Stats(**{k: v * 3 if k.endswith("seconds") else v for k, v in vars(s).items()}) for s in (once, plain)]
    assert measure.terms(*more, repeats=3) == pytest.approx(measure.terms(once, plain, repeats=1))


def test_terms_of_nothing() -> None:
    assert measure.terms(Stats(), Stats(steps=3, verify_seconds=1.0), 1) == {}


def test_distinct_is_per_text() -> None:
    assert measure.distinct([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 1.0  # equal texts do not loop
    assert measure.distinct([[7] * 9]) == pytest.approx(1 / 6)
    assert measure.distinct([[1, 2]]) == 1.0


class Clock:
    """Time that a call moves by what the script says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Base:
    lm_head_weight = torch.zeros(1)

    class spec:
        max_positions = 100


def script(
    monkeypatch: pytest.MonkeyPatch,
    tokens_of: Callable[[list[int], str], list[int]] = lambda prompt, who: [5],
    takes: Callable[[str, int], float] = lambda who, rows: 0.0,
) -> list[tuple[str, list[list[int]], dict[str, Any]]]:
    """The engine by a script: who ("plain", "head") said what of a prompt, and how long a batch took; what a text is
    continued by beyond its end is always 8. Every call: who, the batch, and how."""
    clock, calls = Clock(), []

    def decode(base, batch, *, drafters=None, **how):
        who = "plain" if drafters is None else "head"
        calls.append((who, [list(prompt) for prompt in batch], {"drafters": drafters, **how}))
        clock.now += takes(who, len(batch))
        stats = Stats(steps=1, accepted_by_depth=[1] if drafters else [], verify_seconds=1.0)
        return [Generation(tokens_of(list(prompt), who), replace(stats), "length") for prompt in batch]

    def generate(base, prompt, *, max_new_tokens):
        assert max_new_tokens == measure.PAST  # of whatever follows, end of text or not
        return Generation([8] * measure.PAST, Stats(), "length")

    monkeypatch.setattr(measure, "decode", decode)
    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setattr(measure, "clock_of", lambda device: clock.perf_counter)
    return calls


HOW: dict[str, Any] = {"max_new_tokens": 2, "eos_ids": frozenset({9})}


def test_medians_over_repeats_and_the_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_times = itertools.chain([100, 100], itertools.cycle([1, 9, 2]))  # two untimed calls come first
    calls = script(monkeypatch, lambda p, who: [5, 6], lambda who, rows: next(plain_times) if who == "plain" else 1)
    told = []

    def make(prompt, reference):
        told.append(list(reference))
        return object()

    results = measure.measure(Base(), [[1, 2]], {"head": Contender(make)}, {}, repeats=3, **HOW)
    assert results["autoregressive"].seconds == 2  # of 1, 9, 2
    assert results["head"].seconds == 1
    assert results["autoregressive"].tokens == [[5, 6]]
    assert results["autoregressive"].stats.steps == 1  # counts of one pass
    assert results["autoregressive"].stats.verify_seconds == 3.0  # seconds of all
    assert [who for who, _, _ in calls] == ["plain", "plain", "head", "plain", "head", "head", "plain", "plain", "head"]
    assert told[-1] == [5, 6] + [8] * measure.PAST


def test_prompts_are_decoded_in_batches_and_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts, two at a time: tokens and counts of each, seconds of each batch, and the outside one by one."""
    prompts = [[n] for n in range(5)]
    calls = script(monkeypatch, lambda p, who: [p[0] + 10], lambda who, rows: rows if who == "head" else 3.0)
    asked = []

    def outside(prompt):
        asked.append(list(prompt))
        return [prompt[0] + 20]

    contenders = {"head": Contender(lambda prompt, answer: (tuple(prompt), tuple(answer[:1])))}
    results = measure.measure(Base(), prompts, contenders, {"hf": outside}, repeats=2, batch_size=2, **HOW)
    batches = [[[0], [1]], [[2], [3]], [[4]]]
    for who in ("plain", "head"):
        assert [batch for w, batch, _ in calls if w == who and batch == batches[-1]]
        assert all(batch in batches for w, batch, _ in calls if w == who)
    told = {tuple(map(tuple, batch)): how for who, batch, how in calls if who == "head"}
    assert told[(2,), (3,)]["drafters"] == [((2,), (12,)), ((3,), (13,))]  # each row's own, told its own text
    assert all(how["seeds"] == [n for (n,) in batch] for _, batch, how in calls)  # a seed for every prompt
    assert results["head"].tokens == results["autoregressive"].tokens == [[10], [11], [12], [13], [14]]
    assert results["hf"].tokens == [[20], [21], [22], [23], [24]]
    assert set(map(tuple, asked)) == {(n,) for n in range(5)}
    assert (results["head"].seconds, results["autoregressive"].seconds) == (2 + 2 + 1, 9)
    assert [s.steps for s in results["head"].each] == [1] * 5
    assert [s.verify_seconds for s in results["head"].each] == [2.0] * 5  # of both passes
    assert (results["head"].stats.steps, results["head"].stats.accepted) == (5, 5)


def test_a_batch_says_what_every_prompt_says_alone(toy_base: Any, scripted: Any) -> None:
    """For real: ragged rows that accept differently and end at different times."""
    base, prompts = toy_base(vocab=5), [[1, 3, 2, 2, 3, 0], [4], [2, 2, 0], [0, 1]]

    def make(prompt, answer):
        return scripted(lambda state, above, node: answer[(len(state.tokens) + len(above) - 1) % len(answer)])

    how = {"max_new_tokens": 12, "eos_ids": frozenset({3}), "repeats": 1}
    alone, together = (
        measure.measure(base, prompts, {"head": Contender(make, tree.chain(2))}, {}, batch_size=size, **how)
        for size in (1, 3)
    )
    for name in ("autoregressive", "head"):
        assert together[name].tokens == alone[name].tokens == alone["autoregressive"].tokens
        counts = [[(s.steps, s.accepted_by_depth, s.kept) for s in r[name].each] for r in (alone, together)]
        assert counts[0] == counts[1]
    assert len({len(t) for t in alone["head"].tokens}) > 1


def test_rules_seed_and_gate_reach_every_decoding_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampled text has no continuation that an oracle could be told."""
    calls = script(monkeypatch)
    told = []

    def gate(prompt, answer):
        told.append((prompt, answer))
        return "gate"

    contenders = {"head": Contender(lambda prompt, answer: object(), None, gate)}
    how = {**HOW, "repeats": 2}
    rules = Rules(Warp(0.7, top_k=3))
    measure.measure(Base(), [[1]], contenders, {}, rules=rules, seed=9, **how)
    assert all(c["rules"] is rules and c["seeds"] == [9] for _, _, c in calls)
    assert all((c["max_new_tokens"], c["eos_ids"]) == (2, frozenset({9})) for _, _, c in calls)
    assert {who: c.get("gates") for who, _, c in calls} == {"plain": None, "head": ["gate"]}
    assert told == [([1], [5])] * 3
    calls.clear()
    measure.measure(Base(), [[1]], contenders, {}, **how)
    assert all(c["rules"].greedy and c["seeds"] == [0] for _, _, c in calls)
    assert told[-1] == ([1], [5] + [8] * measure.PAST)


def test_nothing_is_asked_beyond_the_bases_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that fills them has no continuation to tell."""
    script(monkeypatch, lambda prompt, who: [5] * (101 - len(prompt)))
    told = []
    contenders = {"head": Contender(lambda prompt, answer: told.append(len(answer)))}
    measure.measure(Base(), [[1] * 99, [1] * 98], contenders, {}, repeats=1, **HOW)
    assert set(told) == {2, 3}


def test_a_contender_without_a_drafter_is_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = script(monkeypatch)
    results = measure.measure(Base(), [[1]], {"plain": Contender(lambda p, a: None)}, {}, repeats=1, **HOW)
    assert {who for who, _, _ in calls} == {"plain"}
    assert results["plain"].tokens == [[5]]


def test_where_a_gated_contender_differs_it_decodes_on_under_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = script(monkeypatch, lambda prompt, who: [8])
    contender = Contender(lambda prompt, answer: "drafter", None, lambda prompt, answer: ("gate", list(prompt)))
    near = lambda ids: torch.tensor([0.0, 0, 0, 0, 0, 0, 1.0, 1.0, 0.5])  # noqa: E731  6 and 7 are a tie
    found = measure.lossless(
        None, [[1]], contender, [[5, 6, 8]], [[5, 7, 8]], near, max_new_tokens=3, eos_ids=frozenset()
    )
    assert (found.mismatches, found.near_ties) == (0, 1)
    ((_, batch, how),) = calls
    assert (batch, how["drafters"], how["gates"]) == ([[1, 5, 7]], ["drafter"], [("gate", [1, 5, 7])])
    assert how["max_new_tokens"] == 1
    assert how["rules"].greedy
