"""Lengths, and rows token by token."""

from typing import Any

from draftsmith.data import looks
from draftsmith.data.rows import Row, Rows

ROWS = [Row("a", [1, 40, 41, 42, 43, 44], [0, 1, 1, 1, 0, 1], "f:1"), Row("b", [1, 40], [0, 0]), Row("c", [1], [1])]


def test_lengths() -> None:
    told = looks.lengths(Rows.of(ROWS))
    assert told["rows"]["p100"] == 6
    assert (told["prompts"]["p0"], told["prompts"]["p100"]) == (0, 1)
    assert (told["answers"]["p0"], told["answers"]["p100"]) == (1, 3)
    assert sum(n for _, n in told["histograms"]["rows"]) == len(ROWS)
    assert sum(n for _, n in told["histograms"]["answers"]) == 3
    assert "answers" not in looks.lengths(Rows.of(ROWS[1:2]))


def test_what_is_shown(tokenizer: Any) -> None:
    (row,) = looks.shown(Rows.of(ROWS), tokenizer, 1)
    assert row["source"] == "f:1"
    assert "".join(t for t, _, _ in row["tokens"]) == tokenizer.decode(ROWS[0].ids)
    assert [m for _, m, _ in row["tokens"]] == ROWS[0].mask
    assert [i for i, (_, _, edge) in enumerate(row["tokens"]) if edge] == [1, 3, 5]
