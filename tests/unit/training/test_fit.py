"""A run that is stopped, killed or damaged, and goes on."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from draftsmith.artifacts import tensors_sha256
from draftsmith.contracts import Capture
from draftsmith.errors import DataError, Interrupted, NumericsError
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.signals import SIGNALS
from draftsmith.training.settings import OptimizerConfig

Train = Callable[..., Any]
# packs, batch_size, accumulate: an epoch of 2 steps; of 1.5 steps; one micro-batch of 3 ends it mid-step
LAYOUTS = {"epoch ends with a step": (8, 2, 2), "step straddles": (6, 2, 2), "no accumulation": (5, 2, 1)}
STEPS = 5


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_resume_from_every_checkpoint_is_bit_equal(
    train: Train, tmp_path: Path, layout: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As if killed right after each checkpoint, with metrics written beyond it and a torn line behind:
    same weights, and every step in metrics.jsonl once, with the same numbers."""
    packs, batch_size, accumulate = layout
    plan = {"packs": packs, "batch_size": batch_size, "accumulate": accumulate, "steps": STEPS}
    whole = train(tmp_path / "whole", checkpoint_every=1, keep=99, **plan)
    assert len(set(map(str, whole.lines))) == STEPS
    for step in range(STEPS + 1):
        run_dir = tmp_path / f"from-{step}"
        shutil.copytree(whole.run_dir, run_dir)
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{later:08d}")
        if step < STEPS:
            with open(run_dir / "metrics.jsonl", "a") as f:
                f.write('{"step": 9, "tra')
        again = train(run_dir, **plan)
        assert again.weights == whole.weights, step
        assert again.lines == whole.lines, step
    assert f"resuming after step 3 of {STEPS}" in capsys.readouterr().out


