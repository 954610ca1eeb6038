"""What a training step costs beside the base's forward, measured inside the real training loop."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning as L
import torch

from draftsmith.contracts import Batch, Needs


class StepTimer(L.Callback):
    """Before every micro-batch, the base's forward alone on that batch; then the step as it is: loader,
    Lightning, base forward, heads, loss, backward, clipping, optimiser, metrics. CPU seconds of this process
    on a CPU (wall time lies on a shared machine), wall seconds after synchronising on a GPU.

    warm: the first steps, not counted. forward and step: seconds per counted micro-batch.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.forward: list[float] = []
        self.step: list[float] = []
        self._since: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        now = _now(batch)
        if self._since is not None and batch_idx > self.warm:
            self.step.append(now - self._since)
        needs = Needs(final=True)
        with torch.no_grad(), torch.autocast(batch.tokens_BT.device.type, enabled=False):
            module.base.capture(needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        self._since = _now(batch)
        if batch_idx >= self.warm:
            self.forward.append(self._since - now)

    def result(self, log_every: int) -> dict[str, Any]:
        """Times of a micro-batch. Ratios: of medians, and of sums over whole logging windows (metrics cost only
        every n-th step)."""
        n = len(self.step) - len(self.step) % log_every
        step, forward = self.step[:n], self.forward[:n]
        return {
            "steps": n,
            "base_forward_ms": 1e3 * statistics.median(forward),
            "step_ms": 1e3 * statistics.median(step),
            "mean_step_ms": 1e3 * statistics.mean(step),
            "ratio_of_medians": statistics.median(step) / statistics.median(forward),
            "ratio_of_sums": sum(step) / sum(forward),
            "log_every": log_every,
        }


def _now(batch: Batch) -> float:
    if batch.tokens_BT.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
