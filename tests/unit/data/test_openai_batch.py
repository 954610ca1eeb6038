"""Batch files, answered by a runner of our own that may fail, tear or leave out lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import GenerationConfig, Setting, answer_shard
from draftsmith.data.journal import Job, publish_asked
from draftsmith.data.openai_batch import exchange
from draftsmith.data.records import Record
from draftsmith.data.server import ServerConfig
from draftsmith.errors import ConfigError, DataError, PeerError

from .test_server import bytes_of, chats, loopback, prompts, refused, rows_of

NEW = 8


def setting(tokenizer: Any) -> Setting:
    config = GenerationConfig(max_new_tokens=NEW)
    return Setting(tokenizer, frozenset({tokenizer.eos_token_id}), 200, config, ChatConfig())


Change = Callable[[dict[str, Any]], dict[str, Any] | None]


class Runner:
    """What `vllm run-batch` does: a file in, a file out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.engine = tokenizer, loopback.HashEngine(tokenizer)
        self.rounds: list[int] = []

    def run(self, asked: Path, change: Change = lambda line: line) -> Path:
        lines = [json.loads(line) for line in asked.read_text().splitlines()]
        self.rounds.append(len(lines))
        out = [answer for line in lines if (answer := change(self.answer(line))) is not None]
        path = asked.with_name(asked.name.replace(".in.", ".out."))
        path.write_text("".join(json.dumps(line) + "\n" for line in out))
        return path

    def answer(self, line: dict[str, Any]) -> dict[str, Any]:
        body = line["body"]
        assert (line["method"], body["model"], body["return_token_ids"]) == ("POST", "m", True)
        if line["url"] == "/v1/chat/completions":
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        else:
            assert line["url"] == "/v1/completions"
            ids = body["prompt"]
        new = self.engine.answer(list(ids), body["max_tokens"])
        ended = new[-1] in self.engine.eos_ids
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        choice = {"message": {"content": text}, "finish_reason": "stop" if ended else "length", "token_ids": new}
        answer = {"choices": [choice], "prompt_token_ids": list(ids), "usage": {"completion_tokens": len(new)}}
        response = {"status_code": 200, "request_id": "r", "body": answer}
        return {"id": "x", "custom_id": line["custom_id"], "response": response, "error": None}


@pytest.fixture
def runner(tokenizer: Any) -> Runner:
    return Runner(tokenizer)


@pytest.fixture
def step(tmp_path: Path, tokenizer: Any) -> Any:
    """step(): one call of the verb, as a new process would make it."""

    def exchange_again(records: list[Record] = [], out: str = "out", **changes: Any) -> tuple[Path | None, Job]:  # noqa: B006
        folder = tmp_path / out
        if not (folder / "asked").exists():
            publish_asked(folder, records, None)
        job = Job(folder, 4)
        config = ServerConfig(**{"model": "m", "api": "chat", "attempts": 3, **changes})
        return exchange(job, setting(tokenizer), config, folder / "batch"), job

    return exchange_again


def good_rows(tmp_path: Path, tokenizer: Any, records: list[Record]) -> dict[str, bytes]:
    """The bytes that an in-process engine with the same answers writes."""
    publish_asked(tmp_path / "good", records, None)
    job, engine = Job(tmp_path / "good", 4), loopback.HashEngine(tokenizer)
    for shard in job.todo():
        answer_shard(
            shard, setting(tokenizer), lambda asked, **_: [engine.answer(i, NEW) for i in asked], lambda n: None
        )
    assert job.seal()
    return bytes_of(tmp_path / "good")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_round_per_turn(tmp_path: Path, tokenizer: Any, runner: Runner, step: Any, api: str) -> None:
    records = chats(10, turns=3)
    path, _ = step(records, api=api)
    while path is not None:
        assert step(api=api)[0] == path, "a round stays until it is answered"
        runner.run(path)
        path, job = step(api=api)
    assert len(runner.rounds) == 3
    assert runner.rounds[0] == 10
    assert runner.rounds == sorted(runner.rounds, reverse=True)
    assert not job.failed
    assert job.seal()
    assert bytes_of(tmp_path / "out") == good_rows(tmp_path, tokenizer, records)


