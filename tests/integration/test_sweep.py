"""Grids (-m) and studies (draftsmith sweep) on the micro base: killed and started again, each job and trial is once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Fork, call, draftsmith, finish

TRIALS = 6


def wait(until: Callable[[], Any], process: Fork) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.002)


def under_way(study: Path) -> tuple[int, int]:
    """(trials that ended, estimates of the one that is running), as another process sees them."""
    if not study.exists():
        return 0, 0
    with contextlib.closing(sqlite3.connect(f"file:{study}?mode=ro", uri=True)) as found:
        try:
            (ended,) = found.execute("select count(*) from trials where state != 'RUNNING'").fetchone()
            running = "select trial_id from trials where state = 'RUNNING'"
            (told,) = found.execute(
                f"select count(*) from trial_intermediate_values where trial_id in ({running})"
            ).fetchone()
        except sqlite3.OperationalError:  # it is being written
            return 0, 0
    return ended, told


@pytest.fixture(scope="module")
def study(training: list[str]) -> list[str]:
    """Overrides of a study of six trials over two heads."""
    own = [*training, "trainer.max_steps=8", "trainer.checkpoint_every=2"]
    asked = ["selection.synthetic=1", "selection.text=0", "decoding.max_new_tokens=8"]
    stops = ["pruner.startup=2", "pruner.warmup=5", "sampler.startup=4", "space={optimizer.lr: {low: 5e-3}}"]
    return ["like=quickstart", f"train=[{','.join(map(repr, own))}]", *asked, *stops, f"trials={TRIALS}", "run_dir=out"]


def test_a_study_killed_half_way_ends_with_each_trial_once(study: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    killed.mkdir()
    alone.mkdir()
    process = Fork("sweep", *study, cwd=killed)
    wait(lambda: under_way(killed / "out" / "study.db") >= (TRIALS // 2, 3), process)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert TRIALS // 2 <= under_way(killed / "out" / "study.db")[0] < TRIALS
    found = {}
    for folder, when in ((killed, "again"), (alone, "once")):
        code, output = call("sweep", *study, cwd=folder)
        assert code == 0, output
        found[when] = json.loads((folder / "out" / "sweep.json").read_text())
        for trial in found[when]["trials"]:
            assert trial.pop("seconds") > 0
    assert found["again"] == found["once"]  # values, estimates, states, folders, the best
    trials = found["again"]["trials"]
    assert [t["number"] for t in trials] == list(range(TRIALS))
    assert {t["head"] for t in trials} == {"medusa", "hydra"}
    assert {"complete"} <= {t["state"] for t in trials} <= {"complete", "pruned"}
    assert all(t["value"] >= 1 for t in trials if t["state"] == "complete")
    runs = [p for p in (killed / "out").iterdir() if p.is_dir()]
    assert {p.name for p in runs} == {t["folder"] for t in trials}
    best = found["again"]["best"]
    assert f"best: trial {best['number']}" in output
    assert best["command"] in output
    for t in trials:  # a pruned one left what its training left so far
        lines = [json.loads(line) for line in (killed / "out" / t["folder"] / "metrics.jsonl").open()]
        key = f"train/{t['head']}/tokens_per_step"
        assert [[line["step"], line[key]] for line in lines] == t["estimates"]


def test_a_grid_finds_what_it_has_finished(training: list[str], tmp_path: Path) -> None:
    given = [*training, "trainer.max_steps=2", "run_dir=grid"]
    code, output = draftsmith("train", "-m", *given, "heads.medusa.num_layers=1,2", cwd=tmp_path)
    assert code == 0, output
    folders = {p.name for p in (tmp_path / "grid").iterdir()}
    assert len(folders) == 2
    jobs = [line for line in output.splitlines() if line.startswith("job ")]
    assert [j.partition(" -> ")[0] for j in jobs] == [f"job {n}: heads.medusa.num_layers={n + 1}" for n in (0, 1)]
    assert {j.rpartition("/")[2] for j in jobs} == folders
    # another order, and one that cannot be: its code is the grid's, and the others are found
    code, output = draftsmith("train", "-m", *given, "heads.medusa.num_layers=2,0,1", cwd=tmp_path)
    assert code == 2, output
    assert output.count("already complete") == 2
    assert "num_layers=0: give at least 1" in output
    code, output = draftsmith("train", "-m", *given[:-1], "seed=0,1", cwd=tmp_path)  # without run_dir: one each
    assert code == 0, output
    assert len(list((tmp_path / "runs").glob("train-*"))) == 2


def test_who_stops_a_job_stops_the_grid(training: list[str], tmp_path: Path) -> None:
    process = Fork("train", "-m", *training, "trainer.max_steps=400", "seed=0,1", "run_dir=grid", cwd=tmp_path)
    wait(lambda: list(tmp_path.glob("grid/*/metrics.jsonl")), process)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "job 1" not in output
    assert output.count("resume: draftsmith train -m") == 1
    assert len(list((tmp_path / "grid").iterdir())) == 1
