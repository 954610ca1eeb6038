"""What the doctor looks for in rows: each check is a function of rows and a tokenizer, each finding has a cure.

Thresholds are judgement, not theory; they are named here, and the report prints the measured value beside them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.data import chat
from draftsmith.data.chat import ChatConfig
from draftsmith.data.edges import Marks, marks, runs
from draftsmith.data.rows import Row, Rows, check_origin
from draftsmith.data.settings import DataConfig
from draftsmith.errors import DataError

if TYPE_CHECKING:
    from draftsmith.contracts import BaseSpec

ERROR, WARNING, NOTE = "error", "warning", "note"
EDGES = 0.02  # share of assistant turns whose first or last learned token may be out of place
NEARLY_ALL = 0.9  # share of rows that may begin with learned tokens: answers to nothing do
REPEATED = 0.01  # share of rows that an earlier row equals
CUT = 0.2  # share of rows whose last answer has no end
LOOPING = 0.5  # share of an answer's 4-grams that are new, below which it goes round in circles
LOOPERS = 0.05  # share of such answers
GAP = 0.35  # nats per token by which answers may be less likely than the base's own samples would be
THINK = ("<think>", "</think>", "[THINK]", "[/THINK]")


@dataclass(frozen=True)
class Finding:
    """name: stable, for scripts. value: what was measured. fix: what to do about it."""

    name: str
    severity: str  # error | warning | note
    what: str
    fix: str
    value: Any = None


@dataclass(frozen=True)
class Sample:
    """The rows looked at, and what they were made for."""

    rows: Rows
    tokenizer: Any
    eos_ids: frozenset[int]
    spec: BaseSpec
    config: DataConfig

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @cached_property
    def marks(self) -> Marks:
        return marks(self.tokenizer, self.eos_ids, self.config.chat)

    @cached_property
    def said(self) -> list[dict[str, Any]]:
        """The text of each row, {} where nobody knows it."""
        return [json.loads(text) if text else {} for text in self.rows.text("said")]

    @cached_property
    def chats(self) -> list[Row]:
        """The rows that a chat template has written: all but those known to be plain text."""
        return [row for row, said in zip(self, self.said, strict=True) if not {"prompt", "text"} & {*said}]


def turns(row: Row) -> list[tuple[int, int]]:
    """(begin, end) of each run of learned tokens."""
    return runs(row.mask)


def inspect(sample: Sample) -> list[Finding]:
    """Every check of this file on a sample of rows, worst first."""
    found = [f for check in CHECKS for f in check(sample)]
    return sorted(found, key=lambda f: (ERROR, WARNING, NOTE).index(f.severity))


def _learned(s: Sample) -> Iterator[Finding]:
    learns_N = s.rows.learns()
    none = int((~learns_N).sum())
    if none:
        yield Finding(
            "nothing_to_learn",
            ERROR if none == len(s.rows) else WARNING,
            f"{none} of {len(s.rows)} rows have no token to learn",
            "see where their masks come from; such rows are left out of training",
            none,
        )


def _prompts(s: Sample) -> Iterator[Finding]:
    """Is anything learned before the assistant's first turn? (How much is learned says nothing: answers are long.)"""
    if s.config.loss_on != "assistant":
        return
    swallowed = started = total = 0
    for row, said in zip(s, s.said, strict=True):
        if not (spans := turns(row)) or said.get("prompt") == "":
            continue
        (begin, end), ids = spans[0], [int(i) for i in row.ids]
        total += 1
        swallowed += not {"prompt", "text"} & {*said} and s.marks.swallowed(ids, begin, end)
        started += begin <= 1 and s.marks.place(ids, begin) != "right"
    if total and (swallowed / total > EDGES or started / total > NEARLY_ALL):
        count = max(swallowed, started)
        yield Finding(
            "all_learned",
            ERROR,
            f"in {count} of {total} rows the mask begins before the assistant does: prompts are learned as if the base"
            " had said them",
            "mask the prompts, or say data.loss_on=all if that is meant",
            count,
        )


def _begins(s: Sample) -> Iterator[Finding]:
    """Does every assistant turn begin where the template lets the assistant begin?"""
    begins: Counter[str] = Counter()
    if s.marks.openings:
        for row in s.chats:
            ids = [int(i) for i in row.ids]
            begins.update(s.marks.place(ids, begin) for begin, _ in turns(row))
    total = sum(begins.values())
    for how in ("early", "late"):
        if total and begins[how] / total > EDGES:
            yield Finding(
                f"mask_begins_{how}",
                ERROR,
                f"in {begins[how]} of {total} assistant turns the mask begins one token too {how}",
                "mend the masks: the first learned token is the first one after the generation prompt",
                begins[how],
            )
    if total and begins["other"] / total > EDGES:
        yield Finding(
            "foreign_template",
            WARNING,
            f"{begins['other']} of {total} assistant turns do not follow this template's generation prompt",
            "rows were written with another chat template; encode or distil them with this base",
            begins["other"],
        )


