"""Heads side by side: one table, as Markdown and for a terminal, and one picture of three panels.

The picture is SVG or PNG by its file's suffix; equal entries give equal bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from draftsmith import artifacts

# Okabe and Ito's colours without the yellow, which fades on white: told apart by colour-blind eyes, and by marker.
LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#333333", "X"),
)
INK, QUIET, GRID = "#222222", "#666666", "#e6e6e6"
STYLE: Any = {
    "svg.hashsalt": "draftsmith",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": QUIET,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Entry:
    """One head. training_cost: a training step over the base's forward on the same batch; None: not measured.
    tokens_per_step: one value per seed. speedup: batch size -> (measured, predicted), None where not known."""

    name: str
    parameters: int
    training_cost: float | None
    tokens_per_step: list[float]
    acceptance_by_depth: list[float]
    speedup: dict[int, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.mean(self.tokens_per_step)


def entries(
    heads: Mapping[str, Any],
    costs: Mapping[str, float] | None = None,
    more_seeds: Mapping[str, Sequence[float]] | None = None,
) -> list[Entry]:
    """From the part `heads` of evaluation.json. more_seeds: tokens per step of the same head trained with others."""
    return [
        Entry(
            name,
            h["parameters"],
            (costs or {}).get(name),
            [h["tokens_per_step"], *(more_seeds or {}).get(name, [])],
            h["acceptance_by_depth"],
            {1: (h["speedup"], h["terms"].get("predicted_speedup"))}
            | {int(n): (b["speedup"], b["predicted_speedup"]) for n, b in h.get("by_batch", {}).items()},
        )
        for name, h in heads.items()
    ]


def ranked(heads: Sequence[Entry]) -> list[Entry]:
    """The most tokens per step first."""
    return sorted(heads, key=lambda e: (-e.mean, e.name))


def markdown(heads: Sequence[Entry]) -> str:
    header, rows = _cells(heads)
    rule = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows)) + f"\n{_caption(header)}\n"


def text(heads: Sequence[Entry]) -> str:
    """The same for a terminal."""
    header, rows = _cells(heads)
    return f"{aligned(header, rows)}\n{_caption(header)}"


def runs(made: Sequence[Mapping[str, Any]]) -> str:
    """Every training run of a bake-off, for a terminal: what it was given and what became of it."""
    header = ["run", "lr", "seed", "steps", "CPU-seconds", "tokens/step, selection (* chosen)"]
    rows = [
        [r["head"], f"{r['lr']:g}", str(r["seed"]), f"{r['steps']:,}", f"{r['cpu_seconds']:.1f}", _became(r)]
        for r in made
    ]
    return aligned(header, rows)


def _became(run: Mapping[str, Any]) -> str:
    if run["failed"]:
        return "failed"
    return f"{run['tokens_per_step']:.3f}{' *' if run['chosen'] else ''}"


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in (header, *rows)]
    return "\n".join("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]).rstrip() for line in lines)


def write(folder: Path, heads: Sequence[Entry], suffixes: Sequence[str] = ("svg",)) -> str:
    """leaderboard.md and the pictures in `folder`; the line that tells of them."""
    return page(folder / "leaderboard", markdown(heads), lambda path: picture(path, heads), suffixes)


def page(stem: Path, text: str, draw: Callable[[Path], None], suffixes: Sequence[str]) -> str:
    """stem.md and a picture per suffix, which draw(path) makes; the line that tells of them. Without matplotlib, no
    pictures. Raises ResourceError where nothing can be written."""
    with artifacts.disk(stem.parent, f"{stem.name}.md"):
        stem.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(stem.with_name(f"{stem.name}.md"), text.encode())
    if find_spec("matplotlib") is None:
        return f"-> {stem}.md; for the picture: pip install 'draftsmith[plots]'"
    for suffix in suffixes:
        with artifacts.whole(stem.with_name(f"{stem.name}.{suffix}")) as path:
            draw(path)
    return f"-> {stem}.{{{','.join(['md', *suffixes])}}}"


def _cells(heads: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, best first; columns that nobody fills are left out."""
    sizes = sorted({n for e in heads for n in e.speedup})
    columns = {
        "head": [e.name for e in ranked(heads)],
        "parameters": [f"{e.parameters:,}" for e in ranked(heads)],
        "step cost": ["" if e.training_cost is None else f"{e.training_cost:.2f}" for e in ranked(heads)],
        "tokens/step": [f"{e.mean:.3f}" for e in ranked(heads)],
        "seeds": [_range(e.tokens_per_step) for e in ranked(heads)],
        "acceptance by depth": [" ".join(f"{a:.2f}" for a in e.acceptance_by_depth) for e in ranked(heads)],
        **{f"batch {n}": [_pair(*e.speedup.get(n, (None, None))) for e in ranked(heads)] for n in sizes},
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _caption(header: Sequence[str]) -> str:
    """What the columns that are there mean."""
    told = {
        "step cost": "a training step over the base's forward",
        "seeds": "how many, and the range of tokens/step, which is their mean",
        "batch": "speedup over no head, measured (predicted), of batches of so many prompts",
    }
    shown = {"batch" if name.startswith("batch") else name for name in header}
    return "; ".join(f"{name}: {what}" for name, what in told.items() if name in shown)


def _range(values: Sequence[float]) -> str:
    """How many seeds and how far apart; nothing for a single one."""
    return f"{len(values)}: {min(values):.3f}–{max(values):.3f}" if len(values) > 1 else ""


def _pair(measured: float | None, predicted: float | None) -> str:
    told = "" if measured is None else f"{measured:.2f}x"
    return told if predicted is None else f"{told} ({predicted:.2f})".strip()


def picture(path: Path, heads: Sequence[Entry]) -> None:
    """Three panels: tokens per step, acceptance by depth, speedup by batch size."""
    import matplotlib
    from matplotlib.figure import Figure

    best_first = ranked(heads)
    names = sorted(e.name for e in heads)  # a head keeps its look when ranks change
    looks = {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(names)}
    width, height = 13.0, max(3.4, 1.5 + 0.32 * len(best_first))
    left = 0.25 + 0.08 * max(len(e.name) for e in best_first)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")
        gap, right, below, above = 0.85, 0.15, 0.72, 0.45  # inches; a solver's layout would not repeat to the bit
        panel = (width - left - right - 2 * gap) / 3
        for n, draw in enumerate((_tokens_per_step, _acceptance, _speedup)):
            x = (left + n * (panel + gap)) / width
            axes = figure.add_axes((x, below / height, panel / width, 1 - (below + above) / height))
            draw(axes, best_first, looks)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


def _tokens_per_step(axes: Any, heads: Sequence[Entry], looks: Mapping[str, tuple[str, str]]) -> None:
    """Bars from 1, which is plain decoding, with the value at the end; a dot for every seed."""
    axes.set_title("Tokens per step")
    most = max(max(e.tokens_per_step) for e in heads)
    room = (most - 1) * 0.17 or 0.2
    for row, e in enumerate(heads):
        colour, _ = looks[e.name]
        axes.barh(row, e.mean - 1, left=1, height=0.62, color=colour, linewidth=0)
        if len(e.tokens_per_step) > 1:
            rows = [row] * len(e.tokens_per_step)
            axes.plot(e.tokens_per_step, rows, "o", ms=4.5, mfc="white", mec=INK, mew=0.9, ls="", clip_on=False)
        axes.text(max(e.tokens_per_step) + room * 0.16, row, f"{e.mean:.2f}", va="center", color=INK)
    axes.set_yticks(range(len(heads)), [e.name for e in heads], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(heads), 4) - 0.5, -0.5)
    axes.set_xlim(1, most + room)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)
    several = max(len(e.tokens_per_step) for e in heads) > 1
    axes.set_xlabel("mean over seeds (a dot each); 1 = no head" if several else "1 = no head")


