"""`draftsmith train` that dies as by kill -9 at an exact moment. STRIKE=<micro-batches>:<checkpoint>: so many after its
start, once that checkpoint is complete. Run as a module, with the command line of the verb."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L

from draftsmith import config, train


class Strike(L.Callback):
    def __init__(self, after: int, seal: Path) -> None:
        self.after, self.seal = after, seal

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        if idx + 1 == self.after:
            until = time.monotonic() + 60
            while not self.seal.exists() and time.monotonic() < until:
                time.sleep(0.001)
            os.killpg(0, signal.SIGKILL)  # its workers too, which would outlive it for seconds


def run(cfg: Any) -> Any:
    after, _, step = os.environ["STRIKE"].partition(":")
    return train.run(cfg, [Strike(int(after), Path(cfg.run_dir, f"checkpoints/step-{int(step):08d}/COMPLETE.json"))])


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in a fresh process; not as it was started
    config.command("train", run)
