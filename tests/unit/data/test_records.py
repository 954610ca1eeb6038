"""Checked chats: nothing is guessed, and every refusal says which message."""

from typing import Any

import pytest

from draftsmith.data.records import Record, check_messages
from draftsmith.errors import RowError

USER, ANSWER, SYSTEM = ({"role": r, "content": r.upper()} for r in ("user", "assistant", "system"))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "", "name": "look", "tool_call_id": "1"}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ANSWER], r"messages\[0\]: turn of the assistant where the system or user is due"),
        ([RESULT], r"messages\[0\]: turn of the tool"),
        ([SYSTEM], None),
        ([USER, USER], r"messages\[1\]: turn of the user where the assistant is due"),
        ([USER, ANSWER, ANSWER], r"messages\[2\]: turn of the assistant where the user"),
        ([SYSTEM, ANSWER], r"messages\[1\]: turn of the assistant"),
        ([USER, SYSTEM, ANSWER], r"messages\[1\]: turn of the system"),
        ([SYSTEM, SYSTEM, USER], r"messages\[1\]: turn of the system"),
        ([USER], None),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], None),
        ([USER, ANSWER, RESULT], r"messages\[2\]: turn of the tool where the user"),
        ([USER, RESULT], r"messages\[1\]: turn of the tool where the assistant"),
        ([USER, CALL, ANSWER], r"messages\[2\]: turn of the assistant where the tool"),
        ([USER, CALL, USER], r"messages\[2\]: turn of the user where the tool"),
        ([USER, CALL, RESULT, USER], r"messages\[3\]: turn of the user where the assistant or tool"),
        ([USER, CALL, RESULT, RESULT, ANSWER, USER], None),
        ([USER, CALL, RESULT, CALL, RESULT, ANSWER], None),
    ],
)
def test_whose_turn_it_is(messages: list[Any], says: str | None) -> None:
    if says is None:
        assert [m["role"] for m in check_messages(messages, "here")] == [m["role"] for m in messages]
    else:
        with pytest.raises(RowError, match=f"here: {says}") as caught:
            check_messages(messages, "here")
        assert caught.value.reason == "turns"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "messages"),
        ({}, "messages"),
        ({"role": "user"}, "messages"),
        ({"role": 3, "content": "x"}, "messages"),
        ({"role": "user", "content": 3}, "messages"),
        ({"role": "user", "content": None}, "messages"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, "messages"),
        ({"role": "user", "content": ["x"]}, "messages"),
        ({"role": "user", "content": []}, "empty"),
        ({"role": "user", "content": ""}, "empty"),
        ({"role": "user", "content": " \n"}, "empty"),
        ({"role": "User", "content": "x"}, "role"),
        ({"role": "function", "content": "x"}, "role"),
        ({"role": "assistant", "content": ""}, "empty"),
        ({"role": "assistant", "content": "\n "}, "empty"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages"),
        ({"role": "assistant", "content": "x", "tool_calls": "look"}, "messages"),
        ({"role": "assistant", "content": "x", "tool_calls": ["look"]}, "messages"),
    ],
)
def test_a_bad_message_is_named(message: Any, reason: str) -> None:
    with pytest.raises(RowError, match=r"here: messages\[1\]") as caught:
        check_messages([USER, message], "here")
    assert caught.value.reason == reason


@pytest.mark.parametrize("messages", [[], None, "x", {"role": "user"}, 3])
def test_no_list_of_messages(messages: Any) -> None:
    with pytest.raises(RowError, match="non-empty list"):
        check_messages(messages, "here")


def test_what_is_kept_of_a_message() -> None:
    """Tool fields and thoughts of the roles that have them; parts become their text; the rest goes."""
    more = {"weight": 0, "name": "Ann", "reasoning_content": "hm", "tool_calls": None}
    assert check_messages([{**USER, **more}], "") == [USER]
    assert check_messages([USER, {**ANSWER, **more}], "")[1] == {**ANSWER, "reasoning_content": "hm"}
    assert check_messages([USER, CALL, {**RESULT, "x": 1}], "")[1:] == [{**CALL, "content": ""}, RESULT]
    parts = [{"type": "text", "text": "US"}, {"type": "text", "text": "ER"}]
    assert check_messages(({"role": "user", "content": parts},), "") == [USER]


def test_content_is_what_is_said_wherever_it_stands() -> None:
    a, b = (Record(w, messages=(USER,), source=w) for w in ("x:1", "y:2"))
    assert a.content == b.content
    others = [
        Record("", prompt="USER"),
        Record("", text="USER"),
        Record("", prompt="USER", completion="x"),
        Record("", messages=(USER, ANSWER)),
        Record("", messages=(USER,), tools=({"name": "look"},)),
        Record("", ids=(1, 2), mask=(0, 1)),
        Record("", ids=(1, 2), mask=(1, 1)),
    ]
    assert len({a.content, *(r.content for r in others)}) == 1 + len(others)


def test_asked_leaves_the_answers_out() -> None:
    one, other = ((USER, {"role": "assistant", "content": c}) for c in "ab")
    assert Record("", messages=one).asked == Record("", messages=other).asked == Record("", messages=(USER,)).asked
    assert Record("", messages=(SYSTEM, *one)).asked != Record("", messages=one).asked
    again = {"role": "user", "content": "again"}
    assert Record("", messages=(USER,), later=("again",)).asked == Record("", messages=(*one, again)).asked
    assert Record("", prompt="p", completion="a").asked == Record("", prompt="p").asked
    asked = {r.asked for r in (Record("", prompt="p"), Record("", text="t"), Record("", ids=(1,), mask=(1,)))}
    assert len(asked) == 3
