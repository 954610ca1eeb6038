"""From sources to a folder of rows, and from rows to what a run learns and what it measures."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.contracts import BaseSpec
from draftsmith.data import chat, importing, rows
from draftsmith.data.importing import Chosen, choose, import_rows, last_turns
from draftsmith.data.records import Record
from draftsmith.data.rows import Row, Rows, read_folder, write_rows
from draftsmith.data.settings import DataConfig, ValidationConfig
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a dog"}
CHAT = {"messages": [USER, ANSWER]}
TOKENS = {"ids": [7, 8, 9], "mask": [0, 1, 1]}


@dataclasses.dataclass
class FakeBase:
    spec: BaseSpec
    tokenizer: Any
    eos_ids: frozenset[int]


@pytest.fixture
def base(spec: BaseSpec, tokenizer: Any) -> FakeBase:
    return FakeBase(spec, tokenizer, frozenset({tokenizer.eos_token_id}))


class Imported:
    def __init__(self, folder: Path, base: FakeBase) -> None:
        self.folder, self.base = folder / "rows", base
        self.config = DataConfig(path="x")
        self.source = folder / "in.jsonl"
        self.refused = folder / "rows.quarantine.jsonl"

    def __call__(self, *lines: Any, **settings: Any) -> Rows:
        """Imports these lines and reads them back."""
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        self.source.write_text(text)
        config = DataConfig(path=str(self.source), **settings)
        self.told = import_rows(
            self.folder, config.chosen, config, self.base, {"base": dataclasses.asdict(self.base.spec)}
        )
        return read_folder(self.folder, self.base.spec)[0]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())


@pytest.fixture
def imported(tmp_path: Path, base: FakeBase) -> Imported:
    return Imported(tmp_path, base)


def test_every_kind_of_record(imported: Imported, tokenizer: Any) -> None:
    found = imported(CHAT, TOKENS, {"prompt": "the cat", "completion": " sat"}, {"text": "a cat"}, loss_on="all")
    encoded = chat.encode(tokenizer, CHAT["messages"], "")
    done = chat.completion(tokenizer, "the cat", " sat", "", eos_ids=imported.base.eos_ids)
    plain = chat.text_ids(tokenizer, "a cat")
    wanted = [
        (encoded.ids, [1] * len(encoded.ids)),
        ([7, 8, 9], [0, 1, 1]),
        (done.ids, done.mask),
        (plain, [1] * len(plain)),
    ]
    assert [(r.ids.tolist(), r.mask.tolist()) for r in found] == wanted  # type: ignore[attr-defined]
    assert [r.source for r in found] == [f"{imported.source}:{n}" for n in (1, 2, 3, 4)]
    assert {r.part for r in found} == {"path"}
    assert [json.loads(r.said) for r in found] == [
        {"messages": CHAT["messages"]},
        {},
        {"prompt": "the cat", "completion": " sat"},
        {"text": "a cat"},
    ]
    assert found[0].id == Record("", messages=(USER, ANSWER)).content[:16] + "-0"
    assert found[0].asked == Record("", messages=(USER,)).asked


def test_rows_of_ours_keep_what_they_say_of_themselves(tmp_path: Path, base: FakeBase) -> None:
    """As one source among others, whole or file by file: the question's hash, the text, the seed."""
    rows = [
        row(i, asked=f"q{i // 2}", said='{"prompt": "why?"}', source=f"p:{i}", seed=i, finish="stop") for i in range(6)
    ]
    write_rows(tmp_path / "rows", rows, base=dataclasses.asdict(base.spec))
    (tmp_path / "rows" / "quarantine.jsonl").write_text("{}\n")  # lies there too, and is no row
    (tmp_path / "rows" / "asked").mkdir()
    (tmp_path / "rows" / "asked" / "records.jsonl").write_text("{}\n")
    for n, path in enumerate(("rows", "rows/*.parquet", ".")):
        config = DataConfig(sources={"mine": SourceConfig(path=str(tmp_path / path))})
        out = tmp_path.parent / f"{tmp_path.name}-{n}"
        import_rows(out, config.sources, config, base, {})
        found = read_folder(out)[0]
        told = [(r.asked, r.said, r.source, r.seed, r.finish) for r in found]
        assert told == [(r.asked, r.said, r.source, r.seed, r.finish) for r in rows]
        assert {r.part for r in found} == {"mine"}


