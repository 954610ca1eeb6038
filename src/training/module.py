"""One LightningModule for every head: one base forward, each head's loss, one optimiser.

The base is held outside `parameters()`: no optimiser, checkpoint or gradient hook ever sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from draftsmith.artifacts import fingerprint
from draftsmith.contracts import BaseView, Batch, Capture, Head, LossOut, Needs
from draftsmith.errors import DataError
from draftsmith.training import checkpoint, processes, strategy
from draftsmith.training.nonfinite import Nonfinite
from draftsmith.training.settings import Settings


@contextlib.contextmanager
def rekeyed(*key: Any) -> Iterator[None]:
    """Randomness inside depends on the key alone, and leaves the outer generators as they were."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(int(fingerprint(list(key))[:15], 16))
        yield


def captured(base: BaseView, needs: Needs, batch: Batch) -> Capture:
    """What the heads need of the base: as a store kept it, and one forward for the rest, if there is any."""
    kept = batch.seen or Capture()
    missing = needs.beyond(kept)
    if batch.seen is not None and missing == Needs():
        return kept
    return kept | base.capture(
        missing, batch.tokens_BT, positions_BQ=batch.positions_BT, documents_BQ=batch.documents_BT
    )


class TrainModule(L.LightningModule):
    """Trains `heads` for optimiser steps start..steps-1.

    validated: the same of the rows that are only measured, after a step that measured them.
    measured: the metrics of the step that just ended, when it was one to measure (every `log_every` steps and
    the last): name -> float, equal on every process. grad_norms: head -> norm before clipping.
    """

    def __init__(
        self,
        base: BaseView,
        heads: Mapping[str, Head],
        *,
        settings: Settings,
        steps: int,
        seed: int,
        nonfinite: Nonfinite,
        resume: checkpoint.Checkpoint | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.heads = nn.ModuleDict(heads)
        for head in heads.values():
            head.plain_loss, head.skip_masked = settings.loss.impl == "plain", settings.loss.skip_masked
        self.settings, self.optimizer = settings, settings.optimizer
        self.steps, self.seed, self.resume = steps, seed, resume
        self.log_every = settings.trainer.log_every
        self.nonfinite = nonfinite
        self._losses: dict[str, Tensor] = {}
        self.start = resume.step if resume else 0
        self.measured: dict[str, float] = {}
        self.validated: dict[str, float] = {}
        self.shape: tuple[int, ...] = (0, 0)  # of the batch at hand
        adapter = base.adapter  # trained too where there is a new one; one that was loaded stays as it is
        self.adapter = adapter if adapter and any(p.requires_grad for p in adapter.parameters()) else None
        self._sums: dict[str, Tensor] = {}
        self._moments: dict[nn.Parameter, dict[str, Tensor]] = {}

    def trained(self) -> dict[str, nn.Module]:
        """Everything with an optimiser group, a norm and a place in the checkpoint: the heads, and the base's adapter
        under the name `base`."""
        return {**dict(self.each_head()), **({} if self.adapter is None else {"base": self.adapter})}

    def on_train_start(self) -> None:
        """The engine is made now, and with it the place where the moments go."""
        if self.resume:
            if strategy.is_zero(self.trainer) and len(set(self.resume.updates.values())) > 1:
                told = ", ".join(f"{name} {n}" for name, n in self.resume.updates.items())
                raise DataError(
                    f"checkpoint of step {self.start}: its heads were updated unequally often ({told}), which DeepSpeed"
                    " cannot go on from; use strategy=ddp"
                )
            by_updates: dict[int, dict[nn.Parameter, dict[str, Tensor]]] = {}
            for name, part in self.trained().items():  # equally many, but where a part's step was not finite
                own = {p: self._moments[p] for p in part.parameters() if p in self._moments}
                by_updates.setdefault(self.resume.updates[name], {}).update(own)
            for updates, found in by_updates.items():
                strategy.put_moments(self.trainer, found, updates)
            self._moments = {}

    def on_train_end(self) -> None:
        strategy.release(self.trainer, self.trained().values())  # before Lightning moves them from their device

    def on_fit_start(self) -> None:
        self.base.to(self.device)  # Lightning moves the heads; the base is not among the module's children
        self.train()  # it would leave a part that came in eval mode without its dropout

    def each_head(self) -> Iterator[tuple[str, Head]]:
        return ((name, cast(Head, head)) for name, head in self.heads.items())

    def done(self, batch_idx: int) -> int:
        """Optimiser steps complete once this micro-batch is."""
        return self.start + (batch_idx + 1) // self.trainer.accumulate_grad_batches

    def measures(self, step: int) -> bool:
        """Whether step number `step` (0-based) is one to measure."""
        return (step + 1) % self.log_every == 0 or step + 1 == self.steps

    def whereabouts(self) -> str:
        return f"step {self.start + self.trainer.global_step + 1}"

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.shape = batch.tokens_BT.shape
        step, part = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        step += self.start
        measure = self.measures(step)
        if part == 0:
            self._sums, self._losses = {}, {}
            if not strategy.is_zero(self.trainer):
                self.zero_grad(set_to_none=True)  # a fused loss forms new ones in its forward: not beside the old ones
        losses = []
        bf16 = self.settings.trainer.precision == "bf16"  # Lightning does it too, but not under DeepSpeed
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)
        with rekeyed(self.seed, step, part, self.global_rank, "base"):
            seen = self.seen(batch)
        for name, head in self.each_head():
            head.progress = step / self.steps
            with rekeyed(self.seed, step, part, self.global_rank, name), autocast:
                out = head.loss(self.base, seen, batch, measure=measure)
            loss = out.sum / out.count.clamp(min=1)
            self._losses[name] = self._losses.get(name, 0) + loss.detach()
            # A loss that is not finite makes its gradients so, on every process, whatever its own derivative says.
            losses.append(loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")))
            if measure:
                self._add_all(f"train/{name}", loss.detach(), out)
        last = part + 1 == self.trainer.accumulate_grad_batches
        self.measured = self._reduced() if measure and last else {}
        return torch.stack(losses).sum() * strategy.undo(self.trainer)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The metrics of rows that are never learned, the heads as they decode; equal on every process."""
        self._sums = {}
        self.eval()
        with strategy.whole(self.trainer, self.trained().values()):
            for part, batch in enumerate(batches):
                self.shape = batch.tokens_BT.shape
                batch = batch.to(self.device)
                seen = self.seen(batch)
                for name, head in self.each_head():
                    with rekeyed(self.seed, "validation", part, self.global_rank, name):
                        out = head.loss(self.base, seen, batch, measure=True)
                    self._add_all(f"validation/{name}", out.sum / out.count.clamp(min=1), out)
        self.train()
        return self._reduced() if self._sums else {}

    def seen(self, batch: Batch) -> Capture:
        """One base forward for all heads, computed as it will be in decoding."""
        needs = reduce(or_, (head.needs for _, head in self.each_head()), Needs())
        with torch.autocast(self.device.type, enabled=False):
            return captured(self.base, needs, batch)

    def _add_all(self, prefix: str, loss: Tensor, out: LossOut) -> None:
        self._add(f"{prefix}/loss", loss, None)
        for metric, (value, weight) in out.metrics.items():
            self._add(f"{prefix}/{metric}", value, weight)

    def _add(self, metric: str, value: Tensor, weight: Tensor | None) -> None:
        """Numerator and denominator of a metric; without a weight the value adds up by itself."""
        pair = torch.stack([value.double(), torch.zeros_like(value).double() if weight is None else weight.double()])
        self._sums[metric] = self._sums[metric] + pair if metric in self._sums else pair

    def _reduced(self) -> dict[str, float]:
        """The sums of the whole global step, over its micro-batches and processes."""
        table = torch.stack(list(self._sums.values()))
        if self.trainer.world_size > 1:
            table = cast(Tensor, self.trainer.strategy.reduce(table, reduce_op="sum"))
        pairs = zip(self._sums, table.tolist(), strict=True)
        return {metric: value / weight if weight else value for metric, (value, weight) in pairs}

    def configure_optimizers(self) -> Any:
        groups = [
            {
                "name": name,
                "params": list(part.parameters()),
                "lr": self.optimizer.of(name, "lr"),
                "weight_decay": self.optimizer.of(name, "weight_decay"),
            }
            for name, part in self.trained().items()
        ]
        made: Any = self.settings.optimizer_class
        optimizer = made(
            groups,
            lr=self.optimizer.lr,
            betas=tuple(self.optimizer.betas),
            eps=self.optimizer.eps,
            fused=True,
        )
        if self.resume:
            self._moments = checkpoint.restore(self.resume, self.trained(), processes.spread)
            self.resume.tensors.clear()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: self.settings.scheduler.factor(self.start + s, self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Each head by its own norm, so that training beside others changes nothing, or all by one (clip_scope)."""
        if strategy.is_zero(self.trainer):  # it clips by itself
            return
        groups = {g["name"]: (g["params"], self.optimizer.of(g["name"], "clip")) for g in optimizer.param_groups}
        if self.optimizer.clip_scope == "global":
            groups = {", ".join(groups): ([p for own, _ in groups.values() for p in own], self.optimizer.clip)}
        bad: dict[str, dict[str, float]] = {}
        for name, (parameters, clip) in groups.items():
            norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
            if not bool(norm.isfinite()):
                bad[name] = {"gradient norm": float(norm)}
                for p in parameters:
                    p.grad = None  # which the optimiser passes over: no update, no decay, no new moments
        if bad:
            self.not_finite(bad)

    def _whole_losses(self) -> list[float]:
        """Each head's loss of the global step; every process knows its own share."""
        shares = torch.stack(list(self._losses.values()))
        if self.trainer.world_size > 1:
            shares = cast(Tensor, self.trainer.strategy.reduce(shares, reduce_op="sum"))
        return shares.tolist()

    def not_finite(self, bad: dict[str, dict[str, float]]) -> None:
        """The step at hand has gradients that are not: bad is group -> its norm, where a group is a head or, with one
        norm for all, everything."""
        named = bad.keys() & self._losses.keys()
        for name, loss in zip(self._losses, self._whole_losses(), strict=True):
            if name in named or not named:
                bad.setdefault(name, {})["loss"] = float(loss)
        step = self.start + self.trainer.global_step
        self.nonfinite.found(step + 1, bad, cast(Any, self.trainer).datamodule.ids_of(step))
