"""The proof that a head changes nothing of what is decoded: greedy texts by their tokens, sampled ones by their counts.

Greedy: texts with the head are compared with references, and those of batches with those of every prompt alone
(lossless.py). Sampled: after fixed prefixes the next token, which comes from a verification step, is drawn many times
with the head and as often without it. Both counts must come from one distribution (two_sample), and each must fit the
base's exact one in fp64 (chi_square). Every draw has a seed of its own.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding import goodness, lossless
from draftsmith.decoding.engine import decode
from draftsmith.decoding.lossless import Compared
from draftsmith.decoding.measure import Contender, decoded
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import by_widths
from draftsmith.errors import ConfigError
from draftsmith.growth import Draws, Shape, Warp
from draftsmith.roles import Proposal, Verdict

TOGETHER = 64  # draws per batch
BRANCHES = by_widths([3, 2])  # where siblings are wanted and the head's own tree has none, or cannot be drawn
SPREAD = 0x9E3779B1  # odd, so that the seeds of 2^32 draws differ; the golden ratio's, so that they lie far apart

Exact = Callable[[Sequence[int], int], Tensor]
"""(tokens, first) -> the base's fp64 logits [A, V] after each of the tokens from number `first` on."""


@dataclass(frozen=True)
class CertificateConfig:
    """prefixes, draws: of the sampling test, `draws` with the head and as many without it after each prefix.
    batch_size: of the batches whose greedy texts are compared with those of single prompts. alpha: the chance that a
    right head fails the sampling test, all its parts together."""

    prefixes: int = 8
    draws: int = 512
    temperature: float = 1.0
    batch_size: int = 4
    alpha: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("prefixes", 1), ("draws", 50), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least {least}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: what is drawn needs one above 0")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha={self.alpha}: a probability between 0 and 1")


@dataclass(frozen=True)
class Greedy:
    """Prompts and how far they are gone on with; exact: the judge of near ties."""

    base: BaseView
    prompts: Sequence[Sequence[int]]
    exact: Exact
    max_new_tokens: int
    eos_ids: frozenset[int]

    def texts(self, contender: Contender | None, batch_size: int = 1) -> list[list[int]]:
        """The new tokens after every prompt."""
        found = []
        for first in range(0, len(self.prompts), batch_size):
            found += self._decoded(self.prompts[first : first + batch_size], contender, self.max_new_tokens)
        return found

    def compared(
        self,
        contender: Contender | None,
        texts: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        batch_size: int = 1,
    ) -> Compared:
        """What the contender emitted in batches of this size, against the references. After a difference it goes on
        from the common prefix, in the same company."""
        total = Compared()
        for n, (prompt, text, reference) in enumerate(zip(self.prompts, texts, references, strict=True)):
            first = n - n % batch_size
            beside = [p for i, p in enumerate(self.prompts[first : first + batch_size], first) if i != n]

            def go_on(
                prefix: list[int], limit: int, start: int = len(prompt), text: Any = text, beside: Any = beside
            ) -> Sequence[int]:
                return text if len(prefix) == start else self._decoded([prefix, *beside], contender, limit)[0]

            told: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "number": n}
            total += lossless.compared(prompt, reference, go_on, self._rescore, **told)
        return total

    def _rescore(self, prefix: list[int]) -> Tensor:
        return self.exact(prefix, len(prefix) - 1)[0]

    def _decoded(self, prompts: Sequence[Sequence[int]], contender: Contender | None, limit: int) -> list[list[int]]:
        texts: list[list[int]] = [[]] * len(prompts)
        out = decoded(
            self.base, prompts, contender, texts, limit, [0] * len(prompts), eos_ids=self.eos_ids, rules=Rules()
        )
        return [g.tokens for g in out]


@dataclass(frozen=True)
class Prefix:
    """tokens: a prompt and some of the base's own text, the root last. chances_V: of the next token, exactly; likely:
    the likeliest one; later_V: of the token after that, None where that would tell nothing."""

    prompt: int
    tokens: list[int]
    chances_V: Tensor
    likely: int
    later_V: Tensor | None


