"""Where records come from: files, folders, globs and Hugging Face data sets, row by row, named file:row.

JSON lines (also gzipped), JSON arrays, Parquet and Arrow are read here; hub ids and streams go through
`datasets`. A row that cannot be read is a RowError among the rows; reading goes on after it.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from draftsmith.artifacts import MANIFEST, file_sha256, fingerprint
from draftsmith.errors import ConfigError, DataError, RowError

LONGEST = 64 * 1024 * 1024  # bytes of one JSON line; longer ones are no chat
CHUNK = 1024 * 1024  # bytes of a line that is too long, at a time
SPARE = 64  # levels that a row may be nested deeper where it is read next, and Python still reads it
KINDS = {  # a folder is read if its files are of one kind; .json counts where there is nothing else
    "Parquet": (".parquet",),
    "Arrow": (".arrow",),
    "JSON lines": (".jsonl", ".jsonl.gz", ".ndjson"),
    "JSON": (".json",),
}
SUFFIXES = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
SHAPES = ("auto", "messages", "sharegpt", "alpaca", "completion", "prompt", "text", "turns", "tokens")
LEAST, MOST = 0.001, 1000  # weights of a source
Raw = tuple[str, dict[str, Any] | RowError]  # file:row, and the object there or what is wrong with it


@dataclass(frozen=True)
class SourceConfig:
    """One source: a path (file, folder or glob) or a hub id.

    columns: our name -> the source's, where they differ, such as {messages: dialogue}. weight: how often each of
    its rows is seen per epoch; 0.5 takes half of them, another half the next time.
    """

    path: str | None = None
    hub: str | None = None  # a data set id; or a folder that `datasets` loads
    name: str | None = None  # the hub's configuration name
    split: str = "train"
    revision: str | None = None
    streaming: bool = False  # rows are written out as they come, without the hub's whole files
    shape: str = "auto"  # auto | messages | sharegpt | alpaca | completion | prompt | text | turns | tokens
    columns: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    limit: int | None = None  # only so many rows

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ConfigError("path, hub: give one of them; files, or a hub id")
        if self.shape not in SHAPES:
            raise ConfigError(f"shape='{self.shape}': choose one of {', '.join(SHAPES)}")
        if not LEAST <= self.weight <= MOST:
            raise ConfigError(f"weight={self.weight}: give a number from {LEAST} to {MOST}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit}: give at least 1, or null for all")


def check(source: SourceConfig, *, labels: bool = False) -> None:
    """DataError if a local source is not there, or is something else of ours than rows (or labels, where they are
    wanted): asked before anything is loaded."""
    if source.path is not None:
        for folder in {p.parent for p in files(source.path, source.split)}:
            kind = published_as(folder)
            if kind not in (None, "rows") and not (labels and kind == "labels"):
                raise DataError(f"{folder}: holds {kind}, not rows")


def published_as(folder: Path) -> str | None:
    """What a folder that we published holds; None for anybody else's. DataError where shards of ours lie without a
    manifest that can be read: nobody knows any more whether they are whole, or whose ids they hold."""
    path = folder / MANIFEST
    try:
        facts = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        facts = None
    if isinstance(facts, dict) and isinstance(facts.get("files"), dict):
        return str(facts["kind"]) if "kind" in facts else None
    if not (folder / "asked").is_dir() and _holds_shards(folder):
        state = "damaged" if path.is_file() else "missing"
        raise DataError(f"{path}: {state}, beside shards of draftsmith's; copy the whole folder, or make it again")
    return None


def _holds_shards(folder: Path) -> bool:
    """Whether the first shard here has the columns that our rows have."""
    first = next(iter(sorted(folder.glob("rows-[0-9][0-9][0-9][0-9][0-9].parquet"))), None)
    if first is None:
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return {"id", "ids", "mask", "asked", "said", "finish"} <= set(pq.read_schema(first).names)
    except (pa.ArrowException, OSError):
        return False


def files(path: str, split: str = "train") -> list[Path]:
    """The files behind a path, sorted. A folder is read with all its folders; one that `datasets` saved, as it says:
    of several splits, `split`."""
    found = Path(path)
    if found.is_dir():
        return _of_folder(found, split)
    some = [found] if found.is_file() else [Path(p) for p in sorted(glob.glob(path, recursive=True))]
    some = [p for p in some if p.is_file()]
    if not some:
        raise DataError(f"{path}: no such file or folder, and no file matches it; give one that is there")
    for p in some:
        if _reader(p) is None:
            raise DataError(f"{p}: unknown kind of file; sources are {SUFFIXES}")
    return some


def _of_folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # saved by `datasets`, split by split
        if not (folder / split).is_dir():
            splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
            raise DataError(f"{folder}: no split '{split}'; there are {', '.join(splits)}")
        return _of_folder(folder / split, split)
    if (folder / "state.json").is_file():  # it also leaves cache-….arrow files beside the data
        try:
            names = [f["filename"] for f in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{folder / 'state.json'}: does not list the data's files ({e!r})") from None
        if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise DataError(f"{folder / 'state.json'}: lists {strange[0]!r}, which is no file of this folder")
        return [folder / name for name in names]
    there = sorted(p for p in folder.rglob("*") if _visible(p.relative_to(folder)) and p.is_file())
    ours = {own for own in {p.parent for p in there} if published_as(own) == "rows"}
    shards = {shard for own in ours for shard in own.glob("rows-*.parquet")}
    there = [p for p in there if p in shards or not ours.intersection(p.parents)]
    kinds = {kind: [p for p in there if p.name.lower().endswith(ends)] for kind, ends in KINDS.items()}
    kinds["JSON"] = [p for p in kinds["JSON"] if p.name != MANIFEST]
    held: dict[str, list[Path]] = {kind: paths for kind, paths in kinds.items() if paths}
    if len(held) > 1:
        held.pop("JSON", None)
    if not held:
        raise DataError(f"{folder}: no file in it that is one of {SUFFIXES}")
    if len(held) > 1:
        named = " and ".join(f"{kind} ({paths[0].name})" for kind, paths in held.items())
        one = f"{folder}/*{KINDS[next(iter(held))][0]}"
        raise DataError(f"{folder}: holds {named}; name one kind, such as {one}, or each in data.sources")
    return next(iter(held.values()))


def content_sha256(source: SourceConfig) -> str:
    """What a source holds, as a hash: of its files' bytes; of a hub id's name and revision."""
    told: dict[str, Any] = {k: v for k, v in vars(source).items() if k not in ("path", "weight")}
    if source.path is not None:
        told["files"] = [file_sha256(p) for p in files(source.path, source.split)]
    return fingerprint(told)


def read(source: SourceConfig) -> Iterator[Raw]:
    """Every row of the source in its order, up to its limit, columns under our names."""
    rows = _hub(source) if source.hub else (row for p in files(source.path or "", source.split) for row in _file(p))
    for n, (where, value) in enumerate(rows):
        if n == source.limit:
            return
        yield where, _renamed(value, source.columns) if isinstance(value, dict) else value


def _renamed(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return value
    taken = set(columns.values())
    kept = {k: v for k, v in value.items() if k not in taken and k not in columns}
    return {**kept, **{ours: value[theirs] for ours, theirs in columns.items() if theirs in value}}


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _reader(path: Path) -> Callable[[Path], Iterator[Raw]] | None:
    name = path.name.lower()
    if name.endswith(".json"):
        return _json
    if name.endswith((".parquet", ".arrow")):
        return _parquet if name.endswith(".parquet") else _arrow
    return json_lines if name.endswith((".jsonl", ".jsonl.gz", ".ndjson")) else None


def _file(path: Path) -> Iterator[Raw]:
    reader = _reader(path)
    assert reader is not None
    return reader(path)


def json_lines(path: Path) -> Iterator[Raw]:
    """(file:row, object) per line; blank lines are no rows. A byte order mark and CR LF are taken as they are
    meant; anything else that is not one JSON object a line is a RowError."""
    opened: IO[bytes] = gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[assignment]  # noqa: SIM115
    with opened as f:
        number = 0
        while raw := _read_line(f, path, LONGEST + 1):
            number += 1
            where = f"{path}:{number}"
            if len(raw) > LONGEST:
                size = len(raw) + _rest_of_line(f, path)
                yield where, RowError(where, "too_big", f"a line of {size:,} bytes; more than {LONGEST:,} is no row")
            elif raw.strip():
                yield where, _parsed(raw, where, first=number == 1, torn=not raw.endswith(b"\n"))


def _read_line(f: IO[bytes], path: Path, longest: int) -> bytes:
    try:
        return f.readline(longest)
    except (EOFError, OSError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read, or damaged ({_line(e)}); copy or write it again") from None


def _line(e: Exception) -> str:
    return " ".join(str(e).split())


def _rest_of_line(f: IO[bytes], path: Path) -> int:
    size = 0
    while more := _read_line(f, path, CHUNK):
        size += len(more)
        if more.endswith(b"\n"):
            break
    return size


def _parsed(raw: bytes, where: str, *, first: bool, torn: bool) -> dict[str, Any] | RowError:
    try:
        value = _loaded(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as e:
        return RowError(where, "encoding", f"not UTF-8 ({e.reason} at byte {e.start})")
    except json.JSONDecodeError as e:
        cut = "; the file ends in the middle of it" if torn else ""
        told = e.msg.removesuffix(" at")
        return RowError(where, "json", f"not JSON ({told} at column {e.colno}{cut}); mend or delete the line")
    except ValueError as e:  # a number of thousands of digits
        return RowError(where, "json", f"not JSON that can be read ({e}); mend or delete the line")
    except RecursionError:
        return RowError(where, "json", "not JSON that anyone wrote (nested too deeply)")
    return _object(value, where)


def _loaded(text: str) -> Any:
    """JSON in which no key of an object stands twice: which of its values is meant would be a guess."""
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in (k for k, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


def _object(value: Any, where: str) -> dict[str, Any] | RowError:
    if not isinstance(value, dict):
        return RowError(where, "json", f"a {type(value).__name__}, not an object; one JSON object per row")
    nested: Any = value
    for _ in range(SPARE):
        nested = [nested]
    try:
        json.dumps(nested, ensure_ascii=False, default=str).encode()
    except RecursionError:
        return RowError(where, "json", "not JSON that anyone wrote (nested too deeply)")
    except UnicodeEncodeError:
        return RowError(where, "encoding", "half a surrogate pair, which is no character; mend or delete it")
    return value


def _json(path: Path) -> Iterator[Raw]:
    """A .json file: one array of objects, or JSON lines under that name."""
    with open(path, "rb") as f:
        start = f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from json_lines(path)
        return
    try:
        values = _loaded(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        yield f"{path}:1", RowError(f"{path}:1", "json", f"not a whole JSON array ({e})")
        return
    for number, value in enumerate(values, start=1):
        yield f"{path}:{number}", _object(value, f"{path}:{number}")


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(path)
        for n in range(opened.num_row_groups):
            group = opened.metadata.row_group(n)
            if group.total_byte_size > LONGEST * max(1, group.num_rows):
                told = f"its {group.num_rows} rows unpack to {group.total_byte_size:,} bytes"
                raise DataError(f"{path}: row group {n}: {told}; more than {LONGEST:,} is no row")
        batches = opened.iter_batches(batch_size=1024)
        yield from _numbered(path, (_dense(row) for batch in batches for row in batch.to_pylist()))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not Parquet, or damaged ({_line(e)}); copy or write it again") from None


def _arrow(path: Path) -> Iterator[Raw]:
    """An Arrow file, or a stream as `datasets` saves it."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as f:
            try:
                opened = pa.ipc.open_file(f)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                f.seek(0)
                batches = iter(pa.ipc.open_stream(f))
            yield from _numbered(path, (_dense(row) for batch in batches for row in batch.to_pylist()))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not Arrow, or damaged ({_line(e)}); copy or write it again") from None


def _dense(value: Any) -> Any:
    """Without the keys that a column's common type gave to rows that never had them."""
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items() if v is not None}
    return [_dense(v) for v in value] if isinstance(value, list) else value


def _numbered(path: Path, values: Iterator[Any]) -> Iterator[Raw]:
    for number, value in enumerate(values, start=1):
        yield f"{path}:{number}", _object(value, f"{path}:{number}")


def _hub(source: SourceConfig) -> Iterator[Raw]:
    """A data set through `datasets`; rows are named <id>[<split>]:<row>."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("hub: needs the package `datasets`: pip install 'draftsmith[hub]'") from None
    try:
        found = datasets.load_dataset(
            str(source.hub), source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        for number, value in enumerate(found, start=1):  # a stream reads the hub's files only here
            where = f"{source.hub}[{source.split}]:{number}"
            yield where, _object(dict(value), where)
    except Exception as e:  # whatever the hub, the network or a builder raises: it names the data set
        raise DataError(f"hub={source.hub}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from None
