"""The doctor's report for a terminal: what was looked at, what it found, and how the learned tokens lie."""

from __future__ import annotations

from typing import Any

COLOURS = {"error": "31;1", "warning": "33;1", "note": "36", "learned": "32", "edge": "30;42"}
MARKS = {"error": "✘", "warning": "!", "note": "·"}
BAR = 40  # characters of the longest bar


def checkup(report: dict[str, Any], *, colour: bool) -> str:
    """report: what `draftsmith doctor` returns. Without colour, learned tokens stand in brackets, and the first and
    last of each turn in double ones."""
    lines = ["environment"]
    lines += [f"  {name:<14}{value}" for name, value in report["environment"].items()]
    if "funnel" in report:
        f = report["funnel"]
        lines += ["", "rows", *_funnel(("in", f["in"]), f["quarantined"], ("kept", f["kept"]))]
    if "sample" in report:
        s = report["sample"]
        ends = ("looked at", s["looked_at"]), ("encoded", s["encoded"])
        lines += ["", "of these, a sample", *_funnel(ends[0], s["refused"], ends[1])]
    if "lengths" in report:
        lines += ["", "lengths in tokens", *_lengths(report)]
    if "policy" in report:
        p = report["policy"]
        lines += [
            "",
            "are the answers the base's own words?",
            f"  {p['nll']:.3f} nats per token; its own samples at temperature 1 would have {p['entropy']:.3f}, greedy"
            " text less",
            f"  agrees with {p['agreement']:.1%} of the tokens; of its own samples {p['expected']:.1%}, of greedy text"
            f" 100%  ({p['tokens']:,} tokens)",
        ]
    for row in report.get("shown", []):
        lines += ["", f"{row['source']}: learned tokens, the first and last of each turn marked", _tokens(row, colour)]
    lines += ["", *_findings(report["findings"], colour)]
    return "\n".join(lines)


def _funnel(taken: tuple[str, int], lost: dict[str, int], left: tuple[str, int]) -> list[str]:
    """What came, what it lost for which reason, what is left of it."""
    lines = [taken, *((f"- {reason}", count) for reason, count in lost.items()), left]
    return [f"  {name:<24}{count:>10,}" for name, count in lines]


def _lengths(report: dict[str, Any]) -> list[str]:
    told = report["lengths"]
    names = [name for name in ("rows", "prompts", "answers") if name in told]
    lines = [f"  {'':<10}" + "".join(f"{q:>8}" for q in told[names[0]])] if names else []
    lines += [f"  {name:<10}" + "".join(f"{v:>8,}" for v in told[name].values()) for name in names]
    for name, bins in told["histograms"].items():
        most = max(n for _, n in bins) or 1
        lines += ["", f"  {name}"]
        lines += [f"  {start:>7,} {'█' * round(BAR * n / most)} {n:,}" for start, n in bins]
    learned = f"learned: {report['learned']:.1%} of the tokens; " if "learned" in report else ""
    return [*lines, "", f"  {learned}the base's context: {report['context']:,}"]


def _tokens(row: dict[str, Any], colour: bool) -> str:
    out = []
    for text, learned, edge in row["tokens"]:
        shown = text.replace("\n", "\\n")
        if colour:
            kind = "edge" if edge and learned else "learned" if learned else ""
            out.append(f"\033[{COLOURS[kind]}m{shown}\033[0m" if kind else shown)
        else:
            out.append(f"⟦{shown}⟧" if edge and learned else f"[{shown}]" if learned else shown)
    return "  " + "".join(out).replace("][", "")


def _findings(findings: list[dict[str, Any]], colour: bool) -> list[str]:
    if not findings:
        return ["nothing found"]
    lines = []
    for f in findings:
        mark = f"{MARKS[f['severity']]} {f['severity']}"
        head = f"\033[{COLOURS[f['severity']]}m{mark}\033[0m" if colour else mark
        lines += [f"{head} {f['name']}: {f['what']}", f"    fix: {f['fix']}"]
    counts = {s: sum(f["severity"] == s for f in findings) for s in MARKS}
    return [*lines, ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items() if n)]
