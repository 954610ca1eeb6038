"""ZeRO on a GPU: one process, NCCL, bf16. (Several processes and every comparison: on CPUs, test_strategies.py.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def training(micro_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = micro_maker(tmp_path_factory.mktemp("micro"), SHAPE, rows=32)
    return [
        *("base=hf", f"base.path={folder / 'base'}", "data=jsonl", f"data.path={folder / 'rows.jsonl'}"),
        *("data.length=64", "data.batch_size=4", "trainer=gpu", "trainer.max_steps=20", "trainer.epochs=null"),
        "trainer.log_every=1",
    ]


def losses(folder: Path, *overrides: str) -> list[float]:
    command = [sys.executable, "-m", "draftsmith.train", *overrides, f"run_dir={folder}", "debug=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert all(t.isfinite().all() for t in load_file(folder / "heads/medusa/model.safetensors").values())
    return [json.loads(line)["train/medusa/loss"] for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_what_plain_training_does(training: list[str], tmp_path: Path, precision: str) -> None:
    own = [*training, f"trainer.precision={precision}"]
    want = losses(tmp_path / "single", *own, "strategy=single")
    for stage in (1, 2, 3):
        got = losses(tmp_path / f"zero{stage}", *own, f"strategy=zero{stage}")
        assert got == pytest.approx(want, rel=1e-5 if precision == "fp32" else 2e-2)


def test_offload(training: list[str], tmp_path: Path) -> None:
    """Pieces, masters and moments in the host's memory."""
    want = losses(tmp_path / "single", *training, "strategy=single")
    got = losses(tmp_path / "offload", *training, "strategy=zero3_offload")
    assert got == pytest.approx(want, rel=2e-2)
