"""Rows: three kinds of lines in, ids and masks out, every refusal with file and row."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.contracts import BaseSpec
from draftsmith.data import chat
from draftsmith.data.prompts import Prompt, PromptsConfig, read_prompts
from draftsmith.data.rows import PROMPTS, DataConfig, Row, read_rows, write_rows
from draftsmith.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}]
GOOD = {"id": "a", "ids": [7, 8, 9], "mask": [0, 1, 1]}
Read = Callable[..., list[Row]]

ASKED = [Prompt("a:1", messages=({"role": "user", "content": "hi"},)), Prompt("a:2", text="Once")]


@pytest.fixture
def read(tmp_path: Path, spec: BaseSpec, tokenizer: Any) -> Read:
    def reader(*lines: Any, **settings: Any) -> list[Row]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_rows(path, DataConfig(**{"path": str(path), **settings}), spec, tokenizer)

    return reader


def test_three_kinds_of_rows(read: Read, tokenizer: Any, tmp_path: Path) -> None:
    rows = read(GOOD, {"messages": CHAT}, {"ids": [3], "mask": [True], "source": "s"})
    ids, mask = chat.encode(tokenizer, CHAT, "")
    where = f"{tmp_path}/in.jsonl"
    assert rows == [
        Row("a", [7, 8, 9], [0, 1, 1], f"{where}:1"),
        Row("", ids, mask, f"{where}:2"),
        Row("", [3], [1], "s"),
    ]


def test_loss_on_all(read: Read, tokenizer: Any) -> None:
    rows = read(GOOD, {"messages": CHAT}, {"text": "the cat"}, loss_on="all")
    assert [set(r.mask) for r in rows] == [{1}, {1}, {1}]
    assert all(len(r.mask) == len(r.ids) for r in rows)
    assert rows[2].ids == tokenizer("the cat")["input_ids"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "none of `ids`, `messages`, `text`"),
        ({"text": 3}, "none of"),
        ({"text": "the cat"}, "data.loss_on=all"),
        ({"ids": 3, "mask": [1]}, "ids: give a list"),
        ({"ids": [1.0], "mask": [1]}, "ids: give a list of integers"),
        ({"ids": [True], "mask": [1]}, "ids: give a list of integers"),
        ({"ids": ["1"], "mask": [1]}, "ids: give a list of integers"),
        ({"ids": [1]}, "mask: give one 0 or 1"),
        ({"ids": [1, 2], "mask": [1]}, r"mask: give one 0 or 1 per id \(2\)"),
        ({"ids": [1], "mask": [2]}, "mask"),
        ({"ids": [1], "mask": "1"}, "mask"),
        ({"ids": [1, 300], "mask": [1, 1]}, "token id 300 .*vocabulary of 297"),
        ({"ids": [5, -4], "mask": [1, 1]}, "token id -4 .*vocabulary"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant text"),
        ({"messages": "x"}, "non-empty list"),
        ({"ids": list(range(20)), "mask": [1] * 20}, "20 tokens do not fit data.length=10"),
    ],
)
def test_a_bad_row_is_named(read: Read, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{says}"):
        read(GOOD, row, length=10)


def test_long_rows(read: Read) -> None:
    long = {"ids": list(range(20)), "mask": [0] * 8 + [1] * 12}
    fits = {"ids": list(range(10)), "mask": [1] * 10}
    assert [len(r.ids) for r in read(GOOD, long, fits, length=10, long_rows="drop")] == [3, 10]
    rows = read(GOOD, long, fits, length=10, long_rows="truncate")
    assert (rows[1].ids, rows[1].mask) == (list(range(10)), [0] * 8 + [1] * 2)
    assert len(rows) == 3


@pytest.mark.parametrize("lines", [[], [{"ids": [1, 2], "mask": [0, 0]}], [{"ids": list(range(20)), "mask": [1] * 20}]])
def test_no_row_left(read: Read, lines: list[Any]) -> None:
    """§11.15: a file with nothing to learn from is refused before training."""
    with pytest.raises(DataError, match="no row left with a token to learn from"):
        read(*lines, length=10, long_rows="drop")


@pytest.fixture
def folder(tmp_path: Path, spec: BaseSpec) -> Path:
    rows = [Row("a", [1, 2, 3], [0, 1, 1], "p:1"), Row("b", [4, 5], [0, 1], "héllo:2")]
    assert write_rows(tmp_path / "rows", rows, ASKED, base=dataclasses.asdict(spec)) == 2
    assert [p.id for p in read_prompts(tmp_path / "rows" / PROMPTS)] == [p.id for p in ASKED]
    return tmp_path / "rows"


def config(path: Path) -> DataConfig:
    return DataConfig(path=str(path))


def test_a_folder_round_trips(folder: Path, spec: BaseSpec, tokenizer: Any) -> None:
    rows = read_rows(folder, config(folder), spec, tokenizer)
    assert rows == [Row("a", [1, 2, 3], [0, 1, 1], "p:1"), Row("b", [4, 5], [0, 1], "héllo:2")]


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_rows_of_another_tokenizer_are_refused(folder: Path, spec: BaseSpec, tokenizer: Any, what: str) -> None:
    other = dataclasses.replace(spec, **{f"{what}_sha256": "0" * 64})
    with pytest.raises(DataError, match=rf"another {what} \(base some/base\)"):
        read_rows(folder, config(folder), other, tokenizer)


def test_a_tampered_folder_is_refused(folder: Path, spec: BaseSpec, tokenizer: Any) -> None:
    text = (folder / "rows.jsonl").read_text()
    for changed in (text.replace("[1, 2, 3]", "[1, 2, 4]"), text[:-1], ""):
        (folder / "rows.jsonl").write_text(changed)
        with pytest.raises(DataError, match=r"rows\.jsonl"):
            read_rows(folder, config(folder), spec, tokenizer)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="missing"):
        read_rows(folder, config(folder), spec, tokenizer)


def test_a_folder_that_is_no_rows_folder(tmp_path: Path, spec: BaseSpec, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_rows(tmp_path, config(tmp_path), spec, tokenizer)


def test_no_rows_are_never_published(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row to write"):
        write_rows(tmp_path / "rows", [], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "path, prompts"),
        ({"path": "x", "prompts": PromptsConfig(synthetic=1)}, "path, prompts"),
        ({"path": "x", "loss_on": "user"}, "loss_on='user'"),
        ({"path": "x", "long_rows": "split"}, "long_rows='split'"),
        ({"path": "x", "length": 0}, "length=0"),
        ({"path": "x", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)
