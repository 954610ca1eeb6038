"""The table of bad inputs, and docs/errors.md, which is made of it:

cd tests && python -m faults.bad_inputs
"""

from __future__ import annotations

import re
from pathlib import Path

from .bad_configs import CONFIGS
from .bad_folders import LABELS, ROWS, STORES
from .bad_heads import BASES, CHECKPOINTS, HEADS, RUNS
from .bad_kinds import Bad
from .bad_rows import LENGTHS, LINES, MEANT, SHAPES

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
SECTIONS: dict[str, list[Bad]] = {
    "Files of rows": LINES,
    "Rows of no shape, chats that nobody said": SHAPES,
    "Too long, too short, nothing to learn": LENGTHS,
    "Taken as meant": MEANT,
    "Folders of rows": ROWS,
    "Stores": STORES,
    "Labels": LABELS,
    "Heads": HEADS,
    "The base under a head or its rows": BASES,
    "Checkpoints": CHECKPOINTS,
    "Runs": RUNS,
    "Command lines": CONFIGS,
}
TABLE = [bad for section in SECTIONS.values() for bad in section]


def tables() -> str:
    """The sections of the page."""
    return "\n\n".join(f"## {title}\n\n{_table(section)}" for title, section in SECTIONS.items()) + "\n"


def _table(section: list[Bad]) -> str:
    rows = [f"| {_cell(bad.what)} | {bad.code} | {_quoted(bad.says)} |" for bad in section]
    return "\n".join(["| what | exit | what is printed |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _quoted(says: str) -> str:
    ticks = "``" if "`" in says else "`"
    return f"{ticks}{_cell(re.sub('…+', '…', says))}{ticks}"


def page(before: str) -> str:
    """The page, its introduction kept as it is."""
    first = next(iter(SECTIONS))
    return before.partition(f"## {first}")[0] + tables()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
