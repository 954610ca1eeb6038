"""The primers' report: every number at its place, lossy said aloud, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.reporting import primers


def primer(agreement: float, share: float) -> dict[str, Any]:
    costs = {
        n: {
            "seconds": base * share * 1.5,
            "over_base": share * 1.5,
            "flops": int(n * 1e6 * share),
            "flops_over_base": share,
            "auxiliary_seconds": base / 5,
            "auxiliary_flops": n * 250_000,
        }
        for n, base in ((64, 0.01), (256, 0.04))
    }
    return {
        "lossy": True,
        "agreement": agreement,
        "perplexity": 4.5,
        "tokens": 100,
        "auxiliary": {"agreement": 0.5, "perplexity": 9.0},
        "by_length": {str(n): c for n, c in costs.items()},
    }


def results(*names: str) -> dict[str, Any]:
    plain = {"64": {"seconds": 0.01, "flops": 64_000_000}, "256": {"seconds": 0.04, "flops": 256_000_000}}
    base = {"perplexity": 1.25, "tokens": 100, "by_length": plain}
    return {"base": base, "primers": {n: primer(0.6 + 0.1 * i, 0.25 * (i + 1)) for i, n in enumerate(names)}}


def test_the_table_is_whole_and_says_lossy() -> None:
    told = primers.markdown(results("kvp_25", "kvp_50"))
    assert told.splitlines()[0] == "# Primers (lossy)"
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "lossy", "agreement", "perplexity", "time 64", "FLOPs 64", "time 256", "FLOPs 256"]
    assert rows[1] == ["---", "---", *["---:"] * 6]
    assert rows[2] == ["base", "no", "", "1.25", "10.0 ms", "6.40e+07", "40.0 ms", "2.56e+08"]
    assert rows[3] == ["kvp_50", "yes", "70.0%", "4.50", "0.75x", "0.50x", "0.75x", "0.50x"]  # the best first
    assert rows[4] == ["kvp_50, alone", "", "50.0%", "9.00", "0.20x", "0.25x", "0.20x", "0.25x"]
    assert rows[5][:3] == ["kvp_25", "yes", "60.0%"]
    assert len(rows) == 7


@pytest.mark.parametrize("names", [["kvp"], ["a", "b", "c"]])
def test_the_picture_is_there_and_always_the_same(names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = [primers.write(tmp_path / again, results(*names)) for again in ("a", "b")]
    assert told[0] == f"-> {tmp_path / 'a' / 'primers'}.{{md,svg}}"
    for suffix in ("md", "svg"):
        one, two = ((tmp_path / again / f"primers.{suffix}").read_bytes() for again in ("a", "b"))
        assert one == two
    drawn = (tmp_path / "a" / "primers.svg").read_text()
    assert "<dc:date>" not in drawn
    for said in ("Lossy: agreement", "Time to first token", *names):
        assert f"<!-- {said}" in drawn


def test_one_length_is_enough(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results("kvp")
    for one in (found["base"], found["primers"]["kvp"]):
        del one["by_length"]["64"]
    primers.write(tmp_path, found)
    assert (tmp_path / "primers.svg").stat().st_size > 5000


def test_without_matplotlib_the_table_comes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primers, "find_spec", lambda name: None)
    assert primers.write(tmp_path, results("kvp")).endswith("pip install draftsmith[plots]")
    assert [p.name for p in tmp_path.iterdir()] == ["primers.md"]