def _ends(s: Sample) -> Iterator[Finding]:
    """Does every assistant turn end with its end token?"""
    ends: Counter[str] = Counter()
    known = s.marks.ends
    for row in s:
        for begin, end in turns(row):
            last, after = int(row.ids[end - 1]), int(row.ids[end]) if end < len(row.ids) else -1
            if last in known:
                ends["right"] += 1
            elif end - begin > 1 and int(row.ids[end - 2]) in known:  # even if the chat's own end comes next
                ends["late"] += 1
            elif after in known:
                ends["early"] += 1
    total = sum(ends.values())
    for how, text in (("early", "ends one token before its end-of-turn token"), ("late", "ends one token too late")):
        if total and ends[how] / total > EDGES:
            yield Finding(
                f"mask_ends_{how}",
                ERROR,
                f"in {ends[how]} of {total} assistant turns the mask {text}",
                "mend the masks: the end-of-turn token is the last one that the base itself says",
                ends[how],
            )


def repeats(contents: Sequence[Any]) -> Iterator[Finding]:
    """contents: what each row says, or its hash."""
    extra = len(contents) - len(set(contents))
    if extra / max(1, len(contents)) > REPEATED:
        yield Finding(
            "repeated",
            WARNING,
            f"{extra} of {len(contents)} rows equal an earlier one",
            "set data.repeats=drop, or take them out",
            extra,
        )


def _long(s: Sample) -> Iterator[Finding]:
    room = min(s.config.length, s.spec.max_positions)
    over = int((s.rows.lengths_N > room).sum())
    if over:
        limit = f"data.length={room}" if room == s.config.length else f"the base's context of {room}"
        yield Finding(
            "too_long",
            ERROR if s.config.long_rows == "error" else WARNING,
            f"{over} of {len(s.rows)} rows are longer than {limit}, the longest {int(s.rows.lengths_N.max())} tokens",
            "raise data.length, or set data.long_rows=truncate or drop",
            over,
        )


def _unfinished(s: Sample) -> Iterator[Finding]:
    known = s.marks.ends
    if not known or not s.marks.closes or s.config.loss_on == "all":
        return
    open_rows = sum(1 for row in s if turns(row) and int(row.ids[turns(row)[-1][1] - 1]) not in known)
    share = open_rows / max(1, len(s.rows))
    if share > CUT:
        yield Finding(
            "unfinished",
            WARNING,
            f"{open_rows} of {len(s.rows)} rows end without an end token ({share:.0%})",
            "raise data.generation.max_new_tokens, or look at how the answers were cut",
            open_rows,
        )


def _leaks(s: Sample) -> Iterator[Finding]:
    """Ids inside an answer that open or end turns: two turns in one mask, or control tokens that somebody typed.
    What else a base says in control tokens (tool calls, thoughts) is its own."""
    inside = sum(any(int(i) in s.marks.turn for i in row.ids[b : e - 1]) for row in s for b, e in turns(row))
    total = sum(len(turns(row)) for row in s)
    if inside and inside / max(1, total) > EDGES and s.config.loss_on == "assistant":
        yield Finding(
            "control_in_answer",
            ERROR,
            f"{inside} of {total} answers have a token in their middle that opens or ends a turn",
            "look at the masks (two turns in one?) and at data.chat.control_tokens",
            inside,
        )
    typed = [str(t) for t in getattr(s.tokenizer, "all_special_tokens", [])]
    loose = sum(any(t and t in json.dumps(_contents(said), ensure_ascii=False) for t in typed) for said in s.said)
    if loose:
        severity = WARNING if s.config.chat.control_tokens else NOTE
        yield Finding(
            "typed_control",
            severity,
            f"{loose} rows have control tokens typed in their text",
            "they become control ids: set data.chat.control_tokens=false"
            if s.config.chat.control_tokens
            else "nothing: they stay text",
            loose,
        )


def _contents(said: Mapping[str, Any]) -> list[str]:
    return [str(m.get("content", "")) for m in said.get("messages", [])]


