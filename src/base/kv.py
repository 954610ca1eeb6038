"""Keys and values in buffers made once: appending is a slice write, rolling back is setting an integer.

Concatenating every layer's cache at each step costs more than the attention of a small base, so the slots
are allocated ahead and double when they run out. All keys are kept, those beyond a sliding window too: a
window is a matter of the mask (masks.py), and a rolled-back tree may need them again.

Shapes: B rows, L layers, H key-value heads, C slots allocated, Q positions of one forward, A slots kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KV:
    """`contracts.KV`, and the little of a Hugging Face cache that attention modules call on it.

    Each layer has its own length, so a forward may run in parts: layers 0..l-1 first, l.. later, both write
    the same slots. `length` is the shortest layer's; `crop(kv.length)` drops a forward left half done.
    All rows advance together. Shapes, dtype and device are those of the first keys written.
    windowed: also remember each slot's position, which the mask of a sliding window needs.
    """

    def __init__(self, num_layers: int, capacity: int = 256, *, windowed: bool = False) -> None:
        self._lengths = [0] * num_layers
        self._capacity = capacity
        self._windowed = windowed
        self._store: Tensor | None = None  # [2, L, B, H, C, head_dim]: keys, then values
        self._keys: list[Tensor] = []  # views of the store, one [B, H, C, head_dim] per layer
        self._values: list[Tensor] = []
        self._positions_BC: Tensor | None = None
        self._is_view = False

    @property
    def length(self) -> int:
        """Slots that every layer has filled."""
        return min(self._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots that this layer has filled."""
        return self._lengths[layer_idx]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, Q, head_dim]; returns all of this layer's, [B, H, S, head_dim].

        Where gradients are asked for, they flow through the Q new slots of this forward and no further.
        """
        new = key.shape[2]
        start = self._lengths[layer_idx]
        stop = start + new
        if not self._keys or stop > self._capacity:
            self._allocate(key, stop)
        assert key.shape[0] == self._keys[0].shape[0], f"{key.shape[0]} rows, not those of the first forward"
        self._lengths[layer_idx] = stop
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            # A later write in place would spoil what autograd saved here, so the graph gets copies.
            past = keys.narrow(2, 0, start), values.narrow(2, 0, start)
            out = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            keys.narrow(2, start, new).copy_(key.detach())
            values.narrow(2, start, new).copy_(value.detach())
            return out
        keys.narrow(2, start, new).copy_(key)
        values.narrow(2, start, new).copy_(value)
        return keys.narrow(2, 0, stop), values.narrow(2, 0, stop)

    def place(self, positions_BQ: Tensor, layer_idx: int) -> Tensor:
        """Note the positions of the slots this layer is about to fill; returns those of all slots [B, S].

        Only for a windowed K/V; to be called before the layer's `update`.
        """
        start = self._lengths[layer_idx]
        stop = start + positions_BQ.shape[1]
        held = self._positions_BC
        if held is None or stop > held.shape[1]:
            grown = positions_BQ.new_empty(positions_BQ.shape[0], max(self._capacity, 2 * stop))
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._positions_BC = held = grown
        held[:, start:stop] = positions_BQ
        return held[:, :stop]

    @property
    def windowed(self) -> bool:
        return self._windowed

    def crop(self, length: int) -> None:
        """Forget every slot from `length` on; shorter layers stay as they are."""
        self._lengths = [min(n, length) for n in self._lengths]

    def fork(self) -> KV:
        """An independent copy of the slots in use."""
        copy = KV(len(self._lengths), self._capacity, windowed=self._windowed)
        copy._lengths = list(self._lengths)
        used = max(self._lengths)
        if self._store is not None:
            copy._hold(torch.zeros_like(self._store))
            copy._copy_slots(self._store, used)
        if self._positions_BC is not None:
            copy._positions_BC = self._positions_BC.clone()
        return copy

    def keep(self, start: int, path_A: Tensor) -> None:
        """Of the slots from `start` on, keep start + path_A (ascending), moved to the front; forget the rest.

        A layer that has not filled slots from `start` on stays as it is.
        """
        used, kept = max(self._lengths), len(path_A)
        if kept and path_A.device.type == "cpu":
            assert start + int(path_A[-1]) < used, f"keep: slot {start} + {path_A.tolist()} of {used} in use"
        self._lengths = [n if n <= start else start + kept for n in self._lengths]
        if not kept or (path_A.device.type == "cpu" and int(path_A[-1]) == kept - 1):
            return  # ascending and dense: a chain, already in place
        assert self._store is not None
        path_A = path_A.to(self._store.device)
        # index_select copies first, so source and destination may overlap.
        rest = self._store.narrow(4, start, used - start)
        rest.narrow(4, 0, kept).copy_(rest.index_select(4, path_A))
        if self._positions_BC is not None:
            held = self._positions_BC[:, start:used]
            held[:, :kept] = held.index_select(1, path_A)

    def row(self, row: int, length: int) -> KV:
        """One row's first `length` slots, as a K/V of its own in the same memory; whoever writes to it must find room
        (`reserve`)."""
        view = KV(len(self._lengths), self._capacity, windowed=self._windowed)
        view._lengths, view._is_view = [length] * len(self._lengths), True
        if self._store is not None:
            view._hold(self._store.narrow(2, row, 1))
        if self._positions_BC is not None:
            view._positions_BC = self._positions_BC.narrow(0, row, 1)
        return view

    def reserve(self, slots: int) -> None:
        """Makes room for so many slots, so that views of rows stay views."""
        if self._store is not None and slots > self._capacity:
            self._allocate(self._keys[0], slots)
        held = self._positions_BC
        if held is not None and held.shape[1] < self._capacity:
            self._positions_BC = held.new_zeros(held.shape[0], self._capacity)
            self._positions_BC[:, : held.shape[1]] = held

    def adopt(self, row: int, source: int, target: int, count: int) -> None:
        """Copies a row's `count` slots from `source` on to `target` on, in every layer."""
        if count and source != target:
            assert self._store is not None
            mine = self._store.select(2, row)
            mine.narrow(3, target, count).copy_(mine.narrow(3, source, count).clone())

    def lengthen(self, layers: int, length: int) -> None:
        """Layers 0..layers-1 hold `length` slots, which was written past this object."""
        self._lengths[:layers] = [length] * layers

    def keep_rows(self, start: int, lengths: list[int], paths: list[list[int]]) -> None:
        """`keep`, row by row: of the slots from `start` on, row b keeps start + paths[b], moved to lengths[b] on, which
        is where its own text ends; `length` is then the longest row's."""
        assert self._store is not None
        store, most = self._store, max(map(len, paths))
        device = store.device
        source_BA = torch.tensor([[start + n for n in p] + [start] * (most - len(p)) for p in paths], device=device)
        target_BA = torch.tensor(lengths, device=device)[:, None] + torch.arange(most, device=device)
        everywhere = (*store.shape[:2], -1, store.shape[3], -1, store.shape[5])
        moved = store.gather(4, source_BA[None, None, :, None, :, None].expand(everywhere))
        store.scatter_(4, target_BA[None, None, :, None, :, None].expand(everywhere), moved)
        if self._positions_BC is not None:
            self._positions_BC.scatter_(1, target_BA, self._positions_BC.gather(1, source_BA))
        self._lengths = [max(n + len(p) for n, p in zip(lengths, paths, strict=True))] * len(self._lengths)

    def leave(self, row: int) -> None:
        """Forgets a row; the last one takes its place."""
        assert self._store is not None
        last = self._store.shape[2] - 1
        if row != last:
            self._store.select(2, row).copy_(self._store.select(2, last))
        self._hold(self._store.narrow(2, 0, last))
        if self._positions_BC is not None:
            self._positions_BC[row] = self._positions_BC[last].clone()
            self._positions_BC = self._positions_BC[:last]

    def select(self, rows_A: Tensor) -> None:
        """Of all rows keep these, in this order; forget the others."""
        if self._store is not None:
            self._hold(self._store.index_select(2, rows_A.to(self._store.device)))
        if self._positions_BC is not None:
            self._positions_BC = self._positions_BC.index_select(0, rows_A.to(self._positions_BC.device))

    def _allocate(self, key: Tensor, needed: int) -> None:
        assert not self._is_view, f"{needed} slots were not reserved before a row was looked at alone"
        while self._capacity < needed:
            self._capacity *= 2
        batch, heads, _, head_dim = key.shape
        old, used = self._store, max(self._lengths)
        # zeros: rows of a batch leave holes that nobody writes to, and a NaN there would pass through any mask
        self._hold(key.new_zeros(2, len(self._lengths), batch, heads, self._capacity, head_dim))
        if old is not None:
            self._copy_slots(old, used)

    def _hold(self, store: Tensor) -> None:
        self._store = store
        self._keys, self._values = list(store[0]), list(store[1])

    @torch.no_grad()
    def _copy_slots(self, source: Tensor, used: int) -> None:
        assert self._store is not None
        self._store.narrow(4, 0, used).copy_(source.narrow(4, 0, used))
