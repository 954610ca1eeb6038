"""Does decoding with a drafter return the base's own tokens? Position by position, with near ties told apart.

Two correct fp32 forwards of different shape round differently, so where the base's two best logits are equal
up to rounding, either may win. At a difference the base is asked again in fp64, from the common prefix: it is
a *near tie* iff (top-1 minus the emitted token's logit) <= 1e-5 * max|logit|, else a *mismatch*. Decoding
then goes on from the common prefix and the reference's token, so later positions are tested too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

NEAR_TIE = 1e-5  # of the largest absolute logit
TOKENS_PER_NEAR_TIE = 10_000


@dataclass(frozen=True)
class Lossless:
    """Counts over prompts; `tokens` are the positions compared. Adds up."""

    prompts: int = 0
    tokens: int = 0
    mismatches: int = 0
    near_ties: int = 0

    def __add__(self, other: Lossless) -> Lossless:
        return Lossless(**{name: mine + vars(other)[name] for name, mine in vars(self).items()})

    @property
    def ok(self) -> bool:
        """No mismatch, and at most one near tie per full 10,000 tokens; fewer tokens than that may hold one,
        since a single near tie says nothing about a rate."""
        return self.mismatches == 0 and self.near_ties <= max(1, self.tokens // TOKENS_PER_NEAR_TIE)


@dataclass(frozen=True)
class Difference:
    """A token other than the reference's. prompt: which one, from 0; position: in the text, whose first token stands at
    0. expected, emitted: token ids, None where that text had ended already; then there are no logits. Logits are the
    base's in fp64 after the common prefix; gap: the largest less the emitted token's; relative: of the largest
    absolute logit."""

    prompt: int
    position: int
    expected: int | None
    emitted: int | None
    near_tie: bool = False
    expected_logit: float | None = None
    emitted_logit: float | None = None
    gap: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Compared:
    """The counts, and every difference that was counted. Adds up."""

    counts: Lossless = Lossless()
    differences: tuple[Difference, ...] = ()

    def __add__(self, other: Compared) -> Compared:
        return Compared(self.counts + other.counts, self.differences + other.differences)


def is_near_tie(logits_V: Tensor, emitted: int) -> bool:
    """Whether the base could as well have chosen `emitted`. Logits that are not finite never tie."""
    return _judged(logits_V, 0, 0, emitted, emitted).near_tie


def compare(
    prompt: Sequence[int],
    reference: Sequence[int],
    decode: Callable[[list[int], int], Sequence[int]],
    rescore: Callable[[list[int]], Tensor],
    *,
    max_new_tokens: int | None = None,
) -> Lossless:
    """The counts of `compared`, for one prompt."""
    return compared(prompt, reference, decode, rescore, max_new_tokens=max_new_tokens).counts


def compared(
    prompt: Sequence[int],
    reference: Sequence[int],
    decode: Callable[[list[int], int], Sequence[int]],
    rescore: Callable[[list[int]], Tensor],
    *,
    max_new_tokens: int | None = None,
    number: int = 0,
) -> Compared:
    """Compare decoding under test with the base's own tokens, for one prompt, the one of this number.

    reference: the new tokens of autoregressive decoding (not the prompt), at most `max_new_tokens` of them
    (default: as many as there are). decode(prefix, limit): up to `limit` new tokens after any prefix.
    rescore(prefix): fp64 logits [V] of the base for the token after `prefix`.
    Stopping before or after the reference does is a mismatch; so is going on where it stopped.
    """
    prefix, limit = list(prompt), len(reference) if max_new_tokens is None else max_new_tokens
    done = 0
    found: list[Difference] = []
    while done < len(reference):
        got = list(decode(prefix, limit - done))
        expected = list(reference[done:])
        same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        if same is None and len(got) == len(expected):
            break
        if same is None:  # one is the beginning of the other: somebody stopped where the other did not
            same = min(len(got), len(expected))
            said = (*expected[same : same + 1], None)[0], (*got[same : same + 1], None)[0]
            found.append(Difference(number, len(prefix) + same, *said))
        else:
            logits_V = rescore(prefix + expected[:same])
            found.append(_judged(logits_V, number, len(prefix) + same, expected[same], got[same]))
        prefix = prefix + expected[: same + 1]
        done += same + 1
    near_ties = sum(d.near_tie for d in found)
    counts = Lossless(1, max(len(reference), done), len(found) - near_ties, near_ties)
    return Compared(counts, tuple(found))


def _judged(logits_V: Tensor, number: int, position: int, expected: int, emitted: int) -> Difference:
    logits_V = logits_V.double()
    gap, largest = float(logits_V.max() - logits_V[emitted]), float(logits_V.abs().max())
    near_tie = isfinite(largest) and gap <= NEAR_TIE * largest
    logits = float(logits_V[expected]), float(logits_V[emitted])
    return Difference(number, position, expected, emitted, near_tie, *logits, gap, gap / largest if largest else 0.0)
