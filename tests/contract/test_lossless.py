"""Every drafter, trained or not, leaves the base's text as it is: greedy and sampled, in chains and in trees, rows
alone and together, on two families. Drafters are found, not listed (conftest.py).

Chosen drafts leave every token as it is, with a temperature too, since a seed decides the text. Drawn drafts make
another text of the same distribution: near no temperature it is the greedy one, at another a row has the same text
alone and in a batch, and over seeds the tokens are distributed as the base says in fp64.

K/V start with room for four slots here, and memory that nobody has written to holds NaN, as it may anywhere.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Needs
from draftsmith.decoding.engine import Generation, decode
from draftsmith.decoding.goodness import chi_square
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import TreeSpec
from draftsmith.growth import Warp

FAMILIES = ["llama", "mistral"]  # mistral with a window shorter than the texts
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [5, 2], list(range(20, 35))]
SEEDS = [11, 12, 13, 14]
COUNT = 20
GREEDY, WARM, SHARP = Rules(), Warp(1.0), Warp(1e-6)
CHOSEN = {"greedy": GREEDY, "sampled": Rules(WARM, "best")}
TREE = [[0], [1], [2], [0, 0], [1, 0], [1, 1], [1, 0, 0]]
SHAPES = {"chain": TreeSpec("chain", depth=3), "tree": TreeSpec("static", paths=TREE)}
GROWING = {kind: TreeSpec(kind, depth=4, nodes=8, top_k=3, width=2) for kind in ("eagle2", "dyspec", "beam")}
ROOTED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
DRAWN, TOGETHER = 240, 60  # rows of a distribution, of a batch


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    defaults: Any = BaseLM.new_kv.__kwdefaults__
    before = defaults["capacity"]
    defaults["capacity"] = 4
    torch._C._set_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory does the rest
    yield
    torch._C._set_deterministic_algorithms(False)
    defaults["capacity"] = before


@pytest.fixture(scope="module")
def answers() -> Callable[..., list[list[int]]]:
    """answers(base, rules): what the base says without any drafter."""

    @functools.cache
    def of(base: Any, rules: Rules) -> list[list[int]]:
        return [out.tokens for out in decode(base, PROMPTS, rules=rules, seeds=SEEDS, max_new_tokens=COUNT)]

    return of


@pytest.fixture(scope="module")
def run(made: Any, answers: Any) -> Callable[..., list[Generation]]:
    """run(anyone, family, tree, rules, rows): PROMPTS with a drafter, so many of them together."""

    def of(anyone: Any, family: str, spec: TreeSpec, rules: Rules, rows: int, count: int = COUNT) -> list[Generation]:
        base, drafter = made(anyone, family)
        texts = [[*p, *a] for p, a in zip(PROMPTS, answers(base, GREEDY), strict=True)]
        drafters, found = [drafter(text, texts) for text in texts], []
        how = {"rules": rules, "shape": shaped(spec, drafters[0]), "max_new_tokens": count}
        for first in range(0, len(PROMPTS), rows):
            these = slice(first, first + rows)
            found += decode(base, PROMPTS[these], drafters=drafters[these], seeds=SEEDS[these], **how)
        assert any(out.stats.accepted for out in found), "no draft was right: nothing was put to the test"
        return found

    return of


def shaped(spec: TreeSpec, drafter: Any) -> Any:
    return dataclasses.replace(spec, depth=min(spec.depth or 9, drafter.max_depth)).shape(drafter.max_depth)


def texts_of(found: list[Generation]) -> list[list[int]]:
    return [out.tokens for out in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bases_have_something_to_say(family: str, spoken: Any, answers: Any) -> None:
    """And the engine's greedy tokens are those of transformers' generate, with an adapter too."""
    for adapted in (False, True):
        base = spoken(family, adapted)
        assert answers(base, GREEDY) == base.generate(PROMPTS, max_new_tokens=COUNT, batch_size=1)
        for rules in CHOSEN.values():
            assert len({token for answer in answers(base, rules) for token in answer}) >= 6


def halved(*choices: list[Any]) -> list[Any]:
    """All combinations. Half of them, in which any choice meets any two others, is quick; the rest is slow."""
    at = itertools.product(*(range(len(some)) for some in choices))
    slow = [[pytest.mark.slow] if sum(where) % 2 else [] for where in at]
    return [pytest.param(*c, marks=m) for c, m in zip(itertools.product(*choices), slow, strict=True)]


@pytest.mark.parametrize(("family", "rules", "shape", "rows"), halved(FAMILIES, [*CHOSEN], [*SHAPES], [1, 4]))
def test_chosen_drafts_leave_every_token_as_it_is(
    anyone: Any, family: str, rules: str, shape: str, rows: int, run: Any, made: Any, answers: Any
) -> None:
    found = run(anyone, family, SHAPES[shape], CHOSEN[rules], rows)
    assert texts_of(found) == answers(made(anyone, family)[0], CHOSEN[rules])


@pytest.mark.parametrize(("growing", "family"), [("eagle2", "llama"), ("dyspec", "mistral"), ("beam", "mistral")])
def test_so_do_trees_that_grow_by_what_the_drafter_thinks(
    anyone: Any, family: str, growing: str, run: Any, made: Any, answers: Any
) -> None:
    assert texts_of(run(anyone, family, GROWING[growing], GREEDY, 4)) == answers(made(anyone, family)[0], GREEDY)


@pytest.mark.parametrize(("drafts", "family", "shape"), [("iid", "llama", "chain"), ("distinct", "mistral", "tree")])
def test_drawn_drafts_near_no_temperature_make_the_greedy_text(
    anyone: Any, family: str, drafts: Any, shape: str, run: Any, made: Any, answers: Any
) -> None:
    found = run(anyone, family, SHAPES[shape], Rules(SHARP, drafts), 4)
    assert texts_of(found) == answers(made(anyone, family)[0], GREEDY)


@pytest.mark.parametrize(("drafts", "family"), [("iid", "mistral"), ("distinct", "llama")])
def test_a_row_whose_drafts_are_drawn_has_the_same_text_alone_and_in_a_batch(
    anyone: Any, family: str, drafts: Any, run: Any
) -> None:
    alone, together = (run(anyone, family, SHAPES["tree"], Rules(WARM, drafts), rows, 12) for rows in (1, 4))
    assert texts_of(alone) == texts_of(together)
    assert [out.stats.kept for out in alone] == [out.stats.kept for out in together]


@pytest.fixture(scope="module")
def joint() -> Callable[..., torch.Tensor]:
    """joint(base, warp): p(a) p(b | a) of the two tokens after ROOTED [V, V], the base's own in fp64."""

    @functools.cache
    def of(base: Any, warp: Warp) -> torch.Tensor:
        exact, vocabulary = base.in_float64(), torch.arange(base.spec.vocab_size)
        tokens_VT = torch.cat([torch.tensor(ROOTED).expand(len(vocabulary), -1), vocabulary[:, None]], 1)
        logits_VTV = exact.capture(Needs(logits=True), tokens_VT).logits
        return warp.chances(logits_VTV[:1, -2]).T * warp.chances(logits_VTV[:, -1])

    return of


