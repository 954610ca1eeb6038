"""Steps whose loss or gradient is no finite number: what was seen is kept, and the step is left out or ends the run.

nonfinite.jsonl in the run's folder has a line per such step: the heads with loss and gradient norm, and the ids of the
global step's rows, which say where to look. Weights and moments stay those of the step before in either case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from draftsmith import artifacts
from draftsmith.errors import Diverged
from draftsmith.training import processes

FILE = "nonfinite.jsonl"
NAMED = 5  # rows that the message names; the file has them all


class Nonfinite:
    """most: steps of the whole run that may be left out; the next one ends it. left_out: those before it began."""

    def __init__(self, run_dir: Path, most: int, left_out: int = 0) -> None:
        self.path, self.most, self.left_out = run_dir / FILE, most, left_out

    def found(self, step: int, seen: Mapping[str, Mapping[str, float]], rows: Sequence[str]) -> None:
        """Step number `step`, counted from 1. seen: head -> its `loss` and its gradient's `norm`. Diverged where no
        more steps may be left out. Every process of a run calls it, the first one writes."""
        self.left_out += 1
        told = {
            "step": step,
            "heads": {head: {k: _plain(v) for k, v in values.items()} for head, values in seen.items()},
            "rows": list(rows),
        }
        if processes.is_first():
            with artifacts.disk(self.path, "what was not finite"), open(self.path, "a") as f:
                f.write(json.dumps(told) + "\n")
        said = "; ".join(
            f"{head}: {', '.join(f'{what} {value}' for what, value in values.items())}" for head, values in seen.items()
        )
        few = f"{', '.join(rows[:NAMED])}{', …' if len(rows) > NAMED else ''}"
        where = f"{said} in step {step} (rows {few}; all in {self.path})"
        if self.left_out > self.most:
            allowed = f" after {self.most} that were left out" if self.most else ""
            raise Diverged(
                f"{where}{allowed}; weights are untouched and the last checkpoint is good; lower optimizer.lr, look at"
                " those rows, or let trainer.skip_nonfinite=N steps be left out"
            )
        if processes.is_first():
            print(f"warning: {where}: left out, {self.left_out} of at most {self.most}", flush=True)


def _plain(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
