"""Prompt sets by name: both layouts as their repositories have them, where they are looked for, and what is said when
they are nowhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith import supply
from draftsmith.data import questions
from draftsmith.data.prompts import PromptsConfig
from draftsmith.data.records import Record
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Start each line with an A."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"], "reference": ["You.", ""]},
    {"question_id": 121, "category": "coding", "turns": ["Write a loop.", "Now in parallel."]},
]
SPEC_BENCH = [
    MT_BENCH[0],
    {"question_id": 161, "category": "translation", "turns": ["Translate German to English: Ja."]},
    {"question_id": 401, "category": "math_reasoning", "turns": ["How many are 2 and 2?"], "reference": ["4"]},
    {"question_id": 481, "category": "rag", "turns": ["Title: A. Text: B.\n\nWhat is A?"]},
]


def put(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(records: list[Record]) -> list[list[str]]:
    return [[r.messages[0]["content"], *r.later] for r in records]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["data/mt_bench/question.jsonl", "mt_bench.jsonl"])
def test_mt_bench(here: Path, place: str) -> None:
    put(here / place, MT_BENCH)
    config = PromptsConfig(set="mt_bench")
    assert config.chosen == {"mt_bench": SourceConfig(path=place, shape="turns")}
    records = supply.collect(config)
    assert said(records) == [row["turns"] for row in MT_BENCH]
    assert [config.label(r) for r in records] == ["writing", "reasoning", "coding"]
    assert [(r.where, r.source) for r in records][:2] == [(f"{place}:1", "mt_bench"), (f"{place}:2", "mt_bench")]


def test_spec_bench_counts_the_categories_of_mt_bench_as_one_subtask(here: Path) -> None:
    put(here / "data" / "spec_bench" / "question.jsonl", SPEC_BENCH)
    config = PromptsConfig(set="spec_bench")
    records = supply.collect(config)
    assert said(records) == [row["turns"] for row in SPEC_BENCH]
    assert [config.label(r) for r in records] == ["mt_bench", "translation", "math_reasoning", "rag"]
    subtasks = {*questions.MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag"}
    assert len(subtasks) == 13
    assert len({questions.SETS["spec_bench"].subtask(category) for category in subtasks}) == 6


def test_a_path_is_taken_at_its_word(here: Path) -> None:
    """With the set's name, which knows its subtasks, or alone; nothing else is looked for."""
    put(here / "spec_bench.jsonl", MT_BENCH)
    own = str(put(here / "own.jsonl", SPEC_BENCH))
    config, alone = PromptsConfig(set="spec_bench", path=own), PromptsConfig(path=own)
    assert said(supply.collect(config)) == said(supply.collect(alone)) == [row["turns"] for row in SPEC_BENCH]
    assert [alone.label(r) for r in supply.collect(alone)] == ["writing", "translation", "math_reasoning", "rag"]
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        supply.collect(PromptsConfig(set="spec_bench", path="gone.jsonl"))


def test_a_malformed_line_is_named(here: Path) -> None:
    put(here / "mt_bench.jsonl", [MT_BENCH[0], {"question_id": 1, "category": "math", "turns": ["a", ""]}, MT_BENCH[1]])
    with pytest.raises(DataError, match=r"mt_bench\.jsonl:2: turns\[1\]: the user says nothing; 1 of 3 rows"):
        supply.collect(PromptsConfig(set="mt_bench"))
    put(here / "mt_bench.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(DataError, match=r"mt_bench\.jsonl:1: turns: give a non-empty list"):
        supply.collect(PromptsConfig(set="mt_bench"))


def test_a_set_that_is_nowhere_says_where_it_was_looked_for_and_how_to_get_it(here: Path) -> None:
    with pytest.raises(DataError) as caught:
        supply.collect(PromptsConfig(set="mt_bench"))
    assert str(caught.value) == (
        "prompts.set=mt_bench: no file at data/mt_bench/question.jsonl and mt_bench.jsonl; copy"
        " fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat there, or say prompts.path=…,"
        " or prompts.download=true fetches HuggingFaceH4/mt_bench_prompts"
    )
    for download in (False, True):
        with pytest.raises(DataError) as caught:
            supply.collect(PromptsConfig(set="spec_bench", download=download))
        assert "copy data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench there" in str(caught.value)
        assert ("prompts.download=true cannot help" in str(caught.value)) is download


def test_a_download_is_only_of_what_is_not_there(here: Path) -> None:
    fetched = SourceConfig(hub="HuggingFaceH4/mt_bench_prompts", shape="turns")
    assert PromptsConfig(set="mt_bench", download=True).chosen == {"mt_bench": fetched}
    put(here / "mt_bench.jsonl", MT_BENCH)
    assert PromptsConfig(set="mt_bench", download=True).chosen["mt_bench"].hub is None


def test_what_the_hub_has_is_read_as_the_file(here: Path, offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's columns, from a folder in its place."""
    rows = [{"prompt": q["turns"], "category": q["category"], "prompt_id": n} for n, q in enumerate(MT_BENCH)]
    (here / "hub").mkdir()
    table = offline.Dataset.from_list([{**row, "reference": []} for row in rows])
    table.to_parquet(here / "hub" / "train-00000-of-00001.parquet")
    monkeypatch.setitem(questions.SETS, "mt_bench", replace(questions.SETS["mt_bench"], hub=str(here / "hub")))
    config = PromptsConfig(set="mt_bench", download=True)
    records = supply.collect(config)
    assert said(records) == [row["turns"] for row in MT_BENCH]
    assert [config.label(r) for r in records] == ["writing", "reasoning", "coding"]
    assert records[1].where == f"{here / 'hub'}[train]:2"


def test_a_download_without_a_network_is_one_line(here: Path, offline: Any) -> None:
    with pytest.raises(DataError, match="hub=HuggingFaceH4/mt_bench_prompts: ") as caught:
        supply.collect(PromptsConfig(set="mt_bench", download=True))
    assert "\n" not in str(caught.value)
