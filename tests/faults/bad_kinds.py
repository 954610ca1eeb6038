"""A kind of bad input: how it is made, which verb meets it, what it ends in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class World:
    """What is sound: base, rows.jsonl, and what each verb made of them: rowsdir, store, labels, run."""

    folder: Path

    @property
    def head(self) -> Path:
        return self.folder / "run" / "heads" / "medusa"

    @property
    def base(self) -> Path:
        return self.folder / "base"


Make = Callable[[Path, World], list[str]]


@dataclass(frozen=True)
class Bad:
    """what: as docs/errors.md calls it. says: what must be printed, `…` for anything. make(own empty folder, world)
    writes it and returns changes of the verb's configuration, or (command) overrides as a user types them."""

    what: str
    code: int
    says: str
    make: Make = field(repr=False)
    verb: str = "train"
    command: bool = False

    def matches(self, line: str) -> bool:
        return re.search(".*".join(map(re.escape, self.says.split("…"))), line, re.DOTALL) is not None
