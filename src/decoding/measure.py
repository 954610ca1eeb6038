"""Several ways to decode the same prompts, in turn and in one process, so that their ratios mean something.

Time on a shared machine is noisy: every contender decodes every prompt `repeats` times, interleaved, and
a prompt's time is its median, in CPU-seconds where one thread computes (costs.clock_of). Seconds are those of the whole
call, prefill included, for every contender.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding.costs import clock_of
from draftsmith.decoding.engine import Generation, decode, generate
from draftsmith.decoding.lossless import Lossless, compare
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.stats import Stats
from draftsmith.growth import Shape
from draftsmith.roles import Drafter, Gate

PAST = 16  # tokens of the base's text beyond the cut that an oracle may draft from

Make = Callable[[Sequence[int], Sequence[int]], Drafter | None]
"""(prompt, the base's own continuation) -> the drafter for this prompt; None decodes without one."""

MakeGate = Callable[[Sequence[int], Sequence[int]], Gate]


@dataclass(frozen=True)
class Contender:
    """gate: of this prompt, where there is one."""

    make: Make
    shape: Shape | None = None
    gate: MakeGate | None = None


@dataclass
class Result:
    """One contender over all prompts. tokens, each: per prompt. seconds: sum over batches of the median time; in the
    stats, the counts of one pass and the seconds of all."""

    tokens: list[list[int]] = field(default_factory=list)
    each: list[Stats] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stats(self) -> Stats:
        return sum(self.each, Stats())

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
    rules: Rules | None = None,
    seed: int = 0,
    batch_size: int = 1,
) -> dict[str, Result]:
    """Results of "autoregressive" (our engine without a drafter), the contenders and the outside generators.

    seed: of the first prompt's text; the next one's is one more, and so on.
    batch_size: so many prompts are decoded together, by everybody but the outside generators.
    """
    clock = clock_of(base.lm_head_weight.device)
    results = {name: Result() for name in ("autoregressive", *contenders, *outside)}
    limits: dict[str, Any] = {"eos_ids": eos_ids, "rules": rules or Rules()}
    names = list(results)

    def run(name: str, batch: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[tuple[list[int], Stats]]:
        if name in outside:
            return [(outside[name](prompt), Stats()) for prompt in batch]
        out = decoded(base, batch, contenders.get(name), texts, max_new_tokens, seeds, **limits)
        return [(g.tokens, g.stats) for g in out]

    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        seeds = [seed + first + b for b in range(len(batch))]  # or the prompts' texts would share their chance
        texts = references(base, batch, max_new_tokens, seeds, limits)
        if first == 0:  # everybody's first call warms up untimed
            for name in names:
                run(name, batch, texts)
        times: dict[str, list[float]] = {name: [] for name in results}
        for again in range(repeats):
            turn = (first // batch_size + again) % len(names)  # nobody always follows the same one
            for name in names[turn:] + names[:turn]:
                began = clock()
                out = run(name, batch, texts)
                times[name].append(clock() - began)
                result = results[name]
                if again == 0:
                    result.tokens += [tokens for tokens, _ in out]
                    result.each += [stats for _, stats in out]
                else:
                    for b, (_, stats) in enumerate(out):
                        result.each[first + b] = _with_time_of(result.each[first + b], stats)
        for name, result in results.items():
            result.seconds += statistics.median(times[name])
    return results


def decoded(
    base: BaseView,
    batch: Sequence[Sequence[int]],
    contender: Contender | None,
    texts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int],
    **limits: Any,
) -> list[Generation]:
    """The batch by this contender; texts: the base's own continuations, for whoever is told them."""
    told: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seeds": seeds, **limits}
    if contender is None:
        return decode(base, batch, **told)
    drafters = [contender.make(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
    if drafters[0] is None:
        return decode(base, batch, **told)
    gate = contender.gate
    gates = None if gate is None else [gate(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
    return decode(base, batch, drafters=drafters, gates=gates, shape=contender.shape, **told)  # type: ignore[arg-type]


def references(
    base: BaseView, batch: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int], limits: dict[str, Any]
) -> list[list[int]]:
    """The base's own continuations; of greedy ones what an oracle needs at the end too: some tokens past the cut."""
    found = [g.tokens for g in decoded(base, batch, None, [], max_new_tokens, seeds, **limits)]
    if not limits["rules"].greedy:
        return found
    for b, prompt in enumerate(batch):
        text = [*prompt, *found[b]]
        if len(text) <= base.spec.max_positions:
            found[b] = found[b] + generate(base, text, max_new_tokens=PAST).tokens
    return found


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
            return decoded(base, [prefix], contender, [[]], limit, [0], eos_ids=eos_ids, rules=Rules())[0].tokens

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
