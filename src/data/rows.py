"""Rows on disk and in memory: token ids, loss mask, provenance. Training reads nothing else.

A folder of rows holds rows-00000.parquet, rows-00001.parquet, … and a manifest with their sha256 and the
fingerprints of the base whose ids they are. mask 1 = learn to predict this token. Shards are read with pyarrow
alone, so nobody's cache decides what is read.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from draftsmith import artifacts
from draftsmith.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from draftsmith.contracts import BaseSpec

SHARD_ROWS = 4096  # rows per parquet file where nobody says otherwise


@dataclass(frozen=True)
class Row:
    """One conversation: `ids` and `mask` have equal length.

    id: content hash and occurrence, unique in a folder. source: file:row it came from; part: the name of that
    source. asked: hash of what was asked, without the answers. said: JSON of the text behind the ids. seed: of
    the sampling, if any. finish: `stop`, or `length` where an answer was cut. labels: a number per token, NaN where it
    has none; only rows that draftsmith label wrote have them.
    """

    id: str
    ids: Sequence[int]
    mask: Sequence[int]
    source: str = ""
    part: str = ""
    asked: str = ""
    said: str = ""
    seed: int | None = None
    finish: str = ""
    labels: Sequence[float] | None = None


TEXTS = ("id", "source", "part", "asked", "said", "finish")


def to_table(rows: Sequence[Row], extra: Mapping[str, tuple[pa.DataType, Sequence[Any]]] | None = None) -> pa.Table:
    """An Arrow table, one line per row; extra: column -> (type, a value per row)."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: pa.array([getattr(r, name) for r in rows], pa.string()) for name in TEXTS}
    columns["seed"] = pa.array([r.seed for r in rows], pa.int64())
    columns["ids"] = pa.array([np.asarray(r.ids, np.int32) for r in rows], pa.large_list(pa.int32()))
    columns["mask"] = pa.array([np.asarray(r.mask, np.uint8) for r in rows], pa.large_list(pa.uint8()))
    if rows and all(r.labels is not None for r in rows):
        columns["accept"] = pa.array([np.asarray(r.labels, np.float32) for r in rows], pa.large_list(pa.float32()))
    more = {name: pa.array(list(values), kind) for name, (kind, values) in (extra or {}).items()}
    return pa.table({**columns, **more})


def shard_name(number: int) -> str:
    return f"rows-{number:05d}.parquet"


def write_shard(path: Path, table: pa.Table) -> None:
    """The table as one parquet file, whole or absent; equal tables give equal bytes."""
    import pyarrow.parquet as pq

    with artifacts.whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_rows(folder: Path, rows: Iterable[Row], **facts: Any) -> int:
    """Publishes a folder of rows, whole, with `facts` in its manifest; returns how many rows."""
    count = 0
    with artifacts.publish(folder, kind="rows", **facts) as temporary:
        for number, some in enumerate(shards(rows)):
            write_shard(temporary / shard_name(number), to_table(some))
            count += len(some)
        if not count:
            raise DataError(f"{folder}: 0 rows are left to write")
    return count


