"""Building blocks that several heads share: residual blocks, and Llama's decoder block with K/V of a head's own.

Shapes: B rows, Q positions of this forward, S slots of the K/V including this forward's, D hidden size,
H attention heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import KV, BaseSpec, BaseView, Capture


class ResBlock(nn.Module):
    """x + SiLU(W x + b), W square. Zero W and b make it the identity (`reset` does)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def reset(self) -> None:
        """The identity. PyTorch's own bias init is not zero and would leave the block off the identity."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys, grouped and turned as the base's, without its sliding
    window. `size`: width of its input, where that is not the hidden size. Positions are the caller's; K/V, where
    given, holds earlier forwards'."""

    def __init__(self, spec: BaseSpec, size: int | None = None) -> None:
        super().__init__()
        size, wide, narrow = size or spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.head_dim, self.frequencies, self.scale = spec.head_dim, spec.rope_frequencies, spec.rope_scale
        self.q_proj = nn.Linear(size, wide, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(size, narrow, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(size, narrow, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(wide, spec.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(spec.head_dim, eps=spec.norm_eps) if spec.qk_norm else None
        self.k_norm = nn.RMSNorm(spec.head_dim, eps=spec.norm_eps) if spec.qk_norm else None

    def queries(self, x_BQD: Tensor, positions_BQ: Tensor) -> Tensor:
        """Rotated queries [B, H, Q, head_dim]."""
        q = self._apart(self.q_proj, x_BQD)
        q = q if self.q_norm is None else self.q_norm(q)
        return rotate(q, positions_BQ, self.frequencies, self.scale)

    def slots(self, x_BQD: Tensor, positions_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values: [B, H of the keys, Q, head_dim] each."""
        k = self._apart(self.k_proj, x_BQD)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(k, positions_BQ, self.frequencies, self.scale), self._apart(self.v_proj, x_BQD)

    def _apart(self, projection: nn.Module, x_BQD: Tensor) -> Tensor:
        return projection(x_BQD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def join(self, out_BHQd: Tensor) -> Tensor:
        return self.o_proj(out_BHQd.transpose(1, 2).flatten(2))

    def forward(
        self, x_BQD: Tensor, positions_BQ: Tensor, mask_BQS: Tensor | None = None, kv: KV | None = None, layer: int = 0
    ) -> Tensor:
        """mask True = may attend; None = causal over the K/V's slots and this forward's."""
        q, (k, v) = self.queries(x_BQD, positions_BQ), self.slots(x_BQD, positions_BQ)
        if kv is not None:
            k, v = kv.update(k, v, layer)
        queries, slots = q.shape[2], k.shape[2]
        if mask_BQS is None and queries > 1 and slots > queries:  # torch's own causal rule aligns to the other corner
            mask_BQS = torch.ones(1, queries, slots, dtype=torch.bool, device=q.device).tril(slots - queries)
        mask_B1QS = None if mask_BQS is None else mask_BQS[:, None]
        causal = mask_BQS is None and queries > 1
        out = F.scaled_dot_product_attention(q, k, v, mask_B1QS, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.join(out)


class MLP(nn.Module):
    """Llama's: down(SiLU(gate x) * up x)."""

    def __init__(self, spec: BaseSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Llama's block, pre-norm: x + Attention(norm x), then x + MLP(norm x)."""

    def __init__(self, spec: BaseSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.mlp = MLP(spec)

    def forward(
        self, x_BQD: Tensor, positions_BQ: Tensor, mask_BQS: Tensor | None = None, kv: KV | None = None, layer: int = 0
    ) -> Tensor:
        x_BQD = x_BQD + self.self_attn(self.input_layernorm(x_BQD), positions_BQ, mask_BQS, kv, layer)
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD))

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Becomes a copy of a base's block (`BaseView.block_weights`)."""
        own = dict(self.named_parameters())
        assert own.keys() == weights.keys(), f"not the same block: {sorted(own.keys() ^ weights.keys())}"
        for name, p in own.items():
            p.copy_(weights[name])


def rotate(x_BHQd: Tensor, positions_BQ: Tensor, frequencies: Sequence[float] = (), scale: float = 1.0) -> Tensor:
    """Rotary position embedding in Hugging Face's layout: the first half of a head pairs with the second.
    frequencies: radians per position of each pair; none: 10000^(-2i/d)."""
    size = x_BHQd.shape[-1]
    exact = torch.promote_types(x_BHQd.dtype, torch.float32)
    if frequencies:
        turns = torch.tensor(frequencies, device=x_BHQd.device, dtype=exact)
    else:
        turns = 10000.0 ** -(torch.arange(0, size, 2, device=x_BHQd.device, dtype=exact) / size)
    angles = positions_BQ[:, None, :, None].to(exact) * turns
    cos, sin = ((f(torch.cat([angles, angles], -1)) * scale).to(x_BHQd.dtype) for f in (torch.cos, torch.sin))
    one, two = x_BHQd.chunk(2, -1)
    return x_BHQd * cos + torch.cat([-two, one], -1) * sin


def as_head(x: Tensor, head: nn.Module) -> Tensor:
    """What the base left, in the head's precision: fp32 heads may stand on a bf16 base. Autocast sees to itself."""
    dtype = next(head.parameters()).dtype
    return x if x.dtype == dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def project(base: BaseView, hidden: Tensor) -> Tensor:
    """Logits of a head's hidden state through the base's own frozen lm_head."""
    return base.lm_head(hidden.to(base.lm_head_weight.dtype))


def final_norm_weight(base: BaseView) -> Tensor:
    """[D] of an RMS norm: what it makes of equal numbers; of large ones, without a trace of its epsilon."""
    return base.final_norm(torch.full_like(base.lm_head_weight[0], 1024.0))


def teacher(base: BaseView, seen: Capture, rows_N: Tensor, top_k: int | None) -> Callable[[int, int], Any]:
    """What linear_soft_cross_entropy asks, chunk by chunk, of the base's distributions at these positions (b * T + t):
    the likeliest tokens that a store kept, where they are as many as are wanted, else `final` through the lm_head."""
    if seen.likeliest is not None and top_k is not None and top_k <= seen.likeliest[0].shape[-1]:
        ids_Pk, logits_Pk = (t.flatten(0, 1) for t in seen.likeliest)
        return lambda start, stop: (logits_Pk[rows_N[start:stop]], None, ids_Pk[rows_N[start:stop]])
    final_ND = cast(Tensor, seen.final).detach().flatten(0, 1)[rows_N]
    return lambda start, stop: (base.lm_head(final_ND[start:stop]), None)
