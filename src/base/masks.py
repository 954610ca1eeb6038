"""Attention masks: True = may attend, until the very end, where they become what attention modules add.

Hugging Face's eager attention *adds* whatever it is given, so a bool or integer mask is silently wrong
there; every mask that leaves for a block is therefore additive and in the hidden states' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_slots: int, device: torch.device) -> Tensor:
    """[1, Q, S] bool: the queries are the last Q slots, each sees the slots up to its own."""
    full = torch.ones(1, num_queries, num_slots, dtype=torch.bool, device=device)
    return full.tril_(num_slots - num_queries)


def within_window(positions_BQ: Tensor, positions_BS: Tensor, window: int) -> Tensor:
    """[B, Q, S] bool: the key lies less than `window` positions before the query.

    By positions, not by slots: in a tree, siblings share a position while their slots are apart.
    """
    return positions_BQ[:, :, None] - positions_BS[:, None, :] < window


def additive(mask_BQS: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Q, S]: 0 where True, the dtype's most negative number where False."""
    zeros = torch.zeros(mask_BQS.shape, dtype=dtype, device=mask_BQS.device)
    return zeros.masked_fill_(~mask_BQS, torch.finfo(dtype).min).unsqueeze(1)
