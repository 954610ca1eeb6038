"""Chat messages to token ids and loss mask, by the template's own boundaries."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from draftsmith.data.prompts import Message
from draftsmith.errors import DataError

MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode(tokenizer: Any, messages: Sequence[Message], where: str) -> tuple[list[int], list[int]]:
    """(ids, mask): mask 1 on exactly what the template marks as the assistant's, end-of-turn included.

    Raises DataError for a chat without assistant text and for a template without `{% generation %}` markers
    (transformers would answer with an all-zero mask and only a log line).
    """
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise DataError(f"{where}: no assistant text to learn from; distil the prompts or drop the row")
    if not MARKER.search(_template(tokenizer)):
        raise DataError(
            "tokenizer: its chat template has no {% generation %} markers, so assistant tokens cannot be told"
            " apart; run `draftsmith distill` (it keeps the generator's own boundaries) or add the markers"
        )
    with _named(where):
        out = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    if not any(mask):
        raise DataError(f"{where}: the chat template marked no assistant token; check its generation markers")
    return ids, mask


def render(tokenizer: Any, messages: Sequence[Message], where: str = "chat", *, open_turn: bool) -> str:
    """The template's text; with `open_turn` it ends where the assistant is to begin."""
    _template(tokenizer)
    with _named(where):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)


def prompt_ids(tokenizer: Any, messages: Sequence[Message], where: str = "chat") -> list[int]:
    """Ids up to the point where the assistant is to begin."""
    return tokenizer(render(tokenizer, messages, where, open_turn=True), add_special_tokens=False)["input_ids"]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text, with the special tokens the tokenizer itself puts in front of text."""
    return tokenizer(text)["input_ids"]


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A template may refuse a chat (Gemma's has no system role): that is the row's fault, and named."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as e:
        raise DataError(f"{where}: the chat template refuses it ({e})") from None


def _template(tokenizer: Any) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("tokenizer: has no chat template; give plain `prompt` or `text` rows instead of messages")
    return str(tokenizer.chat_template)
