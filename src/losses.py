"""Loss primitives: pure functions of tensors, no policy.

The vocabulary projection is where a head trainer's memory goes: K heads x tokens x vocabulary. Here the
logits of a few hundred rows at a time exist only while their loss and gradient are formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**21  # logits alive at a time; 256 rows at V = 8192 was the fastest chunk measured on a CPU


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of (x W^T + b); gradients are formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        total_dtype = torch.promote_types(x_ND.dtype, torch.float32)
        grads = [t is not None and ctx.needs_input_grad[i] for i, t in enumerate((x_ND, weight_VD, bias_V))]
        dx_ND = torch.empty_like(x_ND) if grads[0] else None
        dw_VD = torch.zeros_like(weight_VD, dtype=total_dtype) if grads[1] else None
        db_V = torch.zeros_like(bias_V, dtype=total_dtype) if grads[2] and bias_V is not None else None
        total = x_ND.new_zeros((), dtype=total_dtype)
        best_N = torch.empty_like(target_N)
        for i in range(0, x_ND.shape[0], rows):
            x, target = x_ND[i : i + rows], target_N[i : i + rows, None]
            logits = x @ weight_VD.t()
            logits = logits.to(total_dtype) if bias_V is None else logits.to(total_dtype) + bias_V
            torch.argmax(logits, -1, out=best_N[i : i + rows])
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(1, target)).sum()
            if not any(grads):
                continue
            g = logits.sub_(lse).exp_()  # softmax - one-hot, in place of the logits
            g.scatter_add_(1, target, torch.full_like(lse, -1.0))
            if db_V is not None:
                db_V += g.sum(0)
            g = g.to(x_ND.dtype)
            if dx_ND is not None:
                dx_ND[i : i + rows] = g @ weight_VD
            if dw_VD is not None:
                dw_VD += g.t() @ x  # summed in fp32: many bf16 chunks would lose their small parts
        ctx.save_for_backward(dx_ND, dw_VD, db_V)
        ctx.mark_non_differentiable(best_N)
        return total, best_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if t is None else t.mul_(outputs[0].to(t.dtype)) for t in ctx.saved_tensors]
        return *scaled, None, None


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum, best_N): summed cross-entropy of logits x W^T + b against target_N, and each row's argmax.

    sum: fp32 scalar (fp64 for fp64 inputs), in nats, with gradients for x, W and b where they require them;
    best_N: int64, no gradient. At most `rows` x V logits exist at a time. Give only rows that count: there
    is no ignore index. Works on N = 0 (sum 0, zero gradients). One backward only.
    """
    rows = rows or max(64, CHUNK_LOGITS // weight_VD.shape[0])
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.to(x_ND.dtype)
    return _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, target_N, rows)
