"""A run that goes on after a kill at the worst step, with other workers, or with another configuration.

EXACT: the sha256 of the head's weights and every step's loss, to the last bit, are those of the run left alone.
"""
# ruff: noqa: F401, F811 (fixtures are imported, and asked for by name)

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from draftsmith import artifacts, claims, config, train
from draftsmith.errors import NumericsError
from tests.faults.resuming import (
    EPOCH,
    STEPS,
    alone,
    command,
    content,
    folder,
    losses,
    stopped,
    trained,
    weights,
)
from tests.integration.conftest import ROOT, Fork, call, finish, micro, training

pytestmark = pytest.mark.faults

SCHEDULERS = sorted(p.stem for p in (ROOT / "conf/scheduler").glob("*.yaml"))
WARM = "scheduler.warmup=0.3"  # six steps


# --- rows 3, 7, 8: the step at which it dies, the workers, the schedule


class Kill(NamedTuple):
    micro_batches: int  # of this start
    checkpoint: int
    more: str = "data.num_workers=0"


CASES: dict[str, tuple[list[str], list[Kill]]] = {
    **{
        f"{name}, in its warm-up and on an epoch's last step": (
            [f"scheduler={name}", WARM],
            [Kill(4, 4), Kill(4, EPOCH)],
        )
        for name in SCHEDULERS
    },
    "on a step that measures": (["data.validation.share=0.25", "data.validation.every=4"], [Kill(4, 4)]),
    "in the midst of an accumulation": (["trainer.accumulate=2", "data.batch_size=1"], [Kill(9, 4)]),
    "two workers for a while": (["scheduler=cosine", WARM], [Kill(5, 4), Kill(6, 8, "data.num_workers=2")]),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_it_ends_exactly_as_if_left_alone(case: str, alone: Any, command: list[str], tmp_path: Path) -> None:
    overrides, kills = CASES[case]
    for kill in kills:
        how = {"STRIKE": f"{kill.micro_batches}:{kill.checkpoint}"}
        script = str(Path(__file__).with_name("struck.py"))
        code, output = finish(Fork(script, *command, *overrides, kill.more, cwd=tmp_path, **how))
        assert code == -signal.SIGKILL, output
        sealed = sorted(p.parent.name for p in tmp_path.glob("run/checkpoints/step-*/COMPLETE.json"))
        assert sealed[-1] == f"step-{kill.checkpoint:08d}"
        assert not (tmp_path / "run/heads").exists()
    output = trained(tmp_path, *command, *overrides)
    assert f"resuming after step {kills[-1].checkpoint} of {STEPS}" in output
    want = alone(*overrides)
    assert losses(tmp_path / "run") == losses(want)
    assert weights(tmp_path / "run") == weights(want)
    lines = [(r / "metrics.jsonl").read_text().splitlines() for r in (tmp_path / "run", want)]
    measured = [[{k: v for k, v in json.loads(x).items() if "/" in k} for x in log] for log in lines]
    assert measured[0] == measured[1]  # validation and accuracies too


# --- row 9: another configuration


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: 0.001 -> 0.5"),
        ("seed=7", "seed: 0 -> 7"),
        ("data.length=80", "data.length: 64 -> 80"),
        ("data.loss_on=all", "data.loss_on: assistant -> all"),
        ("heads.medusa.num_layers=2", "heads.medusa.num_layers: 1 -> 2"),
        ("trainer.max_steps=30", "trainer.max_steps: 20 -> 30"),
        ("scheduler=constant", "scheduler.final: 0.0 -> 1.0, scheduler.kind: cosine -> constant"),
    ],
)
def test_another_configuration_is_refused_key_by_key(
    folder: Path, command: list[str], override: str, told: str
) -> None:
    before = content(folder / "run")
    code, output = call("train", *command, override, "trainer.log_every=2", "data.num_workers=3", cwd=folder)
    assert code == 2, output
    *table, error = output.splitlines()
    assert error.startswith(f"error: run_dir: run holds another run ({told}); to go on with ")
    keys = [part.partition(":")[0] for part in told.split(", ")]
    assert error.endswith(f"say resume.allow=[{','.join(keys)}], or choose another run_dir")
    rows = [line.split() for line in table]
    assert rows[0] == ["key", "before", "now"]
    for part in told.split(", "):
        key, _, values = part.partition(": ")
        assert [key, *values.split(" -> "), "refused"] in rows
    assert ["trainer.log_every", "1", "2", "harmless"] in rows
    assert ["data.num_workers", "0", "3", "harmless"] in rows
    column = table[0].index("before")
    assert all(line[column] != " " and line[column - 1] == " " for line in table)  # aligned
    assert content(folder / "run") == before