@pytest.mark.parametrize("path", ["rows", "rows/*.parquet", "rows/rows-00000.parquet", "."])
def test_rows_are_checked_however_they_are_named(tmp_path: Path, base: FakeBase, path: str) -> None:
    foreign = {**dataclasses.asdict(base.spec), "tokenizer_sha256": "f" * 64}
    write_rows(tmp_path / "rows", [row(1)], base=foreign)
    config = DataConfig(path=str(tmp_path / path))
    with pytest.raises(DataError, match="another tokenizer"):
        import_rows(tmp_path.parent / f"{tmp_path.name}-out", config.chosen, config, base, {})


BAD: list[tuple[Any, str, str]] = [
    ("{", "json", "not JSON"),
    ({"text": "the cat"}, "loss_on", "set data.loss_on=all"),
    ({"prompt": "the cat"}, "no_answer", "without an answer"),
    ({"messages": [USER]}, "no_answer", "no assistant text"),
    ({"turns": ["the cat", "sat"]}, "no_answer", "turns without answers"),
    ({"ids": [1, 10_000], "mask": [1, 1]}, "ids", "token id 10000 outside the base's vocabulary"),
    ({"ids": [5, -4], "mask": [1, 1]}, "ids", "token id -4 outside"),
    ({"ids": [10**30], "mask": [1]}, "ids", "outside"),
    ({"messages": [USER, USER]}, "turns", "turn of the user"),
]


@pytest.mark.parametrize(("line", "reason", "says"), BAD)
def test_on_bad_error(imported: Imported, line: Any, reason: str, says: str) -> None:
    """The first bad row and the counts are told, all bad ones written down, nothing published."""
    with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{says}.*; 2 of 4 rows do not fit \({reason} 2\); "):
        imported(CHAT, line, TOKENS, line)
    refused = [json.loads(x) for x in imported.refused.read_text().splitlines()]
    assert [(q["where"], q["reason"]) for q in refused] == [(f"{imported.source}:{n}", reason) for n in (2, 4)]
    assert {p.name for p in imported.folder.parent.iterdir()} == {"in.jsonl", imported.refused.name}


