"""Folders of rows in the making: torn tails, full disks, exact resumption, the final count."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts
from draftsmith.data import journal
from draftsmith.data.journal import Job, Shard, keyed, publish_asked, read_asked
from draftsmith.data.records import Record
from draftsmith.data.rows import Row
from draftsmith.errors import ConfigError, DataError, ResourceError, RowError


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
        Record("a:3", messages=chat[:1], later=("c", "d"), category="math"),
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


# Several processes, and what each of them may do.


def test_a_shard_has_one_writer(job: Job) -> None:
    """The fourth of four processes is still alive when the second of two starts: both own shard 3."""
    old, new = Job(job.out, 1, rank=3, world=4), Job(job.out, 1, rank=1, world=2)
    shards = list(old.todo())
    assert [s.number for s in shards] == [3, 7]
    key = shards[0].items[0][0]
    taken = new.todo()
    assert next(taken).number == 1
    with pytest.raises(ConfigError, match=r"00003\.jsonl: is being written by another process; let it end"):
        next(taken)
    shards[0].settle(key, [row(key)])
    shards[0].publish()
    new.shards[1].close()
    with pytest.raises(ConfigError, match=r"00007\.jsonl"):
        list(Job(job.out, 1, rank=1, world=2).todo())
    shards[1].close()
    for shard in new.shards:
        shard.close()
    assert [s.number for s in Job(job.out, 1, rank=1, world=2).todo()] == [1, 5, 7, 9]


HOLDS = """
import sys, time
from pathlib import Path
from draftsmith.data.journal import Job
shard = next(Job(Path(sys.argv[1]), 4).todo())
print("open", flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_nothing(job: Job) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(job.out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match="another process"):
            next(job.todo())
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert next(job.todo()).left == 4


def test_opening_twice_is_opening_once(job: Job) -> None:
    [shard, *_] = list(job.todo())
    key = shard.items[0][0]
    shard.settle(key, [row(key)])
    assert [s.open().number for s in job.todo()] == [0, 1, 2]
    assert (shard.left, list(shard.rows)) == (3, [key])


def test_of_many_openers_one_wins(job: Job) -> None:
    won: list[Shard] = []
    lost: list[ConfigError] = []
    shards = [Shard(job.out, 0, job.shards[0].items) for _ in range(8)]

    def race(shard: Shard) -> None:
        try:
            won.append(shard.open())
        except ConfigError as e:
            lost.append(e)

    threads = [threading.Thread(target=race, args=[shard]) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_a_shard_published_between_the_look_and_the_lock(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer was just done: there is nothing left to do, and no new journal."""
    other = Job(job.out, 4)
    locked = Shard._locked

    def late(self: Shard) -> Any:
        if self.number == 0 and not self.path.exists():
            monkeypatch.setattr(Shard, "_locked", locked)
            theirs = other.shards[0].open()
            for key, _ in theirs.items:
                theirs.settle(key, [row(key)])
            theirs.publish()
        return locked(self)

    monkeypatch.setattr(Shard, "_locked", late)
    assert [s.number for s in job.todo()] == [1, 2]
    assert not job.shards[0].journal.exists()


def test_a_journal_removed_before_it_was_locked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file without a name would keep nobody out."""
    flock, calls = journal.fcntl.flock, [0]

    def late(file: Any, how: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            job.shards[0].journal.unlink()
        flock(file, how)

    monkeypatch.setattr(journal.fcntl, "flock", late)
    shard = job.shards[0].open()
    key = shard.items[0][0]
    shard.settle(key, [row(key)])
    assert calls == [2]
    assert shard.journal.read_bytes().count(b"\n") == 1


def test_nothing_is_published_into_a_sealed_folder(job: Job) -> None:
    settle_all(job)
    assert job.seal()
    before = job.shards[0].path.read_bytes()
    shard = Shard(job.out, 0, job.shards[0].items).open()
    for key, _ in shard.items:
        shard.settle(key, [row(key), row(f"{key}/2")])
    with pytest.raises(DataError, match=r"is complete already; rows-00000\.parquet stays as it is"):
        shard.publish()
    assert job.shards[0].path.read_bytes() == before


def test_a_shard_with_missing_rows_is_not_published(job: Job) -> None:
    shard = next(job.todo())
    for n, (key, _) in enumerate(shard.items):
        assert shard.left == len(shard.missing) == 4 - n
        with pytest.raises(DataError, match=f"{4 - n} of 4 rows are missing"):
            shard.publish()
        shard.refuse(key, RowError("w", "cut", "d")) if n == 1 else shard.settle(key, [row(key)])
    assert shard.left == 0
    shard.publish()


OPTIMISED = """
import sys
from pathlib import Path
from draftsmith.data.journal import Job
from draftsmith.data.rows import Row
job = Job(Path(sys.argv[1]), 4)
for shard in job.todo():
    for key, _ in shard.items:
        shard.settle(key, [Row(key, [1, 2, 3], [0, 1, 1], "p:0", finish="stop")])
    shard.publish()
sys.exit(0 if job.seal() else 1)
"""


def test_without_asserts_nothing_is_lost(job: Job) -> None:
    done = subprocess.run([sys.executable, "-O", "-c", OPTIMISED, str(job.out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert artifacts.verify(job.out)["rows"] == 10


def test_what_is_bound_stays(job: Job) -> None:
    """For all processes of a job and all its runs; other names beside it are free."""
    for rank in range(2):
        Job(job.out, 4, rank=rank, world=2).bind("model", "a")
    job.bind("engine", "x")
    with pytest.raises(ConfigError, match=r"served\.json: the model is 'b' now and was 'a'"):
        Job(job.out, 4).bind("model", "b")
    settle_all(job)
    assert job.seal()
    assert artifacts.verify(job.out)["served"] == {"model": "a", "engine": "x"}
    (job.out / "served.json").write_text("[]")
    with pytest.raises(DataError, match="damaged"):
        job.bind("model", "a")
