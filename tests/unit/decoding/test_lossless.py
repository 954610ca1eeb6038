import pytest
import torch

from draftsmith.decoding.engine import generate
from draftsmith.decoding.lossless import Compared, Difference, Lossless, compare, compared, is_near_tie

PROMPT = [1, 2, 3]


def counted(prefix):
    """A base that counts: after any text the next token is its length."""
    return len(prefix) % 100


def rescore_with_gap(gap, worst=-10.0):
    """Its logits: the right token 1.0, the token 99 second-best at 1.0 - gap, the rest far below."""

    def rescore(prefix):
        logits_V = torch.full((100,), worst, dtype=torch.float64)
        logits_V[counted(prefix)] = 1.0
        logits_V[99] = 1.0 - gap
        return logits_V

    return rescore


def slip_at(*positions, token=99, stop=()):
    """A decoder that is right but at these text positions; at `stop` it ends."""

    def decode(prefix, limit):
        text = list(prefix)
        while len(text) < len(prefix) + limit and len(text) not in stop:
            text.append(token if len(text) in positions else counted(text))
        return text[len(prefix) :]

    return decode


REFERENCE = slip_at()(PROMPT, 20)


def test_equal_tokens_pass_and_decode_once():
    calls = []

    def decode(prefix, limit):
        calls.append((prefix, limit))
        return slip_at()(prefix, limit)

    result = compare(PROMPT, REFERENCE, decode, rescore_with_gap(1.0))
    assert result == Lossless(prompts=1, tokens=20)
    assert result.ok
    assert calls == [(PROMPT, 20)]


def test_the_second_best_token_at_gap_1e_3_is_a_mismatch():
    result = compare(PROMPT, REFERENCE, slip_at(7), rescore_with_gap(1e-3))
    assert result == Lossless(1, 20, mismatches=1)
    assert not result.ok


def test_a_relative_gap_of_1e_9_is_a_near_tie():
    result = compare(PROMPT, REFERENCE, slip_at(7), rescore_with_gap(1e-8))  # max|logit| is 10
    assert result == Lossless(1, 20, near_ties=1)
    assert result.ok


def test_decoding_goes_on_after_a_difference_from_the_reference():
    prefixes = []

    def decode(prefix, limit):
        prefixes.append(prefix)
        return slip_at(3, 7, 22)(prefix, limit)  # the first, a middle and the last new token

    assert compare(PROMPT, REFERENCE, decode, rescore_with_gap(1e-3)) == Lossless(1, 20, mismatches=3)
    assert prefixes == [PROMPT + REFERENCE[:n] for n in (0, 1, 5)]


def test_every_token_wrong_is_as_many_mismatches():
    result = compare(PROMPT, REFERENCE, slip_at(*range(3, 23)), rescore_with_gap(1e-3))
    assert result == Lossless(1, 20, mismatches=20)


@pytest.mark.parametrize("stop", [3, 10, 22])
def test_stopping_early_is_a_mismatch_and_the_rest_is_still_tested(stop):
    result = compare(PROMPT, REFERENCE, slip_at(15, stop=(stop,)), rescore_with_gap(1e-8))
    assert (result.mismatches, result.near_ties, result.tokens) == (1, 1, 20)


def test_going_on_after_the_reference_stopped_is_a_mismatch():
    result = compare(PROMPT, REFERENCE[:5], slip_at(), rescore_with_gap(1.0), max_new_tokens=20)
    assert result == Lossless(1, 6, mismatches=1)


def test_every_difference_is_listed_with_both_logits_and_its_gap():
    """One pass gives the counts and the list; the near tie and the mismatch are told apart in both."""
    gaps = {7: 1e-8, 9: 1e-3}

    def rescore(prefix):
        return rescore_with_gap(gaps[len(prefix)])(prefix)

    found = compared(PROMPT, REFERENCE, slip_at(7, 9), rescore, number=4)
    assert found.counts == compare(PROMPT, REFERENCE, slip_at(7, 9), rescore) == Lossless(1, 20, 1, 1)
    near, wrong = found.differences
    assert (near.prompt, near.position, near.expected, near.emitted, near.near_tie) == (4, 7, 7, 99, True)
    assert (near.expected_logit, near.emitted_logit) == (1.0, 1.0 - 1e-8)
    assert (near.gap, near.relative) == pytest.approx((1e-8, 1e-9))
    assert (wrong.position, wrong.near_tie, wrong.expected_logit, wrong.emitted_logit) == (9, False, 1.0, 1.0 - 1e-3)
    assert (wrong.gap, wrong.relative) == pytest.approx((1e-3, 1e-4))


def test_who_stopped_where_the_other_did_not_is_listed_without_logits():
    early = compared(PROMPT, REFERENCE, slip_at(stop=(10,)), rescore_with_gap(1.0)).differences
    assert early == (Difference(0, 10, 10, None),)
    late = compared(PROMPT, REFERENCE[:5], slip_at(), rescore_with_gap(1.0), max_new_tokens=20).differences
    assert late == (Difference(0, 8, None, 8),)


def test_counts_and_differences_add_up():
    one = compared(PROMPT, REFERENCE, slip_at(7), rescore_with_gap(1e-3), number=0)
    two = compared(PROMPT, REFERENCE, slip_at(9), rescore_with_gap(1e-8), number=1)
    assert one + two == Compared(Lossless(2, 40, 1, 1), (*one.differences, *two.differences))
    assert [d.prompt for d in (one + two).differences] == [0, 1]
    assert vars(one.counts).keys() == {"prompts", "tokens", "mismatches", "near_ties"}  # what evaluation.json tells


def test_logits_that_are_not_finite_never_tie():
    assert not is_near_tie(torch.tensor([1.0, float("nan")]), 0)
    assert not is_near_tie(torch.tensor([1.0, float("inf")]), 0)
    assert is_near_tie(torch.tensor([1.0, 0.0]), 0)


def test_more_than_one_near_tie_per_10_000_tokens_fails():
    assert Lossless(1, 50, near_ties=1).ok
    assert not Lossless(1, 19_999, near_ties=2).ok
    assert Lossless(1, 20_000, near_ties=2).ok
    assert not Lossless(1, 10**9, mismatches=1).ok
    assert Lossless(1, 5, 1, 2) + Lossless(2, 7, 0, 1) == Lossless(3, 12, 1, 3)


def test_the_engine_with_a_bad_drafter_passes_and_a_second_best_base_does_not(toy_base, scripted):
    base, prompt = toy_base(), [1, 2, 3]
    reference = generate(base, prompt, max_new_tokens=20).tokens
    drafter = scripted(lambda state, above, node: node % 7, max_depth=3)

    def decode(prefix, limit):
        return generate(base, prefix, drafter=drafter, max_new_tokens=limit).tokens

    def second_best(prefix, limit):
        tokens = decode(prefix, limit)
        if len(prefix) <= 8 < len(prefix) + len(tokens):
            tokens[8 - len(prefix)] = int(base.logits([*prompt, *reference[:5]]).topk(2).indices[1])
        return tokens

    assert compare(prompt, reference, decode, base.logits) == Lossless(1, 20)
    assert compare(prompt, reference, second_best, base.logits) == Lossless(1, 20, mismatches=1)
