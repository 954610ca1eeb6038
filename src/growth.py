"""How the tokens of a drafted tree are taken from a drafter's logits, level by level, and what shape the tree has.

A drafter says what it thinks of the next token after some nodes; the shape says which tokens go into the tree and
after which of them the drafter is asked next. Tokens are the drafter's best, or they are drawn from its distribution,
independently ("iid") or without replacement ("distinct"); what is drawn is verified by speculative sampling, what is
chosen by comparing with the base's own token.

Shape suffixes are those of contracts.py: N tree nodes, C nodes of one depth, A those that have children, V columns of
the drafter's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from draftsmith.errors import ConfigError

Draws = Literal["iid", "distinct"]


@dataclass(frozen=True)
class Warp:
    """How logits become the distribution a text is sampled from; the same for the base and for a drafter that draws.

    temperature 0: greedy, the best token; top_k: only so many best tokens; top_p: only the fewest best tokens that
    together have at least this probability, after the temperature and top_k.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: give 0 for greedy decoding, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: give at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: give a probability above 0, at most 1")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise ConfigError("top_k, top_p: of a sampled text; give decoding.temperature above 0 with them")

    def chances(self, logits_NV: Tensor) -> Tensor:
        """The distributions in fp64, exactly 0 for what is cut off; of equal logits the lower ids stay."""
        scaled_NV = logits_NV.double() / self.temperature
        if self.top_k is None and self.top_p == 1:
            return scaled_NV.softmax(-1)
        best_NV, order_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            best_NV[:, self.top_k :] = float("-inf")
        sorted_NV = best_NV.softmax(-1)
        if self.top_p < 1:
            before_NV = sorted_NV.cumsum(-1) - sorted_NV
            sorted_NV = sorted_NV.masked_fill(before_NV >= self.top_p, 0.0)
            sorted_NV = sorted_NV / sorted_NV.sum(-1, keepdim=True)
        return torch.zeros_like(sorted_NV).scatter_(-1, order_NV, sorted_NV)


GREEDY = Warp()


