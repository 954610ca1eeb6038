"""Chat messages to token ids and loss mask: exact, by the chat template's own boundaries, or a RowError.

The mask is 1 on what the model itself emits: the assistant's text and tool calls, a think block that the template
writes after the generation prompt, and the end-of-turn token; never the header, nor the newline behind the end.

Two routes lead there. A template with `{% generation %}` markers says it itself ("template"). For any other
("boundaries") a turn begins where the ids of the prompt up to it end, being the first ids of the whole chat, or,
where the template rewrites history, behind the next header made of control tokens; it ends with the first
end-of-turn id that leaves exactly the turn between. Every turn is decoded and compared; what does not verify is
refused. So is a token that straddles a boundary ("\\n\\n" made of the header's newline and the answer's own): from
prompt_ids a generator could not have emitted it.

Control tokens typed in message text stay text, unless chat.control_tokens: see controls.py and script.py.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.data.controls import controls, decode, form
from draftsmith.data.records import Message
from draftsmith.data.script import ChatConfig, Script, can_think, template_facts
from draftsmith.errors import DataError, RowError

__all__ = [
    "ChatConfig",
    "Encoded",
    "between_ids",
    "can_think",
    "completion",
    "encode",
    "prompt_ids",
    "template_facts",
    "text_ids",
    "whole_ids",
]

PLAIN = ChatConfig()
TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}


@dataclass(frozen=True)
class Encoded:
    """ids and mask are of one length. how: "template" (its markers), "boundaries" (found and verified)."""

    ids: list[int]
    mask: list[int]
    how: str


def encode(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    chat: ChatConfig = PLAIN,
    *,
    tools: Sequence[dict[str, Any]] = (),
    eos_ids: Collection[int] = frozenset(),
) -> Encoded:
    """The whole chat. eos_ids: what ends a turn besides the tokenizer's eos and the template's end-of-turn.

    RowError: "no_answer" no assistant turn says anything, "template" it refuses the chat, "mask" a boundary that
    cannot be verified, "control" typed control tokens that this tokenizer cannot write as text.
    """
    if not any(m["role"] == "assistant" and (m["content"] or m.get("tool_calls")) for m in messages):
        raise RowError(where, "no_answer", "no assistant text to learn from; distil the prompts or drop the row")
    script = Script(tokenizer, messages, where, chat, tools)
    text, spans = script.render(script.messages)
    ids = script.ids(text)
    if not script.facts.marked:
        return Encoded(ids, _found(script, ids, _ends(script, eos_ids)), "boundaries")
    mask = [0] * len(ids)
    for span in spans:
        begin, end = (_cut(script, ids, text[:at]) for at in span)
        mask[begin:end] = [1] * (end - begin)
    if not any(mask):
        raise RowError(where, "mask", "the chat template marked no assistant token; check its generation markers")
    return Encoded(ids, mask, "template")


def whole_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    chat: ChatConfig = PLAIN,
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Ids of the whole chat, where nobody asks what of it the assistant said."""
    script = Script(tokenizer, messages, where, chat, tools)
    return script.ids(script.render(script.messages)[0])


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str = "chat",
    chat: ChatConfig = PLAIN,
    *,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Ids up to the point where the assistant is to begin."""
    script = Script(tokenizer, messages, where, chat, tools)
    return script.opened(script.messages)


def between_ids(
    tokenizer: Any,
    said: Sequence[Message],
    coming: Sequence[Message],
    answer_ids: Sequence[int],
    where: str,
    chat: ChatConfig,
    *,
    tools: Sequence[dict[str, Any]] = (),
    eos_ids: Collection[int] = frozenset(),
) -> list[int] | None:
    """What the template writes from the end of an answer to the beginning of the next one.

    said ends with the answer, its text decoded from answer_ids without special tokens; coming is what follows it.
    With the template's end-of-turn token if answer_ids have no end (cut by the length), without it if they have one,
    be it the template's or another. None: the template does not keep prompt and answer as they were (it strips the
    answer's reasoning or blanks, or the answer was tool calls), so the next row begins anew with prompt_ids.
    """
    script = Script(tokenizer, [*said, *coming], where, chat, tools)
    answer, before = said[-1], script.messages[: len(said) - 1]
    prompt, longer = script.opened(before), script.opened(script.messages)
    if answer.get("tool_calls") or longer[: len(prompt)] != prompt:
        return None
    ends = _ends(script, eos_ids)
    found = _end(script, longer, len(prompt), len(before), ends)
    if found is None:
        return None
    kept = form(script.decode(longer[len(prompt) : found[0]]))
    content = form(answer["content"])
    if content not in kept or kept.strip() != content.strip():
        return None
    return longer[found[int(bool(answer_ids) and answer_ids[-1] in ends)] :]


def text_ids(tokenizer: Any, text: str, where: str = "text") -> list[int]:
    """Ids of plain text behind the special tokens that the tokenizer puts in front of text (what it would append,
    it does not). Control tokens in the text stay text; RowError "control" if the tokenizer cannot do that."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    front = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    known = controls(tokenizer, str(tokenizer.chat_template or ""))
    return [*whole[:front], *known.ids(*known.protect(text, where), where)]


