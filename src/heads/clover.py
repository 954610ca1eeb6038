"""Clover: Medusa's heads in a row, each hearing the token drafted before it through a one-key attention.

Xiao et al. 2024, "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge" (arXiv 2405.00263).
H_t is the residual stream after the base's last block, e(x) the row of token x in the base's lm_head, divided by its
length. Head k = 1..K predicts x_{t+1+k} (x_{t+1} is the base's own lm_head's):

    h_0 = norm(Block(H))_t                                       the augmenting block: causal, over all of H_0..H_t
    h_k = h_{k-1} + SiLU(s_k V_k e(x_{t+k}))                     regressive connection through the attention decoder
    s_k = similarity of Q_k norm_k(h_{k-1}) and K_k e(x_{t+k})   no softmax: over a single key it would always be 1
    q_k = softmax(W ResBlock_k(h_k)),   W the base's frozen lm_head
    L   = sum_k decay^k CE(q_k, x_{t+1+k})

The paper's ablation: `augment` false has no block, `attention` false no similarity (s_k = 1), `regressive` false no
row of heads (each reads h_0 and e(x_{t+1}) alone).

Ours, where the paper is silent and its authors published no code. The block goes on from the base's own last one and
starts as a copy of it (PyTorch's init where its blocks are not Llama's); the norm after it is the base's, frozen.
Every head has a Q, K, V and norm of its own, and no biases in them. `similarity` is taken per attention head of the
base's number: dot divides by the root of the head's size, cosine by both lengths (on the tiny base dot came to 3.3
tokens a step, cosine to 3.1). Q and K start near the identity, V and the residual blocks at zero: every head starts as
h_0. Weights of the depths and one count for all as Medusa's. Trees are static; the paper's sampler grows one of 4
tokens by probability.
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
from draftsmith.heads.blocks import DecoderLayer, ResBlock, as_head, project
from draftsmith.losses import linear_cross_entropy
from draftsmith.roles import Proposal, State
from draftsmith.targets import counted_targets, future_tokens, places


@dataclass(frozen=True)
class CloverConfig:
    num_heads: int = 3  # K
    decay: float = 0.8  # the loss of head k weighs decay^k
    similarity: str = "dot"  # dot | cosine
    augment: bool = True  # a Llama block before all heads
    attention: bool = True  # False: a token's say is not weighed by its similarity
    regressive: bool = True  # False: no head hears the one before it

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"num_heads={self.num_heads}: give at least 1")
        if self.decay <= 0:
            raise ConfigError(f"decay={self.decay}: give a positive number")
        if self.similarity not in ("cosine", "dot"):
            raise ConfigError(f"similarity='{self.similarity}': choose cosine or dot")


def agreement(q: Tensor, k: Tensor, heads: int, similarity: str, eps: float) -> Tensor:
    """[…, heads, 1]: how alike queries and keys are, one attention head at a time."""
    q, k = (t.unflatten(-1, (heads, -1)) for t in (q, k))
    if similarity == "cosine":
        return F.cosine_similarity(q, k, dim=-1, eps=eps)[..., None]
    return (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5


class Connection(nn.Module):
    """h + SiLU(s V e), s the similarity of Q norm(h) and K e: attention to one token, without softmax."""

    def __init__(self, config: CloverConfig, spec: BaseSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.heads, self.eps, self.similarity = spec.num_heads, spec.norm_eps, config.similarity
        self.v = nn.Linear(size, size, bias=False)
        if config.attention:
            self.input_layernorm = nn.RMSNorm(size, eps=spec.norm_eps)
            self.q = nn.Linear(size, size, bias=False)
            self.k = nn.Linear(size, size, bias=False)
        self.attention = config.attention

    @torch.no_grad()
    def reset(self) -> None:
        """The identity, whatever the token says."""
        nn.init.zeros_(self.v.weight)
        for linear in (self.q, self.k) if self.attention else ():
            nn.init.eye_(linear.weight)
            linear.weight.add_(torch.randn_like(linear.weight), alpha=0.01)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        value = self.v(e)
        if self.attention:
            s = agreement(self.q(self.input_layernorm(h)), self.k(e), self.heads, self.similarity, self.eps)
            value = (s * value.unflatten(-1, (self.heads, -1))).flatten(-2)
        return h + F.silu(value)


class Clover(Head):
    Config = CloverConfig
    role = "drafter"
    gated = True

    def __init__(self, config: CloverConfig, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        if spec.hidden_size % spec.num_heads:
            raise ConfigError(f"hidden size {spec.hidden_size} does not divide into {spec.num_heads} heads")
        self.layer = DecoderLayer(spec) if config.augment else None
        self.connections = nn.ModuleList(Connection(config, spec) for _ in range(config.num_heads))
        self.blocks = nn.ModuleList(ResBlock(spec.hidden_size) for _ in range(config.num_heads))

    @property
    def needs(self) -> Needs:
        return Needs(frozenset({self.spec.num_layers}))

    @property
    def max_depth(self) -> int:
        return self.config.num_heads

    @property
    def horizon(self) -> int:
        return self.config.num_heads + 1

    @property
    def reads_counted(self) -> bool:
        return self.layer is None

    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        if self.layer is not None and self.spec.llama_blocks:
            self.layer.start_from(base.block_weights(self.spec.num_layers - 1))
        for part in (*self.connections, *self.blocks):
            cast("Connection | ResBlock", part).reset()

    def context(
        self,
        base: BaseView,
        hidden_BQD: Tensor,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
    ) -> Tensor:
        """h_0 [B, Q, D]."""
        if self.layer is not None:
            hidden_BQD = self.layer(as_head(hidden_BQD, self), positions_BQ, mask_BQS, kv)
        return as_head(base.final_norm(hidden_BQD.to(base.lm_head_weight.dtype)), self)

    def connect(self, base: BaseView, k: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """h_k of head k (1-based), from what the heads before it left and the newest token."""
        rows = F.normalize(as_head(base.lm_head_weight[tokens], self), dim=-1)
        return cast(Connection, self.connections[k - 1])(hidden, rows)

    def forward(self, base: BaseView, k: int, hidden_BAD: Tensor, tokens_BA: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, A, V] of head k, h_k [B, A, D]) after these tokens, each with the state it is drafted from."""
        hidden_BAD = self.connect(base, k, hidden_BAD, tokens_BA)
        return project(base, self.blocks[k - 1](hidden_BAD)), hidden_BAD

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Weighted CE summed over depths; metrics per depth: loss/k, top1/k (against the row's own token),
        and tokens_per_step, 1 + how many depths in a row are right, averaged over positions."""
        tokens_BT, documents_BT, depths = batch.tokens_BT, batch.documents_BT, range(1, self.config.num_heads + 1)
        wanted = [counted_targets(tokens_BT, batch.mask_BT, documents_BT, k + 1) for k in depths]
        target_KP, counted_KP = (torch.stack(t).flatten(1) for t in zip(*wanted, strict=True))
        at_M, _ = places(counted_KP.any(0), self.skip_masked)  # where any head learns
        hidden_BTD = seen.hidden[self.spec.num_layers]
        start_MD = self.context(base, hidden_BTD, batch.positions_BT, batch.visible()).flatten(0, 1)[at_M]
        hidden_MD = start_MD
        total = hidden_BTD.new_zeros((), dtype=torch.promote_types(hidden_BTD.dtype, torch.float32))
        sums, right_KP = [], torch.zeros_like(counted_KP)
        for k in depths:
            newest_BT, _ = future_tokens(tokens_BT, documents_BT, k if self.config.regressive else 1)
            before_MD = hidden_MD if self.config.regressive else start_MD
            hidden_MD = self.connect(base, k, before_MD, newest_BT.flatten()[at_M])
            learns_N, counted_N = places(counted_KP[k - 1, at_M], self.skip_masked)
            where_N = at_M[learns_N]
            target_N = target_KP[k - 1, where_N]
            summed, best_N = linear_cross_entropy(
                self.blocks[k - 1](hidden_MD[learns_N]),
                base.lm_head_weight,
                target_N,
                bias_V=base.lm_head_bias,
                softcap=base.lm_head_softcap,
                counted_N=counted_N,
                measure=measure,
                plain=self.plain_loss,
            )
            total = total + self.config.decay**k * summed
            sums.append(summed.detach())
            right_KP[k - 1, where_N] = best_N == target_N
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if measure:
            counts_K, rights_K, runs_KP = counted_KP.sum(1), right_KP.sum(1), right_KP.cumprod(0)
            for k in depths:
                metrics[f"loss/{k}"] = (sums[k - 1], counts_K[k - 1])
                metrics[f"top1/{k}"] = (rights_K[k - 1], counts_K[k - 1])
            metrics["tokens_per_step"] = (counts_K[0] + runs_KP.sum(), counts_K[0])
        return LossOut(total, batch.counts_K[2], metrics)

    def begun(self, base: BaseView, state: State) -> Tensor:
        """h_0 [1, 1, D] at the last accepted position; the block reads all that are new, and keeps their K/V."""
        seen_BAD, past = state.seen.hidden[self.spec.num_layers], 0
        if self.layer is not None:
            state.head_kv = base.new_kv(1) if state.head_kv is None else state.head_kv
            past = state.head_kv.length
        positions = torch.arange(past, past + seen_BAD.shape[1], device=seen_BAD.device)[None]
        return self.context(base, seen_BAD, positions, None, state.head_kv)[:, -1:]

    def propose(self, base: BaseView, state: State) -> Proposal:
        return self.propose_rows(base, [state])[0]

    def propose_rows(self, base: BaseView, states: Sequence[State]) -> list[Proposal]:
        """Level by level, each node from its parent's state and its own token."""
        start_1BD = torch.cat([self.begun(base, state) for state in states], 1)
        roots_1B = torch.tensor([[state.root for state in states]], device=start_1BD.device)
        depth = 1
        logits_1BV, hidden_1MD = self(base, depth, start_1BD, roots_1B)

        def deeper(of_M: Tensor, tokens_M: Tensor, rows_M: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal depth, hidden_1MD
            depth += 1
            before_1MD, newest_1M = start_1BD[:, rows_M], roots_1B[:, rows_M]
            if self.config.regressive:
                before_1MD, newest_1M = hidden_1MD[:, of_M], tokens_M[None]
            logits_1MV, hidden_1MD = self(base, depth, before_1MD, newest_1M)
            return logits_1MV[0], hidden_1MD[0]

        return fill_rows(states, logits_1BV[0], hidden_1MD[0], deeper)