def draw(chances_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """tokens_N by inversion: the first at which the cumulative probability passes uniform_N, in [0, 1). A token without
    probability is never drawn, however rounding falls."""
    upto_NV = chances_NV.cumsum(-1)
    total_N = upto_NV[:, -1]
    below_N = torch.minimum(uniform_N * total_N, total_N.nextafter(torch.zeros_like(total_N)))
    at_N = torch.searchsorted(upto_NV, below_N[:, None], right=True)[:, 0]
    return at_N.clamp(max=chances_NV.shape[1] - 1)  # of chances that are no numbers: whoever asks looks at them


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, C of them, and who is above them; what a drafter needs that fills a tree downwards.

    nodes: their place among all that were drafted. above_C: each one's parent, counted within the level above; of_C:
    counted among those of the level above that have children. expanded_A: which of these nodes have children
    themselves, counted within this level.
    """

    nodes: slice
    above_C: Tensor
    of_C: Tensor
    expanded_A: Tensor


@dataclass(frozen=True)
class Picked:
    """A level's nodes and their tokens. columns_C: of the logits of each one's parent. drawn_CV: the distribution each
    was drawn from, given its earlier siblings (zeros: nothing was left to draw, refuse it); None: chosen."""

    level: Level
    columns_C: Tensor
    drawn_CV: Tensor | None = None


class Growing(Protocol):
    """One tree in the making."""

    def next(self, logits_AV: Tensor) -> Picked | None:
        """The next level, given the logits after every node that has children; None: the tree is complete."""
        ...

    def parents(self, count: int) -> Tensor:
        """parents_N of the first `count` nodes, the root included."""
        ...

    def kept(self, count: int) -> Tensor | None:
        """Which of the first `count` nodes make the proposal, ascending, the root first; None: all."""
        ...


class Shape(Protocol):
    """A kind of tree. depth: the deepest a tree can be; nodes: the most nodes one can have, root included; drafted: the
    most that are drafted on the way, those left out of the proposal too; drawable: how its tokens can be drawn."""

    @property
    def depth(self) -> int: ...

    @property
    def nodes(self) -> int: ...

    @property
    def drafted(self) -> int: ...

    @property
    def drawable(self) -> frozenset[str]: ...

    def cut(self, depth: int) -> Shape:
        """The same without what lies deeper."""
        ...

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        """A new tree. draws: how tokens are drawn, warp and generator with what; None: the best tokens."""
        ...


@dataclass(frozen=True)
class TreeShape:
    """A static tree. Node 0 is the root; a parent stands before its children, and nodes of equal depth together.

    parents_N (-1 for the root), depths_N (0 for the root), ranks_N: node n takes the ranks_N[n]-th best
    token (0 = best) of its depth; the root's rank is 0 and unused. Where tokens are drawn, siblings are drawn in their
    order, whatever their ranks.
    """

    parents_N: Tensor
    depths_N: Tensor
    ranks_N: Tensor

    @cached_property
    def depth(self) -> int:
        return int(self.depths_N.max())

    @property
    def nodes(self) -> int:
        return len(self.parents_N)

    drafted = nodes

    @property
    def drawable(self) -> frozenset[str]:
        return frozenset({"iid", "distinct"})

    @cached_property
    def levels(self) -> list[Level]:
        """Its depths 1, 2, … in order."""
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
            found.append(Level(slice(nodes[0], nodes[-1] + 1), above_C, of_C, expanded_A))
            above, expanded = nodes, mine
        return found

    @cached_property
    def orders_N(self) -> Tensor:
        """Each node's place among its siblings."""
        children: dict[int, int] = {}
        found = []
        for parent in self.parents_N.tolist():
            found.append(children.get(parent, 0))
            children[parent] = found[-1] + 1
        return torch.tensor(found, device=self.parents_N.device)

    @cached_property
    def width(self) -> int:
        """How many candidates the widest depth asks for."""
        return int(self.ranks_N.max()) + 1

    def cut(self, depth: int) -> TreeShape:
        keep_N = self.depths_N <= depth
        parents_N = self.parents_N[keep_N]
        parents_N[1:] = (keep_N.cumsum(0) - 1)[parents_N[1:]]  # whole depths go, so a kept node's parent is kept
        return TreeShape(parents_N, self.depths_N[keep_N], self.ranks_N[keep_N])

    def to(self, device: torch.device) -> TreeShape:
        here = self.parents_N.device == device
        return self if here else TreeShape(*(t.to(device) for t in (self.parents_N, self.depths_N, self.ranks_N)))

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        return _Static(self, draws, warp, generator)


class _Static:
    def __init__(self, shape: TreeShape, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> None:
        self.shape, self.draws, self.warp, self.generator = shape, draws, warp, generator
        self.levels = iter(shape.levels)

    def next(self, logits_AV: Tensor) -> Picked | None:
        level = next(self.levels, None)
        if level is None:
            return None
        columns = logits_AV.shape[-1]
        if self.draws is None:
            if self.shape.width > columns:
                raise ConfigError(f"decoding.paths: rank {self.shape.width - 1} of a drafter with {columns} candidates")
            ranked_AR = best(logits_AV, self.shape.width)
            return Picked(level, ranked_AR[level.of_C, self.shape.ranks_N[level.nodes]])
        chances_AV = self.warp.chances(logits_AV)
        if self.draws == "iid":
            drawn_CV = chances_AV[level.of_C]
            return Picked(level, draw(drawn_CV, uniforms((len(drawn_CV),), drawn_CV, self.generator)), drawn_CV)
        orders_C = self.shape.orders_N[level.nodes]
        siblings = int(orders_C.max()) + 1
        if siblings > columns:
            raise ConfigError(f"decoding.paths: {siblings} siblings of a drafter with {columns} candidates")
        columns_AR = scores(chances_AV, self.generator).topk(siblings, dim=-1).indices
        drawn_CV = without_earlier(chances_AV, columns_AR, level.of_C, orders_C)
        return Picked(level, columns_AR[level.of_C, orders_C], drawn_CV)

    def parents(self, count: int) -> Tensor:
        whole = count == self.shape.nodes
        return self.shape.parents_N if whole else self.shape.parents_N[:count]

    def kept(self, count: int) -> Tensor | None:
        return None


def best(logits_AV: Tensor, count: int) -> Tensor:
    """The columns of the `count` largest, in order [A, count]. Rows that are one row in memory are ranked once."""
    if len(logits_AV) > 1 and logits_AV.stride(0) == 0:
        return logits_AV[:1].topk(count, dim=-1).indices.expand(len(logits_AV), -1)
    return logits_AV.topk(count, dim=-1).indices


def uniforms(size: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1), fp64, on the device of `like`. The generator is the host's, so that a seed means the same on
    any device."""
    return torch.rand(list(size), generator=generator, dtype=torch.float64).to(like.device)


def gumbel(size: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise, fp64."""
    tiny = torch.finfo(torch.float64).tiny
    return -(-uniforms(size, like, generator).clamp(min=tiny).log()).clamp(min=tiny).log()


def scores(chances_AV: Tensor, generator: torch.Generator | None) -> Tensor:
    """Log-probabilities with Gumbel noise: their largest, in order, are draws without replacement (Kool et al. 2019,
    arXiv 1903.06059). Columns without probability are at -inf."""
    return chances_AV.log() + gumbel(chances_AV.shape, chances_AV, generator)


def without_earlier(chances_AV: Tensor, columns_AR: Tensor, of_C: Tensor, order_C: Tensor) -> Tensor:
    """[C, V]: what node c, the order_C[c]-th draw of row of_C[c], was drawn from: the distribution given that the draws
    before it, columns_AR, are gone; zeros where it has no probability itself."""
    drawn_CR, left_CV = columns_AR[of_C], chances_AV[of_C]
    earlier_CR = torch.arange(columns_AR.shape[1], device=order_C.device) < order_C[:, None]
    left_CV.scatter_(1, drawn_CR, left_CV.gather(1, drawn_CR).masked_fill(earlier_CR, 0.0))
    own_C1 = left_CV.gather(1, drawn_CR.gather(1, order_C[:, None]))
    total_C1 = left_CV.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(own_C1 > 0, left_CV / total_C1, 0.0)
