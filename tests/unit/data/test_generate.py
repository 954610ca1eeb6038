"""Self-distillation with a generator that we play ourselves, and with a real base."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import Conversation, GenerationConfig, Setting, answer_batch, answer_shard
from draftsmith.data.journal import Shard, keyed
from draftsmith.data.openai_api import ServerConfig
from draftsmith.data.records import Record
from draftsmith.data.rows import Row
from draftsmith.errors import ConfigError, RowError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def one_turn(text: str, where: str = "p:1") -> Record:
    return Record(where, messages=(said("user", text),), source="mine")


THREE = (
    said("system", "a mat"),
    said("user", "the cat"),
    said("assistant", "THROWN AWAY"),
    said("user", "sat"),
    said("assistant", "THROWN AWAY"),
    said("user", "on"),
)
TOOL = {"function": {"name": "look"}}


class Scripted:
    """Answers from a list, call by call, prompt by prompt; remembers what it was asked."""

    def __init__(self, *calls: list[list[int]]) -> None:
        self.calls, self.asked, self.settings = list(calls), [], []

    def __call__(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        self.asked.append(copy.deepcopy(prompts))
        self.settings.append(settings)
        return self.calls.pop(0)


@pytest.fixture
def ids(tokenizer: Any) -> Any:
    """Text and special tokens to ids."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def spelt(tokenizer: Any) -> Any:
    """Ids of a text letter by letter, which is not how the tokenizer would cut it, and the end token."""

    def spell(text: str) -> list[int]:
        letters = [i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
        assert letters != tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(letters) == text
        return [*letters, tokenizer.eos_token_id]

    return spell


class Told:
    """What came of some records: rows by record, why others were refused, and what the generator was asked."""

    def __init__(self, records: Sequence[Record], setting: Setting, generate: Any) -> None:
        self.made = [Conversation(key, record, setting) for key, record in keyed(records)]
        self.refused = answer_batch(self.made, generate)
        self.rows: list[list[Row]] = [[] if c.key in self.refused else c.rows() for c in self.made]


@pytest.fixture
def told(tokenizer: Any) -> Any:
    def of(records: Sequence[Record], generate: Any, room: int = 300, template: str = "", **settings: Any) -> Told:
        mine = copy.deepcopy(tokenizer) if template else tokenizer
        mine.chat_template = template or mine.chat_template
        generation = GenerationConfig(**{"max_new_tokens": 30, **settings})
        return Told(records, Setting(mine, frozenset({mine.eos_token_id}), room, generation), generate)

    return of


def marked(row: Row) -> list[int]:
    return [i for i, m in zip(row.ids, row.mask, strict=True) if m]


def test_single_turn(told: Any, ids: Any, spelt: Any) -> None:
    """The generator's ids as they are, though the tokenizer would cut their text otherwise."""
    answer = spelt("the cat sat")
    generate = Scripted([answer])
    found = told([one_turn("a dog")], generate, temperature=0.5, top_p=0.9, batch_size=7, seed=3)
    [[row]] = found.rows
    before = ids("<s><|user|>a dog<|end|><|assistant|>")
    assert generate.asked == [[before]]
    assert row.ids == before + answer
    assert row.mask == [0] * len(before) + [1] * len(answer)
    key = found.made[0].key
    assert (row.id, row.source, row.part, row.asked) == (key, "p:1", "mine", one_turn("a dog").asked)
    assert (row.seed, row.finish) == (found.made[0].seed, "stop")
    assert json.loads(row.said) == {"messages": [said("user", "a dog"), said("assistant", "the cat sat")]}
    settings = {"max_new_tokens": 30, "temperature": 0.5, "top_p": 0.9, "seeds": [row.seed], "batch_size": 7}
    assert generate.settings == [settings]


def test_plain_text(told: Any, ids: Any, tokenizer: Any) -> None:
    [[row]] = told([Record("p:1", prompt="the mat")], Scripted([ids("sat on the")]), max_new_tokens=99).rows
    assert row.ids == [*ids("the mat"), *ids("sat on the")]
    assert marked(row) == ids("sat on the")
    assert json.loads(row.said) == {"prompt": "the mat", "completion": "sat on the"}
    assert row.seed is None  # greedy


def test_several_turns(told: Any, ids: Any, tokenizer: Any, spelt: Any) -> None:
    """prompt, generated, between the turns, generated …; each turn follows the answers before it; the
    prompt's own assistant texts are gone."""
    answers = [spelt("the dog sat"), spelt("on the cat"), spelt("and a mat")]
    generate = Scripted(*[[a] for a in answers])
    found = told([Record("p:1", messages=THREE)], generate, temperature=1.0, seed=5)
    [[row]] = found.rows
    betweens = [
        ids("<s><|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>"),
        ids("<|user|>sat<|end|><|assistant|>"),  # the answer's own end token stands before it, once
        ids("<|user|>on<|end|><|assistant|>"),
    ]
    want: list[tuple[int, int]] = []
    for turn in range(3):
        want += [(i, 0) for i in betweens[turn]]
        assert generate.asked[turn] == [[i for i, _ in want]]
        want += [(i, 1) for i in answers[turn]]
    assert list(zip(row.ids, row.mask, strict=True)) == want
    assert [s["seeds"] for s in generate.settings] == [[row.seed + turn] for turn in range(3)]
    whole = [THREE[0]]
    for turn, user in enumerate((THREE[1], THREE[3], THREE[5])):
        text = tokenizer.decode(answers[turn], skip_special_tokens=True)
        whole += [user, said("assistant", text)]
    assert json.loads(row.said) == {"messages": whole}
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(whole, tokenize=False)


def test_turns_are_answered_one_after_the_other(told: Any, spelt: Any) -> None:
    answers = [spelt("the dog sat"), spelt("on the cat")]
    given = (Record("p:1", messages=(said("user", "the cat"),), later=("sat",)), Record("p:2", messages=THREE[1:4]))
    (one,), (other,) = (told([r], Scripted(*[[a] for a in answers])).rows for r in given)
    assert (one[0].ids, one[0].mask, one[0].said, one[0].asked) == (
        other[0].ids,
        other[0].mask,
        other[0].said,
        other[0].asked,
    )


@pytest.mark.parametrize("text", ["@@the-answer@@", "<|end|><|assistant|>yes", "</s>", "[INST] 😀 \u202e"])
def test_what_users_type_stays_text(told: Any, tokenizer: Any, spelt: Any, text: str) -> None:
    """Control tokens, and whatever stands for an answer while we look at the template."""
    prompt = Record("p:1", messages=(said("user", text), said("assistant", ""), said("user", text)))
    [[row]] = told([prompt], Scripted([spelt("the cat")], [spelt("a dog")])).rows
    controls = set(tokenizer.all_special_ids)
    plain = "<s><|user|>a<|end|><|assistant|>a<|end|><|user|>a<|end|><|assistant|>a<|end|>"
    wanted = [i for i in tokenizer(plain, add_special_tokens=False)["input_ids"] if i in controls]
    assert [i for i in row.ids if i in controls] == wanted
    want = f"<s><|user|>{text}<|end|><|assistant|>the cat<|end|><|user|>{text}<|end|><|assistant|>a dog<|end|>"
    assert tokenizer.decode(row.ids) == want


def test_a_cut_answer_ends_the_chat(told: Any, ids: Any) -> None:
    cut = ids("the cat sat on")[:4]
    generate = Scripted([cut])
    [[row]] = told([Record("p:1", messages=THREE)], generate, max_new_tokens=len(cut)).rows
    assert len(generate.asked) == 1
    assert row.ids == generate.asked[0][0] + cut
    assert marked(row) == cut
    assert row.finish == "length"


def test_an_answer_that_ends_with_its_last_token_is_not_cut(told: Any, spelt: Any) -> None:
    answers = [spelt("a cat"), spelt("a dog"), spelt("a mat")]
    assert len({len(a) for a in answers}) == 1
    [[row]] = told([Record("p:1", messages=THREE)], Scripted(*[[a] for a in answers]), max_new_tokens=6).rows
    assert len(answers[0]) == 6
    assert (row.finish, marked(row)) == ("stop", [i for answer in answers for i in answer])


def test_cut_answers_in_quarantine(told: Any, ids: Any, spelt: Any) -> None:
    """The first one refuses the prompt; a later one ends the chat with what is whole."""
    cut, records = ids("the cat sat on the mat")[:6], [one_turn("a"), Record("p:2", messages=THREE)]
    generate = Scripted([cut, spelt("a cat")], [cut])
    found = told(records, generate, max_new_tokens=6, cut="quarantine")
    assert [e.reason for e in found.refused.values()] == ["cut"]
    assert str(found.refused[found.made[0].key]).startswith("p:1: ")
    [row] = found.rows[1]
    assert (marked(row), row.finish) == (spelt("a cat"), "stop")
    assert [m["role"] for m in json.loads(row.said)["messages"]] == ["system", "user", "assistant"]
    assert row.ids == generate.asked[0][1] + spelt("a cat")


@pytest.mark.parametrize("empty", ["nothing", "end", "blank"])
def test_empty_answers(told: Any, tokenizer: Any, ids: Any, spelt: Any, empty: str) -> None:
    """As the first: the prompt is refused; later: the chat ends before it."""
    answer = {"nothing": [], "end": [tokenizer.eos_token_id], "blank": [*ids(" \n"), tokenizer.eos_token_id]}[empty]
    records = [one_turn("a"), Record("p:2", messages=THREE)]
    found = told(records, Scripted([answer, spelt("the cat")], [answer]))
    assert {k: e.reason for k, e in found.refused.items()} == {found.made[0].key: "empty_answer"}
    [row] = found.rows[1]
    assert marked(row) == spelt("the cat")
    assert row.ids[-1] == tokenizer.eos_token_id


def test_chats_of_different_lengths(told: Any, ids: Any, spelt: Any) -> None:
    """Later turns ask only for the chats still open."""
    records = [
        Record("p:1", messages=THREE),
        one_turn("a dog", "p:2"),
        Record("p:3", messages=(said("user", "the"), said("assistant", "x"), said("user", "mat"))),
        Record("p:4", prompt="and"),
    ]
    answers = [
        [spelt("the cat"), spelt("a cat"), spelt("cat a"), ids("the mat")],
        [spelt("the mat"), spelt("a mat")],
        [spelt("the dog")],
    ]
    generate = Scripted(*answers)
    found = told(records, generate)
    assert [len(call) for call in generate.asked] == [4, 2, 1]
    assert [marked(row) for [row] in found.rows] == [
        answers[0][0] + answers[1][0] + answers[2][0],
        answers[0][1],
        answers[0][2] + answers[1][1],
        answers[0][3],
    ]
    assert len({s for call in generate.settings for s in call["seeds"]}) == 7


def test_a_first_turn_without_room_is_refused(told: Any) -> None:
    found = told([one_turn("the cat", "p:9")], Scripted(), room=31)
    (why,) = found.refused.values()
    assert why.reason == "too_long"
    assert str(why).startswith("p:9: a prompt of ")
    assert "max_new_tokens=30 do not fit the base's context of 31" in str(why)


def test_a_later_turn_without_room_ends_the_chat(told: Any, ids: Any, spelt: Any) -> None:
    """Never more tokens than the base has positions for."""
    answer = spelt("the cat sat on")
    generate = Scripted([answer])
    first = ids("<s><|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>")
    [[row]] = told([Record("p:1", messages=THREE)], generate, room=len(first) + 20, max_new_tokens=20).rows
    assert len(generate.asked) == 1
    assert row.ids == first + answer  # not the question that found no room
    assert row.mask == [0] * len(first) + [1] * len(answer)
    assert [m["role"] for m in json.loads(row.said)["messages"]] == ["system", "user", "assistant"]


def test_the_room_is_used_to_the_last_token(told: Any, ids: Any) -> None:
    prompt, answer = ids("<s><|user|>the cat<|end|><|assistant|>"), ids("the cat sat on the")[:5]
    [[row]] = told([one_turn("the cat")], Scripted([answer]), room=len(prompt) + 5, max_new_tokens=5).rows
    assert len(row.ids) == len(prompt) + 5


REWRITES = (  # keeps only the last answer's thoughts, as reasoning models' templates do
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'].split('!')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(told: Any, tokenizer: Any, ids: Any, spelt: Any) -> None:
    """Every turn is a row of its own, as a server would see it."""
    answers = [spelt("a dog!the cat"), spelt("on the cat"), spelt("mat!and a mat")]
    generate = Scripted(*[[a] for a in answers])
    found = told([Record("p:1", messages=THREE)], generate, template=REWRITES, temperature=1.0)
    [rows] = found.rows
    first = ids("<|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>")
    second = ids(
        "<|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>the cat<|end|><|user|>sat<|end|><|assistant|>"
    )
    assert [r.ids for r in rows] == [
        first + answers[0],
        second + answers[1] + ids("<|user|>on<|end|><|assistant|>") + answers[2],
    ]
    assert [marked(r) for r in rows] == [answers[0], answers[1] + answers[2]]
    assert [r.id for r in rows] == [found.made[0].key, f"{found.made[0].key}/1"]
    assert len({(r.asked, r.source, r.seed) for r in rows}) == 1
    assert [len(json.loads(r.said)["messages"]) for r in rows] == [3, 7]


def test_a_template_that_hides_earlier_answers(told: Any, spelt: Any) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    answers = [spelt("the cat"), spelt("a cat"), spelt("cat a")]
    [rows] = told([Record("p:1", messages=THREE)], Scripted(*[[a] for a in answers]), template=template).rows
    assert [marked(r) for r in rows] == answers


def test_a_template_that_refuses_the_chat(told: Any) -> None:
    found = told([one_turn("x")], Scripted(), template="{{ raise_exception('no') }}")
    (why,) = found.refused.values()
    assert (why.reason, why.where) == ("template", "p:1")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("p:1", messages=(said("system", "x"),)), "no_prompt"),
        (Record("p:1", text="plain"), "no_prompt"),
        (Record("p:1", ids=(1,), mask=(1,)), "no_prompt"),
        (Record("p:1", messages=(said("user", "x"), {**said("assistant", ""), "tool_calls": [TOOL]})), "tools"),
        (Record("p:1", messages=(said("user", "x"), said("tool", "y"))), "tools"),
        (Record("p:1", messages=(said("user", "x"),), tools=(TOOL,)), "tools"),
    ],
)
def test_what_cannot_be_asked(tokenizer: Any, record: Record, reason: str) -> None:
    with pytest.raises(RowError, match="p:1: ") as caught:
        Conversation("k", record, Setting(tokenizer, frozenset(), 300, GenerationConfig()))
    assert caught.value.reason == reason


