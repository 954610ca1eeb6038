"""Rows from servers that misbehave as scripted, over real sockets on this machine."""

import importlib.util
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import Conversation, GenerationConfig, Setting
from draftsmith.data.journal import Job, Shard, publish_asked
from draftsmith.data.openai_api import request_body
from draftsmith.data.records import Record
from draftsmith.data.server import ServerConfig, answer_job
from draftsmith.errors import ConfigError, DataError, Interrupted, PeerError

NEW = 8


def load_loopback() -> ModuleType:
    path = Path(__file__).parents[2] / "faults" / "loopback.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loopback = load_loopback()


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Any]:
    """serve(*rules, **script): a server that answers from a hash of the prompt."""
    servers = []

    def start(*rules: dict[str, Any], **script: Any) -> Any:
        server = loopback.Server(0, loopback.HashEngine(tokenizer), {"rules": rules, **script})
        threading.Thread(target=server.forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.dead_for = 0.0
        server.shutdown()
        server.server_close()


def setting(tokenizer: Any, **changes: Any) -> Setting:
    config = GenerationConfig(**{"max_new_tokens": NEW, **changes})
    return Setting(tokenizer, frozenset({tokenizer.eos_token_id}), 200, config, ChatConfig())


def fast(*urls: str, **changes: Any) -> ServerConfig:
    quick = {"backoff": 0.01, "backoff_limit": 0.05, "timeout": 5.0, "concurrency": 8, "patience": 2.0}
    return ServerConfig(urls=list(urls), **{**quick, **changes})


def prompts(count: int) -> list[Record]:
    return [Record(f"p:{i}", prompt=f"the cat {i}") for i in range(count)]


def chats(count: int, turns: int = 2) -> list[Record]:
    said = [
        [{"role": r, "content": f"{r} {i} {t}"} for t in range(turns) for r in ("user", "assistant")]
        for i in range(count)
    ]
    return [Record(f"c:{i}", messages=tuple(m)) for i, m in enumerate(said)]


def job_of(out: Path, records: list[Record], shard_rows: int = 16, **split: int) -> Job:
    if not (out / "asked").exists():
        publish_asked(out, records, None)
    return Job(out, shard_rows, **split)


def quiet(done: int, failed: int) -> None:
    pass


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    rows = [row for p in sorted(out.glob("rows-*.parquet")) for row in pq.read_table(p).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def refused(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.glob("rows-*.parquet")}


# What happens to whole jobs.


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("ids", [True, False])
def test_every_row_is_what_the_server_emitted(tmp_path: Path, tokenizer: Any, serve: Any, api: str, ids: bool) -> None:
    """Several shards, more in flight than a shard holds, conversations of two turns."""
    server, told = serve(ids=ids), []
    job = job_of(tmp_path, chats(20), 6)
    answer_job(job, setting(tokenizer), fast(server.url, api=api), lambda *counts: told.append(counts))
    assert not job.failed
    assert told[0] == (0, 0)
    assert told[-1] == (20, 0)
    assert job.seal()
    engine, rows = server.engine, rows_of(tmp_path)
    assert len(rows) + len(refused(tmp_path)) == 20
    assert {r["reason"] for r in refused(tmp_path)} <= {"empty_answer", "unverified"}
    assert len(rows) > 15
    for key, record in job.items:
        if key not in rows:
            continue
        c = Conversation(key, record, setting(tokenizer))
        while (asked := c.ask()) is not None:
            new = engine.answer(asked, NEW)
            c.answer(new, cut=new[-1] not in engine.eos_ids)
        [row] = c.rows()
        kept = rows[key]
        assert (kept["ids"], kept["mask"], kept["finish"], kept["said"]) == (row.ids, row.mask, row.finish, row.said)


def test_plain_prompts_seeds_and_sampling(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve()
    job = job_of(tmp_path, prompts(3))
    answer_job(job, setting(tokenizer, temperature=0.5, top_p=0.9), fast(server.url), quiet)
    rows = rows_of(tmp_path)
    assert sorted(b["seed"] for b in server.seen) == sorted(r["seed"] for r in rows.values())
    body = server.seen[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (0.5, 0.9, -1, 1.0)
    assert body["stop_token_ids"] == [tokenizer.eos_token_id]


def test_greedy_sends_no_seed(tokenizer: Any) -> None:
    c = Conversation("k", prompts(1)[0], setting(tokenizer))
    body = request_body(c, c.ask() or [], "m", "completions")
    assert "seed" not in body
    assert body["return_token_ids"] is True
    assert body["add_special_tokens"] is False


PASSING = ["500", "502", "408", "409", "425", "reset", "bad_json", "html", "no_choices", "abort", "few_ids"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_costs_no_row(tmp_path: Path, tokenizer: Any, serve: Any, fault: str) -> None:
    """A third of all requests go wrong; the rows are those of a good server."""
    for out, rules in ((tmp_path / "good", []), (tmp_path / "bad", [{"fault": fault, "p": 0.3}])):
        job = job_of(out, prompts(30))
        answer_job(job, setting(tokenizer), fast(serve(*rules).url, attempts=30), quiet)
        assert not job.failed
    assert bytes_of(tmp_path / "good") == bytes_of(tmp_path / "bad")


def test_a_slow_drip_times_out_and_is_asked_again(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(10))
    began = time.monotonic()
    answer_job(job, setting(tokenizer), fast(serve({"fault": "drip", "at": [0, 3]}).url, timeout=0.5), quiet)
    assert not job.failed
    assert time.monotonic() - began < 4


def test_429_waits_as_told_and_uses_up_no_attempts(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve({"fault": "429", "retry_after": 0.3, "from": 2, "to": 12})
    job = job_of(tmp_path, prompts(20))
    began = time.monotonic()
    answer_job(job, setting(tokenizer), fast(server.url, attempts=1), quiet)
    assert not job.failed
    assert time.monotonic() - began > 0.3


def test_429_for_ever_ends_with_patience(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(20))
    answer_job(job, setting(tokenizer), fast(serve({"fault": "429", "from": 5}).url, patience=0.4), quiet)
    assert 10 < len(job.failed) < 20
    listed = [json.loads(line) for line in (tmp_path / "failed-00000.jsonl").read_text().splitlines()]
    assert {line["key"] for line in listed} == set(job.failed)
    assert "no answer for 0.4 s" in listed[-1]["why"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("400", "refused"),
        ("413", "refused"),
        ("422", "refused"),
        ("empty", "empty_answer"),
        ("html", "nonsense"),
        ("bad_json", "nonsense"),
        ("few_ids", "ids"),
    ],
)
def test_what_a_row_never_gets_is_refused(tmp_path: Path, tokenizer: Any, serve: Any, fault: str, reason: str) -> None:
    job = job_of(tmp_path, prompts(20))
    server = serve({"fault": fault, "only": json.dumps(tokenizer("the cat 7")["input_ids"])[1:-1]})
    answer_job(job, setting(tokenizer), fast(server.url, attempts=2), quiet)
    assert not job.failed
    assert job.seal()
    [row] = refused(tmp_path)
    assert (row["where"], row["reason"]) == ("p:7", reason)
    assert len(rows_of(tmp_path)) == 19


@pytest.mark.parametrize("fault", ["400", "empty", "html", "few_ids", "500"])
def test_a_server_that_never_answered_is_not_believed(tmp_path: Path, tokenizer: Any, serve: Any, fault: str) -> None:
    """A login page or a foreign parameter: all fail, none is refused, and the next run completes."""
    job = job_of(tmp_path, prompts(20))
    answer_job(job, setting(tokenizer), fast(serve({"fault": fault}).url, attempts=2, patience=0.3), quiet)
    assert len(job.failed) == 20
    assert not job.seal()
    again = job_of(tmp_path, [])
    answer_job(again, setting(tokenizer), fast(serve().url), quiet)
    assert again.seal()
    assert len(rows_of(tmp_path)) == 20
    assert not list(tmp_path.glob("failed-*"))


def test_an_early_refusal_is_believed_once_a_row_is_answered(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(5))
    answer_job(job, setting(tokenizer), fast(serve({"fault": "400", "at": [0]}).url, concurrency=1), quiet)
    assert not job.failed
    assert job.seal()
    assert [r["where"] for r in refused(tmp_path)] == ["p:0"]


def test_trouble_with_a_later_turn_keeps_the_earlier_ones(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    """400 for a text that comes in the second turn of one chat."""
    job = job_of(tmp_path, chats(6))
    answer_job(job, setting(tokenizer), fast(serve({"fault": "400", "only": "user 3 1"}).url, api="chat"), quiet)
    assert job.seal()
    assert not refused(tmp_path)
    [short] = [r for r in rows_of(tmp_path).values() if r["source"] == "c:3"]
    assert [m["content"] for m in json.loads(short["said"])["messages"]][::2] == ["user 3 0"]


def test_a_cut_answer_may_be_quarantined(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(10))
    answer_job(job, setting(tokenizer, cut="quarantine"), fast(serve({"fault": "length", "at": [1, 2]}).url), quiet)
    assert job.seal()
    assert [r["reason"] for r in refused(tmp_path)].count("cut") >= 2


# Servers that come and go.


def test_a_server_that_dies_and_returns_costs_no_row(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve({"fault": "die", "seconds": 1.0, "at": [10]})
    job = job_of(tmp_path, prompts(60))
    answer_job(job, setting(tokenizer), fast(server.url, breaker=3, patience=20), quiet)
    assert not job.failed
    assert len(rows_of(tmp_path)) == 60


def test_an_open_breaker_sends_probes_only(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    """/models stays well while every answer is a 500: probes and single trials, and the run ends by patience."""
    server = serve({"fault": "500"})
    job = job_of(tmp_path, prompts(200))
    answer_job(
        job, setting(tokenizer), fast(server.url, breaker=4, backoff=0.1, backoff_limit=0.2, patience=1.0), quiet
    )
    assert len(job.failed) == 200
    asked = [path for _, path in server.log if path == "/v1/completions"]
    assert 8 <= len(asked) < 60


def test_a_server_that_dies_for_good(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(60))
    dying = serve({"fault": "die", "seconds": 60.0, "at": [20]})
    answer_job(job, setting(tokenizer), fast(dying.url, breaker=3, patience=0.5), quiet)
    assert 30 < len(job.failed) <= 60
    again = job_of(tmp_path, [])
    answer_job(again, setting(tokenizer), fast(serve().url), quiet)
    assert again.seal()
    assert len(rows_of(tmp_path)) == 60
    dying.dead_for = 0.001


def nobody() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def test_of_two_servers_one_is_dead(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(40))
    answer_job(job, setting(tokenizer), fast(nobody(), serve().url), quiet)
    assert not job.failed


def test_two_servers_share_the_work(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    one, two = serve({"fault": "slow", "seconds": 0.01}), serve({"fault": "slow", "seconds": 0.01})
    job = job_of(tmp_path, prompts(40))
    answer_job(job, setting(tokenizer), fast(one.url + "/", two.url), quiet)
    assert not job.failed
    assert min(one.count, two.count) > 10


def test_no_server_at_all(tmp_path: Path, tokenizer: Any) -> None:
    job = job_of(tmp_path, prompts(4))
    with pytest.raises(PeerError, match="no server answered GET /models"):
        answer_job(job, setting(tokenizer), fast(nobody(), patience=0.2), quiet)


def test_a_job_without_missing_rows_asks_nobody(tmp_path: Path, tokenizer: Any) -> None:
    job = job_of(tmp_path, [])
    answer_job(job, setting(tokenizer), fast(nobody()), quiet)
    assert all(shard.path.exists() for shard in job.shards)


def test_processes_share_a_job(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    publish_asked(tmp_path, prompts(30), None)
    for rank in range(2):
        job = job_of(tmp_path, [], 4, rank=rank, world=2)
        answer_job(job, setting(tokenizer), fast(serve().url), quiet)
        assert job.seal() == (rank == 1)
    assert len(rows_of(tmp_path)) == 30


# What a person has to look at.


@pytest.mark.parametrize("status", ["401", "403", "404", "302", "405"])
@pytest.mark.parametrize("first", [0, 20])
def test_some_answers_stop_at_once(
    tmp_path: Path,
    tokenizer: Any,
    serve: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    status: str,
    first: int,
) -> None:
    """Within a second, at the start or in the midst, and the key is nowhere."""
    monkeypatch.setenv("SOME_KEY", "canary-1234")
    server = serve({"fault": status, "from": first}, key="canary-1234")
    job = job_of(tmp_path, prompts(40))
    with pytest.raises(PeerError, match=status) as caught:
        answer_job(job, setting(tokenizer), fast(server.url, api_key_env="SOME_KEY", backoff=5.0), quiet)
    assert time.monotonic() - server.faulted[0] < 1
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "canary" not in f"{caught.value!r} {capfd.readouterr()} {written!r}"
    assert sum(len(s.open().rows) for s in job.todo()) + 16 * len(bytes_of(tmp_path)) >= first - 8


def test_a_refusal_that_quotes_the_key(
    tmp_path: Path, tokenizer: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "canary-1234")
    server = serve({"fault": "400", "at": [5]}, {"fault": "500", "at": [9]}, key="canary-1234")
    job = job_of(tmp_path, prompts(30))
    answer_job(job, setting(tokenizer), fast(server.url, api_key_env="SOME_KEY", attempts=1), quiet)
    assert job.failed
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"Bearer ***" in written
    assert b"canary" not in written


def test_a_wrong_key(tmp_path: Path, tokenizer: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "canary-wrong")
    with pytest.raises(PeerError, match="401: check the key") as caught:
        answer_job(
            job_of(tmp_path, prompts(2)), setting(tokenizer), fast(serve(key="k").url, api_key_env="SOME_KEY"), quiet
        )
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "two words", "schlüssel", "a\nb"])
def test_a_key_that_is_none(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ConfigError, match="SOME_KEY") as caught:
        answer_job(job_of(tmp_path, prompts(2)), setting(tokenizer), fast(nobody(), api_key_env="SOME_KEY"), quiet)
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "model", "match"),
    [
        ({"models": ["a", "b"]}, None, "give one; .* serves a, b"),
        ({"models": ["a", "b"]}, "c", "'c' is not served; .* serves a, b"),
        ({"models": []}, None, "serves none"),
    ],
)
def test_model_names_are_checked_before_any_row(
    tmp_path: Path, tokenizer: Any, serve: Any, script: Any, model: str | None, match: str
) -> None:
    server = serve(**script)
    with pytest.raises(ConfigError, match=match):
        answer_job(job_of(tmp_path, prompts(2)), setting(tokenizer), fast(server.url, model=model), quiet)
    assert server.count == 0


def test_two_servers_with_two_models(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    urls = serve(models=["a"]).url, serve(models=["b"]).url
    with pytest.raises(ConfigError, match="serve a and b"):
        answer_job(job_of(tmp_path, prompts(2)), setting(tokenizer), fast(*urls), quiet)


def test_a_login_page_in_front(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    config = fast(serve(models_page="<html>").url, patience=0.2)
    with pytest.raises(PeerError, match="no server answered"):
        answer_job(job_of(tmp_path, prompts(2)), setting(tokenizer), config, quiet)


@pytest.mark.parametrize(
    ("api", "what"), [("chat", "its chat template differs"), ("completions", "it changes prompts")]
)
def test_another_chat_template_stops_at_the_first_row(
    tmp_path: Path, tokenizer: Any, serve: Any, api: str, what: str
) -> None:
    config = fast(serve({"fault": "foreign_prompt"}).url, api=api)
    with pytest.raises(DataError, match=what) as caught:
        answer_job(job_of(tmp_path, chats(9)), setting(tokenizer), config, quiet)
    assert caught.value.exit_code == 3


def test_a_prompt_changed_only_once_is_that_rows_matter(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    job = job_of(tmp_path, prompts(12))
    answer_job(job, setting(tokenizer), fast(serve({"fault": "foreign_prompt", "at": [5]}).url, concurrency=1), quiet)
    assert job.seal()
    assert [r["reason"] for r in refused(tmp_path)] == ["unverified"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_torn(tmp_path: Path, tokenizer: Any, serve: Any, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    threading.Timer(0.4, os.kill, (os.getpid(), number)).start()
    server = serve({"fault": "slow", "seconds": 0.1})
    with pytest.raises(Interrupted) as caught:
        answer_job(job_of(tmp_path, prompts(150)), setting(tokenizer), fast(server.url), quiet)
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before
    lines = [line for p in (tmp_path / "journal").glob("*") for line in p.read_bytes().splitlines(keepends=True)]
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
    job = job_of(tmp_path, [])
    answer_job(job, setting(tokenizer), fast(serve().url), quiet)
    assert job.seal()
    assert len(rows_of(tmp_path)) == 150


# What a job's rows come from is one model.


def test_another_model_does_not_go_on(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    """No name is given, so the first run's is found out, noted, and held against the next one's."""
    bad = serve({"fault": "500", "from": 5}, models=["one"])
    answer_job(job_of(tmp_path, prompts(20)), setting(tokenizer), fast(bad.url, attempts=1, patience=0.3), quiet)
    assert json.loads((tmp_path / "served.json").read_text()) == {"model": "one"}
    other = serve(models=["two"])
    for wanted in (None, "two"):
        with pytest.raises(ConfigError, match=r"served\.json: the model is 'two' now and was 'one'"):
            answer_job(job_of(tmp_path, []), setting(tokenizer), fast(other.url, model=wanted), quiet)
    assert other.count == 0
    job = job_of(tmp_path, [])
    answer_job(job, setting(tokenizer), fast(serve(models=["two", "one"]).url, model="one"), quiet)
    assert job.seal(colour="red")
    facts = json.loads((tmp_path / "manifest.json").read_text())
    assert (facts["served"], facts["colour"]) == ({"model": "one"}, "red")


def test_a_server_that_returns_with_another_model(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve({"fault": "die", "seconds": 0.5, "at": [10]}, models=["one"])

    def told(done: int, failed: int) -> None:
        if server.dead_for:
            server.script["models"] = ["two"]

    with pytest.raises(ConfigError, match="is 'two' now and was 'one'"):
        answer_job(job_of(tmp_path, prompts(60)), setting(tokenizer), fast(server.url, breaker=2, patience=9), told)


# Pauses that a server asks for, keys that it quotes, and what a row costs.


def test_a_pause_longer_than_patience_is_followed_by_a_request(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve({"fault": "429", "retry_after": 3, "from": 3, "to": 6})
    job = job_of(tmp_path, prompts(30))
    began = time.monotonic()
    answer_job(job, setting(tokenizer), fast(server.url, patience=2.0), quiet)
    assert not job.failed
    assert time.monotonic() - began > 1


def test_long_pauses_for_ever_end_with_patience(tmp_path: Path, tokenizer: Any, serve: Any) -> None:
    server = serve({"fault": "429", "retry_after": 60})
    job = job_of(tmp_path, prompts(30))
    began = time.monotonic()
    answer_job(job, setting(tokenizer), fast(server.url, patience=0.4), quiet)
    assert len(job.failed) == 30
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("key", ["canary-" + "0123456789" * 5, 'can"ary\\1234'])
@pytest.mark.parametrize("place", range(120, 180, 10))
def test_a_key_at_the_edge_of_what_is_kept(
    tmp_path: Path, tokenizer: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, key: str, place: int
) -> None:
    """A 200 that is no answer quotes the key where the text is cut."""
    monkeypatch.setenv("SOME_KEY", key)
    server = serve(key=key)
    page = {"padding": "x" * place, "key": key, "more": "y" * 200}
    monkeypatch.setattr(loopback.Handler, "_answer", lambda self, body, fault: self._send(200, page))
    job = job_of(tmp_path, prompts(1))
    answer_job(job, setting(tokenizer), fast(server.url, api_key_env="SOME_KEY", attempts=1, patience=0.3), quiet)
    told = (tmp_path / "failed-00000.jsonl").read_text()
    assert "200 without choices" in told
    assert "can" not in told


def test_a_row_costs_the_same_in_a_large_shard(
    tmp_path: Path, tokenizer: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is listed when a shard is opened and published, not at every row."""
    calls = [0]
    listed = Shard.missing.fget  # type: ignore[attr-defined]

    def counted(self: Shard) -> Any:
        calls[0] += 1
        return listed(self)

    monkeypatch.setattr(Shard, "missing", property(counted))
    job = job_of(tmp_path, prompts(60), 30)
    answer_job(job, setting(tokenizer), fast(serve().url), quiet)
    assert job.seal()
    assert calls[0] <= 2 * len(job.shards)