def _thinking(s: Sample) -> Iterator[Finding]:
    """By the last answers: templates take the thoughts out of earlier ones."""
    thinks = total = 0
    for row in s:
        for begin, end in turns(row)[-1:]:
            total += 1
            text = s.tokenizer.decode([int(i) for i in row.ids[begin:end]], skip_special_tokens=False)
            head, _, rest = text.partition(THINK[1])
            thinks += bool(rest and head.replace(THINK[0], "").strip()) or THINK[2] in text
    if total and 0.02 < thinks / total < 0.98:
        yield Finding(
            "mixed_thinking",
            WARNING,
            f"{thinks} of {total} rows end in an answer that thinks aloud, the others do not",
            "split the rows by it: the served template does one or the other",
            thinks,
        )


def _loops(s: Sample) -> Iterator[Finding]:
    shares = [distinct(list(row.ids[begin:end])) for row in s for begin, end in turns(row) if end - begin >= 24]
    looping = sum(share < LOOPING for share in shares)
    if shares and looping / len(shares) > LOOPERS:
        yield Finding(
            "looping",
            WARNING,
            f"{looping} of {len(shares)} longer answers go round in circles (fewer than {LOOPING:.0%} new 4-grams)",
            "sample with a temperature, or take them out: a head learns the loop and nothing else",
            looping,
        )


def distinct(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that did not occur before in the same text."""
    grams = [tuple(int(t) for t in ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _few(s: Sample) -> Iterator[Finding]:
    if len(s.rows) < 200:
        yield Finding("few", NOTE, f"only {len(s.rows)} rows", "a head wants some thousand", len(s.rows))


CHECKS: tuple[Callable[[Sample], Iterator[Finding]], ...] = (
    _learned,
    _prompts,
    _begins,
    _ends,
    _long,
    _unfinished,
    _leaks,
    _thinking,
    _loops,
    _few,
)


def refusals(
    reasons: Mapping[str, int], of: int, some: str, on_bad: str, firsts: Mapping[str, Any]
) -> Iterator[Finding]:
    """Rows that could not be read or encoded, by reason, each with its first. some: what the `of` rows are."""
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        yield Finding(
            f"row_{reason}",
            ERROR if on_bad == "error" or count == of else WARNING,
            f"{count} of {some} {'does' if count == 1 else 'do'} not fit, the first: {firsts[reason]}",
            "mend them, or set data.on_bad=skip" if on_bad == "error" else "mend them; they are left out as it is",
            count,
        )


def thinking_choice(tokenizer: Any, config: ChatConfig) -> Iterator[Finding]:
    """For chats that are still to be encoded."""
    if config.thinking is None and _can_think(tokenizer):
        yield Finding(
            "thinking_unsaid",
            ERROR,
            "the chat template can think, and nobody said whether it does",
            "say data.chat.thinking=true or false, as the server will",
        )


def other_thinking(made: bool | None, tokenizer: Any, config: ChatConfig) -> Iterator[Finding]:
    """made: data.chat.thinking of finished rows, as their manifest has it."""
    if None not in (made, config.thinking) and made != config.thinking and _can_think(tokenizer):
        yield Finding(
            "other_thinking",
            WARNING,
            f"the rows were made with data.chat.thinking={str(made).lower()}, and now it is"
            f" {str(config.thinking).lower()}",
            "distil or encode them again, as the server will think; or say what they were made with",
            made,
        )


def _can_think(tokenizer: Any) -> bool:
    return bool(tokenizer is not None and tokenizer.chat_template and chat.can_think(tokenizer))


def origin(facts: Mapping[str, Any], spec: BaseSpec, folder: Path) -> Iterator[Finding]:
    """Were the rows of a folder written with this base's tokenizer and chat template?"""
    try:
        check_origin(facts, spec, folder)
    except DataError as e:
        yield Finding("other_base", ERROR, str(e), "distil or encode them again with this base")


def overlap(asked: set[str], measured: Rows) -> Iterator[Finding]:
    """asked: what the training rows ask."""
    shared = asked & {*measured.text("asked")} - {""}
    if shared:
        yield Finding(
            "overlap",
            ERROR,
            f"{len(shared)} questions are in the training and in the validation rows",
            "take them out of one side, or use data.validation.share, which splits by question",
            len(shared),
        )


def off_policy(score: Mapping[str, float]) -> Iterator[Finding]:
    """score: of `measure.own_words`."""
    if score["nll"] - score["entropy"] > GAP:
        yield Finding(
            "off_policy",
            WARNING,
            f"the answers are not this base's own: {score['nll']:.2f} nats per token, where its own samples would"
            f" have {score['entropy']:.2f}; it agrees with {score['agreement']:.0%} of the tokens"
            f" (expected of its samples {score['expected']:.0%}, of greedy text 100%)",
            "let the base answer the prompts itself: draftsmith distill",
            round(score["nll"] - score["entropy"], 3),
        )


def plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(f) for f in findings]