def completion(tokenizer: Any, prompt: str, completion: str, where: str, *, eos_ids: Collection[int]) -> Encoded:
    """text_ids of the prompt, then the completion and one eos, both masked 1.

    The completion is tokenised alone, as after a prompt that is fixed; if that changes the text (tokenizers that
    put a blank before every text), as the joined text has it. RowError "mask" if neither keeps prompt and text.
    """
    if not completion:
        raise RowError(where, "no_answer", "the completion is empty; distil the prompt or drop the row")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(eos_ids, default=None)
    if eos is None:
        raise DataError("tokenizer: has no eos token to end a completion with")
    asked, joined = (text_ids(tokenizer, t, where) for t in (prompt, prompt + completion))
    known = controls(tokenizer, str(tokenizer.chat_template or ""))
    alone = known.ids(*known.protect(completion, where), where)
    for said in [alone] + [joined[len(asked) :]] * (joined[: len(asked)] == asked):
        if decode(tokenizer, asked + said) == decode(tokenizer, joined):
            return Encoded([*asked, *said, eos], [0] * len(asked) + [1] * (len(said) + 1), "boundaries")
    raise RowError(where, "mask", "a token straddles the end of the prompt; move the blank between them")


def _found(script: Script, ids: list[int], ends: Collection[int]) -> list[int]:
    """The mask by search; RowError for a turn that does not verify."""
    mask, at = [0] * len(ids), 0
    pieces = []
    for i, m in enumerate(script.original):
        if m["role"] != "assistant":
            continue
        for begin, short in _begins(script, ids, i, at):
            if begin >= at and (end := _end(script, ids, begin, i, ends, may_think=not short)):
                break
        else:
            told = "cannot be told from the template's text; use a template with {% generation %} markers"
            raise RowError(script.where, "mask", f"messages[{i}]: where the assistant's turn begins and ends {told}")
        pieces += [script.decode(ids[at:begin]), script.decode(ids[begin : end[1]])]
        mask[begin : end[1]] = [1] * (end[1] - begin)
        at = end[1]
    pieces.append(script.decode(ids[at:]))
    if "".join("".join(pieces).split()) != "".join(script.decode(ids).split()):
        raise RowError(script.where, "mask", "a boundary cuts a character; use a template with generation markers")
    return mask


