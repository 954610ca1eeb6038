"""A small training that is left alone, or stopped behind a checkpoint, and what of it must be equal: for the tests of
runs that go on. Its fixtures are imported where they are wanted."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from draftsmith import artifacts, config, train
from draftsmith.errors import PeerError
from tests.integration.conftest import call

STEPS, EPOCH = 20, 8  # the micro base's 16 packs, two a step


def weights(run: Path) -> str:
    return artifacts.file_sha256(run / "heads/medusa/model.safetensors")


def losses(run: Path) -> list[tuple[int, str]]:
    """(step, loss as it is written, which is to the last bit)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], repr(line["train/medusa/loss"])) for line in lines]


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def trained(folder: Path, *overrides: str) -> str:
    code, output = call("train", *overrides, cwd=folder)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def command(training: list[str]) -> list[str]:
    return [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=4", "run_dir=run"]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """alone(*overrides): the run left alone, once."""

    @cache
    def run(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        trained(folder, *command, *overrides)
        return folder / "run"

    return run


class Dies(L.Callback):
    """An end without a checkpoint of its own, in the midst of a step."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, idx: int) -> None:
        if idx == 6:
            raise PeerError("dies")


@pytest.fixture(scope="module")
def stopped(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose last checkpoint is of step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    cfg = config.compose("train", command)
    with contextlib.chdir(folder), pytest.raises(PeerError):
        train.run(cfg, [Dies()])
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"
