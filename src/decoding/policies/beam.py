"""RSD-S's tree (Jeon et al. 2024, arXiv 2402.14160): a beam of `width` nodes per depth.

Drawn, it is stochastic beam search (Kool et al. 2019, arXiv 1903.06059): every node carries the log-probability of its
path with Gumbel noise, its children's noise is conditioned so that the largest of them has their parent's value, and
the `width` largest of a depth stay. Siblings, in the order of their values, are draws without replacement; how many of
them stay depends on no token that comes after. Without drawing it is plain beam search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.decoding.policies.by_probability import log_chances
from draftsmith.decoding.policies.unrolled import Unrolled, largest
from draftsmith.errors import ConfigError
from draftsmith.growth import Draws, Growing, Picked, Warp, best, gumbel, without_earlier


@dataclass(frozen=True)
class Beam:
    width: int
    depth: int

    @property
    def nodes(self) -> int:
        return 1 + self.width * self.depth

    drafted = nodes

    @property
    def drawable(self) -> frozenset[str]:
        return frozenset({"distinct"})

    def cut(self, depth: int) -> Beam:
        return replace(self, depth=min(depth, self.depth))

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        if draws == "iid":
            raise ConfigError("decoding.drafts=iid: tree=beam draws without replacement; give drafts=distinct or best")
        return _Growing(self, draws, warp, generator)


class _Growing(Unrolled):
    def __init__(self, shape: Beam, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> None:
        super().__init__(shape.depth)
        self.shape, self.draws, self.warp, self.generator = shape, draws, warp, generator
        self.logs_A: Tensor | None = None  # of the path's probability; noisy_A: the same with noise

    def next(self, logits_AV: Tensor) -> Picked | None:
        if not self.left:
            return None
        width = min(self.shape.width, logits_AV.shape[1])
        drawn_CV = None
        if self.draws:
            chances_AV = self.warp.chances(logits_AV)
            if self.logs_A is None:
                self.logs_A = self.noisy_A = chances_AV.new_zeros(len(chances_AV))
            logs_AV = chances_AV.log() + self.logs_A[:, None]
            noisy_AV = conditioned(logs_AV + gumbel(logs_AV.shape, logs_AV, self.generator), self.noisy_A)
            noisy_AR, columns_AR = noisy_AV.topk(width, dim=-1)
            logs_AR = logs_AV.gather(1, columns_AR)
        else:
            columns_AR = best(logits_AV, width)
            above_A = logits_AV.new_zeros(len(logits_AV), dtype=torch.float32) if self.logs_A is None else self.logs_A
            noisy_AR = logs_AR = log_chances(logits_AV, columns_AR) + above_A[:, None]
        stays_C = largest(noisy_AR.flatten(), self.shape.width)
        stays_C = stays_C[logs_AR.flatten()[stays_C] > float("-inf")]
        if not len(stays_C):
            return None
        of_C = stays_C // width
        if self.draws:
            drawn_CV = without_earlier(chances_AV, columns_AR, of_C, stays_C % width)
        expanded_A = torch.arange(len(stays_C) if self.left > 1 else 0, device=of_C.device)
        self.logs_A, self.noisy_A = logs_AR.flatten()[stays_C], noisy_AR.flatten()[stays_C]
        return Picked(self.add(of_C, expanded_A), columns_AR.flatten()[stays_C], drawn_CV)

    def kept(self, count: int) -> Tensor | None:
        return None


def conditioned(noisy_AV: Tensor, largest_A: Tensor) -> Tensor:
    """The values moved so that each row's largest is largest_A, their order kept: Gumbels given their maximum
    (Kool et al. 2019, appendix B.3)."""
    top_A1 = noisy_AV.max(-1, keepdim=True).values
    gap_AV = largest_A[:, None] - noisy_AV + torch.log1p(-(noisy_AV - top_A1).exp())
    moved_AV = largest_A[:, None] - gap_AV.clamp(min=0) - torch.log1p((-gap_AV.abs()).exp())
    return torch.where(noisy_AV == top_A1, largest_A[:, None], moved_AV)
