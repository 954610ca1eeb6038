"""Where an assistant's turns may begin and end: read off what our own encoding makes of a few short chats."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftsmith.data import chat
from draftsmith.data.chat import ChatConfig, Encoded
from draftsmith.data.controls import controls
from draftsmith.data.records import Message
from draftsmith.errors import DraftsmithError

WORDS = ("Why?", "ok 7")  # they end in different tokens, so what two chats share behind them is the template's
TAIL = 3  # ids of an opening without a control token: more would reach into the user's words
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "What."}}},
        },
    }
]
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look", "arguments": {"what": "it"}}}


def runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, np.int8), [0]])))
    return [(int(b), int(e)) for b, e in zip(edges[::2], edges[1::2], strict=True)]


@dataclass(frozen=True)
class Marks:
    """openings: each the ids behind which the assistant may begin; none where no chat template says so. ends: what
    ends a turn; closes: whether the template writes one of them behind an answer, as part of it. turn: ids that
    open or end turns and that no answer has before its end."""

    openings: frozenset[tuple[int, ...]]
    ends: frozenset[int]
    closes: bool
    turn: frozenset[int]

    def place(self, ids: Sequence[int], begin: int) -> str:
        """How a run that begins there lies to an opening: right, one token early or late, or other."""
        for name, at in (("right", begin), ("early", begin + 1), ("late", begin - 1)):
            if any(self._ends_at(ids, opening, at) for opening in self.openings):
                return name
        return "other"

    def swallowed(self, ids: Sequence[int], begin: int, end: int) -> bool:
        """Whether these learned tokens begin before the row's first opening and go on behind it."""
        for at in range(1, end + 1):
            found = [len(o) for o in self.openings if ids[at - 1] == o[-1] and self._ends_at(ids, o, at)]
            if found:
                return begin < at - max(found)
        return False

    @staticmethod
    def _ends_at(ids: Sequence[int], opening: tuple[int, ...], at: int) -> bool:
        return at >= len(opening) and tuple(ids[at - len(opening) : at]) == opening


def marks(tokenizer: Any, eos_ids: frozenset[int], config: ChatConfig) -> Marks:
    """The marks of this tokenizer's chat template; where thinking is unsaid, those of both ways."""
    template = getattr(tokenizer, "chat_template", None)
    bare = eos_ids | {int(i) for i in [getattr(tokenizer, "bos_token_id", None)] if i is not None}
    if not template:
        return Marks(frozenset(), eos_ids, True, bare)
    known = controls(tokenizer, str(template))
    tags = {known.names.get(t) for pair in chat.TAGS.items() for t in pair}
    openings: set[tuple[int, ...]] = set()
    closing, given, own, answers = set[int](), set[int](), set[int](), 0
    for contexts, encoded in _probes(tokenizer, eos_ids, config):
        openings |= {o for a, b in contexts if (o := _shared(a, b, known.id_set))}
        for done in encoded:
            given |= {i for i, m in zip(done.ids, done.mask, strict=True) if not m}
            for begin, end in runs(done.mask):
                own |= set(done.ids[begin : end - 1])
                closing |= {done.ids[end - 1]}
                answers += 1
    ends = eos_ids | (closing & known.id_set)
    turn = (given & known.id_set | bare | ends) - own - tags
    return Marks(frozenset(openings), ends, not answers or bool(closing & ends), frozenset(turn))


def _probes(
    tokenizer: Any, eos_ids: frozenset[int], config: ChatConfig
) -> Iterator[tuple[list[tuple[list[int], list[int]]], list[Encoded]]]:
    """Of each chat that the template takes, said in two ways: what stands before the assistant's turns (a pair per
    turn), and both as they are encoded."""
    settings = [config]
    with contextlib.suppress(DraftsmithError):
        if config.thinking is None and chat.can_think(tokenizer):
            settings = [dataclasses.replace(config, thinking=thinking) for thinking in (True, False)]
    for setting in settings:
        with contextlib.suppress(DraftsmithError):
            a, b = (chat.prompt_ids(tokenizer, [_said("user", w)], "doctor", setting) for w in WORDS)
            yield [(a, b)], []
        for chats in zip(*(_chats(w) for w in WORDS), strict=True):
            with contextlib.suppress(DraftsmithError):  # no system role, no tools, a boundary that nobody can tell
                one, other = (
                    chat.encode(tokenizer, messages, "doctor", setting, tools=tools, eos_ids=eos_ids)
                    for messages, tools in chats
                )
                pairs = zip(runs(one.mask), runs(other.mask), strict=False)
                yield [(one.ids[:m], other.ids[:n]) for (m, _), (n, _) in pairs], [one, other]


def _said(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def _chats(words: str) -> list[tuple[list[Message], list[dict[str, Any]]]]:
    """(messages, tools): several turns, a system message, thoughts, a tool's use."""
    asks, answers = _said("user", words), _said("assistant", "b")
    calls, result = _said("assistant", "", tool_calls=[CALL]), _said("tool", words, tool_call_id=CALL["id"])
    return [
        ([asks, answers, asks, answers], []),
        ([_said("system", words), asks, answers], []),
        ([asks, _said("assistant", "b", reasoning_content="c")], []),
        ([asks, calls, result, answers], TOOLS),
    ]


def _shared(a: list[int], b: list[int], known: frozenset[int]) -> tuple[int, ...]:
    """The last ids in common, from their last control token on."""
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    ids = a[len(a) - same :]
    begin = max((n for n, i in enumerate(ids) if i in known), default=max(0, same - TAIL))
    return tuple(ids[begin:])
