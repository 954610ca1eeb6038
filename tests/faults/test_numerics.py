"""A loss or a gradient that is not finite: the step is left out, or ends the run by code 4; weights and moments stay
those of the step before, the rows are named, and the last checkpoint is good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from draftsmith import artifacts, config, train
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.heads.medusa import Medusa
from draftsmith.training import checkpoint
from tests.integration.conftest import micro, training  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults

STEPS = 8


class Poison(L.Callback):
    """Puts a value into one head's gradient in these steps, counted from 1; sees the weights finite in every step."""

    def __init__(self, steps: Sequence[int], value: float, head: str = "medusa") -> None:
        self.steps, self.value, self.head = steps, value, head

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.start + trainer.global_step + 1 in self.steps:
            next(pl_module.heads[self.head].parameters()).grad[0] = self.value

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, out: Any, batch: Any, idx: int) -> None:
        assert all(p.isfinite().all() for p in pl_module.heads.parameters())
        states = trainer.optimizers[0].state.values()
        assert all(t.isfinite().all() for state in states for t in state.values())


@pytest.fixture
def run(training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """run(name, callback, *overrides): a training; its folder."""
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))

    def go(name: str, poison: L.Callback | None = None, *more: str) -> Path:
        given = [*training, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=2", f"run_dir={tmp_path / name}"]
        return train.run(config.compose("train", [*given, *more]), [poison] if poison else [])

    return go


def weights(run_dir: Path, head: str = "medusa") -> str:
    return artifacts.file_sha256(run_dir / "heads" / head / "model.safetensors")


def noted(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_it_stops_by_default(run: Any, tmp_path: Path, micro: Path, value: float) -> None:  # noqa: F811
    with pytest.raises(NumericsError, match=r"in step 5 \(rows .*weights are untouched.*skip_nonfinite=N") as caught:
        run("run", Poison([5], value))
    assert caught.value.exit_code == 4
    (line,) = noted(tmp_path / "run")
    assert (line["step"], set(line["heads"])) == (5, {"medusa"})
    assert set(line["heads"]["medusa"]) == {"gradient norm", "loss"}
    assert isinstance(line["heads"]["medusa"]["loss"], float)  # it was the gradient alone
    assert len(line["rows"]) == 2
    assert all(str(micro / "rows.jsonl") + ":" in row for row in line["rows"])  # file:row, then the row's id
    last, skipped = checkpoint.load_last(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert (last.step, skipped) == (4, [])
    assert not (tmp_path / "run" / "heads").exists()
    # The same command, once the cause is gone: the line of step 5 goes, and the run ends as if nothing had been.
    run("run")
    assert (tmp_path / "run" / "nonfinite.jsonl").read_text() == ""
    assert weights(tmp_path / "run") == weights(run("whole"))


def test_steps_may_be_left_out(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of at most two: the run ends. What it learned is what an optimiser learns that never made these steps."""
    made = run("run", Poison([3, 6], float("nan")), "trainer.skip_nonfinite=2")
    said = capsys.readouterr().out
    assert "in step 3" in said
    assert "left out, 1 of at most 2" in said
    assert "left out, 2 of at most 2" in said
    assert [line["step"] for line in noted(made)] == [3, 6]
    last = checkpoint.load_last(made / "checkpoints")[0]
    assert last is not None
    assert (last.step, last.updates) == (STEPS, {"medusa": STEPS - 2})
    assert weights(made) != weights(run("whole"))


def test_one_more_than_allowed_stops(run: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"in step 6 .* after 2 that were left out; weights are untouched"):
        run("run", Poison([2, 3, 6, 7], float("inf")), "trainer.skip_nonfinite=2")
    assert [line["step"] for line in noted(tmp_path / "run")] == [2, 3, 6]
    # With more allowed the same run goes on: from the last checkpoint, where two had been left out.
    made = run("run", Poison([6, 7], float("inf")), "trainer.skip_nonfinite=4")
    assert [line["step"] for line in noted(made)] == [2, 3, 6, 7]
    at_once = run("at once", Poison([2, 3, 6, 7], float("inf")), "trainer.skip_nonfinite=4")
    assert weights(made) == weights(at_once)


def test_how_many_were_left_out_outlives_the_process(run: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError):
        run("run", Poison([1, 5, 6], float("nan")), "trainer.skip_nonfinite=2")
    with pytest.raises(NumericsError, match=r"in step 7 .* after 2 that were left out"):
        run("run", Poison([5, 7], float("nan")), "trainer.skip_nonfinite=2")
    assert [line["step"] for line in noted(tmp_path / "run")] == [1, 5, 7]


def test_another_head_learns_what_it_learns_alone(run: Any) -> None:
    both = run("both", Poison([4], float("nan"), "hydra"), "head=[medusa,hydra]", "trainer.skip_nonfinite=1")
    assert weights(both) == weights(run("alone"))
    assert set(noted(both)[0]["heads"]) == {"hydra"}
    last = checkpoint.load_last(both / "checkpoints")[0]
    assert last is not None
    assert last.updates == {"medusa": STEPS, "hydra": STEPS - 1}


def test_heads_of_unequal_updates_resume_to_the_bit(run: Any) -> None:
    class Stop(Poison):
        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 6:
                raise ZeroDivisionError

    given = ["head=[medusa,hydra]", "trainer.skip_nonfinite=1"]
    with pytest.raises(ZeroDivisionError):
        run("run", Stop([4], float("nan"), "hydra"), *given)
    resumed, whole = run("run", None, *given), run("whole", Poison([4], float("nan"), "hydra"), *given)
    assert [weights(resumed, h) for h in ("medusa", "hydra")] == [weights(whole, h) for h in ("medusa", "hydra")]


def test_with_one_norm_for_all_the_whole_step_is_left_out(run: Any) -> None:
    given = ["head=[medusa,hydra]", "trainer.skip_nonfinite=1", "optimizer.clip_scope=global"]
    made = run("run", Poison([4], float("nan"), "hydra"), *given)
    last = checkpoint.load_last(made / "checkpoints")[0]
    assert last is not None
    assert last.updates == {"medusa": STEPS - 1, "hydra": STEPS - 1}
    assert {"medusa", "hydra"} <= set(noted(made)[0]["heads"])


def test_a_loss_that_is_not_finite_counts_whatever_its_gradient(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite constant: its derivative is as finite as ever."""
    calls, honest = [0], Medusa.loss

    def loss(self: Medusa, *args: Any, **kwargs: Any) -> Any:
        out = honest(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == 5:  # the first one is the rehearsal's: step 4
            out.sum = out.sum + torch.tensor(float("inf"))
        return out

    monkeypatch.setattr(Medusa, "loss", loss)
    made = run("run", None, "trainer.skip_nonfinite=1")
    (line,) = noted(made)
    assert (line["step"], line["heads"]["medusa"]["loss"]) == (4, "inf")
    steps = [json.loads(text)["step"] for text in (made / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_first_batch_that_cannot_work_ends_before_step_1(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: Medusa, *args: Any, **kwargs: Any) -> Any:
        out = honest(self, *args, **kwargs)
        out.sum = out.sum * float("nan")
        return out

    honest = Medusa.loss
    monkeypatch.setattr(Medusa, "loss", loss)
    with pytest.raises(NumericsError, match=r"medusa: the first batch's loss is nan"):
        run("run", None, "trainer.skip_nonfinite=5")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_under_deepspeed_a_step_cannot_be_left_out(run: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer.skip_nonfinite=1: zero2 always stops .*use strategy=ddp"):
        run("run", None, "strategy=zero2", "trainer.skip_nonfinite=1")
