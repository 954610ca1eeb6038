"""The chunked cross-entropy against the plain one on whole logits."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.losses import CHUNK_LOGITS, linear_cross_entropy


def inputs(n: int, d: int, v: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (v, d)))
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return x, w, b, torch.randint(v, (n,), generator=g)


def plain(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, w, b)
    return F.cross_entropy(logits, target, reduction="sum"), logits.argmax(-1)


def leaves(tensors: Any, wants: Any) -> list[Tensor | None]:
    return [None if t is None else t.clone().requires_grad_(w) for t, w in zip(tensors, wants, strict=True)]


@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 13, 100])
def test_value_and_gradients(wants: tuple[bool, bool, bool], bias: bool, rows: int) -> None:
    """fp64, every choice of what learns, chunks that divide the 13 rows and chunks that do not."""
    x, w, b, target = inputs(13, 5, 11, bias=bias)
    ours, theirs = leaves((x, w, b), wants), leaves((x, w, b), wants)
    value, best = linear_cross_entropy(ours[0], ours[1], target, bias_V=ours[2], rows=rows)
    want, want_best = plain(*theirs, target)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    assert value.dtype == torch.float64
    assert torch.equal(best, want_best)
    learning = [(a, c) for a, c in zip(ours, theirs, strict=True) if a is not None and a.requires_grad]
    assert value.requires_grad == bool(learning)
    if learning:
        (value * 0.37).backward()
        (want * 0.37).backward()
    for a, c in zip(ours, theirs, strict=True):
        if a is not None and not a.requires_grad:
            assert a.grad is None
        elif a is not None:
            torch.testing.assert_close(a.grad, c.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_no_rows(bias: bool) -> None:
    """§11.15: nothing counted is a loss of 0 with zero gradients, never NaN."""
    x, w, b, target = inputs(0, 5, 11, bias=bias)
    x, w, b = leaves((x, w, b), (True, True, True))
    value, best = linear_cross_entropy(x, w, target, bias_V=b)
    value.backward()
    assert value.item() == 0
    assert best.shape == (0,)
    assert x.grad.shape == (0, 5)
    assert not w.grad.any()
    assert b is None or not b.grad.any()


@pytest.mark.parametrize("rows", [None, 3])
def test_bf16_stays_close_to_fp32(rows: int | None) -> None:
    x, w, b, target = inputs(64, 32, 97, dtype=torch.bfloat16)
    low = leaves((x, w, b), (True, True, True))
    high = leaves((x.float(), w.float(), b.float()), (True, True, True))
    value, _ = linear_cross_entropy(low[0], low[1], target, bias_V=low[2], rows=rows)
    want, _ = plain(*high, target)
    value.backward()
    want.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(want.item(), rel=5e-3)
    for a, c in zip(low, high, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert float((a.grad.float() - c.grad).norm()) < 1e-2 * float(c.grad.norm())


def test_mixed_dtypes_compute_in_x_dtype() -> None:
    """An fp32 hidden state on a bf16 lm_head: the weight is widened, its gradient comes back in bf16."""
    x, w, _, target = inputs(6, 4, 9, bias=False, dtype=torch.bfloat16)
    x, w = x.float().requires_grad_(), w.requires_grad_()
    value, _ = linear_cross_entropy(x, w, target)
    value.backward()
    torch.testing.assert_close(value, plain(x, w.float(), None, target)[0])
    assert (x.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16)


def test_extreme_logits_stay_finite() -> None:
    x, w = torch.tensor([[1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.0]])
    value, best = linear_cross_entropy(x, w, torch.tensor([1]))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert best.tolist() == [0]
    assert x.grad.isfinite().all()


def test_floor_is_the_entropy_of_the_targets() -> None:
    """§11.16, hard targets: with a one-hot answer the floor is 0; with a fixed bias that is the targets' own
    frequencies the mean loss is their entropy, and there is no slope left."""
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    b = p.log().requires_grad_()
    x, w = torch.zeros(10, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    value, _ = linear_cross_entropy(x, w, target, bias_V=b, rows=4)
    value.backward()
    torch.testing.assert_close(value / 10, -(p * p.log()).sum())
    torch.testing.assert_close(b.grad, torch.zeros_like(p), atol=1e-12, rtol=0)
    sure, _ = linear_cross_entropy(100 * torch.eye(3), torch.eye(3), torch.arange(3))
    assert sure.item() == pytest.approx(0, abs=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_whole_logits_never_exist() -> None:
    n, d, v, rows = 5000, 8, 300, 64
    x, w, b, target = inputs(n, d, v, dtype=torch.float32)
    x, w, b = leaves((x, w, b), (True, True, True))
    with Largest() as seen:
        linear_cross_entropy(x, w, target, bias_V=b, rows=rows)[0].backward()
    assert seen.elements <= max(rows * v, v * d, n * d)
    with Largest() as control:
        plain(x, w, b, target)[0].backward()
    assert control.elements >= n * v  # the watch does see whole logits where they exist


def test_default_chunk_bounds_the_logits() -> None:
    n, d, v = 600, 2, 2**14
    x, w, _, target = inputs(n, d, v, bias=False, dtype=torch.float32)
    with Largest() as seen:
        linear_cross_entropy(x, w.requires_grad_(), target)
    assert seen.elements <= CHUNK_LOGITS < n * v


def test_a_second_backward_is_never_silently_wrong() -> None:
    x, w, _, target = inputs(4, 3, 5, bias=False)
    x.requires_grad_()
    value, _ = linear_cross_entropy(x, w, target)
    (value * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
