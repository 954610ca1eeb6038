"""Importance labels against an oracle that walks one row, one token, one forward at a time."""

from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Needs
from draftsmith.data import labels
from draftsmith.data.importance import final_answer, importance
from draftsmith.data.labels import LabelsConfig
from draftsmith.data.rows import Row
from draftsmith.errors import DataError

V, EOS, CONTEXT = 16, frozenset({0, 3}), 34


@pytest.fixture(scope="module")
def pair(tiny_base: Any) -> tuple[Any, Any]:
    """(base, companion): other random weights, a short context, texts that end."""
    models = [BaseLM(tiny_base("llama", seed, vocab_size=V, max_position_embeddings=CONTEXT).model) for seed in (0, 7)]
    models[0].eos_ids = EOS
    return models[0], models[1]


def some_rows(count: int, seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, count)  # with 16 new tokens some texts end at the context's edge
    return [Row(f"r{n}", [*random.integers(0, V, k), 5, 6], [0] * k + [1, 1]) for n, k in enumerate(lengths)]


def decode(ids: list[int]) -> str:
    """Words of which only some are numbers: the last number often survives a substitution."""
    return " ".join(str(i // 2) if i % 3 == 0 else "word" for i in ids)


def label(pair: tuple[Any, Any], rows: list[Row], config: LabelsConfig) -> list[dict]:
    base, companion = pair

    def finish(prompts: list[list[int]], new: int) -> list[list[int]]:
        return base.generate(prompts, max_new_tokens=new, batch_size=4)

    made = importance(companion, rows, config, generate=finish, decode=decode, eos_ids=EOS, spec=base.spec)
    return made.to_pylist()


def next_token(model: Any, ids: list[int]) -> int:
    return int(model.capture(Needs(logits=True), torch.tensor([ids])).logits[0, -1].argmax())


def oracle(pair: tuple[Any, Any], row: Row, config: LabelsConfig) -> tuple[list[int], list[tuple[int, int, int]], bool]:
    """(final ids, (position, drafted, important), cut)"""
    base, companion = pair
    prompt = list(map(int, row.ids[: list(row.mask).index(1)]))
    end = min(len(prompt) + config.max_new_tokens, CONTEXT)

    def write_on(ids: list[int]) -> list[int]:
        while len(ids) < end and (len(ids) == len(prompt) or ids[-1] not in EOS):
            ids = [*ids, next_token(base, ids)]
        return ids

    def answer(ids: list[int]) -> str:
        return final_answer(decode(ids[len(prompt) :]), config.answer)

    ids, judged, i = write_on(prompt), [], len(prompt)
    while i < len(ids):
        y = next_token(companion, ids[:i])
        if y != ids[i]:
            if len(judged) == config.max_mismatches:
                return ids, judged, True
            other = write_on([*ids[:i], y])
            judged.append((i, y, int(answer(other) != answer(ids))))
            ids = ids if judged[-1][2] else other
        i += 1
    return ids, judged, False


@pytest.mark.parametrize(
    ("how", "batch_size", "most"),
    [("last_number", 5, 32), ("last_number", 1, 3), ("last_line", 64, 32), ("text", 5, 3)],
)
def test_labels_are_those_of_the_oracle(pair: tuple[Any, Any], how: Any, batch_size: int, most: int) -> None:
    config = LabelsConfig("importance", batch_size=batch_size, max_new_tokens=12, max_mismatches=most, answer=how)
    rows = some_rows(14)
    cut = set()
    for row, made in zip(rows, label(pair, rows, config), strict=True):
        ids, judged, was_cut = oracle(pair, row, config)
        assert made["ids"] == ids
        assert list(zip(made["positions"], made["drafted"], made["important"], strict=True)) == judged
        assert made["cut"] == was_cut
        prompt = list(row.mask).index(1)
        assert made["mask"] == [0] * prompt + [1] * (len(ids) - prompt)
        assert made["finish"] == ("stop" if ids[-1] in EOS else "length")
        cut.add(was_cut)
    assert (True in cut) == (most == 3)


def test_the_cases_above_hold_what_they_are_to_test(pair: tuple[Any, Any]) -> None:
    """Both labels; important tokens are not in the text, the others are; texts ended by EOS, room and context."""
    made = label(pair, some_rows(14), LabelsConfig("importance", max_new_tokens=12))
    important = [x for m in made for x in m["important"]]
    assert min(important.count(0), important.count(1)) > 10
    for m in made:
        for at, y, matters in zip(m["positions"], m["drafted"], m["important"], strict=True):
            assert (m["ids"][at] == y) == (not matters)
    assert {m["finish"] for m in made} == {"stop", "length"}
    ended = [m for m in made if m["positions"] and m["positions"][-1] == len(m["ids"]) - 1 and sum(m["mask"]) < 12]
    assert any(m["drafted"][-1] in EOS and not m["important"][-1] for m in ended)
    assert max(len(m["ids"]) for m in made) == CONTEXT


def test_a_companion_that_is_the_base_has_no_mismatch(pair: tuple[Any, Any]) -> None:
    made = label((pair[0], pair[0]), some_rows(14), LabelsConfig("importance", max_new_tokens=12))
    assert [m["positions"] for m in made] == [[]] * 14
    assert not any(m["cut"] for m in made)


def test_chunks_of_positions_decide_nothing(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = LabelsConfig("importance", max_new_tokens=12)
    whole = label(pair, some_rows(8), config)
    monkeypatch.setattr(labels, "LOGITS", 3 * V)
    monkeypatch.setattr("draftsmith.data.importance.LOGITS", 3 * V)
    assert label(pair, some_rows(8), config) == whole


def test_rows_without_an_answer_stay_and_rows_without_a_prompt_are_refused(pair: tuple[Any, Any]) -> None:
    made = label(pair, [Row("a", [1, 2], [0, 0]), *some_rows(1)], LabelsConfig("importance", max_new_tokens=4))
    assert (made[0]["ids"], made[0]["mask"], made[0]["positions"], made[0]["cut"]) == ([1, 2], [0, 0], [], False)
    assert len(made[1]["ids"]) > 2
    with pytest.raises(DataError, match=r"f\.jsonl:1: a prompt of 0 tokens"):
        label(pair, [Row("a", [1, 2], [1, 1], source="f.jsonl:1")], LabelsConfig("importance"))
    with pytest.raises(DataError, match="a prompt of 40 tokens"):
        label(pair, [Row("a", [1] * 41, [0] * 40 + [1])], LabelsConfig("importance"))


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("so 3 + 4 = 7.", "last_number", "7"),
        ("The answer is $1,000.50 in all", "last_number", "1000.5"),
        ("1,234,567", "last_number", "1234567"),
        ("about 5.0", "last_number", "5"),
        ("0.50 left", "last_number", "0.5"),
        ("only .5", "last_number", "0.5"),
        ("100", "last_number", "100"),
        ("007", "last_number", "7"),
        ("it is -12 degrees", "last_number", "-12"),
        ("-0.0", "last_number", "0"),
        ("7-3", "last_number", "3"),
        ("pages 10 - 12", "last_number", "12"),
        ("x = (2)-3", "last_number", "3"),
        ("version 1.2.3", "last_number", "3"),
        ("12345,6", "last_number", "6"),
        ("no digits", "last_number", ""),
        ("", "last_number", ""),
        ("a\n b  c \n\n", "last_line", "b c"),
        ("", "last_line", ""),
        (" a \n\n b\tc ", "text", "a\nb c"),
        ("", "text", ""),
    ],
)
def test_the_final_answer(text: str, how: str, answer: str) -> None:
    assert final_answer(text, how) == answer


def test_numbers_of_any_length_keep_their_digits() -> None:
    assert final_answer("9" * 60, "last_number") == "9" * 60
