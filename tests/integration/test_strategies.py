"""Two processes train what one does, whatever the engine, and go on from each other's checkpoints.

Real processes, gloo and DeepSpeed's engines, started once for many trainings (pair.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts import file_sha256

from . import pair
from .conftest import call, finish
from .conftest import start as begin

LOSS = 1e-5  # relative, per step: as the issue of equality was stated
WEIGHTS = 5e-6  # absolute; a step is about 1e-2


def start(folder: Path, *cases: str, processes: int = 2) -> None:
    """The cases, one after the other, by two processes, or by one without a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), pair.__file__]
    done = subprocess.run(
        [sys.executable, *command, str(folder), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[..., dict[str, Any]]:
    """What one process makes of a case, once."""

    def get(case: str, run: str | None = None) -> dict[str, Any]:
        if not (folder / f"{run or case}.json").exists():
            pair.train(folder, case, run)
        return told(folder, run or case)

    return get


def told(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def check_equal(folder: Path, want: str, got: str) -> None:
    one, other = told(folder, want), told(folder, got)
    assert len(one["losses"]) == len(other["losses"]) == 20
    assert other["losses"] == pytest.approx(one["losses"], rel=LOSS)
    assert other["validation"] == pytest.approx(one["validation"], rel=LOSS)
    assert other["base"] == one["base"], "the base's hash"
    ours, theirs = weights(folder, want), weights(folder, got)
    assert ours.keys() == theirs.keys()
    apart = {k: float((ours[k].float() - theirs[k].float()).abs().max()) for k in ours}
    assert max(apart.values()) < WEIGHTS, apart


@pytest.fixture(scope="module")
def quick(folder: Path) -> Path:
    pair.base_in(folder)
    pair.train(folder, "half-single", "one-two")
    start(
        folder,
        *("ddp", "zero1", "zero2", "zero3", "masked-zero2", "kv-zero3", "medusa2-zero3"),
        *("half-zero2@stage-ddp", "ddp@stage-ddp", "half-zero2@same", "zero2@same", "half-zero3@two-one"),
        "zero3@one-two",
    )
    return folder


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_train_what_one_does(quick: Path, alone: Any, name: str) -> None:
    """Accumulation, a clip that bites, weight decay; norms too, which Adam would not show in the losses."""
    one = alone("single")
    assert min(one["norms"]) > pair.CASES["single"].clip
    check_equal(quick, "single", name)
    assert told(quick, name)["norms"] == pytest.approx(one["norms"], rel=1e-3)


def test_a_process_with_nothing_to_learn(quick: Path, alone: Any) -> None:
    """Half of the packs are masked, all of them one process's: neither a hang nor a NaN, and the same as alone."""
    alone("masked-single")
    check_equal(quick, "masked-single", "masked-zero2")


@pytest.mark.parametrize("head", ["kv", "medusa2"])
def test_gradients_through_a_base_in_pieces(quick: Path, alone: Any, head: str) -> None:
    """Predicted K/V through the base's blocks; an adapter inside them."""
    alone(f"{head}-single")
    check_equal(quick, f"{head}-single", f"{head}-zero3")


def test_one_process_is_enough_for_zero(folder: Path, alone: Any) -> None:
    """Without a launcher; and a second run in the same process finds what the first one left of DeepSpeed."""
    alone("single")
    start(folder, "zero2@one-zero2", "zero3@one-zero3", processes=1)
    for run in ("one-zero2", "one-zero3"):
        check_equal(folder, "single", run)


def test_no_process_holds_the_base(quick: Path) -> None:
    held = told(quick, "zero3")["local"]
    d, inner, kv = (pair.SHAPE[k] for k in ("hidden_size", "intermediate_size", "hidden_size"))
    block = 2 * d * d + 2 * d * kv // 2 + 3 * d * inner + 2 * d
    assert held == pair.SHAPE["num_hidden_layers"] * block / 2


def test_resume_by_the_same_engine_is_bit_equal(quick: Path) -> None:
    assert told(quick, "same")["losses"] == told(quick, "zero2")["losses"]
    assert file_sha256(quick / "same.safetensors") == file_sha256(quick / "zero2.safetensors")


@pytest.mark.parametrize("run", ["stage-ddp", "one-two", "two-one"])
def test_resume_elsewhere(quick: Path, alone: Any, run: str) -> None:
    """ZeRO-2 goes on as DDP; one process as two under ZeRO-3; two under ZeRO-3 as one."""
    alone("single")
    if run == "two-one":
        pair.train(quick, "single", run)
    check_equal(quick, "single", run)


def test_a_checkpoint_holds_the_head_and_nothing_else(quick: Path) -> None:
    """Weight and two moments per parameter, fp32, the same bytes of tensors from every engine."""
    parameters = sum(t.numel() for k, t in weights(quick, "ddp").items() if t.dtype == torch.float32)
    for name in ("ddp", "zero1", "zero2", "zero3"):
        (file,) = (quick / name / "checkpoints" / "step-00000020").glob("*.safetensors")
        tensors = load_file(file)
        assert all(t.numel() for t in tensors.values())
        assert {k.partition(".")[0] for k in tensors} == {"weight", "exp_avg", "exp_avg_sq"}
        assert sum(t.numel() for t in tensors.values()) == 3 * parameters
        header = 200 * len(tensors) + 100
        assert 12 * parameters <= file.stat().st_size <= 12 * parameters + header


@pytest.mark.slow
def test_more_of_the_same(folder: Path, alone: Any) -> None:
    """Every pair of engines, heads whose own weights lie in pieces, other heads."""
    pair.base_in(folder)
    engines = ["ddp", "zero1", "zero2", "zero3"]
    crossed = [f"{a}-{b}" for a in engines for b in engines]
    cases = [c for a in engines for b in engines for c in (f"half-{a}@{a}-{b}", f"{b}@{a}-{b}")]
    others = [
        "zero3-cut",
        "hydra-zero3",
        "hydra-zero3-cut",
        "eagle3-zero2",
        "eagle3-zero3",
        "kv-zero2",
        "medusa2-zero2",
    ]
    start(folder, *cases, *others, "masked-ddp", "masked-zero3", "half-offload@off", "offload@off")
    for run in ["zero3-cut", "off", *crossed]:
        alone("single")
        check_equal(folder, "single", run)
    for run in [*others[1:], "masked-ddp", "masked-zero3"]:
        head = run.partition("-")[0]
        alone(f"{head}-single")
        check_equal(folder, f"{head}-single", run)


BLOCKED = (
    "import runpy, sys; sys.modules['deepspeed'] = None; runpy.run_module('draftsmith.train', run_name='__main__')"
)


def test_nothing_needs_deepspeed_but_zero(training: list[str], tmp_path: Path) -> None:
    """As if it were not installed: one process trains, and ZeRO says what to install."""
    given = [*training, "trainer.max_steps=2"]
    code, output = finish(begin([sys.executable, "-c", BLOCKED, *given, "run_dir=run"], tmp_path))
    assert code == 0, output
    assert (tmp_path / "run" / "heads" / "medusa" / "model.safetensors").exists()
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "deepspeed", None)
        code, output = call("train", *given, "strategy=zero2", cwd=tmp_path)
    assert code == 2, output
    assert "error: strategy: name='zero2': ZeRO needs DeepSpeed; pip install 'draftsmith[deepspeed]'" in output
