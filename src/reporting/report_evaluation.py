"""The sections of a report that evaluation.json and the heads' own folders fill."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.reporting import drawings, gates, primers
from draftsmith.reporting import tree as trees
from draftsmith.reporting.curves import Line, Picture, lines
from draftsmith.reporting.report_page import Block, Sample, Section, Table, Tile, Words
from draftsmith.reporting.report_run import Run

NONE = Words(
    "This run was not evaluated, so nothing is known of acceptance, speed and calibration, and there is no sample:"
    " draftsmith evaluate run_dir=… measures it.",
    "missing",
)
FORWARDS = "plain forwards"
TEXTS = 1  # shown of each head


def missing(text: str) -> Words:
    return Words(text, "missing")


def looks(names: Sequence[str]) -> dict[str, int]:
    """A head keeps its look from picture to picture."""
    return {name: n for n, name in enumerate(names)}


def names_of(run: Run) -> list[str]:
    return list(dict.fromkeys([*run.judged, *run.heads, *run.trained]))


def tiles(run: Run) -> list[Tile]:
    look = looks(names_of(run))
    found = [_tile(name, run, look[name]) for name in look]
    told = (run.evaluation or {}).get("primers", {}).get("primers", {})
    return [_primer_tile(t, told[t.name]) if t.name in told else t for t in found]


def _tile(name: str, run: Run, look: int) -> Tile:
    head = run.judged.get(name)
    if head is None:
        last = run.points(f"validation/{name}/tokens_per_step") or run.points(f"train/{name}/tokens_per_step")
        figures = [(f"~{last[-1][1]:.2f}", "tokens per step", f"estimated at step {last[-1][0]:.0f}")] if last else []
        return Tile(name, figures, *_unjudged(run, name), look)
    within = head.get("tokens_per_step_interval")
    spread = f"{within[0]:.2f} to {within[1]:.2f} at 95 %" if within else "1 = no head"
    plain = (run.evaluation or {})["autoregressive"]["tokens_per_second"]
    figures = [
        (f"{head['tokens_per_step']:.2f}", "tokens per step", spread),
        (f"{head['speedup']:.2f}×", "speedup", f"{head['tokens_per_second']:,.0f} over {plain:,.0f} tokens/s"),
    ]
    return Tile(name, figures, *verdict(run, name), look)


def _unjudged(run: Run, name: str) -> tuple[str, str, str]:
    lossy = " It is lossy: it may change the base's text." if run.heads.get(name, {}).get("lossy") else ""
    return ("lossy" if lossy else "unknown"), ("LOSSY" if lossy else "not evaluated"), f"No proof yet.{lossy}"


def _primer_tile(tile: Tile, told: Mapping[str, Any]) -> Tile:
    said = "A primer guesses the prompt's keys and values, so the base may say what it would not have said."
    figures = [(f"{told['agreement']:.1%}", "agreement", "of best tokens with the base's own")]
    for length, costs in list(told["by_length"].items())[-1:]:
        figures.append((f"{costs['over_base']:.2f}×", "time to the first token", f"over the base's, {length} tokens"))
    return Tile(tile.name, figures, "lossy", "LOSSY", said, tile.look)


def verdict(run: Run, name: str) -> tuple[str, str, str]:
    """(kind, mark, words) of whether the text is the base's own."""
    head = run.judged[name]
    if head.get("lossy") or run.heads.get(name, {}).get("lossy"):
        return "lossy", "LOSSY", "Its text is not distributed as the base's; it is faster at that price."
    certified = ((run.certificate or {}).get("heads", {}).get(name) or {}).get("certified")
    more = {None: "", True: " Certified.", False: " NOT certified; certificate.md says why."}[certified]
    proof = head.get("lossless")
    if proof is None:
        same = head.get("same_text_as_plain")
        told = f" {same} texts are those of plain decoding with the same seed." if same is not None else ""
        return "exact", "exact sampling", f"Verification keeps the base's distribution.{told}{more}"
    counts = (
        f"{proof['tokens']:,} tokens of {proof['prompts']:,} prompts compared with"
        f" {' and '.join(proof.get('against', ['plain decoding']))}: {proof['mismatches']} mismatches,"
        f" {proof['near_ties']} near ties.{more}"
    )
    if proof.get("ok", not proof["mismatches"]):
        return "lossless", "lossless", counts
    return "wrong", "NOT lossless", counts


