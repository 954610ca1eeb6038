"""Self-distillation: the base answers the prompts, and a row keeps the ids it emitted.

Every assistant turn of a chat is answered anew, turn by turn, so that each answer follows the base's own
earlier answers. Ids are never re-tokenised: a row is the prompt's ids, the generator's ids, the template's
ids between the turns, the generator's ids …, and its mask marks the generator's. Where a chat template rewrites
earlier turns (it drops their thoughts, say), every turn is a row of its own, as a server would see it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftsmith import room
from draftsmith.artifacts import fingerprint
from draftsmith.data import chat
from draftsmith.data.chat import ChatConfig
from draftsmith.data.journal import Shard
from draftsmith.data.openai_api import ServerConfig
from draftsmith.data.records import Message, Record, user
from draftsmith.data.rows import Row
from draftsmith.errors import ConfigError, RowError

Generate = Callable[..., list[list[int]]]
ENGINES = ("base", "server", "batch")


@dataclass(frozen=True)
class GenerationConfig:
    engine: str = "base"  # base: in this process; server: any OpenAI-compatible one; batch: OpenAI Batch files
    max_new_tokens: int = 512  # per assistant turn
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    batch_size: int = 64  # chats per forward of engine=base
    seed: int = 0  # every row samples with a seed of its own, made from this one and recorded in the row
    shard_rows: int = 512  # prompts per published file
    cut: str = "keep"  # keep | quarantine: an answer that max_new_tokens cut
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        for name, value, choices in (("engine", self.engine, ENGINES), ("cut", self.cut, ("keep", "quarantine"))):
            if value not in choices:
                raise ConfigError(f"{name}='{value}': choose one of {', '.join(choices)}")
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.shard_rows < 1:
            raise ConfigError("max_new_tokens, batch_size, shard_rows: give at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature, top_p: temperature cannot be negative, top_p lies in (0, 1]")
        if self.server.api == "auto":  # our own prompt ids where that can be: vllm run-batch takes chats only
            api = "chat" if self.engine == "batch" else "completions"
            object.__setattr__(self, "server", dataclasses.replace(self.server, api=api))
        if self.engine == "server" and not self.server.urls:
            raise ConfigError("server.urls: engine=server needs at least one, such as [http://127.0.0.1:8000/v1]")


@dataclass(frozen=True)
class Setting:
    """What every conversation of a job shares. room: the base's context length; eos_ids: what ends its texts."""

    tokenizer: Any
    eos_ids: frozenset[int]
    room: int
    generation: GenerationConfig
    chat: ChatConfig = field(default_factory=ChatConfig)


class Conversation:
    """One prompt on its way to its rows: ask() for the ids to answer, answer() with what the base said, until
    ask() gives None. RowError if the prompt cannot be answered; once an answer is kept, trouble with a later
    turn ends the chat instead.
    """

    def __init__(self, key: str, record: Record, setting: Setting) -> None:
        self.key, self.record, self.setting = key, record, setting
        self.coming = _turns(record)
        self.said: list[Message] = []
        self.turn = 0
        self.seed = int(fingerprint([setting.generation.seed, key])[:7], 16)  # turn t samples with seed + t
        self._rows: list[Row] = []
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._last: list[int] = []  # the last answer's ids, its text and how it ended
        self._text, self._finish = "", ""
        self._open = True
        self._asked: list[int] | None = None

    @property
    def turn_seed(self) -> int:
        return self.seed + self.turn

    def ask(self) -> list[int] | None:
        """Ids that the base is to go on from, or None when the chat is over; the same until answer()."""
        if not self._open or self._asked is not None:
            return self._asked
        try:
            new_row, ids = self._next_ids()
            self._fits(ids)
        except RowError:
            if not self.turn:
                raise
            self._open = False
            return None
        if new_row:
            self._close_row()
        self._mask += [0] * (len(ids) - len(self._ids))
        self._ids = ids
        self._asked = list(ids)
        return self._asked

    @property
    def messages(self) -> list[Message]:
        """What a chat API is to be asked, once ask() has opened the turn."""
        return list(self.said)

    def answer(self, new: Sequence[int], *, cut: bool) -> None:
        """The ids the base emitted, its end-of-text token included if it emitted one; cut: the length ended it."""
        text = self.setting.tokenizer.decode(list(new), skip_special_tokens=True)
        if not text.strip():
            return self.give_up(RowError(self.record.where, "empty_answer", "the base's answer is empty"))
        if cut and self.setting.generation.cut == "quarantine":
            return self.give_up(RowError(self.record.where, "cut", "max_new_tokens cut the base's answer"))
        self._asked = None
        self._ids = [*self._ids, *new]
        self._mask += [1] * len(new)
        self._last, self._text, self._finish = list(new), text, "length" if cut else "stop"
        if self.record.messages:
            self.said.append({"role": "assistant", "content": text})
        self.turn += 1
        # an answer cut by the length ends the chat: what follows would answer something never said
        self._open = bool(self.coming) and not cut

    def give_up(self, why: RowError) -> None:
        """This turn cannot be answered: raises `why` if it is the first, else the chat ends with what is kept."""
        self._asked, self._open = None, False
        if not self.turn:
            raise why

    def rows(self) -> list[Row]:
        """The rows, once ask() gave None."""
        assert not self._open, "the conversation is not over"
        self._close_row()
        return self._rows

    def _next_ids(self) -> tuple[bool, list[int]]:
        """(whether a new row begins, its ids up to the assistant's beginning)."""
        s, r = self.setting, self.record
        if not r.messages:
            return False, chat.text_ids(s.tokenizer, r.prompt)
        coming = self.coming.pop(0)
        answered, self.said = self.said, [*self.said, *coming]
        more = None
        if self.turn:
            more = chat.between_ids(s.tokenizer, answered, coming, self._last, r.where, s.chat, eos_ids=s.eos_ids)
        if more is None:
            return bool(self.turn), chat.prompt_ids(s.tokenizer, self.said, r.where, s.chat)
        return False, [*self._ids, *more]

    def _fits(self, ids: list[int]) -> None:
        new, room = self.setting.generation.max_new_tokens, self.setting.room
        if len(ids) + new > room:
            told = f"a prompt of {len(ids)} tokens and max_new_tokens={new} do not fit the base's context of {room}"
            raise RowError(self.record.where, "too_long", told)

    def _close_row(self) -> None:
        """The ids so far, up to the last answer's end, as a row."""
        end = max((i for i, learned in enumerate(self._mask) if learned), default=-1) + 1
        ids, mask = self._ids[:end], self._mask[:end]
        self._ids, self._mask = [], []
        if not end:
            return
        r, number = self.record, len(self._rows)
        last = max((i for i, m in enumerate(self.said) if m["role"] == "assistant"), default=-1) + 1
        said: dict[str, Any] = {"messages": self.said[:last]}
        if not r.messages:
            said = {"prompt": r.prompt, "completion": self._text}
        self._rows.append(
            Row(
                id=f"{self.key}/{number}" if number else self.key,
                ids=ids,
                mask=mask,
                source=r.where,
                part=r.source,
                asked=r.asked,
                said=json.dumps(said, ensure_ascii=False),
                seed=self.seed if self.setting.generation.temperature else None,
                finish=self._finish,
            )
        )


