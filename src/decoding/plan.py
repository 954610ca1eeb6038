"""What a forward over trees needs beside their tokens: depths and masks, made once per tree.

Rows of a batch have texts of different lengths, and trees of different sizes. All rows write their nodes to the same
slots, those behind the longest text; the slots between a shorter text and those are masked. A smaller tree is filled
up with nodes that nobody sees and nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.decoding import tree
from draftsmith.growth import Shape, TreeShape

PLANS_KEPT = 64  # of the trees met besides the static one


class Plan:
    """What the forward needs to know of one tree."""

    def __init__(self, parents_N: Tensor, device: torch.device) -> None:
        self.parents_N = parents_N.to("cpu", copy=True)  # verification reads it on the host
        self.nodes = len(parents_N)
        own_NN = tree.ancestor_mask(self.parents_N)
        depths_N = own_NN.sum(1) - 1
        self.depths = depths_N.tolist()
        self.depth = max(self.depths)
        self.depths_BN = depths_N[None].to(device)
        self.causal = tree.is_chain(self.parents_N)
        self.own_NN = own_NN.to(device)
        self._mask_NS = self.own_NN

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

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._device = device
        self._whole = shape.parents_N if isinstance(shape, TreeShape) else None
        self._plan = None if self._whole is None else Plan(self._whole, device)
        self._others: dict[tuple[int, ...], Plan] = {}

    def of(self, parents_N: Tensor) -> Plan:
        if self._plan is not None and parents_N is self._whole:
            return self._plan
        key = tuple(parents_N.tolist())
        if key not in self._others:
            if len(self._others) == PLANS_KEPT:
                self._others.pop(next(iter(self._others)))
            self._others[key] = Plan(parents_N, self._device)
        return self._others[key]


def together(plans: Sequence[Plan], lengths: Sequence[int], slots: int) -> tuple[Tensor, Tensor | None]:
    """(positions_BN, mask_BNS or None for the causal one) of one forward over a tree per row. lengths: of the rows'
    texts in the K/V; slots: of the longest."""
    first, rows = plans[0], len(plans)
    alike, level = all(p is first for p in plans), all(n == slots for n in lengths)
    if alike and level:
        mask_BNS = None if first.causal else first.mask(slots)
        return first.depths_BN + slots, mask_BNS if mask_BNS is None or rows == 1 else mask_BNS.expand(rows, -1, -1)
    device, nodes = first.depths_BN.device, max(p.nodes for p in plans)
    lengths_B1 = torch.tensor(lengths, device=device)[:, None]
    if alike:
        depths_BN, own_BNN = first.depths_BN, first.own_NN.expand(rows, -1, -1)
    else:
        depths_BN = torch.zeros(rows, nodes, dtype=torch.long, device=device)
        own_BNN = torch.eye(nodes, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        for b, plan in enumerate(plans):
            depths_BN[b, : plan.nodes] = plan.depths_BN[0]
            own_BNN[b, : plan.nodes, : plan.nodes] = plan.own_NN
    text_BS = torch.arange(slots, device=device) < lengths_B1
    mask_BNS = torch.cat([text_BS[:, None].expand(-1, nodes, -1), own_BNN], 2)
    return depths_BN + lengths_B1, mask_BNS
