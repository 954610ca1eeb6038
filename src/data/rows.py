"""Rows on disk and in memory: token ids, loss mask, provenance. Training reads nothing else.

A row is {"id", "ids", "mask", "source"}: ids and mask have equal length; mask 1 = learn to predict this
token. A folder of rows (written by `draftsmith distill`) has rows.jsonl and a manifest with the base's
fingerprints; a plain JSON-lines file may hold rows, chats (`messages`) or plain `text`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith import artifacts
from draftsmith.data import chat
from draftsmith.data.generate import GenerationConfig
from draftsmith.data.prompts import Prompt, PromptsConfig, check_messages, json_lines
from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from draftsmith.contracts import BaseSpec

ROWS = "rows.jsonl"
PROMPTS = "prompts.jsonl"  # what the rows answer, beside them: evaluation holds its own prompts against these


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # a folder of rows, or JSON lines of rows, chats or text
    prompts: PromptsConfig | None = None  # instead of path: let the base answer these first
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    loss_on: str = "assistant"  # assistant | all
    length: int = 2048  # tokens per packed sequence
    batch_size: int = 8  # packed sequences per micro-batch and process
    long_rows: str = "error"  # error | truncate | drop: what to do with a row longer than `length`
    num_workers: int = 0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.prompts is None):
            raise ConfigError("path, prompts: give one of them; rows to read, or prompts to answer first")
        for name, value, choices in (
            ("loss_on", self.loss_on, ("assistant", "all")),
            ("long_rows", self.long_rows, ("error", "truncate", "drop")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}='{value}': choose one of {', '.join(choices)}")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")


@dataclass(frozen=True)
class Row:
    id: str
    ids: list[int]
    mask: list[int]
    source: str = ""


def write_rows(folder: Path, rows: Iterable[Row], prompts: Iterable[Prompt], **facts: Any) -> int:
    """Publishes a folder of rows and the prompts they answer, whole, with `facts` in its manifest; returns how
    many rows."""
    count = 0
    with artifacts.publish(folder, kind="rows", **facts) as temporary:
        with open(temporary / ROWS, "w") as f:
            for row in rows:
                f.write(json.dumps(vars(row), ensure_ascii=False) + "\n")
                count += 1
        with open(temporary / PROMPTS, "w") as f:
            for prompt in prompts:
                told = {"prompt": prompt.text} if prompt.text else {"messages": list(prompt.messages)}
                f.write(json.dumps(told, ensure_ascii=False) + "\n")
        if not count:
            raise DataError(f"{folder}: no row to write; every prompt was dropped")
    return count


def read_rows(path: Path, config: DataConfig, spec: BaseSpec, tokenizer: Any) -> list[Row]:
    """Every row of `path`, checked against the base and the length; DataError names file:row."""
    if path.is_dir():
        _check_origin(artifacts.verify(path), spec, path)
        path = path / ROWS
    rows = []
    for where, value in json_lines(path):
        row = _fitted(_row(value, config, spec, tokenizer, where), config, spec, where)
        if row is not None:
            rows.append(row)
    if not any(any(row.mask[2:]) for row in rows):  # no head predicts a row's first two tokens
        raise DataError(
            f"{path}: no row left with a token to learn from ({len(rows)} rows left);"
            " see data.long_rows and data.loss_on"
        )
    return rows


def _row(value: dict[str, Any], config: DataConfig, spec: BaseSpec, tokenizer: Any, where: str) -> Row:
    if "ids" in value:
        row = _token_row(value, where)
    elif "messages" in value:
        row = Row("", *chat.encode(tokenizer, check_messages(value["messages"], where), where), source=where)
    elif isinstance(value.get("text"), str):
        if config.loss_on != "all":
            raise DataError(f"{where}: plain text has no assistant; set data.loss_on=all")
        ids = chat.text_ids(tokenizer, value["text"])
        row = Row("", ids, [1] * len(ids), source=where)
    else:
        raise DataError(f"{where}: has none of `ids`, `messages`, `text`; keys: {sorted(value)}")
    outside = [i for i in (min(row.ids, default=0), max(row.ids, default=0)) if not 0 <= i < spec.vocab_size]
    if outside:
        raise DataError(f"{where}: token id {outside[0]} outside the base's vocabulary of {spec.vocab_size}")
    if config.loss_on == "all":
        return Row(row.id, row.ids, [1] * len(row.ids), row.source)
    return row


def _token_row(value: dict[str, Any], where: str) -> Row:
    ids, mask = value["ids"], value.get("mask")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise DataError(f"{where}: ids: give a list of integers")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise DataError(f"{where}: mask: give one 0 or 1 per id ({len(ids)})")
    return Row(str(value.get("id", "")), ids, [int(m) for m in mask], str(value.get("source", where)))


def _fitted(row: Row, config: DataConfig, spec: BaseSpec, where: str) -> Row | None:
    """The row if it fits a packed sequence and the base's own context, else what long_rows says."""
    room = min(config.length, spec.max_positions)
    if len(row.ids) <= room:
        return row
    if config.long_rows == "error":
        limit = f"data.length={room}; raise it or" if room == config.length else f"the base's context of {room};"
        raise DataError(f"{where}: {len(row.ids)} tokens do not fit {limit} set data.long_rows=truncate or drop")
    if config.long_rows == "drop":
        return None
    return Row(row.id, row.ids[:room], row.mask[:room], row.source)


def _check_origin(facts: dict[str, Any], spec: BaseSpec, path: Path) -> None:
    """Rows hold ids of one tokenizer; another one, even of the same size, would train on noise."""
    wrote = facts.get("base", {})
    for name in ("tokenizer_sha256", "template_sha256"):
        if wrote.get(name) and wrote[name] != getattr(spec, name):
            raise DataError(
                f"{path}: its rows were written with another {name.split('_')[0]} (base {wrote.get('path')});"
                f" distil them again with this base"
            )
