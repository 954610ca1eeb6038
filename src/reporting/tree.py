"""The tree that draftsmith tune chose: how often a step keeps each node, and how it stands among the others; for a
terminal, as Markdown, and as a picture of two panels. Equal results give equal bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.reporting.leaderboard import GRID, INK, LOOKS, QUIET, STYLE, page

Path_ = tuple[int, ...]
SHOWN = 32  # nodes and rows for a terminal
BLUE, ORANGE, GREEN = (colour for colour, _ in LOOKS[:3])
KINDS = {
    "chain": ("chains", *LOOKS[2]),
    "static": ("grown from counts", *LOOKS[0]),
    "eagle2": ("likeliest, EAGLE-2", *LOOKS[3]),
}


def text(name: str, found: Mapping[str, Any]) -> str:
    """For a terminal: the trees that were timed at length, what was measured of them, and the chosen one's nodes."""
    header, rows = _cells(found, [row for row in found["table"] if row["timed_again"]])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in (header, *rows)
    ]
    return "\n".join([*lines, *(f"{name}: {line}" for line in verdict(found)), *drawn(found)])


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What was found, in words. promised: on the prompts that chose the tree; predicted: on the others, from what would
    be kept there and the same costs."""
    predicted, measured = found["predicted_speedup"], found["measured_speedup"]
    within, passes = found["measured_interval"], found["measured_speedups"]
    spread = f" ({within[0]:.2f} to {within[1]:.2f} at 95 %)" if within else ""
    lines = [
        f"{len(found['table'])} trees tried on {found['chosen_on']} prompts, the best measured on"
        f" {found['measured_on']} others",
        f"{found['name']} ({found['nodes']} nodes, {found['depth']} deep) predicted {predicted:.2f}x, measured"
        f" {measured:.2f}x ({predicted / measured - 1:+.1%}; {min(passes):.2f} to {max(passes):.2f} in {len(passes)}"
        f" passes); tokens per step {found['measured_tokens_per_step']:.2f}"
        f"{spread}, {found['promised_tokens_per_step']:.2f} on the prompts that chose it",
    ]
    for what, other in (("the best published tree", found["published"]), ("the chain", found["chain"])):
        if other is not None and other["name"] != found["name"]:
            over = [one / theirs for one, theirs in zip(passes, other["measured_speedups"], strict=True)]
            lines.append(
                f"{statistics.median(over):.2f} times as fast as {what}, {other['name']}"
                f" ({min(over):.2f} to {max(over):.2f})"
            )
    if found["promised_speedup"] < 1:
        lines.append(
            "no tree beats plain decoding here: decode without this head, or tune where a base's step costs more"
        )
    return lines


def drawn(found: Mapping[str, Any]) -> list[str]:
    """The chosen tree line by line, with the share of steps that keep each node; #1 is the drafter's best token."""
    shares = found["shares"]
    if not shares or "path" not in shares[0]:
        return [f"depth {s['depth']}: {s['share']:.1%} of the steps keep a draft" for s in shares]
    share: dict[Path_, float] = {tuple(s["path"]): s["share"] for s in shares}
    likeliest = sorted(share, key=lambda path: (-share[path], len(path), path))[:SHOWN]
    lines = ["root"]

    def below(path: Path_, indent: str) -> None:
        children = sorted(p for p in likeliest if p[:-1] == path)
        for child in children:
            last = child == children[-1]
            lines.append(f"{indent}{'└─' if last else '├─'} #{child[-1] + 1} {share[child]:.1%}")
            below(child, indent + ("   " if last else "│  "))

    below((), "")
    left = [share[path] for path in share if path not in likeliest]
    return [*lines, f"… and {len(left)} more, {max(left):.1%} or less each"] if left else lines


def markdown(name: str, found: Mapping[str, Any]) -> str:
    """All that were tried, the verdict, and the tree."""
    header, rows = _cells(found, found["table"])
    rule = ["---", *("---:" for _ in header[1:])]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
    told = "\n".join(f"- {line}" for line in verdict(found))
    lines = "\n".join(drawn(found))
    return f"# The tree of {name}\n\n{told}\n\n```\n{lines}\n```\n\n{table}"


def write(folder: Path, name: str, found: Mapping[str, Any]) -> str:
    """tree_<name>.md and the pictures in the folder; the line that tells of them."""
    return page(folder / f"tree_{name}", markdown(name, found), lambda path: picture(path, name, found), ("svg", "png"))