def answer_batch(conversations: Sequence[Conversation], generate: Generate) -> dict[str, RowError]:
    """Lets the base answer these chats to their ends, every turn one batched pass; key -> why, for those it could
    not answer.

    generate(list of ids, max_new_tokens=…, temperature=…, top_p=…, seeds=…, batch_size=…) gives the new ids. Each
    row's result depends on its own ids and seed; that fp32 rounds alike needs the same batch again.
    """
    refused: dict[str, RowError] = {}
    todo = list(conversations)
    while todo:
        asked = []
        for c in todo:
            try:
                ids = c.ask()
            except RowError as e:
                refused[c.key] = e
            else:
                asked += [(c, ids)] if ids is not None else []
        if not asked:
            break
        g = asked[0][0].setting.generation
        answers = generate(
            [ids for _, ids in asked],
            max_new_tokens=g.max_new_tokens,
            temperature=g.temperature,
            top_p=g.top_p,
            seeds=[c.turn_seed for c, _ in asked],
            batch_size=g.batch_size,
        )
        for (c, _), new in zip(asked, answers, strict=True):
            try:
                c.answer(new, cut=len(new) >= g.max_new_tokens and new[-1] not in c.setting.eos_ids)
            except RowError as e:
                refused[c.key] = e
        todo = [c for c, _ in asked if c.key not in refused]
    return refused


def answer_shard(shard: Shard, setting: Setting, generate: Generate, told: Callable[[int], None]) -> None:
    """Answers a shard in this process: batches of similar length, each journaled when its chats are over. Which
    chats share a batch follows from the shard alone, so that a resumed shard ends with the same bytes; told(n)
    after every batch of n chats."""
    chats: list[tuple[int, Conversation]] = []
    for key, record in shard.items:
        try:
            c = Conversation(key, record, setting)
            chats.append((len(c.ask() or []), c))
        except RowError as e:
            if key not in shard.refused:
                shard.refuse(key, e)
    by_length = [c for _, c in sorted(chats, key=lambda pair: -pair[0])]
    missing = {key for key, _ in shard.missing}
    for at in range(0, len(by_length), setting.generation.batch_size):
        batch = by_length[at : at + setting.generation.batch_size]
        todo = missing & {c.key for c in batch}
        if todo:
            sizes = f"{len(batch)} chats x up to {len(batch[0].ask() or []) + setting.generation.max_new_tokens} tokens"
            smaller = room.halved(("data.generation.batch_size", len(batch)), "data.generation.max_new_tokens")
            with room.memory(f"distill: a batch of {sizes}", smaller):
                refused = answer_batch(batch, generate)
            for c in batch:
                if c.key in todo:
                    shard.refuse(c.key, refused[c.key]) if c.key in refused else shard.settle(c.key, c.rows())
            shard.sync()
        told(len(batch))
    shard.publish()


def _turns(record: Record) -> list[list[Message]]:
    """The messages before each assistant turn; the record's own assistant texts are dropped."""
    if record.prompt:
        return []
    if not record.messages:
        raise RowError(record.where, "no_prompt", "has neither `messages` nor a text `prompt` to answer")
    if record.tools:
        raise RowError(record.where, "tools", "it offers tools, whose calls nobody would answer")
    turns: list[list[Message]] = []
    pending: list[Message] = []
    for m in record.messages:
        if m["role"] == "tool" or m.get("tool_calls"):
            raise RowError(record.where, "tools", "tool calls cannot be replayed: the base's own would differ")
        if m["role"] == "assistant":
            continue
        pending.append(m)
        if m["role"] == "user":
            turns.append(pending)
            pending = []
    if not turns:
        raise RowError(record.where, "no_prompt", "no user message to answer")
    return [*turns, *([user(said)] for said in record.later)]
