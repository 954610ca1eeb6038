"""Filling a tree from the root downwards, for drafters whose every token depends on those above it.

Level by level: the shape picks tokens from the drafter's logits, and the nodes that have children of their own are
asked for what follows them, unless a gate ends it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.contracts import KV
from draftsmith.growth import Draws, Level
from draftsmith.roles import Gate, Partial, Proposal, State

Deeper = Callable[[Level, Tensor], tuple[Tensor, ...] | None]
"""(level, tokens_C of its nodes) -> (logits [A, V], hidden [A, D]) after those of its nodes that have children, and
ids [A, V] where the columns of every node stand for tokens of its own; None stops."""


def fill(
    state: State,
    logits_V: Tensor,
    hidden_D: Tensor,
    deeper: Deeper,
    ids: Tensor | None = None,
    *,
    gate: Gate | None = None,
    draws: Draws | None = None,
) -> Proposal:
    """The proposal below state.root, of state.shape. logits_V, hidden_D: after reading the root. ids: the token
    that each column of the logits stands for, where they are not over the base's vocabulary; [V], the same after every
    node, or [1, V], of the root's. gate: the drafter's own,
    where the state has none. draws: its own way of picking tokens of a text with a temperature, where state.draws
    says nothing; None: the best ones.

    Fewer nodes than the shape has where `deeper` or the gate stopped: whole levels are left out, the deepest first. The
    last level is passed to `deeper` too, as one whose nodes have no children; what it returns there is not used.
    """
    gate = state.gate or gate
    growing = state.shape.grow(_way(state, draws), state.warp, state.generator)
    tokens = [torch.tensor([state.root], device=logits_V.device)]
    drawn: list[Tensor] = []
    logits_AV: Tensor | None = logits_V[None]
    partial = Partial(hidden=[hidden_D[None]])
    while logits_AV is not None and (picked := growing.next(logits_AV)) is not None:
        level, columns_C = picked.level, picked.columns_C
        ids_CV = ids if ids is None or ids.dim() == 1 else ids[level.of_C]
        tokens_C = columns_C if ids_CV is None else _named(ids_CV, columns_C[:, None])[:, 0]
        tokens.append(tokens_C)
        if picked.drawn_CV is not None:
            drawn.append(picked.drawn_CV if ids_CV is None else over_tokens(picked.drawn_CV, ids_CV))
        if gate is not None and len(level.expanded_A):
            partial.levels.append(level)
            partial.tokens.append(tokens_C)
            partial.logits_AV, partial.columns_C = logits_AV, columns_C
            if gate.stop(state, partial):
                level = replace(level, expanded_A=level.expanded_A[:0])
        read = deeper(level, tokens_C)
        logits_AV = None
        if read is not None:
            logits_AV, hidden_AD = read[:2]
            ids = read[2] if len(read) > 2 else ids
            partial.hidden.append(hidden_AD)
    drawn_NV = None
    if drawn:
        wide = max(d.shape[1] for d in drawn)
        drawn_NV = torch.cat([drawn[0].new_zeros(1, wide), *(F.pad(d, (0, wide - d.shape[1])) for d in drawn)])
    tokens_N = torch.cat(tokens)
    parents_N, kept_N = growing.parents(len(tokens_N)), growing.kept(len(tokens_N))
    if kept_N is None:
        return Proposal(tokens_N, parents_N, drawn_NV=drawn_NV)
    return Proposal(
        tokens_N[kept_N],
        renumbered(parents_N, kept_N),
        drawn_NV=None if drawn_NV is None else drawn_NV[kept_N],
        kept_N=kept_N,
    )


def _way(state: State, own: Draws | None) -> Draws | None:
    """How tokens are picked now; a greedy text has nothing to draw."""
    if not state.warp.temperature:
        return None
    return own if state.draws is None else cast("Draws | None", {"best": None}.get(state.draws, state.draws))


def over_tokens(chances_CV: Tensor, ids: Tensor) -> Tensor:
    """Distributions over a drafter's columns as distributions over token ids, no longer than they must be."""
    wide_CV = chances_CV.new_zeros(len(chances_CV), int(ids.max()) + 1)
    return wide_CV.scatter_add_(1, ids.expand_as(chances_CV), chances_CV)


def _named(ids: Tensor, columns_CR: Tensor) -> Tensor:
    """The tokens that columns stand for."""
    return ids[columns_CR] if ids.dim() == 1 else ids.gather(1, columns_CR)


def renumbered(parents_N: Tensor, kept_A: Tensor) -> Tensor:
    """parents_A of the nodes kept_A (ascending, each with its parent), counted among themselves."""
    place_N = torch.zeros_like(parents_N)
    place_N[kept_A] = torch.arange(len(kept_A), device=parents_N.device)
    parents_A = place_N[parents_N[kept_A].clamp(min=0)]
    parents_A[0] = -1
    return parents_A


def with_entered(proposal: Proposal, layer: int, hidden_1ND: Tensor, kv: KV, start: int) -> Proposal:
    """The proposal of a drafter that ran the base's blocks 0..layer-1 for every node it drafted, in order, in the slots
    of `kv` from `start` on. Where some were left out of the proposal, so are their states and slots."""
    if proposal.kept_N is not None:
        hidden_1ND = hidden_1ND.index_select(1, proposal.kept_N)
        kv.keep(start, proposal.kept_N)
    return replace(proposal, entered=(layer, hidden_1ND))


class Ancestors:
    """Who sees whom among the nodes that a drafter reads, level by level, all slots before the tree being seen.

    Every `below(of)` adds a level: its nodes, `of` their parents within the level added before (the first level's
    is the root, whose slot is not of the tree)."""

    def __init__(self, device: torch.device) -> None:
        self._rows_PS = torch.zeros(1, 0, dtype=torch.bool, device=device)

    def below(self, of_C: Tensor, past: int) -> Tensor:
        """mask [1, C, past + slots of the tree so far and of this level]."""
        own = torch.eye(len(of_C), dtype=torch.bool, device=of_C.device)
        self._rows_PS = torch.cat([self._rows_PS[of_C], own], 1)
        return torch.nn.functional.pad(self._rows_PS, (past, 0), value=True)[None]
