"""Filling a tree from the root downwards, for drafters whose every token depends on those above it.

Level by level: the shape picks tokens from the drafter's logits, and the nodes that have children of their own are
asked for what follows them, unless a gate ends it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.contracts import KV
from draftsmith.errors import ConfigError
from draftsmith.growth import Draws, Level
from draftsmith.roles import Gate, Partial, Proposal, State

Deeper = Callable[[Level, Tensor], tuple[Tensor, ...] | None]
"""(level, tokens_C of its nodes) -> (logits [A, V], hidden [A, D]) after those of its nodes that have children, and
ids [A, V] where the columns of every node stand for tokens of its own; None stops."""

DeeperRows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(of_M, tokens_M, rows_M) -> (logits [M, V], hidden [M, D]) after M nodes of several rows: the parent of each, counted
among those asked before (the roots first, one per row); its token; its row."""


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
    node, or [1, V], of the root's. gate: the drafter's own, where the state has none. draws: its own way of picking
    tokens of a text with a temperature, where state.draws says nothing; None: the best ones.

    Fewer nodes than the shape has where `deeper` or the gate stopped: whole levels are left out, the deepest first. The
    last level is passed to `deeper` too, as one whose nodes have no children; what it returns there is not used.
    """
    filling = _Filling(state, hidden_D, ids, gate, draws)
    logits_AV: Tensor | None = logits_V[None]
    while logits_AV is not None and (picked := filling.pick(logits_AV)) is not None:
        read = deeper(*picked)
        assert read is not None or not filling.cut_at_the_end or not len(picked[0].expanded_A), "see _Filling"
        logits_AV = None if read is None else read[0]
        if read is not None:
            filling.hear(*read[1:])
    return filling.proposal()


def fill_rows(states: Sequence[State], logits_BV: Tensor, hidden_BD: Tensor, deeper: DeeperRows) -> list[Proposal]:
    """`fill` for several rows at once, of a drafter that keeps nothing between levels but what it was asked before: the
    nodes of all rows are asked together. logits_BV, hidden_BD: after reading each row's root."""
    fillings = [_Filling(state, hidden_BD[b]) for b, state in enumerate(states)]
    logits, first = {b: logits_BV[b : b + 1] for b in range(len(states))}, list(range(len(states)))
    while logits:
        of, tokens, rows = [], [], []
        for b, logits_AV in logits.items():
            picked = fillings[b].pick(logits_AV)
            if picked is not None and len(picked[0].expanded_A):
                level, tokens_C = picked
                of.append(level.of_C[level.expanded_A] + first[b])
                tokens.append(tokens_C[level.expanded_A])
                rows.append(b)
        if not rows:
            break
        counts = [len(t) for t in tokens]
        rows_M = torch.tensor([b for b, n in zip(rows, counts, strict=True) for _ in range(n)], device=logits_BV.device)
        logits_MV, hidden_MD = deeper(torch.cat(of), torch.cat(tokens), rows_M)
        logits, start = {}, 0
        for b, count in zip(rows, counts, strict=True):
            logits[b], first[b] = logits_MV[start : start + count], start
            fillings[b].hear(hidden_MD[start : start + count])
            start += count
    return [filling.proposal() for filling in fillings]


class _Filling:
    """One proposal in the making.

    Drawn trees that are cut at the end (dyspec) must not end early for what was drawn: whether another level follows
    would then decide which nodes of this one stay, and those would no longer be draws from the distribution they are
    verified with. So there a gate is refused, and `deeper` must not stop.
    """

    def __init__(
        self,
        state: State,
        hidden_D: Tensor,
        ids: Tensor | None = None,
        gate: Gate | None = None,
        draws: Draws | None = None,
    ) -> None:
        self.state, self.gate, self.ids = state, state.gate or gate, ids
        way = _way(state, draws)
        self.cut_at_the_end = way is not None and state.shape.drafted > state.shape.nodes
        if self.cut_at_the_end and self.gate is not None:
            raise ConfigError(
                f"gate: {type(self.gate).__name__} sees what is drawn, and would choose among it where a drawn tree is"
                " cut at the end; give tree=beam or a static one, drafts=best, or no gate (kangaroo: threshold=0)"
            )
        self.growing = state.shape.grow(way, state.warp, state.generator)
        self.tokens = [torch.tensor([state.root], device=hidden_D.device)]
        self.drawn: list[Tensor] = []
        self.partial = Partial(hidden=[hidden_D[None]])

    def pick(self, logits_AV: Tensor) -> tuple[Level, Tensor] | None:
        """The next level and its tokens, given the logits after every node that was to be asked; None: complete."""
        picked = self.growing.next(logits_AV)
        if picked is None:
            return None
        level, columns_C, ids = picked.level, picked.columns_C, self.ids
        ids_CV = ids if ids is None or ids.dim() == 1 else ids[level.of_C]
        tokens_C = columns_C if ids_CV is None else _named(ids_CV, columns_C[:, None])[:, 0]
        self.tokens.append(tokens_C)
        if picked.drawn_CV is not None:
            self.drawn.append(picked.drawn_CV if ids_CV is None else over_tokens(picked.drawn_CV, ids_CV))
        if self.gate is not None and len(level.expanded_A):
            partial = self.partial
            partial.levels.append(level)
            partial.tokens.append(tokens_C)
            partial.logits_AV, partial.columns_C = logits_AV, columns_C
            if self.gate.stop(self.state, partial):
                level = replace(level, expanded_A=level.expanded_A[:0])
        return level, tokens_C

    def hear(self, hidden_AD: Tensor, ids: Tensor | None = None) -> None:
        """What the asked nodes left; ids: of their columns, where every node has its own."""
        self.partial.hidden.append(hidden_AD)
        self.ids = self.ids if ids is None else ids

    def proposal(self) -> Proposal:
        drawn_NV, drawn = None, self.drawn
        if drawn:
            wide = max(d.shape[1] for d in drawn)
            drawn_NV = torch.cat([drawn[0].new_zeros(1, wide), *(F.pad(d, (0, wide - d.shape[1])) for d in drawn)])
        tokens_N = torch.cat(self.tokens)
        parents_N, kept_N = self.growing.parents(len(tokens_N)), self.growing.kept(len(tokens_N))
        if kept_N is None:
            return Proposal(tokens_N, parents_N, drawn_NV=drawn_NV)
        kept_NV = None if drawn_NV is None else drawn_NV[kept_N]
        return Proposal(tokens_N[kept_N], renumbered(parents_N, kept_N), drawn_NV=kept_NV, kept_N=kept_N)


def _way(state: State, own: Draws | None) -> Draws | None:
    """How tokens are picked now; a greedy text has nothing to draw. A drafter's own way yields to a tree that cannot be
    drawn so; what was asked for does not."""
    if not state.warp.temperature:
        return None
    if state.draws is None:
        return own if own in state.shape.drawable else None
    return None if state.draws == "best" else cast(Draws, state.draws)


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
