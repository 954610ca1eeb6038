"""What a module is for while decoding: the tree of tokens that is drafted and verified, and the roles around it.

    drafter     proposes a tree of tokens below the root
    gate        says, after each drafted level, whether drafting goes on
    primer      writes the prompt's K/V in the base's place

Shape suffixes are those of contracts.py: N tree nodes, C nodes of one depth, A those that have children, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from draftsmith.contracts import KV, BaseView, Capture, Needs


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, C of them, and who is above them; what a drafter needs that fills a tree downwards.

    nodes: their place in the tree. above_C: each one's parent, counted within the level above; of_C: counted among
    those of the level above that have children. expanded_A: which of these nodes have children themselves, counted
    within this level. ranks_C: as in TreeShape.
    """

    nodes: slice
    above_C: Tensor
    of_C: Tensor
    expanded_A: Tensor
    ranks_C: Tensor


@dataclass(frozen=True)
class TreeShape:
    """The static shape of a proposal. Node 0 is the root; a parent stands before its children.

    parents_N (-1 for the root), depths_N (0 for the root), ranks_N: node n takes the ranks_N[n]-th best
    token (0 = best) of its depth; the root's rank is 0 and unused.
    """

    parents_N: Tensor
    depths_N: Tensor
    ranks_N: Tensor

    @cached_property
    def depth(self) -> int:
        return int(self.depths_N.max())

    @cached_property
    def levels(self) -> list[Level]:
        """Its depths 1, 2, … in order. Nodes of equal depth must stand together, as `decoding.tree` makes them."""
        parents, device = self.parents_N.tolist(), self.parents_N.device
        depths = self.depths_N.tolist()
        has_children = set(parents)
        above, expanded, found = [0], [0], []
        for depth in range(1, self.depth + 1):
            nodes = [n for n, d in enumerate(depths) if d == depth]
            assert nodes == list(range(nodes[0], nodes[-1] + 1)), "nodes of equal depth must stand together"
            mine = [n for n in nodes if n in has_children]
            rows = [
                [above.index(parents[n]) for n in nodes],
                [expanded.index(parents[n]) for n in nodes],
                [n - nodes[0] for n in mine],
            ]
            above_C, of_C, expanded_A = (torch.tensor(row, dtype=torch.long, device=device) for row in rows)
            span = slice(nodes[0], nodes[-1] + 1)
            found.append(Level(span, above_C, of_C, expanded_A, self.ranks_N[span]))
            above, expanded = nodes, mine
        return found

    @cached_property
    def width(self) -> int:
        """How many candidates the widest depth asks for."""
        return int(self.ranks_N.max()) + 1


@dataclass
class Proposal:
    """Drafted tokens as a tree. tokens_N[0] is the root; parents_N[0] = -1; parents stand before children.

    entered (layer, hidden [B, N, D]): the drafter has run the base's blocks 0..layer-1 for these nodes, in this
    order, on the base's own K/V; verification runs the rest. drawn_NV: row n is the distribution that node n was
    drawn from (the root's is unused); None: nodes were chosen, not drawn, so that chance had no part in them.
    """

    tokens_N: Tensor
    parents_N: Tensor
    entered: tuple[int, Tensor] | None = None
    drawn_NV: Tensor | None = None


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
    """What a drafter may look at before a step, for one sequence (or B equal rows of it).

    tokens: prompt and everything emitted, the root last. root: that last token.
    seen: capture of the positions accepted by the last step (or of the whole prompt), in order, [B, A, .];
    its last position is the one that predicted the root. shape: the tree to fill.
    kv: the base's, every emitted token but the root; a drafter that runs base blocks leaves their slots in it and
    says so in Proposal.entered. head_kv: the drafter's own, made and kept by it between steps; it holds emitted
    tokens only, since `seen` brings the truth about every position that was accepted.
    copies: B. gate: who ends drafting early. temperature: of the text; generator: what a drafter that draws draws with.
    """

    tokens: list[int]
    root: int
    seen: Capture
    shape: TreeShape
    kv: KV | None = None
    head_kv: KV | None = None
    copies: int = 1
    gate: Gate | None = None
    temperature: float = 0.0
    generator: torch.Generator | None = None


class Drafter(Protocol):
    """Proposes tokens. `max_depth` bounds the tree it can fill; `needs` is what it reads of the base. gated: it drafts
    level by level and asks state.gate after each."""

    needs: Needs
    max_depth: int
    gated: bool

    def propose(self, base: BaseView, state: State) -> Proposal: ...


class Primer(Protocol):
    """Stands in for the base's reading of a prompt. Its K/V is a guess, so the text that follows may be another."""

    def prime(self, base: BaseView, tokens_BT: Tensor) -> KV:
        """The base's K/V after these tokens, [B, T]."""
        ...


def draw(chances_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """tokens_N by inversion: the first at which the cumulative probability passes uniform_N, in [0, 1). A token without
    probability is never drawn; rounding may reach the very end, which is the last token."""
    upto_NV = chances_NV.cumsum(-1)
    at_N = torch.searchsorted(upto_NV, (uniform_N * upto_NV[:, -1])[:, None], right=True)[:, 0]
    return at_N.clamp(max=chances_NV.shape[1] - 1)
