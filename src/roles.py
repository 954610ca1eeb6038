"""What a module is for while decoding: the tree of tokens that is drafted and verified, and the roles around it.

    drafter     proposes a tree of tokens below the root
    gate        says, after each drafted level, whether drafting goes on
    primer      writes the prompt's K/V in the base's place

Shape suffixes are those of contracts.py: N tree nodes, C nodes of one depth, A those that have children, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from draftsmith.contracts import KV, BaseView, Capture, Needs
from draftsmith.growth import GREEDY, Draws, Level, Shape, Warp


@dataclass
class Proposal:
    """Drafted tokens as a tree. tokens_N[0] is the root; parents_N[0] = -1; parents stand before children.

    entered (layer, hidden [B, N, D]): the drafter has run the base's blocks 0..layer-1 for these nodes, in this
    order, on the base's own K/V; verification runs the rest. drawn_NV: row n is the distribution that node n was
    drawn from, given its earlier siblings, in fp64 (the root's is unused; zeros: refuse it, there was nothing to draw);
    None: nodes were chosen, not drawn, so that chance had no part in them. It may have fewer columns than the base has
    tokens. kept_N: which of all the nodes that were drafted these are, ascending; None: all.
    """

    tokens_N: Tensor
    parents_N: Tensor
    entered: tuple[int, Tensor] | None = None
    drawn_NV: Tensor | None = None
    kept_N: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """path_A: accepted nodes in order, the root (0) first; bonus: the base's own next token after them."""

    path_A: Tensor
    bonus: int

    @property
    def accepted(self) -> int:
        """Accepted *drafted* tokens: the root is not one."""
        return len(self.path_A) - 1


@dataclass
class Partial:
    """A proposal in the making, as a gate sees it: whole levels, the newest drafted but not read yet.

    levels, tokens: of depths 1, 2, …, tokens_C each. hidden: of depths 0, 1, … up to the newest but one, hidden_AD
    after reading those nodes that have children (what the drafter's lm_head reads). logits_AV, columns_C: the
    drafter's logits that the newest level was taken from, and which column each of its tokens is. notes: a gate's own,
    from level to level of one proposal.
    """

    levels: list[Level] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    logits_AV: Tensor | None = None
    columns_C: Tensor | None = None
    notes: list[Tensor] = field(default_factory=list)

    @property
    def surest(self) -> float:
        """The highest probability that the drafter gives one of the newest tokens that may be gone on from."""
        assert self.logits_AV is not None
        assert self.columns_C is not None
        level = self.levels[-1]
        chances_AV = self.logits_AV.detach().float().softmax(-1)
        return float(chances_AV[level.of_C[level.expanded_A], self.columns_C[level.expanded_A]].max())


class Gate(Protocol):
    """Decides how far to draft. It sees nothing of the verdict, so it cannot change what is emitted, only when."""

    def stop(self, state: State, partial: Partial) -> bool:
        """Whether drafting ends with the newest level; asked after each that has children."""
        ...


@dataclass
class State:
    """What a drafter may look at before a step, of one row.

    tokens: prompt and everything emitted, the root last. root: that last token.
    seen: capture of the positions accepted by the last step (or of the whole prompt), in order, [1, A, .];
    its last position is the one that predicted the root. shape: the tree to fill.
    read: where the drafter needs logits, all tokens_N that the base read in its last forward, refused ones too, and its
    logits_NV after each.
    kv: the base's, every emitted token but the root; a drafter that runs base blocks (runs_base) finds it there, and
    leaves their slots in it or says so in Proposal.entered. head_kv: the drafter's own, made and kept by it between
    steps; it holds emitted tokens only, since `seen` brings the truth about every position that was accepted.
    gate: who ends drafting early. warp: of the text. draws, generator: how a drafter that can draw is to do it and with
    what; None: its own way.
    """

    tokens: list[int]
    root: int
    seen: Capture
    shape: Shape
    kv: KV | None = None
    head_kv: KV | None = None
    gate: Gate | None = None
    warp: Warp = GREEDY
    draws: Draws | Literal["best"] | None = None
    generator: torch.Generator | None = None
    read: tuple[Tensor, Tensor] | None = None

    @property
    def drawn(self) -> bool:
        """Whether drafts are to be drawn, whatever the drafter's own way is."""
        return bool(self.warp.temperature) and self.draws in ("iid", "distinct")


class Drafter(Protocol):
    """Proposes tokens. `max_depth` bounds the tree it can fill; `needs` is what it reads of the base. gated: it drafts
    level by level and asks state.gate after each. runs_base: it runs blocks of the base on state.kv."""

    needs: Needs
    max_depth: int
    gated: bool
    runs_base: bool

    def propose(self, base: BaseView, state: State) -> Proposal: ...


@runtime_checkable
class RowsDrafter(Protocol):
    """A drafter that drafts for all rows of a batch at once, each as if alone."""

    def propose_rows(self, base: BaseView, states: Sequence[State]) -> list[Proposal]: ...


class Primer(Protocol):
    """Stands in for the base's reading of a prompt. Its K/V is a guess, so the text that follows may be another."""

    def prime(self, base: BaseView, tokens_BT: Tensor) -> KV:
        """The base's K/V after these tokens, [B, T]."""
        ...
