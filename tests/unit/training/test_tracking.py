"""Trackers get every line and their results; what they do wrong reaches nobody."""

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from draftsmith.errors import ConfigError
from draftsmith.training import tracking
from draftsmith.training.settings import LoggerConfig
from draftsmith.training.tracking import Tracker

LINES = [{"step": n, "train/medusa/loss": 1.0 / n, "lr": 0.1} for n in (1, 2, 3, 4)]
SAMPLE = {
    "prompt": "Count <b>",
    "steps": [
        {"accepted": ["1", " <2>"], "own": ",", "rejected": ["x"]},
        {"accepted": [], "own": "", "rejected": []},
    ],
}
PROOF = {"ok": True, "mismatches": 0, "near_ties": 1}
EVALUATION = {
    "heads": {
        "medusa": {"tokens_per_step": 2.5, "speedup": 1.5, "parameters": 10, "lossless": PROOF, "samples": [SAMPLE]},
        "lossy": {"tokens_per_step": 1.5, "speedup": None},
    }
}
SHOWN = {"seed": 0, "heads": {"medusa": {"num_heads": 3}}}


def write(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def in_two_parts(run_dir: Path, config: LoggerConfig) -> str:
    """Steps 1 to 3, killed with a checkpoint of step 2, then 3 and 4, as a run does; the id it had throughout."""
    first = Tracker(config, run_dir, SHOWN)
    first.begin({}, 0)
    write(run_dir, LINES[:3])
    for line in LINES[:3]:
        first.line({**line, "lr": 0.2} if line["step"] == 3 else line)
    first.close()
    write(run_dir, LINES[:2])
    second = Tracker(config, run_dir, SHOWN)
    second.begin(first.kept, 2)
    write(run_dir, LINES)
    for line in LINES[2:]:
        second.line(line)
    second.close()
    assert second.kept == first.kept
    tracking.conclude(run_dir, EVALUATION)
    return first.kept["id"]


def test_csv_holds_every_step_once_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_two_parts(tmp_path, LoggerConfig("csv"))
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    found = [(int(r["step"]), float(r["train/medusa/loss"]), float(r["lr"])) for r in rows if r["lr"]]
    assert found == [(x["step"], x["train/medusa/loss"], x["lr"]) for x in LINES]
    assert [float(r["medusa/tokens_per_step"]) for r in rows if r["medusa/tokens_per_step"]] == [2.5]
    assert "num_heads: 3" in (tmp_path / "csv" / "hparams.yaml").read_text()
    assert "warning" not in capsys.readouterr().out


def test_tensorboard_keeps_the_last_value_of_a_step_that_was_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_two_parts(tmp_path, LoggerConfig("tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("lr")] == [(n, 0.1) for n in (1, 2, 3, 4)]
    assert [e.value for e in events.Scalars("medusa/speedup")] == [1.5]
    assert "warning" not in capsys.readouterr().out


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_two_parts(tmp_path, LoggerConfig("mlflow", project="p", tags=["t"]))
    assert "warning" not in capsys.readouterr().out
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])  # type: ignore[union-attr]
    assert run.data.params["heads/medusa/num_heads"] == "3"
    last = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "lr")}
    assert last == dict.fromkeys((1, 2, 3, 4), 0.1)
    assert run.data.metrics["medusa/tokens_per_step"] == 2.5
    assert tracking.told(tmp_path)["kept"]["run"] == run.info.run_id


