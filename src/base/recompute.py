"""Activation checkpointing of the base's blocks: a block that gradients pass through keeps its input alone and computes
the rest again in the backward pass. Memory for time; the gradients are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from draftsmith.base.kv import KV


def run(block: Callable[..., Tensor], hidden_BQD: Tensor, inputs: dict[str, Any], kv: Any) -> Tensor:
    """The block's output [B, Q, D], computed again in the backward pass if there is going to be one.

    Never on a K/V of ours: computed again, the block would append to it a second time. (What kv_prediction gives in its
    place only hands out.) Dropout draws the same numbers again: torch keeps the generators' state.
    """
    if not torch.is_grad_enabled() or isinstance(kv, KV):
        return block(hidden_BQD, **inputs)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, hidden_BQD, use_reentrant=False, preserve_rng_state=True, **inputs)
