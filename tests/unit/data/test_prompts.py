"""Reading what people wrote: strict, and every refusal says file and row."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data import prompts
from draftsmith.data.prompts import Prompt, PromptsConfig, check_messages, json_lines, make_up, read_prompts, user_turns
from draftsmith.errors import ConfigError, DataError

USER, ANSWER, SYSTEM = ({"role": r, "content": r.upper()} for r in ("user", "assistant", "system"))


def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return path


def test_reads_chats_and_text_in_order(tmp_path: Path) -> None:
    lines = [{"messages": [SYSTEM, USER, ANSWER, USER], "extra": 1}, {"prompt": "go on"}, {"messages": [USER]}]
    path = file(tmp_path, "\n".join(map(json.dumps, lines)).encode())  # no newline at the end
    found = list(read_prompts(path))
    assert found == [
        Prompt(f"{path}:1", messages=(SYSTEM, USER, ANSWER, USER)),
        Prompt(f"{path}:2", text="go on"),
        Prompt(f"{path}:3", messages=(USER,)),
    ]


def test_bom_crlf_and_unicode(tmp_path: Path) -> None:
    line = '{"prompt": "héllo \u202e\u2028 😀 e\u0301"}'
    path = file(tmp_path, b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert [p.text for p in read_prompts(path)] == ["héllo \u202e\u2028 😀 e\u0301"] * 2


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "cut of', "not JSON"),
        (b"", "not JSON"),
        (b"\x00\x00", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),  # a byte-order mark belongs at the start only
        (b'{"prompt": "\\ud83d"}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}', "surrogate"),
        (b"[1]", "a list, not an object"),
        (b'"text"', "a str, not an object"),
        (b"null", "not an object"),
        (b"{}", "neither"),
        (b'{"prompt": ""}', "neither"),
        (b'{"prompt": 3}', "neither"),
        (b'{"messages": []}', "non-empty list"),
        (b'{"messages": {"role": "user"}}', "non-empty list"),
        (b'{"messages": ["hello"]}', r"messages\[0\]"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\]"),
        (b'{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\]"),
        (b'{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"messages\[0\]"),
        (b'{"messages": [{"role": 3, "content": "x"}]}', r"messages\[0\]"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool'"),
        (b'{"messages": [{"role": "User", "content": "x"}]}', "role 'User'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, second: bytes, says: str) -> None:
    path = file(tmp_path, b'{"prompt": "fine"}\n' + second + b'\n{"prompt": "fine"}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{says}") as caught:
        list(read_prompts(path))
    assert caught.value.exit_code == 3


def test_a_whole_surrogate_pair_is_fine(tmp_path: Path) -> None:
    assert [p.text for p in read_prompts(file(tmp_path, b'{"prompt": "\\ud83d\\ude00"}'))] == ["😀"]


def test_rows_before_the_bad_one_are_served(tmp_path: Path) -> None:
    lines = json_lines(file(tmp_path, b'{"a": 1}\n{'))
    assert next(lines) == (f"{tmp_path}/in.jsonl:1", {"a": 1})
    with pytest.raises(DataError):
        next(lines)


def test_no_file_and_no_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_prompts(tmp_path / "none"))
    with pytest.raises(DataError, match="no such file"):
        list(read_prompts(tmp_path))
    assert list(read_prompts(file(tmp_path, b""))) == []


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ANSWER], "turn 1 is the assistant's where the user's"),
        ([SYSTEM], None),
        ([USER, USER], "turn 2 is the user's where the assistant's"),
        ([USER, ANSWER, ANSWER], "turn 3 is the assistant's"),
        ([SYSTEM, ANSWER], "turn 1 is the assistant's"),
        ([USER, SYSTEM, ANSWER], "turn 2 is the system's"),
        ([SYSTEM, SYSTEM, USER], "turn 1 is the system's"),
        ([USER], None),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], None),
    ],
)
def test_turns_alternate(messages: list[Any], says: str | None) -> None:
    if says is None:
        assert check_messages(messages, "here") == messages
    else:
        with pytest.raises(DataError, match=f"here: {says}"):
            check_messages(messages, "here")


def test_other_keys_of_a_message_are_dropped() -> None:
    assert check_messages([{**USER, "name": "Ann", "weight": 0}], "here") == [USER]


def test_ids_are_content_hashes() -> None:
    a, b = Prompt("x:1", messages=(USER,)), Prompt("y:2", messages=(USER,))
    assert a.id == b.id
    assert len({a.id, Prompt("x:1", text="USER").id, Prompt("x:1", messages=(USER, ANSWER)).id}) == 3


def test_made_up_prompts_are_distinct_seeded_and_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SOURCES", 200_000)
    config = PromptsConfig(synthetic=20, text=3, seed=4)
    made = make_up(config, frozenset())
    assert made == make_up(config, frozenset())
    assert len({p.id for p in made}) == 23
    assert [bool(p.text) for p in made] == [False] * 20 + [True] * 3
    held_out = make_up(PromptsConfig(synthetic=20, text=3, seed=4), user_turns(made))
    assert not user_turns(made) & user_turns(held_out)


def test_too_many_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SOURCES", 5000)
    with pytest.raises(DataError, match="only 2 openings"):
        make_up(PromptsConfig(text=3), frozenset())


@pytest.mark.parametrize("settings", [{}, {"synthetic": -1}, {"path": "x", "text": -1}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="synthetic"):
        PromptsConfig(**settings)
