"""Which engine trains, and what it does to a loss."""

from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.training import strategy
from draftsmith.training.settings import StrategyConfig, TrainerConfig


@pytest.mark.parametrize(
    ("name", "devices", "nodes", "want"),
    [
        ("auto", 1, 1, "auto"),
        ("single", 1, 1, "auto"),
        ("ddp", 1, 1, "ddp"),
        ("auto", 2, 1, "ddp"),
        ("auto", 1, 2, "ddp"),
    ],
)
def test_arguments(name: str, devices: int, nodes: int, want: str) -> None:
    trainer = TrainerConfig(max_steps=1, devices=devices, num_nodes=nodes, accumulate=3, precision="bf16")
    assert strategy.arguments(StrategyConfig(name), trainer) == {
        "accelerator": "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "precision": "bf16-mixed",
        "strategy": want,
        "accumulate_grad_batches": 3,
    }


def test_fp32_is_fp32() -> None:
    assert strategy.arguments(StrategyConfig(), TrainerConfig(max_steps=1))["precision"] == "32-true"


def test_undo() -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=3, world_size=4)
    assert strategy.undo(trainer) == 12


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
    ],
)
def test_the_first_process(ranks: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert strategy.is_first_process() == first
