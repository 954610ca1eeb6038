"""Every shape of row, told apart by its keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data import shapes, sources
from draftsmith.data.records import Record
from draftsmith.data.sources import SHAPES, SourceConfig
from draftsmith.errors import RowError

USER, ANSWER = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
CHAT = [USER, ANSWER]
TURNS = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]
TOOLS = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("shape", "value", "record"),
    [
        ("messages", {"messages": CHAT}, Record("f:1", messages=(USER, ANSWER))),
        ("messages", {"messages": json.dumps(CHAT)}, Record("f:1", messages=(USER, ANSWER))),
        ("messages", {"messages": CHAT, "tools": TOOLS}, Record("f:1", messages=(USER, ANSWER), tools=tuple(TOOLS))),
        ("messages", {"messages": CHAT, "tools": json.dumps(TOOLS)}, Record("f:1", (USER, ANSWER), tools=(TOOLS[0],))),
        ("messages", {"messages": CHAT, "tools": None}, Record("f:1", messages=(USER, ANSWER))),
        ("sharegpt", {"conversations": TURNS}, Record("f:1", messages=(USER, ANSWER))),
        ("sharegpt", {"conversations": CHAT}, Record("f:1", messages=(USER, ANSWER))),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "be"}, *TURNS]},
            Record("f:1", messages=({"role": "system", "content": "be"}, USER, ANSWER)),
        ),
        ("alpaca", {"instruction": "ask", "output": "say"}, Record("f:1", messages=(USER, ANSWER))),
        (
            "alpaca",
            {"instruction": "ask", "input": "it", "output": "say", "system": "be"},
            Record("f:1", ({"role": "system", "content": "be"}, {"role": "user", "content": "ask\n\nit"}, ANSWER)),
        ),
        ("alpaca", {"instruction": "ask", "input": "", "output": "say"}, Record("f:1", messages=(USER, ANSWER))),
        ("completion", {"prompt": "ask", "completion": "say"}, Record("f:1", prompt="ask", completion="say")),
        ("completion", {"prompt": "ask", "response": "say"}, Record("f:1", prompt="ask", completion="say")),
        ("completion", {"prompt": [USER], "completion": [ANSWER]}, Record("f:1", messages=(USER, ANSWER))),
        (
            "completion",
            {"prompt": "[1]", "completion": '[{"a": 1}]'},  # texts, though they are lists in JSON
            Record("f:1", prompt="[1]", completion='[{"a": 1}]'),
        ),
        ("prompt", {"prompt": "ask"}, Record("f:1", prompt="ask")),
        ("prompt", {"prompt": [USER]}, Record("f:1", messages=(USER,))),
        ("prompt", {"prompt": json.dumps([USER])}, Record("f:1", messages=(USER,))),
        ("prompt", {"prompt": "[]"}, Record("f:1", prompt="[]")),
        ("text", {"text": "words"}, Record("f:1", text="words")),
        ("turns", {"turns": ["ask"]}, Record("f:1", messages=(USER,))),
        (
            "turns",
            {"question_id": 81, "category": "writing", "turns": ["ask", "more"], "reference": ["", "x"]},
            Record("f:1", messages=(USER,), later=("more",), category="writing"),
        ),
        ("tokens", {"ids": [3, 4], "mask": [0, 1]}, Record("f:1", ids=(3, 4), mask=(0, 1))),
        ("tokens", {"input_ids": [3, 4], "loss_mask": [False, True]}, Record("f:1", ids=(3, 4), mask=(0, 1))),
        ("tokens", {"ids": None, "input_ids": [3], "mask": [1]}, Record("f:1", ids=(3,), mask=(1,))),
        ("tokens", {"input_ids": [3, 4], "labels": [-100, 4]}, Record("f:1", ids=(3, 4), mask=(0, 1))),
        ("tokens", {"ids": [3], "mask": None, "labels": [3]}, Record("f:1", ids=(3,), mask=(1,))),
    ],
)
def test_good_rows(shape: str, value: dict[str, Any], record: Record) -> None:
    """Told by their keys, and the same when forced."""
    assert shapes.record(value, "f:1") == shapes.record(value, "f:1", shape) == record
    assert shapes.record(value, "f:1", source="mine").source == "mine"


def test_every_shape_has_a_good_row_above() -> None:
    marks = [m for m in test_good_rows.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(SHAPES) - {"auto"} == set(shapes.READERS)


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        ({}, "shape", "has neither"),
        ({"question": "x"}, "shape", r"keys: \['question'\]; name yours, as 'data.sources="),
        ({"messages": None}, "shape", "has neither"),
        ({"instruction": "x"}, "shape", "has neither"),
        ({"messages": []}, "messages", "non-empty list"),
        ({"messages": "hello"}, "messages", "non-empty list"),
        ({"messages": "[" * 100_000}, "messages", "non-empty list"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, "messages", "non-empty list"),
        ({"messages": CHAT, "tools": "look"}, "types", "tools: give a list"),
        ({"messages": CHAT, "tools": ["look"]}, "types", "tools: give a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": TOOLS}, USER]}, "turns", "tool is due"),
        ({"conversations": "x"}, "messages", "conversations: give a list"),
        ({"conversations": ["x"]}, "messages", "conversations: give a list"),
        ({"conversations": []}, "messages", "non-empty list"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "role", r"conversations\[0\]: from 'narrator'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "role", "from"),
        ({"conversations": [{"value": "x"}]}, "role", "from 'None'"),
        ({"conversations": [*TURNS[:1], {"from": "gpt", "value": 3}]}, "messages", r"messages\[1\]"),
        ({"conversations": TURNS[1:]}, "turns", "assistant where"),
        ({"conversations": [TURNS[0], TURNS[0]]}, "turns", "turn of the user"),
        ({"instruction": "", "output": "x"}, "empty", "instruction: empty"),
        ({"instruction": " ", "output": "x"}, "empty", "user says nothing"),
        ({"instruction": "x", "output": ""}, "empty", "output: empty"),
        ({"instruction": "x", "output": 3}, "types", "output: a text is due, not int"),
        ({"instruction": "x", "output": "x", "input": ["x"]}, "types", "input: a text"),
        ({"instruction": "x", "output": "x", "system": 3}, "messages", r"messages\[0\]"),
        ({"prompt": "x", "completion": ""}, "empty", "completion: empty"),
        ({"prompt": "", "response": "x"}, "empty", "prompt: empty"),
        ({"prompt": "x", "completion": 3}, "types", "completion: a text is due"),
        ({"prompt": [USER], "completion": "say"}, "types", "both texts or both lists"),
        ({"prompt": [USER], "completion": [USER]}, "turns", "turn of the user"),
        ({"prompt": ""}, "empty", "prompt: empty"),
        ({"prompt": 3}, "types", "prompt: a text is due, not int"),
        ({"prompt": []}, "messages", "non-empty list"),
        ({"prompt": ["x"]}, "messages", r"messages\[0\]"),
        ({"text": 3}, "types", "text: a text is due"),
        ({"turns": 2}, "types", "turns: give a non-empty list"),
        ({"turns": "ask"}, "types", "turns: give a non-empty list"),
        ({"turns": []}, "types", "turns: give a non-empty list"),
        ({"turns": ["ask", 3]}, "types", r"turns\[1\]: a text is due, not int"),
        ({"turns": [USER]}, "types", r"turns\[0\]: a text is due, not dict"),
        ({"turns": ["ask", " "]}, "empty", r"turns\[1\]: the user says nothing"),
        ({"turns": ["ask"], "category": 3}, "types", "category: a text is due"),
        ({"text": ""}, "empty", "text: empty"),
        ({"ids": 3, "mask": [1]}, "types", "ids: give a list"),
        ({"ids": [1.0], "mask": [1]}, "types", "ids: give a list of integers"),
        ({"ids": [True], "mask": [1]}, "types", "ids: give a list of integers"),
        ({"ids": ["1"], "mask": [1]}, "types", "ids: give a list of integers"),
        ({"ids": [], "mask": []}, "empty", "ids: empty"),
        ({"ids": [1]}, "types", "mask: give one 0 or 1"),
        ({"ids": [1, 2], "mask": [1]}, "types", r"mask: give one 0 or 1 per id \(2\)"),
        ({"ids": [1], "mask": [2]}, "types", "mask"),
        ({"ids": [1], "mask": "1"}, "types", "mask"),
        ({"ids": [1, 2], "labels": [1]}, "types", "mask"),
        ({"ids": [1, 2], "labels": [2, -100]}, "types", r"labels\[0\]: neither -100 nor the id there"),
    ],
)
def test_bad_rows(value: dict[str, Any], reason: str, says: str) -> None:
    with pytest.raises(RowError, match=f"f:7: .*{says}") as caught:
        shapes.record(value, "f:7")
    assert caught.value.reason == reason


def test_which_key_wins() -> None:
    """A row with keys of several shapes is the first of them; the forced shape reads only its own."""
    value = {
        "ids": [1],
        "mask": [1],
        "messages": CHAT,
        "conversations": [{"from": "human", "value": "other"}],
        "instruction": "alpaca",
        "output": "x",
        "prompt": "go",
        "completion": "on",
        "text": "plain",
        "turns": ["first", "then"],
    }
    keys = (("ids",), ("messages",), ("conversations",), ("output",), ("completion",), ("prompt",), ("text",))
    found = []
    for gone in keys:
        found.append(shapes.record(value, ""))
        value = {k: v for k, v in value.items() if k not in gone}
    found.append(shapes.record(value, ""))
    assert found[0].ids
    assert [f.messages[0]["content"] for f in found[1:4]] == ["ask", "other", "alpaca"]
    assert [(f.prompt, f.completion, f.text) for f in found[4:7]] == [
        ("go", "on", ""),
        ("go", None, ""),
        ("", None, "plain"),
    ]
    assert found[7].later == ("then",)


@pytest.mark.parametrize("shape", sorted(shapes.READERS))
def test_a_forced_shape_takes_no_other(shape: str) -> None:
    with pytest.raises(RowError, match="f:1: "):
        shapes.record({"something": "else"}, "f:1", shape)
    both = {"messages": CHAT, "text": "plain"}
    assert shapes.record(both, "", "text") == Record("", text="plain")


def test_parquet_chats_with_null_fields(tmp_path: Path) -> None:
    """A column of structs has every key in every message: null is absence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    result = {"role": "tool", "content": "3", "name": "look"}
    rows = [{"messages": [*CHAT]}, {"messages": [USER, call, result, ANSWER]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    raw = [value for _, value in sources.read(SourceConfig(path=str(tmp_path)))]
    assert "tool_calls" not in raw[0]["messages"][0]  # type: ignore[index]
    found = [shapes.record(value, "") for value in raw]  # type: ignore[arg-type]
    assert found[0].messages == (USER, ANSWER)
    assert [m["role"] for m in found[1].messages] == ["user", "assistant", "tool", "assistant"]
    assert found[1].messages[1]["tool_calls"][0]["function"]["name"] == "look"
