"""EAGLE-2's dynamic tree (Li et al. 2024, arXiv 2406.16858): the nodes that the drafter holds for likeliest.

At every depth the `top_k` nodes of the largest cumulative probability are asked for their `top_k` best next tokens
each; of everything drafted, the `nodes` of the largest cumulative probability are proposed. A node is never likelier
than its parent, so the proposal is a tree, and the smaller of two of them is part of the larger.

Deviation: a level leaves out at once what `nodes` drafted ones are likelier than, since it cannot be proposed.
Tokens are the best ones, so a text with a temperature is verified as any chosen tree is; they are not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftsmith.decoding.policies.unrolled import Unrolled, largest
from draftsmith.errors import ConfigError
from draftsmith.growth import Draws, Growing, Picked, Warp, best


@dataclass(frozen=True)
class ByProbability:
    """nodes: of a proposal, the root included."""

    nodes: int
    depth: int
    top_k: int = 10

    @property
    def drafted(self) -> int:
        return 1 + (self.nodes - 1) * self.depth

    @property
    def drawable(self) -> frozenset[str]:
        return frozenset()

    def cut(self, depth: int) -> ByProbability:
        return replace(self, depth=min(depth, self.depth))

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        if draws is not None:
            raise ConfigError(
                f"decoding.drafts={draws}: tree=eagle2 takes the best tokens; give drafts=best, or dyspec"
            )
        return _Growing(self)


class _Growing(Unrolled):
    def __init__(self, shape: ByProbability) -> None:
        super().__init__(shape.depth)
        self.shape = shape
        self.logs: list[Tensor] = []  # log of the cumulative probability, level by level

    def next(self, logits_AV: Tensor) -> Picked | None:
        if not self.left:
            return None
        top_k, limit = min(self.shape.top_k, logits_AV.shape[1]), self.shape.nodes - 1
        if not self.logs:
            self.above_A = logits_AV.new_zeros(len(logits_AV), dtype=torch.float32)
        columns_AR = best(logits_AV, top_k)
        logs_AR = log_chances(logits_AV, columns_AR) + self.above_A[:, None]
        logs_P = logs_AR.flatten()
        before_P = torch.cat([*self.logs, logs_P])
        stays_C = largest(before_P, limit)
        stays_C = stays_C[stays_C >= len(before_P) - len(logs_P)] - (len(before_P) - len(logs_P))
        if not len(stays_C):
            return None
        logs_C = logs_P[stays_C]
        expanded_A = largest(logs_C, self.shape.top_k) if self.left > 1 else stays_C[:0]
        self.logs.append(logs_C)
        self.above_A = logs_C[expanded_A]
        of_C = stays_C // top_k
        return Picked(self.add(of_C, expanded_A), columns_AR.flatten()[stays_C])

    def kept(self, count: int) -> Tensor | None:
        logs_N = torch.cat([self.logs[0].new_zeros(1), *self.logs])[:count] if self.logs else torch.zeros(1)
        return None if count <= self.shape.nodes else largest(logs_N, self.shape.nodes)


def log_chances(logits_AV: Tensor, columns_AR: Tensor) -> Tensor:
    """[A, R] log-probabilities of these columns, fp32; of rows that are one row in memory only one is worked out."""
    one = len(logits_AV) > 1 and logits_AV.stride(0) == 0
    logits = (logits_AV[:1] if one else logits_AV).float()
    columns = columns_AR[:1] if one else columns_AR
    logs = (logits.gather(1, columns) - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0)
    return logs.expand(len(logits_AV), -1) if one else logs
