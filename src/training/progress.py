"""How a training goes, for the one who watches it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from draftsmith.training.callbacks import step_done
from draftsmith.training.clock import Clock
from draftsmith.training.module import TrainModule

REDRAW = 0.2  # seconds between two pictures of the bar, at least


class Progress(L.Callback):
    """On a terminal a bar and a line per head; elsewhere a plain line at every tenth of the run. Colours only where
    NO_COLOR does not forbid them; nothing from any process but the first."""

    def __init__(self, clock: Clock, console: Console | None = None) -> None:
        self.clock = clock
        self.console = console or Console(stderr=True)
        self.live: Live | None = None
        self._drawn = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (trainer.is_global_zero and self.console.is_terminal and not self.console.is_dumb_terminal):
            return
        module = cast(TrainModule, pl_module)
        self.bar = Bar(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=module.steps, completed=module.start, told="")
        shared = sys.stdout.isatty()  # what goes to a file is left alone
        self.live = Live(self.bar, console=self.console, auto_refresh=False, redirect_stdout=shared)
        self.live.start()
        self.console.show_cursor(True)  # whoever is killed leaves it so

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        if not (trainer.is_global_zero and step_done(trainer, idx)):
            return
        step = module.done(idx)
        if module.validated:
            told = "  ".join(words(module, "validation", module.validated))
            print(f"step {step}/{module.steps}  validation: {told}", flush=True)
        if self.live is not None:
            self._draw(module, step)
        elif module.measured and step // (tenth := max(1, module.steps // 10)) > ((step - module.log_every) // tenth):
            passed = time.perf_counter() - self.clock.began
            left = passed / max(1, step - module.start) * (module.steps - step)
            told = "  ".join([*words(module, "train", module.measured), self.speed()])
            print(f"step {step}/{module.steps}  {told}  {left:.0f} s left", flush=True)

    def speed(self) -> str:
        return f"{self.clock.rate:,.0f} tok/s, {self.clock.share:.0%} of it the base"

    def _draw(self, module: TrainModule, step: int) -> None:
        assert self.live is not None
        told: dict[str, Any] = {"told": self.speed()} if module.measured else {}
        self.bar.update(self.task, completed=step, **told)
        if module.measured:
            self.live.update(Group(table(module), self.bar))
        if time.perf_counter() - self._drawn > REDRAW or step == module.steps:
            self.live.refresh()
            self._drawn = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.live is not None:
            self.live.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.live is not None:
            self.live.stop()


def figures(module: TrainModule, kind: str, measured: Mapping[str, float]) -> dict[str, tuple[str, str, str]]:
    """head -> (loss, top-1 by depth, estimated tokens per step), as text; the last two may be empty."""
    found = {}
    for name, _ in module.each_head():
        m = {k.removeprefix(f"{kind}/{name}/"): v for k, v in measured.items()}
        depths = sorted(int(k.removeprefix("top1/")) for k in m if k.startswith("top1/"))
        top1 = "/".join(f"{m[f'top1/{k}']:.2f}" for k in depths if k)
        found[name] = (f"{m['loss']:.3f}", top1, f"{m['tokens_per_step']:.2f}" if "tokens_per_step" in m else "")
    return found


def words(module: TrainModule, kind: str, measured: Mapping[str, float]) -> list[str]:
    parts = []
    for name, (loss, top1, tau) in figures(module, kind, measured).items():
        parts.append(f"{name} loss {loss}")
        parts += [f"top-1 {top1}"] if top1 else []
        parts += [f"tokens/step ~{tau}"] if tau else []
    return parts


def table(module: TrainModule) -> Table:
    """A line per head, of the step that was measured last."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("head", "loss", "top-1 by depth", "tokens/step ~"):
        made.add_column(column, justify="left" if column == "head" else "right")
    for name, cells in figures(module, "train", module.measured).items():
        made.add_row(f"[bold]{name}[/]", *cells)
    return made
