"""Bars, shares of a whole, reliability curves and trees as SVG written by hand; see curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from draftsmith.reporting.curves import LOOKS, WIDTH, Axis, Key, Picture, Point, drawn, number, ticks, words
from draftsmith.reporting.tree import Path_, places

ROW, GAP = 24.0, 8.0  # of a bar
PARTS = (5, 4, 3, 2, 6, 1, 0)  # looks of a whole's parts, last those that name heads elsewhere
NODES = 40  # of a tree that is drawn; more are a smear
NAME = 7.2  # a letter's width, at most


def bars(
    title: str, rows: Sequence[tuple[str, float, str]], *, x: str, look: int = 0, level: float | None = None
) -> Picture | None:
    """Horizontal bars: (name, value, what stands behind its end). level: where they begin and a line is drawn; what is
    less goes to its left. None of nothing."""
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return None
    begin = 0.0 if level is None else level
    left = min(max(len(name) for name, _, _ in rows) * NAME + 12, WIDTH * 0.42)
    behind = max(len(told) for _, _, told in rows) * NAME + 10
    low, high = min([begin, *(v for _, v, _ in rows)]), max([begin, *(v for _, v, _ in rows)])
    high = high if high > low else low + 1.0
    height = 10 + len(rows) * (ROW + GAP) + 32
    across = Axis(low, high, left, WIDTH - behind)
    floor = 6 + len(rows) * (ROW + GAP)
    body = [f'<path class="grid" d="M{across(n):.1f} 4V{floor:.0f}"/>' for n in ticks(low, high, 4)]
    body += [words(across(n), floor + 14, number(n), "middle") for n in ticks(low, high, 4)]
    for n, (name, value, told) in enumerate(rows):
        top, at = 8 + n * (ROW + GAP), across(value)
        start, stop = sorted((across(begin), at))
        body.append(words(left - 8, top + ROW / 2 + 4, _short(name, left - 12), "end ink"))
        body.append(
            f'<rect class="bar c{look % len(LOOKS)}" x="{start:.1f}" y="{top:.1f}" width="{max(stop - start, 0.8):.1f}"'
            f' height="{ROW}" rx="2"><title>{escape(f"{name}: {told}")}</title></rect>'
        )
        body.append(words(stop + 6, top + ROW / 2 + 4, told, "ink"))
    body.append(f'<path class="level" d="M{across(begin):.1f} 4V{floor:.0f}"/>')
    body.append(words(WIDTH - 4, height - 4, x, "what end"))
    told = "; ".join(f"{name} {told}" for name, _, told in rows)
    return Picture(title, drawn(body, title, f"{x}: {told}", height), told)


def shares(title: str, rows: Mapping[str, Mapping[str, float]], unit: str = "") -> Picture | None:
    """One bar of full width a row, cut into its parts: row -> part -> amount. unit: of the amounts; none: only shares
    are told. None of nothing."""
    rows = {name: {k: v for k, v in parts.items() if v > 0} for name, parts in rows.items()}
    rows = {name: parts for name, parts in rows.items() if parts}
    if not rows:
        return None
    known = dict.fromkeys(p for parts in rows.values() for p in parts)
    looks = {part: PARTS[n % len(PARTS)] for n, part in enumerate(known)}
    left = min(max(len(name) for name in rows) * NAME + 12, WIDTH * 0.42)
    wide, body, said = WIDTH - left - 4, [], []
    for n, (name, parts) in enumerate(rows.items()):
        top, at, whole = 8 + n * (ROW + GAP), left, sum(parts.values())
        body.append(words(left - 8, top + ROW / 2 + 4, _short(name, left - 12), "end ink"))
        told = []
        for part, amount in parts.items():
            share, look = amount / whole, looks[part]
            told.append(f"{part} {share:.0%}" + (f" ({number(amount)} {unit})" if unit else ""))
            body.append(
                f'<rect class="bar part c{look}" x="{at:.1f}" y="{top}" width="{share * wide:.1f}" height="{ROW}">'
                f"<title>{escape(told[-1])}</title></rect>"
            )
            if share * wide > 34:
                body.append(words(at + share * wide / 2, top + ROW / 2 + 4, f"{share:.0%}", f"middle on{look}"))
            at += share * wide
        said.append(f"{name}: {', '.join(told)}")
    whole_told = "; ".join(said)
    alone = next(iter(rows.values())) if unit and len(rows) == 1 else {}
    keys = [
        Key(f"{part}, {number(alone[part])} {unit}" if part in alone else part, n, area=True)
        for part, n in looks.items()
    ]
    height = 12 + len(rows) * (ROW + GAP)
    return Picture(title, drawn(body, title, whole_told, height), whole_told, keys)


def reliability(title: str, told: Mapping[str, Any], look: int = 1) -> Picture | None:
    """Where the points lie on the diagonal, a gate's chances are true; a point's size says how many drafts it stands
    for. None where no draft was heard."""
    curve = told["curve"]
    if not curve:
        return None
    size, left, foot = 270.0, 46.0, 236.0
    across, up = Axis(0, 1, left, left + size), Axis(0, 1, foot, 22)
    body = []
    for n in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(f'<path class="grid" d="M{left} {up(n):.1f}H{left + size}M{across(n):.1f} {foot}V22"/>')
        body += [words(left - 6, up(n) + 4, number(n), "end"), words(across(n), foot + 15, number(n), "middle")]
    body.append(f'<path class="level" d="M{across(0)} {up(0)}L{across(1)} {up(1)}"/>')
    spots = [(across(c["predicted"]), up(c["accepted"])) for c in curve]
    body.append(f'<path class="line c{look}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}"/>')
    most = max(c["count"] for c in curve)
    for c, (x, y) in zip(curve, spots, strict=True):
        said = f"{c['count']:,} drafts: said {c['predicted']:.2f}, kept {c['accepted']:.2f}"
        body.append(
            f'<circle class="bar c{look}" cx="{x:.1f}" cy="{y:.1f}" r="{2.5 + 6 * math.sqrt(c["count"] / most):.1f}">'
            f"<title>{said}</title></circle>"
        )
    body.append(words(6, 12, "share kept", "what"))
    body.append(words(left + size, foot + 32, "predicted chance that a draft is kept", "what end"))
    said = "; ".join(f"said {c['predicted']:.2f}, kept {c['accepted']:.2f} of {c['count']:,}" for c in curve)
    return Picture(title, drawn(body, title, said, foot + 38), said)


def tree(title: str, share: Mapping[Path_, float], *, known: bool = True, look: int = 0) -> Picture | None:
    """Path of ranks -> how often a step keeps that node; the root stands above. known: false where only the shape is.
    Of more than NODES nodes the likeliest are drawn, with all above them. None of nothing."""
    if not share:
        return None
    likeliest = sorted(share, key=lambda path: (-share[path], len(path), path))[:NODES]
    kept = {path[:k] for path in likeliest for k in range(1, len(path) + 1)}
    spots = dict(sorted(places(sorted(kept)).items(), key=lambda spot: (len(spot[0]), spot[0])))
    at, height = _laid(spots)
    body = []
    for path, (x, y) in at.items():
        if path:
            above = at[path[:-1]]
            width = 0.8 + 3 * share.get(path, 0.0) if known else 1.2
            body.append(
                f'<path class="edge" stroke-width="{width:.1f}" d="M{above[0]:.1f} {above[1]:.1f}L{x:.1f} {y:.1f}"/>'
            )
    for path, (x, y) in at.items():
        own, room = share.get(path, 0.0), max(_room(path, at), 5.0)
        radius = 11.0 if not path else min(3 + 13 * math.sqrt(own), room / 2) if known else min(6, room / 2)
        name = f"rank {', '.join(str(rank + 1) for rank in path)}" if path else "the base's own token"
        said = f"{name}: kept in {own:.1%} of the steps" if path and known else name
        kind = f"bar c{look % len(LOOKS)}" if path else "root"
        body.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(said)}</title></circle>'
        )
        if path and known and radius >= 11:
            body.append(words(x, y + 4, f"{own:.0%}", f"middle small on{look % len(LOOKS)}"))
    left = len(share) - len(kept)
    told = f"{len(share) + 1} nodes, {max(map(len, share))} deep" + (
        f"; {left} seldom kept are not drawn" if left else ""
    )
    if known:
        first = max(share, key=lambda path: (share[path], -len(path)))
        told += f"; the likeliest is kept in {share[first]:.0%} of the steps"
    return Picture(title, drawn(body, title, told, height), told)


def _laid(spots: Mapping[Path_, tuple[float, int]]) -> tuple[dict[Path_, Point], float]:
    """Where the nodes lie and how high the picture is: from above to below, or what is deeper than wide from left to
    right."""
    wide, deep = max(x for x, _ in spots.values()), max(d for _, d in spots.values())
    if wide < deep:
        along, beside = Axis(0, deep, 24, WIDTH - 24), 40.0
        return {path: (along(depth), 22 + beside * x) for path, (x, depth) in spots.items()}, 44 + beside * wide
    across, below = Axis(0, wide, 24, WIDTH - 24), 50.0
    return {path: (across(x), 18 + below * depth) for path, (x, depth) in spots.items()}, 44 + below * deep


def _room(path: Path_, at: Mapping[Path_, Point]) -> float:
    """How far the nearest node of the same depth is."""
    x, y = at[path]
    others = [at[p] for p in at if len(p) == len(path) and p != path]
    return min((math.hypot(x - ox, y - oy) for ox, oy in others), default=40.0)


def _short(name: str, room: float) -> str:
    """As much of a name as there is room for."""
    letters = max(4, int(room / NAME) + 1)
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