def _begins(script: Script, ids: list[int], i: int, at: int) -> Iterator[tuple[int, bool]]:
    """Where the i-th message may begin: behind its prompt, or behind the first header from `at` on; and whether
    that is the header without the think block (or its beginning) that the prompt has."""
    before = script.messages[:i]
    opened = script.opened(before)
    if ids[: len(opened)] == opened:
        yield len(opened), False
    if script.faked:
        return  # somebody may have typed the header
    closed, known = script.ids(script.render(before)[0]), script.controls.id_set
    same = next((n for n, pair in enumerate(zip(opened, closed, strict=False)) if pair[0] != pair[1]), len(closed))
    header = opened[same:]
    if known.isdisjoint(header):  # none of its own: the end of the user's turn opens the assistant's
        last = max((n for n, token in enumerate(opened) if token in known), default=len(opened))
        header = opened[last:]
    thinks = [header.index(n) for tag in TAGS if (n := script.controls.names.get(tag)) in header]
    short = header[: min(thinks)] if thinks else header  # history goes without the prompt's think block
    if known.isdisjoint(short):
        return
    first = next((n for n in range(at, len(ids)) if ids[n : n + len(short)] == short), None)
    if first is not None:
        if ids[first : first + len(header)] == header:
            yield first + len(header), False
        yield first + len(short), len(short) < len(header)


def _end(
    script: Script, ids: list[int], begin: int, i: int, ends: Collection[int], *, may_think: bool = True
) -> tuple[int, int] | None:
    """(end of what the i-th message says, end of its turn); equal if the template writes no end-of-turn token."""
    for n in range(begin, len(ids)):
        if ids[n] in ends and _whole(script, i, script.decode(ids[begin:n]), may_think):
            return n, n + 1
    content, m = script.turn(i)[1], script.messages[i]
    if m.get("tool_calls") or not content.strip():
        return None
    stripped = [*script.messages[:i], {**m, "content": m["content"].strip()}, *script.messages[i + 1 :]]
    if content != content.strip() and script.render(stripped) == script.render(script.messages):
        content = content.strip()  # the template trims it
    wanted = form(content.lstrip())
    n = bisect_left(
        range(len(ids)), len(wanted), lo=begin, key=lambda n: len(form(script.decode(ids[begin:n])).lstrip())
    )
    while n <= len(ids) and len(said := form(script.decode(ids[begin:n])).lstrip()) == len(wanted):
        if said == wanted:
            return n, n
        n += 1  # the last character's bytes are not all there
    return None


def _whole(script: Script, i: int, said: str, may_think: bool) -> bool:
    """Whether this text is the i-th message: its words, blanks around them aside, its tool calls, and nothing in
    front but a think block."""
    reasoning, content = (form(t).strip() for t in script.turn(i))
    said = form(said).strip()
    calls = script.original[i].get("tool_calls") or ()
    if not calls:
        head = said[: len(said) - len(content)]
        return said.endswith(content) and (_thought(head, reasoning) if may_think else not head.strip())
    head, _, rest = said.partition(content) if content else ("", "", said)
    if content not in said or not _thought(head, reasoning) or script.faked:  # a call's text may end a turn
        return False
    for call in calls:
        name = form(str((call.get("function") or call).get("name") or ""))
        if name not in rest:
            return False
        rest = rest.partition(name)[2]
    return True


def _thought(text: str, reasoning: str) -> bool:
    """Whether this is nothing or one think block; its opening tag may stand in the prompt."""
    text = text.strip()
    if not text:
        return True
    return any(
        text.endswith(end) and text.removesuffix(end).removeprefix(tag).strip() in ("", reasoning)
        for tag, end in TAGS.items()
    )


def _ends(script: Script, eos_ids: Collection[int]) -> set[int]:
    """Ids that end a turn: the generator's, the tokenizer's eos, and what the template writes behind an answer."""
    ends = {*eos_ids} | ({script.tokenizer.eos_token_id} - {None})
    with contextlib.suppress(RowError):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = script.ids(script.render(chat)[0])
        last = max((n for n, token in enumerate(ids) if script.decode([token]).strip() == "b"), default=len(ids))
        ends |= set([token for token in ids[last:] if token in script.controls.id_set][:1])
    return ends


def _cut(script: Script, ids: list[int], text: str) -> int:
    """How many of the ids the text's beginning takes; RowError if a token straddles its end."""
    first = script.ids(text)
    if ids[: len(first)] != first:
        raise RowError(script.where, "mask", "a token straddles the edge of what the chat template marks")
    return len(first)
