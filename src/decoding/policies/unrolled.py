"""What the trees have in common that grow by what the drafter thinks: who is whose parent, and how deep they are."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.growth import Level


class Unrolled:
    """The nodes so far, level by level; the last one of them are asked next."""

    def __init__(self, depth: int) -> None:
        self.left = depth  # levels that may still come
        self.count = 1
        self._asked: Tensor | None = None  # of the newest level those that have children, counted among all nodes
        self._within: Tensor | None = None  # the same, counted within the level
        self._parents: list[Tensor] = []

    def add(self, of_C: Tensor, expanded_A: Tensor) -> Level:
        """A level: each node's parent, counted among those that were asked; and those to ask next."""
        device, nodes = of_C.device, slice(self.count, self.count + len(of_C))
        if self._asked is None or self._within is None:
            self._asked = self._within = torch.zeros(1, dtype=torch.long, device=device)
            self._parents.append(torch.full((1,), -1, device=device))
        self._parents.append(self._asked[of_C])
        level = Level(nodes, self._within[of_C], of_C, expanded_A)
        self._asked, self._within, self.count = expanded_A + nodes.start, expanded_A, nodes.stop
        self.left -= 1
        return level

    def parents(self, count: int) -> Tensor:
        """Of the root alone too."""
        return torch.cat(self._parents)[:count] if self._parents else torch.tensor([-1])


def largest(values_N: Tensor, count: int) -> Tensor:
    """Which are the `count` largest, ascending; of equal ones the earlier. Where no child's value is above its
    parent's, no node is chosen without its parent."""
    if len(values_N) <= count:
        return torch.arange(len(values_N), device=values_N.device)
    return values_N.sort(descending=True, stable=True).indices[:count].sort().values
