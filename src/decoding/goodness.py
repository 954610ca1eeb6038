"""Whether counts fit a distribution, or each other: the statistics that sampling is tested with.

V cells, C of them after pooling. A p-value is the chance of a fit at least as bad if there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RARE = 5.0  # the least expectation for which a cell's chi-square is one (Cochran 1954)


def chi_square(counts_V: Tensor, expected_V: Tensor) -> float:
    """The p-value of Pearson's goodness of fit. expected_V, of counts_V's shape, may be of any scale: probabilities or
    counts. Cells that expect less than five are one. 0 where something was counted that cannot be; 1 where all
    cells are one, which cannot tell anything."""
    seen_C, due_C = pooled(counts_V, expected_V)
    if bool((counts_V[expected_V == 0] > 0).any()):
        return 0.0
    return _upper_tail((seen_C - due_C).square() / due_C, len(due_C) - 1)


def two_sample(counts_1V: Tensor, counts_2V: Tensor) -> float:
    """The p-value of the chi-square test of homogeneity: both were counted from one distribution, whatever it is.
    Cells of which the smaller sample expects less than five, by their joint count, are one."""
    counts_2S = torch.stack([counts_1V.flatten(), counts_2V.flatten()]).double()
    share_2 = counts_2S.sum(1) / counts_2S.sum()
    seen_2C = _merge(counts_2S, counts_2S.sum(0) * share_2.min())
    due_2C = share_2[:, None] * seen_2C.sum(0)
    return _upper_tail((seen_2C - due_2C).square() / due_2C, seen_2C.shape[1] - 1)


def holm(p_values: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which of these hypotheses are rejected, the chance of rejecting any true one being at most alpha (Holm 1979): the
    smallest p-value is held against alpha / m, the next against alpha / (m - 1), up to the first that passes."""
    rejected = [False] * len(p_values)
    for place, n in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[n] > alpha / (len(p_values) - place):
            break
        rejected[n] = True
    return rejected


def pooled(counts_V: Tensor, expected_V: Tensor) -> tuple[Tensor, Tensor]:
    """(seen_C, due_C), fp64: what was counted and what was to be expected of it, cell by cell, the rare ones as one."""
    counts_S, due_S = counts_V.flatten().double(), expected_V.flatten().double()
    due_S = due_S * (counts_S.sum() / due_S.sum())
    seen_C, due_C = _merge(torch.stack([counts_S, due_S]), due_S)
    return seen_C, due_C


def _merge(rows_RV: Tensor, due_V: Tensor) -> Tensor:
    """rows_RC with the cells of the least due_V added up to one: all below RARE, and more until together they are
    not rare themselves."""
    due_V, order_V = due_V.sort()
    count = int((due_V < RARE).sum())
    if count:
        count = max(count, int((due_V.cumsum(0) < RARE).sum()) + 1)
    rows_RV = rows_RV[:, order_V]
    pool_R1 = rows_RV[:, :count].sum(1, keepdim=True)
    return torch.cat([pool_R1, rows_RV[:, count:]], 1) if count else rows_RV


def _upper_tail(terms: Tensor, freedom: int) -> float:
    """The chance that a chi-square of so many degrees of freedom exceeds the sum of the terms."""
    if freedom < 1:
        return 1.0
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, terms.sum() / 2))