def test_measuring_other_rows_changes_nothing_that_is_learned(train: Train, tmp_path: Path) -> None:
    """Every so many steps and at the end, the same numbers after a resume."""
    plan = {"steps": STEPS, "checkpoint_every": 3, "keep": 99}
    plain = train(tmp_path / "plain", **plan)
    plan |= {"measured": 3, "validate_every": 2}
    whole = train(tmp_path / "whole", **plan)
    shutil.copytree(whole.run_dir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{STEPS:08d}")
    again = train(tmp_path / "again", **plan)
    assert plain.weights == whole.weights == again.weights
    assert again.lines == whole.lines
    told = [{k: v for k, v in line.items() if k.startswith("validation/")} for line in whole.lines]
    assert [bool(line) for line in told] == [False, True, False, True, True]
    assert all(line.keys() == told[-1].keys() and min(line.values()) >= 0 for line in told if line)
    assert told[1]["validation/medusa/loss"] != told[3]["validation/medusa/loss"]
    rest = [{k: v for k, v in line.items() if not k.startswith("validation/")} for line in whole.lines]
    assert rest == plain.lines


class Noisy(Medusa):
    """With randomness in its loss."""

    def loss(self, base: Any, seen: Capture, batch: Any, *, measure: bool = True) -> Any:
        final = seen.final + 0.1 * torch.randn_like(seen.final)
        return super().loss(base, Capture(final=final), batch, measure=measure)


def test_randomness_is_the_step_s_and_the_head_s(train: Train, tmp_path: Path) -> None:
    """Noise follows step, micro-batch and head name: a resumed run draws what the whole one drew, and a head
    draws the same beside another; metrics stay on the same steps too."""
    one, two = {"a": MedusaConfig(num_heads=1)}, {"b": MedusaConfig(num_heads=1), "a": MedusaConfig(num_heads=1)}
    plan = {"kind": Noisy, "accumulate": 2, "log_every": 2, "checkpoint_every": 3}
    whole = train(tmp_path / "whole", heads=one, **plan)
    assert whole.weights != train(tmp_path / "calm", heads=one, **{**plan, "kind": Medusa}).weights
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000005")
    again = train(tmp_path / "whole", heads=one, **plan)
    assert (again.weights, again.lines) == (whole.weights, whole.lines)
    assert [line["step"] for line in again.lines] == [2, 4, 5]
    both = train(tmp_path / "both", heads=two, **plan)
    a, b = (tensors_sha256(both.heads[n].state_dict()) for n in "ab")
    assert a == tensors_sha256(whole.heads["a"].state_dict()) != b


class At(L.Callback):
    """Does something once, after the first backward of a step."""

    def __init__(self, step: int, what: Callable[[Any], None]) -> None:
        self.step, self.what, self.done = step, what, False

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step + pl_module.start + 1 == self.step and not self.done:
            self.done = True
            self.what(pl_module)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_step_s_edge_and_resumes(train: Train, tmp_path: Path, number: int) -> None:
    """The same call goes on and ends with the weights of a run that was never stopped."""
    whole = train(tmp_path / "whole", accumulate=2)
    before = [signal.getsignal(s) for s in SIGNALS]
    stop = At(3, lambda module: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=r"after step 3 of 5.*same command resumes") as caught:
        train(tmp_path / "stopped", accumulate=2, more=[stop])
    assert caught.value.exit_code == 75
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").glob("step-*")] == ["step-00000003"]
    again = train(tmp_path / "stopped", accumulate=2)
    assert (again.weights, again.lines) == (whole.weights, whole.lines)


def test_a_signal_in_the_last_step_completes(train: Train, tmp_path: Path) -> None:
    run = train(tmp_path, more=[At(5, lambda module: os.kill(os.getpid(), signal.SIGTERM))])
    assert run.lines[-1]["step"] == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite(train: Train, tmp_path: Path, value: float, clip: float | None) -> None:
    """Weights of every head stay those of the step before, the checkpoint stays good, handlers go back."""
    plan = {
        "heads": {"a": MedusaConfig(num_heads=1), "medusa": MedusaConfig(num_heads=2)},
        "optimizer": OptimizerConfig(lr=0.01, clip=clip),
    }
    good: dict[str, str] = {}
    heads: dict[str, Any] = {}

    def break_it(module: Any) -> None:
        good.update({n: tensors_sha256(h.state_dict()) for n, h in heads.items()})
        next(heads["medusa"].parameters()).grad[0] = value

    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(NumericsError, match=rf"medusa: gradient norm {value}.*weights are untouched") as caught:
        train(tmp_path, made=heads, checkpoint_every=2, more=[At(4, break_it)], **plan)
    assert caught.value.exit_code == 4
    assert {n: tensors_sha256(h.state_dict()) for n, h in heads.items()} == good
    assert all(p.isfinite().all() for h in heads.values() for p in h.parameters())
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert train(tmp_path, **plan).weights == train(tmp_path / "whole", **plan).weights


def test_the_message_counts_steps_as_metrics_do(train: Train, tmp_path: Path) -> None:
    def break_it(module: Any) -> None:
        next(module.parameters()).grad.fill_(float("nan"))

    with pytest.raises(NumericsError, match=r"in step 4 \(rows "):
        train(tmp_path, more=[At(4, break_it)])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_checkpoint_costs_only_its_steps(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path, checkpoint_every=2)
    newest = tmp_path / "checkpoints" / "step-00000005" / "medusa.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    again = train(tmp_path, checkpoint_every=2)
    said = capsys.readouterr().out
    assert "warning: checkpoint skipped" in said
    assert "step-00000005" in said
    assert "resuming after step 4 of 5" in said
    assert (again.weights, again.lines) == (whole.weights, whole.lines)


def test_a_complete_run_only_reads_its_weights(train: Train, tmp_path: Path) -> None:
    whole = train(tmp_path)
    stamp = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    again = train(tmp_path)
    assert again.weights == whole.weights
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("changed", ["base", "rows"])
def test_a_checkpoint_of_another_base_or_other_rows(train: Train, tmp_path: Path, changed: str) -> None:
    ties = {"base": "b", "rows": "r"}
    train(tmp_path, steps=2, ties=ties)
    with pytest.raises(DataError, match=f"trained on other {changed} than"):
        train(tmp_path, ties={**ties, changed: "other"})


def test_checkpoints_come_when_asked_and_at_the_end(train: Train, tmp_path: Path) -> None:
    train(tmp_path, steps=7, checkpoint_every=3, keep=9)
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*"))
    assert steps == [3, 6, 7]
    assert json.loads((tmp_path / "checkpoints" / "last").read_text()) == {"checkpoint": "step-00000007"}


def test_progress_without_a_terminal(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, steps=20)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in said] == [f"{s}/20" for s in range(2, 21, 2)]
    assert all(part in said[0] for part in ("medusa loss ", "top-1 ", "tokens/step ~", "tok/s", "s left"))


def test_the_caller_s_randomness_is_untouched(train: Train, tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    train(tmp_path, steps=2)
    assert torch.equal(torch.rand(4), want)
