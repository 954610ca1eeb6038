"""What the meters see of a real training step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.errors import ConfigError
from draftsmith.heads.medusa import Medusa
from draftsmith.training import timing
from draftsmith.training.timing import PARTS, PeakMeter, StepTimer

Train = Callable[..., Any]


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Slow(Medusa):
    """Works a while in its loss, and holds 64 MB meanwhile."""

    def loss(self, *args: Any, **how: Any) -> Any:
        held = torch.ones(16 * 2**20)
        busy(0.05)
        out = super().loss(*args, **how)
        assert held.sum() > 0
        return out


def test_the_parts_add_up_and_each_is_booked_where_it_belongs(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftsmith.base.lm import BaseLM

    plain = BaseLM.capture

    def capture(self: BaseLM, *args: Any, **how: Any) -> Any:
        busy(0.02)
        return plain(self, *args, **how)

    monkeypatch.setattr(BaseLM, "capture", capture)
    timer = StepTimer(warm=1)
    train(tmp_path, kind=Slow, steps=6, more=[timer], log_every=2)
    told = timer.result(2)
    assert told["steps"] == 4  # of six: the first is warm, the last has no next batch
    assert told["step_ms"] == pytest.approx(sum(told[f"{name}_ms"] for name in PARTS))
    assert told["heads_ms"] >= 50
    assert 20 <= told["base_ms"] < told["heads_ms"]
    assert 20 <= told["floor_ms"] < told["heads_ms"]
    assert told["step_ms"] < told["floor_ms"] + told["heads_ms"] + 40  # the floor itself is no part of a step
    assert told["optimizer_ms"] > 0


def test_timing_changes_nothing(train: Train, tmp_path: Path) -> None:
    alone = train(tmp_path / "a", steps=4)
    timed = train(tmp_path / "b", steps=4, more=[StepTimer(warm=1)])
    assert alone.weights == timed.weights


def test_the_peak_of_a_step_is_seen(train: Train, tmp_path: Path) -> None:
    large, small = PeakMeter(1), PeakMeter(1)
    train(tmp_path / "a", kind=Slow, steps=2, more=[large])
    train(tmp_path / "b", steps=2, more=[small])
    assert 60e6 < large.extra < 90e6
    assert small.extra < 20e6


def test_a_system_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, train: Train) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(timing.Path, "write_text", refuse)
    with pytest.raises(ConfigError, match="memory=false"):
        PeakMeter(0).on_train_batch_start(Nothing(), Nothing(), None, 0)  # type: ignore[arg-type]


class Nothing:
    device = torch.device("cpu")

    @property
    def optimizers(self) -> list[Any]:
        return [torch.optim.SGD([torch.zeros(1)])]
