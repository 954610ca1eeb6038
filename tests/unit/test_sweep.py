"""A study goes on as if it had not been killed, whatever becomes of its trials; the trainings are fakes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from draftsmith import artifacts, config, prepare, sweep
from draftsmith.errors import ConfigError, DataError, Diverged, Interrupted, NumericsError, OutOfMemory

pytest.importorskip("optuna")
STEPS = 6
LR = {"optimizer.lr": {"low": 1e-3, "high": 4e-2, "log": True}}


class Killed(BaseException):
    """As good as kill -9: nothing is caught, nothing tidied up."""


class Trainer:
    """In the place of draftsmith train: two metrics lines a run, which resume. left: steps until it is killed."""

    def __init__(self) -> None:
        self.left, self.steps = -1, 0

    def run(self, cfg: Any, more: Any = ()) -> Path:
        folder, (telling,) = Path(cfg.run_dir), more
        (head,) = cfg.heads
        if artifacts.is_complete(folder, manifest="COMPLETE.json"):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        start = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        module = SimpleNamespace(steps=STEPS, measured={}, validated={}, done=lambda idx: idx + 1)
        trainer = SimpleNamespace(accumulate_grad_batches=1)
        telling.on_train_start(trainer, module)
        for idx in range(start, STEPS):
            if cfg.optimizer.lr > 0.05:
                raise Diverged(f"{head}: gradient norm inf in step {idx + 1}")
            if cfg.optimizer.lr == 0.02:
                raise OutOfMemory("train: step 1, a batch of 2 x 64 tokens: out of memory")
            if cfg.optimizer.lr == 0.03:
                raise MemoryError("too large for this device")
            value = 1 + (idx + 1) * cfg.optimizer.lr * (2 if head == "medusa" else 3)
            with open(metrics, "a") as f:
                f.write(json.dumps({"step": idx + 1, f"train/{head}/tokens_per_step": value}) + "\n")
            self.steps, self.left = self.steps + 1, self.left - 1
            if self.left == 0:  # the line is written, nobody has been told
                raise Killed
            module.measured = {f"train/{head}/tokens_per_step": value}
            telling.on_train_batch_end(trainer, module, None, None, idx)
        artifacts.write_json(folder / "COMPLETE.json", {"heads": [head], "data_sha256": "1"})
        return folder


def training(self: Any, head: str, values: dict[str, Any], group: str | None = None) -> Any:
    """In the place of composing, which takes a quarter of a second."""
    lr, weights = values.get("optimizer.lr"), values.get("heads.medusa.loss_weights")
    if weights:
        raise ConfigError("heads.medusa: 2 weights for num_heads=3; give one per head")
    validation = {"share": 0.0, "path": None}
    return OmegaConf.create(
        {"heads": {head: {}}, "optimizer": {"lr": lr}, "data": {"validation": validation}, "run_dir": None}
    )


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(sweep.train, "run", made.run)
    monkeypatch.setattr(sweep.SweepConfig, "check", lambda self: None)  # test_searching.py
    monkeypatch.setattr(sweep.SweepConfig, "training", training)
    monkeypatch.setattr(sweep.report, "write", lambda *given: "")  # tests/unit/reporting/test_sweep.py
    return made


def asked(run_dir: Path, *more: str, trials: int = 6, **space: Any) -> Any:
    given = ["like=quickstart", "objective=estimated", "pruner.startup=1", "pruner.warmup=2", f"trials={trials}"]
    cfg = config.compose("sweep", [*given, "sampler.startup=3", f"run_dir={run_dir}", *more])
    cfg.space, cfg.each = space.get("space", LR), space.get("each", {})
    return cfg


def outcome(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All but the seconds."""
    return [{k: v for k, v in t.items() if k != "seconds"} for t in result["trials"]]


def test_killed_anywhere_it_ends_as_if_left_alone(trainer: Trainer, tmp_path: Path) -> None:
    alone = sweep.run(asked(tmp_path / "alone"))
    assert [t["number"] for t in alone["trials"]] == [0, 1, 2, 3, 4, 5]
    assert {t["state"] for t in alone["trials"]} >= {"complete", "pruned"}
    assert {t["head"] for t in alone["trials"]} == {"medusa", "hydra"}
    done = [t for t in alone["trials"] if t["state"] == "complete"]
    assert alone["best"]["value"] == max(t["value"] for t in done)
    trained, kills = trainer.steps, 0
    trainer.steps = 0
    while True:
        trainer.left = 4
        try:
            result = sweep.run(asked(tmp_path / "killed"))
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert outcome(result) == outcome(alone)
    assert trainer.steps == trained  # nothing was trained twice
    assert json.loads((tmp_path / "killed" / "sweep.json").read_text()) == result
    assert sweep.run(asked(tmp_path / "killed")) == result  # nothing left to do


