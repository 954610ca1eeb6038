"""Loss primitives: pure functions of tensors, no policy.

The vocabulary projection is where a head trainer's memory goes: K heads x tokens x vocabulary. Here the
logits of a few hundred rows at a time exist only while their loss and gradient are formed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith import eager_losses

CHUNK_LOGITS = 2**21  # logits alive at a time; 256 rows at V = 8192 was the fastest chunk measured on a CPU
_forced: list[int] = []  # rows of a chunk, inside chunks_of

Teacher = Callable[[int, int], tuple[Tensor, Tensor | None] | tuple[Tensor, None, Tensor]]
"""(start, stop) -> logits [n, V] of rows start..stop-1 without gradient, and which of them teach at all ([n] bool;
None: all); or the logits of each row's T likeliest tokens, best first, None, and their ids [n, T]."""


def chunk_rows(vocab_size: int) -> int:
    """Rows of logits that are alive at a time."""
    return _forced[-1] if _forced else max(64, CHUNK_LOGITS // vocab_size)


@contextlib.contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Inside, chunks of so many rows: what is rehearsed in small has several too."""
    _forced.append(rows)
    try:
        yield
    finally:
        _forced.pop()


def _project(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """(logits [N, V] of x W^T + b in dtype, the slope of their soft cap c tanh(z / c) where there is one); tensors of
    their own, free to be overwritten."""
    logits_NV = (x_ND @ weight_VD.t()).to(dtype)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    if softcap is None:
        return logits_NV, None
    bent_NV = torch.tanh(logits_NV / softcap)
    return softcap * bent_NV, 1 - bent_NV.square()


def _add_slopes(g_NV: Tensor, x_ND: Tensor, dw_VD: Tensor | None, db_V: Tensor | None, factor: float = 1.0) -> Tensor:
    """Adds `factor` times what the slope g of the logits x W^T + b means for W and b; returns g in x's dtype."""
    if db_V is not None:
        db_V.add_(g_NV.sum(0), alpha=factor)
    g_NV = g_NV.to(x_ND.dtype)
    if dw_VD is not None:
        dw_VD.add_(g_NV.t() @ x_ND, alpha=factor)  # summed in fp32: many bf16 chunks would lose their small parts
    return g_NV


def _scale_saved(ctx: Any, slope: Tensor) -> list[Tensor | None]:
    """The gradients that the forward pass formed, times the slope of its sum; in place, so only once."""
    return [None if t is None else t.mul_(slope.to(t.dtype)) for t in ctx.saved_tensors]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of (x W^T + b); gradients are formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        rows: int,
        softcap: float | None,
        measure: bool,
    ) -> tuple[Tensor, Tensor]:
        total_dtype = torch.promote_types(x_ND.dtype, torch.float32)
        grads = [t is not None and ctx.needs_input_grad[i] for i, t in enumerate((x_ND, weight_VD, bias_V))]
        dx_ND = torch.empty_like(x_ND) if grads[0] else None
        dw_VD = torch.zeros_like(weight_VD, dtype=total_dtype) if grads[1] else None
        db_V = torch.zeros_like(bias_V, dtype=total_dtype) if grads[2] and bias_V is not None else None
        total = x_ND.new_zeros((), dtype=total_dtype)
        best_N = torch.full_like(target_N, -1)
        matmul_dtype = _matmul_dtype(x_ND)
        weight_VD = weight_VD.to(matmul_dtype)
        for i in range(0, x_ND.shape[0], rows):
            x, target = x_ND[i : i + rows].to(matmul_dtype), target_N[i : i + rows, None]
            logits, bend = _project(x, weight_VD, bias_V, total_dtype, softcap)
            if measure:
                torch.argmax(logits, -1, out=best_N[i : i + rows])
            logits.sub_(logits.amax(-1, keepdim=True))
            gold = logits.gather(1, target)
            mass = logits.exp_().sum(-1, keepdim=True)
            total += (mass.log() - gold).sum()
            if not any(grads):
                continue
            g = logits.div_(mass)  # softmax - one-hot, in place of the logits
            g.scatter_add_(1, target, torch.full_like(mass, -1.0))
            g = g if bend is None else g.mul_(bend)
            g = _add_slopes(g, x, dw_VD, db_V)
            if dx_ND is not None:
                dx_ND[i : i + rows] = g @ weight_VD
        ctx.save_for_backward(dx_ND, dw_VD, db_V)
        ctx.mark_non_differentiable(best_N)
        return total, best_N

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_scale_saved(ctx, outputs[0]), None, None, None, None


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    counted_N: Tensor | None = None,
    measure: bool = True,
    plain: bool = False,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum, best_N): summed cross-entropy of logits x W^T + b against target_N, and each row's argmax.

    sum: fp32 scalar (fp64 for fp64 inputs), in nats, with gradients for x, W and b where they require them;
    best_N: int64, no gradient; -1 where the row does not count, and everywhere without `measure`, which saves work.
    counted_N: which rows count; None: all. The others are dropped before the projection. softcap: c where logits are
    bounded to c tanh(z / c). At most `rows` x V logits exist at a time, unless `plain`, which holds all of them and
    leaves gradients to autograd. Works on N = 0 (sum 0, zero gradients). One backward only.
    """
    if plain:
        counted_N = torch.ones_like(target_N, dtype=torch.bool) if counted_N is None else counted_N
        return eager_losses.cross_entropy(x_ND, weight_VD, target_N, bias_V, softcap, counted_N, measure)
    if counted_N is not None:
        where_M = counted_N.nonzero().squeeze(1)
        summed, best_M = linear_cross_entropy(
            x_ND[where_M], weight_VD, target_N[where_M], bias_V=bias_V, softcap=softcap, measure=measure, rows=rows
        )
        return summed, torch.full_like(target_N, -1).index_copy(0, where_M, best_M)
    rows = rows or chunk_rows(weight_VD.shape[0])
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.to(x_ND.dtype)
    return _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, target_N, rows, softcap, measure)


class SoftOut(NamedTuple):
    """What linear_soft_cross_entropy gives for K students over N rows; sums in nats, fp32 (fp64 for fp64 inputs).

    A row counts for a student where counted_KN says so; the first four fields want it to teach as well.
    """

    sum: Tensor  # scalar, sum_k factors[k] * sums_K[k]; the only field with a gradient
    sums_K: Tensor  # [K] summed cross-entropy -sum_v p_v log q_v of teacher p and student q
    floors_K: Tensor  # [K] summed entropy of the teacher over the same rows: the least that sums_K can be
    overlaps_K: Tensor  # [K] sum of sum_v min(p_v, q_v), the chance that exact sampling accepts the student's token
    best_KN: Tensor  # [K, N] int64, the student's argmax; -1 where the row does not count
    chance_KN: Tensor  # [K, N] the student's probability of that argmax; 0 where the row does not count


class _Plan(NamedTuple):
    """What a soft cross-entropy computes, apart from the tensors that may learn."""

    teacher: Teacher
    counted_KN: Tensor
    weight_at: list[int]  # per student: where its weight stands among the parameters
    bias_at: list[int | None]
    factors: list[float]
    top_k: int | None
    measure: bool
    rows: int
    softcap: float | None


class _Taught(NamedTuple):
    """The teacher's distribution on n rows: over all V tokens, or over T tokens of which ids_nT are the ids."""

    p_nT: Tensor
    ids_nT: Tensor | None
    entropy_n: Tensor | None  # in nats; None where it is not measured

    def at(self, rows_m: Tensor) -> _Taught:
        return _Taught(*(None if t is None else _take(t, rows_m) for t in self))  # type: ignore[arg-type]

    def pick(self, values_nV: Tensor) -> Tensor:
        """[n, T]: the values at the teacher's tokens."""
        return values_nV if self.ids_nT is None else values_nV.gather(1, self.ids_nT)

    def subtract_from(self, q_nV: Tensor) -> Tensor:
        """q - p, in place of q."""
        return q_nV.sub_(self.p_nT) if self.ids_nT is None else q_nV.scatter_add_(1, self.ids_nT, -self.p_nT)