def prefixes(
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    exact: Exact,
    warp: Warp,
    settings: CertificateConfig,
    *,
    max_positions: int,
    eos_ids: frozenset[int],
) -> list[Prefix]:
    """Spread over the prompts and, in each one's text, where a chi-square of so many draws tells most: where most
    tokens are to be drawn often enough to be a cell. Every other one ends a token earlier, so that the telling token is
    the second, behind one that is often accepted. The base alone chooses them; no drafter has a say."""
    ends = [_end(prompt, text, max_positions, eos_ids) for prompt, text in zip(prompts, texts, strict=True)]
    usable = [n for n, end in enumerate(ends) if end]
    if not usable:
        raise ConfigError("certificate: every text ends at once, so there is no place to sample at; give other prompts")
    found: list[Prefix] = []
    for place in range(settings.prefixes):
        n = usable[place * len(usable) // settings.prefixes]
        text = [*prompts[n], *texts[n][: ends[n]]]
        chances_AV = warp.chances(exact(text, len(prompts[n])))
        order = _telling(chances_AV, settings.draws, place % 2).argsort(descending=True, stable=True).tolist()
        before = sum(p.prompt == n for p in found)
        at = order[before // 2 % len(order)]
        tokens, chances_V = text[: len(prompts[n]) + at + 1], chances_AV[at]
        likely = int(chances_V.argmax())
        later_V = warp.chances(exact([*tokens, likely], len(tokens)))[0]
        tells = int(_cells(later_V, settings.draws * float(chances_V[likely]))) > 1
        found.append(Prefix(n, tokens, chances_V, likely, later_V if tells else None))
    return found


def _telling(chances_AV: Tensor, draws: int, behind: int) -> Tensor:
    """[A]: how many cells so many draws will have, of the next token; behind=1: of the token after it, where the next
    is the text's own, the likeliest."""
    if not behind:
        return _cells(chances_AV, draws)
    often_A1 = chances_AV[:-1].max(-1, keepdim=True).values
    cells_A = _cells(chances_AV[1:], draws * often_A1)
    return torch.cat([cells_A, cells_A.new_zeros(1)])


def _cells(chances_AV: Tensor, draws: int | float | Tensor) -> Tensor:
    return (chances_AV * draws >= goodness.RARE).sum(-1)


def _end(prompt: Sequence[int], text: Sequence[int], max_positions: int, eos_ids: frozenset[int]) -> int:
    """How much of the text may be in a prefix: no token that ends it, and two more must find room."""
    own = len(text) - (bool(text) and text[-1] in eos_ids)
    return max(0, min(own, max_positions - len(prompt) - 2))


def ways(shape: Shape, warp: Warp) -> dict[str, tuple[Rules, Shape]]:
    """How a head with this tree can draft sampled texts: name -> (rules, tree)."""
    branching = BRANCHES.cut(shape.depth)
    own = shape.nodes > shape.depth + 1
    return {
        "best": (Rules(warp, "best"), shape),
        "iid": (Rules(warp, "iid"), shape if _drawn(shape, "iid", warp) else branching),
        "distinct": (Rules(warp, "distinct"), shape if own and _drawn(shape, "distinct", warp) else branching),
        "spectr": (Rules(warp, "iid", "spectr"), shape if own and _drawn(shape, "iid", warp) else branching),
    }


def _drawn(shape: Shape, draws: Draws, warp: Warp) -> bool:
    """Whether this kind of tree takes tokens drawn like that."""
    try:
        shape.grow(draws, warp, None)
    except ConfigError:
        return False
    return True


@dataclass
class Sample:
    """What was drawn after a prefix. first_V: counts of the next token; later_V: of the token after the likeliest one,
    where that came first. accepted: drafts kept in so many steps. drew: drafts were drawn, not chosen."""

    first_V: Tensor
    later_V: Tensor
    accepted: int = 0
    steps: int = 0
    drew: bool = False


def sample(
    base: BaseView,
    prefix: Prefix,
    contender: Contender | None,
    rules: Rules,
    seeds: Sequence[int],
) -> Sample:
    """One draw per seed. contender: None draws without drafts."""
    size = len(prefix.chances_V)
    found = Sample(*torch.zeros(2, size, dtype=torch.long))

    def watch(proposal: Proposal, verdict: Verdict) -> None:
        found.accepted, found.steps = found.accepted + verdict.accepted, found.steps + 1
        found.drew = found.drew or proposal.drawn_NV is not None

    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        told: dict[str, Any] = {"rules": rules, "seeds": some, "rooted": True, "watch": watch}
        told["max_new_tokens"] = 1 if prefix.later_V is None else 2
        if contender is not None:
            told |= {"shape": contender.shape, "drafters": [contender.make(prefix.tokens, []) for _ in some]}
            if contender.gate is not None:
                told["gates"] = [contender.gate(prefix.tokens, []) for _ in some]
        out = torch.tensor([g.tokens for g in decode(base, [prefix.tokens] * len(some), **told)])
        found.first_V += out[:, 0].bincount(minlength=size)
        if prefix.later_V is not None:
            found.later_V += out[out[:, 0] == prefix.likely, 1].bincount(minlength=size)
    return found


@dataclass(frozen=True)
class Fit:
    """Two tests of one token: the first after a prefix, or the second after the likeliest first. cells: that the exact
    distribution has, after pooling; one cell tells nothing. two_sample, exact: p-values, the former None of plain
    decoding itself."""

    prefix: int
    token: int
    draws: int
    cells: int
    two_sample: float | None
    exact: float


def fits(number: int, prefix: Prefix, drawn: Sample, plain: Sample | None) -> list[Fit]:
    """Whether what was drawn after this prefix, the one of this number, follows the base. plain: what was drawn without
    drafts, None where that is what is tested."""
    others = (None, None) if plain is None else (plain.first_V, plain.later_V)
    found = [_fit(number, 1, drawn.first_V, prefix.chances_V, others[0])]
    if prefix.later_V is not None:
        found.append(_fit(number, 2, drawn.later_V, prefix.later_V, others[1]))
    return found


def _fit(number: int, token: int, counts_V: Tensor, chances_V: Tensor, other_V: Tensor | None) -> Fit:
    chances_V, draws = chances_V.cpu(), int(counts_V.sum())
    if not draws:  # the first token never was the likeliest one, which its own test tells
        return Fit(number, token, 0, 1, None if other_V is None else 1.0, 1.0)
    cells = len(goodness.pooled(counts_V, chances_V)[0])
    two = None if other_V is None else goodness.two_sample(counts_V, other_V)
    return Fit(number, token, draws, cells, two, goodness.chi_square(counts_V, chances_V))


def seeds(first: int) -> Iterator[int]:
    """Numbers that all differ, 2^32 of them."""
    return ((first + n * SPREAD) % 2**32 for n in count())


@dataclass
class Sampling:
    """The sampling test of one base: the prefixes, what plain decoding draws after them, and which seeds are left."""

    base: BaseView
    places: list[Prefix]
    warp: Warp
    draws: int
    left: Iterator[int]

    def __post_init__(self) -> None:
        self.plain = [sample(self.base, p, None, Rules(self.warp), self._seeds()) for p in self.places]
        self.own = [fit for n, p in enumerate(self.places) for fit in fits(n, p, self.plain[n], None)]

    def of(self, contender: Contender) -> dict[str, dict[str, Any]]:
        """way -> its tree, accepted drafts per step, and fits; of every way that the contender has."""
        assert contender.shape is not None
        found: dict[str, dict[str, Any]] = {}
        for way, (rules, shape) in ways(contender.shape, self.warp).items():
            mine = Contender(contender.make, shape, contender.gate)
            drawn = [sample(self.base, p, mine, rules, self._seeds()) for p in self.places]
            if way != "best" and not any(d.drew for d in drawn):
                continue  # a drafter that cannot draw chooses, which has been tested
            told = [fit for n, p in enumerate(self.places) for fit in fits(n, p, drawn[n], self.plain[n])]
            kept = sum(d.accepted for d in drawn) / max(sum(d.steps for d in drawn), 1)
            found[way] = {"shape": shape, "accepted": kept, "fits": told}
        return found

    def _seeds(self) -> list[int]:
        return list(islice(self.left, self.draws))


def rejected(told: Sequence[Fit], alpha: float) -> list[bool]:
    """Which of these fail, all of their p-values being held against alpha together (Holm)."""
    tests = [(n, p) for n, fit in enumerate(told) for p in (fit.two_sample, fit.exact) if p is not None]
    verdicts = goodness.holm([p for _, p in tests], alpha)
    failing = {n for (n, _), fails in zip(tests, verdicts, strict=True) if fails}
    return [n in failing for n in range(len(told))]