def at_a_glance(run: Run) -> Section:
    """Everything that decoded these prompts, in one table."""
    result = run.evaluation
    if result is None:
        return Section("At a glance", [NONE])
    header = ["", "parameters", "tokens/step", "accepted drafts/step", "tokens/s", "speedup", "text"]
    rows = []
    for name, r in [*result["heads"].items(), *result.get("baselines", {}).items()]:
        own = name in result["heads"]
        rows.append(
            [
                name if own else f"{name} (no training)",
                f"{r['parameters']:,}" if "parameters" in r else "",
                f"{r['tokens_per_step']:.2f}",
                f"{r['tokens_per_step'] - 1:.2f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['speedup']:.2f}×",
                verdict(run, name)[1] if own else "",
            ]
        )
    plain = result["autoregressive"]["tokens_per_second"]
    rows.append(["no head", "", "1.00", "0.00", f"{plain:,.0f}", "1.00×", ""])
    if "hf_generate" in result:
        speed = result["hf_generate"]["tokens_per_second"]
        rows.append(["hf generate", "", "1.00", "0.00", f"{speed:,.0f}", f"{speed / plain:.2f}×", ""])
    blocks: list[Block] = [Table("every way of decoding", header, rows, left=("text",), note=_how(result))]
    if "primers" in result:
        blocks.append(_primers(result["primers"]))
    return Section("At a glance", blocks)


def _how(result: Mapping[str, Any]) -> str:
    d = result.get("decoding", {})
    prompts = d.get("prompts", {})
    how = "greedy" if not d.get("temperature") else f"sampled at temperature {d['temperature']:g}"
    known = prompts.get("trained_on")
    passes = d.get("repeats", "?")
    timed = "timed once" if passes == 1 else f"every time the median of {passes} passes"
    seen = "" if known is None else f", {known} of them trained on"
    return (
        f"{prompts.get('count', '?')} prompts{seen}, {how}, up to {d.get('max_new_tokens', '?')} tokens each;"
        f" {timed}, interleaved, on {d.get('device', 'cpu')}"
    )


def _primers(found: Mapping[str, Any]) -> Block:
    rows = [
        [name, f"{told['agreement']:.1%}", f"{told['perplexity']:.2f}"]
        + [f"{c['over_base']:.2f}×" for c in told["by_length"].values()]
        for name, told in primers.ranked(found)
    ]
    header = ["primer (lossy)", "agreement", "perplexity", *(f"time, {n} tokens" for n in found["base"]["by_length"])]
    return Table("the primers", header, rows, note=primers.CAPTION)


def acceptance(run: Run) -> Section | None:
    title = "Acceptance"
    if not run.judged:
        return None
    look = looks(names_of(run))
    depth = [
        Line(name, [(float(k), a) for k, a in enumerate(h["acceptance_by_depth"], 1)], look[name])
        for name, h in run.judged.items()
    ]
    deepest = max((len(one.points) for one in depth), default=0)
    drawn: list[Block | None] = [
        lines(
            "By depth",
            [Line(one.name, [(x - 1, y) for x, y in one.points], one.look) for one in depth],
            x="depth of the drafted token",
            y="accepted, if the one before was",
            floor=0.0,
            names=[str(k + 1) for k in range(deepest)],
        ),
        by_context({name: h.get("by_context") or {} for name, h in run.judged.items()}, look),
    ]
    blocks: list[Block] = [block for block in drawn if block is not None]
    for kind, what in (("by_source", "source of the prompts"), ("by_turn", "turn of the conversation")):
        parts = [(name, label, p) for name, h in run.judged.items() for label, p in (h.get(kind) or {}).items()]
        if len({label for _, label, _ in parts}) > 1:
            blocks.append(_grouped(what, parts))
    single = [w for k, w in (("by_source", "source"), ("by_turn", "turn")) if _single(run, k)]
    if single:
        blocks.append(missing(f"All prompts are of one {' and one '.join(single)}, so nothing is told apart by it."))
    return Section(title, blocks, "How much of what is drafted the base would have said itself.")


def _single(run: Run, kind: str) -> bool:
    return len({label for h in run.judged.values() for label in h.get(kind) or {}}) == 1


