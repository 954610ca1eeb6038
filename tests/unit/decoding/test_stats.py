import pytest

from draftsmith.decoding.stats import Stats


def filled(steps):
    stats = Stats()
    for offered, accepted in steps:
        stats.record(offered, accepted)
    return stats


def test_check_30_tokens_per_step_is_one_plus_the_products_of_conditional_acceptance():
    stats = filled([(3, 3), (3, 1), (3, 0), (0, 0), (1, 1), (3, 2)])
    assert (stats.steps, stats.accepted) == (6, 7)
    assert stats.accepted_by_depth == [4, 2, 1]
    assert stats.offered_by_depth == [5, 4, 4]
    assert stats.acceptance_by_depth == [4 / 6, 2 / 4, 1 / 2]
    product, tau = 1.0, 1.0
    for a in stats.acceptance_by_depth:
        product *= a
        tau += product
    assert stats.tokens_per_step == pytest.approx(tau) == pytest.approx(1 + 7 / 6)
    assert stats.accepted_drafts_per_step == 7 / 6
    assert stats.kept == [3, 1, 0, 0, 1, 2]  # of every step, in order


def test_no_step_and_no_acceptance_divide_by_nothing():
    assert Stats().tokens_per_step == 1.0
    assert Stats().verify_seconds_per_step == 0.0
    assert filled([(2, 0)]).acceptance_by_depth == [0.0, 0.0]


def test_merging_adds_every_field_and_micro_averages():
    a, b = filled([(3, 3)]), filled([(1, 0), (1, 0), (1, 1)])
    a.verify_seconds, b.verify_seconds, b.draft_seconds, a.prefill_seconds = 1.0, 3.0, 2.0, 0.5
    a.emitted, b.emitted = 4, 5
    both = a + b
    assert both.accepted_by_depth == [2, 1, 1]
    assert both.offered_by_depth == [4, 1, 1]
    assert (both.steps, both.emitted, both.tokens_per_step) == (4, 9, 2.0)
    assert (both.verify_seconds_per_step, both.draft_seconds_per_step) == (1.0, 0.5)
    assert both.other_seconds_per_step == 0.0
    assert both.seconds == 6.5
    assert both.kept == [3, 0, 0, 1]
    assert a.accepted_by_depth == [1, 1, 1]
    assert a + Stats() == a
