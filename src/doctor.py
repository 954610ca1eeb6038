"""draftsmith doctor: the environment, the rows and the base, before anything is spent on them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, room, supply
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError, DraftsmithError
from draftsmith.reporting.checkup import checkup

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.data.checks import Finding, Sample
    from draftsmith.data.funnel import Funnel
    from draftsmith.data.records import Record
    from draftsmith.data.rows import Row, Rows

PACKAGES = ("torch", "transformers", "lightning", "pyarrow", "datasets", "deepspeed", "wandb")
ROOM = 2 * 1024**3  # bytes free below which a run may not end well


@dataclasses.dataclass(frozen=True)
class DoctorConfig(prepare.MachineConfig):
    read: int = 200_000  # rows read of each source
    sample: int = 500  # rows that are encoded and inspected
    policy_tokens: int = 20_000  # tokens that the base reads to say whether they are its own; 0: none
    show: int = 1  # rows printed token by token
    colour: str = "auto"  # auto | always | never
    out: str | None = None  # the report as JSON

    def __post_init__(self) -> None:
        if self.read < 1 or self.sample < 1 or self.policy_tokens < 0 or self.show < 0:
            raise ConfigError("read, sample, policy_tokens, show: at least 1 row to look at, and no negative number")
        if self.colour not in ("auto", "always", "never"):
            raise ConfigError(f"colour='{self.colour}': choose auto, always or never")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Looks at cfg.data with cfg.base and returns the report. DataError, after printing it, if it has errors."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    names = [f.name for f in dataclasses.fields(DoctorConfig)]
    own = config.typed({name: cfg[name] for name in names}, DoctorConfig, "doctor")
    own.apply()
    from draftsmith.data import checks

    if own.out:
        room.ready(Path(own.out).absolute().parent, "out")
    report: dict[str, Any] = {"environment": environment(own.device)}
    findings: list[Finding] = list(_surroundings(report["environment"]))
    base = prepare.load_base(base_config, own.device)
    try:
        findings += _data(data, base, own, report)
    except DraftsmithError as e:
        findings.append(checks.Finding("data", checks.ERROR, str(e), "mend what it names"))
    findings.sort(key=lambda f: (checks.ERROR, checks.WARNING, checks.NOTE).index(f.severity))
    report["findings"] = checks.plain(findings)
    coloured = own.colour == "always" or (own.colour == "auto" and sys.stdout.isatty())
    prepare.say(checkup(report, colour=coloured))
    if own.out:
        artifacts.write_json(Path(own.out), report)
    errors = [f.name for f in findings if f.severity == checks.ERROR]
    if errors:
        raise DataError(f"doctor: {len(errors)} error{'s' * (len(errors) > 1)}: {', '.join(errors)}")
    return report


def _data(data: DataConfig, base: BaseLM, own: DoctorConfig, report: dict[str, Any]) -> Iterator[Finding]:
    from draftsmith.data import checks, looks
    from draftsmith.data.rows import read_folder

    supply.check(data)
    looked = data
    if data.prompts is None and data.path and supply.is_rows(data.path):
        whole, facts = read_folder(Path(data.path))
        made = (facts.get("chat") or {}).get("thinking")
        yield from checks.origin(facts, base.spec, Path(data.path))
        yield from checks.other_thinking(made, base.tokenizer, data.chat)
        if made is not None:  # the rows are looked at as what they are
            looked = dataclasses.replace(data, chat=dataclasses.replace(data.chat, thinking=made))
        report["funnel"] = facts.get("funnel") or {"in": len(whole), "kept": len(whole), "quarantined": {}}
        asked = set(whole.text("asked"))
        yield from checks.repeats(whole.contents())
        rows = whole.select(_spread(len(whole), own.sample))
        report["sample"] = {"looked_at": len(rows), "refused": {}, "encoded": len(rows)}
    else:
        records, read = _records(data, own)
        report["funnel"] = read.facts
        yield from checks.refusals(read.reasons, read.taken, f"{read.taken:,} rows", data.on_bad, read.firsts)
        yield from checks.repeats([r.content for r in records])
        unsaid = [*checks.thinking_choice(base.tokenizer, data.chat)] if any(r.messages for r in records) else []
        yield from unsaid
        if unsaid:  # no chat can be encoded
            return
        asked = {r.asked for r in records}
        rows, seen = _encoded(records, data, base, own)
        report["sample"] = {"looked_at": seen.taken, "refused": seen.facts["quarantined"], "encoded": len(rows)}
        some = f"the {seen.taken:,} looked at"
        yield from checks.refusals(seen.reasons, seen.taken, some, data.on_bad, seen.firsts)
    if not len(rows):
        raise DataError("0 rows are left to look at")
    report["lengths"], report["context"] = looks.lengths(rows), base.spec.max_positions
    if data.prompts is not None:  # no answers yet: the base will write them
        report["shown"] = looks.shown(rows, base.tokenizer, own.show)
        return
    yield from _inspected(checks.Sample(rows, base.tokenizer, base.eos_ids, base.spec, looked), base, own, report)
    yield from _overlap(data, base, asked)


def _inspected(sample: Sample, base: BaseLM, own: DoctorConfig, report: dict[str, Any]) -> Iterator[Finding]:
    """What rows with answers are asked."""
    from draftsmith.data import checks, looks

    rows = sample.rows
    yield from checks.inspect(sample)
    report["learned"] = float(rows.counts(0)[:, 0].sum() / max(1, rows.lengths_N.sum()))
    report["shown"] = looks.shown(rows, base.tokenizer, own.show)
    if own.policy_tokens:
        report["policy"] = _policy(sample, base, own)
        yield from checks.off_policy(report["policy"])


def _overlap(data: DataConfig, base: BaseLM, asked: set[str]) -> Iterator[Finding]:
    """asked: what all the training rows ask."""
    from draftsmith.data import checks
    from draftsmith.data.rows import read_folder

    try:
        measured = supply.measured_rows(data, base)
    except ConfigError:
        unsaid = [*checks.thinking_choice(base.tokenizer, data.chat)]  # these chats have to be encoded, too
        if not unsaid:
            raise
        yield from unsaid
        return
    if measured is not None:
        yield from checks.overlap(asked, read_folder(measured, base.spec)[0])


def _records(data: DataConfig, own: DoctorConfig) -> tuple[list[Record], Funnel]:
    """Up to own.read records of each source, and what became of all that was read."""
    from draftsmith.data.funnel import Funnel, intake
    from draftsmith.data.prompts import make_up

    with Funnel(Path(os.devnull)) as funnel:
        if not data.chosen:
            assert data.prompts is not None
            records = make_up(data.prompts)
            funnel.taken = len(records)
            return records, funnel
        few = {n: dataclasses.replace(s, limit=min(s.limit or own.read, own.read)) for n, s in data.chosen.items()}
        return list(intake(few, funnel)), funnel


def _encoded(records: list[Record], data: DataConfig, base: BaseLM, own: DoctorConfig) -> tuple[Rows, Funnel]:
    """own.sample of the records, evenly spread, as rows, and what became of them."""
    from draftsmith.data import importing
    from draftsmith.data.funnel import Funnel
    from draftsmith.data.rows import Rows
    from draftsmith.errors import RowError

    rows: list[Row] = []
    seen = Funnel(Path(os.devnull))
    for n in _spread(len(records), own.sample):
        seen.taken += 1
        try:
            asked = data.prompts is not None
            rows.append(_asked(records[n], data, base) if asked else importing.row_of(records[n], data, base, 0))
        except RowError as e:
            seen.count(e)
    return Rows.of(rows), seen


def _asked(record: Record, data: DataConfig, base: BaseLM) -> Row:
    """A prompt as distilling would open it: nothing of it is learned."""
    from draftsmith.data.generate import Conversation, Setting
    from draftsmith.data.rows import Row

    setting = Setting(base.tokenizer, base.eos_ids, base.spec.max_positions, data.generation, data.chat)
    ids = Conversation("doctor", record, setting).ask() or []
    return Row("", ids, [0] * len(ids), record.where, asked=record.asked)


def _spread(n: int, count: int) -> Any:
    """At most `count` of range(n), evenly spread."""
    import numpy as np

    return np.unique(np.linspace(0, n - 1, min(n, count)).round().astype(int)) if n else np.array([], dtype=int)


def _policy(sample: Sample, base: BaseLM, own: DoctorConfig) -> dict[str, float]:
    from draftsmith.data.policy import own_words

    length = min(sample.config.length, base.spec.max_positions)
    rows = sample.rows.truncated(length)
    few = max(1, int(own.policy_tokens / max(1.0, float(rows.lengths_N.mean()))))
    return own_words(base, rows.select(_spread(len(rows), few)), length, base.device)


def environment(device: str) -> dict[str, Any]:
    """Versions, device, room on the disk, where temporary files go, how runs are tracked."""
    import torch

    here, temporary = Path.cwd(), Path(tempfile.gettempdir())
    tracked = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "no key")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": f"{device}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else ", no GPU"),
        "disk": f"{shutil.disk_usage(here).free / 1024**3:.1f} GiB free here",
        "temporary": f"{temporary} ({'the same' if _same_disk(temporary, here) else 'another'} filesystem)",
        "tracker": f"wandb {tracked}" if importlib.util.find_spec("wandb") else "wandb is not installed",
    }


def _surroundings(told: dict[str, Any]) -> Iterator[Finding]:
    from draftsmith.data.checks import ERROR, WARNING, Finding

    here = Path.cwd()
    if shutil.disk_usage(here).free < ROOM:
        yield Finding("disk", WARNING, f"{told['disk']}", "free some, or run elsewhere")
    try:
        with tempfile.NamedTemporaryFile(dir=here):
            pass
    except OSError as e:
        yield Finding("write", ERROR, f"{here} cannot be written: {e.strerror}", "run elsewhere")


def _same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def main() -> None:
    config.command("doctor", run)


if __name__ == "__main__":
    main()
