"""What a piece of work allocates, step by step, and what that would be at other sizes.

The work is done once in small and once more with each size doubled. As every tensor's bytes are a product of sizes (or
grow with one by a straight line, as T + 1 does), the runs tell how each of them grows, and the peak of the large work
follows from the order in which the small one allocates and lets go.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

POSITIONS = ("T", "B")  # sizes that say how many positions a batch has
VOCABULARIES = ("V", "U")
MATMULS = {"aten.mm": (0, 1), "aten.addmm": (1, 2), "aten.bmm": (0, 1)}  # operation -> which arguments are multiplied


class Unset(TorchFunctionMode):
    """Modules made inside keep whatever their memory held; on the meta device, random values would be imported for a
    second and then not drawn."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


@dataclass
class Trace(TorchDispatchMode):
    """Records allocations, releases and matrix products while it is entered. known: what is there already.

    nbytes: of allocation n; chunked: whether losses.py made it, whose logits exist a few rows at a time. events: n + 1
    where allocation n began, -(n + 1) where it ended. flops: of every matrix product.
    """

    known: Iterable[torch.Tensor] = ()
    nbytes: list[int] = field(default_factory=list)
    chunked: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._live = {t.untyped_storage()._cdata: -1 for t in self.known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self._add(t)
        factors = MATMULS.get(str(func).removesuffix(".default"))
        if factors is not None:
            one, two = (args[i] for i in factors)
            self.flops.append(2 * one.numel() * two.shape[-1])
        return out

    def _add(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, number = storage._cdata, len(self.nbytes)
        if key in self._live or not storage.nbytes():
            return
        self._live[key] = number
        self.nbytes.append(storage.nbytes())
        self.chunked.append(t.dtype.itemsize if _in_losses() else 0)
        self.events.append(number + 1)

        def gone() -> None:
            if self._live.get(key) == number:
                del self._live[key]
                self.events.append(-number - 1)

        weakref.finalize(storage, gone)


def _in_losses() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith("losses.py"):
        frame = frame.f_back
    return frame is not None


@dataclass(frozen=True)
class Estimate:
    """At the peak, in bytes: gradients of weights, what is kept for the backward pass and what else positions need,
    and the chunk of logits. flops: of all matrix products."""

    gradients: float
    activations: float
    logits: float
    flops: float

    @property
    def peak(self) -> float:
        return self.gradients + self.activations + self.logits


def estimated(
    work: Callable[[Mapping[str, int]], Trace],
    small: Mapping[str, int],
    large: Mapping[str, int],
    chunk: int | None,
) -> Estimate:
    """The peak of work(large), from work(small) and from work with one size doubled at a time. chunk: rows of
    logits in one piece, of which work has several then; None: the pieces grow with the positions."""
    base = work(small)
    grown = {name: work({**small, name: 2 * size}) for name, size in small.items()}
    for name, run in grown.items():
        assert len(run.nbytes) == len(base.nbytes), f"the work has other steps at twice {name}"
    by = {name: large[name] / small[name] for name in small}
    parts, sizes = [], []
    for n, nbytes in enumerate(base.nbytes):
        ratios = {name: run.nbytes[n] / nbytes for name, run in grown.items()}
        size = nbytes * math.prod(_growth(ratios[name], by[name]) for name in small)
        positions = any(ratios[name] > 1.01 for name in POSITIONS)
        vocabulary = [name for name in VOCABULARIES if ratios.get(name, 1) > 1.5]
        logits = positions and bool(vocabulary) and base.chunked[n]
        if logits and chunk is not None:
            size = chunk * large[vocabulary[0]] * base.chunked[n]
        parts.append("logits" if logits else "activations" if positions else "gradients")
        sizes.append(size)
    flops = sum(
        own * math.prod(_growth(run.flops[n] / own, by[name]) for name, run in grown.items())
        for n, own in enumerate(base.flops)
        if own
    )
    return Estimate(**_at_peak(base.events, sizes, parts), flops=flops)


def _growth(ratio: float, by: float) -> float:
    """What a size that doubling makes `ratio` times as large becomes at `by` times."""
    return 1 + (ratio - 1) * (by - 1) if 1 <= ratio <= 2.01 else by ** math.log2(ratio)


def _at_peak(events: Iterable[int], sizes: list[float], parts: list[str]) -> dict[str, float]:
    now = dict.fromkeys(("gradients", "activations", "logits"), 0.0)
    best = dict(now)
    for event in events:
        n = abs(event) - 1
        now[parts[n]] += sizes[n] if event > 0 else -sizes[n]
        if sum(now.values()) > sum(best.values()):
            best = dict(now)
    return best
