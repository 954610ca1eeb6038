"""What a primer gives and what it takes: its text against the base's own, time and arithmetic to the first token.

A primer is lossy, so it is judged by how well the base goes on from predicted keys and values. Every contender reads
the same text, a prompt and the base's own greedy continuation of it, and says of each token of the continuation how
likely it was and which it would have chosen. Beside each primer stands its auxiliary alone: what is worse than
letting the small model answer is worth nothing.

Time to first token is that of everything from the prompt's ids to the first new id, interleaved and the median of
its repeats. FLOPs are those of the matrix products of exactly that call, two per multiplication and addition; as
usual, attention counts all T x S pairs, though causal kernels skip half of them.

Shapes: T positions, N tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from draftsmith.contracts import KV, BaseView, Needs
from draftsmith.errors import ConfigError, DataError
from draftsmith.roles import Primer


class Primed(Primer, Protocol):
    """A primer with a language model of its own."""

    def auxiliary_logits(self, tokens_BT: Tensor, last: int) -> Tensor:
        """[B, last, V] of the token after each of the `last` last ones."""
        ...


@dataclass
class _Score:
    """Sums over the tokens of all continuations."""

    nats: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, logits_NV: Tensor, target_N: Tensor, base_N: Tensor) -> None:
        self.nats += float(F.cross_entropy(logits_NV.double(), target_N, reduction="sum"))
        self.agreed += int((logits_NV.argmax(-1) == base_N).sum())
        self.tokens += len(target_N)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens


@torch.no_grad()
def judge(
    base: BaseView,
    primers: Mapping[str, Primed],
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    lengths: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """{"base": …, "primers": {name: …}}, ready for JSON. continuations: the base's own greedy tokens, per prompt.
    lengths: prompt lengths to time, made of the prompts' tokens; seconds and flops are of one prompt.

    agreement: share of the continuations' tokens at which the best token is the base's own best, given the same text.
    over_base, flops_over_base: below 1 the first token comes sooner.
    """
    if not any(continuations):
        raise DataError("prompts: the base continued none of them; give others, or more new tokens")
    own, scores, alone = _Score(), {n: _Score() for n in primers}, {n: _Score() for n in primers}
    device = base.lm_head_weight.device
    for prompt, continuation in zip(prompts, continuations, strict=True):
        if not continuation:
            continue
        target_N = torch.tensor(list(continuation), device=device)
        base_NV = _told(base, None, prompt, continuation)
        best_N = base_NV.argmax(-1)
        own.add(base_NV, target_N, best_N)
        text_BT = torch.tensor([[*prompt, *continuation[:-1]]], device=device)
        for name, primer in primers.items():
            scores[name].add(_told(base, primer, prompt, continuation), target_N, best_N)
            alone[name].add(primer.auxiliary_logits(text_BT, len(target_N))[0], target_N, best_N)
    costs = {str(n): _costs(base, primers, _of_length(prompts, n, base), repeats) for n in lengths}
    return {
        "base": {
            "perplexity": own.perplexity,
            "tokens": own.tokens,
            "by_length": {length: found["base"] for length, found in costs.items()},
        },
        "primers": {
            name: {
                "lossy": True,
                "agreement": scores[name].agreement,
                "perplexity": scores[name].perplexity,
                "tokens": scores[name].tokens,
                "auxiliary": {"agreement": alone[name].agreement, "perplexity": alone[name].perplexity},
                "by_length": {length: found[name] for length, found in costs.items()},
            }
            for name in primers
        },
    }


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of this call, attention included."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the attention kernels of accelerators, but not that of the CPU.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _told(base: BaseView, primer: Primer | None, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """[N, V]: the base's logits of each token of the continuation. All but the prompt's last token are primed, or
    without a primer read by the base in a forward of their own, so that equal K/V give equal logits."""
    kv, device = base.new_kv(), base.lm_head_weight.device
    if len(prompt) > 1:
        before_BT = torch.tensor([list(prompt[:-1])], device=device)
        if primer is None:
            base.capture(Needs(frozenset({base.spec.num_layers})), before_BT, kv=kv)
        else:
            kv = primer.prime(base, before_BT)
    rest_BN = torch.tensor([[prompt[-1], *continuation[:-1]]], device=device)
    return base.lm_head(_read(base, rest_BN, kv))[0]


def _read(base: BaseView, tokens_BT: Tensor, kv: KV) -> Tensor:
    return cast(Tensor, base.capture(Needs(final=True), tokens_BT, kv=kv).final)


def _of_length(prompts: Sequence[Sequence[int]], length: int, base: BaseView) -> Tensor:
    """[1, length]: the prompts' tokens one after the other, again from the start where they do not suffice."""
    if not 2 <= length <= base.spec.max_positions:
        raise ConfigError(f"lengths: {length}; give 2 to {base.spec.max_positions}, the base's positions")
    ids = list(islice(cycle(chain.from_iterable(prompts)), length))
    return torch.tensor([ids], device=base.lm_head_weight.device)


def _costs(base: BaseView, primers: Mapping[str, Primed], prompt_BT: Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and FLOPs to the first token for "base" and every primer."""

    def by_base() -> int:
        return int(base.lm_head(_read(base, prompt_BT, base.new_kv())[:, -1:]).argmax())

    def primed(primer: Primed) -> Callable[[], int]:
        def work() -> int:
            kv = primer.prime(base, prompt_BT[:, :-1])
            return int(base.lm_head(_read(base, prompt_BT[:, -1:], kv)).argmax())

        return work

    def alone(primer: Primed) -> Callable[[], int]:
        return lambda: int(primer.auxiliary_logits(prompt_BT, 1).argmax())

    works = [by_base, *map(primed, primers.values()), *map(alone, primers.values())]
    counted = [flops(work) for work in works]  # the first calls, which warm up
    seconds = _medians(works, repeats)
    found: dict[str, dict[str, Any]] = {"base": {"seconds": seconds[0], "flops": counted[0]}}
    for i, name in enumerate(primers, start=1):
        found[name] = {
            "seconds": seconds[i],
            "over_base": seconds[i] / seconds[0],
            "flops": counted[i],
            "flops_over_base": counted[i] / counted[0],
            "auxiliary_seconds": seconds[i + len(primers)],
            "auxiliary_flops": counted[i + len(primers)],
        }
    return found


def _medians(works: Sequence[Callable[[], int]], repeats: int) -> list[float]:
    """Of each work's repeats, interleaved, nobody always after the same one; a work ends when its number is known, so
    that an accelerator has ended too."""
    times: list[list[float]] = [[] for _ in works]
    for again in range(repeats):
        for i in range(len(works)):
            which = (i + again) % len(works)
            began = time.perf_counter()
            works[which]()
            times[which].append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]
