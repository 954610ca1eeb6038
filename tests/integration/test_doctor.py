"""The doctor on rows that are well, and on rows with every fault planted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from draftsmith.base import create
from draftsmith.data import synthetic
from tests.integration.conftest import SHAPE, call, draftsmith, lines

# Thinks if it is told to: an answer may begin with its thoughts.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (random but sure of itself, with a template that can think), bad.jsonl and measured.jsonl."""
    folder = tmp_path_factory.mktemp("sick")
    chats = list(synthetic.dialogues(60, seed=5))
    tokenizer = synthetic.train_tokenizer(chats, 400)
    tokenizer.chat_template = TEMPLATE
    (folder / "base").mkdir()
    sure = {**SHAPE, "initializer_range": 0.4}
    create.save(create.llama(sure, tokenizer, seed=0), tokenizer, folder / "base")
    rows = planted(tokenizer, [c[:2] for c in chats])
    lines(folder / "bad.jsonl", rows)
    with open(folder / "bad.jsonl", "a") as f:
        f.write("not json\n")
    lines(folder / "measured.jsonl", rows[:2])
    return folder


def planted(tokenizer: Any, chats: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Forty rows with a dozen kinds of faults, among good ones."""
    rng = random.Random(0)
    said: list[dict[str, Any]] = [{"messages": c} for c in chats[:8]]
    said.append({"messages": [chats[9][0], {"role": "robot", "content": "beep"}]})
    said.append({"messages": [chats[9][0], chats[9][0]]})
    said.append({"messages": [chats[9][0], {"role": "assistant", "content": ""}]})
    said += [said[0]] * 3  # repeated
    thought = "<think>Let me see what they want.</think>" + chats[10][1]["content"]
    said += [{"messages": [chats[i][0], {"role": "assistant", "content": thought}]} for i in (10, 11, 12)]
    said += [{"messages": [chats[i][0], {"role": "assistant", "content": "go on and on " * 30}]} for i in (13, 14)]
    said += [{"messages": [chats[15][0], {"role": "assistant", "content": "word " * 400}]}]  # too long
    tokens = []
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for i in range(20, 28):
        ask, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("<|user|>Why?<|end|>", "Because."))
        opened = [tokenizer.bos_token_id, *ask, tokenizer.convert_tokens_to_ids("<|assistant|>")]
        answer = [*answer, rng.randrange(20, 90), end]
        early = i % 2  # half begin and end one token early, half one token late
        mask = [0] * len(opened) + [1] * len(answer)
        mask = [*mask[1:], 0] if early else [0, *mask[:-1]]
        after = [tokenizer.convert_tokens_to_ids("<|user|>"), 50 + i]
        tokens.append({"input_ids": [*opened, *answer, *after], "loss_mask": [*mask, 0 if early else 1, 0]})
    inside = [tokenizer.bos_token_id, 40, 41, 42, end, 43, end]
    tokens += [{"ids": [*inside, 60 + i], "mask": [0, 0, 0, 1, 1, 1, 1, 0]} for i in range(4)]  # two ends in one
    tokens.append({"ids": [40, 41, 42, 43], "mask": [0, 0, 0, 0]})
    tokens.append({"ids": [40, 100_000, 42], "mask": [0, 1, 1]})
    return [*said, *tokens]


PLANTED = {
    "row_json",
    "row_role",
    "row_turns",
    "row_empty",
    "row_ids",
    "repeated",
    "too_long",
    "mixed_thinking",
    "looping",
    "mask_begins_early",
    "mask_begins_late",
    "mask_ends_early",
    "control_in_answer",
    "nothing_to_learn",
    "overlap",
    "off_policy",
    "thinking_unsaid",
}


def test_every_planted_fault_is_named(sick: Path, tmp_path: Path) -> None:
    command = [
        *("base=hf", f"base.path={sick / 'base'}", "data=jsonl", f"data.path={sick / 'bad.jsonl'}", "threads=1"),
        *("data.length=128", f"data.validation.path={sick / 'measured.jsonl'}", "data.on_bad=skip"),
    ]
    code, output = draftsmith("doctor", *command, "data.chat.thinking=true", "out=told.json", cwd=tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    found = {f["name"] for f in told["findings"]}
    assert PLANTED - {"thinking_unsaid"} <= found, PLANTED - found
    assert code == 3, output
    assert all(f["fix"] and f"{f['name']}: " in output for f in told["findings"])
    check_funnels(told)
    assert set(told["funnel"]["quarantined"]) == {"json", "role", "turns", "empty"}
    assert set(told["sample"]["refused"]) == {"ids"}
    assert told["sample"]["looked_at"] == told["funnel"]["kept"]
    what = {f["name"]: f["what"] for f in told["findings"]}
    assert what["row_json"].startswith(f"1 of {told['funnel']['in']} rows ")
    assert what["row_ids"].startswith(f"1 of the {told['sample']['looked_at']} looked at ")
    code, output = call("doctor", *command, cwd=tmp_path)
    assert code == 3
    assert "error thinking_unsaid" in output
    assert "error data" not in output  # said once


def check_funnels(told: dict[str, Any]) -> None:
    assert told["funnel"]["in"] == told["funnel"]["kept"] + sum(told["funnel"]["quarantined"].values())
    assert told["sample"]["looked_at"] == told["sample"]["encoded"] + sum(told["sample"]["refused"].values())


def test_a_sample_says_nothing_of_all(sick: Path, tmp_path: Path) -> None:
    """Of forty rows ten are looked at: the others are neither refused nor encoded."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines(tmp_path / "some.jsonl", [{"messages": chat[: 1 + i % 2]} for i in range(40)])  # half of them unanswered
    command = [*("base=hf", f"base.path={sick / 'base'}", "data=jsonl", "data.path=some.jsonl", "threads=1")]
    command += ["data.chat.thinking=true", "data.on_bad=skip", "sample=10", "policy_tokens=0", "out=told.json"]
    call("doctor", *command, cwd=tmp_path)
    told = json.loads((tmp_path / "told.json").read_text())
    check_funnels(told)
    assert told["funnel"] == {"in": 40, "kept": 40, "quarantined": {}}
    assert told["sample"]["looked_at"] == 10
    assert 0 < told["sample"]["refused"]["no_answer"] < 10


def test_finished_rows_need_no_choice_to_think(sick: Path, tmp_path: Path) -> None:
    """Their manifest says what they were made with; rows of tokens are encoded already."""
    base = ["base=hf", f"base.path={sick / 'base'}"]
    lines(tmp_path / "ask.jsonl", [{"messages": [{"role": "user", "content": f"a {i}"}]} for i in range(4)])
    made = ["data=prompts", "data.prompts.path=ask.jsonl", "data.generation.max_new_tokens=9"]
    made += ["data.generation.temperature=1", "data.chat.thinking=false"]
    code, output = call("distill", *base, *made, "out=rows", "threads=1", cwd=tmp_path)
    assert code == 0, output

    def found(path: str, *more: str) -> dict[str, str]:
        command = [*base, "data=jsonl", f"data.path={path}", "threads=1", "policy_tokens=0", "out=told.json", *more]
        _, output = call("doctor", *command, cwd=tmp_path)
        told = json.loads((tmp_path / "told.json").read_text())
        assert "sample" in told, output
        check_funnels(told)
        return {f["name"]: f["severity"] for f in told["findings"]}

    assert set(found("rows")) <= {"few", "unfinished", "looping"}
    assert found("rows", "data.chat.thinking=true")["other_thinking"] == "warning"
    lines(tmp_path / "tokens.jsonl", [{"ids": [1, 40 + i, 41, 42, 43], "mask": [0, 0, 0, 1, 1]} for i in range(4)])
    assert not {"thinking_unsaid", "data"} & set(found("tokens.jsonl"))
    measured = f"data.validation.path={sick / 'measured.jsonl'}"  # chats, so here the choice is due
    told = found("rows", measured)
    assert told["thinking_unsaid"] == "error"
    assert "data" not in told
    assert "thinking_unsaid" not in found("rows", measured, "data.chat.thinking=false")


def test_good_rows_are_well(micro: Path, tmp_path: Path) -> None:
    """The base's own answers: nothing but the note that they are few."""
    base = ["base=hf", f"base.path={micro / 'base'}"]
    made = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "data.generation.max_new_tokens=12"]
    made.append("data.generation.temperature=1")
    code, output = call("distill", *base, *made, "out=rows", "threads=1", cwd=tmp_path)
    assert code == 0, output
    rows = ["data=jsonl", "data.path=rows", "threads=1"]
    code, output = call("doctor", *base, *rows, "out=told.json", "show=2", "colour=always", cwd=tmp_path)
    assert code == 0, output
    told = json.loads((tmp_path / "told.json").read_text())
    assert {f["name"] for f in told["findings"]} <= {"few", "unfinished", "looping"}  # a random base never ends
    assert abs(told["policy"]["nll"] - told["policy"]["entropy"]) < 0.35
    assert "\033[30;42m" in output
    assert len(told["shown"]) == 2


def test_prompts_alone_are_looked_at(micro: Path, tmp_path: Path) -> None:
    base = ["base=hf", f"base.path={micro / 'base'}", "data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}"]
    code, output = call("doctor", *base, "data.generation.max_new_tokens=12", "threads=1", cwd=tmp_path)
    assert code == 0, output
    assert "nothing found" in output
    code, output = call("doctor", *base, "threads=1", cwd=tmp_path)  # 512 new tokens do not fit 256 positions
    assert code == 3
    assert "row_too_long" in output


def test_rows_of_another_template(micro: Path, sick: Path, tmp_path: Path) -> None:
    base = ["base=hf", f"base.path={micro / 'base'}"]
    made = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "data.generation.max_new_tokens=9"]
    made.append("data.generation.temperature=1")
    assert call("distill", *base, *made, "out=rows", "threads=1", cwd=tmp_path)[0] == 0
    other = ["base=hf", f"base.path={sick / 'base'}", "data.chat.thinking=false"]
    code, output = call("doctor", *other, "data=jsonl", "data.path=rows", "threads=1", cwd=tmp_path)
    assert code == 3
    assert "other_base" in output