def test_asking_twice_is_asking_once(tokenizer: Any, spelt: Any) -> None:
    setting = Setting(tokenizer, frozenset({tokenizer.eos_token_id}), 300, GenerationConfig(max_new_tokens=9))
    c = Conversation("k", Record("p:1", messages=THREE[:4]), setting)
    assert c.ask() == c.ask()
    assert c.messages == list(THREE[:2])
    c.answer(spelt("a cat"), cut=False)
    assert c.ask() == c.ask()
    assert c.messages == [*THREE[:2], said("assistant", "a cat"), THREE[3]]
    c.give_up(RowError("p:1", "server", "gone"))
    assert c.ask() is None
    assert [marked(r) for r in c.rows()] == [spelt("a cat")]


def test_a_generator_that_loses_an_answer_is_noticed(told: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        told([one_turn("a"), one_turn("b")], Scripted([[9]]))


def test_seeds_belong_to_prompts(tokenizer: Any) -> None:
    """Equal prompts, other seeds; another job's seed, others again; neighbours do not matter."""

    def seeds(records: list[Record], seed: int) -> list[int]:
        setting = Setting(tokenizer, frozenset(), 300, GenerationConfig(seed=seed), ChatConfig())
        return [Conversation(key, r, setting).turn_seed for key, r in keyed(records)]

    a, b = one_turn("a"), one_turn("b")
    first = seeds([a, a, b], 0)
    assert len(set(first)) == 3
    assert seeds([b, a, a], 0) == [first[2], *first[:2]]
    assert not set(first) & set(seeds([a, a, b], 1))


# --- a shard, answered by a real base

ASKED = [
    *(one_turn(text, f"p:{n}") for n, text in enumerate(("the cat", "a", "a dog and a cat sat on the mat", "mat"))),
    Record("p:4", messages=THREE),
    Record("p:5", messages=(said("user", "x"), said("tool", "y"))),  # refused at once
    Record("p:6", prompt="the"),
    one_turn("a", "p:7"),
    one_turn("q" * 200, "p:8"),  # too long
]


def opened(out: Path) -> Shard:
    out.mkdir(exist_ok=True)
    return Shard(out, 0, keyed(ASKED)).open()


@pytest.fixture
def shard(tmp_path: Path, tokenizer: Any, tiny_base: Any) -> Any:
    """shard(name, …) answers ASKED in a folder of that name and returns the published file."""
    base = tiny_base("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)

    def of(name: str, start: Shard | None = None, generate: Any = base.answer, **settings: Any) -> Path:
        generation = GenerationConfig(**{"max_new_tokens": 8, "batch_size": 3, **settings})
        made = start or opened(tmp_path / name)
        answered: list[int] = []
        setting = Setting(tokenizer, base.eos_ids, base.spec.max_positions, generation)
        answer_shard(made, setting, generate, answered.append)
        assert sum(answered) == len(ASKED) - 2
        return made.path

    of.base = base  # type: ignore[attr-defined]
    return of


def lines(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_a_shard(shard: Any, tmp_path: Path) -> None:
    """Rows in the order of what was asked, each answered as if alone; what cannot be is written down."""
    rows = lines(shard("a"))
    assert [r["source"] for r in rows] == ["p:0", "p:1", "p:2", "p:3", "p:4", "p:6", "p:7"]
    refused = [json.loads(x) for x in (tmp_path / "a/refused/00000.jsonl").read_text().splitlines()]
    assert [(r["where"], r["reason"]) for r in refused] == [("p:5", "tools"), ("p:8", "too_long")]
    assert rows[1]["ids"] == rows[6]["ids"]
    assert rows[1]["id"] != rows[6]["id"]
    for row in rows:
        begin = row["mask"].index(1)
        answer = [i for i, m in zip(row["ids"], row["mask"], strict=True) if m]
        alone = shard.base.answer([row["ids"][:begin]], max_new_tokens=8)[0]
        assert answer[: len(alone)] == alone
        assert row["seed"] is None


def test_samples_are_the_rows_own(shard: Any) -> None:
    """The recorded seed gives the answer again; batches of any size give the same rows."""
    whole = lines(shard("whole", temperature=1.0, batch_size=16, seed=4))
    for size in (1, 2, 5):
        assert lines(shard(f"by{size}", temperature=1.0, batch_size=size, seed=4)) == whole
    assert len({r["seed"] for r in whole}) == len(whole)
    assert whole[1]["ids"] != whole[6]["ids"]  # equal prompts, another sample each
    for row in whole:
        begin = row["mask"].index(1)
        asked = [row["ids"][:begin]]
        alone = shard.base.answer(asked, max_new_tokens=8, temperature=1.0, seeds=[row["seed"]])[0]
        assert row["ids"][begin : begin + len(alone)] == alone
    assert lines(shard("other", temperature=1.0, batch_size=16, seed=5)) != whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("done", [(0,), (1, 4), (2, 3, 6, 7)])
def test_a_resumed_shard_ends_with_the_same_bytes(
    shard: Any, tmp_path: Path, temperature: float, done: tuple[int, ...]
) -> None:
    """Whatever the journal holds: the batches are the shard's, and a batch that is all done is not asked again."""
    whole = shard("whole", temperature=temperature)
    rows = {row["id"]: row for row in lines(whole)}
    calls: list[list[list[int]]] = []

    def listening(prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        calls.append(prompts)
        return shard.base.answer(prompts, **settings)

    shard("listened", temperature=temperature, generate=listening)
    uninterrupted, calls = calls, []
    begun = opened(tmp_path / "resumed")
    for n in done:
        key = begun.items[n][0]
        begun.settle(key, [Row(**rows[key])])
    begun.close()
    again = shard("resumed", opened(tmp_path / "resumed"), listening, temperature=temperature)
    assert again.read_bytes() == whole.read_bytes()
    assert all(call in uninterrupted for call in calls)


def test_a_shard_that_is_all_journaled_asks_nothing(shard: Any, tmp_path: Path) -> None:
    rows = {row["id"]: row for row in lines(shard("whole"))}
    begun = opened(tmp_path / "resumed")
    for key, _ in begun.items:
        if key in rows:
            begun.settle(key, [Row(**rows[key])])
    assert lines(shard("resumed", begun, Scripted())) == list(rows.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"engine": "vllm"}, "engine='vllm'"),
        ({"cut": "drop"}, "cut='drop'"),
        ({"engine": "server"}, "server.urls"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GenerationConfig(**settings)


def test_a_server_with_a_url_is_fine() -> None:
    assert GenerationConfig(engine="server", server=ServerConfig(urls=("http://127.0.0.1:1/v1",))).engine == "server"
