"""Reads what W&B wrote offline, without W&B's server: what was really logged."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # LevelDB's log format: records in frames of <crc32, length, type>, none across a block's end
HEADER = 7
WHOLE, LAST = 1, 4


@dataclass
class Written:
    """Of one file. artifacts: name, type, metadata, used: whether the run used it (or made it), files: path
    in it -> where it lies."""

    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)


def records(path: Path) -> Iterator[Record]:
    """All that are whole; a writer that was killed leaves an unfinished one at the end."""
    data, at, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        payload = data[at + HEADER : at + HEADER + length]
        if kind == 0 or len(payload) < length:
            return
        assert zlib.crc32(payload, zlib.crc32(bytes([kind]))) == crc
        at += HEADER + length
        parts += payload
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read(path: Path) -> Written:
    out = Written()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            out.run = {"id": record.run.run_id, "project": record.run.project, "group": record.run.run_group}
            out.run["name"] = record.run.display_name
            out.config |= items(record.run.config.update)
        elif kind == "history":
            out.history.append(items(record.history.item))
        elif kind == "summary":
            out.summary |= items(record.summary.update)
        elif kind == "metric":
            out.metrics.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "files":
            out.files += [f.path for f in record.files.files]
        elif kind == "artifact":
            a = record.artifact
            files = {entry.path: entry.local_path for entry in a.manifest.contents}
            told = {"name": a.name, "type": a.type, "used": a.use_after_commit, "files": files}
            out.artifacts.append({**told, "metadata": json.loads(a.metadata or "{}")})
    return out


def items(some: Any) -> dict[str, Any]:
    """key -> value; a key of a key, as a table's own, is joined by a point."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in some}


def of(run_dir: Path) -> list[Written]:
    """One for every time that W&B was opened, the oldest first."""
    return [read(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]


def merged(parts: list[Written]) -> list[dict[str, Any]]:
    """The history by step, each metric's last value; W&B's own keys are left out."""
    steps: dict[int, dict[str, Any]] = {}
    for line in (line for part in parts for line in part.history):
        own = {k: v for k, v in line.items() if not k.startswith("_")}
        steps[own["step"]] = steps.get(own["step"], {}) | own
    return [steps[n] for n in sorted(steps)]
