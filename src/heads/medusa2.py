"""Medusa-2: Medusa's heads and a low-rank adapter of the base, trained together so that the base's own hidden state
says more about the tokens ahead.

Cai et al. 2024 (arXiv 2401.10774), section 2.2.2 and the recipe of the authors' training code. Stage 1 trains the heads
alone (medusa.py); stage 2 starts from them (`start_from` of the command) and adds the adapter:

    L = L_0 + heads_coefficient s(n) sum_k decay^k CE(p_k, x_{t+1+k}),   s(n) in [0, 1] over the run   (equation 3)
    L_0 = (1 - label_share) CE(p^base_t, p_t) + label_share CE(x_{t+1}, p_t)                            (section 2.3.2)

p^base is the same network with its adapter switched off: there is no second copy. p is the base with its adapter.
Output is lossless with respect to base *and adapter*, which is another model than the base alone.

Deviations. The lm_head has no adapter: heads, engine and servers read one matrix. The divergence of L_0 is divided by
the tokens that count, like every other term, not by all positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from draftsmith.contracts import BaseView, Batch, Capture, LossOut, Needs
from draftsmith.errors import ConfigError
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.losses import linear_cross_entropy, linear_soft_cross_entropy
from draftsmith.targets import lessons

SCHEDULES = ("constant", "linear", "sine")


@dataclass(frozen=True)
class Medusa2Config(MedusaConfig):
    heads_coefficient: float = 0.2  # of the heads' part of the loss
    schedule: str = "constant"  # s: constant | linear | sine, from 0 up to 1
    full_at: float = 1.0  # share of the run after which s is 1
    label_share: float = 0.0  # of the row's own tokens in L_0; the rest is self-distillation

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads_coefficient < 0:
            raise ConfigError(f"heads_coefficient={self.heads_coefficient}: give 0 or a positive number")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule='{self.schedule}': choose one of {', '.join(SCHEDULES)}")
        if not 0 < self.full_at <= 1 or not 0 <= self.label_share <= 1:
            raise ConfigError("full_at, label_share: shares lie between 0 and 1, full_at above 0")

    def coefficient(self, progress: float) -> float:
        """heads_coefficient * s after this share of the run."""
        done = min(1.0, progress / self.full_at)
        s = {"constant": 1.0, "linear": done, "sine": math.sin(math.pi / 2 * done)}[self.schedule]
        return self.heads_coefficient * s


class Medusa2(Medusa):
    Config = Medusa2Config
    adapts = True

    @property
    def needs(self) -> Needs:
        return Needs(final=True, adapter=True, original=self.config.label_share < 1)

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Medusa's metrics, and of the base with its adapter: loss/0, top1/0 (against the row's own token), and
        agreement/0 (sum of min(p, q) with the base without), floor."""
        heads = super().loss(base, seen, batch, measure=measure)
        taught = lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, [0], everywhere=not self.skip_masked)
        how: dict[str, Any] = {"measure": measure, "plain": self.plain_loss}
        own_ND = cast(Tensor, seen.final).flatten(0, 1)[taught.rows_N]
        weight_VD, bias_V, softcap = base.lm_head_weight, base.lm_head_bias, base.lm_head_softcap
        share = self.config.label_share
        counted_N = None if self.skip_masked else taught.counted_KN[0]
        n = taught.counted_KN.sum()
        total, metrics = heads.sum * self.config.coefficient(self.progress), dict(heads.metrics)
        first = total.new_zeros(())
        if share:
            labelled, best_N = linear_cross_entropy(
                own_ND, weight_VD, taught.gold_N, bias_V=bias_V, softcap=softcap, counted_N=counted_N, **how
            )
            first = first + share * labelled
        if share < 1:
            original_ND = cast(Tensor, seen.original).flatten(0, 1)[taught.rows_N]
            out = linear_soft_cross_entropy(
                own_ND[None],
                [weight_VD],
                lambda start, stop: (base.lm_head(original_ND[start:stop]), None),
                taught.counted_KN,
                biases=[bias_V],
                softcap=softcap,
                **how,
            )
            first = first + (1 - share) * out.sum
            best_N = out.best_KN[0]
            metrics["agreement/0"], metrics["floor"] = (out.overlaps_K[0], n), ((1 - share) * out.floors_K[0], n)
        metrics["loss/0"], metrics["top1/0"] = (first.detach(), n), ((best_N == taught.gold_N).sum(), n)
        return LossOut(total + first, heads.count, metrics if measure else {})
