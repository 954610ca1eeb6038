"""The only time shift in the repository: which token is k ahead, and does it count?

Position t of a packed row predicts x_{t+k}. A target exists when t+k lies in the row and in the same
document; it counts when the mask selects *the token being predicted* (never the token at t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def places(counted: Tensor, skip_masked: bool) -> tuple[Tensor, Tensor | None]:
    """(where_N, counted_N): which entries of `counted` (bool, flattened) a loss looks at, and which of those count;
    None: all."""
    counted_P = counted.flatten()
    if skip_masked:
        return counted_P.nonzero().squeeze(1), None
    return torch.arange(len(counted_P), device=counted_P.device), counted_P


@dataclass(frozen=True)
class Lessons:
    """Which of the base's distributions teach, and whom. Positions count through all rows: b * T + t.

    rows_N: where the base's distribution is some student's target. gold_N: the token that followed there.
    students_KN: where student k stands that row n teaches; counted_KN: whether there is one.
    """

    rows_N: Tensor
    gold_N: Tensor
    students_KN: Tensor
    counted_KN: Tensor

    def at_students(self, value_KN: Tensor, like_BT: Tensor) -> Tensor:
        """[K, B, T]: a value per lesson, laid out where its student stands; 0 (False) elsewhere."""
        out_KP = value_KN.new_zeros(len(value_KN), like_BT.numel())
        for out_P, value_N, where_N, counted_N in zip(out_KP, value_KN, self.students_KN, self.counted_KN, strict=True):
            out_P[where_N[counted_N]] = value_N[counted_N]
        return out_KP.view(-1, *like_BT.shape)


def lessons(
    tokens_BT: Tensor, mask_BT: Tensor, documents_BT: Tensor, ahead: Sequence[int], *, everywhere: bool = False
) -> Lessons:
    """Soft labels: student k at t imitates the base at t + ahead[k], whose distribution is that of
    x_{t + ahead[k] + 1}; it counts when that token does. No row teaches nobody, unless `everywhere`: then all
    positions are rows, and those that teach nobody are counted by none."""
    flat_BT = torch.arange(tokens_BT.numel(), device=tokens_BT.device).view_as(tokens_BT)
    taught = []
    for k in ahead:
        _, counted_BT = counted_targets(tokens_BT, mask_BT, documents_BT, k + 1)
        teacher_BT, _ = future_tokens(flat_BT, documents_BT, k)
        students = counted_BT.reshape(-1).nonzero().squeeze(1)
        taught.append((students, teacher_BT.reshape(-1)[students]))
    used_P = torch.full_like(flat_BT, everywhere, dtype=torch.bool).view(-1)
    for _, rows in taught:
        used_P[rows] = True
    rows_N = used_P.nonzero().squeeze(1)
    number_P = used_P.cumsum(0) - 1
    students_KN = rows_N.new_zeros(len(taught), len(rows_N))
    counted_KN = torch.zeros_like(students_KN, dtype=torch.bool)
    for k, (students, rows) in enumerate(taught):
        students_KN[k, number_P[rows]] = students
        counted_KN[k, number_P[rows]] = True
    gold_BT, _ = future_tokens(tokens_BT, documents_BT, 1)
    return Lessons(rows_N, gold_BT.reshape(-1)[rows_N], students_KN, counted_KN)
