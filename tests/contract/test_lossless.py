"""Every drafter, trained or not, leaves the base's text as it is: greedy and sampled, in chains and in trees, rows alone
and together, on two families. Drafters are found, not listed (conftest.py).

Chosen drafts leave every token as it is, with a temperature too, since a seed decides the text. Drawn drafts are
another text of the same distribution: near no temperature it is the greedy one; at another a row has the same alone and
in a batch; and over seeds the tokens are distributed as the base's own in fp64 say.

Memory that nobody wrote to holds NaN here, as it may anywhere.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import Generation, decode
from draftsmith.decoding.goodness import chi_square
from draftsmith.decoding.rules import Rules
from draftsmith.growth import Warp

FAMILIES = ["llama", "mistral"]  # mistral with a window shorter than the texts
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [5, 2], list(range(20, 35))]
SEEDS = [11, 12, 13, 14]
COUNT = 24
GREEDY, SHARP = Rules(), 1e-6
CHOSEN = {"greedy": GREEDY, "sampled": Rules(Warp(0.8), "best")}
DRAWN = {"iid": "iid", "distinct": "distinct"}
SHAPES = {"chain": tree.TreeSpec("chain", depth=3), "tree": tree.TreeSpec("static", paths=[[0], [1], [2], [0, 0], [1, 0], [1, 1], [1, 0, 0]])}
GROWING = [tree.TreeSpec(kind, depth=4, nodes=8, top_k=3, width=2) for kind in ("eagle2", "dyspec", "beam")]
JOINT = 480  # rows of a distribution


@pytest.fixture(scope="module", autouse=True)
def poisoned() -> Iterator[None]:
    torch._C._set_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory does the rest
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def answers() -> Callable[..., list[list[int]]]:
    """answers(base, rules): what the base says without any drafter."""

    @functools.cache
    def of(base: Any, rules: Rules) -> list[list[int]]:
        return [out.tokens for out in decode(base, PROMPTS, rules=rules, seeds=SEEDS, max_new_tokens=COUNT)]

    return of


@pytest.fixture(scope="module")
def run(made: Any, answers: Any) -> Callable[..., list[Generation]]:
    """run(anyone, family, spec, rules, rows): PROMPTS with a drafter, so many of them together."""

    def of(anyone: Any, family: str, spec: Any, rules: Rules, rows: int) -> list[Generation]:
        base, drafter = made(anyone, family)
        texts = [[*p, *a] for p, a in zip(PROMPTS, answers(base, GREEDY), strict=True)]
        drafters = [drafter(text, texts) for text in texts]
        found = []
        for first in range(0, len(PROMPTS), rows):
            these = slice(first, first + rows)
            how = {"rules": rules, "seeds": SEEDS[these], "shape": spec.shape(drafters[0].max_depth)}
            found += decode(base, PROMPTS[these], drafters=drafters[these], max_new_tokens=COUNT, **how)
        return found

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bases_have_something_to_say(family: str, spoken: Any, answers: Any) -> None:
    """And the engine's greedy tokens are those of transformers' generate, with an adapter too."""
    for adapted in (False, True):
        base = spoken(family, adapted)
        assert answers(base, GREEDY) == base.generate(PROMPTS, max_new_tokens=COUNT, batch_size=1)
        for rules in CHOSEN.values():
            assert len({token for answer in answers(base, rules) for token in answer}) >= 7


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", CHOSEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_drafts_leave_every_token_as_it_is(
    anyone: Any, family: str, rules: str, shape: str, rows: int, run: Any, made: Any, answers: Any
) -> None:
    found = run(anyone, family, SHAPES[shape], CHOSEN[rules], rows)
    assert [out.tokens for out in found] == answers(made(anyone, family)[0], CHOSEN[rules])
    kept = [k for out in found for k in out.stats.kept]
    assert max(kept) > 0, "no draft was right: nothing was put to the test"
    assert min(kept) == 0 or anyone.name == "Oracle"
