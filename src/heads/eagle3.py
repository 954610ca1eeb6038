"""EAGLE-3: one decoder layer on three of the base's hidden states drafts step by step, on its own output.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840), after the authors' code. With g_t = fc([H^low_t; H^mid_t; H^high_t]), E the base's embedding:

    a_t^0 = [norm_in E(x_{t+1}); norm_hid g_t],    h_t^0 = layer(a^0; residual g)_t   drafts x_{t+2}
    a_t^s = [norm_in E(x_{t+1+s}); norm_hid h_t^{s-1}],  h_t^s = layer(a^s; residual h^{s-1})_t   drafts x_{t+2+s}
    q_t^s = softmax(W norm h_t^s) over a *draft vocabulary* of the tokens most often learned

Training-time test: `depth` steps are unrolled with the row's own tokens. Slot t of step s stands at position t + s
and attends to the keys of step 0 up to slot t and to its own slot's keys of steps 1..s: what drafting from t sees.
So teacher-forced training is drafting, number for number.

    L = sum_s decay^s sum_t CE(p_{t+1+s}, q_t^s),   p the base's distribution over the draft vocabulary, decay 0.8

A slot whose base prefers a token outside the draft vocabulary teaches nothing; it stays in the count.

Deviations. The count is that of the first step's targets, not all positions. Attention has no biases and turns as
the base's. Bases of fewer than eight layers are tapped after the first, the middle and the last but one, since the
published 2, L/2 and L-3 would coincide. `start_from_base` (ours; published: random) begins with the base's lm_head,
final norm and the block above the high tap, deaf to the token: from the last but one block up, the base's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import KV, BaseSpec, BaseView, Batch, Capture, Drafted, Head, LossOut, Needs
from draftsmith.drafting import Ancestors, fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.heads.blocks import MLP, Attention, as_head, final_norm_weight
from draftsmith.losses import linear_cross_entropy, linear_soft_cross_entropy
from draftsmith.roles import Proposal, State
from draftsmith.targets import Lessons, future_tokens, lessons

Slots = list[tuple[Tensor, Tensor]]
"""(keys, values) of steps 0, 1, …, [B, H_kv, T, d] each, the newest last."""


@dataclass(frozen=True)
class Eagle3Config:
    layers: list[int] | None = None  # three taps, low to high; null: 2, L/2 and L-3 of the base's L blocks
    draft_vocab_size: int = 32000  # at most; a smaller base's whole vocabulary
    depth: int = 7  # steps of the training-time test, and the deepest tree
    decay: float = 0.8  # of a step's weight
    start_from_base: bool = False  # False: random, as published
    teacher_top_k: int | None = None  # null: the base's whole distribution

    def __post_init__(self) -> None:
        if self.layers is not None and (len(self.layers) != 3 or self.layers != sorted(self.layers)):
            raise ConfigError(f"layers={self.layers}: give three, low to high, or null")
        if self.depth < 1:
            raise ConfigError(f"depth={self.depth}: give at least 1")
        if self.draft_vocab_size < 1:
            raise ConfigError(f"draft_vocab_size={self.draft_vocab_size}: give at least 1")
        if self.decay <= 0:
            raise ConfigError(f"decay={self.decay}: give a positive number")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ConfigError(f"teacher_top_k={self.teacher_top_k}: give at least 1, or null for all tokens")


class MidLayer(nn.Module):
    """The decoder layer: attention reads the token and the feature side by side, the residual is the feature's."""

    def __init__(self, spec: BaseSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.hidden_norm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.input_layernorm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.self_attn = Attention(replace(spec, qkv_bias=False, qk_norm=False), 2 * size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.mlp = MLP(spec)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Becomes a copy of a base's block on the feature, deaf to the token. (Biases and head norms that the base may
        have, it has not.)"""
        for name, p in self.named_parameters():
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                p.copy_(torch.cat([torch.zeros_like(weights[name]), weights[name]], 1))
            else:
                p.copy_(weights["input_layernorm.weight" if name == "hidden_norm.weight" else name])

    def read(self, embedded: Tensor, feature: Tensor) -> Tensor:
        """What the attention reads [B, Q, 2 D]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)

    def forward(self, embedded: Tensor, feature: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, Q, D] each; attend: the attention over whatever this forward may see."""
        hidden = feature + attend(self.read(embedded, feature))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3(Head):
    Config = Eagle3Config
    role = "drafter"
    gated = True

    def __init__(self, config: Eagle3Config, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        size, depth = spec.hidden_size, spec.num_layers
        published, spread = (2, depth // 2, depth - 3), (1, depth // 2, depth - 1)
        self.layers = tuple(config.layers) if config.layers else published if depth >= 8 else spread
        if not all(0 <= layer <= depth for layer in self.layers):
            raise ConfigError(f"layers={list(self.layers)}: the base has hidden states 0..{depth}; give three of them")
        self.draft_vocab = min(config.draft_vocab_size, spec.vocab_size)
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = MidLayer(spec)
        self.norm = nn.RMSNorm(size, eps=spec.norm_eps)
        self.lm_head = nn.Linear(size, self.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(self.draft_vocab, dtype=torch.long))  # draft id + d2t = the base's id
        self.register_buffer("t2d", torch.zeros(spec.vocab_size, dtype=torch.bool))  # whether it is in the draft's

    @property
    def needs(self) -> Needs:
        return Needs(frozenset(self.layers), final=True)

    @property
    def max_depth(self) -> int:
        return self.config.depth

    @property
    def horizon(self) -> int:
        return self.config.depth + 1

    @property
    def ids_V(self) -> Tensor:
        """The base's id of every draft id, ascending."""
        d2t = cast(Tensor, self.d2t)
        return torch.arange(len(d2t), device=d2t.device) + d2t

    @torch.no_grad()
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        counts_V = torch.ones(self.spec.vocab_size) if counts_V is None else counts_V
        ids_V = counts_V.argsort(descending=True, stable=True)[: self.draft_vocab].sort().values
        cast(Tensor, self.d2t).copy_(ids_V - torch.arange(len(ids_V), device=ids_V.device))
        cast(Tensor, self.t2d).zero_()[ids_V] = True
        if self.config.start_from_base:
            size, weights = self.spec.hidden_size, base.lm_head_weight[ids_V.to(base.lm_head_weight.device)]
            self.lm_head.weight.copy_(weights)
            self.fc.weight.copy_(torch.cat([torch.zeros(size, 2 * size), torch.eye(size)], 1))
            if self.spec.llama_blocks:
                self.norm.weight.copy_(final_norm_weight(base))
                self.midlayer.start_from(base.block_weights(min(self.layers[2], self.spec.num_layers - 1)))

    def fuse(self, seen: Capture) -> Tensor:
        """g [B, T, D] of the three taps."""
        taps = [as_head(seen.hidden[layer], self) for layer in self.layers]
        return self.fc(torch.cat(taps, -1))

    def embed(self, base: BaseView, tokens_BQ: Tensor) -> Tensor:
        return as_head(base.embed(tokens_BQ), self)

    def forward(
        self,
        base: BaseView,
        feature_BQD: Tensor,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits [B, Q, draft vocabulary], h_BQD): what follows the token of each slot, and the next feature."""
        attend = lambda x: self.midlayer.self_attn(x, positions_BQ, mask_BQS, kv)  # noqa: E731
        hidden_BQD = self.midlayer(self.embed(base, tokens_BQ), feature_BQD, attend)
        return self.lm_head(self.norm(hidden_BQD)), hidden_BQD

    def step(
        self,
        base: BaseView,
        feature_BQD: Tensor,
        tokens_BQ: Tensor,
        past: Slots,
        positions_BQ: Tensor,
        visible_BQT: Tensor,
    ) -> tuple[Tensor, Slots]:
        """h^s_BQD of step s = len(past) > 0 if it reads these tokens, and the slots of all steps with its own."""
        slots = list(past)

        def attend(x: Tensor) -> Tensor:
            attention, at = self.midlayer.self_attn, positions_BQ + len(past)
            slots.append(attention.slots(x, at))
            return attention.join(over_slots(attention.queries(x, at), slots, visible_BQT))

        return self.midlayer(self.embed(base, tokens_BQ), feature_BQD, attend), slots

    def steps(
        self, base: BaseView, seen: Capture, batch: Batch, at_BQ: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Slots]]:
        """`step` after `step` of the training-time test, on the row's own tokens. Where a document ends before
        x_{t+1+s} the value means nothing, and no target looks at it. at_BQ: the positions of each row that are drafted
        from, None: all; the others leave no more than the first step's keys and values."""
        tokens_BT, _ = future_tokens(batch.tokens_BT, batch.documents_BT, 1)
        embedded_BTD, feature_BTD = self.embed(base, tokens_BT), self.fuse(seen)
        attention = self.midlayer.self_attn
        past = [attention.slots(self.midlayer.read(embedded_BTD, feature_BTD), batch.positions_BT)]
        embedded, feature, positions, visible = (
            taken(t, at_BQ) for t in (embedded_BTD, feature_BTD, batch.positions_BT, batch.visible())
        )
        feature = self.midlayer(
            embedded, feature, lambda x: attention.join(over_slots(attention.queries(x, positions), past, visible))
        )
        yield feature, past
        for s in range(1, self.config.depth):
            tokens_BT, _ = future_tokens(batch.tokens_BT, batch.documents_BT, s + 1)
            feature, past = self.step(base, feature, taken(tokens_BT, at_BQ), past, positions, visible)
            yield feature, past

    def unroll(self, base: BaseView, seen: Capture, batch: Batch) -> list[Tensor]:
        """h^s_BTD of every step."""
        return [feature_BTD for feature_BTD, _ in self.steps(base, seen, batch)]

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Weighted CE over the steps. Metrics per depth k = 1..: loss/k, top1/k against the row's own token,
        overlap/k (sum of min(p, q) over the draft vocabulary), floor, tokens_per_step."""
        depth, ids_V = self.config.depth, self.ids_V
        factors = [self.config.decay**s for s in range(depth)]
        ahead, everywhere = range(1, depth + 1), not self.skip_masked
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead, everywhere=everywhere)
        final_PD = cast(Tensor, seen.final).flatten(0, 1)
        at_BQ, number_P = (None, None) if everywhere else self._drafting(taught, batch)
        students_KN = taught.students_KN if number_P is None else number_P[taught.students_KN]
        steps = zip(self.steps(base, seen, batch, at_BQ), students_KN, strict=True)

        def teacher(start: int, stop: int) -> tuple[Tensor, Tensor]:
            logits_NV = base.lm_head(final_PD[taught.rows_N[start:stop]])
            return logits_NV[:, ids_V], cast(Tensor, self.t2d)[logits_NV.argmax(-1)]

        out = linear_soft_cross_entropy(
            torch.stack([self.norm(h_BQD.flatten(0, 1)[where_N]) for (h_BQD, _), where_N in steps]),
            [self.lm_head.weight] * depth,
            teacher,
            taught.counted_KN,
            factors=factors,
            top_k=self.config.teacher_top_k,
            measure=measure,
            plain=self.plain_loss,
        )
        metrics = {}
        if measure:
            metrics = self._measured(batch, taught, ids_V[out.best_KN.clamp(min=0)] == taught.gold_N)
            counted_K = taught.counted_KN.sum(1)
            for k in range(depth):
                metrics[f"loss/{k + 1}"] = (out.sums_K[k], counted_K[k])
                metrics[f"overlap/{k + 1}"] = (out.overlaps_K[k], counted_K[k])
            metrics["floor"] = (out.floors_K @ out.floors_K.new_tensor(factors), counted_K[0])
        return LossOut(out.sum, batch.counts_K[2], metrics)

    def _drafting(self, taught: Lessons, batch: Batch) -> tuple[Tensor, Tensor]:
        """(at_BQ, number_P): the positions of each row from which some step learns (and others, where a row has fewer
        of them than another), and which of these b * Q + q each position b * T + t is."""
        learns_BT = torch.zeros_like(batch.mask_BT, dtype=torch.bool)
        learns_BT.view(-1)[taught.students_KN[taught.counted_KN]] = True
        most = max(1, int(learns_BT.sum(1).max()))
        at_BQ = learns_BT.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        flat_BQ = at_BQ + batch.tokens_BT.shape[1] * torch.arange(len(at_BQ), device=at_BQ.device)[:, None]
        number_P = torch.zeros(learns_BT.numel(), dtype=torch.long, device=at_BQ.device)
        number_P[flat_BQ.flatten()] = torch.arange(flat_BQ.numel(), device=at_BQ.device)
        return at_BQ, number_P

    def _measured(self, batch: Batch, taught: Lessons, right_KN: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        right_KN = right_KN & taught.counted_KN
        counted_K = taught.counted_KN.sum(1)
        found = {f"top1/{k + 1}": (right_KN[k].sum(), counted_K[k]) for k in range(self.config.depth)}
        in_a_row = taught.at_students(right_KN, batch.tokens_BT).cumprod(0).sum()
        return {**found, "tokens_per_step": (counted_K[0] + in_a_row, counted_K[0])}

    @torch.no_grad()
    def drafted(self, base: BaseView, seen: Capture, batch: Batch) -> Drafted:
        """What every step but the last drafts where it learns, and the output of the next one if it reads that."""
        if self.config.depth == 1:
            raise ConfigError("depth=1: drafts one token; there is nothing to stop")
        ids_V, visible_BTT = self.ids_V, batch.visible()
        at, tokens, before, hidden = [], [], [], []
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, range(1, self.config.depth))
        learned = zip(taught.counted_KN, taught.students_KN, strict=True)
        for (counted_N, students_N), (feature_BTD, past) in zip(learned, self.steps(base, seen, batch), strict=False):
            rows_M = counted_N.nonzero().squeeze(1)
            at_M = students_N[rows_M]
            x_MD, any_M = self.norm(feature_BTD.flatten(0, 1)[at_M]), torch.zeros_like(at_M)
            _, best_M = linear_cross_entropy(x_MD, self.lm_head.weight, any_M)  # asked for its argmax alone
            tokens_M = ids_V[best_M]
            drafts_P = torch.zeros_like(batch.tokens_BT).flatten().index_put((at_M,), tokens_M)
            drafts_BT = drafts_P.view_as(batch.tokens_BT)
            next_BTD, _ = self.step(base, feature_BTD, drafts_BT, past, batch.positions_BT, visible_BTT)
            at.append(taught.rows_N[rows_M])
            tokens.append(tokens_M)
            before.append(x_MD)
            hidden.append(self.norm(next_BTD.flatten(0, 1)[at_M]))
        return Drafted(torch.cat(at), torch.cat(tokens), torch.cat(before), torch.cat(hidden), 2)

    def propose(self, base: BaseView, state: State) -> Proposal:
        """Step 0 reads the accepted positions with the tokens that followed them, which the K/V keeps; the drafts'
        own slots stand behind them and are forgotten."""
        kv = state.head_kv = base.new_kv(1) if state.head_kv is None else state.head_kv
        feature_BAD = self.fuse(state.seen)
        rows, new = feature_BAD.shape[:2]
        device, past = feature_BAD.device, kv.length
        tokens_BA = torch.tensor(state.tokens[-new:], device=device).expand(rows, -1)
        positions = torch.arange(past, past + new, device=device)[None]
        logits_BAV, feature_BAD = self(base, feature_BAD, tokens_BA, positions, None, kv)
        feature_BAD, past = feature_BAD[:, -1:], past + new
        ancestors, depth = Ancestors(device), 0

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal feature_BAD, depth
            if not len(level.expanded_A):
                return None
            of_A = level.of_C[level.expanded_A]
            tokens_BA = tokens_C[level.expanded_A].expand(rows, -1)
            positions = torch.full((1, len(of_A)), past + depth, device=device)
            mask = ancestors.below(of_A, past)
            logits_BAV, feature_BAD = self(base, feature_BAD[:, of_A], tokens_BA, positions, mask, kv)
            depth += 1
            return logits_BAV[0], self.norm(feature_BAD[0])

        proposal = fill(state, logits_BAV[0, -1], self.norm(feature_BAD[0, -1]), deeper, self.ids_V)
        kv.crop(past)
        return proposal


def taken(t: Tensor, at_BQ: Tensor | None) -> Tensor:
    """t [B, T, ...] at the positions of each row; None: all of it."""
    return t if at_BQ is None else t[torch.arange(len(t), device=t.device)[:, None], at_BQ]


def over_slots(q_BHQd: Tensor, past: Slots, visible_BQT: Tensor) -> Tensor:
    """Attention [B, H, Q, d] of the newest step: over step 0's T keys as `visible` [B, Q, T] says and over the later
    steps' keys at the query's own slot."""
    (first_k, first_v), later = past[0], past[1:]
    groups = q_BHQd.shape[1] // first_k.shape[1]
    if not later:
        return F.scaled_dot_product_attention(q_BHQd, first_k, first_v, visible_BQT[:, None], enable_gqa=groups > 1)
    wide = [tuple(t.repeat_interleave(groups, 1) for t in pair) for pair in past]
    scale = q_BHQd.shape[-1] ** -0.5
    first_BHQT = (q_BHQd @ wide[0][0].transpose(2, 3)).masked_fill(~visible_BQT[:, None], float("-inf"))
    own_BHQs = torch.stack([(q_BHQd * k).sum(-1) for k, _ in wide[1:]], -1)
    weights = (torch.cat([first_BHQT, own_BHQs], -1) * scale).softmax(
        -1, dtype=torch.promote_types(q_BHQd.dtype, torch.float32)
    )
    weights = weights.to(q_BHQd.dtype)
    slots = first_k.shape[2]
    out = weights[..., :slots] @ wide[0][1]
    for s, (_, v) in enumerate(wide[1:]):
        out = out + weights[..., slots + s, None] * v
    return out
