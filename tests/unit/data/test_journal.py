"""Folders of rows in the making: torn tails, full disks, exact resumption, the final count."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts
from draftsmith.data.journal import Job, Shard, keyed, publish_asked, read_asked
from draftsmith.data.records import Record
from draftsmith.data.rows import Row
from draftsmith.errors import DataError, ResourceError, RowError


def records(count: int) -> list[Record]:
    return [Record(f"p:{i}", prompt=f"ask {i} ü\r") for i in range(count)]


def row(key: str) -> Row:
    return Row(key, [1, 2, 3], [0, 1, 1], "p:0", said=json.dumps({"prompt": "x\ny"}), finish="stop")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    publish_asked(tmp_path / "out", records(10), None)
    return Job(tmp_path / "out", 4)


def settle_all(job: Job) -> None:
    for shard in job.todo():
        for key, _ in shard.missing:
            shard.settle(key, [row(key)])
        shard.publish()


def test_equal_records_stay_apart() -> None:
    twice = [Record("a:0", prompt="x"), Record("b:0", prompt="x"), Record("c:0", prompt="y")]
    keys = [key for key, _ in keyed(twice)]
    assert keys[0][:16] == keys[1][:16] != keys[2][:16]
    assert [k[16:] for k in keys] == ["-0", "-1", "-0"]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    chat = ({"role": "user", "content": "ü\u2028\n"}, {"role": "assistant", "content": "b"})
    given = [
        Record("a:0", messages=chat, source="s"),
        Record("a:1", prompt="p", completion="c"),
        Record("a:2", ids=(1, 2), mask=(0, 1)),
    ]
    publish_asked(tmp_path, given, None)
    read = [record for _, record in read_asked(tmp_path)]
    assert read == given


def test_a_tail_torn_anywhere_costs_its_row_alone(tmp_path: Path, job: Job) -> None:
    """Cut at every byte of the last line: what stands before it is kept, and the row is settled again."""
    shard = next(job.todo())
    (first, _), (second, _), *_ = shard.items
    shard.settle(first, [row(first)])
    before = shard.journal.stat().st_size
    shard.settle(second, [row(second)])
    whole = shard.journal.read_bytes()
    shard.close()
    for cut in range(before, len(whole) + 1):
        shard.journal.write_bytes(whole[:cut])
        again = Shard(job.out, 0, shard.items).open()
        kept = [first] if cut < len(whole) else [first, second]
        assert list(again.rows) == kept, cut
        assert shard.journal.stat().st_size == (before if cut < len(whole) else len(whole))
        if cut < len(whole):
            again.settle(second, [row(second)])
        again.close()
        assert shard.journal.read_bytes() == whole


@pytest.mark.parametrize(
    "tail", [b"\0" * 64, b"\0" * 64 + b"\n", b"{}\n", b"3\n", b'{"key": "x", "rows": [{}]}\n', b"\xff\n"]
)
def test_a_tail_of_rubbish_is_cut(job: Job, tail: bytes) -> None:
    shard = next(job.todo())
    key = shard.items[0][0]
    shard.settle(key, [row(key)])
    shard.close()
    whole = shard.journal.read_bytes()
    shard.journal.write_bytes(whole + tail)
    again = shard.open()
    assert list(again.rows) == [key]
    assert again.journal.read_bytes() == whole


def test_a_full_disk_leaves_whole_lines(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line was written when the disk refused: it is gone, and what is written later is read."""
    shard = next(job.todo())
    (first, _), (second, _), (third, _), *_ = shard.items
    shard.settle(first, [row(first)])

    class Full:
        """Takes half of what it is given."""

        def __init__(self, file: Any) -> None:
            self.file, self.truncate = file, file.truncate

        def write(self, line: bytes) -> int:
            return self.file.write(line[: len(line) // 2])

    with monkeypatch.context() as m:
        m.setattr(shard, "_file", Full(shard._file))
        with pytest.raises(ResourceError, match="No space left"):
            shard.settle(second, [row(second)])
    assert second not in shard.rows
    shard.settle(third, [row(third)])
    shard.close()
    assert list(shard.open().rows) == [first, third]


def test_refusals_survive(job: Job) -> None:
    shard = next(job.todo())
    shard.refuse(shard.items[1][0], RowError("p:1", "cut", "why"))
    shard.close()
    shard.open()
    assert [k for k, _ in shard.missing] == [k for k, _ in shard.items if k != shard.items[1][0]]
    assert shard.refused[shard.items[1][0]]["reason"] == "cut"


@pytest.mark.parametrize("order", [1, -1])
def test_bytes_do_not_depend_on_the_order_of_answers(tmp_path: Path, order: int) -> None:
    published = []
    for n, way in enumerate((1, order)):
        out = tmp_path / str(n)
        publish_asked(out, records(4), None)
        shard = next(Job(out, 4).todo())
        for key, _ in shard.items[::way]:
            shard.settle(key, [row(key)])
        shard.publish()
        published.append(shard.path.read_bytes())
        assert not shard.journal.exists()
    assert published[0] == published[-1]


def test_processes_own_shards_in_turn(job: Job) -> None:
    owned = [[s.number for s in Job(job.out, 4, rank=r, world=2).todo()] for r in range(2)]
    assert owned == [[0, 2], [1]]


def test_failed_rows_are_told_and_forgotten(job: Job) -> None:
    key = job.items[3][0]
    job.fail(key, "no answer")
    path = job.tell_failed()
    assert json.loads(path.read_text()) == {"key": key, "where": "p:3", "why": "no answer"}
    assert not Job(job.out, 4).tell_failed().exists()


def test_a_job_is_sealed_when_all_of_it_is_there(job: Job) -> None:
    shards = list(job.todo())
    for shard in shards:
        for key, _ in shard.missing[1:]:
            shard.settle(key, [row(key)])
    assert not job.seal()
    for n, shard in enumerate(shards):
        shard.refuse(shard.missing[0][0], RowError("w", "cut", "d")) if n else shard.settle(shard.missing[0][0], [])
        if n:
            shard.publish()
    assert not job.seal()
    shards[0].settle(shards[0].items[0][0], [row(shards[0].items[0][0])])
    shards[0].publish()
    assert job.seal(colour="red")
    assert job.seal()
    facts = artifacts.verify(job.out)
    assert facts["funnel"] == {"in": 10, "kept": 8, "quarantined": {"cut": 2}}
    assert (facts["rows"], facts["tokens"], facts["learned"], facts["colour"]) == (8, 24, 16, "red")
    assert sorted(p.name for p in job.out.iterdir() if not p.name.startswith(".")) == [
        "asked", "manifest.json", "quarantine.jsonl", "rows-00000.parquet", "rows-00001.parquet", "rows-00002.parquet",
    ]  # fmt: skip


def alien(job: Job) -> None:
    settle_all(job)
    shard = Shard(job.out, 0, job.shards[0].items).open()
    shard.rows = {key: [row(key)] for key, _ in shard.items}
    shard.rows[shard.items[0][0]] = [row("alien-0")]
    shard.publish()


def doubled(job: Job) -> None:
    settle_all(job)
    shard = Shard(job.out, 0, job.shards[0].items).open()
    shard.rows = {key: [row(key)] for key, _ in shard.items}
    shard.rows[shard.items[0][0]] *= 2
    shard.publish()


@pytest.mark.parametrize(("spoil", "match"), [(alien, "1 rows lost, 0 doubled, 1 never"), (doubled, "1 doubled")])
def test_what_does_not_add_up_is_not_sealed(job: Job, spoil: Any, match: str) -> None:
    spoil(job)
    with pytest.raises(DataError, match=match):
        job.seal()
    assert not artifacts.is_complete(job.out)
