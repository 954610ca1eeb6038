"""Every page is reached from the index, every link leads somewhere; what is quoted or generated is what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from draftsmith import reference

from .reading import ROOT, anchors, links, pages

DOCS = ROOT / "docs"
SRC = ROOT / "src"
PAGES = pages()


def target(page: Path, link: str) -> tuple[Path, str]:
    path, _, anchor = link.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, anchor = target(page, link)
        assert path.exists(), f"{page.relative_to(ROOT)}: {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.relative_to(ROOT)}: {link}: {sorted(anchors(path))}"


@pytest.mark.parametrize("start", [DOCS / "README.md", ROOT / "README.md"], ids=["index", "README"])
def test_every_page_is_reached_from(start: Path) -> None:
    """From the index in one step, from the README by going on."""
    seen, todo = {start}, [start]
    while todo:
        page = todo.pop()
        found = {target(page, link)[0] for link in links(page) if not re.match(r"[a-z]+:", link)}
        for path in found - seen:
            if path in PAGES and (start == ROOT / "README.md" or page == start):
                seen.add(path)
                todo.append(path)
    assert sorted(str(p.relative_to(ROOT)) for p in set(PAGES) - seen - {ROOT / "README.md"}) == []


def test_every_fault_of_reliability_has_a_test_that_is_there() -> None:
    """Rows 1 to 40, each with at least one link; a name behind :: is a function of the file that is linked."""
    table = (DOCS / "reliability.md").read_text().partition("## Every fault")[2]
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 41))
    for number, row in rows:
        named = re.findall(r"\[`([^`]*)`\]\(([^)]*\.py)\)", row)
        assert named, f"row {number} names no test"
        for name, path in named:
            file, _, function = name.partition("::")
            assert path.endswith(file), f"row {number}: {name} leads to {path}"
            defined = ast.parse((DOCS / path).read_text()).body
            tests = {node.name for node in defined if isinstance(node, ast.FunctionDef)}
            assert function in tests if function else any(t.startswith("test_") for t in tests), f"row {number}: {name}"


def test_the_reference_is_what_the_configuration_is() -> None:
    assert (DOCS / "reference.md").read_text() == reference.page(), f"out of date: {reference.COMMAND}"


def test_every_key_has_its_place_in_the_reference() -> None:
    text = (DOCS / "reference.md").read_text()
    for key in ("data.generation.max_new_tokens", "heads.medusa.num_layers", "trainer.keep", "certificate.alpha"):
        assert f"| `{key}` |" in text
    told = re.search(r"\| `trainer\.keep` \| (.*) \| (.*) \| (.*) \|", text)
    assert told
    assert told.groups() == ("integer", "`2`", "newest checkpoints kept")


def said() -> list[str]:
    """Every text in the source, an f-string's values as \\0."""
    found: list[str] = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text.replace("{{", "{").replace("}}", "}") for text in found]


def quoted() -> list[str]:
    """The lines in the first column of docs/troubleshooting.md's tables of lines."""
    found: list[str] = []
    inside = False
    for line in (DOCS / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| the line |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            cell = re.match(r"\| `([^`]+)` \|", line)
            assert cell, line
            found.append(cell[1])
    return found


def test_at_least_thirty_lines_are_explained_each_once() -> None:
    assert len(quoted()) == len(set(quoted())) >= 30


SOURCE = said()


@pytest.mark.parametrize("line", quoted())
def test_every_line_that_is_explained_is_one_the_source_says(line: str) -> None:
    """Its words, between the `…`, stand in this order in one text of the source; or each in one of its own, where a
    line is put together of two."""
    stems = [stem.strip() for stem in line.split("…") if len(stem.strip(" :;,.'()=")) > 2]
    assert stems, "nothing but …"
    one = re.compile(".*?".join(map(re.escape, stems)), flags=re.DOTALL)
    if any(one.search(text) for text in SOURCE):
        return
    assert max(map(len, stems)) >= 12, "too short to be told from others"
    gone = [stem for stem in stems if len(stem) >= 12 and not any(stem in text for text in SOURCE)]
    assert gone == [], "the source says this no more"
    assert len([stem for stem in stems if len(stem) < 12]) <= 1
