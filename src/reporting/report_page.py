"""The parts that a report is made of, and how they become one HTML file and one Markdown file.

The HTML loads nothing: style and pictures are inside, there is no script, and its own policy forbids any. Whatever a
run says is text there, never markup.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.reporting.curves import Picture
from draftsmith.reporting.leaderboard import LOOKS

TEMPLATES = Path(__file__).parent / "templates"
HTML, MARKDOWN = "report.html", "report.md"
# LOOKS for a dark page: as far apart for colour-blind eyes, each at least 4.5 : 1 on its ground
DARK = ("#5EB3F0", "#FF8A4C", "#3FC79A", "#E79AC4", "#F2B63C", "#9AD8FA", "#D0D0D0")


@dataclass(frozen=True)
class Words:
    """tone: "" | "missing", why something is not there | "warning"."""

    text: str
    tone: str = ""
    kind: str = "words"


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are figures unless `left` names them. of: what it shows, said aloud."""

    of: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Code:
    """folded: behind its title until it is opened."""

    title: str
    text: str
    folded: bool = False
    kind: str = "code"


@dataclass(frozen=True)
class Sample:
    """One text: steps as evaluation.json has them."""

    title: str
    prompt: str
    steps: Sequence[Mapping[str, Any]]
    told: str
    kind: str = "sample"


Block = Words | Table | Code | Sample | Picture


@dataclass(frozen=True)
class Section:
    """note: one line below the title."""

    title: str
    blocks: Sequence[Block]
    note: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def groups(self) -> list[list[Block]]:
        """The blocks in order, pictures that follow one another together: they stand side by side."""
        found: list[list[Block]] = []
        for block in self.blocks:
            if found and block.kind == "picture" and found[-1][0].kind == "picture":
                found[-1].append(block)
            else:
                found.append([block])
        return found


@dataclass(frozen=True)
class Tile:
    """A head at a glance. verdict: "lossless" | "exact" | "lossy" | "wrong" | "unknown", and `said` in words."""

    name: str
    figures: Sequence[tuple[str, str, str]]  # figure, what it is, its range or what it stands on
    verdict: str
    mark: str
    said: str
    look: int = 0


@dataclass(frozen=True)
class Page:
    title: str
    about: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    notes: Sequence[Words] = field(default_factory=list)


def html(page: Page) -> str:
    return _environment(True).get_template("report.html").render(page=page, looks=LOOKS, dark=DARK)


def markdown(page: Page) -> str:
    text = _environment(False).get_template("report.md").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write(folder: Path, page: Page) -> str:
    """report.html and report.md in the folder, each whole or as it was; the line that tells of them."""
    for name, text in ((HTML, html(page)), (MARKDOWN, markdown(page))):
        # half a character, as a sampled text may hold, is no reason to have no report
        artifacts.write_bytes(folder / name, text.encode("utf-8", "replace"))
    return f"-> {folder / HTML}, {MARKDOWN}"


@functools.cache
def _environment(escape: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"plain": plain, "cell": cell, "fence": fence, "marked": marked}
    return made


def plain(text: str) -> str:
    """Text for Markdown, which none of its characters may turn into markup."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]])", r"\\\1", safe)


def cell(text: str) -> str:
    """The same for a cell of a table."""
    return " ".join(plain(str(text)).replace("|", "\\|").split())


def marked(text: str) -> str:
    """A text in which a line break is seen and breaks no line: of a draft that was rejected, and is no part of the
    answer."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def fence(text: str) -> str:
    """A fence longer than any row of backticks inside."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
