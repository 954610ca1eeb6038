"""Writes tests/faults/golden/<version>/: what this version leaves on disk, small enough to be kept for ever.

    python tests/faults/golden/make.py

A version's folder is written once, when it is released, and never again: test_golden.py reads all of them. In it lie
base/, rows/, store/ and labels/; killed/, a run that died between two checkpoints; finished/, the same run to its end;
export/, its head; and command.json, what both runs were started with. Paths are relative to the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L

from draftsmith import config
from draftsmith.base import create, lm
from draftsmith.data import synthetic
from draftsmith.data.rows import Row, write_rows
from draftsmith.errors import PeerError

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
BASE = ["base=hf", "base.path=base"]
COMMAND = [
    *BASE,
    "head=[medusa]",
    "heads.medusa.num_heads=1",
    "data=jsonl",
    "data.path=rows",
    "data.length=48",
    "data.batch_size=2",
    "trainer.threads=1",
    "trainer.epochs=null",
    "trainer.max_steps=8",
    "trainer.checkpoint_every=3",
    "trainer.keep=1",
    "trainer.log_every=1",
]
HOME = Path(tempfile.gettempdir(), "draftsmith-golden")  # the base's full path is told by what was made of it
NOT_KEPT = ("report.html", "report.md", ".lock", ".seal.lock")


class Dies(L.Callback):
    """The process is gone in the midst of step 6, after the checkpoint of step 3."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, idx: int) -> None:
        if idx == 5:
            raise PeerError("dies")


def verb(name: str, *overrides: str, **more: Any) -> None:
    sys.argv = ["draftsmith", name, *overrides]  # provenance.json tells it
    import_module(f"draftsmith.{name}").run(config.compose(name, overrides), **more)


def make() -> None:
    """All of it, in the current folder."""
    chats = list(synthetic.dialogues(30, seed=5))
    tokenizer = synthetic.train_tokenizer(chats, 300)
    Path("base").mkdir()
    create.save(create.llama(SHAPE, tokenizer, 0), tokenizer, Path("base"))
    drawn = random.Random(0)
    rows = [
        Row(f"r{n}", [drawn.randrange(10, 290) for _ in range(k)], [0] * 6 + [1] * (k - 6), f"rows:{n}", asked=f"q{n}")
        for n, k in enumerate(drawn.randrange(30, 41) for _ in range(10))
    ]
    write_rows(Path("rows"), rows, base=dataclasses.asdict(lm.load("base").spec))
    verb("capture", *BASE, "head=[medusa]", "rows=rows", "out=store", "store.dtype=fp32")
    verb("label", *BASE, "companion=hf", "companion.path=base", "rows=rows", "out=labels")
    with contextlib.suppress(PeerError):
        verb("train", *COMMAND, "run_dir=killed", more=[Dies()])
    verb("train", *COMMAND, "run_dir=finished")
    verb("export", "run_dir=finished", "exporter=native", "out=export")
    Path("command.json").write_text(json.dumps(COMMAND, indent=2) + "\n")
    for path in [p for name in NOT_KEPT for p in Path().rglob(name)]:
        path.unlink()
    shutil.rmtree("finished/checkpoints")  # killed/ has one


def main() -> None:
    project = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())["project"]
    target = HERE / project["version"]
    if target.exists():
        sys.exit(f"{target} is there: what a version wrote stays as it was")
    HOME.mkdir()
    try:
        os.environ["DRAFTSMITH_CACHE"] = str(HOME / "cache")
        with contextlib.chdir(HOME):
            make()
        shutil.copytree(HOME, target, ignore=shutil.ignore_patterns("cache"))
    finally:
        shutil.rmtree(HOME)


if __name__ == "__main__":
    main()
