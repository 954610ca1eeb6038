"""The shapes people keep their rows in, each turned into a Record: what a row's keys say, and no guessing.

messages     messages: [{role, content}]                              (OpenAI, `datasets` chats)
sharegpt     conversations: [{from, value}]                           from: human, gpt, system, tool …
alpaca       instruction, output, optional input and system
completion   prompt and completion (or response): both texts, or both lists of messages
prompt       prompt: a text to go on from, or messages to answer
text         text: plain, learned from its first token to its last
turns        turns: what a user says one after the other, each to be answered; optional category (MT-Bench, Spec-Bench)
tokens       ids or input_ids; mask or loss_mask, or labels with -100 where nothing is learned
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from draftsmith.data.records import Record, check_messages, user
from draftsmith.errors import RowError

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SHAREGPT |= {"bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
IGNORED = -100  # what `labels` say where nothing is learned
COMPLETIONS = ("completion", "response")
TURNS = ("turns", "prompt")  # the second where the shape is forced: MT-Bench has it so on the hub


def record(value: dict[str, Any], where: str, shape: str = "auto", source: str = "") -> Record:
    """The row as a Record. RowError: it has not that shape, or, with auto, none of them."""
    found = shape if shape != "auto" else _shape_of(value, where)
    made = READERS[found](value, where)
    tools = _tools(value.get("tools"), where) if made.messages else ()
    return Record(**{**vars(made), "tools": tools, "source": source})


def _shape_of(value: dict[str, Any], where: str) -> str:
    has = {k for k, v in value.items() if v is not None}
    if {"ids", "input_ids"} & has:
        return "tokens"
    if "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if "prompt" in has:
        return "completion" if has & set(COMPLETIONS) else "prompt"
    if "text" in has:
        return "text"
    if "turns" in has:
        return "turns"
    raise RowError(
        where,
        "shape",
        f"has neither messages, conversations, instruction, prompt, text, turns nor ids; keys: {sorted(value)};"
        " name yours, as 'data.sources={mine: {path: …, columns: {prompt: question}}}'",
    )


def _text(value: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise RowError(where, "types", f"{key}: a text is due, not {type(found).__name__}")
    if not found and not empty:
        raise RowError(where, "empty", f"{key}: empty")
    return found


def _listed(value: Any) -> Any:
    """Arrow and Parquet keep some chats as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
            json.dumps(found, ensure_ascii=False).encode()  # an escaped half of a character is none
        except (ValueError, RecursionError):
            return value
        return found
    return value


def _chat_or_text(value: Any) -> Any:
    """Messages, be they JSON text, or else the text as it is: it may well begin with a bracket."""
    found = _listed(value)
    chat = isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found)
    return found if chat else value


def _messages(value: dict[str, Any], where: str) -> Record:
    return Record(where, messages=tuple(check_messages(_listed(value.get("messages")), where)))


def _sharegpt(value: dict[str, Any], where: str) -> Record:
    turns = _listed(value.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise RowError(where, "messages", "conversations: give a list of {from, value} objects")
    messages = []
    for i, turn in enumerate(turns):
        who = turn.get("from", turn.get("role"))
        if not isinstance(who, str) or who not in SHAREGPT:
            raise RowError(where, "role", f"conversations[{i}]: from '{who}'; known are {', '.join(SHAREGPT)}")
        messages.append({"role": SHAREGPT[who], "content": turn.get("value", turn.get("content"))})
    return Record(where, messages=tuple(check_messages(messages, where)))


def _alpaca(value: dict[str, Any], where: str) -> Record:
    asked = _text(value, "instruction", where)
    more = value.get("input")
    if more not in (None, ""):
        asked += "\n\n" + _text(value, "input", where)
    system = value.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(value, "output", where)}]
    return Record(where, messages=tuple(check_messages(messages, where)))


def _completion(value: dict[str, Any], where: str) -> Record:
    key = next((k for k in COMPLETIONS if value.get(k) is not None), COMPLETIONS[0])
    prompt, completion = _chat_or_text(value.get("prompt")), _chat_or_text(value.get(key))
    if isinstance(prompt, list) and isinstance(completion, list):
        return Record(where, messages=tuple(check_messages([*prompt, *completion], where)))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError(where, "types", f"prompt, {key}: both texts or both lists of messages")
    return Record(where, prompt=_text(value, "prompt", where), completion=_text(value, key, where))


def _prompt(value: dict[str, Any], where: str) -> Record:
    found = _chat_or_text(value.get("prompt"))
    if isinstance(found, list):
        return Record(where, messages=tuple(check_messages(found, where)))
    return Record(where, prompt=_text(value, "prompt", where))


def _plain(value: dict[str, Any], where: str) -> Record:
    return Record(where, text=_text(value, "text", where))


def _turns(value: dict[str, Any], where: str) -> Record:
    key = next((k for k in TURNS if value.get(k) is not None), TURNS[0])
    found = _listed(value.get(key))
    if not isinstance(found, list) or not found:
        raise RowError(where, "types", f"{key}: give a non-empty list of what the user says")
    for i, said in enumerate(found):
        if not isinstance(said, str):
            raise RowError(where, "types", f"{key}[{i}]: a text is due, not {type(said).__name__}")
        if not said.strip():
            raise RowError(where, "empty", f"{key}[{i}]: the user says nothing")
    category = _text(value, "category", where, empty=True) if value.get("category") is not None else ""
    return Record(where, messages=(user(found[0]),), later=tuple(found[1:]), category=category)


def _tokens(value: dict[str, Any], where: str) -> Record:
    ids = next((value[k] for k in ("ids", "input_ids") if value.get(k) is not None), None)
    mask = next((value[k] for k in ("mask", "loss_mask") if value.get(k) is not None), None)
    labels = value.get("labels")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RowError(where, "types", "ids: give a list of integers")
    if not ids:
        raise RowError(where, "empty", "ids: empty")
    if mask is None and isinstance(labels, list) and len(labels) == len(ids):
        wrong = [i for i, (a, b) in enumerate(zip(labels, ids, strict=True)) if a not in (IGNORED, b)]
        if wrong:
            raise RowError(where, "types", f"labels[{wrong[0]}]: neither {IGNORED} nor the id there (not shifted)")
        mask = [int(label != IGNORED) for label in labels]
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise RowError(where, "types", f"mask: give one 0 or 1 per id ({len(ids)})")
    return Record(where, ids=tuple(ids), mask=tuple(int(m) for m in mask), kept=_kept(value, where))


def _kept(value: dict[str, Any], where: str) -> dict[str, Any]:
    """What a row of ours says of itself, which its ids alone do not."""
    texts = {k: value[k] for k in ("asked", "said", "source", "finish") if isinstance(value.get(k), str) and value[k]}
    if "asked" in texts and "said" in texts:
        try:
            told = json.loads(texts["said"])
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise RowError(where, "types", "said: not the JSON of an object, as rows of draftsmith's keep it")
    seed = value.get("seed")
    return {**texts, "seed": seed} if texts.get("asked") and type(seed) is int else texts if "asked" in texts else {}


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    found = _listed(value)
    if not found:
        return ()
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise RowError(where, "types", "tools: give a list of objects")
    return tuple(found)


READERS: dict[str, Callable[[dict[str, Any], str], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "prompt": _prompt,
    "text": _plain,
    "turns": _turns,
    "tokens": _tokens,
}
