"""Kangaroo: the base's own first layers and one attention adapter draft; its remaining layers verify.

Liu et al. 2024, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (arXiv 2404.18911).
The adapter reads H_t, the residual stream after the first l blocks, and imitates the base at the same position:

    y_t = H_t + Attention(norm_in(H))_t,   q_t = softmax(W norm_out(y_t)),   W the base's frozen lm_head   (eq. 2)
    L   = sum_t CE(p_t, q_t),   p_t the base's own distribution of x_{t+1}                                 (eq. 3)

There is no MLP. Double early exit: a drafted token costs l blocks and the adapter, and drafting stops after a
token whose distribution's maximum is below `threshold` (eta), at the latest after `depth` (gamma) tokens. What
the l blocks said of every drafted token goes on into the other blocks: no block runs twice for a token.

Deviations. RoPE turns as in the base (the published code always uses 10000). The adapter reads accepted positions
once more when their verdict is known, together with the new root, in one pass; the base's blocks do not.
`start_from_base` (ours) begins with the attention of the last block that is read and with the base's final norm.
A sliding window of the base's is not the adapter's.
In a tree, drafting goes on below a level while any node with children was drafted with confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from draftsmith.contracts import KV, BaseSpec, BaseView, Batch, Capture, Drafted, Head, LossOut, Needs
from draftsmith.drafting import Ancestors, fill, with_entered
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.heads.blocks import Attention, as_head, final_norm_weight, project, teacher
from draftsmith.losses import linear_cross_entropy, linear_soft_cross_entropy
from draftsmith.roles import Partial, Proposal, State
from draftsmith.targets import future_tokens, lessons


@dataclass(frozen=True)
class KangarooConfig:
    exit_layer: int | None = None  # l; null: one in 16 of the base's, rounded up (the paper's 2 of 32 and 3 of 40)
    depth: int = 6  # gamma, the most tokens drafted in a step
    threshold: float = 0.6  # eta: drafting stops after a token less certain than this; 0 never
    start_from_base: bool = False  # False: random, as published
    teacher_top_k: int | None = None  # null: the base's whole distribution

    def __post_init__(self) -> None:
        if self.exit_layer is not None and self.exit_layer < 1:
            raise ConfigError(f"exit_layer={self.exit_layer}: give at least 1, or null")
        if self.depth < 1:
            raise ConfigError(f"depth={self.depth}: give at least 1")
        if self.threshold < 0:
            raise ConfigError(f"threshold={self.threshold}: give a probability, 0 to never stop early")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k={self.teacher_top_k}: give at least 1, or null for all tokens")


class Kangaroo(Head):
    Config = KangarooConfig
    role = "drafter"
    gated = True
    runs_base = True

    def __init__(self, config: KangarooConfig, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        self.exit_layer = config.exit_layer or -(-spec.num_layers // 16)
        if self.exit_layer > spec.num_layers:
            raise ConfigError(
                f"exit_layer={self.exit_layer}: the base has {spec.num_layers} layers; exit after one of them"
            )
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)
        self.self_attn = Attention(spec)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps)

    @property
    def needs(self) -> Needs:
        return Needs(frozenset({self.exit_layer}), teacher=True)

    @property
    def max_depth(self) -> int:
        return self.config.depth

    @property
    def horizon(self) -> int:
        return 1

    @torch.no_grad()
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        if not self.config.start_from_base or not self.spec.llama_blocks:
            return
        weights = base.block_weights(self.exit_layer - 1)
        for name, p in self.named_parameters():
            if name in weights:
                p.copy_(weights[name])
        self.norm.weight.copy_(final_norm_weight(base))

    def adapt(
        self, hidden_BQD: Tensor, positions_BQ: Tensor, mask_BQS: Tensor | None = None, kv: KV | None = None
    ) -> Tensor:
        """The adapter's output [B, Q, D], what the lm_head reads."""
        hidden_BQD = as_head(hidden_BQD, self)
        return self.norm(hidden_BQD + self.self_attn(self.input_layernorm(hidden_BQD), positions_BQ, mask_BQS, kv))

    def forward(
        self,
        base: BaseView,
        hidden_BQD: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits_BQV of the token after each position, the adapter's output there)."""
        adapted_BQD = self.adapt(hidden_BQD, positions_BQ, mask_BQS, kv)
        return project(base, adapted_BQD), adapted_BQD

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """CE against the base's distribution at the same position. Metrics: top1/1 against the row's own token,
        overlap/1 (sum of min(p, q)), floor (the base's entropy), and tokens_per_step with the threshold's stop."""
        adapted_BTD = self.adapt(seen.hidden[self.exit_layer], batch.positions_BT, batch.visible())
        everywhere = not self.skip_masked
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, [0], everywhere=everywhere)
        out = linear_soft_cross_entropy(
            adapted_BTD.flatten(0, 1)[taught.students_KN],
            [base.lm_head_weight],
            teacher(base, seen, taught.rows_N, self.config.teacher_top_k),
            taught.counted_KN,
            biases=[base.lm_head_bias],
            top_k=self.config.teacher_top_k,
            softcap=base.lm_head_softcap,
            measure=measure,
            plain=self.plain_loss,
        )
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if measure:
            n = taught.counted_KN.sum()
            right_KN = out.best_KN == taught.gold_N
            metrics = {
                "top1/1": (right_KN.sum(), n),
                "overlap/1": (out.overlaps_K[0], n),
                "floor": (out.floors_K[0], n),
            }
            right_BT = taught.at_students(right_KN, batch.tokens_BT)[0]
            sure_BT = taught.at_students(out.chance_KN >= self.config.threshold, batch.tokens_BT)[0]
            metrics["tokens_per_step"] = self._in_a_row(batch, right_BT, sure_BT)
        return LossOut(out.sum, batch.counts_K[1], metrics)

    def _in_a_row(self, batch: Batch, right_BT: Tensor, sure_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Depth k of the root at t is drafted at t + k - 1, if every token before it was right and certain."""
        counted_BT = future_tokens(batch.mask_BT, batch.documents_BT, 1)[0].bool()
        start_BT = counted_BT & (batch.positions_BT > 0)  # no step's root is a document's first token
        positions, kept = start_BT.sum(), start_BT.new_zeros((), dtype=torch.long)
        for k in range(1, self.config.depth + 1):
            start_BT = start_BT & future_tokens(right_BT, batch.documents_BT, k - 1)[0]
            kept = kept + start_BT.sum()
            start_BT = start_BT & future_tokens(sure_BT, batch.documents_BT, k - 1)[0]
        return positions + kept, positions

    @torch.no_grad()
    def drafted(self, base: BaseView, seen: Capture, batch: Batch) -> Drafted:
        """What it drafts wherever it learns, and the adapter's output at a slot of its own that holds the draft: a row
        and its drafts are read as one sequence, in which each draft sees what its position saw, and itself."""
        if self.config.depth == 1:
            raise ConfigError("depth=1: drafts one token; there is nothing to stop")
        tokens_BT, visible_BTT = batch.tokens_BT, batch.visible()
        taught = lessons(tokens_BT, batch.mask_BT, batch.documents_BT, [0])
        at_M, weight_VD = taught.students_KN[0], base.lm_head_weight
        adapted_BTD = self.adapt(seen.hidden[self.exit_layer], batch.positions_BT, visible_BTT)
        _, best_M = linear_cross_entropy(
            adapted_BTD.flatten(0, 1)[at_M].to(weight_VD.dtype),
            weight_VD,
            taught.gold_N,
            bias_V=base.lm_head_bias,
            softcap=base.lm_head_softcap,
        )
        drafts_BT = torch.zeros_like(tokens_BT).flatten().index_put((at_M,), best_M).view_as(tokens_BT)
        next_BT, _ = future_tokens(batch.positions_BT, batch.documents_BT, 1)
        own_BTT = torch.eye(tokens_BT.shape[1], dtype=torch.bool, device=tokens_BT.device).expand_as(visible_BTT)
        above_BQS = torch.cat([visible_BTT, torch.zeros_like(own_BTT)], 2)
        mask_BQS = torch.cat([above_BQS, torch.cat([visible_BTT, own_BTT], 2)], 1)
        both_BQ, positions_BQ = torch.cat([tokens_BT, drafts_BT], 1), torch.cat([batch.positions_BT, next_BT], 1)
        with torch.autocast(tokens_BT.device.type, enabled=False):  # the base as it is in decoding
            wanted = Needs(frozenset({self.exit_layer}))
            hidden_BQD = base.capture(wanted, both_BQ, positions_BQ=positions_BQ, mask_BQS=mask_BQS).hidden
        read_BTD = self.adapt(hidden_BQD[self.exit_layer], positions_BQ, mask_BQS)[:, tokens_BT.shape[1] :]
        before_MD, read_MD = (t.flatten(0, 1)[at_M] for t in (adapted_BTD, read_BTD))
        return Drafted(taught.rows_N, best_M, before_MD, read_MD, 1)

    def propose(self, base: BaseView, state: State) -> Proposal:
        """The root and every drafted token run through the base's first blocks on the base's own K/V; the adapter
        drafts from what they left there."""
        kv, exit_layer = cast(KV, state.kv), self.exit_layer
        head_kv = state.head_kv = base.new_kv(1) if state.head_kv is None else state.head_kv
        seen_BAD, start = state.seen.hidden[exit_layer], kv.length
        accepted = seen_BAD.shape[1]
        tree, heard = Ancestors(seen_BAD.device), Ancestors(seen_BAD.device)
        entered, kept = [], head_kv.length + accepted

        def enter(tokens_C: Tensor, depth: int, mask: Tensor | None) -> Tensor:
            positions = torch.full((1, len(tokens_C)), start + depth, device=seen_BAD.device)
            wanted = Needs(frozenset({exit_layer}))
            seen = base.capture(wanted, tokens_C[None], positions_BQ=positions, mask_BQS=mask, kv=kv)
            entered.append(seen.hidden[exit_layer])
            return entered[-1]

        new_BQD = torch.cat([seen_BAD, enter(torch.tensor([state.root], device=seen_BAD.device), 0, None)], 1)
        positions = torch.arange(head_kv.length, kept + 1, device=seen_BAD.device)[None]
        logits_BQV, adapted_BQD = self(base, new_BQD, positions, None, head_kv)
        depth = 0

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal depth
            depth += 1
            hidden_BCD = enter(tokens_C, depth, tree.below(level.above_C, start + 1))
            if not len(level.expanded_A):
                return None
            mask = heard.below(level.of_C[level.expanded_A], kept + 1)
            at = torch.full((1, len(level.expanded_A)), kept + depth, device=mask.device)
            logits_BAV, adapted_BAD = self(base, hidden_BCD[:, level.expanded_A], at, mask, head_kv)
            return logits_BAV[0], adapted_BAD[0]

        own = self if self.config.threshold else None
        proposal = fill(state, logits_BQV[0, -1], adapted_BQD[0, -1], deeper, gate=own)
        head_kv.crop(kept)
        return with_entered(proposal, exit_layer, torch.cat(entered, 1), kv, start)

    def stop(self, state: State, partial: Partial) -> bool:
        """Its own gate, where no other is given: no token to go on from is certain enough."""
        return partial.surest < self.config.threshold
