"""Rows in memory and on disk: what is written comes back, and what was changed since is refused by name."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts import seal
from draftsmith.contracts import BaseSpec
from draftsmith.data import rows as rows_module
from draftsmith.data.rows import TEXTS, Row, Rows, read_folder, read_table, shards, to_table, write_rows, write_shard
from draftsmith.errors import DataError

SOME = [
    Row("a-0", [1, 2, 3], [0, 1, 1], "p:1", "mine", "q1", '{"text": "héllo\\n"}', 7, "stop"),
    Row("b-0", [4, 5], [0, 1], "héllo:2", "", "q2", "", None, "length"),
    Row("c-0", [], [], "p:3"),
    Row("c-1", [9], [1], "p:4", seed=0),
]


def plain(rows: Any) -> list[Row]:
    """With lists instead of arrays, so that rows can be compared."""
    return [dataclasses.replace(r, ids=list(map(int, r.ids)), mask=list(map(int, r.mask))) for r in rows]


@pytest.fixture
def folder(tmp_path: Path, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four rows in two shards."""
    monkeypatch.setattr(rows_module, "SHARD_ROWS", 2)
    assert write_rows(tmp_path / "rows", iter(SOME), base=dataclasses.asdict(spec), note="kept") == 4
    return tmp_path / "rows"


def test_a_folder_round_trips(folder: Path, spec: BaseSpec) -> None:
    rows, facts = read_folder(folder, spec)
    assert plain(rows) == SOME
    assert (facts["kind"], facts["note"], facts["base"]["path"]) == ("rows", "kept", "some/base")
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rows-00000.parquet", "rows-00001.parquet"]
    assert plain(read_folder(folder)[0]) == SOME
    assert read_table(folder)[0].column("ids").to_pylist() == [r.ids for r in SOME]


def test_rows_in_memory() -> None:
    rows = Rows.of(SOME)
    assert Rows.of(rows) is rows
    assert plain(rows) == plain(rows[:]) == SOME
    assert plain(rows[1:3]) == SOME[1:3]
    assert plain([rows[-1]]) == SOME[-1:]
    with pytest.raises(IndexError):
        rows[4]
    assert rows.lengths_N.tolist() == [3, 2, 0, 1]
    assert [rows.text(name) for name in TEXTS] == [[getattr(r, name) for r in SOME] for name in TEXTS]
    assert rows[0].ids.base is not None  # type: ignore[attr-defined]  # a view
    empty = Rows.of([])
    assert (len(empty), list(empty), empty.learns().tolist()) == (0, [], [])


@pytest.mark.parametrize("seed", range(20))
def test_selecting_cutting_and_masking(seed: int) -> None:
    """Against the same done to a list of rows, in any order of the three."""
    rng = random.Random(seed)
    wanted = [
        Row(str(i), [rng.randrange(9) for _ in range(n)], [rng.randint(0, 1) for _ in range(n)])
        for i, n in enumerate(rng.choices(range(8), k=12))
    ]
    rows = Rows.of(wanted)
    for step in rng.choices(("select", "where", "cut", "all"), k=5):
        if step == "select":
            chosen = [rng.randrange(len(wanted)) for _ in range(10)] if wanted else []
            rows, wanted = rows.select(np.array(chosen, dtype=np.int64)), [wanted[i] for i in chosen]
        elif step == "where":
            keep = [rng.random() < 0.8 for _ in wanted]
            rows, wanted = rows.select(np.array(keep, dtype=bool)), [r for r, k in zip(wanted, keep, strict=True) if k]
        elif step == "cut":
            room = rng.randint(1, 8)
            rows = rows.truncated(room)
            wanted = [dataclasses.replace(r, ids=r.ids[:room], mask=r.mask[:room]) for r in wanted]
        else:
            rows = rows.learned(np.ones_like(rows.mask))
            wanted = [dataclasses.replace(r, mask=[1] * len(r.ids)) for r in wanted]
        assert plain(rows) == wanted
        assert rows.text("id") == [r.id for r in wanted]
        assert rows.sha256() == Rows.of(wanted).sha256()


def test_the_hash_is_of_ids_masks_and_their_order() -> None:
    rows = Rows.of(SOME)
    changed = [
        rows.select(np.array([1, 0, 2, 3])),
        rows.select(np.array([0, 1, 3])),
        rows.truncated(2),
        rows.learned(np.ones_like(rows.mask)),
        Rows.of([dataclasses.replace(SOME[0], ids=[1, 2, 4]), *SOME[1:]]),
        Rows.of([Row("", [1, 2], [0, 1]), Row("", [3, 4, 5], [1, 0, 1]), *SOME[2:]]),  # the same tokens, cut elsewhere
    ]
    assert len({rows.sha256(), *(r.sha256() for r in changed)}) == 1 + len(changed)
    assert Rows.of([dataclasses.replace(r, id="x", source="y") for r in SOME]).sha256() == rows.sha256()