def test_the_same_seed_tries_the_same(trainer: Trainer, tmp_path: Path) -> None:
    values = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = sweep.run(asked(tmp_path / name, f"seed={seed}", trials=3))
        values[name] = [(t["head"], t["params"]) for t in found["trials"]]
    assert values["a"] == values["b"] != values["c"]
    assert len({str(v) for v in values["a"]}) == 3  # each trial its own


def test_more_trials_go_on_with_the_study(trainer: Trainer, tmp_path: Path) -> None:
    first = sweep.run(asked(tmp_path, trials=2))
    more = sweep.run(asked(tmp_path, "threads=2", trials=4))
    assert outcome(more)[:2] == outcome(first)
    assert len(more["trials"]) == 4
    with pytest.raises(ConfigError, match=r"holds another run \(seed: 0 -> 1\)"):
        sweep.run(asked(tmp_path, "seed=1"))


def test_equal_values_are_one_run(trainer: Trainer, tmp_path: Path) -> None:
    found = sweep.run(
        asked(tmp_path, "compare=[medusa]", "pruner.kind=none", space={"optimizer.lr": {"choices": [0.01]}})
    )
    assert len(found["trials"]) == 6
    assert {(t["state"], t["value"]) for t in found["trials"]} == {("complete", 1 + STEPS * 0.02)}
    assert len({t["folder"] for t in found["trials"]}) == 1
    assert trainer.steps == STEPS
    assert found["best"]["number"] == 0


def test_a_trial_that_fails_is_told_and_passed_over(trainer: Trainer, tmp_path: Path) -> None:
    weights = {"choices": [None, [1, 1]]}
    space = {"optimizer.lr": {"choices": [0.01, 0.02, 0.03, 0.09]}, "heads.medusa.loss_weights": weights}
    found = sweep.run(asked(tmp_path / "some", "compare=[medusa]", "pruner.kind=none", trials=16, space=space))
    failed = [t["reason"] for t in found["trials"] if t["state"] == "failed"]
    assert any("gradient norm inf in step 1" in reason for reason in failed)
    assert any("2 weights for num_heads=3" in reason for reason in failed)
    assert any(reason == "train: step 1, a batch of 2 x 64 tokens: out of memory" for reason in failed)
    assert any(reason == "MemoryError: too large for this device" for reason in failed)
    assert any(t["state"] == "complete" for t in found["trials"])
    with pytest.raises(NumericsError, match=r"no trial was complete.*gradient norm inf"):
        sweep.run(asked(tmp_path / "all", space={"optimizer.lr": {"choices": [0.09]}}, trials=2))
    assert (
        "loss_weights=[1, 1]" in sweep.SweepConfig.overrides(_own(), "medusa", {"heads.medusa.loss_weights": [1, 1]})[2]
    )


def _own() -> Any:
    cfg = config.compose("sweep")
    return config.typed({n: cfg[n] for n in sweep.SweepConfig.__dataclass_fields__}, sweep.SweepConfig, "sweep")


def test_an_interrupted_trial_keeps_its_number(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(cfg: Any, more: Any = ()) -> Path:
        raise Interrupted("stopped by a signal")

    with monkeypatch.context() as m:
        m.setattr(sweep.train, "run", stopped)
        with pytest.raises(Interrupted):
            sweep.run(asked(tmp_path))
    found = sweep.run(asked(tmp_path, trials=1))
    assert [(t["number"], t["state"]) for t in found["trials"]] == [(0, "complete")]


def test_a_study_has_one_process_and_a_file_that_is_whole(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    with prepare.held(tmp_path / "held"), pytest.raises(ConfigError, match="is being written by process"):
        sweep.run(asked(tmp_path / "held"))
    for name, content in (("junk", b"no database at all" * 100), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.db").write_bytes(content)
        with pytest.raises(DataError, match=r"study\.db: holds no study"):
            sweep.run(asked(tmp_path / name))


@pytest.mark.parametrize(("kind", "name"), [("median", "MedianPruner"), ("halving", "SuccessiveHalvingPruner")])
def test_pruners(kind: str, name: str, trainer: Trainer, tmp_path: Path) -> None:
    assert type(sweep.pruner(sweep.PrunerConfig(kind))).__name__ == name
    found = sweep.run(asked(tmp_path, f"pruner.kind={kind}", "pruner.factor=2", "sampler.kind=random", trials=8))
    stopped = [t for t in found["trials"] if t["state"] == "pruned"]
    assert stopped
    assert all(2 <= t["steps"] < STEPS and t["reason"].endswith(f"after step {t['steps']} of {STEPS}") for t in stopped)