def test_many_differences_are_told_in_the_table_and_some_of_them_in_the_line(folder: Path, command: list[str]) -> None:
    code, output = call("train", *command, "head=[hydra]", cwd=folder)
    assert code == 2, output
    *table, error = output.splitlines()
    differing = [line for line in table if line.endswith("refused")]
    assert len(differing) > 6
    assert f", and {len(differing) - 6} more); " in error
    assert len(error) < 1000


def test_harmless_keys_pass_and_are_told(folder: Path, command: list[str], alone: Any) -> None:
    output = trained(folder, *command, "trainer.keep=5", "trainer.checkpoint_every=3")
    assert "harmless for a run that goes on: trainer.checkpoint_every: 4 -> 3, trainer.keep: 2 -> 5" in output
    assert weights(folder / "run") == weights(alone())
    assert json.loads((folder / "run/provenance.json").read_text())["changed"] == []


def test_an_allowed_key_goes_on_from_the_last_checkpoint_and_leaves_a_trace(
    folder: Path, command: list[str], alone: Any
) -> None:
    given = [*command, "optimizer.lr=0.5", "resume.allow=[optimizer.lr]"]
    output = trained(folder, *given)
    assert "resuming after step 4 of 20" in output
    assert "changed after step 4: optimizer.lr: 0.001 -> 0.5" in output
    run = folder / "run"
    whole, ours = losses(alone()), losses(run)
    assert [step for step, _ in ours] == [step for step, _ in whole]
    assert ours[:5] == whole[:5]  # the loss of step 5 is still that of the old weights
    assert all(a != b for a, b in zip(ours[5:], whole[5:], strict=True))
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert "resume" not in (run / "config.yaml").read_text()
    told = [{"step": 4, "keys": {"optimizer.lr": [0.001, 0.5]}}]
    assert json.loads((run / "provenance.json").read_text())["changed"] == told
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "failed", "changed", "started", "complete"]
    output = trained(folder, *given)  # the same command again
    assert "already complete" in output
    assert "note: resume.allow: optimizer.lr is what it was" in output


def test_whole_groups_may_be_allowed_and_the_last_step_moved(folder: Path, command: list[str]) -> None:
    more = ["trainer.max_steps=6", "scheduler=constant", "resume.allow=[trainer.max_steps,scheduler]"]
    output = trained(folder, *command, *more)
    assert "changed after step 4: scheduler.final: 0.0 -> 1.0, scheduler.kind: cosine -> constant, trainer" in output
    assert [step for step, _ in losses(folder / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_key_that_is_allowed_and_did_not_differ_is_told_and_changes_nothing(
    folder: Path, command: list[str], alone: Any
) -> None:
    output = trained(folder, *command, "resume.allow=[optimizer.lr,seed]")
    assert "note: resume.allow: optimizer.lr is what it was" in output
    assert "note: resume.allow: seed is what it was" in output
    assert weights(folder / "run") == weights(alone())
    assert losses(folder / "run") == losses(alone())


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ("optimizer.lrr", "resume.allow: optimizer.lrr: no such key; did you mean 'optimizer.lr'?"),
        ("global_batch", "resume.allow: global_batch stays what it was"),
    ],
)
def test_what_cannot_be_allowed_is_refused(folder: Path, command: list[str], allow: str, says: str) -> None:
    before = content(folder / "run")
    more = ["optimizer.lr=0.5", "trainer.accumulate=2", f"resume.allow=[{allow}]"]
    code, output = call("train", *command, *more, cwd=folder)
    assert code == 2, output
    assert says in output
    assert content(folder / "run") == before


def test_another_global_batch_is_refused_with_the_ways_to_keep_it(folder: Path, command: list[str]) -> None:
    """Row 6: the order of rows is a function of the global step. With so many processes as do not share it, those that
    do are named."""
    for more, cure in (
        (["trainer.accumulate=3"], "to go on, say data.batch_size=2 trainer.accumulate=1, or choose another run_dir"),
        (["trainer.devices=3"], "2 packs divide by 1, 2 processes, not by 3; start so many, or choose another run_dir"),
    ):
        cfg = config.compose("train", [*command, *more])
        with pytest.raises(config.ConfigError) as caught:
            claims.claim(cfg, folder / "run", resume=claims.ResumeConfig())
        assert "global_batch: 2 -> 6" in str(caught.value)
        assert str(caught.value).endswith(cure)


