"""What is asked of a base: a prompt per turn, its own answers in between, and what each is reported under."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith import evaluate, supply
from draftsmith.api import load_base
from draftsmith.asking import Asked
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig
from draftsmith.data.settings import DataConfig
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError

from .conftest import call, lines

NEW = 6
QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Count from 3 to 9.", "And back?", "Again."]},
    {"question_id": 2, "category": "qa", "turns": ["Who are you?"]},
    {"question_id": 3, "category": "math", "turns": ["Say hello to Anna.", "To Ben."]},
]


@pytest.fixture(scope="module")
def base(micro: Path) -> Any:
    return load_base(micro / "base")


@pytest.fixture
def spec_bench(tmp_path: Path) -> PromptsConfig:
    lines(tmp_path / "q.jsonl", QUESTIONS)
    return PromptsConfig(set="spec_bench", path=str(tmp_path / "q.jsonl"))


def held_out(base: Any, prompts: PromptsConfig, new: int = NEW) -> tuple[list[Asked], dict[str, Any]]:
    return evaluate.held_out(base, prompts, None, ChatConfig(), new)


def chat_ids(base: Any, *said: str) -> list[int]:
    """User and assistant in turn, a user first and last, as the template writes them."""
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    return base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def one_by_one(base: Any, turns: list[str]) -> list[list[int]]:
    """The prompts of a question as a person would get them, answered by Hugging Face's generate."""
    said: list[str] = []
    prompts = []
    for turn in turns:
        said.append(turn)
        prompts.append(chat_ids(base, *said))
        answer = base.generate([prompts[-1]], max_new_tokens=NEW)[0]
        said.append(base.tokenizer.decode(answer, skip_special_tokens=True))
    return prompts


def test_a_question_of_several_turns_is_a_prompt_per_turn(base: Any, spec_bench: PromptsConfig) -> None:
    asked, told = held_out(base, spec_bench)
    assert [(a.source, a.turn) for a in asked] == [
        *(("mt_bench", turn) for turn in (1, 2, 3)),
        ("qa", 1),
        *(("mt_bench", turn) for turn in (1, 2)),
    ]
    assert [a.ids for a in asked] == [ids for q in QUESTIONS for ids in one_by_one(base, q["turns"])]  # type: ignore[arg-type]
    assert {k: told[k] for k in ("set", "count", "questions", "left_out", "trained_on")} == {
        "set": "spec_bench",
        "count": 6,
        "questions": 3,
        "left_out": 0,
        "trained_on": None,
    }


