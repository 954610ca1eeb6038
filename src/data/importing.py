"""From sources to a folder of rows, and from a folder of rows to what a run trains on.

Training reads nothing but folders of rows: any other source is encoded into one first, with this base's tokenizer
and chat template. What does not fit is quarantined, counted and told.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from draftsmith import artifacts
from draftsmith.data import chat
from draftsmith.data.funnel import Funnel, intake, table
from draftsmith.data.journal import QUARANTINE
from draftsmith.data.records import Record
from draftsmith.data.rows import Row, Rows, shard_name, shards, to_table, verified, write_shard
from draftsmith.data.settings import DataConfig
from draftsmith.data.sources import SourceConfig, files, published_as
from draftsmith.errors import DataError, RowError

if TYPE_CHECKING:
    from draftsmith.contracts import BaseSpec

BUCKETS = 1 << 32  # of the hash that splits validation from training


class Base(Protocol):
    """What encoding needs of a base: no weights."""

    @property
    def spec(self) -> BaseSpec: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def eos_ids(self) -> frozenset[int]: ...


def import_rows(
    folder: Path, sources: Mapping[str, SourceConfig], config: DataConfig, base: Base, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Encodes every record of the sources into `folder`, published whole; returns the funnel's facts."""
    check_origins(sources, base.spec)
    with Funnel(folder.with_name(f"{folder.name}.quarantine.jsonl")) as funnel:
        with artifacts.publish(folder, kind="rows", funnel=(told := {}), **facts) as temporary:
            for number, some in enumerate(shards(_encoded(intake(sources, funnel), config, base, funnel))):
                write_shard(temporary / shard_name(number), to_table(some))
            funnel.flush()
            funnel.settle(config.on_bad, sources)
            told.update(funnel.facts)
            (temporary / QUARANTINE).write_bytes(funnel.path.read_bytes())
    funnel.path.unlink()
    return funnel.facts


def check_origins(sources: Mapping[str, SourceConfig], spec: BaseSpec) -> None:
    """Every folder of rows among the sources, whole or by some of its files, is undamaged and holds this base's ids;
    DataError else."""
    paths = [(s.path, s.split) for s in sources.values() if s.path]
    for folder in sorted({p.parent for path, split in paths for p in files(path, split)}):
        if published_as(folder) == "rows":
            verified(folder, spec)


def _encoded(records: Iterable[Record], config: DataConfig, base: Base, funnel: Funnel) -> Iterator[Row]:
    seen: Counter[str] = Counter()
    for record in records:
        try:
            row = row_of(record, config, base, seen[record.content])
        except RowError as e:
            funnel.refuse(e, said(record))
            continue
        yield row
        seen[record.content] += 1


def row_of(record: Record, config: DataConfig, base: Base, occurrence: int) -> Row:
    """The record as a row; RowError for what cannot be learned from."""
    ids, mask = encode(record, config, base)
    told = {"source": record.where, "said": json.dumps(said(record), ensure_ascii=False), **record.kept}
    name = f"{record.content[:16]}-{occurrence}"
    return Row(**{**told, "id": name, "ids": ids, "mask": mask, "part": record.source, "asked": record.asked})


def encode(record: Record, config: DataConfig, base: Base) -> tuple[list[int], list[int]]:
    """(ids, mask) of a record. RowError for what cannot be learned from."""
    where, tokenizer = record.where, base.tokenizer
    if record.ids:
        ids, mask = list(record.ids), list(record.mask)
    elif record.later:
        raise RowError(where, "no_answer", "turns without answers; let the base answer them with draftsmith distill")
    elif record.messages and config.loss_on == "all":
        ids = chat.whole_ids(tokenizer, record.messages, where, config.chat, tools=record.tools)
        mask = [1] * len(ids)
    elif record.messages:
        done = chat.encode(tokenizer, record.messages, where, config.chat, tools=record.tools, eos_ids=base.eos_ids)
        ids, mask = done.ids, done.mask
    elif record.completion is not None:
        done = chat.completion(tokenizer, record.prompt, record.completion, where, eos_ids=base.eos_ids)
        ids, mask = done.ids, done.mask
    elif record.text:
        if config.loss_on != "all":
            raise RowError(where, "loss_on", "plain text has no assistant; set data.loss_on=all")
        ids = chat.text_ids(tokenizer, record.text)
        mask = [1] * len(ids)
    else:
        raise RowError(where, "no_answer", "a prompt without an answer; let the base answer it with draftsmith distill")
    outside = [i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < base.spec.vocab_size]
    if outside:
        raise RowError(where, "ids", f"token id {outside[0]} outside the base's vocabulary of {base.spec.vocab_size}")
    return ids, mask


def said(record: Record) -> dict[str, Any]:
    """The text of a record, as rows keep it."""
    if record.later:
        return {"turns": [*(m["content"] for m in record.messages), *record.later]}
    if record.messages:
        return {"messages": list(record.messages)}
    if record.prompt:
        return {"prompt": record.prompt, "completion": record.completion}
    return {"text": record.text} if record.text else {}


@dataclass(frozen=True)
class Chosen:
    """What a run trains on and what it only measures. weights_N: how often each training row is seen per epoch."""

    training: Rows
    validation: Rows
    weights_N: np.ndarray
    funnel: dict[str, Any]


