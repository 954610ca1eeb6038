"""The leaderboard: ranked, every column filled or left out, pictures that are what was given and always the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from draftsmith.reporting import leaderboard
from draftsmith.reporting.leaderboard import Entry


def two() -> list[Entry]:
    return [
        Entry("medusa", 1234, 1.5, [2.0, 2.2], [0.8, 0.5], {1: (1.5, 1.6), 4: (1.25, None)}),
        Entry("eagle3", 99, 2.25, [3.0, 3.5], [0.9, 0.8, 0.7], {1: (2.0, 2.1)}),
    ]


def alone() -> list[Entry]:
    return [Entry("medusa", 1234, None, [2.0], [], {1: (1.5, None)})]


def test_the_table_is_ranked_and_whole() -> None:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in leaderboard.markdown(two()).splitlines()[:4]]
    assert lines[0] == [
        "head", "parameters", "step cost", "tokens/step", "seeds", "acceptance by depth", "batch 1", "batch 4"
    ]  # fmt: skip
    assert lines[1] == ["---", *["---:"] * 7]
    assert lines[2] == ["eagle3", "99", "2.25", "3.250", "2: 3.000–3.500", "0.90 0.80 0.70", "2.00x (2.10)", ""]
    assert lines[3] == ["medusa", "1,234", "1.50", "2.100", "2: 2.000–2.200", "0.80 0.50", "1.50x (1.60)", "1.25x"]


def test_the_terminal_has_the_same_cells_in_columns() -> None:
    lines = leaderboard.text(two()).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:4] == ["eagle3", "99", "2.25", "3.250"]
    for name, cell in (("parameters", "1,234"), ("step cost", "1.50"), ("batch 1", "1.50x (1.60)")):
        assert lines[0].index(name) + len(name) == lines[2].index(cell) + len(cell)  # one right edge
    assert "of batches of so many prompts" in lines[3]


def test_what_nobody_measured_is_no_column() -> None:
    header, row, _ = leaderboard.text(alone()).splitlines()
    assert header.split() == ["head", "parameters", "tokens/step", "batch", "1"]
    assert row.split() == ["medusa", "1,234", "2.000", "1.50x"]


def test_equal_means_are_ranked_by_name() -> None:
    heads = [Entry(name, 1, None, [2.0], [0.5]) for name in ("b", "a")]
    assert [e.name for e in leaderboard.ranked(heads)] == ["a", "b"]


def test_entries_of_an_evaluation() -> None:
    head: dict[str, Any] = {
        "parameters": 7,
        "tokens_per_step": 2.5,
        "acceptance_by_depth": [0.9],
        "speedup": 1.4,
        "terms": {"predicted_speedup": 1.5},
        "by_batch": {"4": {"speedup": 1.2, "predicted_speedup": 1.3, "terms": {}, "prompts": 8}},
    }
    (plain,) = leaderboard.entries({"h": {k: v for k, v in head.items() if k != "by_batch"}})
    assert plain == Entry("h", 7, None, [2.5], [0.9], {1: (1.4, 1.5)})
    (full,) = leaderboard.entries({"h": head}, {"h": 1.7}, {"h": [2.6, 2.7]})
    assert full == Entry("h", 7, 1.7, [2.5, 2.6, 2.7], [0.9], {1: (1.4, 1.5), 4: (1.2, 1.3)})


def test_every_run_is_told() -> None:
    run = {"head": "medusa", "lr": 0.001, "seed": 2, "steps": 1234, "cpu_seconds": 59.96, "chosen": True}
    made = [
        {**run, "tokens_per_step": 2.5, "failed": None},
        {**run, "tokens_per_step": None, "failed": "inf", "chosen": False},
    ]
    _, first, second = leaderboard.runs(made).splitlines()
    assert first.split() == ["medusa", "0.001", "2", "1,234", "60.0", "2.500", "*"]
    assert second.split()[-1] == "failed"


@pytest.mark.parametrize("heads", [two(), alone()], ids=["two", "alone"])
def test_pictures_are_there_and_always_the_same(heads: list[Entry], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = [leaderboard.write(tmp_path / again, heads, ("svg", "png")) for again in ("a", "b")]
    assert told[0] == f"-> {tmp_path / 'a' / 'leaderboard'}.{{md,svg,png}}"
    for suffix in ("svg", "png", "md"):
        one, two = ((tmp_path / again / f"leaderboard.{suffix}").read_bytes() for again in ("a", "b"))
        assert one == two
        assert len(one) > (50 if suffix == "md" else 5000)
    drawn = (tmp_path / "a" / "leaderboard.svg").read_text()
    assert "<dc:date>" not in drawn
    assert drawn.count("Tokens per step") == 1
    assert (tmp_path / "a" / "leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_comes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "find_spec", lambda name: None)
    told = leaderboard.write(tmp_path, two())
    assert told.endswith("pip install 'draftsmith[plots]'")
    assert [p.name for p in tmp_path.iterdir()] == ["leaderboard.md"]


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [0.98, 0.99, 1.0], [0.1, 0.5, 0.9]])
def test_names_in_the_margin_do_not_touch(places: list[float]) -> None:
    moved = leaderboard.spread(places, gap=0.1, low=0.0, high=1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(moved))
    assert moved[0] >= 0.05 - 1e-9
    assert moved[-1] <= 0.95 + 1e-9
    if places == [0.1, 0.5, 0.9]:
        assert moved == places
