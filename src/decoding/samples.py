"""What a reader of one decoded text wants to see: token by token, what was drafted and kept, what the base said itself,
and what was drafted in vain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.contracts import BaseView
from draftsmith.decoding import measure
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.rules import Rules
from draftsmith.roles import Proposal, Verdict

PROMPTS = 3  # shown; a reader looks at one


@dataclass(frozen=True)
class Step:
    """Token ids. own: the base's token after the accepted ones; None where the text was cut before it. rejected: the
    best-ranked drafts below the last accepted one, a path of the drafted tree."""

    accepted: list[int]
    own: int | None
    rejected: list[int]


def steps_of(
    base: BaseView,
    prompt: Sequence[int],
    contender: Contender,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    rules: Rules,
    seed: int = 0,
) -> list[Step]:
    """The text as it was measured, decoded once more and watched. The first entry is prefill's token, which no step
    gave. Where the text ends inside a step, what verification kept beyond the end is left out."""
    limits: dict[str, Any] = {"eos_ids": eos_ids, "rules": rules}
    texts = measure.references(base, [prompt], max_new_tokens, [seed], limits)
    seen: list[tuple[list[int], list[int], Verdict]] = []

    def watch(proposal: Proposal, verdict: Verdict) -> None:
        seen.append((proposal.tokens_N.tolist(), proposal.parents_N.tolist(), verdict))

    out = measure.decoded(base, [prompt], contender, texts, max_new_tokens, [seed], watch=watch, **limits)[0]
    steps, left = [Step([], out.tokens[0], [])], len(out.tokens) - 1
    for tokens, parents, verdict in seen:
        path = verdict.path_A.tolist()
        accepted = [tokens[n] for n in path[1:]][:left]
        left -= len(accepted)
        own = verdict.bonus if left else None
        below = _best_below(tokens, parents, path[-1]) if left else []
        left -= own is not None
        steps.append(Step(accepted, own, below))
    return steps


def _best_below(tokens: Sequence[int], parents: Sequence[int], node: int) -> list[int]:
    """The path from a node down that takes every node's first child: siblings stand in the drafter's order."""
    path: list[int] = []
    while True:
        children = [n for n in range(node + 1, len(parents)) if parents[n] == node]
        if not children:
            return path
        node = children[0]
        path.append(tokens[node])


def pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str], start: int = 0) -> list[str]:
    """The text of ids[start:], a piece for each id, so that the pieces of all ids add up to decode(ids). An id that
    ends inside a character gives what is whole before it; the character goes to the id that completes it."""
    if start >= len(ids):
        return []
    whole = decode(ids)
    ends = [0] if start == 0 else [_agree(decode(ids[:start]), whole)]
    for n in range(start + 1, len(ids)):
        ends.append(max(ends[-1], _agree(decode(ids[:n]), whole)))
    ends.append(len(whole))
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def _agree(one: str, other: str) -> int:
    """The length of their common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def told(steps: Sequence[Step], decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    """The steps as text. Rejected drafts are read as going on from what was accepted before them."""
    ids = [n for s in steps for n in (*s.accepted, *([] if s.own is None else [s.own]))]
    said, at, found = pieces(ids, decode), 0, []
    for s in steps:
        behind = at + len(s.accepted)
        own = "" if s.own is None else said[behind]
        refused = pieces([*ids[:behind], *s.rejected], decode, behind) if s.rejected else []
        found.append({"accepted": said[at:behind], "own": own, "rejected": refused})
        at = behind + (s.own is not None)
    return found
