"""The sampling test finds a biased verifier and passes a right one; batches are compared with single prompts."""

import itertools

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import certificate, goodness, measure, rules, verify
from draftsmith.decoding.certificate import CertificateConfig, Fit, Greedy, Prefix, Sampling, fits, prefixes, ways
from draftsmith.decoding.company import always
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.tree import by_widths, chain
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import Verdict

WARP = Warp(1.0)
TEXTS = [[7, 8, 9], [3, 1, 4, 1, 5], list(range(20, 30)), [2], [40, 41]]


class Guess:
    """Thinks what it was given, whatever stands before; a tree of its depths."""

    max_depth, needs, gated, runs_base = 3, Needs(), True, False

    def __init__(self, logits_V):
        self.logits_V = logits_V

    def propose(self, base, state):
        hidden_D = torch.zeros(4)

        def deeper(level, tokens_C):
            nodes = len(level.expanded_A)
            return (self.logits_V.expand(nodes, -1), hidden_D.expand(nodes, -1)) if nodes else None

        return fill(state, self.logits_V, hidden_D, deeper)


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base()


@pytest.fixture(scope="module")
def exact(base):
    copy = base.in_float64()
    return lambda tokens, first: copy.capture(Needs(logits=True), torch.tensor([list(tokens)])).logits[0, first:]


@pytest.fixture(scope="module")
def places(base, exact):
    """Two prefixes, of one token that tells and of two."""
    texts = Greedy(base, TEXTS, exact, 20, frozenset()).texts(None)
    settings = CertificateConfig(prefixes=2, draws=400)
    return prefixes(TEXTS, texts, exact, Warp(2.0), settings, max_positions=160, eos_ids=frozenset())


@pytest.fixture(scope="module")
def sampling(base, places):
    """What plain decoding draws, once for all tests."""
    return Sampling(base, places, Warp(2.0), 400, certificate.seeds(0))


def failing(sampling):
    """way -> whether it fails, and plain decoding itself."""
    guess = Guess(torch.randn(60, generator=torch.Generator().manual_seed(1)) * 6)
    found = sampling.of(Contender(always(guess), by_widths([2, 2])))
    told = {"plain": sampling.own, **{way: r["fits"] for way, r in found.items()}}
    verdicts = iter(certificate.rejected([fit for some in told.values() for fit in some], 0.01))
    assert max(fit.cells for some in told.values() for fit in some) > 10
    return {way: sum(next(verdicts) for _ in some) > 0 for way, some in told.items()}


def test_every_way_of_drafting_passes(sampling):
    assert failing(sampling) == dict.fromkeys(["plain", "best", "iid", "distinct", "spectr"], False)


@pytest.mark.parametrize("way", ["best", "iid", "distinct", "spectr"])
def test_a_biased_verifier_fails(way, sampling, monkeypatch):
    """It keeps the first draft at one refusal in four."""
    name = {"best": "greedy", "spectr": "spectr"}.get(way, "recursive")
    right, turn = getattr(verify, name), itertools.count()

    def biased(proposal, judged, *more):
        verdict = right(proposal, judged, *more)
        kept = verdict.accepted or len(proposal.tokens_N) < 2 or next(turn) % 4
        return verdict if kept else Verdict(torch.tensor([0, 1]), verdict.bonus)

    every = certificate.ways
    monkeypatch.setattr(certificate, "ways", lambda shape, warp: {way: every(shape, warp)[way]})
    assert failing(sampling) == {"plain": False, way: False}
    monkeypatch.setattr(rules.verify, name, biased)
    assert failing(sampling) == {"plain": False, way: True}


def test_the_second_token_is_tested_where_the_first_is_sure(base):
    """A verifier that is right about the first token and wrong about the second."""
    sure, wide = torch.tensor([0.97, 0.01, 0.01, 0.01]), torch.full((4,), 0.25)
    place = Prefix(0, [1, 2], sure.double(), 0, wide.double())
    first = torch.tensor([970, 10, 10, 10])
    good = certificate.Sample(first, torch.tensor([243, 240, 247, 240]))
    bad = certificate.Sample(first, torch.tensor([343, 140, 247, 240]))
    told = [*fits(0, place, good, good), *fits(0, place, bad, good)]
    assert [(f.token, f.draws, f.cells) for f in told[:2]] == [(1, 1000, 4), (2, 970, 4)]
    assert certificate.rejected(told, 0.01) == [False, False, False, True]


def test_what_was_never_drawn_tells_nothing():
    place = Prefix(0, [1, 2], torch.tensor([0.5, 0.5]), 0, torch.tensor([0.5, 0.5]))
    none = certificate.Sample(torch.tensor([0, 500]), torch.zeros(2))
    first, second = fits(0, place, none, none)
    assert first.exact < 1e-6
    assert (second.draws, second.cells, second.exact, second.two_sample) == (0, 1, 1.0, 1.0)


def test_all_p_values_are_held_against_alpha_together():
    """0.004 alone would fail at 0.01; beside two others it is held against a third of it."""
    assert certificate.rejected([Fit(0, 1, 9, 3, 0.004, 0.9)], 0.01) == [True]
    assert certificate.rejected([Fit(0, 1, 9, 3, 0.004, 0.9), Fit(0, 1, 9, 3, None, 0.9)], 0.01) == [False, False]
    assert certificate.rejected([Fit(0, 1, 9, 3, 0.5, 1e-9), Fit(0, 1, 9, 3, None, 0.004)], 0.01) == [True, True]


# Prefixes


