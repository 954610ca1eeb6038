"""Medusa-1: K heads on the base's last hidden state, each predicting one more token ahead.

Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
(arXiv 2401.10774). Head k = 1..K reads f_t, the base's final-norm output (equation 1):

    h_k = ResBlock_n( … ResBlock_1(f_t)),   p_k = softmax(W_k h_k)   predicts x_{t+1+k}
    L   = sum_k lambda_k CE(p_k, x_{t+1+k}),   lambda_k = decay^k   (decay 0.8)        (equation 2)

(x_{t+1} is the base's own lm_head's.) W_k is each head's own, started from the base's lm_head, or the base's
lm_head itself, frozen (`share_lm_head`).

Deviations. Block biases start at zero as well as the weights, so that every head starts as the base's own
distribution (PyTorch's bias init would not). The n blocks of a head are distinct modules; the published code
repeats one. One count divides every depth, that of depth 1; depths differ only for documents whose first
counted token lies among their first K+1 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from draftsmith.contracts import BaseSpec, BaseView, Batch, Capture, Head, LossOut, Needs
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.heads.blocks import ResBlock, as_head
from draftsmith.losses import linear_cross_entropy
from draftsmith.roles import Proposal, State
from draftsmith.targets import counted_targets, places


@dataclass(frozen=True)
class MedusaConfig:
    num_heads: int = 3  # K
    num_layers: int = 1  # residual blocks per head
    share_lm_head: bool = False  # True: every head ends in the base's frozen lm_head
    decay: float = 0.8  # lambda_k = decay^k
    loss_weights: list[float] | None = None  # lambda_1..lambda_K, instead of the decay

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(f"num_heads={self.num_heads}: give at least 1")
        if self.num_layers < 1:
            raise ConfigError(f"num_layers={self.num_layers}: give at least 1")
        if self.decay <= 0:
            raise ConfigError(f"decay={self.decay}: give a positive number")
        if self.loss_weights is not None and len(self.loss_weights) != self.num_heads:
            raise ConfigError(
                f"loss_weights: {len(self.loss_weights)} weights for num_heads={self.num_heads}; give one per head"
            )

    @property
    def weights(self) -> list[float]:
        return self.loss_weights or [self.decay**k for k in range(1, self.num_heads + 1)]


class Medusa(Head):
    Config = MedusaConfig
    role = "drafter"

    def __init__(self, config: MedusaConfig, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        size, depths = spec.hidden_size, range(config.num_heads)
        self.blocks = nn.ModuleList(nn.Sequential(*(ResBlock(size) for _ in range(config.num_layers))) for _ in depths)
        if not config.share_lm_head:
            self.lm_heads = nn.ModuleList(nn.Linear(size, spec.vocab_size, bias=spec.lm_head_bias) for _ in depths)

    @property
    def needs(self) -> Needs:
        return Needs(final=True)

    @property
    def max_depth(self) -> int:
        return self.config.num_heads

    @property
    def horizon(self) -> int:
        return self.config.num_heads + 1

    @property
    def reads_counted(self) -> bool:
        return True

    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        for block in self.blocks.modules():
            if isinstance(block, ResBlock):
                block.reset()
        if self.config.share_lm_head:
            return
        with torch.no_grad():
            for lm_head in cast("list[nn.Linear]", list(self.lm_heads)):
                lm_head.weight.copy_(base.lm_head_weight)
                if base.lm_head_bias is not None:
                    lm_head.bias.copy_(base.lm_head_bias)

    def projection(self, k: int, base: BaseView) -> tuple[Tensor, Tensor | None]:
        """(weight_VD, bias_V or None) that end head k (1-based)."""
        if self.config.share_lm_head:
            return base.lm_head_weight, base.lm_head_bias
        lm_head = cast(nn.Linear, self.lm_heads[k - 1])
        return lm_head.weight, lm_head.bias

    def cap(self, base: BaseView) -> float | None:
        """The soft cap of logits, the base's with its lm_head; a head's own has none."""
        return base.lm_head_softcap if self.config.share_lm_head else None

    def hidden(self, k: int, final_ND: Tensor) -> Tensor:
        """h_k [N, D] of head k (1-based); the loss projects it in chunks, forward() whole."""
        blocks = cast(nn.Sequential, self.blocks[k - 1])
        return blocks(as_head(final_ND, blocks))

    def forward(self, base: BaseView, final_ND: Tensor) -> Tensor:
        """logits_NKV of every head at every given position."""
        logits = []
        for k in range(1, self.config.num_heads + 1):
            weight_VD, bias_V = self.projection(k, base)
            hidden_ND = self.hidden(k, final_ND).to(weight_VD.dtype)
            shared = self.config.share_lm_head
            logits.append(base.lm_head(hidden_ND) if shared else nn.functional.linear(hidden_ND, weight_VD, bias_V))
        return torch.stack(logits, 1)

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Weighted CE summed over depths; metrics per depth: loss/k, top1/k (against the row's own token),
        and tokens_per_step, 1 + how many depths in a row are right, averaged over positions."""
        final_BTD = cast(Tensor, seen.final)
        count = batch.counts_K[2]
        total = final_BTD.new_zeros((), dtype=torch.float32)
        run_BT = torch.ones_like(batch.mask_BT)  # every depth so far was right here
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        in_a_row = torch.zeros_like(count)
        for k, weight in enumerate(self.config.weights, start=1):
            target_BT, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, k + 1)
            where, counted_N = places(counted_BT, self.skip_masked)
            target_N = target_BT.reshape(-1)[where]
            hidden_ND = self.hidden(k, final_BTD.flatten(0, 1)[where])
            weight_VD, bias_V = self.projection(k, base)
            how: dict[str, Any] = {"counted_N": counted_N, "measure": measure, "plain": self.plain_loss}
            summed, best_N = linear_cross_entropy(
                hidden_ND, weight_VD, target_N, bias_V=bias_V, softcap=self.cap(base), **how
            )
            total = total + weight * summed
            if measure:
                right_N = best_N == target_N
                n = counted_BT.sum()
                metrics[f"loss/{k}"] = (summed.detach(), n)
                metrics[f"top1/{k}"] = (right_N.sum(), n)
                hits_BT = torch.zeros_like(run_BT).reshape(-1).index_put((where,), right_N).view_as(run_BT)
                run_BT = run_BT & hits_BT
                in_a_row = in_a_row + run_BT.sum()
                if k == 1:
                    positions = n
        if measure:
            metrics["tokens_per_step"] = (positions + in_a_row, positions)
        return LossOut(total, count, metrics)

    def propose(self, base: BaseView, state: State) -> Proposal:
        return self.propose_rows(base, [state])[0]

    def propose_rows(self, base: BaseView, states: Sequence[State]) -> list[Proposal]:
        """Every depth at once; a node takes its token from the head of its depth, whatever is above it."""
        final_BD = torch.cat([cast(Tensor, state.seen.final)[:, -1] for state in states])
        logits_BKV = self(base, final_BD)
        told = zip(states, logits_BKV, final_BD, strict=True)
        return [self._filled(state, logits_KV, final_D) for state, logits_KV, final_D in told]

    def _filled(self, state: State, logits_KV: Tensor, final_D: Tensor) -> Proposal:
        depth = 0

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal depth
            depth += 1
            nodes = len(level.expanded_A)
            return (logits_KV[depth].expand(nodes, -1), final_D.expand(nodes, -1)) if nodes else None

        return fill(state, logits_KV[0], final_D, deeper)
