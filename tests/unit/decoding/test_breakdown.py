"""Where tokens per step come from: intervals that hold what they promise, groups, context lengths, shares of time."""

from __future__ import annotations

import random

import pytest

from draftsmith.decoding import breakdown
from draftsmith.decoding.stats import Stats


def text(*kept: int) -> Stats:
    """A text whose steps kept so many drafts each, of chains of three."""
    stats = Stats()
    for accepted in kept:
        stats.record(3, accepted)
    return stats


# Intervals


def test_texts_that_are_alike_leave_no_doubt() -> None:
    low, high = breakdown.interval([text(1, 2)] * 8)  # type: ignore[misc]
    assert low == high == 2.5


def test_one_text_says_nothing_of_others() -> None:
    assert breakdown.interval([]) is None
    assert breakdown.interval([text(1, 2, 3)]) is None
    assert breakdown.interval([text(1, 2, 3), text(), Stats()]) is None  # a text without a step is none
    assert breakdown.interval([text(1), text(3)] * 3) is None  # fewer than 8 say too little
    assert breakdown.interval([text(1), text(3)] * 4) is not None
    assert breakdown.interval([text(1), text(3)] * 4, [0, 1, 2, 3, 4, 5, 6, 6]) is None  # turns of seven questions


def test_an_interval_repeats_and_is_of_micro_averages() -> None:
    """A text counts by its steps: of two texts drawn twice with replacement, both are one, or both the other, or mixed,
    where the long one rules."""
    each = [text(*[0] * 90), text(*[3] * 10)] * 4
    low, high = breakdown.interval(each)  # type: ignore[misc]
    assert breakdown.interval(each) == [low, high]
    assert low < sum(each, Stats()).tokens_per_step == 1.3 < high < 3
    alike = breakdown.interval([*each, *each], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7])
    assert alike == [1.3, 1.3]  # whole questions are drawn: a long text and a short one each


def test_a_higher_level_is_wider() -> None:
    rng = random.Random(0)
    each = [text(*(rng.randrange(4) for _ in range(10))) for _ in range(20)]
    low, high = breakdown.interval(each)  # type: ignore[misc]
    lower, higher = breakdown.interval(each, level=0.99)  # type: ignore[misc]
    assert lower < low < sum(each, Stats()).tokens_per_step < high < higher


def test_it_covers_the_true_value_as_often_as_it_says() -> None:
    """200 sets of 40 texts, each with an acceptance rate and a length of its own: steps of one text are not
    independent, which a formula over steps would miss."""
    rates, rng, covered = (0.2, 0.5, 0.8), random.Random(7), 0
    true = 1 + sum(a + a**2 + a**3 for a in rates) / len(rates)

    def drawn() -> Stats:
        rate, kept = rng.choice(rates), []
        for _ in range(rng.randint(10, 30)):
            kept.append(next((n for n in range(3) if rng.random() >= rate), 3))
        return text(*kept)

    for _ in range(200):
        low, high = breakdown.interval([drawn() for _ in range(40)])  # type: ignore[misc]
        covered += low <= true <= high
    assert 0.9 <= covered / 200 <= 0.99


# Groups


def test_groups_by_hand() -> None:
    each = [text(1, 1), text(3), text(0, 0), text()]
    told = breakdown.grouped(each, ["maths", "code", "maths", "empty"], [0, 1, 2, 3])
    assert list(told) == ["maths", "code", "empty"]  # in order of appearance
    assert {k: v for k, v in told["maths"].items() if k != "interval"} == {
        "prompts": 2,
        "steps": 4,
        "tokens_per_step": 1.5,
    }
    assert told["maths"]["interval"] is None
    assert breakdown.grouped(each * 8, ["one"] * 32, range(32))["one"]["interval"] == breakdown.interval(each * 8)
    assert told["code"] == {"prompts": 1, "steps": 1, "tokens_per_step": 4.0, "interval": None}
    assert told["empty"] == {"prompts": 1, "steps": 0, "tokens_per_step": 1.0, "interval": None}


def test_groups_are_named_by_what_labels_say() -> None:
    assert list(breakdown.grouped([text(1), text(1), text(2)], [2, 1, 2], [0, 1, 2])) == ["2", "1"]


# Context


def test_context_by_hand() -> None:
    """A step belongs to the length of the text before it, its root included: the first one reads prompt and root."""
    assert breakdown.by_context([text(1)], [62]) == {"0-63": {"steps": 1, "tokens_per_step": 2.0}}  # 63 tokens
    assert breakdown.by_context([text(1)], [63]) == {"64-127": {"steps": 1, "tokens_per_step": 2.0}}  # 64
    told = breakdown.by_context([text(3, 0, 2), text(1)], [59, 126])  # begun with 60, 64, 65; and with 127 tokens
    assert told == {"0-63": {"steps": 1, "tokens_per_step": 4.0}, "64-127": {"steps": 3, "tokens_per_step": 2.0}}
    assert breakdown.by_context([text(0, 0)], [127]) == {"128-255": {"steps": 2, "tokens_per_step": 1.0}}
    assert breakdown.by_context([text(), Stats()], [5, 500]) == {}


def test_contexts_hold_every_step() -> None:
    rng = random.Random(3)
    lengths = [rng.randrange(1, 3000) for _ in range(30)]
    each = [text(*(rng.randrange(4) for _ in range(rng.randrange(60)))) for _ in lengths]
    told, total = breakdown.by_context(each, lengths), sum(each, Stats())
    assert sum(part["steps"] for part in told.values()) == total.steps
    emitted = sum(part["steps"] * part["tokens_per_step"] for part in told.values())
    assert emitted == pytest.approx(total.steps + total.accepted)
    lows = [int(label.split("-")[0]) for label in told]
    assert lows == sorted(lows)


# Time


def test_shares_of_time() -> None:
    stats = Stats(prefill_seconds=1.0, draft_seconds=2.0, verify_seconds=4.0, other_seconds=1.0)
    assert breakdown.split(stats) == {"prefill": 0.125, "draft": 0.25, "verify": 0.5, "bookkeeping": 0.125}
    rng = random.Random(0)
    for _ in range(20):
        parts = dict(zip(("prefill", "draft", "verify", "other"), (rng.random() for _ in range(4)), strict=True))
        told = breakdown.split(Stats(**{f"{k}_seconds": v for k, v in parts.items()}))
        assert sum(told.values()) == pytest.approx(1)
    assert set(breakdown.split(Stats()).values()) == {0.0}
