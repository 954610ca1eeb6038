"""Filling a static tree from the root downwards, for heads whose every token depends on those above it.

Level by level: node n of a level takes the ranks_N[n]-th best token after its own parent, and the nodes that have
children of their own are asked for what follows them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.contracts import Level, TreeShape
from draftsmith.errors import ConfigError

Deeper = Callable[[Level, Tensor], Tensor | None]
"""(level, tokens_C of its nodes) -> logits [A, V] after those of its nodes that have children; None stops."""


def fill(
    shape: TreeShape, root: int, logits_V: Tensor, deeper: Deeper, ids_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens_N, parents_N) of the proposal, the root first. logits_V: what follows the root. ids_V: the token that
    each column of the logits stands for, where they are not over the base's vocabulary.

    Fewer than the shape has where `deeper` stopped: whole levels are left out, the deepest first. The last level
    is passed to `deeper` too; what it returns there is not used.
    """
    if shape.width > len(logits_V):
        raise ConfigError(f"decoding.paths: rank {shape.width - 1} of a head that drafts from {len(logits_V)} tokens")
    tokens_N = torch.full((len(shape.parents_N),), root, dtype=torch.long, device=logits_V.device)
    logits_AV: Tensor | None = logits_V[None]
    count = 1
    for level in shape.levels:
        if logits_AV is None:
            break
        ranked_AR = logits_AV.topk(shape.width, dim=-1).indices
        tokens_C = ranked_AR[level.of_C, level.ranks_C]
        if ids_V is not None:
            tokens_C = ids_V[tokens_C]
        tokens_N[level.nodes], count = tokens_C, level.nodes.stop
        logits_AV = deeper(level, tokens_C)
    if count == len(tokens_N):
        return tokens_N, shape.parents_N
    return tokens_N[:count], shape.parents_N[:count]


class Ancestors:
    """Who sees whom among the nodes that a head reads, level by level, all slots before the tree being seen.

    Every `below(of)` adds a level: its nodes, `of` their parents within the level added before (the first level's
    is the root, whose slot is not of the tree)."""

    def __init__(self, device: torch.device) -> None:
        self._rows_PS = torch.zeros(1, 0, dtype=torch.bool, device=device)

    def below(self, of_C: Tensor, past: int) -> Tensor:
        """mask [1, C, past + slots of the tree so far and of this level]."""
        own = torch.eye(len(of_C), dtype=torch.bool, device=of_C.device)
        self._rows_PS = torch.cat([self._rows_PS[of_C], own], 1)
        return torch.nn.functional.pad(self._rows_PS, (past, 0), value=True)[None]
