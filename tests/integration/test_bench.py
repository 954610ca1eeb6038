"""draftsmith bench on the micro base: ratios, parts, memory, recorded figures; a step beside the plain one."""

from __future__ import annotations

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
    assert list(found["runs"]) == ["step", "plain"]
    assert [len(runs) for runs in found["runs"].values()] == [2, 2]
    for name in ("over the base's forward", "faster than the plain step"):
        values = found["figures"][name]["runs"]
        assert len(values) == 2
        assert min(values) > 0
        assert name in output
    runs = found["runs"]
    ratio = runs["plain"][0]["step_ms"] / runs["step"][0]["step_ms"]
    assert found["figures"]["faster than the plain step"]["runs"][0] == pytest.approx(ratio)
    peaks = found["peaks"]
    assert peaks["plain"] > peaks["step"] > 0
    assert found["figures"]["memory of the plain step over its own"]["median"] == peaks["plain"] / peaks["step"]


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
