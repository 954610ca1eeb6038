"""The store: captures on disk, a file for so many rows, read where they lie.

    plan.json                    what the store is: its base, its rows, what is kept of them and how
    rows/                        the folder of rows, as it was
    captures-00003.safetensors   of rows 3 * shard_rows on: the kept positions of one row after those of another
    manifest.json                written last: sizes and sha256 of everything

Documents of a packed sequence never see each other, so that a row's capture is the same however it is packed (up to
rounding): kept by row, it is put together for whatever pack training makes. Where only positions that predict a
counted target are kept, the others are NaN, so that whoever looks there is found out.

Shapes: P kept positions, D hidden size, k likeliest tokens, V vocabulary, B packs, T positions of a pack.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith import artifacts, config
from draftsmith.artifacts import fingerprint
from draftsmith.contracts import BaseSpec, BaseView, Capture, Needs
from draftsmith.data.rows import Rows, cure_of_store, read_folder
from draftsmith.errors import ConfigError, DataError

PLAN, ROWS = "plan.json", "rows"
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what a position's largest number becomes
KEEP = ("auto", "all", "counted")
CHECKED = 8  # rows that are computed again when a training starts
# Largest relative error of such a row, by the base's dtype: another packing rounds otherwise. One position off is
# about 1.
TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
ROUGH = 0.05  # bf16, fp16
LARGE = 2**31  # no count in a plan is
BLOCK = 8192  # rows whose positions are counted at a time
IDS, LOGITS = "likeliest.ids", "likeliest.logits"


@dataclass(frozen=True)
class StoreConfig:
    """batch_size packs of `length` tokens share a forward; they are no part of what the store is."""

    dtype: str | None = None  # fp32 | bf16 | int8 | fp8; null: the base's
    keep: str = "auto"  # all | counted: positions that predict a counted target; auto: counted where every head can
    states: bool = True  # False: nothing but the teacher
    teacher_top_k: int | None = None  # also the so many likeliest next tokens of every kept position
    batch_size: int = 8
    length: int | None = None  # null: the longest row's
    shard_rows: int = 256

    def __post_init__(self) -> None:
        for name, choices in (("dtype", (None, *FORMATS)), ("keep", KEEP)):
            if getattr(self, name) not in choices:
                told = ", ".join(c or "null" for c in choices)
                raise ConfigError(f"{name}='{getattr(self, name)}': choose one of {told}")
        if not self.states and self.teacher_top_k is None:
            raise ConfigError("states, teacher_top_k: nothing would be kept; give teacher_top_k, as 32")
        for name in ("teacher_top_k", "batch_size", "length", "shard_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")


@dataclass(frozen=True)
class Kept:
    """What a store keeps of which positions. horizon: with `counted`, how far ahead a counted target may lie."""

    hidden: list[int]
    final: bool
    teacher_top_k: int | None
    dtype: str
    counted: bool
    horizon: int | None
    shard_rows: int
    size: int  # D

    @property
    def needs(self) -> Needs:
        return Needs(frozenset(self.hidden), final=self.final, teacher=self.teacher_top_k is not None)

    @property
    def states(self) -> list[str]:
        return [*(f"hidden.{layer}" for layer in self.hidden), *(["final"] if self.final else [])]

    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """tensor of a shard -> its dtype, and its shape behind the P axis."""
        dtype = FORMATS[self.dtype]
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in self.states:
            found[name] = (dtype, (self.size,))
            if dtype in LARGEST:
                found[f"{name}.scale"] = (torch.float32, ())
        if self.teacher_top_k is not None:
            found[IDS] = (torch.int32, (self.teacher_top_k,))
            exact = torch.float32 if self.dtype == "fp32" else torch.float16
            found[LOGITS] = (exact, (self.teacher_top_k,))
        return found

    @property
    def position_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.columns().values())

    def positions(self, rows: Rows) -> np.ndarray:
        """Which of the tokens of `rows` have their position kept, as flags over rows.mask."""
        return counted(rows, self.horizon or 0) if self.counted else every(rows)


def every(rows: Rows) -> np.ndarray:
    """Every position of these rows, as flags over rows.mask."""
    flags = np.zeros(len(rows.mask), dtype=bool)
    for begin, end in zip(rows.begins_N.tolist(), rows.ends_N.tolist(), strict=True):
        flags[begin:end] = True
    return flags


def counted(rows: Rows, horizon: int) -> np.ndarray:
    """The positions of these rows from which some token 1..horizon ahead is learned, as flags over rows.mask."""
    flags = np.zeros(len(rows.mask), dtype=bool)
    sums = np.concatenate([[0], np.cumsum(rows.mask != 0, dtype=np.int64)])
    for first in range(0, len(rows), BLOCK):
        begins, ends = rows.begins_N[first : first + BLOCK], rows.ends_N[first : first + BLOCK]
        lengths = ends - begins
        starts = np.cumsum(lengths) - lengths
        at, last = np.repeat(begins - starts, lengths) + np.arange(lengths.sum()), np.repeat(ends, lengths)
        flags[at] = sums[np.minimum(at + horizon + 1, last)] > sums[np.minimum(at + 1, last)]
    return flags


def shard_name(number: int) -> str:
    return f"captures-{number:05d}.safetensors"


def mark(plan: Mapping[str, Any], number: int) -> str:
    """What the header of a shard tells of whose it is."""
    return f"{fingerprint(plan)} {number}"


def compress(name: str, x_PD: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """x as a store keeps it: as it is, or over a scale per position."""
    if dtype not in LARGEST:
        return {name: x_PD.to(dtype)}
    x_PD = x_PD.float()
    scale_P = (x_PD.abs().amax(-1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    x_PD = x_PD / scale_P[:, None]
    return {name: (x_PD.round() if dtype == torch.int8 else x_PD).to(dtype), f"{name}.scale": scale_P}


def expand(x_PD: Tensor, scale_P: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What compress kept, in dtype."""
    return x_PD.to(dtype) if scale_P is None else (x_PD.float() * scale_P[:, None]).to(dtype)


def mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in the file's own memory, and what its header tells; keeps no file open."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path}: no safetensors file that draftsmith capture wrote ({e}); capture again") from None


class Store:
    """The captures of a folder, row by row. dtype: of what it gives. Shards are mapped when they are first read."""

    def __init__(self, folder: Path, rows: Rows, kept: Kept, dtype: torch.dtype) -> None:
        self.folder, self.rows, self.kept, self.dtype = folder, rows, kept, dtype
        self.flags = kept.positions(rows)
        before = np.concatenate([[0], np.cumsum(self.flags, dtype=np.int64)])
        self.offsets_N = np.concatenate([[0], np.cumsum(before[rows.ends_N] - before[rows.begins_N])])
        self.reads = kept.needs  # what of it is read
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}  # another process maps the files itself

    @property
    def shards(self) -> int:
        return -(-len(self.rows) // self.kept.shard_rows)

    def span(self, number: int) -> tuple[int, int]:
        """first and last + 1 of a shard's rows."""
        return number * self.kept.shard_rows, min((number + 1) * self.kept.shard_rows, len(self.rows))

    def of_shard(self, number: int) -> int:
        """How many positions it keeps."""
        first, last = self.span(number)
        return int(self.offsets_N[last] - self.offsets_N[first])

    def at(self, row: int, tokens: int) -> np.ndarray:
        """The kept ones of a row's first positions."""
        begin = self.rows.begins_N[row]
        return np.flatnonzero(self.flags[begin : begin + tokens])

    def shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            self._shards[number] = mapped(self.folder / shard_name(number))[0]
        return self._shards[number]

    def _names(self) -> list[str]:
        return [*(f"hidden.{layer}" for layer in sorted(self.reads.hidden)), *(["final"] if self.reads.final else [])]

    def seen(self, packs: Sequence[Sequence[tuple[int, int]]], length: int) -> Capture:
        """The captures of packs of (row of the store, how many of its tokens), as `collate` lays them out. Padding is 0
        where every position is kept, else NaN like all that is not."""
        fill = float("nan") if self.kept.counted else 0.0
        shape = (len(packs), length)
        states = {name: torch.full((*shape, self.kept.size), fill, dtype=self.dtype) for name in self._names()}
        ids = logits = None
        if self.reads.teacher:
            wide = (*shape, self.kept.teacher_top_k or 0)
            ids, logits = torch.zeros(wide, dtype=torch.long), torch.full(wide, fill, dtype=torch.float32)
        for b, pack in enumerate(packs):
            start = 0
            for row, tokens in pack:
                at_P = self.at(row, tokens)
                where = torch.from_numpy(start + at_P) if self.kept.counted else slice(start, start + tokens)
                number = row // self.kept.shard_rows
                first = int(self.offsets_N[row] - self.offsets_N[number * self.kept.shard_rows])
                of, shard = slice(first, first + len(at_P)), self.shard(number)
                for name, out in states.items():
                    scale = shard.get(f"{name}.scale")
                    out[b, where] = expand(shard[name][of], None if scale is None else scale[of], self.dtype)
                if ids is not None and logits is not None:
                    ids[b, where], logits[b, where] = shard[IDS][of].long(), shard[LOGITS][of].float()
                start += tokens
        hidden = {int(name.removeprefix("hidden.")): t for name, t in states.items() if name != "final"}
        likeliest = None if ids is None or logits is None else (ids, logits)
        return Capture(hidden, states.get("final"), likeliest=likeliest)

    def seen_of(self, rows: Rows, packs: Sequence[Sequence[int]], length: int) -> Capture:
        """The captures of packs of rows that were chosen from the store's."""
        told = [[(int(rows.at_N[n]), int(rows.ends_N[n] - rows.begins_N[n])) for n in pack] for pack in packs]
        return self.seen(told, length)


def open_store(folder: Path, base: Mapping[str, Any], spec: BaseSpec, dtype: torch.dtype) -> Store:
    """The store of a folder, undamaged and whole, of this base (labels.identity). DataError names what is wrong, and
    the shard."""
    plan = artifacts.read_object(folder / PLAN)
    theirs, rows, told = (plan.get(part) for part in ("base", "rows", "store"))
    if not (isinstance(theirs, dict) and isinstance(rows, dict) and isinstance(told, dict)):
        raise DataError(f"{folder / PLAN}: does not tell base, rows and store; it is damaged; capture again")
    check_base(folder, theirs, base)
    kept = _kept(told, folder / PLAN, spec)
    store = Store(folder, read_folder(folder / ROWS, spec)[0], kept, dtype)
    if artifacts.file_sha256(folder / ROWS / artifacts.MANIFEST) != rows.get("manifest_sha256"):
        raise DataError(f"{folder / ROWS}: other rows than those that were captured; capture again")
    named = artifacts.read_object(folder / artifacts.MANIFEST)["files"]
    for number in range(store.shards):
        path = folder / shard_name(number)
        if path.name not in named:
            raise DataError(f"{path}: is not in {artifacts.MANIFEST}; capture again")
        tensors, header = mapped(path)
        if header.get("store") != mark(plan, number):
            raise DataError(f"{path}: belongs to another store, of another base or other rows; capture again")
        for name, (of, shape) in kept.columns().items():
            have = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else None
            if have != (want := (of, (store.of_shard(number), *shape))):
                raise DataError(f"{path}: {name} is {have}, not {want}; capture again")
    return store


def _kept(told: Mapping[str, Any], path: Path, spec: BaseSpec) -> Kept:
    """What a plan says is kept."""
    try:
        kept = config.typed(told, Kept, f"{path}: store")
    except ConfigError as e:
        raise DataError(f"{e}; it is damaged; capture again") from None
    top_k, horizon = kept.teacher_top_k, kept.horizon
    if (
        kept.dtype not in FORMATS
        or not all(0 <= layer <= spec.num_layers for layer in kept.hidden)
        or any(n is not None and not 1 <= n < LARGE for n in (top_k, horizon, kept.shard_rows, kept.size))
    ):
        raise DataError(f"{path}: store: values that draftsmith capture never writes; it is damaged; capture again")
    return kept


def verify(folder: Path) -> None:
    """DataError unless every file of the store is as its manifest says, and no other shard lies there."""
    facts = artifacts.verify(folder, cure=cure_of_store(folder))
    if facts.get("kind") != "store":
        raise DataError(f"{folder}: holds {facts.get('kind') or 'something else'}, not a store")
    stray = sorted(p.name for p in folder.glob("captures-*") if p.name not in facts["files"])
    if stray:
        raise DataError(f"{folder / stray[0]}: is not in {artifacts.MANIFEST}; take it away or capture again")


def check_base(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """DataError if the store's captures are not this base's."""
    now = json.loads(json.dumps(ours))
    changed = sorted(k for k in {*theirs, *now} if theirs.get(k) != now.get(k))
    if changed:
        raise DataError(
            f"{folder}: its captures are those of another base, or of this one in another dtype"
            f" ({', '.join(changed)} differ); capture again with this one"
        )


def compare(store: Store, base: BaseView) -> int:
    """Computes some rows again, others at every start and of as many shards as there are, and compares what is read of
    them; returns how many. DataError names shard and row where they differ by more than another packing would round."""
    some = np.random.default_rng().permutation(np.flatnonzero(np.diff(store.offsets_N) > 0))
    _, first = np.unique(some // store.kept.shard_rows, return_index=True)
    some = np.concatenate([np.random.default_rng().permutation(some[first]), np.delete(some, first)])[:CHECKED]
    most = TOLERANCE.get(store.dtype, ROUGH) if not base.spec.quantised else ROUGH
    for row in some.tolist():
        tokens = store.rows[row]
        ids_BT = torch.from_numpy(np.array(tokens.ids, dtype=np.int64))[None]
        kept = store.seen([[(row, len(tokens.ids))]], len(tokens.ids))
        fresh = base.capture(store.reads, ids_BT.to(base.lm_head_weight.device))
        at_P = torch.from_numpy(store.at(row, len(tokens.ids)))
        for name, error in _errors(store, base, kept, fresh, at_P).items():
            if not error <= most:
                path = store.folder / shard_name(row // store.kept.shard_rows)
                raise DataError(
                    f"{path}: row {row} ({tokens.source or tokens.id}): {name} differs from what the base computes by"
                    f" {error:.3g} (relative; at most {most}); the store is stale or shifted: capture again"
                )
    return len(some)


def _errors(store: Store, base: BaseView, kept: Capture, fresh: Capture, at_P: Tensor) -> dict[str, float]:
    """What is read of a row -> relative error of its middle position (one huge state would hide the others in a norm
    of all). The base's own goes through the store's format first."""

    def away(a_PD: Tensor, b_PD: Tensor) -> float:
        a_PD, b_PD = a_PD.float(), b_PD.float()
        return float(((a_PD - b_PD).norm(dim=-1) / b_PD.norm(dim=-1).clamp(min=1e-6)).median())

    found, dtype = {}, FORMATS[store.kept.dtype]
    pairs = {f"hidden.{layer}": (kept.hidden[layer], fresh.hidden[layer]) for layer in store.reads.hidden}
    if kept.final is not None and fresh.final is not None:
        pairs["final"] = (kept.final, fresh.final)
    for name, (old_BTD, new_BTD) in pairs.items():
        new = compress("", new_BTD[0].cpu()[at_P], dtype)
        found[name] = away(old_BTD[0, at_P], expand(new[""], new.get(".scale"), store.dtype))
    if kept.likeliest is not None and fresh.final is not None:
        ids_Pk, old_Pk = (t[0, at_P] for t in kept.likeliest)
        logits_PV = base.lm_head(fresh.final[:, at_P.to(fresh.final.device)])[0].float().cpu()
        new_Pk = logits_PV.gather(1, ids_Pk) - logits_PV.amax(1, keepdim=True)
        found["the teacher"] = float((old_Pk - new_Pk).norm() / new_Pk.norm().clamp(min=1))
    return found


def identity(kept: Kept) -> dict[str, Any]:
    """What a plan says of what is kept."""
    return dataclasses.asdict(kept)
