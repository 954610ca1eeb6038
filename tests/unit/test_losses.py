"""The chunked cross-entropy against the plain one on whole logits."""

import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith.losses import CHUNK_LOGITS, SoftOut, linear_cross_entropy, linear_soft_cross_entropy


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


def test_whole_logits_never_exist(made_tensors: Any) -> None:
    n, d, v, rows = 5000, 8, 300, 64
    x, w, b, target = inputs(n, d, v, dtype=torch.float32)
    x, w, b = leaves((x, w, b), (True, True, True))
    with made_tensors() as seen:
        linear_cross_entropy(x, w, target, bias_V=b, rows=rows)[0].backward()
    assert max(seen.elements) <= max(rows * v, v * d, n * d)
    with made_tensors() as control:
        plain(x, w, b, target)[0].backward()
    assert max(control.elements) >= n * v  # the watch does see whole logits where they exist


def test_default_chunk_bounds_the_logits(made_tensors: Any) -> None:
    n, d, v = 600, 2, 2**14
    x, w, _, target = inputs(n, d, v, bias=False, dtype=torch.float32)
    with made_tensors() as seen:
        linear_cross_entropy(x, w.requires_grad_(), target)
    assert max(seen.elements) <= CHUNK_LOGITS < n * v


class Live(TorchDispatchMode):
    """The most bytes of tensors that existed at one time, of those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.known | held:
                size = t.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(t.untyped_storage(), self.gone, key, size)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def extra(n: int, v: int, rows: int) -> int:
    """Bytes at the peak of a loss and its gradients, without what has the size of the hidden states or the weights."""
    d = 16
    x, w, b, target = inputs(n, d, v, dtype=torch.float32)
    x, w, b = leaves((x, w, b), (True, True, True))
    with Live() as seen:
        value, _ = linear_cross_entropy(x, w, target, bias_V=b, rows=rows)
        value.backward()
    return seen.most - 4 * (x.numel() + w.numel() + b.numel()) - 8 * n


def test_memory_is_flat_in_tokens_and_vocabulary() -> None:
    """At a fixed chunk of logits, beyond weights, hidden states and their gradients."""
    one = extra(4096, 512, rows=256)
    assert one >= 4 * 256 * 512
    assert extra(8192, 512, rows=256) == pytest.approx(one, rel=0.05)
    assert extra(4096, 1024, rows=128) == pytest.approx(one, rel=0.05)


def test_a_second_backward_is_never_silently_wrong() -> None:
    x, w, _, target = inputs(4, 3, 5, bias=False)
    x.requires_grad_()
    value, _ = linear_cross_entropy(x, w, target)
    (value * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def students(n: int, *, k: int = 3, d: int = 5, v: int = 11, shared: bool = False, bias: bool = True) -> Any:
    """x [K, N, D], weights, biases, the teacher's logits [N, V], counted [K, N]; `shared`: students 0 and 2 share."""
    g = torch.Generator().manual_seed(0)
    x, teacher, *weights = (torch.randn(s, generator=g).double() for s in ((k, n, d), (n, v), *[(v, d)] * k))
    biases = [torch.randn(v, generator=g).double() if bias and i != 1 else None for i in range(k)]
    if shared:
        weights[2], biases[2] = weights[0], biases[0]
    return x, weights, biases, 2 * teacher, torch.rand((k, n), generator=g) < 0.7


def learning(x: Tensor, weights: Any, biases: Any, wants: Any = (True, True, True), to: Any = torch.float64) -> Any:
    """Leaves for x, weights and biases; a tensor that stands twice stays one."""
    made: dict[int, Tensor | None] = {id(None): None}
    for tensors, want in zip(([x], weights, biases), wants, strict=True):
        made |= {id(t): t.to(to, copy=True).requires_grad_(want) for t in tensors if t is not None}
    return made[id(x)], [made[id(w)] for w in weights], [made[id(b)] for b in biases]


def taught_by(logits: Tensor, kept: Tensor | None = None) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
    return lambda start, stop: (logits[start:stop], None if kept is None else kept[start:stop])