def _take(t: Tensor, rows_m: Tensor) -> Tensor:
    """t[rows_m] for distinct ascending rows; t itself, not a copy, where that is all of them."""
    return t if rows_m.shape[0] == t.shape[0] else t[rows_m]


def _teach(
    logits_nV: Tensor, top_k: int | None, dtype: torch.dtype, measure: bool, ids_nT: Tensor | None = None
) -> _Taught:
    if ids_nT is not None:
        logits_nV, ids_nT = logits_nV[:, :top_k], ids_nT[:, :top_k]
    elif top_k is not None and top_k < logits_nV.shape[1]:
        logits_nV, ids_nT = logits_nV.topk(top_k, -1)
    p_nT = logits_nV.softmax(-1, dtype=dtype)
    return _Taught(p_nT, ids_nT, torch.special.entr(p_nT).sum(-1) if measure else None)


def _counted_chunks(counted_KN: Tensor, rows: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(start, stop, which rows of the chunk count for each student) of every chunk where any row counts.

    Waits for the device once in all, not once per chunk and student.
    """
    num_students, num_rows = counted_KN.shape
    num_chunks = -(-num_rows // rows)
    padded_KM = F.pad(counted_KN, (0, num_chunks * rows - num_rows))
    sizes = padded_KM.view(num_students * num_chunks, rows).sum(-1).tolist()
    pieces = (counted_KN.nonzero()[:, 1] % rows).split(sizes)  # by student, then by row, as nonzero() lists them
    for c in range(num_chunks):
        counted = list(pieces[c::num_chunks])
        if any(piece.shape[0] for piece in counted):
            yield c * rows, min((c + 1) * rows, num_rows), counted


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's, to which weights are cast once per call instead of by autocast in every chunk."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _SoftPass:
    """One pass over the chunks: the sums, the measurements and the gradients so far."""

    def __init__(self, plan: _Plan, x_KND: Tensor, params: Sequence[Tensor], learns: Sequence[bool]) -> None:
        self.plan, self.x_KND = plan, x_KND
        self.dtype = torch.promote_types(x_KND.dtype, torch.float32)
        self.matmul_dtype = _matmul_dtype(x_KND)
        self.params = [t.to(self.matmul_dtype) if i in plan.weight_at else t for i, t in enumerate(params)]
        self.dx_KND = torch.zeros_like(x_KND) if learns[0] else None
        self.grads = [
            torch.zeros_like(t, dtype=self.dtype) if learn else None
            for t, learn in zip(params, learns[1:], strict=True)
        ]
        shape = x_KND.shape[:2]
        self.sums_K, self.floors_K, self.overlaps_K = (x_KND.new_zeros(shape[0], dtype=self.dtype) for _ in range(3))
        self.best_KN = torch.full(shape, -1, device=x_KND.device)
        self.chance_KN = x_KND.new_zeros(shape, dtype=self.dtype)

    def run(self) -> None:
        plan = self.plan
        for start, stop, counted in _counted_chunks(plan.counted_KN, plan.rows):
            with torch.autocast(self.x_KND.device.type, enabled=False):  # the base as it is in decoding
                logits_nV, kept_n, *ids = plan.teacher(start, stop)
            taught = _teach(logits_nV, plan.top_k, self.dtype, plan.measure, *ids)
            del logits_nV  # else the teacher's logits live beside each student's
            for k, at_m in enumerate(counted):
                if kept_n is not None and not plan.measure:
                    at_m = at_m[kept_n[at_m]]
                if at_m.shape[0]:
                    self.add(k, slice(start, stop), at_m, taught, kept_n)

    def add(self, k: int, chunk: slice, at_m: Tensor, taught: _Taught, kept_n: Tensor | None) -> None:
        """Student k on rows at_m of the chunk."""
        plan, weight_at, bias_at = self.plan, self.plan.weight_at[k], self.plan.bias_at[k]
        weight_VD, dw_VD = self.params[weight_at], self.grads[weight_at]
        bias_V, db_V = (None, None) if bias_at is None else (self.params[bias_at], self.grads[bias_at])
        x_mD = _take(self.x_KND[k, chunk], at_m).to(self.matmul_dtype)
        z_mV, bend_mV = _project(x_mD, weight_VD, bias_V, self.dtype, plan.softcap)
        top_m1 = z_mV.amax(-1, keepdim=True)
        if plan.measure:
            self.best_KN[k, chunk][at_m] = z_mV.argmax(-1)
            self.chance_KN[k, chunk][at_m] = (top_m1 - z_mV.logsumexp(-1, keepdim=True)).exp()[:, 0]
        if plan.measure and kept_n is not None:
            inner = kept_n[at_m].nonzero()[:, 0]
            if not inner.shape[0]:
                return
            z_mV, x_mD, at_m, top_m1 = (_take(t, inner) for t in (z_mV, x_mD, at_m, top_m1))
            bend_mV = None if bend_mV is None else _take(bend_mV, inner)
        taught, z_mV = taught.at(at_m), z_mV.sub_(top_m1)
        dot = (taught.p_nT * taught.pick(z_mV)).sum()
        mass_m1 = z_mV.exp_().sum(-1, keepdim=True)
        self.sums_K[k].add_(mass_m1.log().sum() - dot)
        learns = plan.factors[k] != 0 and any(t is not None for t in (self.dx_KND, dw_VD, db_V))
        if not (learns or plan.measure):
            return
        q_mV = z_mV.div_(mass_m1)
        if taught.entropy_n is not None:
            self.floors_K[k].add_(taught.entropy_n.sum())
            self.overlaps_K[k].add_(torch.minimum(taught.p_nT, taught.pick(q_mV)).sum())
        if not learns:
            return
        g_mV = taught.subtract_from(q_mV)
        g_mV = g_mV if bend_mV is None else g_mV.mul_(bend_mV)
        g_mV = _add_slopes(g_mV, x_mD, dw_VD, db_V, plan.factors[k])
        if self.dx_KND is not None:
            self.dx_KND[k, chunk][at_m] = (g_mV @ weight_VD).mul_(plan.factors[k]).to(self.dx_KND.dtype)


class _LinearSoftCrossEntropy(torch.autograd.Function):
    """The weighted sum of the students' cross-entropies; gradients are formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, x_KND: Tensor, *params: Tensor) -> SoftOut:
        done = _SoftPass(plan, x_KND, params, ctx.needs_input_grad[1:])
        done.run()
        weighted = [sum_ * factor for sum_, factor in zip(done.sums_K, plan.factors, strict=True)]
        measured = done.sums_K, done.floors_K, done.overlaps_K, done.best_KN, done.chance_KN
        ctx.save_for_backward(done.dx_KND, *done.grads)
        ctx.mark_non_differentiable(*measured)
        return SoftOut(torch.stack(weighted).sum(), *measured)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_scale_saved(ctx, outputs[0])


def linear_soft_cross_entropy(
    x_KND: Tensor,
    weights: Sequence[Tensor],
    teacher: Teacher,
    counted_KN: Tensor,
    *,
    biases: Sequence[Tensor | None] | None = None,
    factors: Sequence[float] | None = None,
    top_k: int | None = None,
    measure: bool = True,
    softcap: float | None = None,
    plain: bool = False,
    rows: int | None = None,
) -> SoftOut:
    """Cross-entropies of K students, softmax(x_KND[k] W_k^T + b_k), against one teacher's distributions.

    x_KND: [K, N, D]; weights: K of [V, D], the same tensor several times where students share it (its
    gradients add up); biases: K of [V] or None; counted_KN: [K, N] bool, the rows that count for each student.
    teacher: asked once, without gradient, for every `rows` rows of which any counts; finite logits on the rows
    that teach. A row that does not teach adds nothing to the sums but is still measured.
    factors: K weights of the students in `sum`, by default 1 each; a student with factor 0 is only measured.
    top_k: the teacher's top_k likeliest tokens, renormalised, stand for it; None: all of them.
    softcap: c where the students' logits are bounded to c tanh(z / c), as the base's own are.
    measure: False leaves floors and overlaps at 0, best at -1 and chance at 0, and saves that work.

    The gradients of `sum` go to x, W and b where they require them. At most `rows` x V logits of a model exist
    at a time, unless `plain`, which holds all of them and leaves gradients to autograd.
    Works on N = 0 and with nothing counted (sum 0, zero gradients). One backward only.
    ValueError where the students' numbers or the rows differ.
    """
    num_students = len(weights)
    biases = [None] * num_students if biases is None else biases
    factors = [1.0] * num_students if factors is None else factors
    if {x_KND.shape[0], len(biases), len(factors)} != {num_students} or counted_KN.shape != x_KND.shape[:2]:
        raise ValueError(
            f"x {list(x_KND.shape)}, counted {list(counted_KN.shape)}, {num_students} weights, {len(biases)} biases, "
            f"{len(factors)} factors: give one of each per student"
        )
    if plain:
        given = (x_KND, weights, teacher, counted_KN, biases, factors, top_k, measure, softcap)
        return SoftOut(*eager_losses.soft_cross_entropy(*given))
    rows = min(rows or chunk_rows(weights[0].shape[0]), max(x_KND.shape[1], 1))
    params = {id(t): t for t in (*weights, *biases) if t is not None}  # a shared one once, with one gradient
    place = {key: i for i, key in enumerate(params)}
    plan = _Plan(
        teacher,
        counted_KN,
        [place[id(w)] for w in weights],
        [None if b is None else place[id(b)] for b in biases],
        list(factors),
        top_k,
        measure,
        rows,
        softcap,
    )
    return SoftOut(*_LinearSoftCrossEntropy.apply(plan, x_KND, *params.values()))


def acceptance_loss(logits_N: Tensor, accept_N: Tensor, reject_weight: float) -> Tensor:
    """Sum of -[w (1 - a) log(1 - s) + a log s], s = sigmoid(logit) the predicted and a the true chance of acceptance
    (SpecDec++, arXiv 2405.19715, eq. of its weighted loss)."""
    return (reject_weight * (1 - accept_N) * F.softplus(logits_N) + accept_N * F.softplus(-logits_N)).sum()


def bernoulli_kl(logits_N: Tensor, accept_N: Tensor) -> Tensor:
    """Sum of KL(Bernoulli(a) || Bernoulli(s)), s = sigmoid(logit)."""
    cross = (1 - accept_N) * F.softplus(logits_N) + accept_N * F.softplus(-logits_N)
    entropy = torch.special.entr(accept_N) + torch.special.entr(1 - accept_N)
    return (cross - entropy).sum()


def feature_distance(x_ND: Tensor, target_ND: Tensor) -> Tensor:
    """SmoothL1 (beta 1), averaged over D and summed over rows; a scalar, fp32 at least."""
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    return F.smooth_l1_loss(x_ND.to(exact), target_ND.to(exact), reduction="none").mean(-1).sum()
