"""Lines over a pair of axes, as SVG written by hand: no picture library, a few kilobytes, and colours from the page's
style sheet, so that light, dark and paper need one picture. Equal points give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from draftsmith.reporting.leaderboard import LOOKS

Point = tuple[float, float]

WIDTH, HEIGHT = 460.0, 250.0
LEFT, RIGHT, ABOVE, BELOW = 46.0, 14.0, 24.0, 38.0
MOST = 240  # points of a line; a screen shows no more
MARKS = 9  # of a line, to tell it from others without colour
WIDE = 8.0  # from so many times its smallest value on, a loss is drawn over a logarithm

SHAPES = {
    "o": "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "s": "M-3.3-3.3h6.6v6.6h-6.6z",
    "^": "M0-4.3l4.1 7.4h-8.2z",
    "D": "M0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z",
    "v": "M0 4.3l4.1-7.4h-8.2z",
    "P": "M-1.5-4.2h3v2.7h2.7v3h-2.7v2.7h-3v-2.7h-2.7v-3h2.7z",
    "X": "M0-1.8l2.4-2.4l1.8 1.8l-2.4 2.4l2.4 2.4l-1.8 1.8l-2.4-2.4l-2.4 2.4l-1.8-1.8l2.4-2.4l-2.4-2.4l1.8-1.8z",
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend. hollow: dashed, with hollow marks. area: a part of a bar, not a line."""

    name: str
    look: int
    hollow: bool = False
    area: bool = False

    @property
    def mark(self) -> str:
        return mark(self.look, 9, 6, self.hollow)


@dataclass(frozen=True)
class Picture:
    """told: what the picture shows, for those who do not see it and for report.md."""

    title: str
    svg: str
    told: str
    keys: list[Key] = field(default_factory=list)
    kind: str = "picture"


@dataclass(frozen=True)
class Line:
    """look: which of LOOKS. hollow: dashed, with hollow marks, for what is not measured on training data."""

    name: str
    points: Sequence[Point]
    look: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """From data to the picture: `low` lies at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        return decades(self.low, self.high) if self.log else ticks(self.low, self.high)


def finite(points: Sequence[Point]) -> list[Point]:
    """Without what is no number or no finite one."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most so many points, in order, the first and the last among them: of every stretch the lowest and the highest,
    so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    inner = points[1:-1]
    kept = [points[0]]
    for n in range(stretches):
        part = range(n * len(inner) // stretches, (n + 1) * len(inner) // stretches)
        ends = {min(part, key=lambda i: inner[i][1]), max(part, key=lambda i: inner[i][1])}
        kept += [inner[i] for i in sorted(ends)]
    return [*kept, points[-1]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between the two: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the two; the powers alone where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return found if len(found) <= 7 else [n for n in found if f"{n:e}".startswith("1.")]


def number(value: float) -> str:
    """Short: 0.25, 3, 1,200, 4e-05."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def mark(look: int, x: float, y: float, hollow: bool = False, title: str = "") -> str:
    shape = SHAPES[LOOKS[look % len(LOOKS)][1]]
    told = f"<title>{escape(title)}</title>" if title else ""
    kind = "mark hollow" if hollow else "mark"
    return f'<path class="{kind} c{look % len(LOOKS)}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{told}</path>'


def words(x: float, y: float, text: str, how: str = "") -> str:
    """how: classes of the text, as "end" or "middle"."""
    return f'<text class="{how}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def drawn(body: Sequence[str], title: str, told: str, height: float = HEIGHT, width: float = WIDTH) -> str:
    """The picture's frame, with its name and its description for a screen reader."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}: {escape(told)}">'
        f"{''.join(body)}</svg>"
    )


def lines(
    title: str,
    drawn_lines: Sequence[Line],
    *,
    x: str,
    y: str,
    log: bool = False,
    floor: float | None = None,
    level: float | None = None,
    names: Sequence[str] | None = None,
) -> Picture | None:
    """The lines over common axes; None if none has a point that can be drawn. x, y: what the axes are. log: over a
    logarithm, where the values are positive and far apart. floor: a value that the y axis begins at or below. level: a
    value marked across. names: of the places 0, 1, … on the x axis, instead of numbers."""
    held = [(one, finite(one.points)) for one in drawn_lines]
    shown = [(one, thin(points)) for one, points in held if points]
    if not shown:
        return None
    log = log and min(p[1] for _, pts in shown for p in pts) > 0
    across, up = _axes([points for _, points in shown], log, floor, level, names)
    body = [_grid(across, up, x, y, names)]
    if level is not None:
        body.append(f'<path class="level" d="M{LEFT} {up(level):.1f}H{WIDTH - RIGHT}"/>')
    body += [_line(one, points, across, up) for one, points in shown]
    lost = sum(len(one.points) for one, _ in held) - sum(len(points) for _, points in held)
    told = "; ".join(
        f"{one.name} from {number(points[0][1])} to {number(points[-1][1])}" if len(points) > 1
        else f"{one.name} {number(points[0][1])}"
        for one, points in shown
    )  # fmt: skip
    told += f"; {lost} values that are no finite numbers are left out" if lost else ""
    keys = [Key(one.name, one.look, one.hollow) for one, _ in shown]
    return Picture(title, drawn(body, title, f"{y} over {x}. {told}"), told, keys)


def _axes(
    lists: Sequence[Sequence[Point]], log: bool, floor: float | None, level: float | None, names: Sequence[str] | None
) -> tuple[Axis, Axis]:
    xs, ys = [p[0] for points in lists for p in points], [p[1] for points in lists for p in points]
    left, right = (-0.3, len(names) - 0.7) if names else (min(xs), max(xs))
    if left == right:
        left, right = left - 0.5, right + 0.5
    ys += [n for n in (floor, level) if n is not None and not log]
    low, high = min(ys), max(ys)
    if log and high / low < WIDE:
        log = False
    if log:
        low, high = low / 1.08, high * 1.08
    elif low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    else:
        room = 0.06 * (high - low)
        low, high = (low if low == floor else low - room), high + room
    return Axis(left, right, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BELOW, ABOVE, log)


def _grid(across: Axis, up: Axis, x: str, y: str, names: Sequence[str] | None) -> str:
    body = []
    for n in up.ticks:
        at = up(n)
        body.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>{words(LEFT - 6, at + 4, number(n), "end")}'
        )
    places = list(enumerate(names)) if names else [(n, number(n)) for n in across.ticks]
    whole = [(n, name) for n, name in places if names or across.low <= n <= across.high]
    for n, name in whole:
        body.append(words(across(n), HEIGHT - BELOW + 16, name, "middle"))
    body.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BELOW}H{WIDTH - RIGHT}"/>')
    body.append(words(LEFT - 40, 12, y, "what"))
    body.append(words(WIDTH - RIGHT, HEIGHT - 6, x, "what end"))
    return "".join(body)


def _line(one: Line, points: Sequence[Point], across: Axis, up: Axis) -> str:
    places = [(across(x), up(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    kind = "line hollow" if one.hollow else "line"
    body = [f'<path class="{kind} c{one.look % len(LOOKS)}" d="{path}"/>'] if len(points) > 1 else []
    every = max(1, math.ceil((len(points) - 1) / MARKS)) if len(points) > MARKS else 1
    for n in sorted({*range(0, len(points), every), len(points) - 1}):
        (x, y), (px, py) = points[n], places[n]
        body.append(mark(one.look, px, py, one.hollow, f"{one.name}: {number(y)} at {number(x)}"))
    return "".join(body)
