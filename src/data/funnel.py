"""Counts what comes in, what stays and what does not, and why. in = kept + quarantined, always."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from draftsmith import artifacts
from draftsmith.data import shapes, sources
from draftsmith.data.records import Record
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError, RowError

SHOWN = 2000  # characters of a refused row that the quarantine keeps


class Funnel:
    """A context that writes refused rows to `path` as they come: where, reason, detail, and the row's beginning.

    taken: rows seen; reasons: slug -> how many were refused for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken = 0
        self.reasons: Counter[str] = Counter()
        self.firsts: dict[str, RowError] = {}  # of each reason
        self._file: Any = None

    def __enter__(self) -> Funnel:
        with artifacts.disk(self.path, "the quarantine"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w")
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def refuse(self, why: RowError, value: Any = None) -> None:
        line = {"where": why.where, "reason": why.reason, "detail": why.detail}
        if value is not None:
            line["row"] = json.dumps(value, ensure_ascii=False, default=str)[:SHOWN]
        with artifacts.disk(self.path, "the quarantine"):
            # a refused row may hold half a character: the quarantine is JSON lines all the same
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")
        self.count(why)

    def count(self, why: RowError) -> None:
        """Refused, and told elsewhere."""
        self.reasons[why.reason] += 1
        self.firsts.setdefault(why.reason, why)

    def flush(self) -> None:
        with artifacts.disk(self.path, "the quarantine"):
            self._file.flush()

    @property
    def first(self) -> RowError | None:
        return next(iter(self.firsts.values()), None)

    @property
    def facts(self) -> dict[str, Any]:
        quarantined = sum(self.reasons.values())
        return {"in": self.taken, "kept": self.taken - quarantined, "quarantined": dict(sorted(self.reasons.items()))}

    def settle(self, on_bad: str, chosen: Mapping[str, SourceConfig]) -> None:
        """DataError if nothing is left of the chosen sources, or, with on_bad=error, if anything was refused."""
        refused = sum(self.reasons.values())
        if not self.taken:
            places = ", ".join(source.path or f"hub={source.hub}" for source in chosen.values())
            raise DataError(f"{places}: 0 of 0 rows left: the sources are empty; give data.path, or one of them, rows")
        if refused and on_bad == "error":
            raise DataError(
                f"{self.first}; {table(self.facts)}; all that do not fit: {self.path}; mend them, or data.on_bad=skip"
            )
        if refused == self.taken:
            raise DataError(f"0 of {self.taken} rows left; {table(self.facts)}; see {self.path}, and mend them")


def table(facts: Mapping[str, Any]) -> str:
    """The funnel as one phrase: 3 of 1,000 rows do not fit (role 2, json 1)."""
    reasons = facts["quarantined"]
    if not reasons:
        return f"all of {facts['in']:,} rows fit"
    told = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda pair: -pair[1]))
    return f"{sum(reasons.values()):,} of {facts['in']:,} rows do not fit ({told})"


def intake(chosen: Mapping[str, SourceConfig], funnel: Funnel) -> Iterator[Record]:
    """The records of all sources, one source after the other; what is none goes to the funnel's quarantine."""
    for name, source in chosen.items():
        for where, value in sources.read(source):
            funnel.taken += 1
            if isinstance(value, RowError):
                funnel.refuse(value)
                continue
            try:
                yield shapes.record(value, where, source.shape, name)
            except RowError as e:
                funnel.refuse(e, value)