def _acceptance(axes: Any, heads: Sequence[Entry], looks: Mapping[str, tuple[str, str]]) -> None:
    axes.set_title("Acceptance by depth")
    deepest = max((len(e.acceptance_by_depth) for e in heads), default=1)
    for e in heads:
        colour, marker = looks[e.name]
        depths = range(1, len(e.acceptance_by_depth) + 1)
        axes.plot(depths, e.acceptance_by_depth, color=colour, marker=marker, ms=5, lw=1.6)
    last = {e.name: (len(e.acceptance_by_depth), e.acceptance_by_depth[-1]) for e in heads if e.acceptance_by_depth}
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlabel("depth of the drafted token")
    axes.set_ylabel("accepted, if the one before was")
    axes.grid(axis="y", color=GRID)
    _names(axes, last, looks, 1, deepest)


def _speedup(axes: Any, heads: Sequence[Entry], looks: Mapping[str, tuple[str, str]]) -> None:
    """Batch sizes at equal distances: they are usually powers."""
    axes.set_title("Speedup by batch size")
    sizes = sorted({n for e in heads for n in e.speedup})
    last: dict[str, tuple[float, float]] = {}
    for e in heads:
        colour, marker = looks[e.name]
        for which, style in ((1, {"ls": (0, (3, 2)), "lw": 1.1, "alpha": 0.8}), (0, {"marker": marker, "lw": 1.6})):
            known = [(sizes.index(n), both[which]) for n, both in sorted(e.speedup.items())]
            points = [(x, y) for x, y in known if y is not None]
            if points:
                alone = {"marker": marker, "mfc": "white"} if which and len(sizes) == 1 else {}
                axes.plot(*zip(*points, strict=True), color=colour, ms=5, **{**style, **alone})
                last[e.name] = points[-1]
    axes.axhline(1, color=QUIET, lw=0.8)
    axes.set_xticks(range(len(sizes)), [str(n) for n in sizes])
    measured, predicted = ("filled", "hollow") if len(sizes) == 1 else ("solid", "dashed")
    axes.set_xlabel(f"prompts decoded together\n{measured} measured, {predicted} predicted")
    axes.set_ylabel("tokens per second over no head")
    axes.grid(axis="y", color=GRID)
    _names(axes, last, looks, 0, max(0, len(sizes) - 1))


def _names(
    axes: Any,
    last: Mapping[str, tuple[float, float]],
    looks: Mapping[str, tuple[str, str]],
    first: float,
    end: float,
) -> None:
    """Each line's name in the right margin, level with its last point where there is room, tied to it."""
    if not last:
        return
    width = (end - first) or 1
    axes.set_xlim(first - 0.06 * width, end + 0.42 * width)
    low, high = axes.get_ylim()
    order = sorted(last, key=lambda name: last[name][1])
    places = spread([last[name][1] for name in order], gap=(high - low) * 0.062, low=low, high=high)
    for name, place in zip(order, places, strict=True):
        x, y = last[name]
        colour, _ = looks[name]
        axes.plot([x + 0.03 * width, end + 0.09 * width], [y, place], color=colour, lw=0.6, alpha=0.7, clip_on=False)
        axes.text(end + 0.105 * width, place, name, color=colour, va="center", fontweight="bold", fontsize=8.5)
    axes.set_ylim(low, high)


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Ascending places moved as little as a sweep up and one down need, so that neighbours are `gap` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low + gap / 2))
    limit = high - gap / 2
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved
