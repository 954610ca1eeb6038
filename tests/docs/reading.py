"""What the pages say: their fenced blocks, the commands in them, their links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = {"bash", "sh", "shell", "console", "zsh", "text-console"}
TAGS = {"run", "compose"}
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", flags=re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of the fence, from 1
    language: str
    tag: str  # what stands behind the language
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Every fenced block, in order; AssertionError for one that is not closed."""
    found, opened, begun, inside = [], None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, begun, inside = fence, number, []
        elif opened and fence and fence[2].startswith(opened[2]) and not fence[3].strip():
            language, _, tag = opened[3].strip().partition(" ")
            found.append(Block(page, begun, language, tag.strip(), "\n".join(inside) + "\n"))
            opened = None
        elif opened is not None:
            inside.append(line.removeprefix(opened[1]))
    assert opened is None, f"{page.relative_to(ROOT)}:{begun}: a fence that is not closed"
    return found


def lines(text: str) -> Iterator[str]:
    """The commands of a shell text as they stand there: comments and empty lines out, continued lines as one."""
    kept = ""
    for line in text.splitlines():
        kept += line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(kept, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        if words:
            yield kept.strip()
        kept = ""
    assert not kept.strip(), f"not a whole command: {kept}"


def words(line: str) -> list[list[str]]:
    """The words of each simple command in a line: `a && b | c > d &` is a, b and c."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("();|&"):
            simple.append([])
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        else:
            simple[-1].append(word)
    return [one for one in simple if one]


def commands(text: str) -> Iterator[tuple[dict[str, str], list[str]]]:
    """(environment set in front of it, words) of every command; NAME=value on a line of its own is remembered and
    $NAME replaced by its words."""
    known: dict[str, str] = {}
    for line in lines(text):
        for simple in words(line):
            before: dict[str, str] = {}
            rest = list(simple)
            while rest and ASSIGNMENT.fullmatch(rest[0]):
                name, _, value = rest.pop(0).partition("=")
                before[name] = value
            if not rest:
                known |= before
                continue
            expanded: list[str] = []
            for word in rest:
                name = word.removeprefix("$")
                expanded += shlex.split(known[name]) if word.startswith("$") and name in known else [word]
            yield before, expanded


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found) | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def links(page: Path) -> list[str]:
    """What a page links to, pictures included, code left out."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)