def told_by(table):
    """An `exact` that reads the logits after each token off a table: token -> logits."""
    return lambda tokens, first: torch.stack(
        [torch.tensor(table.get(t, SURE), dtype=torch.float64) for t in tokens[first:]]
    )


SURE, LESS, UNSURE = [9.0, 0, 0, 0], [1.0, 1.0, -9, -9], [0.0, 0, 0, 0]


def test_a_prefix_ends_where_the_counts_tell_most_and_every_other_one_a_token_earlier():
    table = {1: SURE, 2: SURE, 3: UNSURE, 4: LESS, 5: SURE}
    told = {"max_positions": 99, "eos_ids": frozenset({5})}
    settings = CertificateConfig(prefixes=2, draws=100)
    first, second = prefixes([[1, 1], [1]], [[2, 3, 4, 5], [4, 2, 3, 5]], told_by(table), WARP, settings, **told)
    assert (first.prompt, first.tokens, first.likely) == (0, [1, 1, 2, 3], 0)
    assert first.chances_V.tolist() == [0.25] * 4
    assert (second.prompt, second.tokens) == (1, [1, 4, 2])


def test_few_prompts_give_several_prefixes_each():
    table = {1: SURE, 2: UNSURE, 3: LESS, 4: SURE}
    settings = CertificateConfig(prefixes=4, draws=100)
    told = {"max_positions": 99, "eos_ids": frozenset()}
    found = prefixes([[1]], [[4, 2, 4, 3, 4]], told_by(table), WARP, settings, **told)
    assert [p.tokens[-1] for p in found] == [2, 4, 3, 4]
    assert len({tuple(p.tokens) for p in found}) == 4


def test_a_prefix_leaves_room_for_two_tokens_and_holds_no_end_of_text():
    table, settings = {1: SURE, 2: UNSURE}, CertificateConfig(prefixes=1)
    for text, limit, eos, length in (([2] * 5, 6, (), 4), ([2], 99, (), 2), ([2, 2], 99, (2,), 2)):
        told = {"max_positions": limit, "eos_ids": frozenset(eos)}
        (found,) = prefixes([[1]], [text], told_by(table), WARP, settings, **told)
        assert len(found.tokens) <= length
    with pytest.raises(ConfigError, match="ends at once"):
        prefixes([[1]], [[2]], told_by(table), WARP, settings, max_positions=99, eos_ids=frozenset({2}))


def test_seeds_all_differ():
    some = list(itertools.islice(certificate.seeds(3), 100_000))
    assert len(set(some)) == len(some)
    assert max(some) < 2**32


# Ways


def test_a_tree_without_siblings_or_that_cannot_be_drawn_is_replaced_where_it_must_be():
    own, small = by_widths([2, 2]), chain(2)
    assert [shape is own for _, shape in ways(own, WARP).values()] == [True] * 4
    assert [shape is small for _, shape in ways(small, WARP).values()] == [True, True, False, False]
    for grown, takes in ((ByProbability(8, 2), ["best"]), (Beam(2, 2), ["best", "distinct"])):
        found = ways(grown, WARP)
        assert [way for way, (_, shape) in found.items() if shape is grown] == takes
        assert all(shape.depth == 2 for _, shape in found.values())
    assert [r.accept for r, _ in ways(own, WARP).values()] == ["exact", "exact", "exact", "spectr"]


def test_a_drafter_that_cannot_draw_has_one_way(base, places):
    class Chooses(Guess):
        def propose(self, base, state):
            return super().propose(base, state.__class__(**{**vars(state), "draws": "best"}))

    sampling = Sampling(base, places[:1], Warp(2.0), 50, certificate.seeds(0))
    assert list(sampling.of(Contender(always(Chooses(torch.randn(60))), chain(2)))) == ["best"]


# Greedy


def test_a_batch_that_is_wrong_differs_from_one_by_one(base, exact, monkeypatch):
    guess = Contender(always(Guess(torch.zeros(60))), chain(2))
    greedy = Greedy(base, TEXTS, exact, 12, frozenset())
    alone = greedy.texts(guess)
    assert alone == greedy.texts(None)
    assert greedy.compared(guess, greedy.texts(guess, 2), alone, 2).counts == certificate.lossless.Lossless(5, 60)
    right, sizes = measure.decode, []

    def wrong(base, prompts, **told):
        found = right(base, prompts, **told)
        sizes.append(len(prompts))
        if len(prompts) > 1:
            found[0].tokens[-1] = (found[0].tokens[-1] + 1) % 60
        return found

    monkeypatch.setattr(measure, "decode", wrong)
    found = greedy.compared(guess, greedy.texts(guess, 2), alone, 2)
    assert found.counts.mismatches == 2  # the last prompt is alone in its batch
    assert [(d.prompt, d.position) for d in found.differences] == [(0, 3 + 11), (2, 10 + 11)]
    assert set(sizes) == {1, 2}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"draws": 10}, "draws=10: give at least 50"),
        ({"prefixes": 0}, "prefixes=0"),
        ({"batch_size": 1}, "batch_size=1: give at least 2"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 1.0}, "alpha=1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        CertificateConfig(**settings)


def test_the_sampling_test_pools_as_the_chi_square_does():
    chances = torch.tensor([0.5, 0.4, 0.06, 0.04])
    place = Prefix(0, [1], chances, 0, None)
    (fit,) = fits(0, place, certificate.Sample(torch.tensor([50, 40, 6, 4]), torch.zeros(4)), None)
    assert fit.cells == len(goodness.pooled(torch.tensor([50, 40, 6, 4]), chances)[0]) == 3
    assert (fit.two_sample, fit.exact) == (None, pytest.approx(1.0))