def plain_soft(
    leaves: Any, teacher: Tensor, counted: Tensor, kept: Any = None, factors: Any = (1, 1, 1), top_k: Any = None
) -> SoftOut:
    """Row by row, on whole logits."""
    x, weights, biases = leaves
    zero = torch.zeros((), dtype=x.dtype)
    sums, floors, overlaps = ([zero] * len(weights) for _ in range(3))
    best, chance = torch.full(counted.shape, -1), torch.zeros(counted.shape, dtype=x.dtype)
    for k, row in counted.nonzero().tolist():
        q = F.linear(x[k, row], weights[k], biases[k]).softmax(-1)
        best[k, row], chance[k, row] = q.argmax(), q.detach().max()
        if kept is None or kept[row]:
            p = teacher[row].softmax(-1)
            if top_k:
                p = torch.where(p >= p.sort(descending=True).values[:top_k].min(), p, 0)
                p = p / p.sum()
            sums[k] = sums[k] - (p * q.log()).sum()
            floors[k] = floors[k] - (p * p.clamp_min(1e-300).log()).sum()
            overlaps[k] = overlaps[k] + torch.minimum(p, q.detach()).sum()
    total = sum((f * s for f, s in zip(factors, sums, strict=True)), zero)
    return SoftOut(total, torch.stack(sums).detach(), torch.stack(floors), torch.stack(overlaps), best, chance)


def same(ours: SoftOut, want: SoftOut, leaves: Any, want_leaves: Any) -> None:
    """Values, and the gradients of 0.37 times the sum."""
    for name, a, b in zip(SoftOut._fields, ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert a.requires_grad == (name == "sum" and want.sum.requires_grad)
    if want.sum.requires_grad:
        (ours.sum * 0.37).backward()
        (want.sum * 0.37).backward()
    for a, b in zip(*([x, *weights, *biases] for x, weights, biases in (leaves, want_leaves)), strict=True):
        if a is not None and not a.requires_grad:
            assert a.grad is None
        elif a is not None:
            want_grad = torch.zeros_like(b) if b.grad is None else b.grad
            torch.testing.assert_close(a.grad, want_grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wants", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize("top_k", [None, 3, 50])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_soft_against_whole_logits(rows: int, top_k: Any, with_kept: bool, measure: bool, wants: Any) -> None:
    """Every choice of what learns; rows 4..8 counted by nobody (whole chunks at rows=4 and less), row 9 by all."""
    x, weights, biases, teacher, counted = students(13, shared=True)
    counted[:, 4:9] = False
    counted[:, 9] = True
    x[~counted] = torch.nan  # what does not count or teach is not looked at
    kept = torch.arange(13) % 3 != 1
    teacher[~kept & with_kept] = torch.nan
    kw: Any = {"factors": [0.5, 1.0, 2.0], "top_k": top_k}
    ours, theirs = learning(x, weights, biases, wants), learning(x, weights, biases, wants)
    teach = taught_by(teacher, kept if with_kept else None)
    out = linear_soft_cross_entropy(*ours[:2], teach, counted, biases=ours[2], measure=measure, rows=rows, **kw)
    want = plain_soft(theirs, teacher, counted, kept if with_kept else None, **kw)
    if not measure:
        off = torch.zeros(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype), want.best_KN * 0 - 1, want.chance_KN * 0
        want = SoftOut(want.sum, want.sums_K, *off)
    same(out, want, ours, theirs)


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t[0].expand(3, 8, 5), lambda t: t.reshape(8, 3, 5).transpose(0, 1)]
)
def test_soft_everything_counted(view: Callable[[Tensor], Tensor]) -> None:
    """No row is copied where all count; x may lie in any way; factor 0: the student is measured, learns nothing."""
    x, weights, biases, teacher, counted = students(8, bias=False)
    counted[:] = True
    ours, theirs = learning(x, weights, biases), learning(x, weights, biases)
    out = linear_soft_cross_entropy(view(ours[0]), ours[1], taught_by(teacher), counted, factors=[1, 0, 3], rows=3)
    same(out, plain_soft((view(theirs[0]), *theirs[1:]), teacher, counted, factors=[1, 0, 3]), ours, theirs)
    assert out.sums_K[1] > 0