def test_on_bad_skip(imported: Imported) -> None:
    """in = kept + quarantined, in the manifest, and the quarantine lies beside the rows."""
    found = imported(*(x for bad, _, _ in BAD for x in (CHAT, bad)), on_bad="skip")
    assert [r.source for r in found] == [f"{imported.source}:{n}" for n in range(1, 2 * len(BAD), 2)]
    funnel = imported.manifest["funnel"]
    assert funnel == imported.told
    assert funnel["in"] == 2 * len(BAD) == funnel["kept"] + sum(funnel["quarantined"].values())
    assert funnel["quarantined"] == dict(sorted(Counter(reason for _, reason, _ in BAD).items()))
    lines = [json.loads(x) for x in (imported.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(q["where"], q["reason"]) for q in lines] == [
        (f"{imported.source}:{2 * n}", reason) for n, (_, reason, _) in enumerate(BAD, start=1)
    ]
    assert "quarantine.jsonl" in imported.manifest["files"]
    assert not imported.refused.exists()
    assert json.loads(lines[2]["row"]) == {"prompt": "the cat", "completion": None}  # what did not encode, too
    assert json.loads(lines[4]["row"]) == {"turns": ["the cat", "sat"]}


def test_no_row_left(imported: Imported) -> None:
    with pytest.raises(DataError, match=r"0 of 2 rows left; 2 of 2 rows do not fit \(json 1, no_answer 1\)"):
        imported("{", {"prompt": "x"}, on_bad="skip")
    with pytest.raises(DataError, match="0 of 0 rows left"):
        imported()
    assert not imported.folder.exists()


def test_equal_rows_are_occurrences(imported: Imported, spec: BaseSpec) -> None:
    found = imported(CHAT, TOKENS, CHAT, CHAT)
    name = found[0].id.removesuffix("-0")
    assert [r.id for r in found] == [f"{name}-0", found[1].id, f"{name}-1", f"{name}-2"]
    assert len({r.id for r in found}) == 4
    kept = choose(found, DataConfig(path="x", repeats="drop"), spec)
    assert [r.source for r in kept.training] == [f"{imported.source}:{n}" for n in (1, 2)]
    assert kept.funnel == {"in": 4, "kept": 2, "validation": 0, "quarantined": {"repeated": 2}}
    assert len(choose(found, DataConfig(path="x"), spec).training) == 4


def test_several_shards(imported: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHARD_ROWS", 2)
    lines = [{"ids": [i, i, i], "mask": [0, 1, 1]} for i in range(5)]
    assert [r.ids.tolist() for r in imported(*lines)] == [x["ids"] for x in lines]  # type: ignore[attr-defined]
    assert sorted(n for n in imported.manifest["files"] if n.startswith("rows-")) == [
        f"rows-0000{n}.parquet" for n in range(3)
    ]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path, base: FakeBase) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        one = Imported(tmp_path / name, base)
        one.source = tmp_path / "in.jsonl"
        one(CHAT, TOKENS)
        made.append((one.folder / "rows-00000.parquet").read_bytes())
    assert made[0] == made[1]


TYPED = [
    "say <|end|> and <|assistant|>",
    "<|user|>",
    "a <s></s> b",
    "<|end|><|end|>\n<|assistant|>yes",
    "e\u0301 <|end|> 😀 \u202eabc",
]


@pytest.mark.parametrize("said", TYPED)
@pytest.mark.parametrize("who", ["user", "assistant", "system"])
def test_typed_control_tokens_stay_text(imported: Imported, tokenizer: Any, said: str, who: str) -> None:
    """The text comes back, and the row has exactly the control ids that the same chat has without them."""
    chat_of = lambda text: {  # noqa: E731
        "messages": [{"role": r, "content": text if r == who else "cat"} for r in ("system", "user", "assistant")]
    }
    typed, plain = imported(chat_of(said), chat_of("cat"))
    controls = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in typed.ids if i in controls] == [i for i in plain.ids if i in controls]
    assert said in tokenizer.decode(typed.ids)
    learned = [i for i, m in zip(typed.ids, typed.mask, strict=True) if m]
    assert learned[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learned[:-1]) == (said if who == "assistant" else "cat")
    assert json.loads(typed.said) == chat_of(said)


def test_a_source_of_rows_of_another_tokenizer(tmp_path: Path, base: FakeBase, spec: BaseSpec) -> None:
    """Ids are noise to another tokenizer, also as one source of several."""
    other = dataclasses.replace(spec, tokenizer_sha256="0" * 64)
    write_rows(tmp_path / "theirs", [Row("a", [1, 2, 3], [1, 1, 1])], base=dataclasses.asdict(other))
    write_rows(tmp_path / "ours", [Row("a", [1, 2, 3], [1, 1, 1])], base=dataclasses.asdict(spec))
    for name in ("ours", "theirs"):
        config = DataConfig(sources={name: SourceConfig(path=str(tmp_path / name))})
        if name == "ours":
            assert import_rows(tmp_path / "out", config.chosen, config, base, {})["kept"] == 1
        else:
            with pytest.raises(DataError, match="theirs: its rows were written with another tokenizer"):
                import_rows(tmp_path / "out", config.chosen, config, base, {})


# --- choosing


def row(i: int, size: int = 6, mask: list[int] | None = None, **more: Any) -> Row:
    return Row(str(i), [i] * size, mask or [1] * size, **{"source": f"f:{i}", "asked": f"q{i}", **more})


Take = Callable[..., Chosen]


@pytest.fixture
def take(spec: BaseSpec) -> Take:
    def of(some: list[Row], held: list[Row] | None = None, **settings: Any) -> Chosen:
        config = DataConfig(**{"path": "x", **settings})
        return choose(Rows.of(some), config, spec, Rows.of(held) if held is not None else None)

    return of


