"""A sweep at a glance: one table, as Markdown and for a terminal, and one picture.

The picture tells what every trial came to and when the best was found, how each went while it trained, and what each
searched key did. It is SVG or PNG by its file's suffix; equal trials give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.reporting.leaderboard import GRID, INK, LOOKS, QUIET, STYLE, aligned, page

Trial = Mapping[str, Any]
"""number, state (complete, pruned, failed, running), head, params, value, steps, seconds; estimates: [step, value]."""

ACROSS = 3  # panels of searched keys side by side
WIDTH, PANEL, GAP, ABOVE, BELOW, LEFT, RIGHT = 13.0, 2.45, 0.85, 0.9, 0.72, 0.65, 0.25  # inches


def best(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the most tokens per step, the first of equals."""
    done = [t for t in trials if t["state"] == "complete"]
    return min(done, key=lambda t: (-t["value"], t["number"])) if done else None


def short(value: Any) -> str:
    """For eyes: four digits of a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if value in (True, False) else str(value)


def label(key: str) -> str:
    """A key without what goes without saying: optimizer.lr is lr, heads.medusa.num_heads is medusa.num_heads."""
    return key.removeprefix("heads.") if key.startswith("heads.") else key.rpartition(".")[2]


def searched(trials: Sequence[Trial]) -> list[str]:
    """Every key that some trial has a value of, in the order in which they came."""
    return list(dict.fromkeys(key for t in trials for key in t["params"] or {}))


def text(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    header, rows = _cells(result["trials"])
    return f"{aligned(header, rows)}\n{_caption(result)}"


def markdown(result: Mapping[str, Any]) -> str:
    header, rows = _cells(result["trials"])
    rule = ["---:"] * len(header)
    table = "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
    again = f"\n```bash\n{result['best']['command']}\n```\n" if result["best"] else ""
    return f"{table}\n{_caption(result)}\n{again}"


def write(folder: Path, result: Mapping[str, Any], suffixes: Sequence[str] = ("svg",)) -> str:
    """sweep.md and the pictures in `folder`; the line that tells of them."""
    return page(folder / "sweep", markdown(result), lambda path: picture(path, result), suffixes)


def _cells(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Header and a row per trial; the best one's value has a star."""
    keys, first = searched(trials), best(trials)
    header = ["trial", "head", *map(label, keys), "steps", "seconds", "tokens/step"]
    rows = [
        [
            str(t["number"]),
            t["head"] or "",
            *(short(t["params"][k]) if k in (t["params"] or {}) else "" for k in keys),
            f"{t['steps']:,}",
            "" if t["seconds"] is None else f"{t['seconds']:.0f}",
            f"{t['value']:.3f}{' *' if t is first else ''}" if t["state"] == "complete" else t["state"],
        ]
        for t in trials
    ]
    return header, rows


def _caption(result: Mapping[str, Any]) -> str:
    states = [t["state"] for t in result["trials"]]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("complete", "pruned", "failed", "running") if s in states)
    how = {"measured": "measured by decoding", "estimated": "as training estimates them"}[result["objective"]]
    return f"{len(states)} trials: {counts}; tokens/step {how}; * the best"


