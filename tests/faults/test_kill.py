"""kill -9 at any moment: nothing is lost, doubled or torn, and the rows are those of a run left alone."""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from draftsmith import faults

from .conftest import ROWS, account, content, rows_of, torn

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("DRAFTSMITH_KILLS", "2"))


def report(capsys: Any, text: str) -> None:
    with capsys.disabled():
        print(f"\n    {text}", end="", flush=True)


def kill_until_complete(make: Any, whole: dict[str, bytes], seconds: float, runs: int, capsys: Any) -> None:
    """`runs` folders, each killed once to three times, then left to end. (One that ended before its first kill does
    not count.)"""
    rng, kills, gone, done, n = random.Random(os.environ.get("DRAFTSMITH_SEED", "0")), 0, 0, 0, 0
    while done < runs:
        run, n = make(f"killed-{n}"), n + 1
        killed = 0
        for _ in range(rng.choice([1, 2, 3])):
            if not run.killed_after(rng.uniform(0, seconds)):
                break
            killed += 1
            assert not torn(run.out)
            gone += len(rows_of(run.out))
        kills, done = kills + killed, done + bool(killed)
        assert run.run() == 0, run.told
        assert content(run.out) == whole
        counts = account(run.out)
        assert counts["asked"] == ROWS
    report(capsys, f"{done} folders, {kills} kills: {counts}, 0 doubled, 0 torn, bytes equal")
    assert kills
    assert gone or runs < 5, "every kill came before the first shard"


def test_kill_with_a_server(driver: Any, serving: Any, capsys: Any) -> None:
    """`draftsmith distill`, 16 in flight, latencies with a heavy tail: rows end in another order each time."""
    server = serving(rules=[{"fault": "slow", "mean": 0.1}])

    def make(name: str) -> Any:
        return driver(name, "verb", urls=[server.url])

    first, whole = make("first"), make("whole")
    assert first.run() == 0, first.told  # the server has answered everything once now
    began = time.monotonic()
    assert whole.run() == 0, whole.told
    seconds = time.monotonic() - began
    assert content(whole.out) == content(first.out)
    assert {row["finish"] for row in rows_of(whole.out)} == {"stop", "length"}
    report(capsys, f"{ROWS} rows in {seconds:.1f} s left alone")
    kill_until_complete(make, content(whole.out), seconds, KILLS, capsys)


def test_kill_in_process(driver: Any, capsys: Any) -> None:
    whole = driver("whole", "base")
    began = time.monotonic()
    assert whole.run() == 0, whole.told
    seconds = time.monotonic() - began
    report(capsys, f"{ROWS} rows in {seconds:.1f} s left alone")
    kill_until_complete(lambda name: driver(name, "base"), content(whole.out), seconds, max(1, KILLS // 5), capsys)


def forked(command: list[str], fault: str = "", tear: int = 0) -> int:
    """driver.py in a child of this process, which has imported all it needs: the exit code."""
    from . import driver

    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.environ["FAULT"] = fault
            driver.run(driver.parser().parse_args([*command[1:], "--tear", str(tear)]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_kill_at_every_point(driver: Any, serving: Any, records: Path, tmp_path: Path, capsys: Any) -> None:
    """With 16 answers in flight (test_crash_points.py has the base itself), and with a line torn in two."""
    some = tmp_path / "some.jsonl"
    some.write_text("".join(records.read_text().splitlines(keepends=True)[:150]))
    server = serving()

    def make(name: str) -> Any:
        return driver(name, records=some, urls=[server.url])

    whole = make("whole")
    assert forked(whole.command) == 0
    rows = [f"{point}:{n}" for point in ("row.answered", "row.written") for n in (1, 40)]
    shards = [f"shard.{what}:{n}" for what in ("refused", "named", "published") for n in (1, 3)]
    deaths = [{"fault": fault} for fault in [*rows, *shards, "seal.begun"]] + [{"tear": n} for n in (1, 40)]
    for n, death in enumerate(deaths):
        run = make(f"run-{n}")
        assert forked(run.command, **death) == faults.KILLED, death
        assert not (run.out / "manifest.json").exists()
        assert forked(run.command) == 0, death
        assert content(run.out) == content(whole.out), death
        account(run.out)
    report(capsys, f"{len(deaths)} deaths: resumed exactly")