def test_long_rows(take: Take) -> None:
    some = [row(0, 3), row(1, 20, [0] * 8 + [1] * 12), row(2, 10), row(3, 12, [0] * 10 + [1] * 2)]
    with pytest.raises(DataError, match=r"f:1: 20 tokens do not fit data.length=10; .*\(2 of 4 rows\)"):
        take(some, length=10)
    dropped = take(some, length=10, long_rows="drop")
    assert [r.id for r in dropped.training] == ["0", "2"]
    assert dropped.funnel == {"in": 4, "kept": 2, "validation": 0, "quarantined": {"too_long": 2}}
    cut = take(some, length=10, long_rows="truncate")
    assert [r.id for r in cut.training] == ["0", "1", "2"]
    assert (list(cut.training[1].ids), list(cut.training[1].mask)) == ([1] * 10, [0] * 8 + [1] * 2)
    assert cut.funnel["quarantined"] == {"nothing_to_learn": 1}  # what was learned of it is cut off
    assert cut.training.lengths_N.max() == 10


def test_the_bases_context_bounds_rows_too(take: Take, spec: BaseSpec) -> None:
    some = [row(0), row(1, spec.max_positions + 1)]
    with pytest.raises(DataError, match=f"f:1: 65 tokens do not fit the base's context of {spec.max_positions}"):
        take(some)
    assert take(some, long_rows="truncate").training.lengths_N.tolist() == [6, spec.max_positions]


def test_rows_without_anything_to_learn(take: Take) -> None:
    """No head predicts a row's first two tokens: 1-token rows and rows that learn only there are left out."""
    some = [row(0, 1), row(1, 2), row(2, 5, [1, 1, 0, 0, 0]), row(3, 5, [0] * 5), row(4, 3, [0, 0, 1])]
    chosen = take(some)
    assert [r.id for r in chosen.training] == ["4"]
    assert chosen.funnel == {"in": 5, "kept": 1, "validation": 0, "quarantined": {"nothing_to_learn": 4}}
    assert [r.id for r in take(some, loss_on="all").training] == ["2", "3", "4"]


@pytest.mark.parametrize("some", [[], [row(0, 1)], [row(0, 4, [0] * 4), row(1, 9, [0] * 9)], [row(0, 20)]])
@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_no_row_left_to_learn(take: Take, some: list[Row], repeats: str) -> None:
    with pytest.raises(DataError, match=rf"no row left with a token to learn from \(0 of {len(some)} rows left: "):
        take(some, length=10, long_rows="drop", repeats=repeats)


def test_loss_on_all_and_last_turns(take: Take) -> None:
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 1, 0]
    some = [row(0, 10, mask), row(1, 4, [0, 0, 0, 1]), row(2, 3)]
    assert [list(r.mask) for r in take(some, loss_on="all").training] == [[1] * 10, [1] * 4, [1] * 3]
    assert [list(r.mask) for r in take(some, turns="last").training] == [[0] * 6 + [1] * 3 + [0], [0, 0, 0, 1], [1] * 3]
    assert list(take(some).training[0].mask) == mask


@pytest.mark.parametrize("seed", range(20))
def test_last_turns_of_random_masks(seed: int) -> None:
    rng = random.Random(seed)
    masks = [[rng.randint(0, 1) for _ in range(rng.randint(1, 8))] for _ in range(20)]

    def oracle(mask: list[int]) -> list[int]:
        last = "".join(map(str, mask)).rstrip("0")
        run = len(last) - len(last.rstrip("1"))
        return [0] * (len(last) - run) + [1] * run + [0] * (len(mask) - len(last))

    got = last_turns(Rows.of([Row(str(i), m, m) for i, m in enumerate(masks)]))
    assert got.tolist() == [x for m in masks for x in oracle(m)]


def many(n: int = 300) -> list[Row]:
    """Rows of which every third asks what its neighbour asks."""
    return [row(i % 250, 5, asked=f"q{i - (i % 3 == 2)}", source=f"f:{i}") for i in range(n)]


