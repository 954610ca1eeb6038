"""DySpec's greedy expansion (Xiong et al. 2024, arXiv 2410.11744): the `nodes` slots that are likeliest to be reached.

Below a node that is reached with probability v, the first slot is tried with probability v, the second if the first was
refused, and so on: slot i with v (1 - the probability of the tokens in the slots before it), and its own token is
accepted with v q(token). The tree takes slots in the order of these values until it has `nodes`. Tokens are the
best ones, or drawn without replacement; whether a slot is in the tree never depends on the token in it.

Deviation: the paper asks the drafter node by node from a heap; here a whole level is asked at once, less what can no
longer be among the `nodes` largest, and the tree is cut to those at the end: the same tree, fewer forwards, each wider.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.decoding.policies.unrolled import Unrolled, largest
from draftsmith.errors import ConfigError
from draftsmith.growth import Draws, Growing, Picked, Warp, best, scores, without_earlier


@dataclass(frozen=True)
class DySpec:
    """nodes: of a proposal, the root included. siblings: at most so many below one node."""

    nodes: int
    depth: int
    siblings: int = 10

    @property
    def drafted(self) -> int:
        return 1 + (self.nodes - 1) * self.depth

    @property
    def drawable(self) -> frozenset[str]:
        return frozenset({"distinct"})

    def cut(self, depth: int) -> DySpec:
        return replace(self, depth=min(depth, self.depth))

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        if draws == "iid":
            raise ConfigError(
                "decoding.drafts=iid: tree=dyspec draws without replacement; give drafts=distinct or best"
            )
        return _Growing(self, draws, warp, generator)


class _Growing(Unrolled):
    def __init__(self, shape: DySpec, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> None:
        super().__init__(shape.depth)
        self.shape, self.draws, self.warp, self.generator = shape, draws, warp, generator
        self.slots: list[Tensor] = []  # value of every slot so far, level by level

    def next(self, logits_AV: Tensor) -> Picked | None:
        if not self.left:
            return None
        siblings, limit = min(self.shape.siblings, logits_AV.shape[1]), self.shape.nodes - 1
        chances_AV = self.warp.chances(logits_AV) if self.draws else logits_AV.double().softmax(-1)
        if not self.slots:
            self.reached_A = chances_AV.new_ones(len(chances_AV))
        if self.draws:
            columns_AR = scores(chances_AV, self.generator).topk(siblings, dim=-1).indices
        else:
            columns_AR = best(logits_AV, siblings)
        own_AR = chances_AV.gather(1, columns_AR)
        # of the tokens before each: to subtract its own again would leave a trace of it in the last bit
        earlier_AR = F.pad(own_AR.cumsum(1)[:, :-1], (1, 0))
        slots_AR = self.reached_A[:, None] * (1 - earlier_AR).clamp(min=0)
        slots_P = torch.where(own_AR > 0, slots_AR, 0.0).flatten()
        before_P = torch.cat([*self.slots, slots_P])
        first = len(before_P) - len(slots_P)
        stays_C = largest(before_P, limit)
        stays_C = stays_C[stays_C >= first] - first
        stays_C = stays_C[slots_P[stays_C] > 0]
        if not len(stays_C):
            return None
        of_C = stays_C // siblings
        # min: rounding must not lift a node above its own slot, or it could stay without it
        reached_C = torch.minimum(self.reached_A[:, None] * own_AR, slots_AR).flatten()[stays_C]
        self.slots.append(slots_P[stays_C])
        expanded_A = self._worth(reached_C, limit)
        self.reached_A = reached_C[expanded_A]
        drawn_CV = None
        if self.draws:
            drawn_CV = without_earlier(chances_AV, columns_AR, of_C, stays_C % siblings)
        return Picked(self.add(of_C, expanded_A), columns_AR.flatten()[stays_C], drawn_CV)

    def _worth(self, reached_C: Tensor, limit: int) -> Tensor:
        """The nodes whose first child can still be among the `limit` largest slots."""
        if self.left == 1:
            return torch.zeros(0, dtype=torch.long, device=reached_C.device)
        slots_P = torch.cat(self.slots)
        if len(slots_P) < limit:
            return torch.arange(len(reached_C), device=reached_C.device)
        return (reached_C > slots_P.topk(limit).values[-1]).nonzero()[:, 0]

    def kept(self, count: int) -> Tensor | None:
        if count <= self.shape.nodes:
            return None
        slots_N = torch.cat([self.slots[0].new_ones(1), *self.slots])[:count]
        return largest(slots_N, self.shape.nodes)
