"""draftsmith distill as a user calls it: shards, quarantine, resume, several processes, changed minds."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from draftsmith import config, distill, supply
from draftsmith.base import outlines
from draftsmith.data import importing
from draftsmith.data.rows import read_folder
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError, PeerError
from tests.integration.conftest import Fork, call, finish, lines

GENERATION = ["data.generation.max_new_tokens=10", "data.generation.batch_size=3", "data.generation.shard_rows=4"]


@pytest.fixture(scope="module")
def folder(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """asked.jsonl: ten questions, two of them equal, and two rows that are none; one/: the rows of one process."""
    folder = tmp_path_factory.mktemp("distill")
    chats = [json.loads(line)["messages"] for line in (micro / "chats.jsonl").read_text().splitlines()]
    rows: list = [{"messages": c[:1]} for c in chats[:8]]
    rows += [{"messages": chats[0][:1]}, {"prompt": "Once upon a time"}, {"messages": []}, {"x": 1}]
    lines(folder / "asked.jsonl", rows)
    answer(micro, folder, f"out={folder / 'one'}")
    return folder


def overrides(micro: Path, folder: Path, *more: str) -> list[str]:
    base = ["base=hf", f"base.path={micro / 'base'}", "threads=1", "data=prompts"]
    asked = [f"data.prompts.path={folder / 'asked.jsonl'}", "data.generation.temperature=1", "data.on_bad=skip"]
    return [*base, *GENERATION, *asked, *more]


def answer(micro: Path, folder: Path, *more: str) -> None:
    """The verb in this process."""
    distill.run(config.compose("distill", overrides(micro, folder, *more)))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("rows-*.parquet"))}


def test_in_is_out_and_quarantined(micro: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, facts = read_folder(folder / "one")
    assert facts["funnel"] == {"in": 12, "kept": 10, "quarantined": {"messages": 1, "shape": 1}}
    assert sorted(contents(folder / "one")) == [f"rows-0000{n}.parquet" for n in range(3)]
    ids = sorted(row.id for row in rows)
    assert len(set(ids)) == 10
    assert sum(name.endswith("-1") for name in ids) == 1  # equal questions stay apart
    bad = [json.loads(line) for line in (folder / "one" / "quarantine.jsonl").read_text().splitlines()]
    assert [b["where"].rsplit(":")[-1] for b in bad] == ["11", "12"]
    assert all(row.seed is not None and row.source.startswith(str(folder)) for row in rows)
    capsys.readouterr()
    answer(micro, folder, f"out={folder / 'one'}")
    assert capsys.readouterr().out.strip().endswith("one: already complete")


def test_bad_rows_stop_it_unless_told(micro: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"asked\.jsonl:11: .*2 of 12 rows do not fit"):
        answer(micro, folder, "data.on_bad=error", f"out={tmp_path / 'rows'}")
    assert len((tmp_path / "rows.quarantine.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "rows").glob("rows-*"))


def test_another_command_does_not_go_on(micro: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "rows")
    (tmp_path / "rows" / "manifest.json").unlink()  # as if it had been stopped before the end
    with pytest.raises(ConfigError, match="rows of another generation"):
        answer(micro, folder, "data.generation.seed=5", f"out={tmp_path / 'rows'}")
    lines(tmp_path / "asked.jsonl", [{"prompt": "Else"}])
    with pytest.raises(ConfigError, match="rows of another source"):
        answer(micro, tmp_path, f"out={tmp_path / 'rows'}")


def test_several_processes_make_the_rows_of_one(micro: Path, folder: Path, tmp_path: Path) -> None:
    """Two at once, told by torchrun's variables; three by srun's, one after the other."""
    asked = overrides(micro, folder, "out=two")
    ranks = [Fork("distill", *asked, cwd=tmp_path, RANK=str(r), WORLD_SIZE="2") for r in (1, 0)]
    ended = [finish(p) for p in ranks]
    assert [code for code, _ in ended] == [0, 0], ended
    assert contents(folder / "one") == contents(tmp_path / "two")
    for rank in range(3):
        with pytest.MonkeyPatch.context() as m:
            m.setenv("SLURM_PROCID", str(rank))
            m.setenv("SLURM_STEP_NUM_TASKS", "3")
            assert not (tmp_path / "three" / "manifest.json").exists()
            answer(micro, folder, f"out={tmp_path / 'three'}")
    assert contents(folder / "one") == contents(tmp_path / "three")
    assert (tmp_path / "three" / "manifest.json").exists()


def test_half_done_by_two_is_finished_by_one(micro: Path, folder: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        with pytest.MonkeyPatch.context() as m:
            m.setenv("RANK", str(rank))
            m.setenv("WORLD_SIZE", "3")
            answer(micro, folder, f"out={tmp_path / 'two'}")
    assert len(contents(tmp_path / "two")) == 2
    answer(micro, folder, f"out={tmp_path / 'two'}")
    assert contents(folder / "one") == contents(tmp_path / "two")


def test_another_base_does_not_go_on(micro: Path, folder: Path, tmp_path: Path) -> None:
    """Whatever its path: a moved base is the same one, other weights in the same place are not."""
    base = tmp_path / "base"
    shutil.copytree(micro / "base", base)
    shutil.copytree(folder / "one", tmp_path / "rows")
    where = [f"out={tmp_path / 'rows'}", f"base.path={base}"]
    answer(micro, folder, *where)  # complete, and the same base elsewhere
    weights = load_file(base / "model.safetensors")
    changed = {name: tensor + 0.5 * (name == "lm_head.weight") for name, tensor in weights.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"rows of another base \(weights_sha256 differ\)"):
        answer(micro, folder, *where)
    (tmp_path / "rows" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="rows of another base"):
        answer(micro, folder, *where)


def test_a_complete_folder_that_is_damaged(micro: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "rows")
    (tmp_path / "rows" / "rows-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"rows-00001\.parquet: listed in manifest\.json but missing"):
        answer(micro, folder, f"out={tmp_path / 'rows'}")


def test_the_source_may_vanish_once_it_was_read(micro: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(folder / "asked.jsonl", tmp_path / "asked.jsonl")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("RANK", "0")
        m.setenv("WORLD_SIZE", "2")
        answer(micro, tmp_path, f"out={tmp_path / 'rows'}")
    (tmp_path / "asked.jsonl").unlink()
    answer(micro, tmp_path, f"out={tmp_path / 'rows'}")
    assert len(read_folder(tmp_path / "rows")[0]) == 10


def test_nobody_waits_for_a_first_process_that_ended(micro: Path, folder: Path, tmp_path: Path) -> None:
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:
        m.setattr(supply, "START", 0.5)
        m.setenv("RANK", "1")
        m.setenv("WORLD_SIZE", "2")
        with pytest.raises(PeerError, match="the first process did not start"):
            answer(micro, folder, f"out={tmp_path / 'rows'}")


def test_weights_of_prompts_reach_the_training(micro: Path, folder: Path, tmp_path: Path) -> None:
    named = f"data.prompts.sources={{a: {{path: {folder / 'asked.jsonl'}, weight: 3}}}}"
    answer(micro, folder, "data.prompts.path=null", named, f"out={tmp_path / 'rows'}")
    rows, facts = read_folder(tmp_path / "rows")
    assert facts["weights"] == {"a": 3.0}
    data = DataConfig(path=str(tmp_path / "rows"))
    spec = outlines.outline(str(micro / "base")).spec
    assert set(importing.choose(rows, data, spec, None, facts["weights"]).weights_N) == {3.0}


def test_a_second_writer_is_refused(micro: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with open(tmp_path / "rows" / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 7 on elsewhere")
        lock.flush()
        with pytest.raises(ConfigError, match="process 7 on elsewhere"):
            answer(micro, folder, f"out={tmp_path / 'rows'}")


def test_nothing_left_is_no_success(micro: Path, folder: Path, tmp_path: Path) -> None:
    lines(tmp_path / "asked.jsonl", [{"prompt": "Why? " * 200}])
    for _ in range(2):  # the second time too
        with pytest.raises(DataError, match=r"0 of 1 rows left \(too_long 1\)"):
            answer(micro, tmp_path, f"out={tmp_path / 'rows'}")


def test_sources_by_name_and_weight(micro: Path, tmp_path: Path) -> None:
    """Two sources, one twice as often; what trains reads local rows only."""
    lines(tmp_path / "a.jsonl", [{"prompt": f"a {i}", "completion": "yes, it is so"} for i in range(6)])
    lines(tmp_path / "b.jsonl", [{"q": f"b {i}", "a": "no, it is not"} for i in range(4)])
    named = (
        "data.sources={a: {path: a.jsonl, weight: 0.5}, b: {path: b.jsonl, weight: 2, columns: {prompt: q,"
        " completion: a}}}"
    )
    command = ["base=hf", f"base.path={micro / 'base'}", "data=jsonl", named, "data.length=64"]
    more = ["data.batch_size=1", "trainer.epochs=null", "trainer.max_steps=2", "trainer.threads=1", "run_dir=run"]
    code, output = call("train", *command, *more, cwd=tmp_path)
    assert code == 0, output
    assert "read 10 rows: all of 10 rows fit" in output
    assert "rows by weight: a 6 x 0.5, b 4 x 2 -> 11 in the first epoch" in output


def test_validation_is_measured_and_never_learned(micro: Path, tmp_path: Path) -> None:
    command = ["base=hf", f"base.path={micro / 'base'}", "data=jsonl", f"data.path={micro / 'chats.jsonl'}"]
    command += ["data.length=256", "data.batch_size=2", "data.long_rows=truncate", "trainer.threads=1"]
    command += ["trainer.epochs=null", "trainer.max_steps=4"]
    code, output = call(
        "train", *command, "data.validation.share=0.3", "data.validation.every=2", "run_dir=run", cwd=tmp_path
    )
    assert code == 0, output
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [t["step"] for t in told if "validation/medusa/loss" in t] == [2, 4]
    leak = f"data.validation.path={micro / 'chats.jsonl'}"
    code, output = call("train", *command, leak, "run_dir=leaks", cwd=tmp_path)
    assert code == 3
    assert "are trained on too" in output


def test_shards_are_plain_parquet(folder: Path) -> None:
    table = pq.read_table(folder / "one" / "rows-00000.parquet")
    assert {"id", "ids", "mask", "source", "said", "seed", "finish"} <= set(table.column_names)
    first = table.to_pylist()[0]
    assert len(first["ids"]) == len(first["mask"])
    assert json.loads(first["said"])["messages"][-1]["role"] == "assistant"
