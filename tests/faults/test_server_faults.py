"""A server process that fails in every way we know, dies and comes back: where each run ends, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROWS, Driver, Process, account, content, rows_of

pytestmark = pytest.mark.faults

DOWN = ["500", "502", "503", "408", "425", "reset"]  # rows that meet only these fail and are asked again
ODD = ["bad_json", "html", "no_choices", "abort", "few_ids"]  # rows that meet only these are refused


def settled(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in (out / "journal").glob("*.jsonl"))


def wait_for(seen: Any) -> None:
    until = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, base: Path, records: Path) -> dict[str, bytes]:
    """What a run against a good server writes."""
    folder = tmp_path_factory.mktemp("good")
    server = Process(folder / "server", base)
    run = Driver(folder / "out", base, records, urls=[server.url])
    try:
        assert run.run() == 0, run.told
    finally:
        server.kill()
    return content(run.out)


def test_everything_at_once(good: Any, serving: Any, driver: Any, capsys: Any) -> None:
    """A third of all requests fail in a way that passes, some wait, and the server goes away twice: the same
    command, run until it says 0, ends with the bytes of a good run."""
    rules: list[dict[str, Any]] = [{"fault": "die", "seconds": 1.0, "at": [100, 300]}]
    rules += [{"fault": fault, "p": 0.05} for fault in DOWN] + [{"fault": fault, "p": 0.01} for fault in ODD]
    rules += [{"fault": "429", "retry_after": 0.2, "p": 0.02}, {"fault": "slow", "mean": 0.02, "p": 0.2}]
    server = serving(rules=rules)
    run, codes = driver("mixed", urls=[server.url], attempts=4), []
    while 0 not in codes and len(codes) < 10:
        codes.append(run.run())
        assert codes[-1] in (0, 6), run.told
        if codes[-1]:
            failed = (run.out / "failed-00000.jsonl").read_text().splitlines()
            assert f"{len(failed)} rows failed" in run.told
    assert content(run.out) == good
    with capsys.disabled():
        print(f"\n    {ROWS} rows, exit codes {codes}: {account(run.out)}, bytes equal", end="")


def test_rows_that_are_refused_are_counted(good: Any, serving: Any, driver: Any, capsys: Any) -> None:
    rules = [{"fault": fault, "p": 0.03} for fault in ("400", "413", "422", "empty", "length", "text_plain")]
    server = serving(rules=rules)
    run = driver("refused", urls=[server.url])
    assert run.run() == 0, run.told
    counts = account(run.out)
    lines = [json.loads(line) for line in (run.out / "quarantine.jsonl").read_text().splitlines()]
    reasons = Counter(line["reason"] for line in lines)
    assert set(reasons) == {"refused", "empty_answer", "too_long"}
    assert reasons == json.loads((run.out / "manifest.json").read_text())["funnel"]["quarantined"]
    with capsys.disabled():
        print(f"\n    {counts} {dict(reasons)}", end="")


def test_a_server_killed_and_started_again(good: Any, serving: Any, driver: Any) -> None:
    server = serving(rules=[{"fault": "slow", "mean": 0.05}])
    run = driver("returns", urls=[server.url], patience=120.0)
    process = run.start()
    wait_for(lambda: settled(run.out) > 20)
    server.kill()
    time.sleep(1)
    server.start()
    code, told = process.finish(200)
    assert code == 0, told
    assert content(run.out) == good


def test_a_server_killed_for_good(good: Any, serving: Any, driver: Any) -> None:
    server = serving(rules=[{"fault": "slow", "mean": 0.05}])
    run = driver("for-good", urls=[server.url], patience=1.0)
    process = run.start()
    wait_for(lambda: settled(run.out) > 20)
    server.kill()
    code, told = process.finish(60)
    assert code == 6, told
    failed = (run.out / "failed-00000.jsonl").read_text().splitlines()
    assert 0 < len(failed) < ROWS
    assert run.run() == 6
    assert "no server answered" in run.told
    server.start()
    assert run.run() == 0, run.told
    assert content(run.out) == good


@pytest.mark.slow
def test_of_two_servers_one_dies(good: Any, serving: Any, driver: Any) -> None:
    one = serving(rules=[{"fault": "slow", "mean": 0.05}])
    two = serving(rules=[{"fault": "slow", "mean": 0.05}])
    run = driver("two", urls=[one.url, two.url])
    process = run.start()
    wait_for(lambda: settled(run.out) > 20)
    one.kill()
    code, told = process.finish(200)
    assert code == 0, told
    assert content(run.out) == good


@pytest.mark.parametrize(
    "status", ["401", *(pytest.param(status, marks=pytest.mark.slow) for status in ("403", "404"))]
)
def test_the_key_is_nowhere(good: Any, serving: Any, driver: Any, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """Refused in the midst of a run: it stops, and no file and no output holds the key."""
    canary = "canary-5f2e"
    monkeypatch.setenv("SOME_KEY", canary)
    server = serving(key=canary, rules=[{"fault": "400", "at": [30]}, {"fault": status, "from": 60}])
    run = driver("key", urls=[server.url], api_key_env="SOME_KEY")
    process = run.start()
    code, told = process.finish(30)
    assert code == 6
    assert status in told
    monkeypatch.setenv("SOME_KEY", canary + "-wrong")
    began = time.monotonic()
    assert run.run() == 6
    assert time.monotonic() - began < 15  # most of it imports
    server.kill()
    server.start(key=canary)
    monkeypatch.setenv("SOME_KEY", canary)
    assert run.run() == 0, run.told
    assert len(rows_of(run.out)) >= ROWS - 6
    files = b"".join(p.read_bytes() for p in run.out.rglob("*") if p.is_file())
    assert canary.encode() not in files
    assert canary not in told + run.told
    assert account(run.out)["quarantined"] <= 6


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_with_75(good: Any, serving: Any, driver: Any, number: signal.Signals) -> None:
    server = serving(rules=[{"fault": "slow", "mean": 0.05}])
    run = driver("signalled", urls=[server.url])
    process = run.start()
    wait_for(lambda: settled(run.out) > 20)
    os.kill(process.pid, number)
    code, told = process.finish(20)
    assert code == 75, told
    assert told.count("\n") == 1
    assert run.run() == 0, run.told
    assert content(run.out) == good
