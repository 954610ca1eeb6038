"""Rows from files and data sets: every row is served or named, whatever is wrong with it."""

import builtins
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts
from draftsmith.data import sources
from draftsmith.data.sources import SourceConfig, content_sha256, files, read
from draftsmith.errors import ConfigError, DataError, RowError

FINE = b'{"prompt": "fine"}\n'
ROWS = [{"prompt": f"p{i}", "more": [{"n": i}]} for i in range(5)]


def found(path: Path | str, **settings: Any) -> list[Any]:
    return [value for _, value in read(SourceConfig(path=str(path), **settings))]


def file(folder: Path, content: bytes, name: str = "in.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def arrow(path: Path, rows: list[Any], *, stream: bool) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as f:
        f.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "a.jsonl": lambda p, rows: p.write_bytes(lines(rows)),
    "a.ndjson": lambda p, rows: p.write_bytes(lines(rows)),
    "a.jsonl.gz": lambda p, rows: p.write_bytes(gzip.compress(lines(rows))),
    "a.json": lambda p, rows: p.write_text("\ufeff\n " + json.dumps(rows, indent=2)),
    "b.json": lambda p, rows: p.write_bytes(lines(rows)),  # JSON lines under that name
    "a.parquet": parquet,
    "a.arrow": lambda p, rows: arrow(p, rows, stream=False),
    "b.arrow": lambda p, rows: arrow(p, rows, stream=True),
    "UPPER.PARQUET": parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert list(read(SourceConfig(path=str(tmp_path / name)))) == [
        (f"{tmp_path / name}:{n}", row) for n, row in enumerate(ROWS, start=1)
    ]
    assert found(tmp_path / name, limit=2) == ROWS[:2]


def test_bom_crlf_blank_lines_and_unicode(tmp_path: Path) -> None:
    said = "héllo \u202e\u2028 😀 e\u0301 \x7f"
    line = json.dumps({"prompt": said}, ensure_ascii=False).encode() + b"\r\n"
    path = file(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n  \n\n" + line.strip())
    assert list(read(SourceConfig(path=str(path)))) == [(f"{path}:{n}", {"prompt": said}) for n in (1, 5)]
    assert found(file(tmp_path, b'{"prompt": "\\ud83d\\ude00"}')) == [{"prompt": "😀"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_row(tmp_path: Path, content: bytes) -> None:
    assert [v for v in found(file(tmp_path, content)) if not isinstance(v, RowError)] == []
    assert found(file(tmp_path, b"[]", "a.json")) == []


@pytest.mark.parametrize(
    ("line", "reason", "says"),
    [
        (b"{", "json", "not JSON"),
        (b'{"prompt": "cut of', "json", "not JSON"),
        (b"\x00\x00", "json", "not JSON"),
        (b'{"prompt": "a\x00b"}', "json", "not JSON"),
        (b"<html>", "json", "not JSON"),
        (b"{} {}", "json", "not JSON"),
        (b"[" * 100_000, "json", "nested too deeply"),
        (b'{"a": ' * 100_000, "json", "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "json", "not JSON"),
        (b'{"prompt": "\xff"}', "encoding", "not UTF-8"),
        (b'{"prompt": "\xed\xa0\xbd"}', "encoding", "not UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "encoding", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "json", "not JSON"),  # a byte-order mark belongs at the start only
        (b'{"prompt": "\\ud83d"}', "encoding", "surrogate"),
        (b'{"\\udc00": 1}', "encoding", "surrogate"),
        (b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}', "encoding", "surrogate"),
        (b"[1]", "json", "a list, not an object"),
        (b'"text"', "json", "a str, not an object"),
        (b"3", "json", "a int, not an object"),
        (b"null", "json", "not an object"),
    ],
)
def test_a_bad_line_is_named_and_reading_goes_on(tmp_path: Path, line: bytes, reason: str, says: str) -> None:
    path = file(tmp_path, FINE + line + b"\n" + FINE)
    first, bad, *rest = found(path)
    assert first == {"prompt": "fine"}
    assert rest[-1] == first
    assert isinstance(bad, RowError)
    assert (bad.where, bad.reason, bad.exit_code) == (f"{path}:2", reason, 3)
    assert says in str(bad)


@pytest.mark.parametrize("depth", range(700, 1000, 5))
def test_how_deep_does_not_matter(tmp_path: Path, depth: int) -> None:
    """Wherever Python stops reading, it is a RowError, and what is served can be hashed and written."""
    (value,) = found(file(tmp_path, b'{"a": ' + b"[" * depth + b"]" * depth + b"}"))
    if not isinstance(value, RowError):
        assert json.dumps([[[[value]]]])


def test_a_torn_last_line(tmp_path: Path) -> None:
    whole, torn = found(file(tmp_path, FINE + b'{"prompt": "fi'))
    assert whole == {"prompt": "fine"}
    assert "the file ends in the middle of it" in str(torn)


def test_a_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over in pieces; the rows around it are served, under their own numbers."""
    monkeypatch.setattr(sources, "LONGEST", 30)
    monkeypatch.setattr(sources, "CHUNK", 7)
    long = b'{"prompt": "' + b"x" * 100 + b'"}\n'
    exact = b'{"prompt": "' + b"x" * 15 + b'"}\n'
    assert len(exact) == 30
    path = file(tmp_path, FINE + long + exact + long + FINE + long.strip())
    served = list(read(SourceConfig(path=str(path))))
    assert [where for where, _ in served] == [f"{path}:{n}" for n in range(1, 7)]
    assert [getattr(v, "reason", None) for _, v in served] == [None, "too_big", None, "too_big", None, "too_big"]
    assert [f"a line of {n} bytes" in str(served[i][1]) for i, n in ((1, len(long)), (5, len(long) - 1))] == [True] * 2


@pytest.mark.slow
def test_a_line_of_200_megabytes_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with open(path, "wb") as f:
        f.write(FINE + b'{"prompt": "')
        for _ in range(200):
            f.write(b"x" * 1_000_000)
        f.write(b'"}\n' + FINE)
    code = (
        "import resource, sys; from draftsmith.data.sources import *;"
        "print([getattr(v, 'reason', 'fine') for _, v in read(SourceConfig(path=sys.argv[1]))]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    reasons, megabytes = done.stdout.splitlines()
    assert reasons == "['fine', 'too_big', 'fine']"
    assert int(megabytes) < 400


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b"plain" + b, lambda b: b[:40] + b"\0\0\0" + b[43:]])
def test_a_damaged_gz_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Nobody knows what is missing from it: no row of it is left out as if it were one bad line."""
    content = gzip.compress(lines([{"prompt": random.Random(0).randbytes(9000).hex()}] * 3))
    path = file(tmp_path, damage(content), "a.jsonl.gz")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read, or damaged") as caught:
        found(path)
    assert not isinstance(caught.value, RowError)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-30], lambda b: b"hello", lambda b: b[: len(b) // 2]])
def test_damaged_tables_are_named(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    path = file(tmp_path, damage((tmp_path / name).read_bytes()), name)
    with pytest.raises(DataError, match=rf"{name}: not (Parquet|Arrow), or damaged"):
        found(path)


@pytest.mark.parametrize("content", [b"[1, 2", b"[\xff]", b"[" * 100_000, b"[" + b"1" * 5000 + b"]"])
def test_a_damaged_json_array_is_one_bad_row(tmp_path: Path, content: bytes) -> None:
    (bad,) = found(file(tmp_path, content, "a.json"))
    assert isinstance(bad, RowError)
    assert "a.json:1: not a whole JSON array" in str(bad)


def test_bad_rows_of_a_json_array(tmp_path: Path) -> None:
    path = file(tmp_path, b'[{"a": 1}, 2, {"a": "\\ud800"}, {"a": 2}]', "a.json")
    good, number, half, last = found(path)
    assert (good, last) == ({"a": 1}, {"a": 2})
    assert [(e.where, e.reason) for e in (number, half)] == [(f"{path}:2", "json"), (f"{path}:3", "encoding")]


GOOD = [
    {"messages": [{"role": "user", "content": "héllo 😀"}, {"role": "assistant", "content": 'say "x"\\n'}]},
    {"prompt": "go on", "completion": "I do"},
    {"ids": [1, 2, 3], "mask": [0, 1, 1]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


def mutated(line: bytes, rng: random.Random) -> bytes:
    """A good line with a few bytes changed, cut, doubled or put in; never a line's end."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(line)) if line else 0
        change = rng.choice(("byte", "cut", "double", "insert", "swap", "drop"))
        if change == "byte":
            line = line[:at] + bytes([rng.randrange(256)]) + line[at + 1 :]
        elif change == "cut":
            line = line[:at]
        elif change == "double":
            line += line[at:]
        elif change == "insert":
            extra = [b"\x00", b"\xff", b"\\ud800", b"\\", b'"', b"[", b"{", b"null", b"-1e999", b"NaN", b"\xef\xbb\xbf"]
            line = line[:at] + rng.choice(extra) + line[at:]
        elif change == "swap":
            line = line.replace(rng.choice([b'"', b":", b",", b"a", b"role"]), rng.choice([b"", b"3", b"[]", b"{"]), 1)
        else:
            line = line[:at] + line[at + rng.randint(1, 5) :]
    return line.replace(b"\n", b" ")


@pytest.mark.parametrize("seed", range(8))
def test_fuzz_every_line_is_served_or_named(tmp_path: Path, seed: int) -> None:
    """in = out + quarantined, no exception, and each quarantined line says where it stood."""
    from draftsmith.data.funnel import Funnel, intake

    rng = random.Random(seed)
    content = [mutated(json.dumps(rng.choice(GOOD), ensure_ascii=rng.random() < 0.5).encode(), rng) for _ in range(100)]
    path = file(tmp_path, b"\n".join(content) + b"\n")
    numbers = {n for n, line in enumerate(content, start=1) if line.strip()}
    with Funnel(tmp_path / "quarantine.jsonl") as funnel:
        records = list(intake({"mine": SourceConfig(path=str(path))}, funnel))
        for record in records:
            assert record.content
            assert record.asked
    refused = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(records) + len(refused) == funnel.taken == len(numbers)
    assert {r.where for r in records} | {q["where"] for q in refused} == {f"{path}:{n}" for n in numbers}
    assert refused
    assert all(q["reason"] and q["detail"] for q in refused)


def test_folders(tmp_path: Path) -> None:
    """All files of one kind, in all folders, sorted; hidden ones and the manifest are none."""
    for name in ("b.jsonl", "a/z.jsonl", "a/y/x.jsonl", ".hidden.jsonl", ".git/x.jsonl"):
        file((tmp_path / name).parent, lines([{"prompt": name}]), Path(name).name)
    file(tmp_path, b"{}", "manifest.json")
    file(tmp_path, b"read me", "README.md")
    assert [v["prompt"] for v in found(tmp_path)] == ["a/y/x.jsonl", "a/z.jsonl", "b.jsonl"]
    assert [v["prompt"] for v in found(f"{tmp_path}/a")] == ["a/y/x.jsonl", "a/z.jsonl"]
    assert [v["prompt"] for v in found(f"{tmp_path}/*.jsonl")] == ["b.jsonl"]
    assert [v["prompt"] for v in found(f"{tmp_path}/**/*.jsonl")] == ["a/y/x.jsonl", "a/z.jsonl", "b.jsonl"]


def test_a_folder_of_several_kinds_is_not_guessed(tmp_path: Path) -> None:
    """All forms of JSON lines are one kind; a .json beside others describes them; two kinds are an error."""
    for name in ("a.json", "a.jsonl.gz", "b.jsonl", "c.ndjson"):
        WRITERS[name if name in WRITERS else "a.jsonl"](tmp_path / name, [{"prompt": name}])
    assert [v["prompt"] for v in found(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.ndjson"]
    WRITERS["a.parquet"](tmp_path / "a.parquet", [{"prompt": "p"}])
    with pytest.raises(DataError, match=r"holds Parquet \(a\.parquet\) and JSON lines \(a\.jsonl\.gz\); name one kind"):
        found(tmp_path)
    assert found(tmp_path / "*.parquet") == [{"prompt": "p"}]


def test_what_datasets_saved_is_read_as_it_says(tmp_path: Path) -> None:
    """Its cache files lie beside the data and are none of it; of several splits one is read."""
    import datasets

    saved = datasets.Dataset.from_list([{"prompt": str(i)} for i in range(5)])
    saved.save_to_disk(str(tmp_path / "one"))
    reloaded = datasets.load_from_disk(str(tmp_path / "one"))
    reloaded.map(lambda row: {"prompt": row["prompt"] + "!"})
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 2
    assert [v["prompt"] for v in found(tmp_path / "one")] == ["0", "1", "2", "3", "4"]
    both = datasets.DatasetDict({"train": saved, "test": saved.select([0])})
    both.save_to_disk(str(tmp_path / "two"))
    assert len(found(tmp_path / "two")) == 5
    assert len(found(tmp_path / "two", split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev'; there are test, train"):
        found(tmp_path / "two", split="dev")


@pytest.mark.parametrize("facts", [b"[1]", b"{", b'{"files": 3}', b'{"kind": "rows"}'])
def test_somebody_elses_manifest(tmp_path: Path, facts: bytes) -> None:
    file(tmp_path, lines([{"prompt": "a"}]), "a.jsonl")
    file(tmp_path, facts, "manifest.json")
    assert sources.published_as(tmp_path) is None
    sources.check(SourceConfig(path=str(tmp_path)))


def test_labels_are_no_rows(tmp_path: Path) -> None:
    with artifacts.publish(tmp_path / "labels", kind="labels") as temporary:
        WRITERS["a.parquet"](temporary / "rows-00000.parquet", [{"prompt": "p"}])
    for path in ("labels", "labels/*.parquet", "labels/rows-00000.parquet"):
        with pytest.raises(DataError, match="labels: holds labels, not rows"):
            sources.check(SourceConfig(path=str(tmp_path / path)))


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    assert found(file(tmp_path, FINE, "a[1].jsonl")) == [{"prompt": "fine"}]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none", "no such file or folder"),
        ("none/*.jsonl", "no such file or folder"),
        ("empty", "no file in it that is one of"),
        ("empty/*", "no such file or folder"),
        ("a.txt", r"a\.txt: unknown kind of file"),
        ("*.txt", r"a\.txt: unknown kind of file"),
        ("a.json.gz", "unknown kind of file"),
    ],
)
def test_paths_that_are_no_source(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.json.gz"):
        file(tmp_path, FINE, name)
    for ask in (lambda: files(f"{tmp_path}/{path}"), lambda: found(f"{tmp_path}/{path}")):
        with pytest.raises(DataError, match=says):
            ask()
    with pytest.raises(DataError, match=says):
        sources.check(SourceConfig(path=f"{tmp_path}/{path}"))


def test_columns(tmp_path: Path) -> None:
    """Ours -> theirs; a column that has our name but is mapped elsewhere is not ours."""
    path = file(tmp_path, lines([{"dialogue": [1], "text": "no", "id": 3}, {"text": "alone"}]))
    columns = {"messages": "dialogue", "text": "summary"}
    assert found(path, columns=columns) == [{"messages": [1], "id": 3}, {}]
    swapped = file(tmp_path, lines([{"prompt": "a", "completion": "b"}]))
    assert found(swapped, columns={"prompt": "completion", "completion": "prompt"}) == [
        {"prompt": "b", "completion": "a"}
    ]


def test_the_limit_counts_bad_rows_too(tmp_path: Path) -> None:
    path = file(tmp_path, b"{\n" + FINE * 5)
    assert [type(v) for v in found(path, limit=3)] == [RowError, dict, dict]
    both = file(tmp_path / "two", FINE, "a.jsonl"), file(tmp_path / "two", FINE * 3, "b.jsonl")
    assert len(found(both[0].parent, limit=2)) == 2
    assert len(found(both[0].parent, limit=20)) == 4


def test_the_content_hash_is_of_bytes_not_of_places(tmp_path: Path) -> None:
    one, other = file(tmp_path / "a", FINE), file(tmp_path / "b", FINE)
    sha = content_sha256(SourceConfig(path=str(one)))
    assert sha == content_sha256(SourceConfig(path=str(other), weight=2.0))
    assert sha != content_sha256(SourceConfig(path=str(one), limit=1))
    other.write_bytes(FINE + FINE)
    assert sha != content_sha256(SourceConfig(path=str(other)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "path, hub"),
        ({"path": "x", "hub": "y"}, "path, hub"),
        ({"path": "x", "shape": "chat"}, "shape='chat'"),
        ({"path": "x", "weight": 0.0}, "weight=0"),
        ({"path": "x", "weight": -1.0}, "weight=-1"),
        ({"path": "x", "weight": float("nan")}, "weight=nan"),
        ({"path": "x", "weight": float("inf")}, "weight=inf"),
        ({"path": "x", "weight": 1e6}, "weight=1000000"),
        ({"path": "x", "weight": 1e-6}, "weight=1e-06"),
        ({"path": "x", "limit": 0}, "limit=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SourceConfig(**settings)


def test_a_data_set_saved_to_disk(tmp_path: Path, offline: Any) -> None:
    offline.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert found(tmp_path / "saved") == ROWS
    offline.DatasetDict({"train": offline.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    assert found(tmp_path / "splits" / "train") == ROWS


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_folder_through_datasets(tmp_path: Path, offline: Any, streaming: bool) -> None:
    hub = str(file(tmp_path / "set", lines(ROWS), "train.jsonl").parent)
    settings: dict[str, Any] = {"hub": hub, "streaming": streaming, "columns": {"text": "prompt"}, "limit": 3}
    assert list(read(SourceConfig(**settings))) == [
        (f"{hub}[train]:{n}", {"text": f"p{n - 1}", "more": [{"n": n - 1}]}) for n in (1, 2, 3)
    ]
    with pytest.raises(DataError, match=f"hub={hub}: .*nosuch"):
        list(read(SourceConfig(hub=hub, streaming=streaming, split="nosuch")))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_that_breaks_on_the_way_is_named(tmp_path: Path, offline: Any, streaming: bool) -> None:
    hub = str(file(tmp_path / "set", FINE * 3 + b'{"prompt": \n', "train.jsonl").parent)
    with pytest.raises(DataError, match=f"hub={hub}: "):
        list(read(SourceConfig(hub=hub, streaming=streaming)))


@pytest.mark.parametrize("streaming", [True, False])
def test_an_unknown_hub_id_offline(offline: Any, streaming: bool) -> None:
    with pytest.raises(DataError, match="hub=nobody/no-such-set: ") as caught:
        list(read(SourceConfig(hub="nobody/no-such-set", streaming=streaming)))
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_datasets(name: str, *args: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ConfigError, match=r"hub: needs the package `datasets`: pip install 'draftsmith\[hub\]'"):
        list(read(SourceConfig(hub="some/chats")))