def test_the_last_turn_of_a_chat_in_several_rows(take: Take) -> None:
    some = [Row(f"{name}", [1, 2, 3], [0, 0, 1]) for name in ("a-0", "a-0/1", "a-0/2", "b-0")]
    chosen = take(some, turns="last")
    assert [r.id for r in chosen.training] == ["a-0/2", "b-0"]
    assert chosen.funnel["quarantined"] == {"earlier_turn": 2}


def test_the_share_for_validation(take: Take) -> None:
    """A question is on one side, which one follows from itself: not from the order nor from other rows."""
    some = many()
    sides: dict[str, set[str]] = {"training": set(), "validation": set()}
    chosen = take(some, validation=ValidationConfig(share=0.3))
    for side, found in sides.items():
        found |= {r.asked for r in getattr(chosen, side)}
    assert not sides["training"] & sides["validation"]
    assert len(chosen.training) + len(chosen.validation) == len(some)
    assert 0.2 < len(chosen.validation) / len(some) < 0.4
    assert (chosen.funnel["kept"], chosen.funnel["validation"]) == (len(chosen.training), len(chosen.validation))
    random.Random(0).shuffle(some)
    again = take(some[:200], validation=ValidationConfig(share=0.3))
    assert {r.asked for r in again.validation} == {r.asked for r in some[:200]} & sides["validation"]
    larger = take(some, validation=ValidationConfig(share=0.5))
    assert sides["validation"] < {r.asked for r in larger.validation}


def test_a_share_that_leaves_a_side_empty(take: Take) -> None:
    for share, some in ((0.0001, many(9)), (0.9999, many(9))):
        with pytest.raises(DataError, match=f"data.validation.share={share}: .* rows left to train on"):
            take(some, validation=ValidationConfig(share=share))


def test_rows_to_measure_from_elsewhere(take: Take) -> None:
    here, there = ValidationConfig(path="v"), [row(i) for i in range(20, 25)]
    chosen = take([row(i) for i in range(10)], there, validation=here)
    assert ([r.id for r in chosen.validation], len(chosen.training)) == ([str(i) for i in range(20, 25)], 10)
    with pytest.raises(DataError, match=r"1 of its questions are trained on too, such as that of f:7"):
        take([row(i) for i in range(10)], [*there, row(30, asked="q7")], validation=here)
    with pytest.raises(DataError, match=r"validation.path: no row left with a token to measure \(0 of 1 rows left\)"):
        take([row(1)], [row(2, 1)], validation=here)
    nameless = take([row(1, asked="")], [row(2, asked="")], validation=here)  # nobody says what they ask
    assert (len(nameless.training), len(nameless.validation)) == (1, 1)


def test_weights_go_by_source(take: Take) -> None:
    two = {"a": SourceConfig(path="a", weight=2.25), "b": SourceConfig(path="b", weight=0.5)}
    chosen = take([row(0, part="a"), row(1, part="b"), row(2, part="a")], path=None, sources=two)
    assert chosen.weights_N.tolist() == [2.25, 0.5, 2.25]
    assert take([row(0, part="a")]).weights_N.tolist() == [1.0]
    assert len(chosen.weights_N) == len(chosen.training)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "path, sources, prompts"),
        ({"path": "x", "sources": {"a": SourceConfig(path="x")}}, "path, sources, prompts"),
        ({"path": "x", "loss_on": "user"}, "loss_on='user'"),
        ({"path": "x", "turns": "first"}, "turns='first'"),
        ({"path": "x", "on_bad": "ignore"}, "on_bad='ignore'"),
        ({"path": "x", "repeats": "twice"}, "repeats='twice'"),
        ({"path": "x", "long_rows": "split"}, "long_rows='split'"),
        ({"path": "x", "length": 0}, "length=0"),
        ({"path": "x", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)


@pytest.mark.parametrize("settings", [{"share": -0.1}, {"share": 1.0}, {"every": 0}, {"share": 0.1, "path": "x"}])
def test_bad_validation_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="share"):
        ValidationConfig(**settings)


def test_buckets_are_spread_evenly() -> None:
    found = np.sort([importing._bucket(f"q{i}", 0) for i in range(2000)])
    assert np.abs(found - np.arange(2000) / 2000).max() < 0.05
