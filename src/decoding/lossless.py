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


def is_near_tie(logits_V: Tensor, emitted: int) -> bool:
    """Whether the base could as well have chosen `emitted`. Logits that are not finite never tie."""
    logits_V = logits_V.double()
    gap, largest = float(logits_V.max() - logits_V[emitted]), float(logits_V.abs().max())
    return isfinite(largest) and gap <= NEAR_TIE * largest


def compare(
    prompt: Sequence[int],
    reference: Sequence[int],
    decode: Callable[[list[int], int], Sequence[int]],
    rescore: Callable[[list[int]], Tensor],
    *,
    max_new_tokens: int | None = None,
) -> Lossless:
    """Compare decoding under test with the base's own tokens, for one prompt.

    reference: the new tokens of autoregressive decoding (not the prompt), at most `max_new_tokens` of them
    (default: as many as there are). decode(prefix, limit): up to `limit` new tokens after any prefix.
    rescore(prefix): fp64 logits [V] of the base for the token after `prefix`.
    Stopping before or after the reference does is a mismatch; so is going on where it stopped.
    """
    prefix, limit = list(prompt), len(reference) if max_new_tokens is None else max_new_tokens
    done = mismatches = near_ties = 0
    while done < len(reference):
        got = list(decode(prefix, limit - done))
        expected = list(reference[done:])
        same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        if same is None and len(got) == len(expected):
            break
        if same is None:  # one is the beginning of the other: somebody stopped where the other did not
            mismatches += 1
            same = min(len(got), len(expected))
        elif is_near_tie(rescore(prefix + expected[:same]), got[same]):
            near_ties += 1
        else:
            mismatches += 1
        prefix = prefix + expected[: same + 1]
        done += same + 1
    return Lossless(1, max(len(reference), done), mismatches, near_ties)
