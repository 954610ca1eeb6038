"""Bars, shares, reliability and trees: what is drawn where, and how large."""

import math
import re
from xml.etree import ElementTree

import pytest

from draftsmith.reporting import drawings
from draftsmith.reporting.curves import Picture


def rects(picture: Picture) -> list[tuple[float, float]]:
    """(x, width) of every bar."""
    found = re.findall(r'<rect class="bar[^"]*" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', picture.svg)
    return [(float(x), float(w)) for x, w in found]


def circles(picture: Picture) -> list[tuple[float, float, float]]:
    found = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)" r="([\d.]+)"', picture.svg)
    return [(float(x), float(y), float(r)) for x, y, r in found]


def test_bars_are_as_long_as_their_values() -> None:
    picture = drawings.bars("A", [("all", 100.0, "100"), ("half", 50.0, "50"), ("none", 0.0, "0")], x="rows")
    assert picture is not None
    (x, whole), (_, half), (_, none) = rects(picture)
    assert half == pytest.approx(whole / 2, abs=0.2)
    assert none < 1
    assert {x for x, _ in rects(picture)} == {x}
    assert picture.told == "all 100; half 50; none 0"
    assert ElementTree.fromstring(picture.svg).attrib["role"] == "img"


def test_bars_begin_at_a_level_and_go_to_both_sides() -> None:
    picture = drawings.bars("A", [("slow", 0.5, "0.5x"), ("fast", 2.0, "2x")], x="speed", level=1.0)
    assert picture is not None
    (slow, width), (fast, _) = rects(picture)
    assert slow + width == pytest.approx(fast, abs=0.2)


def test_bars_of_nothing_and_of_no_numbers() -> None:
    assert drawings.bars("A", [], x="rows") is None
    assert drawings.bars("A", [("a", math.nan, "?")], x="rows") is None
    assert drawings.bars("A", [("a", 0.0, "0")], x="rows") is not None
    long = drawings.bars("A", [("an endless name " * 9, 1.0, "1")], x="rows")
    assert long is not None
    assert "…" in long.svg


def test_shares_fill_the_row() -> None:
    picture = drawings.shares("A", {"one": {"a": 3.0, "b": 1.0}, "two": {"b": 5.0}, "three": {}, "four": {"a": 0}}, "s")
    assert picture is not None
    (x1, a), (x2, b), (x3, whole) = rects(picture)
    assert (x2, x3) == (pytest.approx(x1 + a, abs=0.2), x1)
    assert a == pytest.approx(3 * b, abs=0.3)
    assert whole == pytest.approx(a + b, abs=0.2)
    assert "a 75% (3 s)" in picture.told
    assert [key.name for key in picture.keys] == ["a", "b"]
    assert drawings.shares("A", {"one": {}}) is None
    alone = drawings.shares("A", {"one": {"a": 3.0, "b": 1.0}}, "s")
    assert alone is not None
    assert [key.name for key in alone.keys] == ["a, 3 s", "b, 1 s"]


def test_reliability_puts_true_chances_on_the_diagonal() -> None:
    curve = [{"count": n, "predicted": p, "accepted": p} for n, p in ((100, 0.2), (25, 0.8))]
    picture = drawings.reliability("A", {"curve": curve})
    assert picture is not None
    level = re.search(r'class="level" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', picture.svg)
    assert level is not None
    x0, y0, x1, y1 = map(float, level.groups())
    for x, y, _ in circles(picture):
        assert (y - y0) / (y1 - y0) == pytest.approx((x - x0) / (x1 - x0), abs=0.01)
    (_, _, large), (_, _, small) = circles(picture)
    assert large > small
    assert drawings.reliability("A", {"curve": []}) is None


def test_a_chain_goes_from_left_to_right_and_a_tree_from_above() -> None:
    chain = drawings.tree("A", {(0,): 0.9, (0, 0): 0.5})
    wide = drawings.tree("A", {(0,): 0.6, (1,): 0.2, (2,): 0.1, (0, 0): 0.4})
    assert chain is not None
    assert wide is not None
    xs, ys, radii = zip(*circles(chain), strict=True)
    assert list(xs) == sorted(xs)
    assert len(set(ys)) == 1
    assert radii[1] > radii[2]
    assert sorted({y for _, y, _ in circles(wide)}) == [18, 68, 118]
    assert "90%" in chain.svg
    assert "3 nodes, 2 deep" in chain.told
    assert drawings.tree("A", {}) is None


def test_of_a_large_tree_the_likeliest_nodes_are_drawn_with_all_above_them() -> None:
    share = {(n,): 0.0 for n in range(100)} | {(99, k): 0.5 for k in range(10)}
    picture = drawings.tree("A", share)
    assert picture is not None
    assert len(circles(picture)) <= drawings.NODES + 2
    assert picture.svg.count('class="edge"') == len(circles(picture)) - 1
    assert "are not drawn" in picture.told


def test_a_shape_without_shares_tells_none() -> None:
    picture = drawings.tree("A", {(0,): 0.0, (1,): 0.0}, known=False)
    assert picture is not None
    assert "%" not in picture.svg
