"""`draftsmith train`, with what every step was given noted in served.jsonl beside the run: for each micro-batch the
documents it holds, as hashes of their token ids. Run as a module, with the command line of the verb."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L

from draftsmith import config, train


class Served(L.Callback):
    """A line per micro-batch, before it is learned: step (from 1) and documents."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, idx: int) -> None:
        step = pl_module.start + idx // trainer.accumulate_grad_batches + 1
        found = []
        for tokens, documents in zip(batch.tokens_BT, batch.documents_BT, strict=True):
            for number in documents[documents >= 0].unique().tolist():
                ids = tokens[documents == number].tolist()
                found.append(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16])
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, "documents": found}) + "\n")


def run(cfg: Any) -> Any:
    return train.run(cfg, [Served(Path("served.jsonl"))])


if __name__ == "__main__":
    config.command("train", run)
