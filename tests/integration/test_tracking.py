"""A run in W&B, offline: what is in its files, one run whatever happens, and no secret anywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts

from . import wandb_file
from .conftest import Fork, draftsmith, finish

CANARY = "canary5f1d9c27e0" + "0" * 24  # 40 characters, as W&B's keys have
SECRETS = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "OPENAI_API_KEY": CANARY}
STEPS = 600


@pytest.fixture(scope="module")
def command(training: list[str]) -> list[str]:
    own = ["logger=wandb", "logger.offline=true", "logger.project=p", "logger.tags=[a,b]"]
    return [*training, *own, f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=20", "run_dir=run"]


@pytest.fixture(scope="module")
def said(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, all output) of a run that was killed under W&B's eyes, resumed, evaluated and reported."""
    folder = tmp_path_factory.mktemp("tracked")
    run = folder / "run"
    process = Fork("train", *command, cwd=folder, **SECRETS)
    deadline = time.monotonic() + 180
    while not (run / "tracker.json").exists() or history(run) < 20:  # W&B takes seconds to begin
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "W&B never began"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    _, output = finish(process)
    code, again = draftsmith("train", *command, cwd=folder, **SECRETS)
    assert code == 0, again
    assert "resuming after step" in again
    few = ["repeats=1", "baselines=few", "prompts.path=prompts.jsonl", "decoding.max_new_tokens=8"]
    asked = [
        {"messages": [{"role": "user", "content": "What <b>now</b>?"}]},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in asked))
    code, judged = draftsmith("evaluate", *few, "run_dir=run", cwd=folder, **SECRETS)
    assert code == 0, judged
    code, told = draftsmith("report", "run_dirs=[run]", cwd=folder, **SECRETS)
    assert code == 0, told
    return folder, output + again + judged + told


def history(run: Path) -> int:
    return sum(len(part.history) for part in wandb_file.of(run))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_killed_and_resumed_it_is_one_run_whose_history_is_metrics_jsonl(said: tuple[Path, str]) -> None:
    run = said[0] / "run"
    parts = wandb_file.of(run)
    assert len(parts) == 3  # before the kill, after it, evaluate
    assert {part.run["id"] for part in parts} == {artifacts.read_json(run / "tracker.json")["kept"]["id"]}
    steps = [line["step"] for part in parts[:2] for line in part.history]
    assert len(steps) > len(set(steps)), "the kill came before any step was done again"
    found = wandb_file.merged(parts)
    assert found[-1]["samples._type"] == "table-file"
    found[-1] = {k: v for k, v in found[-1].items() if not k.startswith("samples.")}
    assert found == metrics(run)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))


def test_every_checkpoint_keeps_the_id(said: tuple[Path, str]) -> None:
    run = said[0] / "run"
    own = artifacts.read_json(run / "tracker.json")["kept"]
    states = [artifacts.read_json(p) for p in run.glob("checkpoints/step-*/state.json")]
    assert states
    assert all(state["tracked"] == own for state in states)


def test_config_axis_summary_and_table(said: tuple[Path, str]) -> None:
    run = said[0] / "run"
    first, *_, last = wandb_file.of(run)
    assert (first.run["project"], first.run["name"]) == ("p", "run")
    assert first.config["heads"]["medusa"]["num_heads"] == 3
    assert first.config["trainer"]["max_steps"] == STEPS
    assert "logger" not in first.config
    assert ("*", "step") in first.metrics
    told = artifacts.read_json(run / "evaluation.json")["heads"]["medusa"]
    for key in ("tokens_per_step", "speedup"):
        assert last.summary[f"medusa/{key}"] == told[key]
    assert last.summary["medusa/lossless"] is True
    (path,) = run.glob("wandb/offline-run-*/files/media/table/*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["head", "prompt", "answer", "accepted", "steps"]
    assert len(table["data"]) == len(told["samples"]) == 2
    head, prompt, _, accepted, steps = table["data"][0]
    assert head == "medusa"
    assert "What <b>now</b>?" in prompt
    assert accepted == sum(len(s["accepted"]) for s in told["samples"][0]["steps"])
    assert steps == len(told["samples"][0]["steps"]) - 1  # the first token is prefill's
    (shown,) = [a["files"] for a in last.artifacts if a["name"].endswith("samples")]
    pages = [Path(where).read_text() for name, where in shown.items() if name.endswith(".html")]
    assert len(pages) == 2
    assert all('title="own"' in page for page in pages)


def test_the_lineage_leads_from_rows_to_heads(said: tuple[Path, str]) -> None:
    run = said[0] / "run"
    ties = artifacts.read_json(run / "provenance.json")["sha256"]
    found = {a["type"]: a for part in wandb_file.of(run) for a in part.artifacts if a["type"] in ("rows", "head")}
    rows, head = found["rows"], found["head"]
    assert rows["used"]
    assert rows["metadata"]["sha256"] == ties["rows"]
    assert not head["used"]
    assert head["name"] == "head-medusa"
    assert head["metadata"]["made_from"] == rows["name"]
    manifest = artifacts.read_json(run / "heads" / "medusa" / "manifest.json")["files"]
    assert head["metadata"]["files"]["model.safetensors"] == manifest["model.safetensors"]
    assert "model.safetensors" not in head["files"]  # logger.weights=false
    assert {"config.json", "manifest.json", "README.md"} <= set(head["files"])


def test_no_secret_is_in_any_byte_of_the_run_the_trackers_files_the_output_or_the_report(
    said: tuple[Path, str],
) -> None:
    folder, output = said
    assert CANARY not in output
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"report.html", "config.yaml", "provenance.json", "tracker.json", "debug.log"} <= {p.name for p in files}
    assert [str(p) for p in files if CANARY.encode() in p.read_bytes()] == []


@pytest.mark.parametrize(
    "override",
    [
        f"+logger.api_key={CANARY}",
        f"logger.name={CANARY}",
        f"logger.uri=http://me:{CANARY}@127.0.0.1:1",
        f"base.path=https://me:{CANARY}@127.0.0.1/base",
        f"+wandb_key={CANARY}",
    ],
)
def test_a_secret_on_the_command_line_is_refused_unseen(override: str, command: list[str], tmp_path: Path) -> None:
    code, output = draftsmith("train", *command, override, cwd=tmp_path, **SECRETS)
    assert code == 2, output
    assert output.startswith("error: ")
    assert CANARY not in output
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_server_that_never_answers_costs_the_end_its_patience(
    training: list[str], silent_server: int, tmp_path: Path
) -> None:
    own = ["logger=wandb", "logger.patience=1", "trainer.max_steps=4", "run_dir=run"]
    where = {"WANDB_BASE_URL": f"http://127.0.0.1:{silent_server}", "WANDB_MODE": "online"}
    code, output = draftsmith("train", *training, *own, cwd=tmp_path, **SECRETS, **where)
    assert code == 0, output
    assert "wandb is still busy after 1 s and is left alone" in output
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert artifacts.is_complete(tmp_path / "run", manifest="COMPLETE.json")
