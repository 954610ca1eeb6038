"""Clover-2: a regressive draft head that hears every token twice and imitates the base's states and distributions.

Xiao et al. 2024, "Clover-2: Accurate Inference for Regressive Lightweight Speculative Decoding" (arXiv 2408.00264;
code XiaoBin1992/clover 9d37214). H_t is the residual stream after the base's last block, f_t the final norm's output,
p_t the base's distribution of x_{t+1}, e(x) the row of token x in the frozen lm_head. The attention decoder lets one
token speak to one state, with a cosine for every attention head in place of a softmax over that single key:

    A(x, e) = x + concat_h(a_h v_h),   a_h = cos(q_h, k_h),   q = Q norm(x) + b,   k = K e + b,   v = V e + b

    g_0 = norm(Block_2(Block_1(A_1(H, e(x_{t+1})))))_t           causal Llama blocks; A_1 advances the base's token
    o_0 = norm'(M_1 g_0)                                         imitates f_{t+1} and p_{t+1}: drafts x_{t+2}
    g_i = A_2(g_{i-1}, e(x_{t+1+i})),   i = 1..K-1
    o_i = norm'(M_2 [g_i, e(x_{t+1+i})])                         imitates f_{t+1+i} and p_{t+1+i}: drafts x_{t+2+i}
    L   = sum_i decay^i [feature_weight SmoothL1(o_i, f_{t+1+i}) + label_weight CE(p_{t+1+i}, softmax(W o_i))]

A_2, M_2 and norm' are the same ones for every depth; W is the base's frozen lm_head. M_1 and M_2 have biases.

Deviations. One count divides the terms of every depth, that of x_{t+2}, where theirs is a mean per depth; a depth
counts where the token does whose distribution it imitates. Where the base's blocks are not Llama's, the blocks and
the two norms start from PyTorch's init instead of copies. Trees are static; theirs are grown by probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import KV, BaseSpec, BaseView, Batch, Capture, Head, LossOut, Needs
from draftsmith.drafting import fill_rows
from draftsmith.errors import ConfigError
from draftsmith.heads.blocks import DecoderLayer, as_head, final_norm_weight, project, teacher
from draftsmith.losses import SoftOut, feature_distance, linear_soft_cross_entropy
from draftsmith.roles import Proposal, State
from draftsmith.targets import Lessons, future_tokens, lessons


@dataclass(frozen=True)
class Clover2Config:
    num_heads: int = 5  # K, depths drafted
    num_layers: int = 2  # Llama blocks
    decay: float = 0.7  # depth i = 0..K-1 weighs decay^i
    feature_weight: float = 10.0  # of the SmoothL1 against the base's states
    label_weight: float = 1.0  # of the cross-entropy against the base's distributions
    teacher_top_k: int | None = None  # the base's likeliest tokens alone teach; None: all

    def __post_init__(self) -> None:
        if self.num_heads < 2:
            raise ConfigError(f"num_heads={self.num_heads}: give at least 2; the second is the first to hear a draft")
        if self.num_layers < 1:
            raise ConfigError(f"num_layers={self.num_layers}: give at least 1")
        if self.decay <= 0:
            raise ConfigError(f"decay={self.decay}: give a positive number")
        for name in ("feature_weight", "label_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or a positive number")
        if not self.feature_weight + self.label_weight:
            raise ConfigError("feature_weight, label_weight: both are 0; give one above 0")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k={self.teacher_top_k}: give at least 1, or null for all tokens")

    @property
    def weights(self) -> list[float]:
        return [self.decay**i for i in range(self.num_heads)]


def near(linear: nn.Linear, identity: bool = True) -> None:
    """U(0, 0.01), on top of the identity (of its first columns, where it is wider than high); bias 0."""
    nn.init.uniform_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
    if identity:
        linear.weight.add_(torch.eye(*linear.weight.shape).to(linear.weight))


class AttentionDecoder(nn.Module):
    """x + a v of one token e, a the cosine of the state's query and the token's key, per attention head."""

    def __init__(self, spec: BaseSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.heads, self.eps = spec.num_heads, spec.norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1))
            for linear, y in ((self.q, self.input_layernorm(x)), (self.k, e), (self.v, e))
        )
        a = F.cosine_similarity(q, k, dim=-1, eps=self.eps)[..., None]
        return x + (a * v).flatten(-2)


class Clover2(Head):
    Config = Clover2Config
    role = "drafter"
    gated = True

    def __init__(self, config: Clover2Config, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        size = spec.hidden_size
        if size % spec.num_heads:
            raise ConfigError(f"hidden size {size} does not divide into {spec.num_heads} attention heads")
        self.advance = AttentionDecoder(spec)  # A_1
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.first = nn.Linear(size, size)  # M_1
        self.regress = AttentionDecoder(spec)  # A_2
        self.later = nn.Linear(2 * size, size)  # M_2
        self.head_norm = nn.RMSNorm(size, eps=spec.norm_eps)

    @property
    def needs(self) -> Needs:
        return Needs(frozenset({self.spec.num_layers}), final=True, teacher=True)

    @property
    def max_depth(self) -> int:
        return self.config.num_heads

    @property
    def horizon(self) -> int:
        return self.config.num_heads + 1

    @torch.no_grad()
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        for decoder in (self.advance, self.regress):
            near(decoder.q)
            near(decoder.k)
            near(decoder.v, identity=False)
        near(self.first)
        near(self.later)
        if not self.spec.llama_blocks:
            return
        for layer in self.layers:
            cast(DecoderLayer, layer).start_from(base.block_weights(self.spec.num_layers - 1))
        for norm in (self.norm, self.head_norm):
            norm.weight.copy_(final_norm_weight(base))

    def rows(self, base: BaseView, tokens: Tensor) -> Tensor:
        """e(x)."""
        return as_head(base.lm_head_weight[tokens], self)

    def read(
        self,
        base: BaseView,
        hidden_BQD: Tensor,
        next_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
    ) -> Tensor:
        """g_0 [B, Q, D]; next: the token after each position."""
        x_BQD = self.advance(as_head(hidden_BQD, self), self.rows(base, next_BQ))
        for i, layer in enumerate(self.layers):
            x_BQD = layer(x_BQD, positions_BQ, mask_BQS, kv, i)
        return self.norm(x_BQD)

    def imitate(self, base: BaseView, state: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(o_i, g_i) from g_{i-1} and the newest token; of the first depth, which has none, from g_0."""
        if tokens is None:
            return self.head_norm(self.first(state)), state
        rows = self.rows(base, tokens)
        state = self.regress(state, rows)
        return self.head_norm(self.later(torch.cat([state, rows], -1))), state

    def forward(self, base: BaseView, state_BAD: Tensor, tokens_BA: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logits [B, A, V], g_i [B, A, D]) after these tokens, each with the state it is drafted from."""
        out_BAD, state_BAD = self.imitate(base, state_BAD, tokens_BA)
        return project(base, out_BAD), state_BAD

    def students(self, base: BaseView, seen: Capture, batch: Batch, taught: Lessons) -> Tensor:
        """o_i [K, N, D] of the student of each depth that each of the lessons' rows teaches."""
        tokens_BT, documents_BT = batch.tokens_BT, batch.documents_BT
        next_BT, _ = future_tokens(tokens_BT, documents_BT, 1)
        hidden_BTD = seen.hidden[self.spec.num_layers]
        states_PD = self.read(base, hidden_BTD, next_BT, batch.positions_BT, batch.visible()).flatten(0, 1)
        learns_KN = taught.counted_KN if self.skip_masked else torch.ones_like(taught.counted_KN)
        at_M = taught.students_KN[learns_KN].unique()  # where any depth learns
        number_P = torch.zeros_like(tokens_BT).flatten()
        number_P[at_M] = torch.arange(len(at_M), device=at_M.device)
        state_MD, newest_M, outs = states_PD[at_M], None, []
        for i, students_N in enumerate(taught.students_KN):
            if i:
                newest_M = future_tokens(tokens_BT, documents_BT, i + 1)[0].flatten()[at_M]
            out_MD, state_MD = self.imitate(base, state_MD, newest_M)
            outs.append(out_MD[number_P[students_N]])
        return torch.stack(outs)

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Both terms of all depths, summed. Metrics per depth k = i + 1: loss/k (both terms, before decay^i), top1/k
        (against the row's own token), overlap/k (chance that exact sampling accepts); tokens_per_step, 1 + how many
        depths in a row are right given right ones before; floor, the least the sum can be."""
        config, final_PD = self.config, cast(Tensor, seen.final).detach().flatten(0, 1)
        ahead = range(1, config.num_heads + 1)
        everywhere = not self.skip_masked
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead, everywhere=everywhere)
        out_KND = self.students(base, seen, batch, taught)
        teachers_ND = final_PD[taught.rows_N]
        soft = linear_soft_cross_entropy(
            out_KND,
            [base.lm_head_weight] * config.num_heads,
            teacher(base, seen, taught.rows_N, config.teacher_top_k),
            taught.counted_KN,
            biases=[base.lm_head_bias] * config.num_heads,
            factors=[config.label_weight * weight for weight in config.weights],
            top_k=config.teacher_top_k,
            softcap=base.lm_head_softcap,
            measure=measure,
            plain=self.plain_loss,
        )
        aways = [
            feature_distance(out_ND[counted_N], teachers_ND[counted_N])
            for out_ND, counted_N in zip(out_KND, taught.counted_KN, strict=True)
        ]
        weighted = [config.feature_weight * weight * away for weight, away in zip(config.weights, aways, strict=True)]
        total = soft.sum + torch.stack(weighted).sum()
        metrics = self.measured(batch, taught, soft, torch.stack(aways).detach()) if measure else {}
        return LossOut(total, batch.counts_K[2], metrics)

    def measured(
        self, batch: Batch, taught: Lessons, soft: SoftOut, aways_K: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        config, metrics = self.config, {}
        right_KN = (soft.best_KN == taught.gold_N) & taught.counted_KN
        counts_K, rights_K = taught.counted_KN.sum(1), right_KN.sum(1)
        losses_K = config.feature_weight * aways_K + config.label_weight * soft.sums_K
        for i, n in enumerate(counts_K):
            metrics[f"loss/{i + 1}"] = (losses_K[i], n)
            metrics[f"top1/{i + 1}"] = (rights_K[i], n)
            metrics[f"overlap/{i + 1}"] = (soft.overlaps_K[i], n)
        runs_KBT = taught.at_students(right_KN, batch.tokens_BT).cumprod(0)
        metrics["tokens_per_step"] = (counts_K[0] + runs_KBT.sum(), counts_K[0])
        floors = [config.label_weight * w * floor for w, floor in zip(config.weights, soft.floors_K, strict=True)]
        metrics["floor"] = (torch.stack(floors).sum(), counts_K[0])
        return metrics

    def begun(self, base: BaseView, state: State) -> Tensor:
        """g_0 [1, 1, D] at the last accepted position; the blocks read all that are new, each with the token after it,
        and keep their K/V."""
        seen_BAD = state.seen.hidden[self.spec.num_layers]
        accepted, device = seen_BAD.shape[1], seen_BAD.device
        state.head_kv = base.new_kv(self.config.num_layers) if state.head_kv is None else state.head_kv
        past = state.head_kv.length
        positions = torch.arange(past, past + accepted, device=device)[None]
        next_BA = torch.tensor([state.tokens[-accepted:]], device=device)
        return self.read(base, seen_BAD, next_BA, positions, None, state.head_kv)[:, -1:]

    def propose(self, base: BaseView, state: State) -> Proposal:
        return self.propose_rows(base, [state])[0]

    def propose_rows(self, base: BaseView, states: Sequence[State]) -> list[Proposal]:
        """The first depth follows from the last accepted position, the others level by level from a parent's state and
        its own token."""
        logits_1BV, state_1MD = self(base, torch.cat([self.begun(base, state) for state in states], 1))

        def deeper(of_M: Tensor, tokens_M: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal state_1MD
            logits_1MV, state_1MD = self(base, state_1MD[:, of_M], tokens_M[None])
            return logits_1MV[0], state_1MD[0]

        return fill_rows(states, logits_1BV[0], state_1MD[0], deeper)
