"""The chosen tree in words and pictures."""

import copy
from pathlib import Path
from typing import Any

import pytest

from draftsmith.reporting import leaderboard, tree

FIGURES = {
    f"{part}_{what}": value
    for part, speedup in (("promised", 2.0), ("predicted", 1.5), ("measured", 1.6))
    for what, value in (("tokens_per_step", 2.5), ("tokens_per_second", 100.0), ("speedup", speedup))
}


def row(name: str, kind: str, nodes: int, speedup: float, **told: Any) -> dict[str, Any]:
    figures = {"tokens_per_step": 2.5, "seconds_per_step": 0.002, "tokens_per_second": 1000.0, "speedup": speedup}
    return (
        {"name": name, "kind": kind, "published": False, "nodes": nodes, "depth": 2, "timed_again": True}
        | figures
        | told
    )


FOUND: dict[str, Any] = {
    "name": "grown 5",
    "nodes": 5,
    "depth": 2,
    **FIGURES,
    "measured_interval": [2.25, 2.75],
    "measured_speedups": [1.5, 1.6, 1.7],
    "published": {"name": "eagle_25", **FIGURES, "measured_speedup": 1.28, "measured_speedups": [1.25, 1.28, 1.7]},
    "chain": {"name": "chain 2", **FIGURES, "measured_speedup": 1.61, "measured_speedups": [1.5, 2.0, 1.0]},
    "shares": [
        {"path": [0], "share": 0.8},
        {"path": [2], "share": 0.05},
        {"path": [0, 0], "share": 0.6},
        {"path": [0, 1], "share": 0.1},
    ],
    "table": [
        row("grown 5", "static", 5, 2.0),
        row("chain 2", "chain", 3, 1.9),
        row("eagle_25", "static", 21, 1.2, published=True),
        row("eagle2 9", "eagle2", 9, 1.1, timed_again=False),
    ],
    "chosen_on": 12,
    "measured_on": 11,
}
MOVING = {**FOUND, "shares": [{"depth": 1, "share": 0.75}, {"depth": 2, "share": 0.5}]}


def test_the_words_hold_every_figure() -> None:
    lines = tree.text("mine", FOUND).splitlines()
    assert lines[0].split() == [
        "tree", "nodes", "depth", "tokens/step", "ms/step", "tokens/s", "promised", "predicted", "measured"
    ]  # fmt: skip
    assert lines[1].split() == ["grown", "5", "*", "5", "2", "2.50", "2.00", "1000", "2.00x", "1.50x", "1.60x"]
    assert lines[3].split()[-3:] == ["1.20x", "1.50x", "1.28x"]
    assert not any("eagle2 9" in line for line in lines)  # timed once
    told = "\n".join(lines)
    for part in (
        "mine: 4 trees tried on 12 prompts, the best measured on 11 others",
        "grown 5 (5 nodes, 2 deep) predicted 1.50x, measured 1.60x (-6.2%; 1.50 to 1.70 in 3 passes); tokens",
        "tokens per step 2.50 (2.25 to 2.75 at 95 %), 2.50 on the prompts that chose it",
        "1.20 times as fast as the best published tree, eagle_25 (1.00 to 1.25)",
        "1.00 times as fast as the chain, chain 2 (0.80 to 1.70)",
    ):
        assert part in told
    assert "no tree beats plain decoding" not in told


def test_the_tree_line_by_line() -> None:
    assert tree.drawn(FOUND) == ["root", "├─ #1 80.0%", "│  ├─ #1 60.0%", "│  └─ #2 10.0%", "└─ #3 5.0%"]
    assert tree.drawn(MOVING)[0] == "depth 1: 75.0% of the steps keep a draft"
    many = [{"path": [r], "share": 1 / (r + 2)} for r in range(50)]
    lines = tree.drawn({**FOUND, "shares": many})
    assert len(lines) == 2 + tree.SHOWN
    assert lines[-1] == f"… and {50 - tree.SHOWN} more, 2.9% or less each"


def test_what_is_slower_than_plain_decoding_is_said_to_be() -> None:
    slow = {**FOUND, "promised_speedup": 0.9, "published": None, "measured_interval": None}
    told = "\n".join(tree.verdict(slow))
    assert "no tree beats plain decoding here" in told
    assert "published" not in told
    assert "95 %" not in told
    tree.text("mine", slow)


def test_markdown_holds_all_that_were_tried() -> None:
    told = tree.markdown("mine", FOUND)
    assert told.startswith("# The tree of mine\n")
    assert all(f"| {name} " in told for name in ("grown 5 *", "chain 2", "eagle_25", "eagle2 9"))
    assert "└─ #3 5.0%" in told


def test_parents_stand_above_the_middle_of_their_children() -> None:
    spots = tree.places([(0,), (1,), (0, 0), (0, 2), (1, 0), (1, 0, 3)])
    assert spots[0, 0] == (0.0, 2)
    assert spots[0, 2] == (1.0, 2)
    assert spots[1, 0, 3] == (2.0, 3)
    assert spots[(0,)] == (0.5, 1)
    assert spots[(1,)] == (2.0, 1)
    assert spots[()] == (1.25, 0)
    assert len(set(spots.values())) == len(spots)
    assert tree.places([]) == {(): (0.0, 0)}


@pytest.mark.parametrize("found", [FOUND, MOVING, {**FOUND, "published": None}], ids=["static", "moving", "alone"])
def test_equal_results_are_equal_pictures(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        told = tree.write(tmp_path / name, "mine", copy.deepcopy(found))
        assert told.startswith("-> ")
    for suffix in ("md", "svg", "png"):
        one, two = ((tmp_path / name / f"tree_mine.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert "<svg" in (tmp_path / "one" / "tree_mine.svg").read_text()


def test_without_matplotlib_there_are_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard, "find_spec", lambda name: None)
    assert "pip install" in tree.write(tmp_path, "mine", FOUND)
    assert [p.name for p in tmp_path.iterdir()] == ["tree_mine.md"]
