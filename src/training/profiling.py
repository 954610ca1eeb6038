"""The last steps of a run under torch's profiler: where their time goes, by operation and on a time line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch import profiler

from draftsmith import artifacts

TABLE, TRACE = "profile.txt", "profile.json"
ROWS = 40  # of the table


class Profiling(L.Callback):
    """Profiles the last `count` steps of the first process and writes TABLE and TRACE into the run directory."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        left = module.steps - module.done(batch_idx - 1)
        if self._profiler is None and trainer.is_global_zero and left <= self.count:
            self._profiler = profiler.profile(profile_memory=True)
            self._profiler.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        where = "self_cuda_time_total" if pl_module.device.type == "cuda" else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=where, row_limit=ROWS)
        with artifacts.disk(self.folder, "a profile"):
            (self.folder / TABLE).write_text(table + "\n")
            self._profiler.export_chrome_trace(str(self.folder / TRACE))
        print(f"profile of {self.count} steps -> {self.folder / TABLE}, {self.folder / TRACE}", flush=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._profiler is not None:
            self._profiler.stop()


def profiled(folder: Path, count: int | None) -> list[L.Callback]:
    """The profiler of so many steps; none where None are asked for."""
    return [] if count is None else [Profiling(folder, count)]
