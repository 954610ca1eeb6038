"""What a forward over a tree needs beside its tokens, made once per tree: depths and mask."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.decoding import tree
from draftsmith.roles import TreeShape

PLANS_KEPT = 64  # of the trees met besides the static one


class Plan:
    """What the forward needs to know of one tree."""

    def __init__(self, parents_N: Tensor, device: torch.device) -> None:
        self.parents_N = parents_N.to("cpu", copy=True)  # verification reads it on the host
        self.nodes = len(parents_N)
        depths_N = tree.depths(self.parents_N)
        self.depths = depths_N.tolist()
        self.depth = max(self.depths)
        self.depths_BN = depths_N[None].to(device)
        self.causal = tree.is_chain(self.parents_N)
        self._mask_NS = tree.ancestor_mask(self.parents_N).to(device)

    def mask(self, length: int) -> Tensor:
        """[1, N, length + N]: every slot of the prefix, then the ancestors; a view of a buffer that holds the
        tree at its right end and grows by doubling."""
        spare = self._mask_NS.shape[1] - self.nodes - length
        if spare < 0:
            wide = torch.nn.functional.pad(self._mask_NS, (max(256, 2 * length), 0), value=True)
            self._mask_NS, spare = wide, wide.shape[1] - self.nodes - length
        return self._mask_NS[None, :, spare:]


class Plans:
    """The plans of the trees met in one run: the shape's own at no cost, others by their parents."""

    def __init__(self, shape: TreeShape) -> None:
        self._device = shape.parents_N.device
        self._whole = shape.parents_N
        self._plan = Plan(shape.parents_N, self._device)
        self._others: dict[tuple[int, ...], Plan] = {}

    def of(self, parents_N: Tensor) -> Plan:
        if parents_N is self._whole:
            return self._plan
        key = tuple(parents_N.tolist())
        if key not in self._others:
            if len(self._others) == PLANS_KEPT:
                self._others.pop(next(iter(self._others)))
            self._others[key] = Plan(parents_N, self._device)
        return self._others[key]