def shorter(base: Any, positions: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(base, "spec", dataclasses.replace(base.spec, max_positions=positions))
    return base


def test_later_turns_that_do_not_fit_are_left_out_and_told(
    base: Any, spec_bench: PromptsConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = held_out(base, spec_bench)
    room = len(whole[0].ids)  # of the first question, its first turn alone
    assert len(whole[4].ids) <= room < len(whole[1].ids)
    fits = shorter(base, room + NEW, monkeypatch)
    asked, told = held_out(fits, spec_bench)
    kept = [a for a in whole if len(a.ids) <= room]
    assert asked == kept
    assert (told["count"], told["questions"], told["left_out"]) == (len(kept), 3, 6 - len(kept))
    out = capsys.readouterr().out
    assert f"note: {told['left_out']} later turns are left out, the first for this: " in out
    assert f"q.jsonl:1: a prompt of {len(whole[1].ids)} tokens leaves no room for decoding.max_new_tokens" in out


def test_a_first_turn_that_does_not_fit_ends_it(
    base: Any, spec_bench: PromptsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shorter(base, len(held_out(base, spec_bench)[0][0].ids) + NEW - 1, monkeypatch)
    with pytest.raises(DataError, match=r"q\.jsonl:1: a prompt of \d+ tokens leaves no room for decoding\.max_new"):
        held_out(small, spec_bench)


def test_what_the_template_refuses_after_an_answer_is_left_out(
    base: Any, spec_bench: PromptsConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    single = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + base.tokenizer.chat_template
    monkeypatch.setattr(base.tokenizer, "chat_template", single)
    asked, told = held_out(base, spec_bench)
    assert [a.turn for a in asked] == [1, 1, 1]
    assert told["left_out"] == 3
    assert "note: 3 later turns are left out, the first for this: " in capsys.readouterr().out


def test_a_chat_with_answers_keeps_them(base: Any, tmp_path: Path) -> None:
    chat = [{"role": r, "content": c} for r, c in (("user", "Hello."), ("assistant", "Hi."), ("user", "Who are you?"))]
    lines(tmp_path / "chats.jsonl", [{"messages": chat}, {"messages": chat[:1]}, {"prompt": "Once"}])
    asked, told = held_out(base, PromptsConfig(path=str(tmp_path / "chats.jsonl")))
    assert [(a.source, a.turn) for a in asked] == [("chats", 2), ("chats", 1), ("chats", 1)]
    assert asked[0].ids == chat_ids(base, "Hello.", "Hi.", "Who are you?")
    assert (told["count"], told["questions"], told["left_out"]) == (3, 3, 0)


def test_named_sources_and_made_up_prompts_have_their_names(base: Any, tmp_path: Path) -> None:
    lines(tmp_path / "q.jsonl", QUESTIONS[1:2])
    lines(tmp_path / "p.jsonl", [{"prompt": "Once"}])
    sources = {"mine": SourceConfig(path=str(tmp_path / "q.jsonl")), "texts": SourceConfig(path=f"{tmp_path}/p.jsonl")}
    assert [a.source for a in held_out(base, PromptsConfig(sources=sources))[0]] == ["mine", "texts"]
    made = held_out(base, PromptsConfig(synthetic=2, text=1, seed=1000))[0]
    assert [a.source for a in made] == ["chats", "chats", "text"]
    assert made[-1].turn == 1


def test_a_file_without_prompts_is_named(base: Any, tmp_path: Path) -> None:
    lines(tmp_path / "q.jsonl", [])
    with pytest.raises(DataError, match=r"q\.jsonl: no prompt in it"):
        held_out(base, PromptsConfig(set="mt_bench", path=str(tmp_path / "q.jsonl")))
    with pytest.raises(DataError, match="mine: no prompt in it"):
        held_out(base, PromptsConfig(sources={"mine": SourceConfig(path=str(tmp_path / "q.jsonl"))}))


def test_questions_that_were_trained_on_are_counted_once(base: Any, tmp_path: Path) -> None:
    """A head that was trained on the answered question has seen it; what was asked stays known while its file moves."""
    lines(tmp_path / "q.jsonl", QUESTIONS)
    of_run = {"data": {"prompts": {"set": "mt_bench", "path": str(tmp_path / "q.jsonl")}}}
    prompts = PromptsConfig(path=str(tmp_path / "q.jsonl"))
    told = evaluate.held_out(base, prompts, of_run, ChatConfig(), NEW)[1]
    assert (told["count"], told["trained_on"]) == (6, 3)
    moved = DataConfig(prompts=PromptsConfig(set="mt_bench"))
    assert supply.asked_of(moved) is None


def test_evaluating_on_a_prompt_set(training: list[str], tmp_path: Path) -> None:
    assert call("train", *training, "head=[medusa]", "trainer.max_steps=1", "run_dir=run", cwd=tmp_path)[0] == 0
    asked = ["run_dir=run", "prompts.set=spec_bench", f"decoding.max_new_tokens={NEW}", "repeats=1", "threads=1"]
    code, output = call("evaluate", *asked, cwd=tmp_path)
    assert code == 3
    assert "prompts.set=spec_bench: no file at data/spec_bench/question.jsonl and spec_bench.jsonl; copy" in output
    lines(tmp_path / "spec_bench.jsonl", QUESTIONS)
    code, output = call("evaluate", *asked, cwd=tmp_path)
    assert code == 0, output
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    told = found["decoding"]["prompts"]
    assert (told["set"], told["count"], told["questions"], told["left_out"]) == ("spec_bench", 6, 3, 0)
    assert found["heads"]["medusa"]["lossless"]["prompts"] == 6


def test_distilling_a_prompt_set(micro: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "mt_bench").mkdir(parents=True)
    told = ["base=hf", f"base.path={micro / 'base'}", "data=prompts", "data.prompts.set=mt_bench", "out=rows"]
    told += ["data.generation.max_new_tokens=200", "threads=1"]
    code, output = call("distill", *told, cwd=tmp_path)
    assert code == 3
    assert "prompts.set=mt_bench: no file at data/mt_bench/question.jsonl" in output
    lines(tmp_path / "data" / "mt_bench" / "question.jsonl", QUESTIONS)
    code, output = call("distill", *told, cwd=tmp_path)
    assert code == 0, output
    asked = (tmp_path / "rows" / "asked" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line).get("later") for line in asked] == [["And back?", "Again."], None, ["To Ben."]]
    (tmp_path / "data" / "mt_bench" / "question.jsonl").unlink()
    code, output = call("distill", *told, cwd=tmp_path)  # what it is has been written down
    assert (code, "already complete" in output) == (0, True), output