def shards(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, SHARD_ROWS at a time."""
    some: list[Row] = []
    for row in rows:
        some.append(row)
        if len(some) == SHARD_ROWS:
            yield some
            some = []
    if some:
        yield some


class Rows(Sequence[Row]):
    """Rows held as a few flat arrays: a Row is made when asked for, its ids and mask being views.

    begins_N, ends_N: where row n lies in `ids` (int32) and `mask` (uint8).
    """

    def __init__(self, table: pa.Table) -> None:
        import pyarrow as pa

        whole = {name: table.column(name).combine_chunks() for name in ("ids", "mask")}
        if any(isinstance(c, pa.ChunkedArray) for c in whole.values()):  # no chunk at all
            whole = {name: pa.array([], pa.large_list(pa.int32())) for name in whole}
        offsets = np.asarray(whole["ids"].offsets)
        self.begins_N, self.ends_N = offsets[:-1].copy(), offsets[1:].copy()
        self.ids = np.asarray(whole["ids"].values, np.int32)
        self.mask = np.array(whole["mask"].values, np.uint8)
        self.texts = {name: table.column(name) for name in TEXTS}
        self.seeds = table.column("seed")
        self.labels: np.ndarray | None = None
        if "accept" in table.column_names:
            self.labels = np.asarray(table.column("accept").combine_chunks().values, np.float32)
        self.at_N = np.arange(len(table))  # which line of the table row n is

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        return rows if isinstance(rows, Rows) else cls(to_table(rows))

    def __len__(self) -> int:
        return len(self.at_N)

    @overload
    def __getitem__(self, n: int) -> Row: ...
    @overload
    def __getitem__(self, n: slice) -> Sequence[Row]: ...
    def __getitem__(self, n: int | slice) -> Row | Sequence[Row]:
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        at = int(self.at_N[n])
        span = slice(int(self.begins_N[n]), int(self.ends_N[n]))
        texts = {name: column[at].as_py() or "" for name, column in self.texts.items()}
        labels: Any = None if self.labels is None else self.labels[span]
        ids, mask = self.ids[span], self.mask[span]
        return Row(ids=ids, mask=mask, seed=self.seeds[at].as_py(), labels=labels, **texts)  # type: ignore[arg-type]

    @property
    def lengths_N(self) -> np.ndarray:
        return self.ends_N - self.begins_N

    def text(self, name: str) -> list[str]:
        """One text column, a value per row."""
        values = self.texts[name].to_pylist()
        return [values[i] or "" for i in self.at_N]

    def select(self, chosen_N: np.ndarray) -> Rows:
        """These rows (indices or booleans), sharing the arrays."""
        out = copy.copy(self)
        out.begins_N, out.ends_N, out.at_N = self.begins_N[chosen_N], self.ends_N[chosen_N], self.at_N[chosen_N]
        return out

    def learned(self, mask: np.ndarray) -> Rows:
        """The same rows with another mask, as long as `mask`."""
        out = copy.copy(self)
        out.mask = mask
        return out

    def truncated(self, room: int) -> Rows:
        """The same rows, none longer than `room`."""
        out = copy.copy(self)
        out.ends_N = np.minimum(self.ends_N, self.begins_N + room)
        return out

    def counts(self, horizon: int) -> np.ndarray:
        """counts_NK [rows, horizon + 1]: how many learned tokens row n has from its k-th token on, which is how
        many targets k ahead it adds to a global step."""
        sums = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        froms_NK = np.minimum(self.begins_N[:, None] + np.arange(horizon + 1), self.ends_N[:, None])
        return sums[self.ends_N][:, None] - sums[froms_NK]

    def token_counts(self, vocab_size: int, weights_N: np.ndarray) -> np.ndarray:
        """counts_V: how often an epoch learns each token, where row n is seen weights_N[n] times."""
        counts = np.zeros(vocab_size)
        for begin, end, weight in zip(self.begins_N.tolist(), self.ends_N.tolist(), weights_N.tolist(), strict=True):
            learned = self.ids[begin:end][self.mask[begin:end] > 0]
            counts += weight * np.bincount(learned, minlength=vocab_size)
        return counts

    def learns(self) -> np.ndarray:
        """learns_N: whether a head can learn from row n. (No head predicts a row's first two tokens.)"""
        return self.counts(2)[:, 2] > 0

    def contents(self) -> list[bytes]:
        """Each row's ids, as bytes: equal rows have equal ones."""
        ends = zip(self.begins_N.tolist(), self.ends_N.tolist(), strict=True)
        return [self.ids[begin:end].tobytes() for begin, end in ends]

    def sha256(self) -> str:
        """Hash of ids, masks and labels, row by row."""
        digest = hashlib.sha256(self.lengths_N.astype(np.int64).tobytes())
        for begin, end in zip(self.begins_N.tolist(), self.ends_N.tolist(), strict=True):
            digest.update(self.ids[begin:end].tobytes())
            digest.update(self.mask[begin:end].tobytes())
            if self.labels is not None:
                digest.update(self.labels[begin:end].tobytes())
        return digest.hexdigest()


def verified(folder: Path, spec: BaseSpec | None = None) -> dict[str, Any]:
    """The manifest of a folder of rows, after checking every shard against it, that no other shard lies there,
    and, with a spec, that the ids are this base's."""
    if (folder / "asked").is_dir() and not artifacts.is_complete(folder):
        raise DataError(f"{folder}: its rows are not complete; start that draftsmith distill again first")
    facts = artifacts.verify(folder, cure=_cure(folder))
    if facts.get("kind") not in ("rows", "labels"):
        raise DataError(f"{folder}: holds {facts.get('kind') or 'something else'}, not rows")
    for name in ("base", "weights"):
        if not isinstance(facts.get(name, {}), dict):
            raise DataError(f"{folder / artifacts.MANIFEST}: {name} is no JSON object; it is damaged; {_cure(folder)}")
    stray = sorted(p.name for p in folder.glob("rows-*.parquet") if p.name not in facts["files"])
    if stray:
        raise DataError(f"{folder}: {stray[0]} is not in manifest.json; take it away or distil again")
    if spec is not None:
        check_origin(facts, spec, folder)
    return facts


def cure_of_store(folder: Path) -> str:
    """What makes a damaged store whole again."""
    return f"delete it and every {artifacts.MANIFEST} there; the same draftsmith capture … out={folder} makes it again"


def _cure(folder: Path) -> str:
    """What makes a damaged folder of rows or labels whole again."""
    if (folder / "plan.json").is_file():
        return f"delete it and {artifacts.MANIFEST}; the same draftsmith label … out={folder} makes it again"
    if folder.name == "rows" and (folder.parent / "plan.json").is_file():
        return cure_of_store(folder.parent)
    made = f"the same draftsmith distill … out={folder}" if (folder / "asked").is_dir() else "the same command"
    return f"delete {folder}; {made} makes it again"


def read_table(folder: Path, spec: BaseSpec | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Every column of a verified folder of rows, and its manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = verified(folder, spec)
    shards = sorted(name for name in facts["files"] if name.startswith("rows-") and name.endswith(".parquet"))
    if not shards:
        raise DataError(f"{folder}: 0 rows in it; {_cure(folder)}")
    tables = []
    for name in shards:
        try:
            tables.append(pq.read_table(folder / name))
            tables[-1].validate(full=True)  # what Parquet lets pass: texts that are no UTF-8
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            told = " ".join(str(e).split())
            raise DataError(f"{folder / name}: not parquet that we wrote ({told}); {_cure(folder)}") from None
        if (wrong := _unlike_ours(tables[-1])) or tables[-1].schema.names != tables[0].schema.names:
            raise DataError(f"{folder / name}: {wrong or f'other columns than {shards[0]}'}; {_cure(folder)}")
    return pa.concat_tables(tables), facts


def _unlike_ours(table: pa.Table) -> str:
    """What of a table is not as `to_table` makes it; nothing, if it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = {**dict.fromkeys(TEXTS, pa.string()), "seed": pa.int64()}
    listed = {"ids": pa.int32(), "mask": pa.uint8(), "accept": pa.float32()}
    wanted |= {name: pa.large_list(of) for name, of in listed.items()}
    if missing := sorted({*wanted} - {"accept"} - {*table.column_names}):
        return f"its rows have no column {', '.join(missing)}"
    for name in (name for name in wanted if name in table.column_names):
        if table[name].type != wanted[name]:
            return f"column {name} is {table[name].type}, not {wanted[name]}"
    for name in (name for name in listed if name in table.column_names):
        if table[name].null_count or pc.list_flatten(table[name]).null_count:
            return f"column {name} has rows without a value"
        if not pc.all(pc.equal(*(pc.list_value_length(table[of]) for of in ("ids", name)))).as_py():
            return f"column {name} has not one value per id"
    if (pc.max(pc.list_flatten(table["mask"])).as_py() or 0) > 1:
        return "column mask holds other numbers than 0 and 1"
    return ""


def read_folder(folder: Path, spec: BaseSpec | None = None) -> tuple[Rows, dict[str, Any]]:
    """The rows of a folder and its manifest. DataError for damage, another base's ids, or ids outside the
    vocabulary."""
    table, facts = read_table(folder, spec)
    rows = Rows(table)
    if spec is not None and rows.ids.size and not 0 <= rows.ids.min() <= rows.ids.max() < spec.vocab_size:
        wrong = int(np.flatnonzero((rows.ids < 0) | (rows.ids >= spec.vocab_size))[0])
        at = rows[int(np.searchsorted(rows.ends_N, wrong, "right"))]
        raise DataError(
            f"{folder}: {at.source or at.id}: token id {rows.ids[wrong]} is outside the base's vocabulary of"
            f" {spec.vocab_size}; {_cure(folder)}"
        )
    return rows, facts


def check_origin(facts: Mapping[str, Any], spec: BaseSpec, path: Path) -> None:
    """Rows hold ids of one tokenizer; another one, even of the same size, would train on noise."""
    wrote = facts.get("base", {})
    for name in ("tokenizer_sha256", "template_sha256"):
        if wrote.get(name) and wrote[name] != getattr(spec, name):
            raise DataError(
                f"{path}: its rows were written with another {name.split('_')[0]} (base {wrote.get('path')});"
                f" distil them again with this base"
            )
