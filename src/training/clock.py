"""Where the seconds of a training go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch

from draftsmith.contracts import Batch

STEP = ("data", "base", "heads")  # what a step consists of; the rest stands between steps
PARTS = (*STEP, "validation", "checkpoint")


def follow_base(module: Any, lap: Callable[[str], None], *, before: str) -> None:
    """From now on lap(before) is called when a forward of the base begins, lap("base") when it has ended."""
    inner = module.seen

    def seen(batch: Batch) -> Any:
        lap(before)
        found = inner(batch)
        lap("base")
        return found

    module.seen = seen


class Clock(L.Callback):
    """Tokens (packed positions that hold one) and seconds since the run (re)started. Stands first among the callbacks.

    rate: tokens per second since the last measured step; share: of the base's forward in the seconds of steps since
    then. heads: their forward, losses and backward, clipping and update; data: from the end of a step to the next
    batch. A GPU is asked to finish its work in measured steps only, so there the parts of a step are those of measured
    ones, made as long as all steps together.
    """

    def __init__(self) -> None:
        self.tokens, self.began, self.rate, self.share = 0, 0.0, 0.0, 0.0
        self._since = (0, 0.0, 0.0, 0.0)  # tokens, time, seconds of the base and of steps when last measured
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._wall = self._mark = 0.0
        self._gpu, self._counts, self._within = False, True, ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gpu = pl_module.device.type == "cuda"
        follow_base(pl_module, self.lap, before="heads")
        self.began = self._mark = time.perf_counter()
        self._since = (0, self.began, 0.0, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, idx: int) -> None:
        self._counts = not self._gpu or module.measures(module.done(idx - 1))
        self.lap("data")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Batch, idx: int) -> None:
        self.lap("heads")
        self.tokens += int((batch.documents_BT >= 0).sum()) * trainer.world_size
        if module.measured:
            now = (self.tokens, time.perf_counter(), self._seconds["base"], sum(self._seconds[p] for p in STEP))
            tokens, seconds, base, steps = (new - old for new, old in zip(now, self._since, strict=True))
            self.rate, self.share = tokens / max(1e-9, seconds), base / max(1e-9, steps)
            self._since = now

    def lap(self, part: str) -> None:
        """What passed since the last lap belongs to `part`."""
        if self._gpu and self._counts:
            torch.cuda.synchronize()
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        part = self._within or part
        self._wall += passed
        if self._counts or part not in STEP:
            self._seconds[part] += passed

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """All that is done inside is `part`."""
        self.lap("data")
        self._within = part
        try:
            yield
        finally:
            self.lap(part)
            self._within = ""

    def split(self) -> dict[str, float]:
        """Seconds by part; together all that passed since the start."""
        steps = sum(self._seconds[p] for p in STEP)
        between = sum(s for p, s in self._seconds.items() if p not in STEP)
        longer = (self._wall - between) / steps if steps else 1.0
        return {p: round(s * longer if p in STEP else s, 3) for p, s in self._seconds.items()}
