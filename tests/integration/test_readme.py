"""What the README tells a newcomer about make is so, and no page names what is not there. (Its commands, and those of
docs/, are run and composed by tests/docs.)"""

from __future__ import annotations

import re
import subprocess

import pytest

from .conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_make_targets_are_the_scripts(target: str) -> None:
    """(What they do is tested in test_quickstart.py, and by whoever runs this suite through them.)"""
    assert f"make {target} " in README
    assert f"scripts/{target}.sh" in README
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"scripts/{target}.sh" in done.stdout


def test_the_readme_goes_from_prompts_to_an_export() -> None:
    (block,) = re.findall(r"```bash run\n(.*?)```", README, flags=re.DOTALL)
    assert [line.split()[1] for line in block.splitlines()] == ["distill", "train", "evaluate", "export"]


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text(), page.name


def test_every_verb_and_choice_in_the_docs_exists() -> None:
    """`group=choice` in any page names a yaml that is there."""
    from draftsmith.cli import VERBS

    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "__pycache__"}
    for page in PAGES:
        if page.name == "errors.md":  # it quotes what is mistyped; a test of its own holds it to the truth
            continue
        text = page.read_text()
        for verb in re.findall(r"`draftsmith ([a-z]\w*)", text):
            assert verb in VERBS, f"{page.name}: {verb}"
        for group, choice in re.findall(r"[\s`](\w+)=([a-z]\w*)(?=[\s`])", text):
            if group in groups:
                assert (ROOT / "conf" / group / f"{choice}.yaml").exists(), f"{page.name}: {group}={choice}"
