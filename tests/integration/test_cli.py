"""The command line: every form is the same process, every mistake one line and its exit code."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith import claims, config
from draftsmith.artifacts import file_sha256
from draftsmith.errors import ConfigError

from .conftest import ROOT, Fork, draftsmith, finish, lines, start

FORMS = {
    "file": [sys.executable, str(ROOT / "src" / "train.py")],
    "module": [sys.executable, "-m", "draftsmith.train"],
    "script": [str(Path(sys.executable).parent / "draftsmith"), "train"],
}
HEAD = "heads/medusa/model.safetensors"


@pytest.fixture(scope="module")
def trained(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """trained(form, devices): the run of six steps, made once. The global batch is the same on one and on two."""
    folder = tmp_path_factory.mktemp("forms")

    @functools.cache
    def by(form: str, devices: int) -> Path:
        more = ["trainer.max_steps=6", f"trainer.devices={devices}", f"data.batch_size={4 // devices}"]
        run = folder / f"{form}-on-{devices}"
        given = [*training, *more, f"run_dir={run}"]
        forked = form == "module" and devices == 1  # the same but for the time that importing takes
        process = Fork("train", *given, cwd=folder) if forked else start([*FORMS[form], *given], folder)
        code, output = finish(process)
        assert code == 0, output
        assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5, 6]  # one process writes
        return run

    return by


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])  # test_two_processes… has one of them
def test_every_form_trains_the_same_head(trained: Callable[[str, int], Path], devices: int) -> None:
    """`devices=2`: the command becomes the launcher of two, from each form."""
    found = {form: file_sha256(trained(form, devices) / HEAD) for form in FORMS}
    assert len(set(found.values())) == 1, found


def test_two_processes_equal_one(trained: Callable[[str, int], Path]) -> None:
    """Same global batch: gradients and normalisers are global, so weights agree to rounding."""
    runs = [trained("script", devices) for devices in (1, 2)]
    one, two = (load_file(run / HEAD) for run in runs)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    losses = [[m["train/medusa/loss"] for m in metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_typo_exits_2_within_3_seconds(form: str, tmp_path: Path) -> None:
    began = time.monotonic()
    code, output = finish(start([*FORMS[form], "trainer.max_stesp=3"], tmp_path))
    assert time.monotonic() - began < 3 * PATIENCE
    assert code == 2
    assert output.strip() == "error: trainer.max_stesp: no such key; did you mean 'trainer.max_steps'?"
    assert not list(tmp_path.iterdir())


PATIENCE = 4  # a busy test machine may be this much slower than the 3 s promised; imports are tested by name


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["head=medsa"], 2, "head: no such choice 'medsa'; did you mean 'medusa'?"),
        (["experiment=quikstart"], 2, "did you mean 'quickstart'?"),
        (["trainer.max_steps=abc"], 2, "trainer.max_steps: Value 'abc'"),
        (["heads.medusa.num_heads=0"], 2, "heads.medusa: num_heads=0: give at least 1"),
        (["heads.medusa.loss_weights=[1,2]"], 2, "2 weights for num_heads=3; give one per head"),
        (["+foo=1"], 2, "foo: no such key"),
        (["+trainer.foo=1"], 2, "trainer.foo: no such key"),
        (["head=[]"], 2, "head: nothing to train"),
        (["seed=x"], 2, "seed='x': give an integer"),
        (["heads.medusa._target_=draftsmith.exporters.native.Native"], 2, "Native is no head"),
        (["optimizer._target_=os.system"], 2, "optimizer._target_: 'os.system' is not allowed"),
        (["strategy=single", "trainer.devices=2"], 2, "strategy: single with 2 processes"),
        (["data.path=nowhere.jsonl"], 3, "nowhere.jsonl: no such file or folder"),
        (["base.path=nowhere"], 3, "nowhere"),
        (["data.length=16"], 3, "rows.jsonl:1: "),
        (["run_dir=/proc/draftsmith/run"], 5, "run_dir: /proc/draftsmith/run cannot be written"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(training: list[str], tmp_path: Path, overrides: list[str], code: int, says: str) -> None:
    got, output = draftsmith("train", *training, "trainer.max_steps=2", *overrides, cwd=tmp_path)
    assert got == code, output
    assert says in output
    assert output.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"ids": [1, 2', "bad.jsonl:2: not JSON"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "bad.jsonl:2: no assistant text to learn from"),
    ],
)
def test_bad_rows_are_named(micro: Path, training: list[str], tmp_path: Path, line: str, says: str) -> None:
    """Two through the whole command; every other kind of bad row is a unit test of data/rows.py."""
    good = (micro / "rows.jsonl").read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    code, output = draftsmith("train", *training, "trainer.max_steps=2", "data.path=bad.jsonl", cwd=tmp_path)
    assert code == 3, output
    assert says in output


def test_a_run_directory_never_mixes_two_runs(training: list[str], tmp_path: Path) -> None:
    more = [*training, "trainer.max_steps=2", "run_dir=run"]
    assert draftsmith("train", *more, cwd=tmp_path)[0] == 0
    code, output = draftsmith("train", *more, cwd=tmp_path)
    assert (code, "already complete" in output) == (0, True)
    code, output = draftsmith("train", *more, "optimizer.lr=0.5", cwd=tmp_path)
    assert code == 2, output
    assert "holds another run (optimizer.lr: 0.001 -> 0.5)" in output
    code, output = draftsmith("train", *more, "trainer.devices=2", cwd=tmp_path)
    assert code == 2, output  # twice the processes is twice the global batch: another run
    assert "global_batch: 2 -> 4" in output
    assert "to go on, say data.batch_size=1 trainer.accumulate=1, or choose another run_dir" in output
    three = config.compose("train", [*more, "trainer.devices=3"])
    with pytest.raises(ConfigError, match="2 packs divide by 1, 2 processes, not by 3; start so many"):
        claims.claim(three, tmp_path / "run")


def test_rows_that_changed_are_not_resumed_on(micro: Path, training: list[str], tmp_path: Path) -> None:
    shutil.copy(micro / "rows.jsonl", tmp_path / "rows.jsonl")
    more = [*training, "data.path=rows.jsonl", "trainer.max_steps=2", "run_dir=run"]
    assert draftsmith("train", *more, cwd=tmp_path)[0] == 0
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[1:]) + "\n")
    code, output = draftsmith("train", *more, cwd=tmp_path)
    assert code == 3, output
    assert "complete, but with other data than there is now" in output
    (tmp_path / "run" / "COMPLETE.json").unlink()
    code, output = draftsmith("train", *more, cwd=tmp_path)
    assert code == 3, output
    assert "trained on other rows than there are now" in output


def test_the_step_by_step_loop(micro: Path, training: list[str], tmp_path: Path) -> None:
    """distill -> train -> evaluate -> export on one's own base, and the Python API on what it leaves."""
    base = ["base=hf", f"base.path={micro / 'base'}"]
    distil = [*base, "data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "out=rows"]
    code, output = draftsmith("distill", *distil, "data.generation.max_new_tokens=24", cwd=tmp_path)
    assert code == 0, output
    trained = [*training, "data.path=rows", "data.length=256", "trainer.max_steps=3", "run_dir=run"]
    code, output = draftsmith("train", *trained, cwd=tmp_path)
    assert code == 0, output
    prompts = [f"prompts.path={micro / 'prompts.jsonl'}"]
    short = ["decoding.max_new_tokens=16", "repeats=1", "threads=1"]
    code, output = draftsmith("evaluate", "run_dir=run", *prompts, *short, cwd=tmp_path)
    assert code == 0, output
    assert "warning: 6 of 6 prompts were trained on" in output
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["decoding"]["prompts"]["trained_on"] == 6
    head = result["heads"]["medusa"]
    assert head["lossless"]["mismatches"] == 0
    assert head["lossless"]["prompts"] == 6
    assert head["tokens_per_step"] == pytest.approx(1 + head["accepted_drafts_per_step"])
    assert head["speedup"] == pytest.approx(head["tokens_per_second"] / result["autoregressive"]["tokens_per_second"])
    assert Path(result["base"]["path"]) == micro / "base"
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "heads", "evaluation.json"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    for exporter in ("portable", "native"):
        code, output = draftsmith("export", "run_dir=run", f"exporter={exporter}", f"out={exporter}", cwd=tmp_path)
        assert code == 0, output
    assert (tmp_path / "portable" / "medusa_lm_head.safetensors").is_file()

    from draftsmith import generate, load_base, load_head

    loaded = load_base(str(micro / "base"))
    for folder in (tmp_path / "run" / "heads" / "medusa", tmp_path / "native"):
        with_head = generate(loaded, [11, 12, 13], head=load_head(folder, base=loaded), max_new_tokens=20)
        assert with_head.tokens == generate(loaded, torch.tensor([[11, 12, 13]]), max_new_tokens=20).tokens
        assert with_head.steps <= 20


def test_distill_again_is_already_complete(micro: Path, tmp_path: Path) -> None:
    lines(tmp_path / "p.jsonl", [{"prompt": "Once"}])
    args = ["base=hf", f"base.path={micro / 'base'}", "data=prompts", "data.prompts.path=p.jsonl", "out=rows"]
    more = ["data.generation.max_new_tokens=8"]
    assert draftsmith("distill", *args, *more, cwd=tmp_path)[0] == 0
    code, output = draftsmith("distill", *args, *more, cwd=tmp_path)
    assert (code, "already complete" in output) == (0, True)
    lines(tmp_path / "p.jsonl", [{"prompt": "Twice"}])
    code, output = draftsmith("distill", *args, *more, cwd=tmp_path)
    assert code == 2, output
    assert "holds rows of another source" in output


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    import subprocess

    from draftsmith import prepare

    code = "import draftsmith.prepare as p; c = p.held(p.Path('.')); c.__enter__(); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being written by process {other.pid} on "), prepare.held(tmp_path):
        pass
    other.kill()
    other.wait()
    with prepare.held(tmp_path):
        assert "process" in (tmp_path / ".lock").read_text()
