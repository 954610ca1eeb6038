"""The sections of a report that training filled: curves, where the time went, what became of the data, every start of
the run, and what is needed to have it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from draftsmith.reporting import drawings
from draftsmith.reporting.curves import Line, Picture, lines, number
from draftsmith.reporting.report_evaluation import looks, missing, names_of
from draftsmith.reporting.report_page import Block, Code, Section, Table, Words
from draftsmith.reporting.report_run import Run, joined, shorter

KINDS = (("train", ""), ("validation", ", validation"))
ENDINGS = {"complete": "complete", "stopped": "stopped by a signal, resumable", "failed": "failed"}
MORE = 4  # further metrics of a head that are drawn


def curves(run: Run) -> Section:
    title = "Training"
    if not run.metrics:
        return Section(
            title, [missing("There is no metrics.jsonl here: these heads were not trained in this directory.")]
        )
    names = [n for n in names_of(run) if n in run.trained] or run.trained
    look = looks(names_of(run))
    drawn = [
        lines("Loss", list(_each(run, names, "loss", look)), x="step", y="loss", log=True),
        lines("Estimated tokens per step", list(_each(run, names, "tokens_per_step", look)), x="step",
              y="tokens per step", floor=1.0),
        *(_by_depth(run, name) for name in names),
        *(picture for name in names for picture in _more(run, name, look[name])),
        lines("Learning rate", [Line("learning rate", run.points("lr"), 6)], x="step", y="learning rate", floor=0.0),
        lines("Speed", [Line("tokens per second", run.points("tokens_per_second"), 6)], x="step",
              y="tokens per second", floor=0.0),
    ]  # fmt: skip
    blocks: list[Block] = [p for p in drawn if p is not None]
    if not any(key.startswith("validation/") for m in run.metrics for key in m):
        blocks.append(
            missing("No rows were held out, so there is no validation: data.validation.share=0.05 does that.")
        )
    blocks += [
        Words(f"{n} lines of {name} could not be read; they are left out.", "warning") for name, n in run.torn.items()
    ]
    steps = [int(m["step"]) for m in run.metrics]
    return Section(title, blocks, f"{len(steps):,} measured steps, {steps[0]:,} to {steps[-1]:,}, from metrics.jsonl.")


def _each(run: Run, names: Sequence[str], metric: str, look: Mapping[str, int]) -> Iterator[Line]:
    for name in names:
        for kind, told in KINDS:
            points = run.points(f"{kind}/{name}/{metric}")
            if points:
                yield Line(f"{name}{told}", points, look[name], hollow=kind == "validation")


def _by_depth(run: Run, name: str) -> Picture | None:
    """Top-1 of each depth."""
    keys = {key for m in run.metrics for key in m}
    depths = sorted(int(d[1]) for key in keys if (d := re.fullmatch(rf"train/{re.escape(name)}/top1/(\d+)", key)))
    drawn = [
        Line(f"depth {k}{told}", points, n, hollow=kind == "validation")
        for n, k in enumerate(depths)
        for kind, told in KINDS
        if (points := run.points(f"{kind}/{name}/top1/{k}"))
    ]
    return lines(f"{name}: top-1 by depth", drawn, x="step", y="share of best tokens that are right", floor=0.0)


def _more(run: Run, name: str, look: int) -> list[Picture]:
    """What else this head measures of itself, as a whole and not by depth."""
    found = re.compile(rf"(?:train|validation)/{re.escape(name)}/([^/\d][^/]*)")
    keys = dict.fromkeys(m[1] for line in run.metrics for key in line if (m := found.fullmatch(key)))
    others = [key for key in keys if key not in ("loss", "tokens_per_step")][:MORE]
    drawn = (
        lines(f"{name}: {key.replace('_', ' ')}", list(_each(run, [name], key, {name: look})), x="step", y=key)
        for key in others
    )
    return [p for p in drawn if p is not None]


def starts(run: Run) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Every start of training with how it ended; None: nothing says, since it was killed, or still runs."""
    found: list[tuple[dict[str, Any], dict[str, Any] | None]] = []
    for event in run.events:
        if event.get("event") == "started":
            found.append((event, None))
        elif found and event.get("event") in ENDINGS and found[-1][1] is None:
            found[-1] = (found[-1][0], event)
    return found


