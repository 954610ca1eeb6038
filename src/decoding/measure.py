"""Several ways to decode the same prompts, in turn and in one process, so that their ratios mean something.

Wall time on a shared machine is noisy: every contender decodes every prompt `repeats` times, interleaved, and
a prompt's time is its median. Seconds are those of the whole call, prefill included, for every contender.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding.engine import generate
from draftsmith.decoding.lossless import Lossless, compare
from draftsmith.decoding.stats import Stats
from draftsmith.roles import Drafter, Gate, TreeShape

PAST = 16  # tokens of the base's text beyond the cut that an oracle may draft from

Make = Callable[[Sequence[int], Sequence[int]], Drafter | None]
"""(prompt, the base's own continuation) -> the drafter for this prompt; None decodes without one."""

MakeGate = Callable[[Sequence[int], Sequence[int]], Gate]


@dataclass(frozen=True)
class Contender:
    """gate: of this prompt, where there is one."""

    make: Make
    shape: TreeShape | None = None
    gate: MakeGate | None = None


@dataclass
class Result:
    """One contender over all prompts. tokens: per prompt. seconds: sum over prompts of the median time."""

    tokens: list[list[int]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-12)


def measure(
    base: BaseView,
    prompts: Sequence[Sequence[int]],
    contenders: Mapping[str, Contender],
    outside: Mapping[str, Callable[[Sequence[int]], list[int]]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    repeats: int,
    temperature: float = 0.0,
    seed: int = 0,
    copies: int = 1,
) -> dict[str, Result]:
    """Results of "autoregressive" (our engine without a drafter), the contenders and the outside generators.

    copies: our engine decodes so many equal rows together; tokens and counts are one row's, seconds those of all.
    Equal rows end together and accept alike, so this is the most that a batch of this size can gain: in a ragged
    one, rows wait for each other.

    Timing parts in a result's stats are sums over all repeats; counts are those of one pass.
    """
    results = {name: Result() for name in ("autoregressive", *contenders, *outside)}

    def decode(prompt: Sequence[int], contender: Contender | None, reference: Sequence[int]) -> Any:
        drafter = contender.make(prompt, reference) if contender else None
        shape = contender.shape if contender and drafter else None
        gate = contender.gate(prompt, reference) if contender and contender.gate else None
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
        text: dict[str, Any] = {"temperature": temperature, "seed": seed}
        return generate(base, prompt, drafter=drafter, shape=shape, gate=gate, copies=copies, **limits, **text)

    names = list(results)
    for number, prompt in enumerate(prompts):
        reference: list[int] = decode(prompt, None, []).tokens
        if number == 0:  # everybody's first call warms up untimed
            for name in names:
                outside[name](prompt) if name in outside else decode(prompt, contenders.get(name), reference)
        text = [*prompt, *reference]  # what an oracle needs at the end: some tokens past the cut
        if not temperature and len(text) <= base.spec.max_positions:
            reference = reference + generate(base, text, max_new_tokens=PAST).tokens
        times: dict[str, list[float]] = {name: [] for name in results}
        for again in range(repeats):
            turn = (number + again) % len(names)  # nobody always follows the same one
            for name in names[turn:] + names[:turn]:
                result = results[name]
                began = time.perf_counter()
                if name in outside:
                    tokens, stats = outside[name](prompt), Stats()
                else:
                    out = decode(prompt, contenders.get(name), reference)
                    tokens, stats = out.tokens, out.stats
                times[name].append(time.perf_counter() - began)
                if again == 0:
                    result.tokens.append(tokens)
                    result.stats += stats
                else:
                    result.stats = _with_time_of(result.stats, stats)
        for name, result in results.items():
            result.seconds += statistics.median(times[name])
    return results


def lossless(
    base: BaseView,
    prompts: Sequence[Sequence[int]],
    contender: Contender,
    tokens: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    rescore: Callable[[list[int]], Tensor],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
) -> Lossless:
    """Compares what a contender emitted (`tokens`, per prompt) with the references, position by position;
    after a difference it decodes on from the common prefix."""
    total = Lossless()
    for prompt, first, reference in zip(prompts, tokens, references, strict=True):

        def decode(
            prefix: list[int], limit: int, prompt: Sequence[int] = prompt, first: Sequence[int] = first
        ) -> Sequence[int]:
            if len(prefix) == len(prompt):
                return first
            gate = contender.gate(prefix, []) if contender.gate else None
            told: dict[str, Any] = {"max_new_tokens": limit, "eos_ids": eos_ids}
            return generate(
                base, prefix, drafter=contender.make(prefix, []), shape=contender.shape, gate=gate, **told
            ).tokens

        total += compare(prompt, reference, decode, rescore, max_new_tokens=max_new_tokens)
    return total


def terms(own: Stats, plain: Stats, repeats: int) -> dict[str, float]:
    """What a speedup is made of, in units of one plain verification forward of one token, c(1):

    verify_cost c(q)/c(1), draft_cost, overhead (the rest of a step), plain_overhead (the same of a step
    without a drafter), and predicted_speedup = tau (1 + plain_overhead) / (verify + draft + overhead).
    """
    unit = plain.verify_seconds_per_step / repeats
    if not unit or not own.steps:
        return {}
    verify = own.verify_seconds_per_step / repeats / unit
    draft = own.draft_seconds_per_step / repeats / unit
    overhead = own.other_seconds_per_step / repeats / unit
    plain_rest = (plain.draft_seconds_per_step + plain.other_seconds_per_step) / repeats / unit
    return {
        "tokens_per_step": own.tokens_per_step,
        "verify_cost": verify,
        "draft_cost": draft,
        "overhead": overhead,
        "plain_overhead": plain_rest,
        "plain_forward_seconds": unit,
        "predicted_speedup": own.tokens_per_step * (1 + plain_rest) / (verify + draft + overhead),
    }


def distinct(tokens: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of a text's n-grams that are distinct in it, averaged over texts: near 0 where text loops, and any
    look-up drafts well."""
    grams = [[tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in tokens if len(t) >= n]
    return statistics.mean(len(set(g)) / len(g) for g in grams) if grams else 1.0


def _with_time_of(counts: Stats, timed: Stats) -> Stats:
    """`counts`, with the seconds of another pass over the same work added."""
    seconds = {k: v + vars(timed)[k] for k, v in vars(counts).items() if k.endswith("_seconds")}
    return Stats(**{**vars(counts), **seconds})
