"""Gates between their bounds: lines for a terminal, and a picture of two panels per gate, speed by policy and the
reliability curve. Equal results give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.reporting.leaderboard import GRID, LOOKS, QUIET, STYLE

FILE = "gates.svg"
GAP = 0.02  # of the best fixed length's speed: less is noise, and no share of it means anything


def write(folder: Path, heads: Mapping[str, Mapping[str, Any]]) -> str:
    """gates.svg in the folder for the heads that are gates; what to tell."""
    found = {name: told["gate"] for name, told in heads.items() if "gate" in told}
    lines = [line for name, gate in found.items() for line in text(name, gate)]
    if find_spec("matplotlib") is None:
        return "\n".join([*lines, "no picture: pip install 'draftsmith[plots]' draws it"])
    with artifacts.whole(folder / FILE) as path:
        draw(found, path)
    return "\n".join([*lines, f"-> {folder / FILE}"])


def text(name: str, gate: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in words."""
    lines = []
    for policy, r in gate["by_length"].items():
        what = f"threshold {gate['threshold']:.2f}" if policy == "gate" else ""
        lines.append(
            f"{name}: {policy:<9} {r['tokens_per_second']:>7.0f} tokens/s  {r['speedup']:.2f}x  tau"
            f" {r['tokens_per_step']:.2f}  {r['drafts_per_step']:.2f} drafts a step  {what}".rstrip()
        )
    lines.append(f"{name}: {gate['over_best_fixed']:.3f} x the best fixed length ({gate['best_fixed']})")
    if "regret" in gate:
        over = gate["oracle_over_best_fixed"]
        share = f"so {gate['recovered']:.0%} of that gap is recovered" if over >= 1 + GAP else "nothing to recover"
        lines[-1] += f"; the oracle {over:.3f} x, {share}; regret {gate['regret']:.1%}"
    c = gate["calibration"]
    lines.append(
        f"{name}: of {c['drafts']:,} drafts {_share(c['accepted'])} accepted; AUC {_number(c['auc'])},"
        f" ECE {c['ece']:.3f}, Brier {_number(c['brier'])}"
    )
    return lines


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4 * len(found)), layout="constrained")
        rows: Any = figure.subplots(len(found), 2, squeeze=False)
        for (left, right), (name, gate) in zip(rows, found.items(), strict=True):
            _speeds(left, name, gate)
            _reliability(right, gate["calibration"])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _speeds(ax: Any, name: str, gate: Mapping[str, Any]) -> None:
    """Bars in the order fixed lengths, gate, oracle."""
    policies = gate["by_length"]
    colours = {"gate": LOOKS[1][0], "oracle": LOOKS[2][0]}
    labels = [p.removeprefix("fixed_") for p in policies]
    bars = ax.bar(
        range(len(policies)),
        [r["speedup"] for r in policies.values()],
        color=[colours.get(p, LOOKS[0][0]) for p in policies],
    )
    ax.bar_label(bars, [f"{r['speedup']:.2f}" for r in policies.values()], color=QUIET, fontsize=7, padding=2)
    ax.set_xticks(range(len(policies)), labels, fontsize=7)
    ax.axhline(1, color=QUIET, linewidth=0.8, linestyle=":")
    ax.set_title(f"{name}: speed over plain decoding")
    ax.set_xlabel("drafts per step: a fixed number, the gate's, the oracle's")
    ax.grid(axis="y", color=GRID)


def _reliability(ax: Any, told: Mapping[str, Any]) -> None:
    """Where the points lie on the diagonal, the chances are true; a point's size says how many drafts it stands for."""
    curve = told["curve"]
    most = max((c["count"] for c in curve), default=1)
    ax.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=":")
    xs, ys = [c["predicted"] for c in curve], [c["accepted"] for c in curve]
    ax.plot(xs, ys, color=LOOKS[1][0], linewidth=1)
    ax.scatter(xs, ys, s=[12 + 120 * c["count"] / most for c in curve], color=LOOKS[1][0])
    ax.set_title(f"is its chance true?  ECE {told['ece']:.3f}, AUC {_number(told['auc'])}")
    ax.set_xlabel("predicted chance that a draft is kept")
    ax.set_ylabel("share kept")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.05)
    ax.grid(color=GRID)


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
