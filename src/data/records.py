"""One conversation, text or token row as somebody gave it to us, checked, before any tokenizer.

Whatever shape a source has (shapes.py), it becomes a Record: chat messages, or plain text, or a prompt with its
completion, or token ids with a mask. Nothing is guessed: what is wrong is a RowError with file:row and a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from draftsmith.artifacts import fingerprint
from draftsmith.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]  # role, content; an assistant's may have tool_calls, a tool's a name or tool_call_id


@dataclass(frozen=True)
class Record:
    """Exactly one of: messages; text; prompt (with or without completion); ids (with mask). `where` is file:row,
    `source` the name of the source it came from. tools: what the chat template is to offer, if anything. kept: what a
    row of ours already says of itself (asked, said, source, seed, finish). later: what the user says once messages are
    answered, then once that is answered, and so on. category: what kind of question it says it is."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    prompt: str = ""
    completion: str | None = None
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    source: str = ""
    kept: dict[str, Any] = field(default_factory=dict)
    later: tuple[str, ...] = ()
    category: str = ""

    @property
    def content(self) -> str:
        """sha256 of what it says: equal content, equal hash, wherever it came from."""
        said = [list(self.messages), self.text, self.prompt, self.completion, self.ids, self.mask, list(self.tools)]
        return fingerprint([*said, list(self.later)] if self.later else said)

    @property
    def asked(self) -> str:
        """sha256 of what is asked, without the answers: rows that share it must not be split between training
        and validation. Token rows and plain text are asked what they are."""
        if self.kept.get("asked"):
            return str(self.kept["asked"])
        if self.messages:
            return fingerprint([*(m for m in self.messages if m["role"] != "assistant"), *map(user, self.later)])
        return fingerprint(self.prompt or self.text or self.ids)


def user(said: str) -> Message:
    return {"role": "user", "content": said}


def check_messages(messages: Any, where: str) -> list[Message]:
    """The chat as plain messages: known roles, text content, system first, then user and assistant in turn, a
    user first; tool results stand between an assistant's tool calls and its next words."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError(where, "messages", "messages: give a non-empty list of role/content objects")
    clean = [_message(m, i, where) for i, m in enumerate(messages)]
    before = "start"
    for i, m in enumerate(clean):
        role = m["role"]
        due = _due(before, clean[i - 1] if i else {})
        if role not in due:
            raise RowError(
                where,
                "turns",
                f"messages[{i}]: turn of the {role} where the {' or '.join(due)} is due",
            )
        before = role
    return clean


def _due(before: str, last: Message) -> tuple[str, ...]:
    if before == "start":
        return ("system", "user")
    if before in ("system", "assistant"):
        return ("tool",) if last.get("tool_calls") else ("user",)
    return ("assistant",) if before == "user" else ("assistant", "tool")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _message(m: Any, i: int, where: str) -> Message:
    if not isinstance(m, dict) or not isinstance(m.get("role"), str):
        raise RowError(where, "messages", f"messages[{i}]: needs a text `role` and a text `content`")
    if m["role"] not in ROLES:
        raise RowError(where, "role", f"messages[{i}]: role '{m['role']}'; known roles are {', '.join(ROLES)}")
    content, calls = m.get("content"), m.get("tool_calls") or None
    if isinstance(content, list) and all(_is_text(p) for p in content):
        content = "".join(p["text"] for p in content)  # the chat API's parts; text ones only
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowError(where, "messages", f"messages[{i}]: needs a text `role` and a text `content`")
    if m["role"] == "user" and not content.strip():
        raise RowError(where, "empty", f"messages[{i}]: the user says nothing")
    if m["role"] == "assistant" and not content.strip() and not calls:
        raise RowError(where, "empty", f"messages[{i}]: the assistant says nothing")
    clean: Message = {"role": m["role"], "content": content}
    if m["role"] == "assistant" and calls:
        if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
            raise RowError(where, "messages", f"messages[{i}]: tool_calls: give a list of objects")
        clean["tool_calls"] = calls
    if m["role"] == "assistant" and isinstance(m.get("reasoning_content"), str) and m["reasoning_content"]:
        clean["reasoning_content"] = m["reasoning_content"]
    if m["role"] == "tool":
        clean |= {k: m[k] for k in ("name", "tool_call_id") if isinstance(m.get(k), str)}
    return clean
