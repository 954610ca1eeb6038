"""The second kind of label: does a refused draft token matter? (AutoJudge, arXiv 2504.20039.)

In the base's own greedy answer, from left to right, the companion's greedy token takes the place of one that
differs, and the base goes on greedily from there. Important: the final answer changes. Where it does not, the
substitution stays, so that each token is judged in the text that stands before it.

Deviations: AutoJudge compares answers with each benchmark's own rules, we by `final_answer`; it judges one row at a
time, we many side by side, equal up to ties between logits that padding rounds differently.

Shapes: A positions of one row, C positions at a time, U companion's vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from draftsmith.contracts import BaseSpec, BaseView
from draftsmith.data.labels import LOGITS, LabelsConfig, logits, where
from draftsmith.data.rows import Row, to_table
from draftsmith.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# A sign belongs to a number unless something stands right before it: 7-3 ends in 3.
NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, at most so many new ids -> new ids


def final_answer(text: str, how: str) -> str:
    """What is compared: `last_number`: the last number in the text, in one spelling (1,000.50 is 1000.5; "" if
    there is none); `last_line`: the last line that is not blank; `text`: all of it. Runs of blanks count as one."""
    if how == "last_number":
        numbers = NUMBER.findall(text)
        number = f"{Decimal(numbers[-1].replace(',', '')):f}" if numbers else ""
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return "0" if number == "-0" else number
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return "\n".join(lines) if how == "text" else lines[-1] if lines else ""


@dataclass
class Walk:
    """One row on its way from left to right. `at`: positions of the answer before it are settled. drafted: the
    companion's greedy token at each position of the answer (before `at`: unused); None: to be made again."""

    row: Row
    prompt: list[int]
    room: int  # how many tokens the answer may have
    limit: int  # and the whole text
    answer: list[int] = field(default_factory=list)
    final: str = ""
    at: int = 0
    drafted: list[int] | None = None
    judged: list[tuple[int, int, int]] = field(default_factory=list)  # (position in ids, drafted token, important)
    cut: bool = False

    def advance(self, most: int) -> bool:
        """Goes to the next mismatch; False if there is none, or `most` have been judged (then `cut`)."""
        assert self.drafted is not None
        while self.at < len(self.answer) and self.drafted[self.at] == self.answer[self.at]:
            self.at += 1
        self.cut = self.at < len(self.answer) and len(self.judged) >= most
        return self.at < len(self.answer) and not self.cut

    def tried(self) -> list[int]:
        """The settled answer with the companion's token at `at`."""
        assert self.drafted is not None
        return [*self.answer[: self.at], self.drafted[self.at]]

    def settle(self, other: list[int], final: str) -> None:
        """`other` is what the base made of `tried`, `final` its final answer."""
        important = final != self.final
        self.judged.append((len(self.prompt) + self.at, other[self.at], int(important)))
        self.at += 1
        if not important:
            self.answer, self.drafted = other, None

    def table_row(self, eos_ids: frozenset[int]) -> Row:
        ids = [*self.prompt, *self.answer]
        mask = [0] * len(self.prompt) + [1] * len(self.answer)
        return replace(self.row, ids=ids, mask=mask, finish="stop" if ids[-1] in eos_ids else "length")


def importance(
    companion: BaseView,
    rows: Sequence[Row],
    config: LabelsConfig,
    *,
    generate: Generate,
    decode: Callable[[list[int]], str],
    eos_ids: frozenset[int],
    spec: BaseSpec,
) -> pa.Table:
    """Rows with ids = prompt and final text, mask = 1 on that text, and the lists `positions` (in ids), `drafted`
    (the companion's token there) and `important` (0 or 1); `cut`: max_mismatches ended the walk.

    The prompt is what stands before a row's first answer; a row without any answer is left as it is. An important
    token is not in ids: the state to train on is that of `drafted` after ids[:position]. generate, decode, eos_ids
    and spec are the base's own; generate is greedy. DataError for a row without a prompt or room for an answer.
    """
    import pyarrow as pa

    walks = [_begin(row, min(spec.max_positions, companion.spec.max_positions), config) for row in rows]
    waiting = [w for w in reversed(walks) if w.room]
    for some in (waiting[i : i + config.batch_size] for i in range(0, len(waiting), config.batch_size)):
        for walk, answer in zip(some, _finish(some, [[] for _ in some], generate, eos_ids), strict=True):
            walk.answer, walk.final = answer, final_answer(decode(answer), config.answer)
    active: list[Walk] = []
    while active or waiting:
        while waiting and len(active) < config.batch_size:
            active.append(waiting.pop())
        _draft(companion, [w for w in active if w.drafted is None], spec.vocab_size)
        active = [w for w in active if w.advance(config.max_mismatches)]
        others = _finish(active, [w.tried() for w in active], generate, eos_ids)
        for walk, other in zip(active, others, strict=True):
            walk.settle(other, final_answer(decode(other), config.answer))
    extra: dict[str, tuple[pa.DataType, list]] = {
        name: (pa.large_list(kind), [[judged[n] for judged in w.judged] for w in walks])
        for n, (name, kind) in enumerate(
            (("positions", pa.int32()), ("drafted", pa.int32()), ("important", pa.uint8()))
        )
    }
    extra["cut"] = (pa.bool_(), [w.cut for w in walks])
    return to_table([w.table_row(eos_ids) if w.room else w.row for w in walks], extra)


def _begin(row: Row, limit: int, config: LabelsConfig) -> Walk:
    answered_A = np.flatnonzero(np.asarray(row.mask))
    if not len(answered_A):
        return Walk(row, [], 0, limit)
    prompt = [int(i) for i in row.ids[: answered_A[0]]]
    if not prompt or len(prompt) >= limit:
        raise DataError(f"{where(row)}: a prompt of {len(prompt)} tokens; it needs 1 to {limit - 1}")
    return Walk(row, prompt, min(config.max_new_tokens, limit - len(prompt)), limit)


def _finish(
    walks: Sequence[Walk], starts: Sequence[list[int]], generate: Generate, eos_ids: frozenset[int]
) -> list[list[int]]:
    """Each start, ended by the base: up to EOS or the walk's room.

    A batch of `generate` has one bound. Greedy text cut later is the text of a smaller bound, so the largest
    serves all whom it does not lead beyond their context; the others follow with their own.
    """
    whole = [list(start) for start in starts]
    left = [0 if s and s[-1] in eos_ids else w.room - len(s) for w, s in zip(walks, starts, strict=True)]
    while any(left):
        most = max(left)
        now = [n for n, w in enumerate(walks) if left[n] and len(w.prompt) + len(whole[n]) + most <= w.limit]
        made = generate([[*walks[n].prompt, *whole[n]] for n in now], most)
        for n, new in zip(now, made, strict=True):
            whole[n] += new[: left[n]]
            left[n] = 0
    return whole


def _draft(companion: BaseView, walks: Sequence[Walk], vocab_size: int) -> None:
    """The companion's greedy token at every position that a walk has still to see, from one forward."""
    if not walks:
        return
    ids = [[*w.prompt, *w.answer] for w in walks]
    open_ = [np.arange(len(w.prompt) + w.at, len(i)) for w, i in zip(walks, ids, strict=True)]
    chunk = max(1, LOGITS // companion.spec.vocab_size)
    best = [logits_CU[:, :vocab_size].argmax(-1).tolist() for logits_CU in logits(companion, ids, open_, chunk)]
    tokens = iter([token for chunk_of in best for token in chunk_of])
    for walk, at_A in zip(walks, open_, strict=True):
        walk.drafted = [-1] * walk.at + [next(tokens) for _ in at_A]
