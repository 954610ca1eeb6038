"""From data to points: axes, ticks, thinning, what cannot be drawn."""

import itertools
import math
import random
import re
from xml.etree import ElementTree

import pytest

from draftsmith.reporting import curves
from draftsmith.reporting.curves import HEIGHT, LEFT, RIGHT, WIDTH, Axis, Line

WHAT = {"x": "step", "y": "loss"}


def places(svg: str, kind: str = "line") -> list[list[tuple[float, float]]]:
    """The points of every path of this class."""
    paths = re.findall(rf'<path class="{kind}[^"]*" d="M([^"]*)"', svg)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]  # type: ignore[misc]


def test_an_axis_maps_its_ends_and_what_lies_between() -> None:
    assert [Axis(0, 10, 100, 200)(n) for n in (0, 5, 10)] == [100, 150, 200]
    assert [Axis(1, 100, 0, 10, log=True)(n) for n in (1, 10, 100)] == pytest.approx([0, 5, 10])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 17.2), (-3, 8), (1e-6, 4e-3), (2000, 2010), (0, 123456)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = curves.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= n <= high + 1e-9 for n in found)
    steps = {f"{b - a:.6e}" for a, b in itertools.pairwise(found)}
    assert len(steps) == 1
    assert steps.pop()[0] in "125"


def test_ticks_of_one_value_and_of_decades() -> None:
    assert curves.ticks(3, 3) == [3]
    assert curves.decades(0.4, 25) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert curves.decades(1e-4, 1e4) == pytest.approx([10.0**p for p in range(-4, 5)])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (3.0, "3"), (1200.0, "1,200"), (0.25, "0.25"), (4e-5, "4e-05"), (2.5e7, "2.5e+07")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert curves.number(value) == text


def test_thinning_keeps_ends_order_and_every_spike() -> None:
    rng = random.Random(0)
    points = [(float(n), rng.random()) for n in range(10_000)]
    points[4321], points[7000] = (4321.0, 50.0), (7000.0, -50.0)
    found = curves.thin(points)
    assert len(found) <= curves.MOST
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert found == sorted(found)
    assert set(found) <= set(points)
    assert {points[4321], points[7000]} <= set(found)
    assert curves.thin(points[:50]) == points[:50]


def test_a_line_lies_where_its_values_are() -> None:
    picture = curves.lines("A", [Line("one", [(0, 0.0), (5, 1.0), (10, 0.5)])], **WHAT, floor=0.0)
    assert picture is not None
    ((first, middle, last),) = places(picture.svg)
    assert (first[0], last[0]) == (LEFT, WIDTH - RIGHT)
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert first[1] == HEIGHT - curves.BELOW  # the floor
    assert middle[1] < last[1] < first[1]  # up is less
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)
    assert "one from 0 to 0.5" in picture.told


def test_what_is_no_number_is_left_out_and_counted() -> None:
    points = [(1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0)]
    picture = curves.lines("A", [Line("one", points)], **WHAT)
    assert picture is not None
    assert len(places(picture.svg)[0]) == 2
    assert "nan" not in picture.svg
    assert "2 values that are no finite numbers" in picture.told
    assert curves.lines("A", [Line("one", [(1.0, math.nan)]), Line("none", [])], **WHAT) is None


@pytest.mark.parametrize(
    "points", [[(1.0, 0.0)], [(1.0, 7.0), (2.0, 7.0)], [(1.0, -1.0), (2.0, -2.0)], [(3.0, 1e-300)]]
)
def test_few_and_equal_values_are_drawn_too(points: list[tuple[float, float]]) -> None:
    picture = curves.lines("A", [Line("one", points)], **WHAT, log=True)
    assert picture is not None
    assert len(re.findall('class="mark', picture.svg)) == len(points)
    assert "nan" not in picture.svg


def test_a_wide_loss_is_drawn_over_a_logarithm_and_a_narrow_one_not() -> None:
    wide, narrow = (
        curves.lines("A", [Line("one", [(0.0, 100.0), (1.0, 10.0), (2.0, low)])], **WHAT, log=True)
        for low in (1.0, 90.0)
    )
    assert wide is not None
    assert narrow is not None
    (first, middle, last), *_ = places(wide.svg)
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.2)
    low, high = (curves.lines("A", [Line("o", [(0, 9.0), (1, end)])], **WHAT, log=True) for end in (8.0, -1.0))
    assert low is not None
    assert high is not None  # a negative value has no logarithm


def test_lines_are_told_apart_without_colour_and_pictures_by_their_words() -> None:
    drawn = [Line("<a>", [(0, 1.0), (1, 2.0)], 0), Line("b", [(0, 2.0), (1, 1.0)], 1, hollow=True)]
    picture = curves.lines("T & co", drawn, **WHAT, names=["here", "there"], level=1.5)
    assert picture is not None
    shapes = set(re.findall(r'class="mark[^"]*" transform="[^"]*" d="([^"]*)"', picture.svg))
    assert len(shapes) == 2
    assert "<a>" not in picture.svg
    root = ElementTree.fromstring(picture.svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"].startswith("T & co: loss over step")
    assert {"here", "there"} <= {e.text for e in root.iter("text")}
    assert [(k.name, k.hollow) for k in picture.keys] == [("<a>", False), ("b", True)]
    assert all(ElementTree.fromstring(k.mark) is not None for k in picture.keys)


def test_ten_thousand_points_are_a_small_picture() -> None:
    points = [(float(n), math.sin(n)) for n in range(10_000)]
    picture = curves.lines("A", [Line("one", points)], **WHAT)
    assert picture is not None
    assert len(picture.svg) < 8_000
    assert curves.lines("A", [Line("one", points)], **WHAT) == picture  # the same bytes again
