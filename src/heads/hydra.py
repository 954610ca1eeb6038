"""Hydra: Medusa's heads, but each one also reads the tokens drafted before it.

Ankner et al. 2024, "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding" (arXiv 2402.05109; code
zankner/Hydra 3f39fbd). f_t is the base's final-norm output at t, E(x) its input embedding of a token. Head
k = 1..K predicts x_{t+1+k} (x_{t+1} is the base's own lm_head's) from what would be drafted until then:

    u_k = [f_t, E(x_{t+1}), …, E(x_{t+k})]
    h_k = ResBlock_n( … ResBlock_2(R_k u_k + SiLU(W_k u_k))),   q_k = softmax(lm_head_k h_k)
    L   = sum_k  lm_weight CE(q_k, x_{t+1+k}) + teacher_weight CE(q_k, p_{t+k})
                 + reconstruction_weight SmoothL1(h_k, f_{t+k})

p_{t+k} being the base's own distribution of x_{t+1+k}. Every map has a bias. Hydra++ has four layers, learns
from the base's distributions alone, drops out before every block and lm_head, and a prefix layer, one causal
Llama block over f_0..f_t with a norm after it, stands in for f_t.

Deviations. The blocks of a head are distinct modules; the published code repeats one. The biases of W and R start
at zero, not at PyTorch's random ones, and so does lm_head's (or at the base's, where that has one); the prefix
layer starts from PyTorch's init, not from Gaussians. One count divides the terms of every depth, that of depth 1,
where theirs is a mean per depth. All three terms count where x_{t+1+k} does; their SmoothL1 asks the mask of
x_{t+k}. The prefix layer has no embedding of its own, of which theirs carries one and never reads it. Noise is
scaled by the length of a document, which is what their padded sequence is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import KV, BaseSpec, BaseView, Batch, Capture, Drafted, Head, LossOut, Needs
from draftsmith.drafting import fill_rows
from draftsmith.errors import ConfigError
from draftsmith.heads.blocks import DecoderLayer, ResBlock, as_head, teacher
from draftsmith.losses import SoftOut, feature_distance, linear_cross_entropy, linear_soft_cross_entropy
from draftsmith.roles import Proposal, State
from draftsmith.targets import Lessons, future_tokens, lessons


@dataclass(frozen=True)
class HydraConfig:
    num_heads: int = 4  # K
    num_layers: int = 1  # blocks per head, the first included
    dropout: float = 0.0  # before every block and every lm_head
    prefix_layer: bool = False  # a Llama block over the base's hidden states, before all heads
    lm_weight: float = 1.0  # of the cross-entropy against the row's own token
    teacher_weight: float = 0.0  # of that against the base's distribution
    reconstruction_weight: float = 0.0  # of the SmoothL1 of a head's hidden state against the base's
    teacher_top_k: int | None = None  # the base's likeliest tokens alone teach; None: all
    noise_alpha: float = 0.0  # NEFTune's, on the inputs while training; 0: off

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: give a share of at least 0 and below 1")
        for name in ("lm_weight", "teacher_weight", "reconstruction_weight", "noise_alpha"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or a positive number")
        if not self.lm_weight + self.teacher_weight + self.reconstruction_weight:
            raise ConfigError("lm_weight, teacher_weight, reconstruction_weight: all are 0; give one above 0")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k={self.teacher_top_k}: give at least 1, or null for all tokens")


class FirstBlock(nn.Module):
    """R u + SiLU(W u): a residual block whose input is wider than its output, so that its residual is a map too."""

    def __init__(self, wide: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(wide, size)
        self.residual = nn.Linear(wide, size)

    def reset(self) -> None:
        """W u = 0; R keeps its random weight."""
        for t in (self.linear.weight, self.linear.bias, self.residual.bias):
            nn.init.zeros_(t)

    def forward(self, u: Tensor) -> Tensor:
        return self.residual(u) + F.silu(self.linear(u))


class Prefix(nn.Module):
    """One causal Llama block and the norm after it."""

    def __init__(self, spec: BaseSpec) -> None:
        super().__init__()
        self.layer = DecoderLayer(spec)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(
        self, x_BQD: Tensor, positions_BQ: Tensor, mask_BQS: Tensor | None = None, kv: KV | None = None
    ) -> Tensor:
        return self.norm(self.layer(x_BQD, positions_BQ, mask_BQS, kv))


@dataclass(frozen=True)
class Reading:
    """What a head k reads where it learns: M of the positions of a batch, which are counted through all rows."""

    rows_M: Tensor  # which of the batch's lessons
    at_M: Tensor  # t
    context_MD: Tensor
    drafted_MkD: Tensor  # E(x_{t+1}), …, E(x_{t+k})


@dataclass(frozen=True)
class Learning:
    """What a head k learns in a batch whose positions are counted through, all rows in one: M of them."""

    rows_M: Tensor  # which of the batch's lessons
    at_M: Tensor  # t
    target_M: Tensor  # x_{t+1+k}
    counted_M: Tensor  # whether it learns that: false only where skip_masked is
    hidden_MD: Tensor  # h_k
    dropped_MD: Tensor  # h_k as lm_head_k reads it


class Hydra(Head):
    Config = HydraConfig
    role = "drafter"
    gated = True

    def __init__(self, config: HydraConfig, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        size, depths = spec.hidden_size, range(1, config.num_heads + 1)
        self.prefix = Prefix(spec) if config.prefix_layer else None
        self.blocks = nn.ModuleList(
            nn.ModuleList([FirstBlock((k + 1) * size, size), *(ResBlock(size) for _ in range(config.num_layers - 1))])
            for k in depths
        )
        self.lm_heads = nn.ModuleList(nn.Linear(size, spec.vocab_size) for _ in depths)

    @property
    def needs(self) -> Needs:
        return Needs(final=True, teacher=self.config.teacher_weight > 0)

    @property
    def max_depth(self) -> int:
        return self.config.num_heads

    @property
    def horizon(self) -> int:
        return self.config.num_heads + 1

    @property
    def reads_counted(self) -> bool:
        return self.prefix is None

    @torch.no_grad()
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        for block in self.blocks.modules():
            if isinstance(block, FirstBlock | ResBlock):
                block.reset()
        for lm_head in cast("list[nn.Linear]", list(self.lm_heads)):
            lm_head.weight.copy_(base.lm_head_weight)
            lm_head.bias.zero_()
            if base.lm_head_bias is not None:
                lm_head.bias.copy_(base.lm_head_bias)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def hidden(self, context_AD: Tensor, drafted_AkD: Tensor) -> Tensor:
        """h_k [A, D] of head k = drafted_AkD.shape[1]; context: f_t or what the prefix layer makes of it."""
        h = torch.cat([context_AD, drafted_AkD.flatten(1)], -1)
        for block in cast(nn.ModuleList, self.blocks[drafted_AkD.shape[1] - 1]):
            h = block(self.drop(h))
        return h

    def forward(self, base: BaseView, context_AD: Tensor, drafted_AkD: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [A, V] of what follows the k tokens whose embeddings are drafted_AkD, h_k [A, D]), by head k."""
        lm_head = cast(nn.Linear, self.lm_heads[drafted_AkD.shape[1] - 1])
        hidden_AD = self.hidden(context_AD, drafted_AkD)
        return lm_head(self.drop(hidden_AD).to(lm_head.weight.dtype)), hidden_AD

    def inputs(self, base: BaseView, final_BTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(context, E) [B, T, D] at every position of a batch, with noise while training."""
        context_BTD, embedded_BTD = as_head(final_BTD, self), as_head(base.embed(batch.tokens_BT), self)
        noise_BTD = self.noise(embedded_BTD, batch.documents_BT) if self.training and self.config.noise_alpha else None
        if self.prefix is not None:
            context_BTD = self.prefix(context_BTD, batch.positions_BT, batch.visible())
        elif noise_BTD is not None:
            context_BTD = context_BTD + noise_BTD
        return context_BTD, embedded_BTD if noise_BTD is None else embedded_BTD + noise_BTD

    def noise(self, like_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """NEFTune's: uniform in +-alpha / sqrt(tokens of the document * D)."""
        lengths_BT = (documents_BT[:, :, None] == documents_BT[:, None, :]).sum(-1)
        bound_BT = self.config.noise_alpha * (lengths_BT * like_BTD.shape[-1]) ** -0.5
        return (torch.rand_like(like_BTD) * 2 - 1) * bound_BT[..., None].to(like_BTD.dtype)

    def readings(
        self, base: BaseView, final_BTD: Tensor, batch: Batch, taught: Lessons, *, everywhere: bool = False
    ) -> Iterator[Reading]:
        """Of head 1, 2, …, as many as are taught; everywhere: of all lessons, also those that teach another head."""
        context_PD, embedded_PD = (t.flatten(0, 1) for t in self.inputs(base, final_BTD, batch))
        places_BT = torch.arange(batch.tokens_BT.numel(), device=batch.tokens_BT.device).view_as(batch.tokens_BT)
        ahead = []
        for k, (counted_N, students_N) in enumerate(zip(taught.counted_KN, taught.students_KN, strict=True), start=1):
            ahead.append(future_tokens(places_BT, batch.documents_BT, k)[0].flatten())  # t + 1, …, t + k
            rows_M = (counted_N | everywhere).nonzero().squeeze(1)
            at_M = students_N[rows_M]
            read_Mk = torch.stack([places_P[at_M] for places_P in ahead], 1)
            yield Reading(rows_M, at_M, context_PD[at_M], embedded_PD[read_Mk])

    def learnings(self, base: BaseView, final_BTD: Tensor, batch: Batch, taught: Lessons) -> list[Learning]:
        """Of head 1..K: where it learns, what, and what it says there."""
        found = []
        readings = self.readings(base, final_BTD, batch, taught, everywhere=not self.skip_masked)
        for counted_N, own in zip(taught.counted_KN, readings, strict=True):
            hidden_MD = self.hidden(own.context_MD, own.drafted_MkD)
            target_M, counted_M = taught.gold_N[own.rows_M], counted_N[own.rows_M]
            found.append(Learning(own.rows_M, own.at_M, target_M, counted_M, hidden_MD, self.drop(hidden_MD)))
        return found

    def teach(
        self, base: BaseView, seen: Capture, taught: Lessons, learnings: list[Learning], measure: bool
    ) -> SoftOut:
        """Loss against the base's distributions at the lessons' rows."""
        students = [own.dropped_MD.new_zeros(len(taught.rows_N), own.dropped_MD.shape[1]) for own in learnings]
        pairs = zip(students, learnings, strict=True)
        lm_heads = cast("list[nn.Linear]", list(self.lm_heads))
        return linear_soft_cross_entropy(
            torch.stack([student_ND.index_copy(0, own.rows_M, own.dropped_MD) for student_ND, own in pairs]),
            [lm_head.weight for lm_head in lm_heads],
            teacher(base, seen, taught.rows_N, self.config.teacher_top_k),
            taught.counted_KN,
            biases=[lm_head.bias for lm_head in lm_heads],
            factors=[self.config.teacher_weight] * len(lm_heads),
            top_k=self.config.teacher_top_k,
            measure=measure,
            plain=self.plain_loss,
        )

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """The terms of all heads, summed. Metrics per depth: loss/k (its share of the sum), top1/k (against the
        row's own token), overlap/k (chance that exact sampling accepts, where the base teaches); tokens_per_step,
        1 + how many depths in a row are right given right ones before; floor, the least the sum can be."""
        config, final_BTD = self.config, cast(Tensor, seen.final)
        ahead, everywhere = range(1, config.num_heads + 1), not self.skip_masked
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead, everywhere=everywhere)
        final_ND = final_BTD.detach().flatten(0, 1)[taught.rows_N]
        learnings = self.learnings(base, final_BTD, batch, taught)
        total = final_BTD.new_zeros((), dtype=torch.promote_types(final_BTD.dtype, torch.float32))
        shares, best = [total] * config.num_heads, [torch.empty(0)] * config.num_heads
        soft: SoftOut | None = None
        if config.teacher_weight:
            soft = self.teach(base, seen, taught, learnings, measure)
            total = total + soft.sum
            shares = [config.teacher_weight * sum_ for sum_ in soft.sums_K]
        for k, own in enumerate(learnings):
            share = torch.zeros_like(total)
            if config.lm_weight or soft is None:  # weight 0: for top1, and so that every parameter has a gradient
                lm_head = cast(nn.Linear, self.lm_heads[k])
                summed, best[k] = linear_cross_entropy(
                    own.dropped_MD,
                    lm_head.weight,
                    own.target_M,
                    bias_V=lm_head.bias,
                    counted_N=own.counted_M if everywhere else None,
                    measure=measure,
                    plain=self.plain_loss,
                )
                share = share + config.lm_weight * summed
            elif measure:
                best[k] = soft.best_KN[k, own.rows_M]
            if config.reconstruction_weight:
                learns_M = own.counted_M if everywhere else slice(None)
                away = feature_distance(own.hidden_MD[learns_M], final_ND[own.rows_M][learns_M])
                share = share + config.reconstruction_weight * away
            total, shares[k] = total + share, shares[k] + share.detach()
        metrics = self.measured(batch, learnings, shares, best, soft) if measure else {}
        return LossOut(total, batch.counts_K[2], metrics)

    def measured(
        self, batch: Batch, learnings: list[Learning], shares: list[Tensor], best: list[Tensor], soft: SoftOut | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        run_P = torch.ones_like(batch.mask_BT.flatten(), dtype=torch.bool)  # every depth so far was right here
        in_a_row = torch.zeros_like(batch.counts_K[2])
        positions = in_a_row + learnings[0].counted_M.sum()
        for k, own in enumerate(learnings):
            n, right_M = own.counted_M.sum(), (best[k] == own.target_M) & own.counted_M
            metrics[f"loss/{k + 1}"] = (shares[k], n)
            metrics[f"top1/{k + 1}"] = (right_M.sum(), n)
            if soft is not None:
                metrics[f"overlap/{k + 1}"] = (soft.overlaps_K[k], n)
            run_P = run_P & torch.zeros_like(run_P).index_put((own.at_M[own.counted_M],), right_M[own.counted_M])
            in_a_row = in_a_row + run_P.sum()
        metrics["tokens_per_step"] = (positions + in_a_row, positions)
        if soft is not None:
            metrics["floor"] = (self.config.teacher_weight * soft.floors_K.sum(), positions)
        return metrics

    @torch.no_grad()
    def drafted(self, base: BaseView, seen: Capture, batch: Batch) -> Drafted:
        """What heads 1..K-1 draft where they learn, and the hidden state of the next head, which reads that."""
        if self.config.num_heads == 1:
            raise ConfigError("num_heads=1: drafts one token; there is nothing to stop")
        ahead = range(1, self.config.num_heads)
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead)
        at, tokens, before, hidden, training = [], [], [], [], self.training
        self.eval()
        try:
            for k, own in enumerate(self.readings(base, cast(Tensor, seen.final), batch, taught)):
                lm_head, gold_M = cast(nn.Linear, self.lm_heads[k]), taught.gold_N[own.rows_M]
                h_MD = self.hidden(own.context_MD, own.drafted_MkD)
                _, best_M = linear_cross_entropy(h_MD, lm_head.weight, gold_M, bias_V=lm_head.bias)
                newest_M1D = as_head(base.embed(best_M[:, None]), self)
                at.append(taught.rows_N[own.rows_M])
                before.append(h_MD)
                tokens.append(best_M)
                hidden.append(self.hidden(own.context_MD, torch.cat([own.drafted_MkD, newest_M1D], 1)))
        finally:
            self.train(training)
        return Drafted(torch.cat(at), torch.cat(tokens), torch.cat(before), torch.cat(hidden), 2)

    def context(self, base: BaseView, state: State) -> Tensor:
        """[B, D] at the last accepted position; the prefix layer reads all that are new, and keeps their K/V."""
        final_BAD = as_head(cast(Tensor, state.seen.final), self)
        if self.prefix is not None:
            if state.head_kv is None:
                state.head_kv = base.new_kv(1)
            positions_A = state.head_kv.length + torch.arange(final_BAD.shape[1], device=final_BAD.device)
            final_BAD = self.prefix(final_BAD, positions_A.expand(len(final_BAD), -1), kv=state.head_kv)
        return final_BAD[:, -1]

    def propose(self, base: BaseView, state: State) -> Proposal:
        return self.propose_rows(base, [state])[0]

    def propose_rows(self, base: BaseView, states: Sequence[State]) -> list[Proposal]:
        """Level by level: head k reads the k tokens from the root to each node that has children."""
        context_BD = torch.cat([self.context(base, state) for state in states])
        roots_B1 = torch.tensor([[state.root] for state in states], device=context_BD.device)
        drafted_AkD = as_head(base.embed(roots_B1), self)

        def deeper(of_M: Tensor, tokens_M: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal drafted_AkD
            newest_M1D = as_head(base.embed(tokens_M[:, None]), self)
            drafted_AkD = torch.cat([drafted_AkD[of_M], newest_M1D], 1)
            return self(base, context_BD[rows_M], drafted_AkD)

        logits_BV, hidden_BD = self(base, context_BD, drafted_AkD)
        return fill_rows(states, logits_BV, hidden_BD, deeper)
