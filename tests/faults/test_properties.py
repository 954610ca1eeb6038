# ruff: noqa: F811 (fixtures are imported, then asked for)
"""For any rows and any text: no target lies past an end, and what a user types stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from draftsmith.data import chat, importing, shapes, sources
from draftsmith.data.module import Steps
from draftsmith.data.pack import collate
from draftsmith.data.rows import Row, Rows
from draftsmith.data.settings import DataConfig
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError, RowError
from draftsmith.targets import counted_targets

from .fuzzing import base, micro, often  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults


class Spec:
    max_positions = 24


MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=8)


@often(200)
@given(
    masks=MASKS,
    length=st.integers(1, 32),
    horizon=st.integers(1, 6),
    seed=st.integers(0, 3),
    long_rows=st.sampled_from(["truncate", "drop"]),
)
def test_no_target_lies_past_the_end_of_its_row(
    masks: list[list[int]], length: int, horizon: int, seed: int, long_rows: str
) -> None:
    """Every learned token of a row is some position's target k ahead once, if the row has one, and nothing else is.
    The token at place j of row n is 100 n + j, so that a target tells where it comes from."""
    given_rows = [Row(str(n), [100 * n + j for j in range(len(m))], m, asked=str(n)) for n, m in enumerate(masks)]
    config = DataConfig(path="x", length=length, long_rows=long_rows)
    try:
        rows: Rows = importing.choose(Rows.of(given_rows), config, Spec(), None).training  # type: ignore[arg-type]
    except DataError as e:
        why = str(e)
    else:
        why = ""
    if why:
        assert "no row left" in why
        room = min(length, Spec.max_positions)
        fitting = [m[:room] for m in masks if long_rows == "truncate" or len(m) <= room]
        assert not any(1 in m[2:] for m in fitting)
        return
    steps = Steps(rows, length=length, batch_size=1, accumulate=1, horizon=horizon, seed=seed)
    for k in range(1, horizon + 1):
        found: list[int] = []
        for pack in steps.packs(0):
            batch = collate([[rows[n] for n in pack]], length, torch.zeros(1))
            target_BT, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, k)
            here = batch.tokens_BT[counted_BT]
            assert (target_BT[counted_BT] - here == k).all(), "a target of another row, or not k ahead"
            found += target_BT[counted_BT].tolist()
        wanted = []
        for row in rows:  # the slow oracle
            for j in range(k, len(row.ids)):
                if row.mask[j]:
                    wanted.append(int(row.ids[j]))
        assert sorted(found) == sorted(wanted)
        assert int(rows.counts(horizon)[:, k].sum()) == len(wanted)


# --- text


ODD = [
    "\u202e",
    "\u2028",
    "e\u0301",
    "👩‍👩‍👧‍👦",
    "شلام",
    "\ufeff",
    "\x7f",
    "\x00",
    "\r\n",
    "\U0010ffff",
    "ß",
    "İ",
    "\u200d",
]
TYPED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<|user|>", "<|im_", "end|>", "[INST]", "<bos>"]


def texts(own: list[str]) -> Any:
    piece = st.one_of(st.text(max_size=6), st.sampled_from([*ODD, *TYPED, *own]), st.sampled_from(["a cat", " ", "\n"]))
    return st.lists(piece, min_size=1, max_size=5).map("".join)


def control_ids(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


@often(300)
@given(data=st.data())
def test_a_text_comes_back_and_holds_no_control_token(base: Any, data: st.DataObject) -> None:
    tokenizer = base.tokenizer
    said = data.draw(texts(list(tokenizer.all_special_tokens)))
    try:
        ids = chat.text_ids(tokenizer, said, "f:1")
    except RowError as e:
        ids, why = None, e
    if ids is None:
        assert why.reason == "control"
        assert any(ord(c) >= 0xF0000 for c in said), why
        return
    front = len(chat.text_ids(tokenizer, "a", "f:1")) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids[front:], clean_up_tokenization_spaces=False) == said
    assert control_ids(tokenizer).isdisjoint(ids[front:])


@often(200)
@given(data=st.data())
def test_a_chat_holds_the_control_tokens_of_its_template_alone(base: Any, data: st.DataObject) -> None:
    """As many as the same chat of plain words; its mask begins and ends where theirs does; its text is kept."""
    tokenizer = base.tokenizer
    own = list(tokenizer.all_special_tokens)
    asked, answer = data.draw(texts(own)), data.draw(texts(own))
    assume(asked.strip() and answer.strip())
    messages, plain = (
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in ((asked, answer), ("a", "b"))
    )
    record = shapes.record({"messages": messages}, "f:1")
    try:
        row = importing.row_of(record, DataConfig(path="x"), base, 0)
    except RowError as e:
        row, why = None, e
    if row is None:
        assert why.reason in ("mask", "control", "template"), why
        return
    wanted = importing.row_of(shapes.record({"messages": plain}, "f:1"), DataConfig(path="x"), base, 0)
    known = control_ids(tokenizer)
    assert [i for i in row.ids if i in known] == [i for i in wanted.ids if i in known]
    learned = [i for i, m in zip(row.ids, row.mask, strict=True) if m]
    assert (
        tokenizer.decode([i for i in learned if i not in known], clean_up_tokenization_spaces=False).strip()
        == answer.strip()
    )
    assert json.loads(row.said)["messages"] == messages


@often(100)
@given(said=texts([]), ascii=st.booleans())
def test_a_file_keeps_every_character(tmp_path_factory: pytest.TempPathFactory, said: str, ascii: bool) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "kept.jsonl"
    path.write_bytes(json.dumps({"prompt": said}, ensure_ascii=ascii).encode() + b"\r\n")
    assert [value for _, value in sources.read(SourceConfig(path=str(path)))] == [{"prompt": said}]
