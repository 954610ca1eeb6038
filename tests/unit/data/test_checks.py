"""Every check is silent on good rows and names its own fault on rows that have it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from draftsmith.contracts import BaseSpec
from draftsmith.data import checks, synthetic
from draftsmith.data.chat import ChatConfig, encode
from draftsmith.data.rows import Row, Rows
from draftsmith.data.settings import DataConfig
from draftsmith.errors import RowError

SPEC = BaseSpec("llama", 8, 8, 400, 1, 1, 1, 8, 256)
CHATS = list(synthetic.dialogues(80, seed=9))


@pytest.fixture(scope="module")
def good(tokenizer: Any) -> list[Row]:
    """Forty chats, one turn or several."""
    rows = []
    for i, messages in enumerate(CHATS[:40]):
        done = encode(tokenizer, messages, "here", eos_ids={tokenizer.eos_token_id})
        said = json.dumps({"messages": messages})
        rows.append(Row(f"{i}-0", done.ids, done.mask, f"f:{i}", asked=str(i), said=said))
    return rows


@pytest.fixture
def look(tokenizer: Any) -> Callable[..., dict[str, checks.Finding]]:
    def look(rows: list[Row], **settings: Any) -> dict[str, checks.Finding]:
        config = DataConfig(path="p", **{"length": 2048, "long_rows": "truncate", **settings})
        spec = BaseSpec(**{**vars(SPEC), "max_positions": 4096})
        eos = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")})
        sample = checks.Sample(Rows.of(rows), tokenizer, eos, spec, config)
        return {f.name: f for f in checks.inspect(sample)}

    return look


def changed(row: Row, **values: Any) -> Row:
    return Row(**{**vars(row), **values})


def shifted(row: Row, begin: int, end: int) -> Row:
    """Every learned run begins and ends so many tokens later."""
    mask = [0] * len(row.mask)
    for b, e in checks.turns(row):
        mask[b + begin : e + end] = [1] * (e + end - b - begin)
    return changed(row, mask=mask)


def test_good_rows_raise_nothing(good: list[Row], look: Any) -> None:
    assert set(look(good)) == {"few"}
    assert set(look(good * 6)) == set()


@pytest.mark.parametrize(
    ("begin", "end", "names"),
    [
        (-1, 0, {"mask_begins_early"}),
        (1, 0, {"mask_begins_late"}),
        (0, -1, {"mask_ends_early"}),
        (0, 1, {"mask_ends_late"}),
        (-1, -1, {"mask_begins_early", "mask_ends_early"}),
        (1, 1, {"mask_begins_late", "mask_ends_late"}),
    ],
)
def test_a_mask_that_is_off(good: list[Row], look: Any, begin: int, end: int, names: set[str]) -> None:
    padded = [changed(r, ids=[*r.ids, 300], mask=[*r.mask, 0]) for r in good]
    found = look([shifted(r, begin, end) for r in padded])
    assert {name for name in found if name.startswith("mask_")} == names
    assert set(found) <= {*names, "few", "unfinished", "control_in_answer"}  # what follows from it
    assert all(found[n].severity == checks.ERROR for n in names)


def test_a_twentieth_is_enough_to_be_named(good: list[Row], look: Any) -> None:
    rows = [shifted(r, 1, 0) if i % 20 == 0 else r for i, r in enumerate(good)]
    assert "mask_begins_late" in look(rows)


def test_masks_that_say_nothing_or_everything(good: list[Row], look: Any) -> None:
    none = [changed(r, mask=[0] * len(r.mask)) for r in good]
    assert look(none)["nothing_to_learn"].severity == checks.ERROR
    assert look([*good, none[0]])["nothing_to_learn"].severity == checks.WARNING
    everything = [changed(r, mask=[1] * len(r.mask)) for r in good]
    assert look(everything)["all_learned"].severity == checks.ERROR
    assert "all_learned" not in look(everything, loss_on="all")


def test_completions_that_learn_their_prompts(good: list[Row], look: Any) -> None:
    """Behind an empty prompt everything is the base's; no chat template has a say in text."""
    eos = good[0].ids[-1]
    for prompt, mask, named in (("", [0, 1, 1, 1], False), ("a", [0, 1, 1, 1], True), ("a", [0, 0, 1, 1], False)):
        said = json.dumps({"prompt": prompt, "completion": "b"})
        found = look([Row(str(i), [1, 50 + i, 60, eos], mask, said=said) for i in range(20)])
        assert set(found) == {"few"} | ({"all_learned"} if named else set())


def test_text_among_chats_is_no_foreign_chat(good: list[Row], look: Any) -> None:
    said = json.dumps({"prompt": "a", "completion": "b"})
    text = Row("t", [1, 50, 60, good[0].ids[-1]], [0, 0, 1, 1], said=said)
    assert set(look([*good, *[text] * 10])) == {"few"}


