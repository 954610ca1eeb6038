"""Filling a static tree from the root downwards, for heads whose every token depends on those above it.

Level by level: node n of a level takes the ranks_N[n]-th best token after its own parent, and the nodes that have
children of their own are asked for what follows them, unless a gate ends it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from draftsmith.errors import ConfigError
from draftsmith.roles import Gate, Level, Partial, Proposal, State, draw

Deeper = Callable[[Level, Tensor], tuple[Tensor, Tensor] | None]
"""(level, tokens_C of its nodes) -> (logits [A, V], hidden [A, D]) after those of its nodes that have children; None
stops."""


def fill(
    state: State,
    logits_V: Tensor,
    hidden_D: Tensor,
    deeper: Deeper,
    ids_V: Tensor | None = None,
    *,
    gate: Gate | None = None,
    draws: bool = False,
) -> Proposal:
    """The proposal below state.root, of state.shape. logits_V, hidden_D: after reading the root. ids_V: the token
    that each column of the logits stands for, where they are not over the base's vocabulary. gate: the drafter's own,
    where the state has none. draws: of a text with a temperature, tokens are drawn from the drafter's distribution.

    Fewer nodes than the shape has where `deeper` or the gate stopped: whole levels are left out, the deepest first. The
    last level is passed to `deeper` too, as one whose nodes have no children; what it returns there is not used.
    """
    shape, gate, draws = state.shape, state.gate or gate, draws and state.temperature > 0
    if draws and len(shape.parents_N) > shape.depth + 1:
        raise ConfigError("decoding.paths: drafts that are drawn are a chain; give decoding.depth, or temperature 0")
    if shape.width > len(logits_V):
        raise ConfigError(f"decoding.paths: rank {shape.width - 1} of a head that drafts from {len(logits_V)} tokens")
    tokens_N = torch.full((len(shape.parents_N),), state.root, dtype=torch.long, device=logits_V.device)
    logits_AV: Tensor | None = logits_V[None]
    partial, count, drawn = Partial(hidden=[hidden_D[None]]), 1, [torch.zeros_like(logits_V, dtype=torch.float64)[None]]
    for level in shape.levels:
        if logits_AV is None:
            break
        if draws:
            chances_CV = (logits_AV.double() / state.temperature).softmax(-1)[level.of_C]
            # the generator is the host's, so that a seed means the same on any device
            uniform_C = torch.rand(len(chances_CV), generator=state.generator, dtype=torch.float64)
            columns_C = draw(chances_CV, uniform_C.to(chances_CV.device))
            drawn.append(chances_CV)
        else:
            columns_C = logits_AV.topk(shape.width, dim=-1).indices[level.of_C, level.ranks_C]
        tokens_C = columns_C if ids_V is None else ids_V[columns_C]
        tokens_N[level.nodes], count = tokens_C, level.nodes.stop
        if gate is not None and len(level.expanded_A):
            partial.levels.append(level)
            partial.tokens.append(tokens_C)
            partial.logits_AV, partial.columns_C = logits_AV, columns_C
            if gate.stop(state, partial):
                level = replace(level, expanded_A=level.expanded_A[:0])
        read = deeper(level, tokens_C)
        logits_AV = None
        if read is not None:
            logits_AV, hidden_AD = read
            partial.hidden.append(hidden_AD)
    whole = count == len(tokens_N)
    return Proposal(
        tokens_N if whole else tokens_N[:count],
        shape.parents_N if whole else shape.parents_N[:count],
        drawn_NV=torch.cat(drawn) if draws else None,
    )


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
