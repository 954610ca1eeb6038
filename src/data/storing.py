"""Writes a store, shard by shard: what it will cost is told first, and what is on disk already stays.

Shapes: P kept positions, D hidden size, k likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftsmith import artifacts, faults, room
from draftsmith.contracts import BaseView, Batch, Needs
from draftsmith.data import store
from draftsmith.data.journal import ASKED, alone
from draftsmith.data.labels import LOGITS, claim
from draftsmith.data.pack import best_fit, collate
from draftsmith.data.rows import Rows
from draftsmith.data.store import PLAN, ROWS, Kept, Store, StoreConfig, compress, shard_name
from draftsmith.errors import ConfigError, DataError, NumericsError

PROBE = 2**23  # bytes that are written and read to see how fast the disk is
NAMES = {torch.float32: "fp32", torch.float64: "fp32", torch.float16: "fp32", torch.bfloat16: "bf16"}


def kept_of(
    config: StoreConfig, needs: Needs, horizon: int, reads_all: Sequence[str], size: int, dtype: torch.dtype
) -> Kept:
    """What to keep for heads with these needs and this horizon. reads_all: those of them that read every position."""
    if needs.logits:
        raise ConfigError("store: no head of a store may want the base's logits; keep its final and teacher_top_k")
    wants_all = list(reads_all) if config.states else []  # a teacher alone is read where it teaches
    if config.keep == "counted" and wants_all:
        raise ConfigError(f"store.keep=counted: {', '.join(wants_all)} reads every position; choose all, or auto")
    is_counted = config.keep == "counted" or (config.keep == "auto" and not wants_all)
    final = needs.final or (needs.teacher and config.teacher_top_k is None)
    kept = Kept(
        hidden=sorted(needs.hidden) if config.states else [],
        final=final and config.states,
        teacher_top_k=config.teacher_top_k,
        dtype=config.dtype or NAMES[dtype],
        counted=is_counted,
        horizon=horizon if is_counted else None,
        shard_rows=config.shard_rows,
        size=size,
    )
    if not kept.columns():
        raise ConfigError("store: these heads read nothing of the base; there is nothing to keep")
    return kept


@dataclass(frozen=True)
class Part:
    """Some packs of a shard that share a forward. of_P: the positions to keep, counted through the batch; to_P: where
    they stand in the shard."""

    batch: Batch
    of_P: Tensor
    to_P: Tensor
    tokens: int


class Job:
    """The shards of `out`, of which this process writes every world-th that is not there yet."""

    def __init__(
        self,
        out: Path,
        rows: Rows,
        plan: Mapping[str, Mapping[str, Any]],
        base: BaseView,
        config: StoreConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.out, self.rows, self.plan, self.base, self.config = out, rows, plan, base, config
        self.kept = Kept(**plan["store"])
        self.store = Store(out, rows, self.kept, torch.float32)
        self.mine = range(rank, self.store.shards, world)
        longest = int(rows.lengths_N.max(initial=1))
        self.length = config.length or longest
        if longest > min(self.length, base.spec.max_positions):
            row = rows[int(rows.lengths_N.argmax())]
            limit = min(self.length, base.spec.max_positions)
            raise DataError(f"{row.source or row.id}: {longest} tokens do not fit the {limit} of a forward")

    def missing(self, numbers: Sequence[int]) -> list[int]:
        return [n for n in numbers if not (self.out / shard_name(n)).is_file()]

    def to_write(self, source: Path) -> float:
        """Bytes on the disk of what is missing: shards, and the copy of the rows in `source`."""
        shards = self.missing(range(self.store.shards))
        copied = 0 if artifacts.is_complete(self.out / ROWS) else room.taken(source)
        return copied + room.files(self.store.of_shard(n) * self.kept.position_bytes for n in shards)

    def begin(self, source: Path) -> None:
        """The plan and a copy of the rows and of what was asked for them; ConfigError where the folder is another
        plan's."""
        files = list(artifacts.read_json(source / artifacts.MANIFEST)["files"])
        files += sorted({str(p.relative_to(source)) for p in (source / ASKED).glob("*")} - set(files))
        files.sort(key=lambda name: Path(name).name == artifacts.MANIFEST)  # last: from then on a folder is complete
        with alone(self.out):
            claim(self.out, self.plan, what="captures")
            if artifacts.is_complete(self.out / ROWS):
                return
            for name in [*files, artifacts.MANIFEST]:
                target = self.out / ROWS / name
                with artifacts.disk(target, "rows"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                with artifacts.whole(target) as temporary:
                    shutil.copyfile(source / name, temporary)

    def parts(self, number: int) -> Iterator[Part]:
        first, last = self.store.span(number)
        packs = best_fit(self.rows.lengths_N[first:last].tolist(), self.length)
        begin = int(self.store.offsets_N[first])
        for at in range(0, len(packs), self.config.batch_size):
            some = [[first + n for n in pack] for pack in packs[at : at + self.config.batch_size]]
            of: list[np.ndarray] = []
            to: list[np.ndarray] = []
            tokens = 0
            for b, pack in enumerate(some):
                start = b * self.length
                for row in pack:
                    own = int(self.rows.lengths_N[row])
                    at_P = self.store.at(row, own)
                    of.append(start + at_P)
                    to.append(int(self.store.offsets_N[row]) - begin + np.arange(len(at_P)))
                    start += own
                    tokens += own
            batch = collate([[self.rows[n] for n in pack] for pack in some], self.length, torch.zeros(1))
            yield Part(batch, torch.from_numpy(np.concatenate(of)), torch.from_numpy(np.concatenate(to)), tokens)

    def captured(self, part: Part) -> dict[str, Tensor]:
        """The kept positions of a part, in the store's format, on the CPU."""
        rows, tokens = part.batch.tokens_BT.shape
        smaller = room.halved(("store.batch_size", rows), f"store.length, now {tokens}")
        with room.memory(f"capture: a batch of {rows} x {tokens} tokens", smaller):
            return self._forward(part)

    @torch.no_grad()
    def _forward(self, part: Part) -> dict[str, Tensor]:
        device, kept = self.base.lm_head_weight.device, self.kept
        batch, of_P = part.batch.to(device), part.of_P.to(device)
        needs = Needs(frozenset(kept.hidden), final=kept.final, teacher=kept.teacher_top_k is not None)
        seen = self.base.capture(
            needs, batch.tokens_BT, positions_BQ=batch.positions_BT, documents_BQ=batch.documents_BT
        )
        flat = seen.each(lambda t: t.flatten(0, 1)[of_P])
        found: dict[str, Tensor] = {}
        states = {f"hidden.{layer}": flat.hidden[layer] for layer in kept.hidden}
        if kept.final and flat.final is not None:
            states["final"] = flat.final
        for name, x_PD in states.items():
            if not bool(x_PD.isfinite().all()):
                raise NumericsError(f"base: {name} of its capture is not finite; try base.dtype=float32")
            found |= compress(name, x_PD, store.FORMATS[kept.dtype])
        if kept.teacher_top_k is not None and flat.final is not None:
            found |= self._likeliest(flat.final, kept.teacher_top_k)
        return {name: t.cpu() for name, t in found.items()}

    def _likeliest(self, final_PD: Tensor, top_k: int) -> dict[str, Tensor]:
        columns, values, ids = self.kept.columns(), [], []
        for some_PD in final_PD.split(max(1, LOGITS // self.base.spec.vocab_size)):
            logits_Pk, ids_Pk = self.base.lm_head(some_PD[None])[0].float().topk(top_k, -1)
            values.append((logits_Pk - logits_Pk[:, :1]).to(columns[store.LOGITS][0]))
            ids.append(ids_Pk.to(columns[store.IDS][0]))
        empty = final_PD.new_zeros(0, top_k)
        return {store.IDS: torch.cat(ids or [empty]), store.LOGITS: torch.cat(values or [empty])}

    def write(self, number: int) -> None:
        """One shard, whole or absent."""
        positions = self.store.of_shard(number)
        made = {n: torch.empty(positions, *shape, dtype=of) for n, (of, shape) in self.kept.columns().items()}
        for part in self.parts(number):
            for name, values in self.captured(part).items():
                made[name][part.to_P] = values
        path = self.out / shard_name(number)
        for litter in self.out.glob(f".{path.stem}.tmp-*"):  # nobody else writes this shard, on whatever machine
            litter.unlink(missing_ok=True)
        with artifacts.whole(path) as temporary:
            artifacts.write_tensors(temporary, made, {"store": store.mark(self.plan, number)})
            faults.point("store.made")

    def run(self, say: Callable[[str], None]) -> None:
        todo = self.missing(self.mine)
        for n, number in enumerate(todo):
            began = time.perf_counter()
            self.write(number)
            first, last = self.store.span(number)
            rate = int(self.rows.lengths_N[first:last].sum()) / (time.perf_counter() - began)
            say(f"{shard_name(number)}: {n + 1} of {len(todo)} shards, {rate:,.0f} tokens/s")

    def seal(self, **facts: Any) -> bool:
        """Marks the folder complete once every process's shards are there; False before. The last process does it."""
        with alone(self.out):
            if artifacts.is_complete(self.out):
                return True
            if self.missing(range(self.store.shards)):
                return False
            rows = artifacts.read_json(self.out / ROWS / artifacts.MANIFEST)["files"]
            names = [PLAN, *(f"{ROWS}/{name}" for name in [*rows, artifacts.MANIFEST])]
            names += [shard_name(n) for n in range(self.store.shards)]
            for folder in (self.out, self.out / ROWS, self.out / ROWS / ASKED):
                artifacts.reclaim(folder)
            artifacts.seal(self.out, names, kind="store", **facts)
        return True

    def forecast(self) -> str:
        """What the store will hold and cost, from one timed forward and a few MB written and read."""
        positions, each = int(self.store.offsets_N[-1]), self.kept.position_bytes
        todo = self.missing(self.mine)
        if not todo or not positions:
            return f"store: {positions:,} positions x {each:,} bytes = {room.size(positions * each)}"
        part = next(self.parts(todo[0]))
        self.captured(part)  # the first one is slower
        began = time.perf_counter()
        values = self.captured(part)
        forward = (time.perf_counter() - began) / max(1, part.tokens)
        write, read = self._probe(values)
        tokens = int(self.rows.lengths_N.sum())
        total, own = tokens * forward, sum(self.store.of_shard(n) for n in todo) / positions
        w, r = positions * each * write, positions * each * read
        epoch = break_even(total, w + r, r)  # every start hashes all of it once
        pays = "reading it takes longer than the base's forward: it never pays" if epoch is None else ""
        return (
            f"store: {positions:,} positions of {tokens:,} x {each:,} bytes = {room.size(positions * each)};"
            f" capturing ~{(total + w) * own / 3600:.2g} h; {pays or f'pays from epoch {epoch}'}"
        )

    def _probe(self, values: Mapping[str, Tensor]) -> tuple[float, float]:
        """Seconds to write and to read a byte."""
        one = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in values.values()]).numpy().tobytes()
        data = (one * (PROBE // max(1, len(one)) + 1))[:PROBE]
        path = self.out / f".probe.{os.getpid()}.tmp"
        try:
            with artifacts.disk(path, "a probe"):
                began = time.perf_counter()
                with open(path, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                written = time.perf_counter()
                np.memmap(path, np.uint8, mode="r").copy()
                return (written - began) / PROBE, (time.perf_counter() - written) / PROBE
        finally:
            path.unlink(missing_ok=True)


def break_even(forward: float, write: float, read: float) -> int | None:
    """The first epoch whose end a run with a store reaches sooner, E > (B + W) / (B - R), in seconds per epoch; None:
    never."""
    return None if read >= forward else int((forward + write) // (forward - read)) + 1