def time(run: Run) -> Section:
    """Where the seconds of training and of decoding went."""
    title = "Where the time went"
    rows: dict[str, Mapping[str, float]] = {}
    began = starts(run)
    for n, (_, end) in enumerate(began, 1):
        seconds = {k: float(v) for k, v in ((end or {}).get("seconds") or {}).items()}
        if seconds:
            rows[f"start {n}" if len(began) > 1 else "training"] = seconds
    training = drawings.shares("Training, seconds", rows, "s")
    decoding = drawings.shares(
        "Decoding, shares of wall-clock time", {name: h.get("time") or {} for name, h in run.judged.items()}
    )
    blocks: list[Block] = [p for p in (training, decoding) if p is not None]
    if training is None:
        blocks.append(missing(_no_seconds(run, began)))
    unclosed = [n for n, (_, end) in enumerate(began, 1) if end is None]
    if training is not None and unclosed:
        which = joined([str(n) for n in unclosed])
        blocks.append(
            missing(f"Start {which} left no closing line (killed, or still running): its seconds are not known.")
        )
    if decoding is None:
        blocks.append(missing("Nothing was decoded here, so there is no split of decoding."))
    return Section(title, blocks)


def _no_seconds(run: Run, began: Sequence[Any]) -> str:
    if not began:
        return "There is no events.jsonl here, so nothing says where training's time went."
    last = f"; the last measured step is {run.metrics[-1]['step']:,}" if run.metrics else ""
    return f"No start left a closing line (killed, or still running), so its seconds are not known{last}."


def data(run: Run) -> Section:
    """How many rows came in, how many stayed, and why the others did not."""
    title = "Data"
    facts = run.provenance or {}
    funnel = facts.get("funnel")
    if not funnel:
        why = (
            "provenance.json is written at the end of training" if not run.provenance else "the run recorded no funnel"
        )
        return Section(title, [missing(f"No funnel of rows: {why}.")])
    lost = funnel.get("quarantined") or {}
    came = funnel.get("in", 0)
    rows = [("rows in", came, f"{came:,}")]
    rows += [(f"not fit: {why}", n, f"{n:,}") for why, n in sorted(lost.items(), key=lambda pair: -pair[1])]
    more = [("measured, not trained on", "validation")]
    rows += [(told, funnel[key], f"{funnel[key]:,}") for told, key in more if funnel.get(key)]
    rows.append(
        ("trained on", facts.get("rows", funnel.get("kept", 0)), f"{facts.get('rows', funnel.get('kept', 0)):,}")
    )
    picture = drawings.bars("From rows to training", rows, x="rows")
    blocks: list[Block] = [] if picture is None else [picture]
    source = run.values.get("data") or {}
    keys = ("path", "loss_on", "turns", "repeats", "long_rows", "on_bad", "length")
    told = {k: source[k] for k in keys if source.get(k) is not None}
    blocks.append(
        Table("how rows were chosen", ["key", "value"], [[f"data.{k}", str(v)] for k, v in told.items()], ("value",))
    )
    if not lost:
        blocks.append(Words(f"All of {came:,} rows fit; none was left out."))
    return Section(title, blocks)


def log(run: Run) -> Section:
    """One row for every start."""
    title = "Starts and resumes"
    began = starts(run)
    if not began:
        return Section(
            title, [missing("There is no events.jsonl here, so nothing says how often this run was started.")]
        )
    rows = []
    for n, (start, end) in enumerate(began, 1):
        following = began[n][0].get("step") if n < len(began) else None
        if end is not None:
            how, at = ENDINGS[end["event"]], str(end.get("step", ""))
        elif following is not None:
            how, at = f"no closing line: killed; went on from step {following}", ""
        else:
            last = run.metrics[-1]["step"] if run.metrics else None
            how, at = "no closing line: killed, or still running", "" if last is None else f"{last} measured"
        seconds = sum(((end or {}).get("seconds") or {}).values())
        begin = [str(start.get(key, "")) for key in ("step", "of", "processes")]
        rows.append([str(n), _when(start), *begin, how, at, f"{seconds:,.1f}" if seconds else ""])
    header = ["", "started (UTC)", "from step", "of", "processes", "ended", "at step", "seconds"]
    return Section(title, [Table("the starts of this run", header, rows, left=("started (UTC)", "ended"))])


