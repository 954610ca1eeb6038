"""A folder of rows in the making: what is finished survives kill -9, and the same command goes on from there.

    asked/                 what is to be answered, written once: records.jsonl, quarantine.jsonl, manifest.json
    journal/00003.jsonl    answers of a shard that is not full yet: appended, a line per row, tail torn at worst
    rows-00003.parquet     a full shard, published atomically; its journal is gone then
    refused/00003.jsonl    the rows of that shard that can never be answered, and why
    failed-00000.jsonl     what process 0 could not get answered in its last run; tried again in the next
    served.json            what the answers came from, noted before the first one: no other may go on with the job
    manifest.json          written last: every row is out or in quarantine.jsonl

A shard's rows are fixed by their place in `asked`, and process r of w owns every w-th shard, so nothing about who
did what is saved, and the number of processes may change between runs. An open journal is locked, so that processes
of an earlier run that are still alive cannot write a shard together with those of the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from draftsmith import artifacts, faults
from draftsmith.data.records import Record, check_messages
from draftsmith.data.rows import Row, shard_name, to_table, write_shard
from draftsmith.errors import ConfigError, DataError, RowError

ASKED, RECORDS, QUARANTINE = "asked", "records.jsonl", "quarantine.jsonl"
SERVED = "served.json"
Item = tuple[str, Record]  # key (content hash and occurrence), what is asked


def keyed(records: Iterable[Record]) -> list[Item]:
    """Every record under `<hash of what is asked>-<occurrence>`: equal ones stay apart, and none is lost."""
    seen: Counter[str] = Counter()
    items = []
    for record in records:
        name = record.asked[:16]
        items.append((f"{name}-{seen[name]}", record))
        seen[name] += 1
    return items


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Waits until no other process is in here."""
    with artifacts.disk(out, "a lock"), open(out / ".seal.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish_asked(out: Path, records: Iterable[Record], quarantine: Path | None, **facts: Any) -> None:
    """Writes out/asked: from now on the job is these records, whatever becomes of their source."""
    with artifacts.publish(out / ASKED, kind="asked", **facts) as temporary:
        with open(temporary / RECORDS, "w") as f:
            for key, record in keyed(records):
                f.write(json.dumps({"key": key, **_plain(record)}, ensure_ascii=False) + "\n")
        if quarantine is not None and quarantine.exists():
            shutil.copyfile(quarantine, temporary / QUARANTINE)
        else:
            (temporary / QUARANTINE).touch()


def read_asked(out: Path) -> list[Item]:
    """The records of a job, in their order."""
    folder = out / ASKED
    cure = f"delete {out}; the same draftsmith distill … out={out} makes it again"
    if RECORDS not in artifacts.verify(folder, cure=cure)["files"]:
        raise DataError(f"{folder / artifacts.MANIFEST}: does not list {RECORDS}; it is damaged; {cure}")
    items = []
    for number, line in enumerate((folder / RECORDS).read_bytes().splitlines(), start=1):
        try:
            items.append(_item(json.loads(line)))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as e:
            where = f"{folder / RECORDS}:{number}"
            raise DataError(f"{where}: no record of draftsmith's ({type(e).__name__}: {e}); {cure}") from None
    return items


def _item(value: dict[str, Any]) -> Item:
    """What `publish_asked` wrote in a line; any of many errors for what it never writes."""
    key = value.pop("key")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    record = Record(**fields)
    lists = (record.messages, record.ids, record.mask, record.tools, record.later)
    if not all(isinstance(several, tuple) for several in lists):
        raise TypeError("a list is due")
    texts = (key, record.where, record.text, record.prompt, record.completion or "", record.source, record.category)
    if not all(isinstance(text, str) for text in (*texts, *record.later)):
        raise TypeError("a text is due")
    if not all(type(i) is int for i in (*record.ids, *record.mask)):
        raise TypeError("numbers are due")
    if record.messages:
        check_messages(record.messages, record.where)
    if not all(isinstance(group, dict) for group in (record.kept, *record.tools)):
        raise TypeError("an object is due")
    return key, record


def _plain(record: Record) -> dict[str, Any]:
    return {k: v for k, v in vars(record).items() if v not in ((), "", None)}


class Shard:
    """Some consecutive items of a job. settle() or refuse() each key once; publish() when none is missing. Between
    open() and close() or publish() nobody else, in this process or another, can open it."""

    def __init__(self, out: Path, number: int, items: Sequence[Item]) -> None:
        self.out, self.number, self.items = out, number, items
        self.path = out / shard_name(number)
        self.journal = out / "journal" / f"{number:05d}.jsonl"
        self.rows: dict[str, list[Row]] = {}
        self.refused: dict[str, dict[str, Any]] = {}
        self._file: Any = None
        self._left: set[str] = set()
        self._whole = 0  # bytes of the journal that are whole lines

    @property
    def missing(self) -> list[Item]:
        return [(k, r) for k, r in self.items if k not in self.rows and k not in self.refused]

    @property
    def left(self) -> int:
        """How many are missing, of an open shard; asked after every row, so it is not counted anew."""
        return len(self._left)

    def open(self) -> Shard:
        """Reads what an earlier run left in the journal, and cuts a tail that a kill tore; nothing if it is open
        already. ConfigError while another process has it open; a killed one has not."""
        if self._file is not None:
            return self
        with artifacts.disk(self.journal, "the journal"):
            self._file = self._locked()
            try:
                self._read()
            except BaseException:
                self.close()
                raise
        return self

    def _read(self) -> None:
        self._left = {key for key, _ in self.items}
        self._whole = 0
        self._file.seek(0)
        for line in self._file.readall().split(b"\n")[:-1]:
            if not self._remember(line):
                break
            self._whole += len(line) + 1
        self._file.truncate(self._whole)

    def _locked(self) -> Any:
        """The journal, open and this shard's alone until it is closed."""
        while True:
            self.journal.parent.mkdir(exist_ok=True)  # in a folder that is there: one that was removed stays away
            # unbuffered: a buffer that the disk refused would be written again on closing
            file = open(self.journal, "ab+", buffering=0)  # noqa: SIM115 (closed by publish or close)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self.journal)):
                        return file
            except BlockingIOError:
                file.close()
                raise ConfigError(f"{self.journal}: is being written by another process; let it end") from None
            except BaseException:
                file.close()
                raise
            file.close()  # its writer published the shard, and removed this file, before we had the lock

    def settle(self, key: str, rows: Sequence[Row]) -> None:
        """These are the rows of `key`: a kill leaves them, a power cut too once sync() returned."""
        self._append({"key": key, "rows": [dataclasses.asdict(r) for r in rows]})

    def refuse(self, key: str, why: RowError) -> None:
        """`key` can never be answered; on disk as settle() says."""
        self._append({"key": key, "refused": {"where": why.where, "reason": why.reason, "detail": why.detail}})

    def sync(self) -> None:
        """What was noted is on the disk when this returns: one call for many rows."""
        if self._file is not None:
            with artifacts.disk(self.journal, "the journal"):
                os.fdatasync(self._file.fileno())

    def publish(self) -> None:
        """The shard under its final name; rows in the order of the items, so the same rows are the same bytes.
        DataError if rows are missing, or the whole folder is sealed already."""
        if missing := len(self.missing):
            raise DataError(f"{self.path}: {missing} of {len(self.items)} rows are missing; it cannot be published")
        if artifacts.is_complete(self.out):
            raise DataError(f"{self.out}: is complete already; {self.path.name} stays as it is")
        refused = [self.refused[key] for key, _ in self.items if key in self.refused]
        listed = self.out / "refused" / f"{self.number:05d}.jsonl"
        with artifacts.disk(listed, "a shard"):
            listed.parent.mkdir(exist_ok=True)
            write_lines(listed, refused)
        faults.point("shard.refused")
        write_shard(self.path, to_table([row for key, _ in self.items for row in self.rows.get(key, [])]))
        faults.point("shard.named")
        self.discard()
        faults.point("shard.published")

    def discard(self) -> None:
        """Closes the journal and removes it, in an order that leaves nobody else with a file without a name."""
        with artifacts.disk(self.journal, "the journal"):
            self.journal.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Lets go of the journal and of what it holds; open() reads it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.rows, self.refused, self._left = {}, {}, set()

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        faults.point("row.answered")
        with artifacts.disk(self.journal, "the journal"):
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):  # half a line would spoil those that follow it
                    self._file.truncate(self._whole)
                raise
        self._whole += len(line)
        faults.point("row.written")
        readable = self._remember(line)
        assert readable

    def _remember(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            if "refused" in entry:
                self.refused[entry["key"]] = {"key": entry["key"], **entry["refused"]}
            else:
                self.rows[entry["key"]] = [Row(**row) for row in entry["rows"]]
        except (ValueError, RecursionError, KeyError, TypeError):
            return False
        self._left.discard(entry["key"])
        return True


class Job:
    """The shards of `out`, of which this process does every world-th that is not published yet."""

    def __init__(self, out: Path, shard_rows: int, *, rank: int = 0, world: int = 1) -> None:
        self.out, self.rank, self.world = out, rank, world
        self.items = read_asked(out)
        cuts = range(0, max(1, len(self.items)), shard_rows)
        self.shards = [Shard(out, n, self.items[at : at + shard_rows]) for n, at in enumerate(cuts)]
        self.failed: dict[str, str] = {}

    def todo(self) -> Iterator[Shard]:
        """This process's open shards, journals read. ConfigError at one that another process is still writing."""
        for shard in self.shards[self.rank :: self.world]:
            if shard.path.exists():
                continue
            shard.open()
            if shard.path.exists():  # published by somebody else before we had the lock
                shard.discard()
            else:
                yield shard

    def bind(self, name: str, value: str) -> None:
        """Notes in served.json that the job's answers come from this, for all its processes and runs. ConfigError
        if it was noted otherwise before."""
        with alone(self.out):
            bound = self._bound()
            if name not in bound:
                artifacts.write_json(self.out / SERVED, {**bound, name: value})
            elif bound[name] != value:
                raise ConfigError(
                    f"{self.out / SERVED}: the {name} is '{value}' now and was '{bound[name]}' when this job began;"
                    " go on with that one, or choose another folder"
                )

    def _bound(self) -> dict[str, str]:
        path = self.out / SERVED
        return artifacts.read_object(path) if path.exists() else {}

    def fail(self, key: str, why: str) -> None:
        """`key` got no answer this time; its shard stays open for the next run."""
        self.failed[key] = why

    def tell_failed(self) -> Path:
        """failed-<rank>.jsonl: what this run could not get answered."""
        path = self.out / f"failed-{self.rank:05d}.jsonl"
        wheres = {key: record.where for key, record in self.items}
        if self.failed:
            write_lines(path, [{"key": k, "where": wheres[k], "why": why} for k, why in self.failed.items()])
        else:
            path.unlink(missing_ok=True)
        return path

    def seal(self, **facts: Any) -> bool:
        """Marks the folder complete once every process's shards are there; False before. Whichever process is
        last does it. DataError unless the rows and the quarantine are, together, exactly what was asked. What was
        bound goes into the manifest, under `served`."""
        with alone(self.out):
            if artifacts.is_complete(self.out):
                return True
            if not all(shard.path.exists() for shard in self.shards):
                return False
            refused = [line for s in self.shards for line in _lines(self.out / "refused" / f"{s.number:05d}.jsonl")]
            kept, counts = self._checked({line["key"] for line in refused})
            before = _lines(self.out / ASKED / QUARANTINE)
            write_lines(self.out / QUARANTINE, [*before, *refused])
            reasons = Counter(line["reason"] for line in [*before, *refused])
            funnel = {"in": len(self.items) + len(before), "kept": kept, "quarantined": dict(sorted(reasons.items()))}
            if not kept:
                told = ", ".join(f"{reason} {n}" for reason, n in reasons.items())
                raise DataError(f"{self.out}: 0 of {funnel['in']} rows left ({told}); see {self.out / QUARANTINE}")
            names = [s.path.name for s in self.shards] + [QUARANTINE, f"{ASKED}/{RECORDS}"]
            if bound := self._bound():
                facts["served"] = bound
            artifacts.seal(self.out, names, kind="rows", funnel=funnel, **counts, **facts)
        tidy(self.out)
        return True

    def _checked(self, refused: set[str]) -> tuple[int, dict[str, Any]]:
        """(conversations kept, counts of rows and tokens); what is out and what was refused is what was asked."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        found: Counter[str] = Counter()
        tokens = learned = 0
        for shard in self.shards:
            table = pq.read_table(shard.path, columns=["id", "ids", "mask"])
            found.update(key for key in table.column("id").to_pylist())
            tokens += pc.sum(pc.list_value_length(table.column("ids"))).as_py() or 0
            learned += pc.sum(pc.list_flatten(table.column("mask"))).as_py() or 0
        conversations = {key.partition("/")[0] for key in found}
        asked = {key for key, _ in self.items}
        twice = [key for key, n in found.items() if n > 1]
        if twice or conversations | refused != asked or conversations & refused:
            lost, alien = asked - conversations - refused, (conversations | refused) - asked
            raise DataError(
                f"{self.out}: {len(lost)} rows lost, {len(twice)} doubled, {len(alien)} never asked for,"
                f" {len(conversations & refused)} both out and refused; the folder was changed by someone else"
            )
        return len(conversations), {"rows": len(found), "tokens": tokens, "learned": learned}


def tidy(out: Path) -> None:
    """Takes away what a complete folder needs no more; a process that was killed in the midst of it leaves some."""
    for litter in ("journal", "refused"):
        shutil.rmtree(out / litter, ignore_errors=True)
    for path in out.glob("failed-*.jsonl"):
        path.unlink(missing_ok=True)
    artifacts.reclaim(out)


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """JSON lines, whole or absent."""
    with artifacts.whole(path) as temporary, open(temporary, "w") as f:
        f.writelines(json.dumps(v, ensure_ascii=False) + "\n" for v in values)


def _lines(path: Path) -> list[dict[str, Any]]:
    with open(path) as f:
        return [json.loads(line) for line in f]