class Broken:
    """A logger that takes `good` lines, then raises."""

    def __init__(self, good: int) -> None:
        self.good, self.taken, self.experiment = good, 0, object()

    def log_metrics(self, line: Any, step: int) -> None:
        if self.taken == self.good:
            raise ConnectionError("gone\nfor good")
        self.taken += 1

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("good", [0, 2])
def test_a_tracker_that_dies_is_told_of_once(tmp_path: Path, good: int, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Broken(good)
    tracker = Tracker(LoggerConfig("csv"), tmp_path, SHOWN, lambda *_: logger)
    tracker.begin({}, 0)
    for line in LINES:
        tracker.line(line)
    tracker.close()
    assert logger.taken == good
    (told,) = capsys.readouterr().out.splitlines()
    assert "logger: csv ended by ConnectionError: gone for good" in told
    assert "metrics.jsonl" in told


def test_one_that_cannot_be_opened_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(*_: Any) -> Any:
        raise OSError("no such host")

    tracker = Tracker(LoggerConfig("csv"), tmp_path, SHOWN, never)
    tracker.begin({}, 0)
    tracker.line(LINES[0])
    tracker.close()
    assert "ended by OSError: no such host" in capsys.readouterr().out
    assert tracking.told(tmp_path) == {"kept": {}}  # nobody goes on with what never was


def test_one_that_hangs_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training's side returns while the tracker's is stuck in its first line."""
    release, stuck = threading.Event(), threading.Event()

    class Hanging(Broken):
        def log_metrics(self, line: Any, step: int) -> None:
            stuck.set()
            release.wait(60)

    tracker = Tracker(LoggerConfig("csv", patience=0.05), tmp_path, SHOWN, lambda *_: Hanging(9))
    tracker.begin({}, 0)
    for line in LINES:
        tracker.line(line)
    assert stuck.wait(60)
    tracker.close()
    assert not release.is_set()
    release.set()
    assert "csv is still busy after 0.05 s and is left alone" in capsys.readouterr().out


@pytest.mark.parametrize(("failed", "said"), [(False, "success"), (True, "failed")])
def test_it_is_told_how_the_run_ended(tmp_path: Path, failed: bool, said: str) -> None:
    logger = Broken(9)
    tracker = Tracker(LoggerConfig("csv"), tmp_path, SHOWN, lambda *_: logger)
    tracker.begin({}, 0)
    tracker.close(failed=failed)
    assert logger.status == said


def test_what_a_checkpoint_was_too_early_for_is_known_from_the_record(tmp_path: Path) -> None:
    """MLflow names its run when its server has answered, which may be after the first checkpoints."""
    record = {"kept": {"kind": "mlflow", "id": "a", "run": "r"}, "logger": {}, "shown": {}}
    (tmp_path / tracking.FILE).write_text(json.dumps(record))
    seen: list[Any] = []
    for kept in ({"kind": "mlflow", "id": "a"}, {"kind": "mlflow", "id": "b"}):
        tracker = Tracker(
            LoggerConfig("mlflow"), tmp_path, SHOWN, lambda *told: seen.append(dict(told[3])) or Broken(9)
        )
        tracker.begin(kept, 2)
        tracker.close()
    assert seen == [{"kind": "mlflow", "id": "a", "run": "r"}, {"kind": "mlflow", "id": "b"}]


def test_a_password_in_a_trackers_complaint_is_crossed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(*_: Any) -> Any:
        raise OSError("no answer from http://me:canary99@host/api")

    tracker = Tracker(LoggerConfig("csv"), tmp_path, SHOWN, never)
    tracker.begin({}, 0)
    tracker.close()
    told = capsys.readouterr().out
    assert "http://***@host/api" in told
    assert "canary99" not in told


@pytest.mark.parametrize("logger", [{"kind": "neptune"}, {"kind": "csv", "colour": 1}])
def test_results_for_a_tracker_that_is_not_here_are_told_of(
    tmp_path: Path, logger: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"kept": {"kind": "csv", "id": "a"}, "logger": logger, "shown": {}}
    (tmp_path / tracking.FILE).write_text(json.dumps(record))
    tracking.conclude(tmp_path, EVALUATION)
    assert "the tracker is not told" in capsys.readouterr().out


def test_another_kind_begins_anew(tmp_path: Path) -> None:
    tracker = Tracker(LoggerConfig("csv"), tmp_path, SHOWN)
    tracker.begin({"kind": "mlflow", "id": "abc", "run": "r"}, 2)
    tracker.close()
    assert tracker.kept["kind"] == "csv"
    assert tracker.kept["id"] != "abc"


def test_none_is_nobody(tmp_path: Path) -> None:
    assert tracking.of(LoggerConfig(), tmp_path, SHOWN) is None
    tracking.conclude(tmp_path, EVALUATION)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"kept": 1}'])
def test_a_damaged_record_is_told_of_and_forgotten(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / tracking.FILE).write_text(text)
    assert tracking.told(tmp_path) == {"kept": {}}
    assert "tracker.json does not tell" in capsys.readouterr().out


def test_summary() -> None:
    assert tracking.summary(EVALUATION) == {
        "medusa/tokens_per_step": 2.5,
        "medusa/speedup": 1.5,
        "medusa/parameters": 10,
        "medusa/lossless": True,
        "medusa/mismatches": 0,
        "medusa/near_ties": 1,
        "lossy/tokens_per_step": 1.5,
    }


def test_a_text_is_coloured_by_who_wrote_it_and_cannot_be_markup() -> None:
    told = tracking.coloured(SAMPLE)
    assert told.count('title="accepted"') == 2
    assert told.count('title="own"') == 1  # the last step was cut: it has none
    assert told.count("line-through") == 1
    assert "&lt;2&gt;" in told
    assert "<2>" not in told


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="choose one of none, wandb, csv"):
        LoggerConfig("neptune")
    with pytest.raises(ConfigError, match="patience=-1"):
        LoggerConfig(patience=-1)
    monkeypatch.setattr("draftsmith.training.settings.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'draftsmith\[mlflow\]'"):
        LoggerConfig("mlflow")
    assert LoggerConfig("csv").kind == "csv"
