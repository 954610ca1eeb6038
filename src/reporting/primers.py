"""Primers, which are lossy: what each keeps of the base's text and what its first token costs, as a table and one
picture of two panels. Equal results give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.reporting.leaderboard import GRID, INK, LOOKS, QUIET, STYLE

CAPTION = (
    "Lossy: after a predicted prompt the base may say what it would not have said. agreement: share of the base's own"
    " continuation at which the best token is the base's best; perplexity of that continuation; time and FLOPs to the"
    " first token, by prompt tokens, over the base's; alone: the primer's auxiliary model answering by itself"
)


def write(folder: Path, found: Mapping[str, Any]) -> str:
    """primers.md and primers.svg in `folder`, of what `decoding.priming.judge` found; the line that tells of them.
    Without matplotlib, no picture."""
    with artifacts.disk(folder, "the primers"):
        folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(folder / "primers.md", markdown(found).encode())
    if find_spec("matplotlib") is None:
        return f"-> {folder / 'primers.md'}; for the picture: pip install draftsmith[plots]"
    with artifacts.whole(folder / "primers.svg") as path:
        picture(path, found)
    return f"-> {folder / 'primers'}.{{md,svg}}"


def markdown(found: Mapping[str, Any]) -> str:
    base, lengths = found["base"], list(found["base"]["by_length"])
    columns = [f"{what} {n}" for n in lengths for what in ("time", "FLOPs")]
    header = ["", "lossy", "agreement", "perplexity", *columns]
    own = [f"{c['seconds'] * 1e3:.1f} ms" if k == "seconds" else f"{c['flops']:.2e}" for c, k in _cells(base)]
    rows = [["base", "no", "", f"{base['perplexity']:.2f}", *own]]
    for name, told in ranked(found):
        shares = [f"{c['over_base' if k == 'seconds' else 'flops_over_base']:.2f}x" for c, k in _cells(told)]
        rows.append([name, "yes", f"{told['agreement']:.1%}", f"{told['perplexity']:.2f}", *shares])
        alone, plain = told["auxiliary"], base["by_length"]
        shares = [f"{told['by_length'][n][f'auxiliary_{k}'] / plain[n][k]:.2f}x" for n in lengths for k in KEYS]
        rows.append([f"{name}, alone", "", f"{alone['agreement']:.1%}", f"{alone['perplexity']:.2f}", *shares])
    rule = ["---", "---", *("---:" for _ in header[2:])]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
    return f"# Primers (lossy)\n\n{table}\n{CAPTION}.\n"


KEYS = ("seconds", "flops")


def _cells(told: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    return [(costs, key) for costs in told["by_length"].values() for key in KEYS]


def ranked(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The highest agreement first."""
    return sorted(found["primers"].items(), key=lambda item: (-item[1]["agreement"], item[0]))


def picture(path: Path, found: Mapping[str, Any]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    looks = {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(sorted(found["primers"]))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 4.0), facecolor="white")
        _pareto(figure.add_axes((0.075, 0.17, 0.385, 0.70)), found, looks)
        _by_length(figure.add_axes((0.565, 0.17, 0.385, 0.70)), found, looks)
        metadata: dict[str, Any] = {"Date": None}
        figure.savefig(path, metadata=metadata)


def _pareto(axes: Any, found: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    """A line ties each primer to its auxiliary alone: what the maps and the base's last step bring and cost."""
    longest = max(found["base"]["by_length"], key=int)
    whole = found["base"]["by_length"][longest]["flops"]
    axes.set_title("Lossy: agreement with the base over cost")
    for name, told in ranked(found):
        colour, marker = looks[name]
        costs = told["by_length"][longest]
        here = costs["flops_over_base"], told["agreement"]
        alone = costs["auxiliary_flops"] / whole, told["auxiliary"]["agreement"]
        axes.plot(*zip(alone, here, strict=True), color=colour, lw=0.8, alpha=0.6)
        axes.plot(*alone, marker=marker, ms=6, mfc="white", mec=colour, ls="")
        axes.plot(*here, marker=marker, ms=7, color=colour, ls="", label=name)
    axes.plot([], [], marker="o", ms=6, mfc="white", mec=QUIET, ls="", label="hollow: the auxiliary alone")
    axes.plot(1, 1, marker="*", ms=11, color=INK, ls="", label="base", clip_on=False)
    axes.set_xlim(0, None)
    axes.set_ylim(None, 1.02)
    axes.set_xlabel(f"FLOPs to the first token over the base's, {int(longest):,} prompt tokens")
    axes.set_ylabel("next-token agreement")
    axes.grid(color=GRID)
    axes.legend(loc="best", fontsize=8)


def _by_length(axes: Any, found: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    """Lengths at equal distances: they are usually powers."""
    lengths = sorted(found["base"]["by_length"], key=int)
    axes.set_title("Time to first token over the base's")
    for name, told in ranked(found):
        colour, marker = looks[name]
        costs = [told["by_length"][n] for n in lengths]
        axes.plot([c["over_base"] for c in costs], color=colour, marker=marker, ms=5, lw=1.6)
        axes.plot(
            [c["flops_over_base"] for c in costs], color=colour, marker=marker, ms=4, mfc="white", ls="--", lw=1.1
        )
    axes.axhline(1, color=QUIET, lw=0.8)
    axes.set_xticks(range(len(lengths)), [f"{int(n):,}" for n in lengths])
    axes.set_xlabel("prompt tokens\nsolid measured seconds, dashed FLOPs")
    axes.set_ylabel("below 1: sooner than the base")
    axes.set_ylim(0, None)
    axes.grid(axis="y", color=GRID)
