"""The plain losses against sums spelled out row by row, and the chunked ones against the plain ones."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.losses import linear_cross_entropy, linear_soft_cross_entropy


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, counted: Tensor, cap: float | None) -> Tensor:
    """-log p of the target, one counted row after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(x)):
        if not counted[row]:
            continue
        scores = []
        for v in range(len(w)):
            z = sum(x[row, d] * w[v, d] for d in range(len(w[v]))) + (0 if b is None else b[v])
            scores.append(z if cap is None else cap * torch.tanh(z / cap))
        total = total + torch.log(sum(s.exp() for s in scores)) - scores[target[row]]
    return total


@pytest.mark.parametrize(("bias", "cap", "plain"), list(product([False, True], [None, 1.5], [False, True])))
def test_hard_labels_equal_the_oracle(bias: bool, cap: float | None, plain: bool) -> None:
    x, w, b = drawn(7, 4), drawn(5, 4, seed=1), drawn(5, seed=2) if bias else None
    target, counted = torch.tensor([0, 4, 2, 2, 1, 3, 0]), torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()
    sides = [[None if t is None else t.clone().requires_grad_() for t in (x, w, b)] for _ in range(2)]
    how: dict[str, Any] = {"bias_V": sides[0][2], "softcap": cap, "counted_N": counted, "plain": plain, "rows": 2}
    value, best = linear_cross_entropy(sides[0][0], sides[0][1], target, **how)
    want = oracle(*sides[1], target, counted, cap)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    value.backward()
    want.backward()
    for ours, theirs in zip(*sides, strict=True):
        assert ours is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    logits = x @ w.T + (0 if b is None else b)
    assert torch.equal(best, torch.where(counted, logits.argmax(-1), -1))


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_hard_labels(bias: bool) -> None:
    target, counted = torch.tensor([1, 0, 3, 2, 2]), torch.tensor([1, 0, 1, 1, 0]).bool()

    def f(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
        how: dict[str, Any] = {"bias_V": b[0] if b else None, "counted_N": counted, "plain": True}
        return linear_cross_entropy(x, w, target, **how)[0]

    inputs = [drawn(5, 3), drawn(4, 3, seed=1), *([drawn(4, seed=2)] if bias else [])]
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


def soft(x: Tensor, w: Tensor, b: Tensor, **how: Any) -> Any:
    teacher, kept = 2 * drawn(6, 5, seed=3), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    counted = torch.tensor([[1, 1, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]]).bool()
    ask: Callable[[int, int], Any] = lambda start, stop: (teacher[start:stop], kept[start:stop])  # noqa: E731
    return linear_soft_cross_entropy(x, [w, w], ask, counted, biases=[b, None], factors=[1.0, 0.5], **how)


@pytest.mark.parametrize(("top_k", "cap", "measure"), list(product([None, 2, 50], [None, 1.5], [False, True])))
def test_soft_labels_equal_the_chunked_ones(top_k: int | None, cap: float | None, measure: bool) -> None:
    sides = [
        [t.clone().requires_grad_() for t in (drawn(2, 6, 3), drawn(5, 3, seed=1), drawn(5, seed=2))] for _ in "ab"
    ]
    how: dict[str, Any] = {"top_k": top_k, "softcap": cap, "measure": measure}
    plain, chunked = soft(*sides[0], plain=True, **how), soft(*sides[1], rows=2, **how)
    for name, a, b in zip(plain._fields, plain, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    plain.sum.backward()
    chunked.sum.backward()
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradcheck_of_soft_labels(top_k: int | None) -> None:
    inputs = [t.requires_grad_() for t in (drawn(2, 6, 3), drawn(5, 3, seed=1), drawn(5, seed=2))]
    assert torch.autograd.gradcheck(lambda *given: soft(*given, plain=True, top_k=top_k).sum, inputs)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n", [0, 6])
def test_nothing_counted_is_a_loss_of_nothing(plain: bool, n: int) -> None:
    x, w, b = (t.requires_grad_() for t in (drawn(2, n, 3), drawn(5, 3, seed=1), drawn(5, seed=2)))
    none, target = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    hard, best = linear_cross_entropy(x[0], w, target, bias_V=b, counted_N=none, plain=plain)
    teacher = drawn(n, 5, seed=3)
    out = linear_soft_cross_entropy(x, [w, w], lambda i, j: (teacher[i:j], None), none.expand(2, n), plain=plain)
    (hard + out.sum).backward()
    assert hard.item() == out.sum.item() == 0
    assert best.tolist() == [-1] * n
    assert all(t.grad is None or not t.grad.any() for t in (x, w, b))


def test_the_plain_step_holds_every_logit_of_every_position(made_tensors: Any) -> None:
    """Rows that do not count included: what a bench compares with must not become cheaper by accident."""
    n, v = 40, 30
    x, w = drawn(2, n, 3).requires_grad_(), drawn(v, 3, seed=1)
    few, teacher = torch.arange(n) < 4, drawn(n, v, seed=2)
    with made_tensors() as hard:
        linear_cross_entropy(x[0], w, torch.zeros(n, dtype=torch.long), counted_N=few, plain=True)
    with made_tensors() as labels:
        linear_soft_cross_entropy(x, [w, w], lambda i, j: (teacher[i:j], None), few.expand(2, n), plain=True)
    assert hard.elements.count(n * v) >= 2  # logits and their log-softmax
    assert labels.elements.count(n * v) >= 5  # the teacher's distribution, and both of each student
    with made_tensors() as chunked:
        linear_cross_entropy(x[0], w, torch.zeros(n, dtype=torch.long), counted_N=few)
    assert max(chunked.elements) <= n * 3