class Formed(torch.autograd.Function):
    """The sum, with the gradients that one backward gives: gradcheck goes backward more often than once."""

    @staticmethod
    def forward(ctx: Any, make: Any, *tensors: Tensor) -> Tensor:
        with torch.enable_grad():
            own = [t.detach().clone().requires_grad_() for t in tensors]
            value = make(*own)
        ctx.save_for_backward(*torch.autograd.grad(value, own))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return None, *(slopes[0] * t for t in ctx.saved_tensors)


@pytest.mark.parametrize("top_k", [None, 3])
def test_soft_gradcheck(top_k: int | None) -> None:
    """Both students on one weight, the first with a bias."""
    x, weights, biases, teacher, counted = students(4, k=2, d=3, v=5)

    def make(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_soft_cross_entropy(
            x, [w, w], taught_by(teacher), counted, biases=[b, None], factors=[0.7, 1.9], top_k=top_k, rows=3
        ).sum

    tensors = [t.requires_grad_() for t in (x, weights[0], biases[0])]
    assert torch.autograd.gradcheck(lambda *ts: Formed.apply(make, *ts), tensors)


@pytest.mark.parametrize("top_k", [2, 4])
def test_soft_taught_by_the_likeliest_tokens_alone(top_k: int) -> None:
    """As a store keeps them, best first and up to a number per row: more than are wanted, or just as many."""
    x, weights, biases, teacher, counted = students(9)
    ours, theirs = learning(x, weights, biases), learning(x, weights, biases)
    logits, ids = teacher.topk(4, -1)
    logits = logits - logits[:, :1]
    kept = linear_soft_cross_entropy(
        *ours[:2], lambda i, j: (logits[i:j], None, ids[i:j]), counted, biases=ours[2], top_k=top_k, rows=4
    )
    whole = linear_soft_cross_entropy(*theirs[:2], taught_by(teacher), counted, biases=theirs[2], top_k=top_k, rows=4)
    same(kept, whole, ours, theirs)


def test_soft_floor_is_reached_by_the_teacher_itself() -> None:
    """CE(p, p) = H(p): the sum is its floor, everything would be accepted and there is no slope."""
    x, weights, biases, _, counted = students(10, k=1)
    x, weights, biases = learning(x, weights, biases)
    teacher = F.linear(x[0], weights[0], biases[0]).detach()
    out = linear_soft_cross_entropy(x, weights, taught_by(teacher), counted, biases=biases, rows=4)
    out.sum.backward()
    torch.testing.assert_close(out.sums_K, out.floors_K)
    torch.testing.assert_close(out.overlaps_K, counted.sum(-1).double())
    assert out.floors_K[0] > 1
    for t in (x, weights[0], biases[0]):
        torch.testing.assert_close(t.grad, torch.zeros_like(t), atol=1e-12, rtol=0)


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize(("n", "counting"), [(0, False), (6, False), (6, True)])
def test_soft_nothing_counted_or_nothing_taught(n: int, counting: bool, measure: bool) -> None:
    x, weights, biases, teacher, counted = students(n)
    x, weights, biases = learning(x, weights, biases)
    counted &= counting
    teach = taught_by(teacher, torch.zeros(n, dtype=torch.bool) if counting else None)
    out = linear_soft_cross_entropy(x, weights, teach, counted, biases=biases, measure=measure, rows=4)
    out.sum.backward()
    assert not torch.stack([out.sum, *out.sums_K, *out.floors_K, *out.overlaps_K]).any()
    assert torch.equal(out.best_KN >= 0, counted & measure)
    assert torch.equal(out.chance_KN > 0, counted & measure)
    for t in (x, *weights, biases[0]):
        assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("k", [1, 3])
def test_soft_asks_the_teacher_once_per_chunk_that_counts(k: int) -> None:
    x, weights, _, teacher, counted = students(13, k=k)
    counted[:] = False
    counted[0, 1] = counted[-1, 2] = counted[-1, 12] = True
    asked = []

    def teach(start: int, stop: int) -> tuple[Tensor, None]:
        assert not torch.is_grad_enabled()
        asked.append((start, stop))
        return teacher[start:stop], None

    linear_soft_cross_entropy(x.requires_grad_(), weights, teach, counted, rows=4).sum.backward()
    assert asked == [(0, 4), (12, 13)]


@pytest.mark.parametrize("autocast", [False, True])
def test_soft_bf16_stays_close_to_fp64(autocast: bool) -> None:
    """Rounded to bf16, in bf16 or in fp32 under autocast, against fp64 on the same numbers."""
    x, weights, biases, teacher, counted = students(64, d=32, v=97, shared=True)
    dtype = torch.float32 if autocast else torch.bfloat16
    for t in (x, weights[0], weights[1], biases[0]):
        t.copy_((t / 4).bfloat16())
    low, high = learning(x, weights, biases, to=dtype), learning(x, weights, biases)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = linear_soft_cross_entropy(*low[:2], taught_by(teacher.bfloat16()), counted, biases=low[2], rows=8)
    out.sum.backward()
    want = plain_soft(high, teacher.bfloat16().double(), counted)
    want.sum.backward()
    for a, b in zip(out[:4], want[:4], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=5e-3, atol=0)
    assert float((out.best_KN == want.best_KN).float().mean()) > 0.97
    torch.testing.assert_close(out.chance_KN.double(), want.chance_KN, rtol=0.05, atol=0)
    for a, b in zip((low[0], *low[1], low[2][0]), (high[0], *high[1], high[2][0]), strict=True):
        assert a.grad.dtype == dtype
        assert float((a.grad.double() - b.grad).norm()) < 2e-2 * float(b.grad.norm())


def test_soft_extreme_logits_stay_finite() -> None:
    x = torch.tensor([[[1e4]]], requires_grad=True)
    weight, teacher = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    out = linear_soft_cross_entropy(x, [weight], taught_by(teacher), torch.ones(1, 1, dtype=torch.bool))
    out.sum.backward()
    assert [t.item() for t in out] == [2e4, 2e4, 0, 0, 0, 1]
    assert x.grad.item() == 2


@pytest.mark.parametrize("top_k", [None, 8])
def test_soft_whole_logits_never_exist(top_k: int | None, made_tensors: Any) -> None:
    n, d, v, rows = 2000, 4, 300, 64
    x, weights, biases, teacher, counted = students(n, k=2, d=d, v=v)
    x, weights, biases = learning(x, weights, biases, to=torch.float32)
    with made_tensors() as seen:
        teach = taught_by(teacher)
        out = linear_soft_cross_entropy(x, weights, teach, counted, biases=biases, top_k=top_k, rows=rows)
        out.sum.backward()
    assert max(seen.elements) == max(rows * v, v * d, 2 * n * d) == rows * v


def test_soft_is_deterministic_and_refuses_a_second_backward() -> None:
    *tensors, teacher, counted = students(40, shared=True, bias=False)
    seen = []
    for _ in range(2):
        x, weights, _ = learning(*tensors)
        out = linear_soft_cross_entropy(x, weights, taught_by(teacher), counted, top_k=5, rows=7)
        out.sum.backward(retain_graph=True)
        seen.append([*out, x.grad.clone(), *(w.grad.clone() for w in weights)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum * 2).backward()


def test_soft_refuses_numbers_that_differ() -> None:
    x, weights, biases, teacher, counted = students(4)
    for wrong in ({"weights": weights[:2]}, {"biases": biases[:2]}, {"factors": [1.0]}, {"counted_KN": counted[:, :3]}):
        args: Any = {"weights": weights, "counted_KN": counted, "biases": biases, **wrong}
        with pytest.raises(ValueError, match="one of each per student"):
            linear_soft_cross_entropy(x, teacher=taught_by(teacher), **args)
