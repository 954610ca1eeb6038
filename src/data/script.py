"""A chat as its template sees it: what a template is, and what it writes for a chat."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension

from draftsmith.data.controls import BESIDE, PRIVATE, controls, decode
from draftsmith.data.records import Message
from draftsmith.errors import ConfigError, DataError, RowError

SWITCHES = frozenset({"enable_thinking", "thinking"})


@dataclass(frozen=True)
class ChatConfig:
    """The configuration node data.chat. thinking must be said for a template that can think; control_tokens: what
    looks like a control token in message text becomes that token."""

    thinking: bool | None = None
    control_tokens: bool = False


@dataclass(frozen=True)
class Facts:
    """marked: the template has `{% generation %}`. switches: the thinking variables that it reads."""

    marked: bool
    switches: frozenset[str]


@lru_cache(maxsize=64)
def template_facts(template: str) -> Facts:
    """What can be read off a template's source, comments and strings left aside. TemplateError if it is none."""
    tree = Environment(extensions=[_Markers, "jinja2.ext.loopcontrols"]).parse(template)
    return Facts(tree.find(nodes.ExtensionAttribute) is not None, SWITCHES & meta.find_undeclared_variables(tree))


def can_think(tokenizer: Any, tools: Sequence[dict[str, Any]] = ()) -> bool:
    """Whether the template reads enable_thinking or thinking, so that data.chat.thinking must be said."""
    with _named("tokenizer"):
        return bool(template_facts(_template(tokenizer, tools)).switches)


class _Markers(Extension):
    """Lets `{% generation %}` be parsed, and found in the tree."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("parse"), [], [], body).set_lineno(line)


class Script:
    """One chat as its template sees it: control tokens typed in it replaced by private-use characters, so that
    the template's own are the only ones in what it writes."""

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        where: str,
        chat: ChatConfig,
        tools: Sequence[dict[str, Any]],
    ) -> None:
        self.tokenizer, self.where, self.original = tokenizer, where, list(messages)
        self.template = _template(tokenizer, tools)
        with _named(where):
            self.facts = template_facts(self.template)
        if self.facts.switches and chat.thinking is None:
            raise ConfigError("data.chat.thinking: this template can think; say true or false")
        self.values = {**tokenizer.special_tokens_map, **dict.fromkeys(self.facts.switches, chat.thinking)}
        self.controls = controls(tokenizer, self.template)
        self.private = False  # whether somebody typed characters that stand for control tokens here
        self.typed = False  # whether somebody typed a control token; faked: and it becomes one
        self.messages, self.tools = self.original, list(tools) or None
        self.thinks = chat.thinking is not False and "</think>" in self.template
        self.prompted = self.thinks and self._prompted()
        safe, safe_tools = [self._message(m) for m in messages], [self._protect(t) for t in tools]
        self.faked = self.typed and chat.control_tokens
        if chat.control_tokens:
            self.typed = False
        else:
            if self.typed and self.private:  # in one text or in two: whose is whose nobody could tell afterwards
                raise RowError(where, "control", BESIDE)
            self.messages, self.tools = safe, safe_tools or None

    def render(self, messages: Sequence[Message], *, opened: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(text, the spans marked as the assistant's); opened: it ends where the assistant is to begin."""
        from transformers.utils import chat_template_utils

        write: Any = chat_template_utils.render_jinja_template  # annotated as if it returned the text alone
        with _named(self.where):
            texts, spans = write(
                conversations=[list(messages)],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.facts.marked and not opened,
                add_generation_prompt=opened,
                **self.values,
            )
        return texts[0], list(spans[0]) if spans else []

    def ids(self, text: str) -> list[int]:
        return self.controls.ids(text, self.typed, self.where)

    def opened(self, messages: Sequence[Message]) -> list[int]:
        return self.ids(self.render(messages, opened=True)[0])

    def decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids)

    def turn(self, i: int) -> tuple[str, str]:
        """(reasoning, content) of the i-th message."""
        m = self.original[i]
        head, content = self._thoughts(m)
        reasoning = head.strip().removeprefix("<think>").removesuffix("</think>")
        return reasoning or str(m.get("reasoning_content") or ""), content

    def _prompted(self) -> bool:
        with contextlib.suppress(RowError):
            return self.render([{"role": "user", "content": "a"}], opened=True)[0].rstrip().endswith("<think>")
        return False

    def _thoughts(self, m: Message) -> tuple[str, str]:
        """An assistant's leading think block, tags and all, and its words. The block is the template's business
        (it may strip it from history), so its tags are no text that somebody typed."""
        head, tag, rest = str(m["content"]).partition("</think>")
        opens = head.lstrip().startswith("<think>") or (self.prompted and "<think>" not in head)
        if m["role"] == "assistant" and self.thinks and tag and opens:
            return head + tag, rest
        return "", str(m["content"])

    def _message(self, m: Message) -> Message:
        head, content = self._thoughts(m)
        safe = {k: v if k == "role" else self._protect(v) for k, v in m.items() if k != "content"}
        safe["content"] = self._protect(content)
        if head:
            lead, tag, inner = head.removesuffix("</think>").partition("<think>")
            safe["content"] = f"{self._protect(lead)}{tag}{self._protect(inner)}</think>{safe['content']}"
        return safe

    def _protect(self, value: Any) -> Any:
        """The value with every text in it protected, keys included."""
        if isinstance(value, str):
            safe, typed = self.controls.protect(value, self.where)
            self.typed |= typed
            self.private |= PRIVATE.search(value) is not None
            return safe
        if isinstance(value, Mapping):
            return {self._protect(k): self._protect(v) for k, v in value.items()}
        return [self._protect(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A template may refuse a chat (Gemma's has no system role): that is the row's fault, and named. It is somebody
    else's program, too, which fails as programs do, or wants what its sandbox keeps from it."""
    try:
        yield
    except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError, ValueError, RecursionError) as e:
        raise RowError(where, "template", f"the chat template refuses it ({e})") from None


def _template(tokenizer: Any, tools: Sequence[dict[str, Any]]) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError("tokenizer: has no chat template; give plain `prompt` or `text` rows instead of messages")
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) or None))
    except ValueError as e:  # several templates, none of them the default
        raise DataError(f"tokenizer: {e}") from None
