"""kill -9 at any moment: nothing is lost, doubled or torn, and the rows are those of a run left alone."""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROWS, account, content, rows_of, torn

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("DRAFTSMITH_KILLS", "5"))


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
    runs = 2 if KILLS == 5 else KILLS // 5
    kill_until_complete(lambda name: driver(name, "base"), content(whole.out), seconds, runs, capsys)


def forked(command: list[str], die: str = "") -> int:
    """driver.py in a child of this process, which has imported all it needs: the exit code."""
    from . import driver

    pid = os.fork()
    if not pid:
        code = 1
        try:
            driver.run(driver.parser().parse_args([*command[2:], "--die", die]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_kill_at_every_point(driver: Any, serving: Any, records: Path, tmp_path: Path, capsys: Any) -> None:
    from .driver import POINTS

    some = tmp_path / "some.jsonl"
    some.write_text("".join(records.read_text().splitlines(keepends=True)[:150]))
    server = serving()

    def make(name: str) -> Any:
        return driver(name, records=some, urls=[server.url])

    whole = make("whole")
    assert forked(whole.command) == 0
    for point in POINTS:
        for number in (1,) if "seal" in point else (1, 3):
            run = make(f"{point}-{number}")
            assert forked(run.command, f"{point}:{number}") == 137, point
            assert not (run.out / "manifest.json").exists() or "sealed" in point
            assert forked(run.command) == 0, point
            assert content(run.out) == content(whole.out), point
            account(run.out)
    report(capsys, f"{len(POINTS)} points: resumed exactly")
