"""What happens at the edges of steps: metrics.jsonl, events.jsonl, checkpoints, signals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import lightning as L

from draftsmith import artifacts, signals
from draftsmith.errors import ResourceError
from draftsmith.training import checkpoint, processes, strategy
from draftsmith.training.clock import Clock
from draftsmith.training.module import TrainModule

ECHO = 3.0  # seconds in which a launcher may pass on a signal that a process has had from the terminal already


def step_done(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimiser step ended with this micro-batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Following(L.Callback):
    """Tells the watch how far this process has come."""

    def __init__(self, watch: processes.Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, idx: int) -> None:
        self.watch.at(module.done(idx - 1) + 1)

    def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Any) -> None:
        self.watch.at(self.watch.step)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        self.watch.at(self.watch.step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.watch.leaving = True  # a checkpoint may still be on its way to the disk


class Validation(L.Callback):
    """Measures the held-out rows every so many steps and at the end; `module.validated` holds the result until the
    next step. Stands before Metrics, which writes it down."""

    def __init__(self, every: int, clock: Clock) -> None:
        self.every, self.clock = every, clock

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        module.validated = {}
        step = module.done(idx)
        if step_done(trainer, idx) and (step % self.every == 0 or step == module.steps):
            with self.clock.within("validation"):
                module.validated = module.validate(cast(Any, trainer).datamodule.validation())


class Metrics(L.Callback):
    """metrics.jsonl: one object per measured step; on resume, lines past the checkpoint are cut off. tell: who else
    gets the line, once it is written."""

    def __init__(self, path: Path, clock: Clock, tell: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path, self.clock, self.tell = path, clock, tell

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            truncate(self.path, cast(TrainModule, pl_module).start)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        if not (trainer.is_global_zero and step_done(trainer, idx) and (module.measured or module.validated)):
            return
        step, peak = module.done(idx), trainer.optimizers[0].param_groups[0]["initial_lr"]
        lr = peak * module.settings.scheduler.factor(step - 1, module.steps)  # the group's lr is the next step's by now
        # JSON has no word for what is not finite: a step that was left out is told of in nonfinite.jsonl
        found = {k: v for k, v in {**module.measured, **module.validated}.items() if math.isfinite(v)}
        line = {"step": step, **found, "lr": lr, "tokens_per_second": self.clock.rate}
        line["base_forward_share"] = round(self.clock.share, 4)
        with artifacts.disk(self.path, "metrics"), open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.tell is not None:
            self.tell(line)


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of steps 1..step, and drops a last line that a kill tore."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # torn, or inside a character, or not an object of ours
            break
    whole = b"".join(line + b"\n" for line in kept)
    if whole == path.read_bytes():
        return
    artifacts.write_bytes(path, whole)


class Events(L.Callback):
    """events.jsonl: when a training began, from which step, and how it ended; a kill leaves no end. seconds: of the
    clock's parts."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self.clock = path, clock
        self._at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(TrainModule, pl_module)
        self._at = module.start
        if trainer.is_global_zero:
            self.write("started", module.start, of=module.steps, processes=trainer.world_size)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        self._at = module.done(idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            done = self._at == cast(TrainModule, pl_module).steps
            self.write("complete" if done else "stopped", self._at, seconds=self.clock.split())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero:
            try:
                self.write("failed", self._at, seconds=self.clock.split())
            except ResourceError as e:  # the run ends by `exception`; what the disk said is told beside it
                print(f"warning: {e}", flush=True)

    def write(self, event: str, step: int, **more: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "step": step, **more}
        with artifacts.disk(self.path, "events"), open(self.path, "ab+") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
            torn = f.read(1) not in (b"", b"\n")  # by a kill: it stays a line of its own
            f.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


class Checkpoints(L.Callback):
    """Saves every `every` steps, at the end, and when a signal asked to stop. A first signal finishes the
    step, saves and stops; a second one leaves at once, with the previous checkpoint intact.

    Every process takes part: the engine's tensors are gathered, and where the first one cannot write them all of them
    fail. It writes beside the training; the next save, and the end, wait for that. tracked: where a tracker of
    experiments keeps this run, which a resumed one goes on with.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        ties: Mapping[str, str],
        clock: Clock | None = None,
        tracked: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.folder, self.every, self.keep, self.ties = folder, every, keep, ties
        self.clock, self.tracked = clock or Clock(), tracked
        self.asked: int | None = None
        self.stopped_at: int | None = None
        self.writer = checkpoint.Writer()
        self._since = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals ask for a stop, from before the first step until the trainer is gone: Lightning answers one that it
        meets in its own code by exit 1. Once stopped, one of several processes leaves in peace: a launcher ends those
        that leave last by a signal."""
        with signals.handled(self._ask):
            yield
        if self.stopped_at is not None and processes.place().world > 1:
            for number in signals.SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self.clock.within("checkpoint"):
            processes.together(self.writer.finish)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        try:
            self.writer.finish()
        except Exception as e:  # the run ends by `exception`; what the disk said is told beside it
            print(f"warning: checkpoint not written: {e}", flush=True)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = number, now
        elif processes.place().world == 1 or now - self._since > ECHO:
            signals.leave()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        if not step_done(trainer, idx):
            return
        step = module.done(idx)
        stop = self.asked is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if step % self.every == 0 or step == module.steps or stop:
            with self.clock.within("checkpoint"):
                self._save(trainer, module, step)
        if stop and step < module.steps:
            self.stopped_at = step
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, module: TrainModule, step: int) -> None:
        processes.together(self.writer.finish)
        found = {name: strategy.tensors(trainer, part) for name, part in module.trained().items()}
        if trainer.is_global_zero:
            how: dict[str, Any] = {"keep": self.keep, "ties": self.ties, "tracked": self.tracked()}
            self.writer.start(lambda: checkpoint.save(self.folder, step, found, **how))
