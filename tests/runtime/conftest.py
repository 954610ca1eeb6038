"""A base of four blocks and heads of every kind on it, trained here; the texts they are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith import config, load_base
from draftsmith import export as export_verb
from draftsmith.base.lm import BaseLM
from draftsmith.data import synthetic

from .replay import Base

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TRAINED = [
    "experiment=quickstart",
    *(f"base.recipe.model.{k}={v}" for k, v in SHAPE.items()),
    "base.recipe.vocab_size=512",
    "base.recipe.training.steps=200",
]
HEADS = [
    "head=[medusa,hydra,clover,kangaroo,eagle3]",
    "heads.medusa.num_heads=4",
    "+head@heads.shared=medusa",
    "heads.shared.share_lm_head=true",
    "heads.shared.num_layers=2",
    "heads.clover.num_heads=4",
    "heads.eagle3.depth=4",
    "trainer.max_steps=160",
]
GATE = ["head=[acceptance]", "trainer.max_steps=100"]
PROMPTS = 8


def draftsmith(verb: str, *overrides: str, cwd: Path) -> str:
    """A verb in a process of its own; what it printed. AssertionError with that where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"draftsmith.{verb}", *overrides], cwd=cwd, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several heads on one base. DRAFTSMITH_RUN names one that is there already."""
    if "DRAFTSMITH_RUN" in os.environ:
        return Path(os.environ["DRAFTSMITH_RUN"])
    folder = tmp_path_factory.mktemp("trained")
    draftsmith("train", *TRAINED, *HEADS, "run_dir=run", cwd=folder)
    draftsmith("train", *TRAINED, *GATE, "drafter=run/heads/hydra", "run_dir=gate", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="session")
def ours(trained: Path) -> BaseLM:
    described = json.loads((trained / "heads" / "hydra" / "config.json").read_text())
    return load_base(described["base"]["path"])


@pytest.fixture(scope="session")
def plain(ours: BaseLM) -> Base:
    return Base(Path(ours.spec.path))


@pytest.fixture(scope="session")
def prompts(ours: BaseLM) -> list[list[int]]:
    def rendered(messages: Any) -> list[int]:
        return ours.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    return [rendered(messages) for messages in synthetic.prompts(PROMPTS, seed=4321)]


Export = Callable[..., Path]


@pytest.fixture(scope="session")
def export(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`draftsmith export` of one head of the run: the folder."""

    def made(head: str, exporter: str, *more: str) -> Path:
        out = tmp_path_factory.mktemp(exporter) / "out"
        run = trained.parent / "gate" if head == "acceptance" else trained
        base = json.loads((run / "heads" / head / "config.json").read_text())["base"]["path"]
        given = [f"load=[{run / 'heads' / head}]", "base=hf", f"base.path={base}", f"exporter={exporter}", f"out={out}"]
        return export_verb.run(config.compose("export", [*given, *more]))[0]

    return made
