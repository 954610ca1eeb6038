"""Ours beside torch's own linear_cross_entropy and the plain one: CPU-seconds of one thread, interleaved, medians.

Run it with draftsmith's python: scripts/peers/linear_cross_entropies.py [rows hidden vocabulary].
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.losses import linear_cross_entropy

REPEATS = 7


def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), target, reduction="sum")


def chunked(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    return F.linear_cross_entropy(x, w, target, reduction="sum", options=LinearCrossEntropyOptions())


def ours(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, target, measure=False)[0]


def seconds(work: Callable[[Tensor, Tensor, Tensor], Tensor], given: tuple[Tensor, ...], frozen: bool) -> float:
    x, w, target = given
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
    began = time.process_time()
    work(x, w, target).backward()
    return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    rows, size, vocabulary = map(int, sys.argv[1:] or (1400, 256, 8192))
    g = torch.Generator().manual_seed(0)
    given = (
        torch.randn(rows, size, generator=g),
        torch.randn(vocabulary, size, generator=g) / size**0.5,
        torch.randint(vocabulary, (rows,), generator=g),
    )
    ways = {"plain": plain, "torch, chunked": chunked, "ours": ours}
    losses = {name: float(work(*given)) for name, work in ways.items()}
    worst = max(abs(v / losses["plain"] - 1) for v in losses.values())
    print(f"{rows} rows, {size} wide, {vocabulary} tokens, fp32; losses within {worst:.1e}")
    for frozen in (True, False):
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS + 1):
            for name in random.sample(list(ways), len(ways)):
                found[name].append(seconds(ways[name], given, frozen))
        told = ", ".join(f"{name} {1e3 * statistics.median(times[1:]):.0f} ms" for name, times in found.items())
        print(f"{'frozen' if frozen else 'trained'} weight: {told}")


if __name__ == "__main__":
    main()
