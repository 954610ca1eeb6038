"""From chats to ids and masks."""

import copy
from typing import Any

import pytest

from draftsmith.data import chat
from draftsmith.errors import DataError

CHATS = [
    [("user", "the cat"), ("assistant", "a dog")],
    [("system", "a mat"), ("user", "on the mat 你好"), ("assistant", "wörld\n\n cat"), ("user", "?")],
    [("user", ""), ("assistant", "sat"), ("user", "the"), ("assistant", ""), ("user", "a"), ("assistant", "cat cat")],
    [("user", "assistant user"), ("assistant", "  spaces  ")],
]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": r, "content": c} for r, c in turns]


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("turns", CHATS)
def test_encode_equals_the_turns_put_together(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """Turn by turn, the template's words: role token, text, end; the assistant's text and end are marked."""
    want = [(tokenizer.bos_token_id, 0)]
    for role, content in turns:
        want.append((tokenizer.convert_tokens_to_ids(f"<|{role}|>"), 0))
        mark = int(role == "assistant")
        want += [(i, mark) for i in tokenizer(content, add_special_tokens=False)["input_ids"]]
        want.append((tokenizer.eos_token_id, mark))
    ids, mask = chat.encode(tokenizer, messages(turns), "here")
    assert (ids, mask) == ([i for i, _ in want], [m for _, m in want])


@pytest.mark.parametrize("turns", [[("user", "x")], [("user", "x"), ("assistant", "")]])
def test_nothing_to_learn_from(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match="here: no assistant text"):
        chat.encode(tokenizer, messages(turns), "here")


LOOP = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_a_template_that_marks_nothing(tokenizer: Any) -> None:
    """`add_generation_prompt`, in nearly every template, is no marker."""
    with pytest.raises(DataError, match=r"no \{% generation %\} markers"):
        chat.encode(with_template(tokenizer, LOOP), messages(CHATS[0]), "here")


@pytest.mark.parametrize("marker", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation %}"])
def test_every_spelling_of_the_marker(tokenizer: Any, marker: str) -> None:
    body = "{% if m['role'] == 'assistant' %}" + marker + "{{ m['content'] }}{% endgeneration %}"
    template = "{% for m in messages %}" + body + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    ids, mask = chat.encode(with_template(tokenizer, template), messages(CHATS[0]), "here")
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "a dog"


def test_a_marker_that_is_never_reached(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="here: the chat template marked no assistant token"):
        chat.encode(with_template(tokenizer, template), messages(CHATS[0]), "here")


@pytest.mark.parametrize("call", [chat.prompt_ids, lambda t, m: chat.encode(t, m, "here")])
def test_a_template_that_refuses_the_chat(tokenizer: Any, call: Any) -> None:
    """As Gemma's does for system messages."""
    template = "{{ raise_exception('no system role') }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"chat template.*no system role"):
        call(with_template(tokenizer, template), messages(CHATS[0]))


@pytest.mark.parametrize("template", [None, ""])
def test_no_template(tokenizer: Any, template: str | None) -> None:
    for call in (chat.prompt_ids, lambda t, m: chat.encode(t, m, "here")):
        with pytest.raises(DataError, match="no chat template"):
            call(with_template(tokenizer, template), messages(CHATS[0]))
    with pytest.raises(DataError, match="no chat template"):
        chat.prompt_ids(None, messages(CHATS[0]))


def test_prompt_ids_are_the_row_up_to_the_answer(tokenizer: Any) -> None:
    ids, mask = chat.encode(tokenizer, messages(CHATS[0]), "here")
    assert chat.prompt_ids(tokenizer, messages(CHATS[0][:1])) == ids[: mask.index(1)]


def test_text_ids_round_trip(tokenizer: Any) -> None:
    text = "the cat 😀 e\u0301 \u202e\u0000 end\n"
    assert tokenizer.decode(chat.text_ids(tokenizer, text)) == text
