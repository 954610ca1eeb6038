"""The tree a drafter fills: where it comes from and who sees whom in it. Pure functions.

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
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from draftsmith.errors import ConfigError
from draftsmith.roles import TreeShape


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


def cut(shape: TreeShape, depth: int) -> TreeShape:
    """The tree without what lies deeper than `depth`."""
    keep_N = shape.depths_N <= depth
    parents_N = shape.parents_N[keep_N]
    parents_N[1:] = (keep_N.cumsum(0) - 1)[parents_N[1:]]  # whole depths go, so a kept node's parent is kept
    return TreeShape(parents_N, shape.depths_N[keep_N], shape.ranks_N[keep_N])


@dataclass(frozen=True)
class TreeConfig:
    """`depth` drafts a chain, `paths` a static tree of rank paths; with neither, a chain as deep as the
    drafter goes."""

    depth: int | None = None
    paths: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.depth is not None and self.paths is not None:
            raise ConfigError("decoding.depth: a tree is given by decoding.paths too; set only one of them")
        self.shape(1)

    def shape(self, max_depth: int) -> TreeShape:
        """The tree for a drafter that goes `max_depth` deep."""
        if self.paths is not None:
            return from_paths(self.paths)
        return chain(max_depth if self.depth is None else self.depth)


def depths(parents_N: Tensor) -> Tensor:
    """How far below the root each node lies [N]."""
    return torch.tensor(_depths(parents_N), device=parents_N.device)


def _depths(parents_N: Tensor) -> list[int]:
    root, *parents = parents_N.tolist()
    assert root == -1, "node 0 of a proposal is its root, with parent -1"
    found = [0]
    for node, parent in enumerate(parents, start=1):
        assert 0 <= parent < node, f"node {node} stands before its parent {parent}"
        found.append(found[parent] + 1)
    return found


def is_chain(parents_N: Tensor) -> bool:
    """Whether every node is the child of the one before it, so that the plain causal mask serves."""
    return parents_N.tolist() == list(range(-1, len(parents_N) - 1))


def ancestor_mask(parents_N: Tensor) -> Tensor:
    """[N, N] bool: row n is True at n itself and at its ancestors, the root included."""
    count, deepest = len(parents_N), max(_depths(parents_N))
    node_N = torch.arange(count, device=parents_N.device)
    above_N, up_N = node_N, parents_N.clamp(min=0)  # the root is its own parent here: everyone sees it
    mask_NN = torch.zeros(count, count, dtype=torch.bool, device=parents_N.device)
    for _ in range(deepest + 1):
        mask_NN[node_N, above_N] = True
        above_N = up_N[above_N]
    return mask_NN
