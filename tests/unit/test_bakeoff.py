"""A bake-off's arithmetic: steps from a timed step, the choice of the learning rate, what a second call finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith import bakeoff, config
from draftsmith.bakeoff import BakeoffConfig
from draftsmith.errors import ConfigError, DataError, NumericsError


def own(**changes: Any) -> BakeoffConfig:
    cfg = config.compose("bakeoff")
    values = {name: cfg[name] for name in BakeoffConfig.__dataclass_fields__}
    return config.typed({**values, **changes}, BakeoffConfig, "bakeoff")


def test_equal_budgets_are_unequal_steps() -> None:
    assert bakeoff.steps_for(60, {"step_cpu_seconds": 0.25}) == 240
    assert bakeoff.steps_for(60, {"step_cpu_seconds": 0.7}) == 86
    assert bakeoff.steps_for(0.1, {"step_cpu_seconds": 9.0}) == 1


def ran(lr: float, tau: float | None) -> dict[str, Any]:
    return {"head": "medusa", "lr": lr, "tokens_per_step": tau, "failed": None if tau else "gradient norm inf"}


@pytest.mark.parametrize(
    ("taus", "lr"),
    [([2.0, 3.0, 2.5], 2e-3), ([2.0, 2.0, 1.5], 1e-3), ([2.0, 2.5, None], 2e-3)],
    ids=["most", "lowest of equals", "one failed"],
)
def test_the_best_lr(taus: list[float | None], lr: float) -> None:
    assert bakeoff.best([ran(x, tau) for x, tau in zip((1e-3, 2e-3, 4e-3), taus, strict=True)]) == lr


def test_no_lr_is_best_where_all_failed() -> None:
    with pytest.raises(NumericsError, match=r"medusa: every lr failed.*give lower lrs"):
        bakeoff.best([ran(1e-3, None)])


def test_a_calibration_is_made_once_per_head_and_configuration(tmp_path: Path) -> None:
    path, asked = tmp_path / "calibration.json", []

    def measure(cfg: Any) -> dict[str, Any]:
        asked.append(cfg.data.length)
        return {"step_cpu_seconds": float(len(asked))}

    medusa = {"medusa": own().training("medusa")}
    first = bakeoff.calibrated(path, medusa, measure)
    assert first["medusa"]["step_cpu_seconds"] == 1.0
    assert bakeoff.calibrated(path, medusa, measure) == first == json.loads(path.read_text())
    both = bakeoff.calibrated(path, {**medusa, "other": own().training("medusa")}, measure)  # a head more
    assert [c["step_cpu_seconds"] for c in both.values()] == [1.0, 2.0]
    longer = {"medusa": own(train=["data.length=256"]).training("medusa")}
    assert bakeoff.calibrated(path, longer, measure)["medusa"]["step_cpu_seconds"] == 3.0  # another step
    assert asked == [512, 512, 256]
    assert own(lrs=[1.0], seeds=[7], cpu_seconds=1).training("medusa") == medusa["medusa"]


def test_a_run_is_the_experiment_with_its_own_head_and_the_budget() -> None:
    cfg = own(train=["trainer.max_steps=9", "data.batch_size=2"], threads=1).training("medusa", "trainer.max_steps=5")
    assert (cfg.experiment, list(cfg.heads), cfg.data.batch_size) == ("small", ["medusa"], 2)
    assert (cfg.trainer.max_steps, cfg.trainer.epochs, cfg.trainer.threads) == (5, None, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"compare": []}, "compare=.*give at least one"),
        ({"lrs": [1e-3, 1e-3]}, "lrs=.*none twice"),
        ({"seeds": [0, 0]}, "seeds=.*none twice"),
        ({"cpu_seconds": 0}, "cpu_seconds, lrs: give positive"),
        ({"lrs": [0.0]}, "cpu_seconds, lrs: give positive"),
    ],
)
def test_mistakes_name_the_key(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        own(**changes)


def test_other_machines_and_other_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="train: CPU-seconds are counted in one process"):
        own(train=["trainer.devices=2"]).training("medusa")
    with pytest.raises(ConfigError, match=r"compare: medusa would train \['medusa', 'medusa5'\]"):
        own(train=["+head@heads.medusa5=medusa"]).training("medusa")


def test_runs_on_other_rows_are_no_comparison(tmp_path: Path) -> None:
    contest = bakeoff.Contest(own(), tmp_path, *[None] * 3)  # type: ignore[arg-type]
    runs = [{"head": "medusa", "lr": lr, "seed": 0, "failed": None} for lr in (1e-3, 2e-3)]
    for run, rows in zip(runs, "ab", strict=True):
        contest.folder(run).mkdir()
        (contest.folder(run) / "provenance.json").write_text(json.dumps({"sha256": {"rows": rows}}))
    assert contest.same_rows(runs[:1]) == "a"
    with pytest.raises(DataError, match="different rows"):
        contest.same_rows(runs)