def by_context(found: Mapping[str, Mapping[str, Any]], look: Mapping[str, int]) -> Picture | None:
    """Tokens per step by the length of the text before the step."""
    buckets = sorted({b for parts in found.values() for b in parts}, key=lambda b: int(b.split("-")[0]))
    drawn = [
        Line(name, [(float(buckets.index(b)), p["tokens_per_step"]) for b, p in parts.items()], look[name])
        for name, parts in found.items()
    ]
    what: dict[str, Any] = {"x": "tokens of text before the step", "y": "tokens per step"}
    return lines("By context", drawn, **what, floor=1.0, names=buckets) if buckets else None


def _grouped(what: str, parts: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    rows = []
    for name, label, p in parts:
        within = p.get("interval")
        spread = f"{within[0]:.2f} to {within[1]:.2f}" if within else ""
        rows.append([name, label, f"{p['prompts']:,}", f"{p['steps']:,}", f"{p['tokens_per_step']:.2f}", spread])
    header = ["head", what, "prompts", "steps", "tokens/step", "95 % interval"]
    return Table(f"tokens per step by {what}", header, rows, left=(what,))


def speedup(run: Run) -> Section | None:
    title = "Speedup"
    if not run.judged:
        return None
    look = looks(names_of(run))
    found = {name: by_batch(h) for name, h in run.judged.items()}
    sizes = sorted({n for by in found.values() for n in by})
    blocks: list[Block] = []
    if len(sizes) > 1:
        picture = batches(found, look)
        blocks += [] if picture is None else [picture]
    else:
        blocks.append(
            missing(
                "Only single prompts were decoded: batch_sizes=[1,4,16] of draftsmith evaluate measures batches too."
            )
        )
    costs = drawings.shares(
        "What a step costs, one prompt at a time", {n: _costs(by) for n, by in found.items()}, FORWARDS
    )
    blocks += [] if costs is None else [costs]
    rows = []
    for name, by in found.items():
        for n, (measured, predicted, terms) in by.items():
            rows.append(
                [name, str(n), f"{measured:.2f}×", "" if predicted is None else f"{predicted:.2f}×"]
                + [f"{terms[k]:.2f}" if k in terms else "" for k in ("verify_cost", "draft_cost", "overhead")]
            )
    header = ["head", "prompts together", "measured", "predicted", "verify", "draft", "overhead"]
    note = (
        "predicted = tokens per step × (1 + overhead without a head) / (verify + draft + overhead); costs of one step,"
        " in plain forwards of one token"
    )
    blocks.append(Table("speedup by batch size", header, rows, note=note))
    return Section(title, blocks, "Tokens per second over the same engine without a head.")


def _costs(by: Mapping[int, tuple[float, float | None, Mapping[str, Any]]]) -> dict[str, float]:
    """The parts of a step of one prompt."""
    terms = by[1][2]
    parts = (("verify", "verify_cost"), ("draft", "draft_cost"), ("overhead", "overhead"))
    return {name: terms[key] for name, key in parts if key in terms}


def by_batch(head: Mapping[str, Any]) -> dict[int, tuple[float, float | None, Mapping[str, Any]]]:
    """Batch size -> speedup measured, predicted, and its terms."""
    own = {1: (head["speedup"], head.get("terms", {}).get("predicted_speedup"), head.get("terms", {}))}
    more = head.get("by_batch") or {}
    return own | {int(n): (b["speedup"], b.get("predicted_speedup"), b.get("terms", {})) for n, b in more.items()}


def batches(found: Mapping[str, Mapping[int, tuple[Any, ...]]], look: Mapping[str, int]) -> Picture | None:
    sizes = sorted({n for by in found.values() for n in by})
    drawn = []
    for name, by in found.items():
        for which, told in ((0, "measured"), (1, "predicted")):
            points = [(float(sizes.index(n)), both[which]) for n, both in sorted(by.items()) if both[which] is not None]
            drawn.append(Line(f"{name}, {told}", points, look[name], hollow=bool(which)))
    what: dict[str, Any] = {"x": "prompts decoded together", "y": "tokens per second over no head"}
    return lines("By batch size", drawn, **what, level=1.0, names=[str(n) for n in sizes])


def tree(run: Run) -> Section:
    """Of every drafter the tree that was chosen for it, else the shape that was drafted."""
    look = looks(names_of(run))
    blocks: list[Block] = []
    for name in names_of(run):
        tuned = run.heads.get(name, {}).get("tuned") or {}
        if "shares" in tuned:
            blocks += _tuned_tree(name, tuned, look[name])
        elif name in run.judged:
            blocks += _drafted_tree(name, run, look[name])
    blocks.sort(key=lambda block: block.kind != "picture")  # stable: pictures side by side, then what is told of them
    return Section("The draft tree", blocks or [missing("No head drafted here, so there is no tree to draw.")])


def _tuned_tree(name: str, tuned: Mapping[str, Any], look: int) -> list[Block]:
    shares = tuned["shares"]
    moving = bool(shares) and "path" not in shares[0]
    share = {(0,) * s["depth"] if moving else tuple(s["path"]): s["share"] for s in shares}
    more = ", another tree at every step: of each depth, the share of steps that keep some draft" if moving else ""
    picture = drawings.tree(f"{name}: {tuned['name']}, chosen by draftsmith tune{more}", share, look=look)
    rows = [
        [r["name"], str(r["nodes"]), str(r["depth"]), f"{r['tokens_per_step']:.2f}", f"{r['speedup']:.2f}×"]
        for r in sorted(tuned.get("table", []), key=lambda r: -r["speedup"])[:6]
    ]
    header = ["tree", "nodes", "depth", "tokens/step", "promised speedup"]
    note = "; ".join(trees.verdict(tuned)) if tuned.get("table") else ""
    table = Table(f"the trees that promised most for {name}", header, rows, note=note)
    return [*([picture] if picture else []), *([table] if rows else [])]


def _drafted_tree(name: str, run: Run, look: int) -> list[Block]:
    head, decoding = run.judged[name], (run.evaluation or {}).get("decoding", {})
    size, spec = head.get("tree", {}), decoding.get("tree") or {}
    paths = decoding.get("paths") or spec.get("paths")
    told = f"{name}: {size.get('nodes', '?')} nodes, {size.get('depth', '?')} deep"
    if size.get("nodes", 0) == size.get("depth", -1) + 1:  # a chain: each node is kept if those above it are
        kept = list(itertools.accumulate(head["acceptance_by_depth"], operator.mul))
        share = {(0,) * k: chance for k, chance in enumerate(kept, 1)}
        picture = drawings.tree(f"{told}, a chain; draftsmith tune looks for a better one", share, look=look)
    elif paths:
        deepest = size.get("depth", len(paths))
        share = {tuple(p): 0.0 for p in paths if len(p) <= deepest}
        picture = drawings.tree(f"{told}, {spec.get('kind', 'static')}", share, known=False, look=look)
    else:
        return [missing(f"{told}, {spec.get('kind', 'a tree')}: another tree at every step, so there is none to draw.")]
    return [picture] if picture else []


def calibration(run: Run) -> Section | None:
    """None where no head is a gate."""
    found = {name: h["gate"] for name, h in run.judged.items() if "gate" in h}
    if not found:
        return None
    blocks: list[Block] = []
    for name, gate in found.items():
        picture = drawings.reliability(f"{name}: is its chance true?", gate["calibration"])
        rows = [(p.removeprefix("fixed_"), r["speedup"], f"{r['speedup']:.2f}×") for p, r in gate["by_length"].items()]
        speeds = drawings.bars(
            f"{name}: speed by drafts per step", rows, x="over plain decoding; a line at 1", level=1.0
        )
        blocks += [p for p in (picture, speeds) if p is not None]
        blocks += (
            [] if picture else [missing(f"{name}: no draft was heard, so nothing says whether its chances are true.")]
        )
        blocks += [Words(line) for line in gates.text(name, gate)[-2:]]
    return Section(
        "Gates", blocks, "Points on the diagonal are true chances; a point's size says how many drafts it holds."
    )


def sample(run: Run) -> Section | None:
    title = "A sample"
    shown = [(name, h["samples"][:TEXTS]) for name, h in run.judged.items() if h.get("samples")]
    if not run.judged:
        return None
    if not shown:
        return Section(title, [missing("evaluation.json holds no sample: evaluate again to have one.")])
    blocks: list[Block] = []
    for name, texts in shown:
        for one in texts:
            steps = one["steps"][1:]  # the first is prefill's token
            drafts = sum(len(s["accepted"]) for s in steps)
            refused = sum(len(s["rejected"]) for s in steps)
            told = f"{len(steps)} steps: {drafts} drafted tokens accepted, {refused} rejected"
            blocks.append(Sample(name, one["prompt"], one["steps"], told))
    return Section(title, blocks, "The first prompt's answer; rejected drafts are not part of the text.")
