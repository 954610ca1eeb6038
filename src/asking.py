"""Prompts as they are put to the base, with what each is reported under.

A question of several turns becomes a prompt per turn: the k-th holds the user's first k turns and the base's own greedy
answers to those before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftsmith.data.records import Message, Record, user
from draftsmith.errors import RowError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.data.chat import ChatConfig

TOGETHER = 16  # chats per forward that are answered, as distilling does


@dataclass(frozen=True)
class Asked:
    """One prompt. source: what it is reported under; turn: which of the user's turns is to be answered, from 1;
    question: whose turn it is, counted from 0."""

    ids: list[int]
    source: str
    turn: int
    question: int = 0


def opened(
    base: BaseLM, records: Sequence[Record], told: ChatConfig, max_new_tokens: int, label: Callable[[Record], str]
) -> tuple[list[Asked], list[RowError]]:
    """The prompts of these records, in their order, and why turns are left out: from the first on that does not
    follow, with its answer's room, in the base's context. RowError for a record whose first turn does not.
    """
    said = [list(r.messages) for r in records]
    made = [[_asked(base, r, messages, told, max_new_tokens, label)] for r, messages in zip(records, said, strict=True)]
    lost: list[RowError] = []
    for n in range(max((len(r.later) for r in records), default=0)):
        going = [i for i, r in enumerate(records) if len(made[i]) == n + 1 and len(r.later) > n]
        prompts = [made[i][n].ids for i in going]
        answers = base.answer(prompts, max_new_tokens=max_new_tokens, batch_size=TOGETHER)
        for i, new in zip(going, answers, strict=True):
            text = base.tokenizer.decode(new, skip_special_tokens=True)
            said[i] += [{"role": "assistant", "content": text}, user(records[i].later[n])]
            try:
                made[i].append(_asked(base, records[i], said[i], told, max_new_tokens, label))
            except RowError as e:  # the base's answer is too long, or none that the template takes
                lost += [e] * (len(records[i].later) - n)
    return [replace(one, question=i) for i, of_one in enumerate(made) for one in of_one], lost


def _asked(
    base: BaseLM,
    record: Record,
    messages: Sequence[Message],
    told: ChatConfig,
    max_new_tokens: int,
    label: Callable[[Record], str],
) -> Asked:
    from draftsmith.data import chat

    ids = (
        chat.prompt_ids(base.tokenizer, messages, record.where, told, tools=record.tools)
        if messages
        else chat.text_ids(base.tokenizer, record.prompt or record.text)
    )
    limit = base.spec.max_positions
    if len(ids) > limit - max_new_tokens:
        raise RowError(
            record.where,
            "too_long",
            f"a prompt of {len(ids)} tokens leaves no room for decoding.max_new_tokens in the base's context of"
            f" {limit}; shorten either or take it out",
        )
    return Asked(ids, label(record), sum(m["role"] == "user" for m in messages) or 1)
