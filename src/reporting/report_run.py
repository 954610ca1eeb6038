"""What a run left behind, read for its report: tolerant of what is not there, and without secrets.

A line of metrics.jsonl or events.jsonl that a kill tore is left out and counted. Secrets are taken out before anything
else sees what was read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith import artifacts, shown
from draftsmith.reporting.curves import Point

HIDDEN = "***"
# a part of a key that names a secret: hf_token does, max_new_tokens and tokenizer do not
SECRET = re.compile(
    r"(^|[._\-])(access[_-]?token|token|secret|password|passwd|api[_-]?key|private[_-]?key|credentials?|authorization)($|[._\-])",
    re.IGNORECASE,
)
OPEN = ("samples",)  # texts of prompts and answers: whoever may see the report may see those


@dataclass(frozen=True)
class Run:
    """config: as text. heads: name -> its config.json, and of `hashes` the sha256 of its weights' file. torn: lines
    that could not be read, by file."""

    name: str
    folder: Path
    complete: bool = False
    config: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    certificate: dict[str, Any] | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    torn: dict[str, int] = field(default_factory=dict)

    def points(self, key: str) -> list[Point]:
        """Of the metrics: (step, value) wherever this key has a number."""
        return [(float(m["step"]), float(m[key])) for m in self.metrics if is_number(m.get(key))]

    @property
    def judged(self) -> dict[str, Any]:
        """The part `heads` of evaluation.json."""
        return (self.evaluation or {}).get("heads", {})

    @property
    def trained(self) -> list[str]:
        """Heads that the metrics tell of, in their order."""
        parts = (key.split("/") for m in self.metrics[:1] + self.metrics[-1:] for key in m)
        return list(dict.fromkeys(p[1] for p in parts if len(p) > 2 and p[0] in ("train", "validation")))


def read(folder: Path, values: Mapping[str, Any], config: str) -> Run:
    """values, config: what of the run's configuration may be shown, and the same as text."""
    folder = Path(folder)
    metrics, torn_metrics = _lines(folder / "metrics.jsonl")
    events, torn_events = _lines(folder / "events.jsonl")
    told, hashes = {}, {}
    for path in sorted(folder.glob("heads/*/config.json")):
        told[path.parent.name] = clean(artifacts.read_json(path))
        manifest = _json(path.with_name(artifacts.MANIFEST)) or {}
        hashes[path.parent.name] = manifest.get("files", {}).get("model.safetensors", {}).get("sha256", "")
    return Run(
        name=folder.resolve().name,
        folder=folder,
        complete=(folder / "COMPLETE.json").is_file(),
        config=config,
        values=dict(values),
        metrics=[m for m in metrics if is_number(m.get("step")) and math.isfinite(m["step"])],
        events=[clean(e) for e in events],
        evaluation=clean(_json(folder / "evaluation.json")),
        provenance=clean(_json(folder / "provenance.json")),
        certificate=clean(_json(folder / "certificate.json")),
        heads=told,
        hashes={name: sha256 for name, sha256 in hashes.items() if sha256},
        torn={name: n for name, n in (("metrics.jsonl", torn_metrics), ("events.jsonl", torn_events)) if n},
    )


def clean(value: Any, key: str = "") -> Any:
    """The same without secrets: no value of a key that names one, and every text as `shown.clean` leaves it."""
    if isinstance(value, str | list | tuple) and value and SECRET.search(key):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(k): v if k in OPEN else clean(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return shown.clean(value) if isinstance(value, str) else value


def _json(path: Path) -> Any:
    return artifacts.read_json(path) if path.is_file() else None


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines are none."""
    if not path.is_file():
        return [], 0
    found, torn = [], 0
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            torn += 1
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            torn += 1
    return found, torn


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shorter(sha256: str, letters: int = 12) -> str:
    return sha256[:letters]


def joined(parts: Sequence[str]) -> str:
    """A, B and C."""
    return ", ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
