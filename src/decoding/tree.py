"""The tree a drafter fills: where it comes from, and who sees whom in it. Pure functions.

A static tree is a list of rank paths: [0, 2] is the third best token of depth 2 below the best one of
depth 1. Nodes are ordered by (length, lexicographic), the root first, so a parent stands before its children
and equal depths stand together. The tree [[0], [1], [0, 0]] has the nodes

    0 root      parents -1 0 0 1
    1 [0]       depths   0 1 1 2
    2 [1]       ranks    0 0 1 0
    3 [0, 0]

and its ancestor mask lets node 3 see 0, 1 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.errors import ConfigError
from draftsmith.growth import Shape, TreeShape


def from_paths(paths: Sequence[Sequence[int]]) -> TreeShape:
    """The tree of these rank paths, in any order; ConfigError names one that is bad, double or an orphan."""
    wanted = [tuple(int(rank) for rank in path) for path in paths]
    for path in wanted:
        if not path or min(path) < 0:
            raise ConfigError(f"decoding.paths: {list(path)} is no rank path; give one rank >= 0 per depth")
    nodes = sorted(wanted, key=lambda path: (len(path), path))
    index: dict[tuple[int, ...], int] = {(): 0}
    for path in nodes:
        if path in index:
            raise ConfigError(f"decoding.paths: {list(path)} is given twice; give every path once")
        if path[:-1] not in index:
            raise ConfigError(
                f"decoding.paths: {list(path)} has no parent; add its prefix {list(path[:-1])} to the list"
            )
        index[path] = len(index)
    return TreeShape(
        torch.tensor([-1] + [index[path[:-1]] for path in nodes]),
        torch.tensor([0] + [len(path) for path in nodes]),
        torch.tensor([0] + [path[-1] for path in nodes]),
    )


def chain(depth: int) -> TreeShape:
    """The best token of every depth, one below the other; depth 0 is the root alone."""
    if depth < 0:
        raise ConfigError(f"decoding.depth: {depth} is negative; give the number of drafted tokens per step")
    return from_paths([[0] * k for k in range(1, depth + 1)])


def by_widths(widths: Sequence[int]) -> TreeShape:
    """The full tree: each node of depth k - 1 has the widths[k - 1] best tokens of depth k below it."""
    return from_paths([p for k in range(len(widths)) for p in product(*map(range, widths[: k + 1]))])


_DEFAULTS = {"depth": None, "nodes": 60, "top_k": 10, "width": 4}
KINDS = ("auto", "chain", "static", "eagle2", "dyspec", "beam")


@dataclass(frozen=True)
class TreeSpec:
    """What a drafter is to fill. kind: auto (what draftsmith tune found for the head, else a chain), chain, static
    (`paths`), eagle2 (`nodes` likeliest of `top_k` per depth), dyspec (`nodes` likeliest to be tried), beam (`width`
    per depth). depth: null = as deep as the drafter goes; nodes count the root."""

    kind: str = "auto"
    depth: int | None = None
    paths: list[list[int]] | None = None
    nodes: int = 60
    top_k: int = 10
    width: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"decoding.tree.kind='{self.kind}': choose {', '.join(KINDS)}")
        if (self.kind == "static") != (self.paths is not None):
            raise ConfigError("decoding.tree.paths: rank paths belong to kind=static, and it needs them")
        if self.depth is not None and self.depth < 0:
            raise ConfigError(f"decoding.depth: {self.depth} is negative; give the number of drafted tokens per step")
        set_here = [k for k in ("depth", "nodes", "top_k", "width") if getattr(self, k) != _DEFAULTS[k]]
        if self.kind == "auto" and set_here:
            raise ConfigError(f"decoding.tree.{set_here[0]}: of which tree? name one (tree=eagle2), or decoding.depth")
        for key, least in (("nodes", 2), ("top_k", 1), ("width", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"decoding.tree.{key}={getattr(self, key)}: give at least {least}")
        self.shape(1)

    def shape(self, max_depth: int) -> Shape:
        """For a drafter that goes `max_depth` deep; a static tree is cut there."""
        depth = max_depth if self.depth is None else self.depth
        if self.paths is not None:
            return from_paths(self.paths).cut(min(depth, max_depth))
        if self.kind == "eagle2":
            return ByProbability(self.nodes, depth, self.top_k)
        if self.kind == "dyspec":
            return DySpec(self.nodes, depth, self.top_k)
        return Beam(self.width, depth) if self.kind == "beam" else chain(depth)


@dataclass(frozen=True)
class TreeConfig:
    """`depth` drafts a chain, `paths` a static tree of rank paths, `tree` any other; with none of them, a chain as
    deep as the drafter goes, or what was found best for it."""

    depth: int | None = None
    paths: list[list[int]] | None = None
    tree: TreeSpec = field(default_factory=TreeSpec)

    def __post_init__(self) -> None:
        given = [self.depth is not None, self.paths is not None, self.tree.kind != "auto"]
        if sum(given) > 1:
            raise ConfigError("decoding.depth: a tree is given by decoding.paths or tree too; set only one of them")
        self.shape(1)

    def shape(self, max_depth: int, tuned: TreeSpec | None = None) -> Shape:
        """The tree for a drafter that goes `max_depth` deep. tuned: what was found best for it."""
        if self.paths is not None:
            return from_paths(self.paths)
        if self.depth is not None:
            return chain(self.depth)
        return (tuned if tuned is not None and self.tree.kind == "auto" else self.tree).shape(max_depth)


def ancestor_mask(parents_N: Tensor) -> Tensor:
    """[N, N] bool: row n is True at n itself and at its ancestors, the root included."""
    root, count = int(parents_N[0]), len(parents_N)
    assert root == -1, "node 0 of a proposal is its root, with parent -1"
    node_N = torch.arange(count, device=parents_N.device)
    assert bool(((parents_N < node_N) & ((parents_N >= 0) | (node_N == 0))).all()), "a node stands before its parent"
    above_N = parents_N.clamp(min=0)  # the root is its own parent here: everyone sees it
    mask_NN = torch.zeros(count, count, dtype=torch.bool, device=parents_N.device)
    mask_NN[node_N, node_N] = True
    mask_NN[node_N, above_N] = True
    while bool(above_N.any()):  # once per depth
        above_N = parents_N[above_N].clamp(min=0)
        mask_NN[node_N, above_N] = True
    return mask_NN


def depths(parents_N: Tensor) -> Tensor:
    """How far below the root each node lies [N]."""
    return ancestor_mask(parents_N).sum(1) - 1


def is_chain(parents_N: Tensor) -> bool:
    """Whether every node is the child of the one before it, so that the plain causal mask serves."""
    return torch.equal(parents_N, torch.arange(-1, len(parents_N) - 1, device=parents_N.device))
