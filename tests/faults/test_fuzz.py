# ruff: noqa: F811 (fixtures are imported, then asked for)
"""Whatever lies in a file of rows, a record, an answer, a log or an override: its reader gives a value or refuses it by
name, in one line, with its code. Nothing else: no other exception."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from draftsmith import config, schemas
from draftsmith.data import sources
from draftsmith.data.funnel import Funnel, intake
from draftsmith.data.prompts import user_turns
from draftsmith.data.rows import Row
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError, PeerError, RowError

from .fuzzing import LINES, VALUES, as_json, base, harmed, here, micro, mutated, often, refused, with_change  # noqa: F401

pytestmark = pytest.mark.faults


# --- rows


def taken(path: Path, shape: str = "auto") -> int:
    """How many rows a file has: each is a record, or refused by name."""
    counted = 0
    with Funnel(Path(os.devnull)) as funnel:
        for record in intake({"mine": SourceConfig(path=str(path), shape=shape)}, funnel):
            counted += 1
            assert len(record.content) == 64
            assert record.asked
            user_turns([record])
            assert record.where.startswith(f"{path}:")
        assert counted + sum(funnel.reasons.values()) == funnel.taken
        for why in funnel.firsts.values():
            assert why.where.startswith(f"{path}:")
            assert why.reason
            assert "\n" not in str(why)
    return funnel.taken


@often(250)
@given(content=st.lists(st.one_of(st.binary(max_size=30), VALUES.map(as_json)), max_size=4).map(b"\n".join))
def test_lines_of_anything(here: Path, content: bytes) -> None:
    (here / "in.jsonl").write_bytes(content)
    refused(lambda: taken(here / "in.jsonl"), "in.jsonl")


@often(500)
@given(value=st.sampled_from(LINES).flatmap(mutated), shape=st.sampled_from(sources.SHAPES))
def test_lines_with_parts_of_them_changed(here: Path, value: Any, shape: str) -> None:
    (here / "in.jsonl").write_bytes(as_json(value))
    assert taken(here / "in.jsonl") == 1
    assert taken(here / "in.jsonl", shape) == 1


@often(150)
@given(content=harmed(as_json(LINES)))
def test_a_json_array(here: Path, content: bytes) -> None:
    (here / "in.json").write_bytes(content)
    refused(lambda: taken(here / "in.json"), "in.json")


@often(150)
@given(data=st.data(), name=st.sampled_from(["in.parquet", "in.arrow", "in.jsonl.gz"]))
def test_tables_and_archives(here: Path, data: st.DataObject, name: str) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = here / f"whole.{name}"
    if not whole.exists():
        table = pa.table({"prompt": ["a", "b"], "completion": ["c", None]})
        if name.endswith("parquet"):
            pq.write_table(table, whole)
        elif name.endswith("arrow"):
            with pa.ipc.new_file(str(whole), table.schema) as f:
                f.write_table(table)
        else:
            whole.write_bytes(gzip.compress(b"\n".join(map(as_json, LINES))))
    (here / name).write_bytes(data.draw(harmed(whole.read_bytes())))
    refused(lambda: taken(here / name), name)


# --- what was asked, and what was answered


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from draftsmith.data import journal, shapes

    folder = tmp_path_factory.mktemp("distilled") / "out"
    records = [shapes.record(line, f"f:{n}") for n, line in enumerate(LINES[1:2] + LINES[4:6] + LINES[7:8])]
    journal.publish_asked(folder, records, None)
    return folder


@often(200)
@given(data=st.data())
def test_what_was_asked(here: Path, asked: Path, data: st.DataObject) -> None:
    from draftsmith.data import journal

    path = asked / "asked" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    several = mutated(lines).map(lambda v: b"\n".join(map(as_json, v)) if isinstance(v, list) else as_json(v))
    content = data.draw(st.one_of(several, harmed(path.read_bytes())))
    shutil.rmtree(here / "out2", ignore_errors=True)
    with_change(asked / "asked", here / "out2" / "asked", ("records.jsonl", content), seal="manifest.json")
    for _, record in refused(lambda: journal.read_asked(here / "out2"), "out2") or []:
        assert record.asked
        assert len(record.content) == 64
        user_turns([record])


@often(100)
@given(tail=st.lists(st.one_of(st.binary(max_size=20), VALUES.map(as_json)), max_size=3).map(b"\n".join))
def test_a_journal_keeps_its_whole_lines(here: Path, asked: Path, tail: bytes) -> None:
    from draftsmith.data import journal

    shutil.rmtree(here / "out3", ignore_errors=True)
    shutil.copytree(asked, here / "out3")
    for attempt in (0, 1):
        shard = journal.Job(here / "out3", 100).shards[0].open()
        if not attempt:
            shard.settle(shard.items[0][0], [Row("a", [1, 2], [0, 1])])
            shard.close()
            with shard.journal.open("ab") as f:
                f.write(tail)
        else:
            assert list(shard.rows) == [shard.items[0][0]] or b"key" in tail
            shard.close()


ANSWER = {
    "choices": [{"message": {"content": "the cat"}, "finish_reason": "stop", "token_ids": [40, 41, 2], "text": "x"}],
    "prompt_token_ids": [1, 2],
    "usage": {"completion_tokens": 3},
}


@pytest.fixture(scope="module")
def setting(base: Any) -> Any:
    from draftsmith.data.chat import ChatConfig
    from draftsmith.data.generate import GenerationConfig, Setting

    return Setting(base.tokenizer, base.eos_ids, 100, GenerationConfig(max_new_tokens=8), ChatConfig())


@often(300)
@given(body=mutated(ANSWER))
def test_a_servers_answer(setting: Any, body: Any) -> None:
    from draftsmith.data.openai_api import NonsenseError, PromptError, read_answer

    try:
        found = read_answer(body, [1, 2], setting, "f:1")
    except (NonsenseError, PromptError, RowError):
        return
    assert all(0 <= i < 2**31 for i in found.ids)


@often(60)
@given(data=st.data())
def test_batch_files(here: Path, asked: Path, setting: Any, data: st.DataObject) -> None:
    from draftsmith.data.journal import Job
    from draftsmith.data.openai_api import ServerConfig
    from draftsmith.data.openai_batch import exchange

    shutil.rmtree(here / "out4", ignore_errors=True)
    shutil.copytree(asked, here / "out4")
    config_ = ServerConfig(model="m", api="chat", attempts=3)
    waiting = exchange(Job(here / "out4", 100), setting, config_, here / "out4" / "batches")
    assert waiting is not None
    names = [json.loads(line)["custom_id"] for line in waiting.read_text().splitlines()]
    response = {"status_code": 200, "body": ANSWER}
    answers = [{"custom_id": name, "response": response, "error": None} for name in names]
    several = mutated(answers).map(lambda v: b"\n".join(map(as_json, v)) if isinstance(v, list) else as_json(v))
    side = data.draw(st.sampled_from(["in", "out", "out"]))
    content = data.draw(st.one_of(several, harmed(b"\n".join(map(as_json, answers)))))
    waiting.with_name("round-0000.out.jsonl").write_bytes(b"\n".join(map(as_json, answers)))
    waiting.with_name(f"round-0000.{side}.jsonl").write_bytes(content)

    def take() -> None:
        try:
            exchange(Job(here / "out4", 100), setting, config_, here / "out4" / "batches")
        except PeerError as e:  # every row was refused
            raise DataError(str(e)) from None

    refused(take, "round-0000", "template differs")


@often(200)
@given(content=st.lists(st.one_of(st.binary(max_size=20), VALUES.map(as_json), st.just(b'{"step": 2}')), max_size=5))
def test_a_log_is_cut_to_whole_lines(here: Path, content: list[bytes]) -> None:
    from draftsmith.training.callbacks import truncate

    path = here / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(content))
    truncate(path, 2)
    steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
    assert steps[0] == 1
    assert all(step <= 2 for step in steps)
    assert path.read_bytes().endswith(b"\n")


# --- configurations

OVERRIDES = [
    "trainer.max_steps=3",
    "head=[medusa,hydra]",
    "data.sources={a: {path: x, weight: 2}}",
    "+optimizer.heads.medusa.lr=1e-4",
    "~experiment",
    "optimizer.betas=[0.9,0.99]",
    "trainer=gpu",
    "data.validation.share=0.1",
    "base.path='a b'",
    "heads.medusa.loss_weights=[1,2,3]",
]


@often(40)
@given(
    text=st.one_of(
        st.text(max_size=12),
        st.sampled_from(OVERRIDES).flatmap(lambda o: harmed(o.encode())).map(lambda b: b.decode("utf-8", "replace")),
    )
)
def test_overrides(text: str) -> None:
    refused(lambda: schemas.check("train", config.compose("train", [text])), "", code=2)


PARTS = [*schemas.SCHEMAS.items(), *((".".join(k), v) for k, v in schemas.OWN.items()), *schemas.TOP.items()]


@functools.cache
def usual(schema: type) -> Any:
    """A node of the schema as JSON: its defaults."""
    import dataclasses

    given_: dict[str, Any] = {}
    for f in dataclasses.fields(schema):  # type: ignore[arg-type]
        if f.default is not dataclasses.MISSING:
            given_[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            given_[f.name] = f.default_factory()
    return json.loads(json.dumps(given_, default=lambda v: dataclasses.asdict(v)))


@often(400)
@given(data=st.data(), part=st.sampled_from(PARTS))
def test_every_group_of_keys(data: st.DataObject, part: tuple[str, type]) -> None:
    key, schema = part
    node = data.draw(mutated(usual(schema)))
    assume(isinstance(node, dict))
    refused(lambda: config.typed(node, schema, key), key, code=2)
