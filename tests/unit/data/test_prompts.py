"""Prompts: given ones by name, or made-up ones that are distinct, seeded and held out."""

from pathlib import Path
from typing import Any

import pytest

from draftsmith.data import prompts
from draftsmith.data.prompts import PromptsConfig, make_up, user_turns
from draftsmith.data.records import Record
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError, DataError


def test_made_up_prompts_are_distinct_seeded_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SOURCES", 200_000)
    config = PromptsConfig(synthetic=20, text=3, seed=4)
    made = make_up(config)
    assert made == make_up(config)
    assert made != make_up(PromptsConfig(synthetic=20, text=3, seed=5))
    assert len({p.content for p in made}) == len({p.where for p in made}) == 23
    assert [bool(p.prompt) for p in made] == [False] * 20 + [True] * 3
    held_out = make_up(config, user_turns(made))
    assert len(held_out) == 23
    assert not user_turns(made) & user_turns(held_out)


def test_user_turns_are_all_that_users_said() -> None:
    chat = ({"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")))
    turns = user_turns([Record("", messages=tuple(chat)), Record("", prompt="p")])
    assert turns == user_turns([Record("", prompt=p) for p in "acp"])
    assert len(turns) == 3
    asked = ({"role": "user", "content": "a"},)
    assert user_turns([Record("", messages=asked, later=("p", "c"))]) == turns


def test_too_many_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SOURCES", 5000)
    with pytest.raises(DataError, match="only 2 openings"):
        make_up(PromptsConfig(text=3))


def test_sources_by_name() -> None:
    mine = {"mine": SourceConfig(path="a"), "chats": SourceConfig(hub="b")}
    assert PromptsConfig(sources=mine).chosen == mine
    assert PromptsConfig(path="a").chosen == {"path": SourceConfig(path="a")}
    assert PromptsConfig(synthetic=1).chosen == {}
    assert [PromptsConfig(**s).made_up for s in ({"synthetic": 1}, {"path": "a"}, {"sources": mine})] == [
        True,
        False,
        False,
    ]


def test_what_prompts_are_reported_under(tmp_path: Path) -> None:
    chat, text = Record("", messages=({"role": "user", "content": "a"},)), Record("", prompt="p")
    mine, question = Record("", prompt="p", source="mine"), Record("", prompt="p", source="path", category="math")
    made, named = PromptsConfig(synthetic=1, text=1), PromptsConfig(sources={"mine": SourceConfig(path="a")})
    assert [made.label(chat), made.label(text), named.label(mine)] == ["chats", "text", "mine"]
    (tmp_path / "asked.jsonl.gz").touch()
    file, folder = (PromptsConfig(path=str(p)) for p in (tmp_path / "asked.jsonl.gz", tmp_path))
    assert [file.label(text), folder.label(text), file.label(question)] == ["asked", "path", "math"]
    mt, spec = (PromptsConfig(set=name, path="a") for name in ("mt_bench", "spec_bench"))
    assert [mt.label(question), spec.label(question), spec.label(text)] == ["math", "mt_bench", "spec_bench"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "path, sources, synthetic, text: give prompts"),
        ({"synthetic": -1}, "synthetic, text: counts"),
        ({"path": "x", "text": -1}, "synthetic, text: counts"),
        ({"path": "x", "sources": {"a": SourceConfig(path="x")}}, "path, sources: give one"),
        ({"set": "gsm8k"}, "set='gsm8k': choose one of mt_bench, spec_bench, or null"),
        ({"set": "mt_bench", "sources": {"a": SourceConfig(path="x")}}, "set, sources: give one"),
        ({"download": True, "synthetic": 1}, "download: only a set without a path"),
        ({"set": "mt_bench", "download": True, "path": "x"}, "download: only a set without a path"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PromptsConfig(**settings)
