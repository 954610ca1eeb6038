"""What our own encoding makes of good chats is well in every chat template's eyes, and a mask off by one is not."""

import json
import random
from typing import Any

import oracle as o
import pytest

from draftsmith.contracts import BaseSpec
from draftsmith.data import chat, checks, edges
from draftsmith.data.chat import ChatConfig
from draftsmith.data.rows import Row, Rows
from draftsmith.data.settings import DataConfig
from draftsmith.errors import RowError

Messages = list[dict[str, Any]]
SPEC = BaseSpec("llama", 8, 8, 400, 1, 1, 1, 8, 4096)
MARKED = [(f, m) for f in o.FAMILIES for m in (True, False) if m is False or f != "mistral"]
HARMLESS = {"few", "looping", "typed_control"}
SHIFTS = [(-1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (0, 1)]


def encoded(tokenizer: Any, chats: list[tuple[Messages, list[Any]]], config: ChatConfig) -> list[Row]:
    rows, eos = [], {tokenizer.eos_token_id}
    for messages, tools in chats:
        try:
            done = chat.encode(tokenizer, messages, "here", config, tools=tools, eos_ids=eos)
        except RowError:
            continue  # what cannot be encoded is no row
        rows.append(Row(str(len(rows)), done.ids, done.mask, said=json.dumps({"messages": messages})))
    assert len(rows) >= len(chats) / 3
    return rows


def look(tokenizer: Any, rows: list[Row], config: ChatConfig) -> dict[str, checks.Finding]:
    data = DataConfig(path="p", length=4096, chat=config)
    sample = checks.Sample(Rows.of(rows), tokenizer, frozenset({tokenizer.eos_token_id}), SPEC, data)
    return {f.name: f for f in checks.inspect(sample)}


def shifted(row: Row, begin: int, end: int) -> Row:
    """Every learned run begins and ends so many tokens later; the row's last token stays as it is."""
    mask = [0] * (len(row.mask) + 2)
    for b, e in edges.runs(row.mask):
        mask[b + begin : e + end] = [1] * (e + end - b - begin)
    return Row(row.id, row.ids, mask[: len(row.ids)], said=row.said)


def families(rng: random.Random, family: str) -> dict[str, list[tuple[Messages, list[Any]]]]:
    """Chats by kind: with one turn, several, a system message, tools."""
    system = family != "gemma"
    some = [o.conversation(rng, system=False) for _ in range(40)]
    kinds = {
        "single": [(c[:2], []) for c in some],
        "several": [(c, []) for c in some if len(c) > 2],
        "fixtures": [(c, []) for c in o.CHATS.values() if system or c[0]["role"] != "system"],
    }
    if system:
        kinds["system"] = [([{"role": "system", "content": o.words(rng)}, *c], []) for c in some]
    if family in ("mistral", "deepseek", "qwen3"):
        tools = [o.conversation(rng, system=False, thinks=True) for _ in range(40)]
        kinds["tools"] = [(c, o.TOOLS) for c in tools if any(m["role"] == "tool" for m in c)]
        kinds["calls"] = [(o.TOOL_CHAT, []), ([*o.TOOL_CHAT, *o.CHATS["single"]], [])]
    return {**kinds, "mixed": [c for some in kinds.values() for c in some]}


def wrongly_named(tokenizer: Any, rows: list[Row], config: ChatConfig) -> set[str]:
    return {f"{f.severity} {n}: {f.what}" for n, f in look(tokenizer, rows, config).items() if n not in HARMLESS}


def check_shifts(tokenizer: Any, rows: list[Row], config: ChatConfig) -> None:
    closes = edges.marks(tokenizer, frozenset({tokenizer.eos_token_id}), config).closes
    long = [r for r in rows if all(e - b > 2 for b, e in edges.runs(r.mask))]
    for begin, end in SHIFTS:
        due = {-1: "mask_begins_early", 1: "mask_begins_late"}.get(begin)
        if due is None:
            due = {-1: "mask_ends_early", 1: "mask_ends_late"}[end]
            some = [r for r in long if edges.runs(r.mask)[-1][1] + end <= len(r.ids)]  # nothing stands behind others
            if not closes or not some:
                continue
        else:
            some = long
        found = look(tokenizer, [shifted(r, begin, end) for r in some], config)
        assert due in found, (begin, end, sorted(found))
        assert found[due].severity == checks.ERROR


@pytest.mark.parametrize(("family", "marked"), MARKED)
def test_good_chats_are_well(family: str, marked: bool) -> None:
    tokenizer, config = o.tokenizer_of(family, marked), ChatConfig()
    for kind, chats in families(random.Random(family), family).items():
        rows = encoded(tokenizer, chats, config)
        assert not wrongly_named(tokenizer, rows, config), kind
        check_shifts(tokenizer, rows, config)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_good_chats_of_a_template_that_thinks_are_well(thinking: bool, said: bool) -> None:
    """History has no think block, the last answer has one (thinking on) or stands behind an empty one (off). Rows
    that are finished are well even if nobody says which of them it is."""
    tokenizer, made = o.tokenizer_of("qwen3"), ChatConfig(thinking=thinking)
    config = made if said else ChatConfig()
    for kind, chats in families(random.Random(3), "qwen3").items():
        if thinking and kind not in ("fixtures", "calls", "mixed"):
            for m in (m for messages, _ in chats for m in messages if m["role"] == "assistant"):
                m["reasoning_content"] = "hm </think> 🐈"
        if thinking and kind == "mixed":
            continue  # of thoughts and none
        rows = encoded(tokenizer, chats, made)
        assert not wrongly_named(tokenizer, rows, config), kind
        check_shifts(tokenizer, rows, config)


@pytest.mark.parametrize("family", o.FAMILIES)
def test_learned_prompts_are_named(family: str) -> None:
    """However short the prompts; and not for answers that are hundreds of times as long."""
    tokenizer, config = o.tokenizer_of(family, False), ChatConfig()
    long = [o.turns(("user", "a"), ("assistant", f"{i} the cat sat on the mat b" * 150)) for i in range(20)]
    rows = encoded(tokenizer, [(c, []) for c in long], config)
    assert sum(map(sum, (r.mask for r in rows))) > 0.98 * sum(len(r.ids) for r in rows)
    assert not wrongly_named(tokenizer, rows, config)
    for first in (0, 1):
        everything = [Row(r.id, r.ids, [0] * first + [1] * (len(r.ids) - first), said=r.said) for r in rows]
        assert look(tokenizer, everything, config)["all_learned"].severity == checks.ERROR
    found = look(tokenizer, [*rows, *everything[:2]], config)  # a tenth of the rows is enough
    assert found["all_learned"].value == 2


@pytest.mark.parametrize("family", ["mistral", "deepseek", "chatml", "llama3"])
def test_two_turns_in_one_mask_are_named(family: str) -> None:
    tokenizer, config = o.tokenizer_of(family, False), ChatConfig()
    rows = encoded(tokenizer, [(o.CHATS["equal"], [])] * 4, config)
    joined = []
    for r in rows:
        spans = edges.runs(r.mask)
        mask = [0] * len(r.ids)
        mask[spans[0][0] : spans[1][1]] = [1] * (spans[1][1] - spans[0][0])
        joined.append(Row(r.id, r.ids, mask, said=r.said))
    found = look(tokenizer, joined, config)
    assert "control_in_answer" in found
    assert "all_learned" not in found


def test_marks() -> None:
    """The openings of a template that thinks, and what of its control tokens a turn may hold."""

    def ids(*names: str) -> set[int]:
        return {tokenizer.convert_tokens_to_ids(n) for n in names}

    tokenizer = o.tokenizer_of("qwen3")
    eos = frozenset({tokenizer.eos_token_id})
    told = {t: edges.marks(tokenizer, eos, ChatConfig(thinking=t)) for t in (True, False, None)}
    texts = {t: {tokenizer.decode(list(i)) for i in m.openings} for t, m in told.items()}
    assert texts[True] == {"<|im_start|>assistant\n"}
    assert texts[False] == texts[None] == {"<|im_start|>assistant\n", "</think>\n\n"}
    assert told[None].turn == ids("<s>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>")
    tokenizer = o.tokenizer_of("mistral")
    eos = frozenset({tokenizer.eos_token_id})
    mistral = edges.marks(tokenizer, eos, ChatConfig())
    assert {tokenizer.decode(list(i)) for i in mistral.openings} == {"[/INST]", "[/TOOL_RESULTS]"}
    assert ids("[INST]", "</s>") <= mistral.turn
    assert not mistral.turn & ids("[TOOL_CALLS]")
    bare = edges.marks(o.with_template(tokenizer, None), eos, ChatConfig())
    assert (bare.openings, bare.turn) == (frozenset(), ids("<s>", "</s>"))
