"""Seconds by part, told by a clock whose hands the test moves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.training import clock as clocks
from draftsmith.training.clock import Clock


class Hands:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr(clocks.time, "perf_counter", made)
    return made


def steps(hands: Hands, device: str, measured: list[bool]) -> tuple[Clock, Any]:
    """Each step: 1 s for the batch, 4 of the base, 3 of the heads; every second one validates for 10."""

    def seen(batch: Any) -> str:
        hands.now += 4
        return "capture"

    module: Any = SimpleNamespace(
        seen=seen,
        device=torch.device(device),
        measured={},
        done=lambda idx: idx + 1,
        measures=lambda step: measured[step],
    )
    trainer: Any = SimpleNamespace(world_size=2)
    batch: Any = SimpleNamespace(documents_BT=torch.tensor([[0, 0, -1]]))
    clock = Clock()
    clock.on_train_start(trainer, module)
    for idx, counts in enumerate(measured):
        hands.now += 1
        clock.on_train_batch_start(trainer, module, batch, idx)
        assert module.seen(batch) == "capture"
        hands.now += 3
        module.measured = {"a": 1.0} if counts else {}
        clock.on_train_batch_end(trainer, module, None, batch, idx)
        if idx % 2:
            with clock.within("validation"):
                module.seen(batch)  # its own forwards are validation
                hands.now += 6
    return clock, module


def test_parts_rate_and_share(hands: Hands) -> None:
    clock, _ = steps(hands, "cpu", [False, True, False, True])
    assert clock.split() == {"data": 4.0, "base": 16.0, "heads": 12.0, "validation": 20.0, "checkpoint": 0.0}
    assert sum(clock.split().values()) == hands.now - clock.began
    assert clock.share == 0.5
    assert clock.tokens == 4 * 2 * 2  # two tokens in a pack, two processes
    assert clock.rate == pytest.approx(8 / (16 + 10))  # since the step that was measured before, with its validation


def test_a_gpu_is_waited_for_in_measured_steps_alone(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    clock, _ = steps(hands, "cuda", [False, True, False, False])
    assert len(waits) == 4 + 4  # data, before the base, base, heads; and as many of its validation
    # two validations; the parts of the one measured step stand for all four
    assert clock.split() == {"data": 4.0, "base": 16.0, "heads": 12.0, "validation": 20.0, "checkpoint": 0.0}
    assert clock.share == 0.5