def picture(path: Path, result: Mapping[str, Any]) -> None:
    """Values by trial and estimates by step, and under them a panel for every searched key."""
    import matplotlib
    from matplotlib.figure import Figure

    trials = [t for t in result["trials"] if t["state"] != "running"]
    keys = searched(trials)
    heads = sorted({t["head"] for t in trials if t["head"]})
    looks = {head: LOOKS[i % len(LOOKS)] for i, head in enumerate(heads)}
    down = 1 + -(-len(keys) // ACROSS)
    height = ABOVE + down * PANEL + (down - 1) * (BELOW + 0.45) + BELOW
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")

        def panel(row: int, column: int, across: int) -> Any:
            wide = (WIDTH - LEFT - RIGHT - (across - 1) * GAP) / across  # fixed inches: a solver would not repeat
            x, y = LEFT + column * (wide + GAP), height - ABOVE - PANEL - row * (PANEL + BELOW + 0.45)
            return figure.add_axes((x / WIDTH, y / height, wide / WIDTH, PANEL / height))

        _values(panel(0, 0, 2), trials, looks, result["objective"])
        _estimates(panel(0, 1, 2), trials, looks)
        for n, key in enumerate(keys):
            _by_value(panel(1 + n // ACROSS, n % ACROSS, ACROSS), trials, looks, key)
        values = [v for t in trials if (v := _reached(t)) is not None]
        room = 0.12 * (max(values) - min(values)) if values else 0.0
        for axes in [figure.axes[0], *figure.axes[2:]] if room else []:
            axes.set_ylim(min(values) - room, max(values) + 1.6 * room)  # one scale: the panels compare
        _legend(figure, trials, looks, height)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


def _reached(t: Trial) -> float | None:
    """What a trial came to: its value, or its last estimate if it was pruned."""
    return t["value"] if t["state"] == "complete" else t["estimates"][-1][1] if t["estimates"] else None


def _mark(axes: Any, x: float, t: Trial, looks: Mapping[str, tuple[str, str]], star: bool) -> None:
    """Filled if it is complete, hollow if it was pruned; a ring around the best."""
    colour, marker = looks[t["head"]]
    y, done = _reached(t), t["state"] == "complete"
    if y is None or t["state"] == "failed":
        return
    if star:
        axes.plot([x], [y], "o", ms=14, mfc="none", mec=INK, mew=1.2, clip_on=False, zorder=4)
    face = colour if done else "white"
    axes.plot([x], [y], marker, ms=6.5, mfc=face, mec=colour, mew=1.2, ls="", clip_on=False, zorder=3)


def _values(axes: Any, trials: Sequence[Trial], looks: Mapping[str, tuple[str, str]], objective: str) -> None:
    """Every trial in its order, and the best so far as a line of steps."""
    axes.set_title("Tokens per step by trial")
    first: list[int] = []
    so_far: list[float] = []
    top = best(trials)
    for t in trials:
        if t["state"] == "complete" and (not so_far or t["value"] > so_far[-1]):
            first.append(t["number"])
            so_far.append(t["value"])
    last = max((t["number"] for t in trials), default=0)
    if so_far:
        axes.step([*first, last], [*so_far, so_far[-1]], where="post", color="#999999", lw=1.2, zorder=1)
    for t in trials:
        _mark(axes, t["number"], t, looks, t is top)
    if top is not None:
        right = top["number"] > last / 2  # beside the ring, on the side where there is room
        where = {"xytext": (-11 if right else 11, 9), "textcoords": "offset points", "ha": "right" if right else "left"}
        axes.annotate(f"{top['head']} {top['value']:.2f}", (top["number"], top["value"]), fontweight="bold", **where)
    failed = [t["number"] for t in trials if t["state"] == "failed"]
    across = axes.get_xaxis_transform()  # failed ones have no value: they stand on the axis
    axes.plot(failed, [0] * len(failed), "x", color=INK, ms=7, mew=1.6, transform=across, clip_on=False, zorder=5)
    axes.set_xlim(-0.6, last + 0.6)
    axes.set_xticks([n for n in range(last + 1) if n % max(1, -(-(last + 1) // 12)) == 0])
    axes.set_xlabel("trial; grey: the best so far")
    axes.set_ylabel("measured on prompts" if objective == "measured" else "estimated by training")
    axes.grid(axis="y", color=GRID)


def _estimates(axes: Any, trials: Sequence[Trial], looks: Mapping[str, tuple[str, str]]) -> None:
    """How each trial went while it trained; hollow where it was pruned."""
    axes.set_title("Estimate while training")
    top = best(trials)
    for t in trials:
        if not t["estimates"]:
            continue
        colour, marker = looks[t["head"]]
        steps, values = zip(*t["estimates"], strict=True)
        wide = {"lw": 2.6, "zorder": 4} if t is top else {"lw": 1.2, "alpha": 0.75, "zorder": 2}
        axes.plot(steps, values, color=colour, **wide)
        face = colour if t["state"] == "complete" else "white"
        axes.plot(steps[-1], values[-1], marker, ms=6, mfc=face, mec=colour, mew=1.2, ls="", clip_on=False, zorder=5)
    axes.set_xlabel("optimiser step; thick: the best; hollow: pruned here")
    axes.set_ylabel("estimated tokens per step")
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color=GRID)


def _by_value(axes: Any, trials: Sequence[Trial], looks: Mapping[str, tuple[str, str]], key: str) -> None:
    """What trials came to by their value of one key: numbers on a line, a logarithm where they span much, words side
    by side."""
    axes.set_title(label(key))
    having = [t for t in trials if key in (t["params"] or {}) and _reached(t) is not None]
    values, top = [t["params"][key] for t in having], best(trials)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    words = sorted({short(v) for v in values}) if not numbers else []
    for t in having:
        value = t["params"][key]
        _mark(axes, value if numbers else words.index(short(value)), t, looks, t is top)
    if not numbers:
        axes.set_xticks(range(len(words)), words)
        axes.set_xlim(-0.5, len(words) - 0.5)
    elif all(isinstance(v, int) for v in values) and len(set(values)) <= 12:
        axes.set_xticks(sorted(set(values)))
        axes.set_xlim(min(values, default=0) - 0.5, max(values, default=0) + 0.5)
    elif min(values) > 0 and max(values) / min(values) > 4:
        _logarithmic(axes, min(values), max(values))
    axes.set_xlabel(key)
    axes.set_ylabel("tokens per step")
    axes.grid(axis="y", color=GRID)


def _logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithm with 1, 2 and 5 written out."""
    axes.set_xscale("log")
    marks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    shown = [m for m in marks if low / 1.5 <= m <= high * 1.5]
    axes.set_xticks(shown, [f"{m:g}" for m in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / 1.25, high * 1.25)


def _legend(figure: Any, trials: Sequence[Trial], looks: Mapping[str, tuple[str, str]], height: float) -> None:
    """One line above everything: heads by colour and marker, and what became of a trial by its filling."""
    from matplotlib.lines import Line2D

    def entry(name: str, marker: str, **how: Any) -> Any:
        return Line2D([], [], ls="", marker=marker, ms=how.pop("ms", 6.5), label=name, **how)

    entries = [entry(head, marker, color=colour) for head, (colour, marker) in looks.items()]
    states = {t["state"] for t in trials}
    if "pruned" in states:
        entries.append(entry("pruned: its last estimate", "o", mfc="white", mec=QUIET))
    if "failed" in states:
        entries.append(entry("failed", "x", color=INK, mew=1.6))
    if "complete" in states:
        entries.append(entry("the best", "o", mfc="none", mec=INK, mew=1.2, ms=11))
    at = (LEFT / WIDTH - 0.01, 1 - 0.08 / height)
    figure.legend(handles=entries, loc="upper left", ncols=len(entries), bbox_to_anchor=at, columnspacing=1.8)