def _cells(found: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; what was to be expected on the other prompts, and was measured there, of those that were."""
    compared = {one["name"]: one for one in (found, found["chain"], found["published"]) if one}
    header = ["tree", "nodes", "depth", "tokens/step", "ms/step", "tokens/s", "promised", "predicted", "measured"]
    rows = []
    for row in table:
        own = compared.get(row["name"])
        there = [f"{own[f'{part}_speedup']:.2f}x" if own else "" for part in ("predicted", "measured")]
        rows.append(
            [
                f"{row['name']}{' *' if row['name'] == found['name'] else ''}",
                str(row["nodes"]),
                str(row["depth"]),
                f"{row['tokens_per_step']:.2f}",
                f"{1e3 * row['seconds_per_step']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['speedup']:.2f}x",
                *there,
            ]
        )
    return header, rows


def picture(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Left the chosen tree, a node's size the share of steps that keep it; right every tree's speedup by its size."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9), facecolor="white")
        left = figure.add_axes((0.02, 0.04, 0.52, 0.82))
        right = figure.add_axes((0.62, 0.15, 0.36, 0.71))
        _tree(left, name, found)
        _sizes(right, found)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


def places(paths: Sequence[Path_]) -> dict[Path_, tuple[float, int]]:
    """(x, depth) of every node and the root: leaves side by side in the order of their ranks, a parent above the middle
    of its children."""
    found: dict[Path_, tuple[float, int]] = {}
    children: dict[Path_, list[Path_]] = {}
    for path in sorted(paths):
        children.setdefault(path[:-1], []).append(path)
    leaves = 0

    def put(path: Path_) -> float:
        nonlocal leaves
        below = [put(child) for child in children.get(path, [])]
        if not below:
            leaves += 1
        found[path] = (sum(below) / len(below) if below else float(leaves - 1), len(path))
        return found[path][0]

    put(())
    return found


def _tree(axes: Any, name: str, found: Mapping[str, Any]) -> None:
    shares = found["shares"]
    moving = bool(shares) and "path" not in shares[0]
    share: dict[Path_, float] = {tuple(s["path"]) if not moving else (0,) * s["depth"]: s["share"] for s in shares}
    spots = places(list(share))
    axes.set_title(f"{name}: {found['name']}" + (", another tree at every step" if moving else ""))
    for path, (x, depth) in spots.items():
        if path:
            above = spots[path[:-1]]
            axes.plot([above[0], x], [-above[1], -depth], color="#bbbbbb", lw=0.6 + 2.4 * share[path], zorder=1)
    nodes = [path for path in spots if path]
    axes.scatter(
        [spots[p][0] for p in nodes],
        [-spots[p][1] for p in nodes],
        s=[10 + 420 * share[p] for p in nodes],
        color=BLUE,
        zorder=2,
        linewidths=0,
    )
    axes.scatter([spots[()][0]], [0], s=430, color=INK, zorder=2, linewidths=0)
    for path in nodes:
        x, depth = spots[path]
        if share[path] >= 0.12:
            axes.text(x, -depth, f"{share[path]:.0%}", ha="center", va="center", color="white", fontsize=6.5, zorder=3)
    wide = max(x for x, _ in spots.values())
    axes.set_xlim(-0.08 * wide - 0.6, 1.08 * wide + 0.6)
    axes.set_ylim(-max(d for _, d in spots.values()) - 0.5, 0.4)
    axes.axis("off")
    what = "some draft of that depth" if moving else "it"
    axes.text(
        0.0, 0.0, f"size and figure: share of steps that keep {what}", transform=axes.transAxes, color=QUIET, fontsize=8
    )


def _sizes(axes: Any, found: Mapping[str, Any]) -> None:
    """Of trees of one kind and size the fastest; those that were measured with a ring, the chosen one with a star."""
    axes.set_title("Promised speedup by size")
    for kind, (label, colour, marker) in KINDS.items():
        best: dict[int, float] = {}
        for row in found["table"]:
            if row["kind"] == kind and not row["published"]:
                best[row["nodes"]] = max(best.get(row["nodes"], 0.0), row["speedup"])
        if best:
            axes.plot(*zip(*sorted(best.items()), strict=True), color=colour, marker=marker, ms=4, lw=1.3, label=label)
    published = [row for row in found["table"] if row["published"]]
    if published:
        xs, ys = [row["nodes"] for row in published], [row["speedup"] for row in published]
        axes.plot(xs, ys, "x", color=LOOKS[1][0], ms=5, label="published")
    own = next(row for row in found["table"] if row["name"] == found["name"])
    axes.plot([own["nodes"]], [own["speedup"]], "*", color=INK, ms=11, label="chosen")
    axes.plot(
        [own["nodes"]],
        [found["measured_speedup"]],
        "o",
        mfc="none",
        mec=INK,
        ms=8,
        label="chosen, measured on other prompts",
    )
    axes.axhline(1, color=QUIET, lw=0.8, ls=":")
    axes.set_xlabel("nodes, the root included")
    axes.set_ylabel("over plain decoding")
    axes.grid(axis="y", color=GRID)
    axes.legend(fontsize=7.5, loc="best")
