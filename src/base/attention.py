"""Attention of packed rows, one document after the other: causal each, no mask, nothing computed that nobody may see.

Exact, and on a CPU the cheapest that was measured (docs/benchmarks.md): what a mask hides is computed there anyway.
Hugging Face's blocks find it by name; without documents it is their own sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "sdpa_by_document"
Spans = list[tuple[int, int, int]]
"""(row, start, stop) of each document of a batch."""


def spans_of(documents_BT: Tensor) -> Spans:
    """Of every document, padding (-1) left out."""
    found: Spans = []
    for row, documents in enumerate(documents_BT.tolist()):
        start = 0
        for t in range(1, len(documents) + 1):
            if t == len(documents) or documents[t] != documents[start]:
                if documents[start] >= 0:
                    found.append((row, start, t))
                start = t
    return found


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Spans | None = None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, head_dim] as transformers' attention functions give it; 0 at padding."""
    if spans is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    groups = query.shape[1] // key.shape[1]
    key, value = (t if groups == 1 else t.repeat_interleave(groups, 1) for t in (key, value))
    out = torch.zeros_like(query)
    for row, start, stop in spans:
        q, k, v = (t[row : row + 1, :, start:stop] for t in (query, key, value))
        out[row : row + 1, :, start:stop] = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def install(model: Any) -> None:
    """Makes it the model's attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
