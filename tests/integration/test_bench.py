"""draftsmith bench on the micro base: ratios, parts, memory, recorded figures; a step beside the plain one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import call

STEP = ["base=hf", "head=[medusa]", "heads.medusa.num_heads=2", "data.length=48", "data.random.rows=6"]
STEP += ["trainer.max_steps=2", "trainer.log_every=2", "repeats=2", "run_dir=out"]


def bench(micro: Path, folder: Path, *more: str) -> tuple[int, str]:
    return call("bench", f"base.path={micro / 'base'}", *STEP, *more, cwd=folder)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "bench.json").read_text())


def test_a_step_beside_the_plain_one(micro: Path, tmp_path: Path) -> None:
    code, output = bench(micro, tmp_path)
    assert code == 0, output
    found = told(tmp_path)
    assert list(found["runs"]) == ["step", "step, plain"]
    assert [len(runs) for runs in found["runs"].values()] == [2, 2]
    for name in ("over the base's forward", "faster than the plain step"):
        values = found["figures"][name]["runs"]
        assert len(values) == 2
        assert min(values) > 0
        assert name in output
    runs = found["runs"]
    plain = "step, plain"
    ratio = runs[plain][0]["step_ms"] / runs["step"][0]["step_ms"]
    assert found["figures"]["faster than the plain step"]["runs"][0] == pytest.approx(ratio)
    peaks = found["peaks"]
    assert peaks[plain] > peaks["step"] > 0
    assert found["figures"]["memory of the plain step over its own"]["median"] == peaks[plain] / peaks["step"]


def test_several_heads_are_timed_apart_too_and_figures_are_recorded(micro: Path, tmp_path: Path) -> None:
    two = ["head=[medusa,kangaroo]", "plain=false", "memory=false", "repeats=1", "against=figures.json"]
    code, output = bench(micro, tmp_path, *two, "record=true")
    assert code == 0, output
    assert list(told(tmp_path)["runs"]) == ["step", "medusa alone", "kangaroo alone"]
    path = tmp_path / "figures.json"
    recorded = json.loads(path.read_text())
    assert list(recorded["figures"]) == ["over the base's forward", "faster than each head alone"]
    recorded["figures"]["over the base's forward"] = 100.0
    path.write_text(json.dumps(recorded))
    code, output = bench(micro, tmp_path, *two)
    assert code == 0, output
    assert "moved: over the base's forward 100.00 -> " in output
    assert json.loads(path.read_text()) == recorded


def test_a_step_that_reads_a_store_beside_the_plain_one(micro: Path, tmp_path: Path) -> None:
    """The plain step runs its base. (A store is read ahead by a thread, so that no forward is timed beside it.)"""
    code, output = bench(micro, tmp_path, "capture=[]", "memory=false", "repeats=1")
    assert code == 0, output
    found = told(tmp_path)
    assert list(found["figures"]) == ["faster than the plain step"]
    assert found["runs"]["step, plain"][0]["base_ms"] > found["runs"]["step"][0]["base_ms"]
    assert output.count("rows computed again and found equal") == 1


def test_named_figures_of_several_configurations(micro: Path, tmp_path: Path) -> None:
    given = ["+figures.variants={a: [], b: ['heads.medusa.num_heads=1'], c: []}", "only=[first]", "repeats=1"]
    given += ["+figures.figures.first={kind: cost, of: a, over: [b]}", "+figures.figures.second={kind: floor, of: c}"]
    code, output = bench(micro, tmp_path, *given)
    assert code == 0, output
    assert list(told(tmp_path)["figures"]) == ["first"]
    assert list(told(tmp_path)["runs"]) == ["a", "b"]
    code, output = bench(micro, tmp_path, *given, "only=[third]")
    assert (code, "no figure third" in output) == (2, True), output


def test_recorded_ratios_are_asked_for_before_anything_is_timed(micro: Path, tmp_path: Path) -> None:
    code, output = bench(micro, tmp_path, "against=nothing.json")
    assert (code, "nothing.json" in output) == (3, True), output
    assert not (tmp_path / "out" / "bench.json").exists()


def test_the_script_beside_another_trainer_still_fits() -> None:
    """It is started by scripts/bench_speculators.sh alone; here, that what it takes from the package is there."""
    path = Path(__file__).parents[2] / "scripts" / "peers" / "draftsmith_step.py"
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("peer", path))
    spec.loader.exec_module(module)
    assert module.head_config(8192).draft_vocab_size == 2048


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["trainer.accumulate=2"], "accumulate"),
        (["trainer.max_steps=1"], "trainer.max_steps"),
        (["repeats=0"], "repeats=0"),
        (["record=true"], "against"),
        (["loss.impl=quick"], "loss: impl='quick': choose fused or plain"),
        (["+figures.variants.a=[]", "+figures.figures.x={kind: floor, of: b}"], "b is no variant"),
        (["+figures.variants.a=[]", "+figures.figures.x={kind: faster, of: a}"], "over"),
    ],
)
def test_mistakes_name_their_key(given: list[str], told: str, micro: Path, tmp_path: Path) -> None:
    code, output = bench(micro, tmp_path, *given)
    assert code == 2, output
    assert told in output
