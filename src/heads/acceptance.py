"""The acceptance head: will the base take what has been drafted so far, or is it time to ask?

Huang, Guo, Wang 2024, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths" (arXiv 2405.19715; code
Kaffaljidhmah2/SpecDec_pp 9c52edc). h_i is the drafter's hidden state after reading its own draft y_i (what its lm_head
reads), a_i the chance that the base accepts y_i once everything before it is accepted:

    s_i = softmax(W ResBlock_n( … ResBlock_1(h_i)) + b)_accept
    L   = sum_i  reject_weight (1 - a_i) (-log(1 - s_i)) + a_i (-log s_i)

While drafting, the chance that all of it is kept is prod_i s_i; drafting stops once 1 - prod_i s_i > threshold. A draft
is judged when the drafter has read it, so the newest one is not judged yet. With `reads: before` (ours) h_i is the
state that y_i was drafted from: it does not know what was drawn, but every draft is judged at once.

`verify` says how the drafts will be verified, hence what a_i is and where it comes from:

    sampling  beside a draft model, which draws y ~ q: rows that `draftsmith label` wrote, whose a_i is min(1, p(y_i) /
              q(y_i)), as published. Beside a head, which drafts its best token: a_i = p(y_i), on the fly
    greedy    y is the drafter's best token, and a_i says whether it is the base's best too: on the fly, beside either

On the fly, the drafter reads every y in a slot of its own below the row's own text, which is what it sees in decoding
as long as everything before was accepted.

Deviations. The blocks are distinct modules that start as the identity; the published code repeats one, random at the
start. The loss is divided by the number of labels, or of places to draft from where several depths have one each, not
by reject_weight sum(1 - a) + sum(a), so that no model's output is in a normaliser; which constant is best and how the
gradients of a step compare stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import BaseSpec, BaseView, Batch, Capture, Drafted, Head, LossOut, Needs
from draftsmith.errors import ConfigError, DataError
from draftsmith.growth import Level
from draftsmith.heads.blocks import ResBlock, as_head
from draftsmith.heads.draft_model import DraftModel
from draftsmith.losses import acceptance_loss, bernoulli_kl
from draftsmith.roles import Partial, State
from draftsmith.targets import counted_targets, future_tokens

JUDGED = 2**22  # of the base's logits held at a time


@dataclass(frozen=True)
class AcceptanceConfig:
    num_layers: int = 3
    reject_weight: float = 6.0
    verify: Literal["greedy", "sampling"] = "greedy"  # how the drafts will be verified
    reads: Literal["after", "before"] = "after"  # the drafter's state after reading a draft, or that it came from
    threshold: float = 0.5  # draftsmith tune chooses it for a machine
    min_depth: int = 1  # drafts that are made whatever the head says
    max_depth: int = 10  # and the most of them, where the drafter goes deeper
    hidden_size: int | None = None  # of what it reads; null: of the drafter beside it

    def __post_init__(self) -> None:
        for name in ("num_layers", "min_depth", "max_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        if self.reject_weight <= 0:
            raise ConfigError(f"reject_weight={self.reject_weight}: give a positive number")
        if self.verify not in ("greedy", "sampling"):
            raise ConfigError(f"verify='{self.verify}': choose greedy or sampling")
        if self.reads not in ("after", "before"):
            raise ConfigError(f"reads='{self.reads}': choose after or before")
        check_threshold(self.threshold)


def check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold={threshold}: a probability between 0 and 1 (stop when a refusal is likelier)")


class Acceptance(Head):
    Config = AcceptanceConfig
    role = "gate"
    wants = "drafter"

    def __init__(self, config: AcceptanceConfig, spec: BaseSpec) -> None:
        super().__init__(config, spec)
        size = config.hidden_size or spec.hidden_size
        self.blocks = nn.ModuleList(ResBlock(size) for _ in range(config.num_layers))
        self.out = nn.Linear(size, 2)  # refuse, accept

    @classmethod
    def completed(cls, config: AcceptanceConfig, spec: BaseSpec, beside: Any) -> AcceptanceConfig:
        if not isinstance(beside, DraftModel) and not hasattr(beside, "drafted"):
            what = "nothing" if beside is None else type(beside).__name__
            raise ConfigError(
                f"{what} stands beside it; give companion=… (a draft model) or drafter=… (the folder of a hydra,"
                " kangaroo or eagle3), whose drafts it judges"
            )
        size = beside.companion.spec.hidden_size if isinstance(beside, DraftModel) else spec.hidden_size
        return replace(config, hidden_size=size)

    @classmethod
    def reads_labels(cls, config: AcceptanceConfig, draft_model: bool) -> bool:
        return draft_model and config.verify == "sampling"

    @property
    def labelled(self) -> bool:
        """Whether it learns from rows with labels, or makes them on the fly."""
        return self.reads_labels(self.config, isinstance(self.beside, DraftModel))

    @property
    def needs(self) -> Needs:
        return Needs() if self.labelled or self.beside is None else self.beside.needs | Needs(final=True)

    @property
    def horizon(self) -> int:
        return 1 if self.labelled or self.beside is None else self.beside.horizon

    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        for block in self.blocks:
            cast(ResBlock, block).reset()

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """logits_N of acceptance: that of `accept` less that of `refuse`."""
        x_ND = hidden_ND if hidden_ND.dtype == self.out.weight.dtype else as_head(hidden_ND, self)
        for block in self.blocks:
            x_ND = block(x_ND)
        weight_2D, bias_2 = self.out.weight, self.out.bias
        return x_ND @ (weight_2D[1] - weight_2D[0]) + (bias_2[1] - bias_2[0])

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Metrics: kl of the true chance to the predicted one, accept (mean label), predicted (mean of s), floor
        (the least the loss can be)."""
        hidden_ND, accept_N, ahead = self._learned(base, seen, batch)
        count = batch.counts_K[ahead]
        logits_N = self(hidden_ND)
        accept_N = accept_N.to(logits_N.dtype)
        weight = self.config.reject_weight
        total = acceptance_loss(logits_N, accept_N, weight)
        if not measure:
            return LossOut(total, count, {})
        with torch.no_grad():
            n = count.new_tensor(len(accept_N))
            places = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead)[1].sum()
            best_N = torch.logit(accept_N / (accept_N + weight * (1 - accept_N)))  # +-inf for labels of 1 and 0
            soft_N = best_N.isfinite()
            metrics = {
                "kl": (bernoulli_kl(logits_N, accept_N), n),
                "accept": (accept_N.sum(), n),
                "predicted": (logits_N.sigmoid().sum(), n),
                "floor": (acceptance_loss(best_N[soft_N], accept_N[soft_N], weight), places),
            }
        return LossOut(total, count, metrics)

    @torch.no_grad()
    def _learned(self, base: BaseView, seen: Capture, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """(hidden_ND, accept_N, ahead: a global step has counts_K[ahead] places to learn at)."""
        if self.labelled:
            if batch.labels_BT is None:
                raise DataError("data: rows without labels; beside a draft model give what draftsmith label wrote")
            companion: BaseView = self.beside.companion
            where: dict[str, Any] = {"positions_BQ": batch.positions_BT, "mask_BQS": batch.visible()}
            with torch.autocast(batch.tokens_BT.device.type, enabled=False):  # as it is in decoding
                final_BTD = cast(Tensor, companion.capture(Needs(final=True), batch.tokens_BT, **where).final)
            ahead = 1 if self.config.reads == "before" else 0
            labels_BT, _ = future_tokens(batch.labels_BT, batch.documents_BT, ahead)
            _, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, ahead)
            at_BT = counted_BT & ~labels_BT.isnan()
            return final_BTD[at_BT], labels_BT[at_BT], ahead
        with torch.autocast(batch.tokens_BT.device.type, enabled=False):  # the drafter as it is in decoding
            drafted = self.beside.drafted(base, seen, batch)
        accept_N = self._verified(base, cast(Tensor, seen.final).flatten(0, 1), drafted)
        hidden_ND = drafted.before_MD if self.config.reads == "before" else drafted.hidden_MD
        return hidden_ND, accept_N, drafted.ahead

    def _verified(self, base: BaseView, final_PD: Tensor, drafted: Drafted) -> Tensor:
        """a_M of drafts that the drafter chose."""
        found = []
        rows = max(1, JUDGED // self.spec.vocab_size)
        for at_C, tokens_C in zip(drafted.at_M.split(rows), drafted.tokens_M.split(rows), strict=True):
            logits_CV = base.lm_head(final_PD[at_C])
            if self.config.verify == "greedy":
                found.append((logits_CV.argmax(-1) == tokens_C).float())
            else:
                found.append(-F.cross_entropy(logits_CV.float(), tokens_C, reduction="none"))
        accept_M = torch.cat(found) if found else final_PD.new_zeros(0)
        return accept_M if self.config.verify == "greedy" else accept_M.exp()

    @torch.no_grad()
    def chances(self, partial: Partial) -> list[Tensor]:
        """Per depth that can be judged, the chance that each node with children is kept if its parent is [A]."""
        return [self.chance(partial, depth) for depth in range(1, self.judged(partial) + 1)]

    def judged(self, partial: Partial) -> int:
        """The deepest level that can be judged."""
        return len(partial.levels) if self.config.reads == "before" else len(partial.hidden) - 1

    def chance(self, partial: Partial, depth: int) -> Tensor:
        if self.config.reads == "after":
            return self(partial.hidden[depth]).sigmoid()
        return of_parents(self(partial.hidden[depth - 1]).sigmoid(), partial.levels[depth - 1])

    def gate(self, threshold: float | None = None, min_depth: int | None = None) -> AcceptanceGate:
        """Itself at work; by default with what it was exported with."""
        config = self.config
        return AcceptanceGate(
            self,
            config.threshold if threshold is None else threshold,
            config.min_depth if min_depth is None else min_depth,
        )


@dataclass(frozen=True)
class AcceptanceGate:
    """roles.Gate: stops when the chance that something drafted is refused passes the threshold. In a tree, the chance
    of the likeliest path that may be gone on from counts."""

    head: Acceptance
    threshold: float
    min_depth: int = 1

    @torch.no_grad()
    def stop(self, state: State, partial: Partial) -> bool:
        """partial.notes: per level that was judged, the chance that each path so far is kept [A]."""
        for depth in range(len(partial.notes) + 1, self.head.judged(partial) + 1):
            level, kept_A = partial.levels[depth - 1], self.head.chance(partial, depth)
            partial.notes.append(kept_A * of_parents(partial.notes[-1], level) if depth > 1 else kept_A)
        judged = len(partial.notes)
        if len(partial.levels) < self.min_depth:
            return False
        if not judged:  # nothing has been read yet
            return self.threshold < 0
        kept_A = partial.notes[-1]
        if judged < len(partial.levels):
            kept_A = of_parents(kept_A, partial.levels[-1])
        return 1 - max(kept_A.tolist()) > self.threshold


def of_parents(values_A: Tensor, level: Level) -> Tensor:
    """Of those nodes of `level` that have children, their parents' values. (In a chain there is one of each, and the
    question is asked after every token.)"""
    alone = len(values_A) == len(level.of_C) == 1
    return values_A if alone else values_A[level.of_C[level.expanded_A]]