def test_drawn_drafts_leave_the_distribution_as_it_is(anyone: Any, made: Any, joint: Any) -> None:
    """Of the first two tokens that come from steps, over many rows after one rooted prompt, longer than the window."""
    base, drafter = made(anyone, "mistral")
    counts_VV, kept = torch.zeros(base.spec.vocab_size, base.spec.vocab_size), 0
    for first in range(0, DRAWN, TOGETHER):
        drafters = [drafter(ROOTED, [ROOTED]) for _ in range(TOGETHER)]
        rules = Rules(WARM, "iid" if first < DRAWN // 2 else "distinct")
        how = {"rules": rules, "shape": shaped(SHAPES["tree"], drafters[0]), "max_new_tokens": 2, "rooted": True}
        seeds = list(range(first, first + TOGETHER))
        for out in decode(base, [ROOTED] * TOGETHER, drafters=drafters, seeds=seeds, **how):
            counts_VV[tuple(out.tokens)] += 1
            kept += out.stats.accepted
    assert chi_square(counts_VV, joint(base, WARM)) > 1e-3
    assert chi_square(counts_VV, joint(base, Warp(2.0))) < 1e-4  # it can tell
    assert kept > DRAWN / 5 or not hasattr(anyone.kind, "gated") or not anyone.kind.gated
