"""The only time shift in the repository: which token is k ahead, and does it count?

Position t of a packed row predicts x_{t+k}. A target exists when t+k lies in the row and in the same
document; it counts when the mask selects *the token being predicted* (never the token at t).
"""

from __future__ import annotations

import torch
from torch import Tensor


def future_tokens(tokens_BT: Tensor, documents_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(target_BT, valid_BT): the value k positions ahead and whether it exists in the same document.

    Works for any per-position value (tokens, masks). Never wraps; where `valid` is False the target is 0.
    documents_BT: >= 0, or -1 for padding, which has no targets and is none.
    """
    if k < 0:
        raise ValueError(f"k={k}: targets lie ahead")
    target_BT, valid_BT = torch.zeros_like(tokens_BT), torch.zeros_like(documents_BT, dtype=torch.bool)
    ahead = tokens_BT.shape[1] - k
    if ahead > 0:
        target_BT[:, :ahead] = tokens_BT[:, k:]
        now, then = documents_BT[:, :ahead], documents_BT[:, k:]
        valid_BT[:, :ahead] = (now == then) & (now >= 0)
    return target_BT * valid_BT, valid_BT


def counted_targets(tokens_BT: Tensor, mask_BT: Tensor, documents_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(target_BT, counted_BT): x_{t+k}, and whether training learns to predict it from t."""
    target_BT, valid_BT = future_tokens(tokens_BT, documents_BT, k)
    selected_BT, _ = future_tokens(mask_BT.to(torch.bool), documents_BT, k)
    return target_BT, valid_BT & selected_BT


def count_targets(mask_BT: Tensor, documents_BT: Tensor, horizon: int) -> Tensor:
    """counts_K [horizon + 1] int64: how many counted targets lie k ahead, for k = 0..horizon."""
    counts = [counted_targets(mask_BT, mask_BT, documents_BT, k)[1].sum() for k in range(horizon + 1)]
    return torch.stack(counts).to(torch.int64)
