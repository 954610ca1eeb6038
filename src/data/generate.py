"""Self-distillation: the base answers the prompts, and a row keeps the ids it emitted.

Every assistant turn of a chat is answered anew, turn by turn, so that each answer follows the base's own
earlier answers. Ids are never re-tokenised: a row is the prompt's ids, the generator's ids, the template's
ids between the turns, the generator's ids …, and its mask marks the generator's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftsmith.data import chat
from draftsmith.data.prompts import Message, Prompt
from draftsmith.errors import ConfigError, DataError

Generate = Callable[..., list[list[int]]]
ANSWER = "@@the-answer@@"  # stands where an answer's text would, to see what the template writes after it


@dataclass(frozen=True)
class GenerationConfig:
    max_new_tokens: int = 512  # per assistant turn
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError("max_new_tokens, batch_size: give at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature, top_p: temperature cannot be negative, top_p lies in (0, 1]")


@dataclass
class _Conversation:
    """One chat on its way: the messages to come, the row so far."""

    prompt: Prompt
    coming: list[list[Message]]  # per assistant turn, what is said before it
    said: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    closed: bool = False

    def open_turn(self, tokenizer: Any) -> None:
        """Adds the ids from the last answer's end up to where the assistant begins again."""
        if self.prompt.text:
            new = chat.text_ids(tokenizer, self.prompt.text)
        elif not self.ids:
            self.said += self.coming.pop(0)
            new = chat.prompt_ids(tokenizer, self.said, self.prompt.where)
        else:
            coming = self.coming.pop(0)
            probe = [*self.said[:-1], {"role": "assistant", "content": ANSWER}, *coming]
            _, found, rest = chat.render(tokenizer, probe, self.prompt.where, open_turn=True).rpartition(ANSWER)
            if not found:
                raise DataError(
                    f"{self.prompt.where}: the chat template hides earlier answers, so the generator's ids"
                    " cannot be kept; give single-turn prompts"
                )
            self.said += coming
            ended = tokenizer.decode(self.ids[-1:], skip_special_tokens=False)  # end-of-turn, if emitted
            new = tokenizer(rest.removeprefix(ended), add_special_tokens=False)["input_ids"]
        self.ids += new
        self.mask += [0] * len(new)

    def close_turn(self, tokenizer: Any, new: list[int], max_new_tokens: int) -> None:
        self.ids += new
        self.mask += [1] * len(new)
        self.said.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
        # an answer cut by the length ends the chat: what follows would answer something never said
        self.closed = not self.coming or len(new) >= max_new_tokens or not new


def distill(
    prompts: Sequence[Prompt], generate: Generate, tokenizer: Any, config: GenerationConfig, room: int
) -> Iterator[tuple[Prompt, list[int], list[int]]]:
    """(prompt, ids, mask) in the prompts' order; every turn of all chats is one batched pass.

    generate(list of ids, max_new_tokens=…, temperature=…, top_p=…, seed=…, batch_size=…) gives the new ids.
    room: the base's context length; a turn whose prompt leaves no room for an answer is a DataError for the
    first turn and ends the chat for later ones.
    """
    chats = [_Conversation(p, _turns(p)) for p in prompts]
    turn = 0
    while open_chats := [c for c in chats if not c.closed]:
        for c in open_chats:
            answered = len(c.ids)
            c.open_turn(tokenizer)
            c.closed = len(c.ids) + config.max_new_tokens > room
            if c.closed and turn:
                del c.ids[answered:], c.mask[answered:]  # a row ends with an answer and fits the base
            elif c.closed:
                raise DataError(
                    f"{c.prompt.where}: a prompt of {len(c.ids)} tokens and max_new_tokens="
                    f"{config.max_new_tokens} do not fit the base's context of {room}"
                )
        asked = [c for c in open_chats if not c.closed]
        if not asked:
            break
        answers = generate(
            [c.ids for c in asked],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + turn,
            batch_size=config.batch_size,
        )
        for c, new in zip(asked, answers, strict=True):
            c.close_turn(tokenizer, new, config.max_new_tokens)
        turn += 1
    for c in chats:
        yield c.prompt, c.ids, c.mask


def _turns(prompt: Prompt) -> list[list[Message]]:
    """The messages before each assistant turn; the prompt's own assistant texts are dropped."""
    if prompt.text:
        return []
    turns: list[list[Message]] = []
    pending: list[Message] = []
    for m in prompt.messages:
        if m["role"] == "assistant":
            continue
        pending.append(m)
        if m["role"] == "user":
            turns.append(pending)
            pending = []
    if not turns:
        raise DataError(f"{prompt.where}: no user message to answer")
    return turns