def test_token_rows_are_held_to_the_template(good: list[Row], look: Any) -> None:
    """Their words are unknown: a mask off by one is found all the same."""
    tokens = [changed(r, said="{}") for r in good]
    assert set(look(tokens)) == {"few"}
    assert "mask_begins_late" in look([shifted(r, 1, 0) for r in tokens])


def test_the_choice_to_think(tokenizer: Any) -> None:
    thinks = copy.deepcopy(tokenizer)
    thinks.chat_template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
    unsaid, on, off = (ChatConfig(thinking=t) for t in (None, True, False))
    assert [f.severity for f in checks.thinking_choice(thinks, unsaid)] == [checks.ERROR]
    assert not [f for t, c in ((thinks, on), (tokenizer, unsaid), (None, unsaid)) for f in checks.thinking_choice(t, c)]
    (found,) = checks.other_thinking(True, thinks, off)
    assert (found.name, found.severity, found.value) == ("other_thinking", checks.WARNING, True)
    assert "made with data.chat.thinking=true, and now it is false" in found.what
    for made, config in ((None, off), (True, unsaid), (False, off)):
        assert not list(checks.other_thinking(made, thinks, config))
    assert not list(checks.other_thinking(True, tokenizer, off))


def test_refusals_say_of_how_many() -> None:
    firsts = {"json": RowError("f:1", "json", "bad"), "mask": RowError("f:2", "mask", "bad")}
    found = list(checks.refusals({"json": 1, "mask": 167}, 500, "the 500 looked at", "skip", firsts))
    assert [f.what.partition(",")[0] for f in found] == [
        "167 of the 500 looked at do not fit",
        "1 of the 500 looked at does not fit",
    ]
    assert {f.severity for f in found} == {checks.WARNING}
    assert {f.severity for f in checks.refusals({"json": 3}, 3, "3 rows", "skip", firsts)} == {checks.ERROR}


def test_long_rows(good: list[Row], look: Any) -> None:
    assert look(good, length=50)["too_long"].severity == checks.WARNING
    assert look(good, length=50, long_rows="error")["too_long"].severity == checks.ERROR


def test_answers_of_both_kinds(good: list[Row], look: Any, tokenizer: Any) -> None:
    def thinking(messages: list[dict[str, Any]]) -> Row:
        thought = [*messages[:-1], {"role": "assistant", "content": "<think>well</think>" + messages[-1]["content"]}]
        done = encode(tokenizer, thought, "here", eos_ids={tokenizer.eos_token_id})
        return Row("t", done.ids, done.mask, said=json.dumps({"messages": thought}))

    some = [thinking(c) for c in CHATS[40:44]]
    assert look([*good, *some])["mixed_thinking"].value == 4
    assert "mixed_thinking" not in look([thinking([c[0], c[1]]) for c in CHATS[40:60]])


def test_loops(good: list[Row], look: Any) -> None:
    ids = [1, 5, 6, *[70, 71, 72] * 20, good[0].ids[-1]]
    loop = Row("l", ids, [0, 0, 0] + [1] * (len(ids) - 3))
    assert look([*good, *[loop] * 8])["looping"].value == 8


def test_typed_control_tokens(good: list[Row], look: Any) -> None:
    typed = changed(good[0], said=json.dumps({"messages": [{"role": "user", "content": "what is <|end|>?"}]}))
    assert look([*good, typed])["typed_control"].severity == checks.NOTE
    found = look([*good, typed], chat=ChatConfig(control_tokens=True))
    assert found["typed_control"].severity == checks.WARNING


def test_rows_of_another_template(good: list[Row], look: Any) -> None:
    assert "foreign_template" in look([changed(r, ids=[300 + i % 7 for i in range(len(r.ids))]) for r in good])


def test_repeats_overlap_and_strangers_words() -> None:
    assert not list(checks.repeats(range(100)))
    assert [f.value for f in checks.repeats([1] * 3 + list(range(2, 90)))] == [2]
    measured = Rows.of([Row("a", [1], [1], asked="x"), Row("b", [1], [1], asked="")])
    assert [f.name for f in checks.overlap({"x", "y"}, measured)] == ["overlap"]
    assert not list(checks.overlap({"y", ""}, measured))
    own = {"nll": 0.3, "entropy": 0.3, "agreement": 0.9, "expected": 0.9, "tokens": 9}
    assert not list(checks.off_policy(own))
    assert [f.name for f in checks.off_policy({**own, "nll": 0.7})] == ["off_policy"]


def test_distinct() -> None:
    assert checks.distinct([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(4 / 5)
    assert checks.distinct([1, 2]) == 0.0