def test_sizes_of_a_head_can_never_change(folder: Path, command: list[str], alone: Any) -> None:
    """Allowed or not, the checkpoint's tensors would not fit; and the refusal leaves the run as it was."""
    more = ["heads.medusa.num_layers=2", "resume.allow=[heads]"]
    code, output = call("train", *command, *more, cwd=folder)
    assert code == 3, output
    assert "is nothing, the head needs (32, 32); use another run_dir" in output
    trained(folder, *command)
    assert weights(folder / "run") == weights(alone())


def test_a_complete_run_is_not_opened_again(alone: Any, command: list[str], tmp_path: Path) -> None:
    shutil.copytree(alone(), tmp_path / "run")
    before = content(tmp_path / "run")
    code, output = call("train", *command, "optimizer.lr=0.5", "resume.allow=[optimizer.lr]", cwd=tmp_path)
    assert code == 2, output
    assert output.endswith("holds another run (optimizer.lr: 0.001 -> 0.5); choose another run_dir")
    assert content(tmp_path / "run") == before


@pytest.fixture
def elsewhere(micro: Path, folder: Path) -> Path:
    """Other rows and another base, beside the run."""
    rows = (micro / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*rows[1:], rows[1]]) + "\n")
    shutil.copytree(micro / "base", folder / "base")
    file = folder / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 0.5
    artifacts.write_tensors(file, tensors)
    return folder


@pytest.mark.parametrize(
    ("key", "place", "tie"), [("data.path", "rows.jsonl", "rows"), ("base.path", "base", "base")], ids=["rows", "base"]
)
def test_other_rows_and_another_base_need_leave_of_their_own(
    elsewhere: Path, command: list[str], key: str, place: str, tie: str
) -> None:
    """A key of their group; leave for another key is none. Where only a path differs, the contents decide."""
    given = [*command, f"{key}={place}"]
    before = content(elsewhere / "run")
    for allow in ("", "optimizer.lr,seed"):
        code, output = call("train", *given, f"resume.allow=[{allow}]", cwd=elsewhere)
        assert code == 3, output
        assert f"its checkpoint was trained on other {tie} than there are now; bring them back" in output
        assert output.endswith(f"or go on with these by resume.allow=[{key.partition('.')[0]}]")
        assert content(elsewhere / "run") == before
    output = trained(elsewhere, *given, f"resume.allow=[{key}]")
    assert f"warning: {tie}: other than the checkpoint was trained on, as resume.allow lets it" in output
    assert "resuming after step 4 of 20" in output
    provenance = json.loads((elsewhere / "run/provenance.json").read_text())
    assert provenance["changed"][0]["keys"][key][1] == place
    assert "already complete" in trained(elsewhere, *given)


# --- row 25: the base stands still


class Reaches(L.Callback):
    """Something that touches the base in step 3."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, out: Any, batch: Any, idx: int) -> None:
        if idx == 2:
            parameter = next(module.base.model.parameters())
            if self.how == "asks for a gradient":
                parameter.requires_grad_(True)
            else:
                with torch.no_grad():
                    parameter.view(-1)[7] += 1e-6


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("asks for a gradient", "base: model.embed_tokens.weight asks for gradients, as nothing of a frozen base may"),
        ("writes", "base: its weights changed during training, as nothing of a frozen base may"),
    ],
)
def test_a_base_that_moved_exports_nothing_and_is_not_gone_on_from(
    how: str, says: str, command: list[str], alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NumericsError, match=says) as caught:
        train.run(config.compose("train", command), [Reaches(how)])
    assert caught.value.exit_code == 4
    assert "nothing was exported" in str(caught.value)
    assert not (tmp_path / "run/heads").exists()
    assert not (tmp_path / "run/COMPLETE.json").exists()
    assert (tmp_path / "run/checkpoints.drifted/step-00000020/COMPLETE.json").exists()
    output = trained(tmp_path, *command)  # the same command, with the base left in peace
    assert "resuming" not in output
    assert weights(tmp_path / "run") == weights(alone())
