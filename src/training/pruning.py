"""Tells somebody how a run is doing, and stops it when they have seen enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from draftsmith.training.callbacks import step_done


class Pruned(Exception):
    """Whoever was told of the run wants no more of it. What it saved is whole: the same command goes on from there."""

    def __init__(self, step: int, steps: int, value: float) -> None:
        super().__init__(f"{value:.3f} after step {step} of {steps}")
        self.step = step


def estimates(metrics: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line of metrics.jsonl that has this key."""
    if not metrics.exists():
        return []
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line[key]) for line in found if key in line]


class Telling(L.Callback):
    """Tells every value of one metric to `told(step, value) -> whether to stop`, and raises Pruned when it says so;
    never after the last step. A run that goes on tells first what it measured before, as metrics.jsonl has it: who
    judges then knows the same as if it had never stopped."""

    def __init__(self, metrics: Path, key: str, told: Callable[[int, float], bool]) -> None:
        self.metrics, self.key, self.told = metrics, key, told

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        for step, value in estimates(self.metrics, self.key):
            self._tell(step, value, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        now = {**module.measured, **module.validated}
        if step_done(trainer, idx) and self.key in now:
            self._tell(module.done(idx), now[self.key], module)

    def _tell(self, step: int, value: float, module: Any) -> None:
        if self.told(step, value) and step < module.steps:
            raise Pruned(step, module.steps, value)