def test_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "SHARD_ROWS", 3)
    assert [[r.id for r in some] for some in shards(SOME)] == [["a-0", "b-0", "c-0"], ["c-1"]]
    assert [len(some) for some in shards(SOME[:3])] == [3]
    assert list(shards([])) == []


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, to_table(SOME))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # nothing temporary is left


def flip(path: Path, at: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def swap(folder: Path) -> None:
    one, two = (folder / f"rows-0000{n}.parquet" for n in (0, 1))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: flip(f / "rows-00001.parquet"), r"rows-00001\.parquet: content differs"),
        (lambda f: (f / "rows-00001.parquet").write_bytes(b""), r"rows-00001\.parquet: 0 bytes"),
        (lambda f: (f / "rows-00000.parquet").write_bytes((f / "rows-00000.parquet").read_bytes()[:-1]), r"00000\.par"),
        (lambda f: (f / "rows-00000.parquet").unlink(), r"rows-00000\.parquet: listed in manifest.json but missing"),
        (lambda f: write_shard(f / "rows-00002.parquet", to_table(SOME)), r"rows-00002\.parquet is not in manifest"),
        (swap, r"rows-00000\.parquet: "),
        (lambda f: (f / "manifest.json").unlink(), r"has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
        (lambda f: seal(f, ["rows-00000.parquet"], kind="base"), "holds base, not rows"),
        (lambda f: (seal(f, [], kind="rows"), [p.unlink() for p in f.glob("rows-*")]), "0 rows in it"),
    ],
)
def test_what_was_changed_is_refused_by_name(
    folder: Path, spec: BaseSpec, harm: Callable[[Path], Any], says: str
) -> None:
    harm(folder)
    with pytest.raises(DataError, match=says) as caught:
        read_folder(folder, spec)
    assert caught.value.exit_code == 3


def test_sealed_but_no_rows_of_ours(folder: Path, spec: BaseSpec) -> None:
    import pyarrow as pa

    write_shard(folder / "rows-00000.parquet", pa.table({"ids": [[1]], "mask": [[1]]}))
    seal(folder, ["rows-00000.parquet", "rows-00001.parquet"], kind="rows")
    with pytest.raises(DataError, match=r"rows-00000\.parquet: its rows have no column asked"):
        read_folder(folder, spec)
    (folder / "rows-00001.parquet").unlink()
    seal(folder, ["rows-00000.parquet"], kind="rows")
    with pytest.raises(DataError, match="its rows have no column asked, finish, id, part, said, seed, source"):
        read_folder(folder, spec)
    (folder / "rows-00000.parquet").write_bytes(b"not parquet")
    seal(folder, ["rows-00000.parquet"], kind="rows")
    with pytest.raises(DataError, match="not parquet that we wrote"):
        read_folder(folder, spec)


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_rows_of_another_base_are_refused(folder: Path, spec: BaseSpec, what: str) -> None:
    other = dataclasses.replace(spec, **{f"{what}_sha256": "0" * 64})
    with pytest.raises(DataError, match=rf"rows: its rows were written with another {what} \(base some/base\)"):
        read_folder(folder, other)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary(tmp_path: Path, spec: BaseSpec, bad: int) -> None:
    write_rows(tmp_path / "rows", [Row("a", [1, bad], [0, 1])])
    with pytest.raises(DataError, match=rf"token id {bad} is outside the base's vocabulary of {spec.vocab_size}"):
        read_folder(tmp_path / "rows", spec)
    assert len(read_folder(tmp_path / "rows")[0]) == 1


def test_no_rows_are_never_published(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 rows are left to write"):
        write_rows(tmp_path / "rows", [])
    assert list(tmp_path.iterdir()) == []


def test_what_said_holds_is_json(folder: Path) -> None:
    assert json.loads(read_folder(folder)[0][0].said) == {"text": "héllo\n"}


def test_token_counts_are_those_of_the_learned_tokens() -> None:
    rows = Rows.of([Row("a", [1, 2, 2, 5], [0, 1, 1, 1]), Row("b", [2, 3], [0, 1]), Row("c", [2, 2, 4], [1, 0, 1])])
    assert rows.token_counts(7, np.ones(3)).tolist() == [0, 0, 3, 1, 1, 1, 0]
    assert rows.token_counts(7, np.array([1, 3, 0.5])).tolist() == [0, 0, 2.5, 3, 0.5, 1, 0]
    assert rows.select(np.array([1])).token_counts(4, np.ones(1)).tolist() == [0, 0, 0, 1]
