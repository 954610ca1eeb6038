"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, draftsmith, finish, start

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_command_and_the_python_snippet(micro: Path, tmp_path: Path) -> None:
    """In a folder with `my-model` and prompts, word for word but for SMALL."""
    (tmp_path / "my-model").symlink_to(micro / "base")
    asked = (micro / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(asked[:4]))
    (tmp_path / "held-out.jsonl").write_text("".join(asked[4:]))
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("draftsmith ")]
    assert [c.split()[1] for c in commands] == ["distill", "train", "evaluate", "export"]
    for command in commands:
        verb, *overrides = command.split()[1:]
        code, output = draftsmith(verb, *overrides, *SMALL[verb], cwd=tmp_path)
        assert code == 0, f"{command}\n{output}"
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())["decoding"]["prompts"]
    assert (told["count"], told["trained_on"]) == (2, 0)
    (snippet,) = blocks("python")
    code, output = finish(start([sys.executable, "-c", snippet], tmp_path))
    assert code == 0, output


SMALL = {  # the fixture's base has a context of 256 tokens: shorter answers; nothing else is changed
    "distill": ["data.generation.max_new_tokens=32"],
    "train": [],
    "evaluate": ["decoding.max_new_tokens=32"],
    "export": [],
}


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_targets_are_the_scripts(target: str) -> None:
    """(What they do is tested in test_quickstart.py, and by whoever runs this suite through them.)"""
    assert f"make {target} " in README
    assert f"scripts/{target}.sh" in README
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"scripts/{target}.sh" in done.stdout


def test_nothing_is_left_to_fill_in() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert "@@" not in page.read_text(), page.name


def test_every_page_it_names_exists() -> None:
    for page in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / page).exists(), page


def test_every_verb_and_choice_in_the_docs_exists() -> None:
    """`group=choice` in any page names a yaml that is there."""
    from draftsmith.cli import VERBS

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "__pycache__"}
    for page in pages:
        text = page.read_text()
        for verb in re.findall(r"`draftsmith (\w+)", text):
            assert verb in VERBS, f"{page.name}: {verb}"
        for group, choice in re.findall(r"[\s`](\w+)=([a-z]\w*)(?=[\s`])", text):
            if group in groups:
                assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), f"{page.name}: {group}={choice}"