def choose(
    rows: Rows,
    config: DataConfig,
    spec: BaseSpec,
    held: Rows | None = None,
    weights: Mapping[str, float] | None = None,
) -> Chosen:
    """Applies data.loss_on, turns, repeats, long_rows and validation to the rows of a folder.

    held: the rows of validation.path. weights: of the rows' parts, where the configuration names none. DataError if
    no row with a token to learn from is left, or if a question of the validation rows is trained on.
    """
    taken, reasons, first = len(rows), Counter[str](), next(iter(rows), None)
    rows = _fitted(rows, config, spec, reasons)
    measured = _fitted(held, config, spec, Counter()) if held is not None else None
    if not len(rows):
        funnel = {"in": taken, "kept": 0, "quarantined": dict(reasons)}
        raise DataError(
            f"{first.source or first.id if first else config.path}: no row left with a token to learn from (0 of"
            f" {taken} rows left: {table(funnel)}); see data.long_rows and data.loss_on"
        )
    if measured is not None and not len(measured):
        raise DataError(
            f"{config.validation.path}: data.validation.path: no row left with a token to measure (0 of"
            f" {len(held or ())} rows left); see data.long_rows and data.loss_on"
        )
    asked = np.array(rows.text("asked"), dtype=object)
    if measured is None:
        aside_N = np.array([_bucket(a, i) < config.validation.share for i, a in enumerate(asked)], dtype=bool)
        rows, measured = rows.select(~aside_N), rows.select(aside_N)
        if config.validation.share and not (len(rows) and len(measured)):
            raise DataError(
                f"data.validation.share={config.validation.share}: {len(rows)} rows left to train on and"
                f" {len(measured)} to measure; give more rows or another share"
            )
    leaked = sorted({*rows.text("asked")} & {*measured.text("asked")} - {""})
    if leaked:
        at = rows.text("asked").index(leaked[0])
        raise DataError(
            f"data.validation: {len(leaked)} of its questions are trained on too, such as that of"
            f" {rows[at].source}; take them out of one side, or use data.validation.share"
        )
    named = {**(weights or {}), **{name: source.weight for name, source in config.chosen.items()}}
    weights_N = np.array([named.get(part, 1.0) for part in rows.text("part")])
    funnel = {"in": taken, "kept": len(rows), "validation": len(measured), "quarantined": dict(reasons)}
    if again := twins(rows):
        funnel["twins"] = again
    return Chosen(rows, measured, weights_N, funnel)


def twins(rows: Rows) -> int:
    """How many rows are those of a conversation that an earlier one equals: their ids count them, `<hash>-1`."""
    return sum(name.partition("/")[0].rpartition("-")[2] not in ("", "0") for name in rows.text("id") if "-" in name)


def _bucket(asked: str, i: int) -> float:
    """A number in [0, 1) that equal questions share."""
    return int(artifacts.fingerprint(["validation", asked or i])[:8], 16) / BUCKETS


def _fitted(rows: Rows, config: DataConfig, spec: BaseSpec, reasons: Counter[str]) -> Rows:
    """The rows as data.loss_on, turns, repeats and long_rows want them; what is left out is counted."""
    if config.loss_on == "all":
        rows = rows.learned(np.ones_like(rows.mask))
    elif config.turns == "last":
        last_N = _last_rows(rows)
        reasons["earlier_turn"] += int((~last_N).sum())
        rows = rows.select(last_N)
        rows = rows.learned(last_turns(rows))
    if config.repeats == "drop":
        seen = {content: n for n, content in reversed(list(enumerate(rows.contents())))}
        reasons["repeated"] += len(rows) - len(seen)
        rows = rows.select(np.array(sorted(seen.values()), dtype=np.int64))
    room = min(config.length, spec.max_positions)
    long_N = rows.lengths_N > room
    if long_N.any() and config.long_rows == "error":
        n = int(np.flatnonzero(long_N)[0])
        limit = f"data.length={room}; raise it or" if room == config.length else f"the base's context of {room};"
        raise DataError(
            f"{rows[n].source}: {rows.lengths_N[n]} tokens do not fit {limit} set data.long_rows=truncate or drop"
            f" ({int(long_N.sum())} of {len(rows)} rows)"
        )
    if config.long_rows == "drop":
        reasons["too_long"] += int(long_N.sum())
        rows = rows.select(~long_N)
    else:
        rows = rows.truncated(room)
    learns_N = rows.learns()
    reasons["nothing_to_learn"] += int((~learns_N).sum())
    for name in [name for name, n in reasons.items() if not n]:
        del reasons[name]
    return rows.select(learns_N)


def _last_rows(rows: Rows) -> np.ndarray:
    """last_N: whether row n is the last of its chat, which may be several rows: <id>, <id>/1, <id>/2."""
    names = [row_id.partition("/") for row_id in rows.text("id")]
    last: dict[str, int] = {}
    for name, _, n in names:
        last[name] = max(last.get(name, 0), int(n or 0))
    return np.array([int(n or 0) == last[name] for name, _, n in names], dtype=bool)


def last_turns(rows: Rows) -> np.ndarray:
    """The mask with, of every row, only its last run of learned tokens."""
    mask = np.zeros_like(rows.mask)
    for begin, end in zip(rows.begins_N, rows.ends_N, strict=True):
        learned = np.flatnonzero(rows.mask[begin:end])
        if len(learned):
            gaps = np.flatnonzero(np.diff(learned) > 1)
            start = learned[gaps[-1] + 1] if len(gaps) else learned[0]
            mask[begin + start : begin + learned[-1] + 1] = 1
    return mask