def _when(event: Mapping[str, Any]) -> str:
    return re.sub(r"(\.\d+)?(\+00:00|Z)?$", "", str(event.get("time", ""))).replace("T", " ")


def again(run: Run) -> Section:
    """The command, versions, hashes and configuration."""
    title, facts = "To have it again", run.provenance
    blocks: list[Block] = []
    if facts is None:
        blocks.append(missing("No provenance.json: it is written at the end of training."))
    else:
        blocks.append(Code("Command", _command(facts.get("command", []))))
        rows = [["git", str(facts.get("git") or "not known")], ["seed", str(facts.get("seed"))]]
        rows += [[f"version of {name}", str(v)] for name, v in (facts.get("versions") or {}).items()]
        blocks.append(Table("versions", ["what", "which"], rows, left=("which",)))
    hashes = [[f"{name}", str(sha256)] for name, sha256 in ((facts or {}).get("sha256") or {}).items()]
    hashes += [["identity of the configuration", str(facts["identity"])]] if facts and facts.get("identity") else []
    hashes += [[f"heads/{name}/model.safetensors", sha256] for name, sha256 in run.hashes.items()]
    for name, head in run.judged.items():
        if head.get("weights_sha256"):
            hashes.append([f"weights of {name}, as evaluated", head["weights_sha256"]])
    if hashes:
        blocks.append(Table("hashes (sha256)", ["of", "sha256"], hashes, left=("sha256",)))
    if run.config:
        blocks.append(Code("The configuration, resolved", run.config, folded=True))
    else:
        blocks.append(missing("No config.yaml here."))
    return Section(title, blocks)


def _command(given: Sequence[str]) -> str:
    """As a user types it."""
    if not given:
        return "not known"
    verb = re.sub(r"\.py$", "", given[0])
    first = ["draftsmith", *([] if verb == "draftsmith" else [verb])]
    return " ".join([*first, *map(_quoted, given[1:])])


def _quoted(argument: str) -> str:
    """For a shell; one that holds single quotes, as Hydra's lists do, stays legible in double ones."""
    if "'" in argument and not set(argument) & set('"$`!\\'):
        return f'"{argument}"'
    return shlex.quote(argument)


def facts_of(run: Run) -> list[tuple[str, str]]:
    """What stands under the title: the base, the data, how long."""
    spec: Mapping[str, Any] = (run.evaluation or {}).get("base") or next(
        (h["base"] for h in run.heads.values() if "base" in h), {}
    )
    found = []
    if spec:
        told = ", ".join(
            f"{spec[k]:,} {what}" if k != "family" else str(spec[k])
            for k, what in (("family", ""), ("num_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
            if spec.get(k)
        )
        path = str(spec.get("path") or "made from a recipe")
        lies = f"…/{PurePath(path).name}" if PurePath(path).is_absolute() else path
        found.append(("base", f"{lies} ({told})"))
        if spec.get("dtype"):
            found.append(("computed in", str(spec["dtype"])))
    facts = run.provenance or {}
    if "rows" in facts:
        found.append(("rows", f"{facts['rows']:,}"))
    if run.metrics:
        found.append(("steps", f"{run.metrics[-1]['step']:,}"))
    every = starts(run)
    ended = [sum(end["seconds"].values()) for _, end in every if end and end.get("seconds")]
    if ended:  # a kill leaves no seconds
        least = "at least " if len(ended) < len(every) else ""
        found.append(("trained for", f"{least}{number(round(sum(ended), 1))} s"))
    if facts.get("git"):
        found.append(("git", shorter(str(facts["git"]))))
    return found