def failing(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "response": {"status_code": 500, "body": None}, "error": {"error": {"message": "boom"}}}


FAULTS: dict[str, Change] = {
    "500": failing,
    "no response": lambda line: {**line, "response": None, "error": {"message": "gone"}},
    "left out": lambda line: None,
    "runner's own": lambda line: {**line, "response": {"status_code": 400}, "error": "URL /v1/x was used."},
    "html": lambda line: {**line, "response": {"status_code": 200, "body": "<html>"}},
    "other id": lambda line: {**line, "custom_id": 3},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_failed_is_asked_again(tmp_path: Path, tokenizer: Any, runner: Runner, step: Any, fault: str) -> None:
    """Each round, every third answer is lost."""
    records = chats(9, turns=2)
    path, _ = step(records)
    count = [0]

    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        count[0] += 1
        return FAULTS[fault](line) if count[0] % 3 == 1 and len(runner.rounds) < 4 else line

    runner.run(path, change)
    path, job = step()
    assert len(job.failed) == 3
    assert (tmp_path / "out" / "failed-00000.jsonl").exists()
    while path is not None:
        runner.run(path, change)
        path, job = step()
    assert not job.failed
    assert job.seal()
    assert bytes_of(tmp_path / "out") == good_rows(tmp_path, tokenizer, records)


def test_a_torn_last_line_is_asked_again(tmp_path: Path, tokenizer: Any, runner: Runner, step: Any) -> None:
    records = prompts(3)
    out = runner.run(step(records, api="completions")[0])
    whole = out.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    last = json.loads(whole[begin:])["custom_id"]
    for cut in (begin, begin + 1, (begin + len(whole)) // 2, len(whole) - 2):
        out.write_bytes(whole[:cut])
        path, job = step(api="completions")
        assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == [last]
        assert list(job.failed) == [last.partition("#")[0]]
        path.unlink()
    out.write_bytes(whole[:-1])  # the newline alone is missing: nothing is
    assert step(api="completions")[0] is None


def test_refused_rows_are_quarantined_and_a_later_turn_ends_its_chat(tmp_path: Path, runner: Runner, step: Any) -> None:
    def refuse(which: int) -> Change:
        seen = [0]

        def change(line: dict[str, Any]) -> dict[str, Any]:
            seen[0] += 1
            if seen[0] != which:
                return line
            return {**line, "response": {"status_code": 400, "body": None}, "error": {"error": {"message": "too long"}}}

        return change

    path, _ = step(chats(6, turns=2))
    runner.run(path, refuse(2))
    path, _ = step()
    runner.run(path, refuse(1))
    path, job = step()
    assert path is None
    assert job.seal()
    [row] = refused(tmp_path / "out")
    assert (row["reason"], row["detail"]) == ("refused", "400 too long")
    assert len(rows_of(tmp_path / "out")) == 5


def test_a_round_refused_as_a_whole_is_not_believed(tmp_path: Path, runner: Runner, step: Any) -> None:
    path, _ = step(prompts(3), api="completions")
    no = {"status_code": 400, "body": {"error": {"message": "unknown argument"}}}
    out = runner.run(path, lambda line: {**line, "response": no})
    with pytest.raises(PeerError, match="unknown argument"):
        step(api="completions")
    out.unlink()
    runner.run(path)
    assert step(api="completions")[0] is None


def test_attempts(runner: Runner, step: Any) -> None:
    """A row that fails in three rounds steps back while there are others; alone, it is asked afresh."""
    records = [*chats(1, turns=1), *chats(2, turns=6)[1:]]
    path, _ = step(records)
    bad = json.loads(path.read_text().splitlines()[0])["custom_id"]
    asked = []
    for _ in range(12):
        names = [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
        asked.append(bad in names)
        runner.run(path, lambda line: failing(line) if line["custom_id"] == bad else line)
        path, job = step()
        assert list(job.failed) == [bad.partition("#")[0]]
    assert asked[:3] == [True] * 3
    assert asked[-1]


def test_what_is_wrong_is_said(tmp_path: Path, runner: Runner, step: Any) -> None:
    path, _ = step(prompts(2), api="completions")
    out = runner.run(path)
    good = out.read_text()
    out.write_text(good.replace('"custom_id": "', '"custom_id": "x'))
    with pytest.raises(DataError, match="another file"):
        step(api="completions")
    out.write_text(good)
    path.unlink()
    with pytest.raises(DataError, match="never asked"):
        step(api="completions")


def test_a_runner_with_one_model_needs_no_name(step: Any) -> None:
    path, _ = step(prompts(1), model=None)
    assert "model" not in json.loads(path.read_text())["body"]


def test_another_template(runner: Runner, step: Any) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        line["response"]["body"]["prompt_token_ids"] = [1, 2, 3]
        return line

    runner.run(step(chats(2))[0], change)
    with pytest.raises(DataError, match="template differs"):
        step()


def test_rows_that_can_never_be_asked(tmp_path: Path, step: Any) -> None:
    path, job = step([Record("a:0", text="t"), Record("a:1", prompt="x " * 300)])
    assert path is None
    assert job.shards[0].path.exists()
    lines = (tmp_path / "out" / "refused" / "00000.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["reason"] for line in lines) == ["no_prompt", "too_long"]


def test_one_process_writes_the_rounds(tmp_path: Path, tokenizer: Any, step: Any) -> None:
    """Others are sent away, and leave the round that is under way alone."""
    path, _ = step(prompts(9), api="completions")
    before = path.read_bytes()
    config = ServerConfig(model="m", api="completions")
    for rank in range(2):
        job = Job(tmp_path / "out", 4, rank=rank, world=2)
        with pytest.raises(ConfigError, match="engine=batch: one process writes the rounds; start it alone"):
            exchange(job, setting(tokenizer), config, path.parent)
    assert path.read_bytes() == before


def test_a_round_that_another_call_wrote_stays(tmp_path: Path, tokenizer: Any, runner: Runner, step: Any) -> None:
    """The rows that it asks for were answered otherwise meanwhile."""
    path, _ = step(prompts(3), api="completions")
    engine = loopback.HashEngine(tokenizer)
    for shard in Job(tmp_path / "out", 4).todo():
        answer_shard(
            shard, setting(tokenizer), lambda asked, **_: [engine.answer(i, NEW) for i in asked], lambda n: None
        )
    before = path.read_bytes()
    assert step(api="completions")[0] is None
    assert path.read_bytes() == before


def test_the_model_stays(step: Any) -> None:
    path, _ = step(prompts(3), api="completions")
    with pytest.raises(ConfigError, match="the model is 'n' now and was 'm'"):
        step(api="completions", model="n")
    with pytest.raises(ConfigError, match="the model is '' now and was 'm'"):
        step(api="completions", model=None)
    assert step(api="completions")[0] == path


def test_what_failed_leaves_the_journals_free(runner: Runner, step: Any) -> None:
    path, _ = step(prompts(2), api="completions")
    out = runner.run(path)
    out.write_text(out.read_text().replace('"custom_id": "', '"custom_id": "x'))
    with pytest.raises(DataError, match="another file") as caught:
        step(api="completions")
    out.unlink()
    assert step(api="completions")[0] == path
    assert caught.traceback


@pytest.mark.parametrize("place", range(130, 200, 7))
def test_a_key_that_the_runner_quotes(
    tmp_path: Path, runner: Runner, step: Any, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setenv("SOME_KEY", "canary-1234")
    bodies: list[Any] = [{"a": "x" * place, "b": "canary-1234", "c": "y" * 200}, "x" * place + " canary-1234"]
    codes = iter([(200, bodies[0]), (500, bodies[1]), (401, bodies[0])])

    def change(line: dict[str, Any]) -> dict[str, Any]:
        status, body = next(codes)
        return {**line, "response": {"status_code": status, "body": body}}

    runner.run(step(prompts(3), api="completions", api_key_env="SOME_KEY")[0], change)
    _, job = step(api="completions", api_key_env="SOME_KEY")
    assert len(job.failed) == 3
    assert "can" not in (tmp_path / "out" / "failed-00000.jsonl").read_text()
