"""What a training step costs and how much memory it takes, measured inside the real training loop."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from draftsmith.contracts import Batch, Needs
from draftsmith.errors import ConfigError
from draftsmith.training.clock import follow_base

PARTS = ("data", "base", "heads", "optimizer", "rest")


class StepTimer(L.Callback):
    """Before every micro-batch, the base's forward alone on that batch; then the step as it is: loader, Lightning, base
    forward, heads, loss, backward, clipping, optimiser, metrics. CPU seconds of this process on a CPU (wall time lies
    on a shared machine), wall seconds after synchronising on a GPU.

    warm: the first steps, not counted. alone: False leaves that forward out. floor, step: seconds per counted
    micro-batch, of the base's forward alone and of everything. parts: what the step consists of. base: the forward that
    serves the heads, if there is one; heads: their forward, loss and backward; optimizer: clipping and update; data:
    from the end of a step to the next batch; rest: logging, callbacks.
    """

    def __init__(self, warm: int, *, alone: bool = True) -> None:
        self.warm, self.alone = warm, alone
        self.floor: list[float] = []
        self.step: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._mark = 0.0
        self._gpu = False

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._gpu = module.device.type == "cuda"
        follow_base(module, self._lap, before="rest")
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._lap("optimizer"))
        self._mark = self._now()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        self._lap("data")
        if batch_idx > self.warm:
            self.step.append(sum(self._spent.values()))
            for name, seconds in self._spent.items():
                self.parts[name].append(seconds)
        self._spent = dict.fromkeys(PARTS, 0.0)
        if batch_idx >= self.warm:
            self.floor.append(self._forward(module, batch) if self.alone else math.nan)
        self._mark = self._now()

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        self._lap("heads")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, batch_idx: int) -> None:
        self._lap("rest")

    def _forward(self, module: Any, batch: Batch) -> float:
        began = self._now()
        with torch.no_grad(), torch.autocast(batch.tokens_BT.device.type, enabled=False):
            module.base.capture(
                Needs(final=True), batch.tokens_BT, positions_BQ=batch.positions_BT, documents_BQ=batch.documents_BT
            )
        return self._now() - began

    def _lap(self, part: str) -> None:
        """Books the time since the last lap on a part."""
        now = self._now()
        self._spent[part] += now - self._mark
        self._mark = now

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def result(self, log_every: int) -> dict[str, Any]:
        """Milliseconds of a micro-batch, means over whole logging windows: metrics cost only every n-th step."""
        n = len(self.step) - len(self.step) % log_every
        return {
            "steps": n,
            "step_ms": 1e3 * statistics.mean(self.step[:n]),
            "floor_ms": 1e3 * statistics.mean(self.floor[:n]),
            **{f"{name}_ms": 1e3 * statistics.mean(seconds[:n]) for name, seconds in self.parts.items()},
        }


class PeakMeter(L.Callback):
    """The memory of one step: how far the peak rises over what was held before it. On a CPU the resident set of this
    process (Linux tells its peak, and lets go of it when asked); on a GPU what torch has allocated there.

    warm: the step that is measured, so that optimiser state is there already. extra: bytes.
    """

    def __init__(self, warm: int) -> None:
        self.warm, self.extra, self._held = warm, 0, 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx != self.warm:
            return
        trainer.optimizers[0].zero_grad(set_to_none=True)
        gc.collect()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError as e:
                raise ConfigError(f"memory: this system does not tell the peak of a process ({e}); memory=false") from e
            self._held = _status("VmRSS")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == self.warm:
            cuda = module.device.type == "cuda"
            self.extra = (torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")) - self._held


def _status(name: str) -> int:
    """Bytes that Linux reports of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ConfigError(f"memory: /proc/self/status has no {name}; memory=false")
