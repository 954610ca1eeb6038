"""The vocabulary losses as one would write them first: every logit at once, autograd for the gradients.

What a bench calls the plain step (`loss.impl=plain`), and what the chunked ones of losses.py are checked against. Their
memory grows with tokens x vocabulary; nobody makes them faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def logits_of(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """[N, V] of x W^T + b, in fp32 at least, under the cap c tanh(z / c) where there is one."""
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    logits_NV = (x_ND @ weight_VD.to(x_ND.dtype).t()).to(exact)
    logits_NV = logits_NV if bias_V is None else logits_NV + bias_V
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    counted_N: Tensor,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """What losses.linear_cross_entropy gives, from whole logits; rows that do not count are computed and ignored."""
    logits_NV = logits_of(x_ND, weight_VD, bias_V, softcap)
    learned_N = target_N.masked_fill(~counted_N, IGNORED)
    summed = F.cross_entropy(logits_NV, learned_N, ignore_index=IGNORED, reduction="sum")
    if not measure:
        return summed, torch.full_like(target_N, -1)
    return summed, logits_NV.detach().argmax(-1).masked_fill(~counted_N, -1)


def soft_cross_entropy(
    x_KND: Tensor,
    weights: Sequence[Tensor],
    teacher: Callable[[int, int], tuple[Tensor, Tensor | None] | tuple[Tensor, None, Tensor]],
    counted_KN: Tensor,
    biases: Sequence[Tensor | None],
    factors: Sequence[float],
    top_k: int | None,
    measure: bool,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """The fields of losses.SoftOut, from whole logits of the teacher and of every student."""
    exact = torch.promote_types(x_KND.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x_KND.device.type, enabled=False):
        taught_NV, kept_N, *given = teacher(0, x_KND.shape[1])
        values_NT, ids_NT = taught_NV[:, :top_k], given[0][:, :top_k] if given else None
        if top_k is not None and not given:
            values_NT, ids_NT = taught_NV.topk(min(top_k, taught_NV.shape[1]), -1)
        p_NT = values_NT.softmax(-1, dtype=exact)
        entropy_N = torch.special.entr(p_NT).sum(-1) if measure else p_NT.new_zeros(len(p_NT))
    total, sums, floors, overlaps, best, chance = x_KND.new_zeros((), dtype=exact), [], [], [], [], []
    for x_ND, weight, bias, factor, counted_N in zip(x_KND, weights, biases, factors, counted_KN, strict=True):
        log_q_NV = logits_of(x_ND, weight, bias, softcap).log_softmax(-1)
        teaches_N = counted_N if kept_N is None else counted_N & kept_N
        picked_NT = log_q_NV if ids_NT is None else log_q_NV.gather(1, ids_NT)
        summed = -(p_NT * picked_NT).sum(-1)[teaches_N].sum()
        total = total + factor * summed
        sums.append(summed.detach())
        if measure:
            top_N, best_N = log_q_NV.detach().max(-1)
            floors.append(entropy_N[teaches_N].sum())
            overlaps.append(torch.minimum(p_NT, picked_NT.detach().exp()).sum(-1)[teaches_N].sum())
            best.append(best_N.masked_fill(~counted_N, -1))
            chance.append(top_N.exp().masked_fill(~counted_N, 0))
    if measure:
        return total, *(torch.stack(found) for found in (sums, floors, overlaps, best, chance))
    none_K, none_KN = x_KND.new_zeros(len(sums), dtype=exact), x_KND.new_zeros(x_KND.shape[:2], dtype=exact)
    return total, torch.stack(sums), none_K, none_K, torch.full_like(none_KN, -1, dtype=torch.long), none_KN
