"""Several runs beside one another: a table, curves over one pair of axes, and how their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.reporting import leaderboard
from draftsmith.reporting import report_evaluation as evaluation
from draftsmith.reporting.curves import Line, lines
from draftsmith.reporting.report_page import Block, Code, Page, Section, Table
from draftsmith.reporting.report_run import Run

WHERE = ("run_dir", "debug")  # keys that say nothing of what a run is


def page(runs: Sequence[Run]) -> Page:
    """Runs with what they trained, most tokens per step first."""
    named = _names(runs)
    entries = [
        (label(named[n], head, run), run, head) for n, run in enumerate(runs) for head in evaluation.names_of(run)
    ]
    look = evaluation.looks([name for name, _, _ in entries])
    tiles = [
        _renamed(tile, name, look[name])
        for name, run, head in entries
        for tile in evaluation.tiles(run)
        if tile.name == head
    ]
    sections = [_leaderboard(entries), _acceptance(entries, look), _speedup(entries, look), _training(entries, look)]
    sections += [_differences(runs, named), _hashes(entries)]
    about = [("runs", ", ".join(named)), ("heads", str(len(entries)))]
    return Page(f"{len(runs)} runs compared", about, tiles, sections)


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; of those that have the same name, as much of the path as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, 1 + max(len(p.parts) for p in paths)):
        named = ["/".join(p.parts[-depth:]) for p in paths]
        if len(set(named)) == len(set(paths)):
            return named
    return [str(p) for p in paths]


def label(run_name: str, head: str, run: Run) -> str:
    return run_name if len(evaluation.names_of(run)) == 1 else f"{run_name}: {head}"


def _renamed(tile: Any, name: str, look: int) -> Any:
    return type(tile)(**{**vars(tile), "name": name, "look": look})


def _leaderboard(entries: Sequence[tuple[str, Run, str]]) -> Section:
    judged = {name: run.judged[head] for name, run, head in entries if head in run.judged}
    blocks: list[Block] = []
    if judged:
        ranked = leaderboard.ranked(leaderboard.entries(judged))
        rows = []
        for e in ranked:
            h = judged[e.name]
            run, head = next((run, head) for name, run, head in entries if name == e.name)
            within = h.get("tokens_per_step_interval")
            rows.append(
                [
                    e.name,
                    head,
                    f"{e.parameters:,}",
                    f"{e.mean:.3f}",
                    f"{within[0]:.2f} to {within[1]:.2f}" if within else "",
                    f"{h['tokens_per_second']:,.0f}",
                    f"{h['speedup']:.2f}×",
                    evaluation.verdict(run, head)[1],
                ]
            )
        header = ["run", "head", "parameters", "tokens/step", "95 %", "tokens/s", "speedup", "text"]
        note = _same_prompts([run for _, run, head in entries if head in run.judged])
        blocks.append(Table("the runs, most tokens per step first", header, rows, left=("head", "text"), note=note))
    lacking = [name for name, run, head in entries if head not in run.judged]
    if lacking:
        blocks.append(evaluation.missing(f"Not evaluated: {', '.join(lacking)}."))
    return Section("Leaderboard", blocks)


def _same_prompts(runs: Sequence[Run]) -> str:
    asked = [(run.evaluation or {}).get("decoding", {}) for run in runs]
    keys = {k for one in asked for k in one}
    other = sorted(k for k in keys if any(one.get(k) != asked[0].get(k) for one in asked))
    if not other:
        return "All were decoded alike, on prompts chosen alike."
    return f"They were not decoded alike ({', '.join(other)} differ), so their figures are of different things."


def _acceptance(entries: Sequence[tuple[str, Run, str]], look: Mapping[str, int]) -> Section:
    judged = {name: run.judged[head] for name, run, head in entries if head in run.judged}
    drawn = [
        Line(n, [(float(k), a) for k, a in enumerate(h["acceptance_by_depth"])], look[n]) for n, h in judged.items()
    ]
    deepest = max((len(one.points) for one in drawn), default=0)
    what: dict[str, Any] = {"x": "depth of the drafted token", "y": "accepted, if the one before was"}
    depth = lines("By depth", drawn, **what, floor=0.0, names=[str(k + 1) for k in range(deepest)])
    context = evaluation.by_context({name: h.get("by_context") or {} for name, h in judged.items()}, look)
    blocks: list[Block] = [p for p in (depth, context) if p is not None]
    return Section("Acceptance", blocks or [evaluation.NONE])


def _speedup(entries: Sequence[tuple[str, Run, str]], look: Mapping[str, int]) -> Section:
    found = {name: evaluation.by_batch(run.judged[head]) for name, run, head in entries if head in run.judged}
    picture = evaluation.batches(found, look) if found else None
    return Section("Speedup", [picture] if picture else [evaluation.NONE])


def _training(entries: Sequence[tuple[str, Run, str]], look: Mapping[str, int]) -> Section:
    blocks: list[Block] = []
    for title, metric, how in (
        ("Loss", "loss", {"y": "loss", "log": True}),
        ("Estimated tokens per step", "tokens_per_step", {"y": "tokens per step", "floor": 1.0}),
    ):
        for kind, told in (("train", ""), ("validation", ", validation")):
            drawn = [Line(n, run.points(f"{kind}/{head}/{metric}"), look[n], bool(told)) for n, run, head in entries]
            picture = lines(f"{title}{told}", drawn, x="step", **how)  # type: ignore[arg-type]
            blocks += [picture] if picture else []
    return Section("Training", blocks or [evaluation.missing("None of these directories holds metrics.jsonl.")])


def _differences(runs: Sequence[Run], named: Sequence[str]) -> Section:
    """Keys of which not all runs have the same value."""
    flat = [dict(_leaves(run.values)) for run in runs]
    keys = [k for k in dict.fromkeys(k for one in flat for k in one) if k.split(".")[0] not in WHERE]
    other = [k for k in keys if len({str(one.get(k)) for one in flat}) > 1]
    rows = [[k, *(str(one.get(k, "-")) for one in flat)] for k in other]
    title = "What differs"
    if not rows:
        return Section(title, [evaluation.missing("Their configurations hold the same values.")])
    return Section(title, [Table("keys that differ", ["key", *named], rows, left=named)])


def _leaves(values: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        own = f"{above}{key}"
        found += _leaves(value, f"{own}.") if isinstance(value, Mapping) and value else [(own, value)]
    return found


def _hashes(entries: Sequence[tuple[str, Run, str]]) -> Section:
    rows = [[name, Path(run.folder).name, head, run.hashes[head]] for name, run, head in entries if head in run.hashes]
    blocks: list[Block] = []
    if rows:
        header = ["run", "folder", "head", "sha256 of its weights"]
        blocks.append(Table("hashes", header, rows, left=header[1:]))
    for name in dict.fromkeys(id(run) for _, run, _ in entries):
        run = next(run for _, run, _ in entries if id(run) == name)
        blocks.append(Code(f"{run.name}: configuration", run.config, folded=True))
    return Section("To have them again", blocks or [evaluation.missing("No weights lie here.")])
