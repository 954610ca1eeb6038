"""The referee's arithmetic: terms, medians, interleaving, distinct n-grams."""

from __future__ import annotations

import itertools

import pytest
import torch

from draftsmith.decoding import measure
from draftsmith.decoding.engine import Generation
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.stats import Stats


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


def test_medians_over_repeats_and_the_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    plain_times = itertools.chain([100, 100], itertools.cycle([1, 9, 2]))  # two untimed calls come first

    def generate(base, prompt, *, drafter=None, max_new_tokens, eos_ids=frozenset(), **more):
        if max_new_tokens == measure.PAST and not eos_ids:
            return Generation([8] * measure.PAST, Stats(), "length")
        calls.append("head" if drafter else "plain")
        clock.now += 1 if drafter else next(plain_times)
        return Generation([5, 6], Stats(steps=1, verify_seconds=1.0), "length")

    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setattr(measure, "time", clock)

    class Base:
        class spec:
            max_positions = 100

    told = []

    def make(prompt, reference):
        told.append(list(reference))
        return object()

    results = measure.measure(
        Base(), [[1, 2]], {"head": Contender(make)}, {}, max_new_tokens=2, eos_ids=frozenset({9}), repeats=3
    )
    assert results["autoregressive"].seconds == 2  # of 1, 9, 2
    assert results["head"].seconds == 1
    assert results["autoregressive"].tokens == [[5, 6]]
    assert results["autoregressive"].stats.steps == 1  # counts of one pass
    assert results["autoregressive"].stats.verify_seconds == 3.0  # seconds of all
    assert calls == ["plain", "plain", "head", "plain", "head", "head", "plain", "plain", "head"]
    assert told[-1] == [5, 6] + [8] * measure.PAST


def test_copies_reach_every_decoding_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(base, prompt, *, max_new_tokens, copies=1, **more):
        asked.append((max_new_tokens, copies))
        return Generation([5], Stats(steps=1, verify_seconds=1.0), "length")

    class Base:
        class spec:
            max_positions = 100

    monkeypatch.setattr(measure, "generate", generate)
    told = {"max_new_tokens": 2, "eos_ids": frozenset(), "repeats": 2, "copies": 4}
    measure.measure(Base(), [[1]], {"head": Contender(lambda prompt, answer: object())}, {}, **told)
    assert {copies for limit, copies in asked if limit == 2} == {4}


def test_temperature_seed_and_gate_reach_every_decoding_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampled text has no continuation that an oracle could be told."""
    asked = []

    def generate(base, prompt, *, max_new_tokens, drafter=None, gate=None, temperature=0.0, seed=0, **more):
        asked.append((max_new_tokens, temperature, seed, gate if drafter else None))
        return Generation([5], Stats(steps=1, verify_seconds=1.0), "length")

    class Base:
        class spec:
            max_positions = 100

    monkeypatch.setattr(measure, "generate", generate)
    told = []

    def gate(prompt, answer):
        told.append((prompt, answer))
        return "gate"

    contenders = {"head": Contender(lambda prompt, answer: object(), None, gate)}
    how = {"max_new_tokens": 2, "eos_ids": frozenset(), "repeats": 2}
    measure.measure(Base(), [[1]], contenders, {}, temperature=0.7, seed=9, **how)
    assert {call[:3] for call in asked} == {(2, 0.7, 9)}
    assert {call[3] for call in asked} == {None, "gate"}
    assert told == [([1], [5])] * 3
    asked.clear()
    measure.measure(Base(), [[1]], contenders, {}, **how)
    assert {call[:3] for call in asked} == {(2, 0.0, 0), (measure.PAST, 0.0, 0)}
    assert told[-1] == ([1], [5, 5])


def test_where_a_gated_contender_differs_it_decodes_on_under_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(base, prompt, *, drafter, shape, gate, max_new_tokens, eos_ids):
        asked.append((list(prompt), drafter, gate))
        return Generation([8][:max_new_tokens], Stats(), "length")

    monkeypatch.setattr(measure, "generate", generate)
    contender = Contender(lambda prompt, answer: "drafter", None, lambda prompt, answer: ("gate", list(prompt)))
    near = lambda ids: torch.tensor([0.0, 0, 0, 0, 0, 0, 1.0, 1.0, 0.5])  # noqa: E731  6 and 7 are a tie
    found = measure.lossless(
        None, [[1]], contender, [[5, 6, 8]], [[5, 7, 8]], near, max_new_tokens=3, eos_ids=frozenset()
    )
    assert (found.mismatches, found.near_ties) == (0, 1)
    assert asked == [([1, 5, 7], "drafter", ("gate", [1, 5, 7]))]
