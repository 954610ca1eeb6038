"""Which engine trains, what it does to a loss, and what it is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.errors import ConfigError
from draftsmith.training import strategy
from draftsmith.training.settings import OptimizerConfig, SchedulerConfig, Settings, StrategyConfig, TrainerConfig


def settings(
    name: str = "auto",
    config: Path | None = None,
    deepspeed: dict[str, Any] | None = None,
    optimizer: OptimizerConfig | None = None,
    **trainer: Any,
) -> Settings:
    given = StrategyConfig(name, config=config and str(config), deepspeed=deepspeed)
    return Settings(
        TrainerConfig(max_steps=1, **trainer),
        given,
        optimizer or OptimizerConfig(),
        SchedulerConfig(),
        torch.optim.AdamW,
    )


@pytest.mark.parametrize(
    ("name", "devices", "nodes", "want"),
    [
        ("auto", 1, 1, "auto"),
        ("single", 1, 1, "auto"),
        ("ddp", 1, 1, "ddp"),
        ("auto", 2, 1, "ddp"),
        ("auto", 1, 2, "ddp"),
    ],
)
def test_arguments(name: str, devices: int, nodes: int, want: str) -> None:
    given = settings(name, devices=devices, num_nodes=nodes, accumulate=3, precision="bf16")
    assert strategy.arguments(given, {}) == {
        "accelerator": "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "precision": "bf16-mixed",
        "strategy": want,
        "plugins": [],
        "accumulate_grad_batches": 3,
    }


def test_fp32_is_fp32() -> None:
    assert strategy.arguments(settings(), {})["precision"] == "32-true"


def test_zero_keeps_fp32_weights_in_either_precision() -> None:
    given = settings("zero2", precision="bf16", deepspeed={"zero_optimization": {"stage": 2}})
    assert strategy.arguments(given, strategy.engine_config(given, 4, ["a"]))["precision"] == "32-true"


@pytest.mark.parametrize(("zero", "want"), [(False, 12), (True, 36)])
def test_undo(zero: bool, want: int) -> None:
    """Lightning divides by the micro-batches; DeepSpeed does it again, as test_strategies.py's norms show."""
    engine = SimpleNamespace(deepspeed_engine=None) if zero else None
    trainer: Any = SimpleNamespace(accumulate_grad_batches=3, world_size=4, strategy=engine)
    assert strategy.undo(trainer) == want


def test_the_engine_is_told_what_our_keys_say() -> None:
    given = settings("zero2", deepspeed={"zero_optimization": {"stage": 2}}, accumulate=3)
    assert strategy.engine_config(given, 4, ["medusa"]) == {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 4,
    }
    assert strategy.engine_config(settings("ddp"), 4, ["a", "b"]) == {}


def in_file(folder: Path, **content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, **content}))
    return path


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": 0.0}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "wall_clock_breakdown": False,
}


def test_a_deepspeed_json_as_it_is(tmp_path: Path) -> None:
    """Hugging Face's sort of file: "auto" filled in, and what our keys say taken out."""
    given = settings("zero2", in_file(tmp_path, **AUTO))
    assert strategy.engine_config(given, 4, ["medusa"]) == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
    }


def test_every_clash_is_listed(tmp_path: Path) -> None:
    clashing = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "adam_w_mode": False}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    }
    given = settings("zero3", in_file(tmp_path, **clashing), accumulate=2)
    with pytest.raises(ConfigError) as caught:
        strategy.engine_config(given, 4, ["medusa"])
    said = str(caught.value)
    for part in (
        "ds.json: optimizer.type=Lamb, and draftsmith trains with AdamW",
        "scheduler.params.warmup_num_steps=100, and the learning rate follows",
        "train_micro_batch_size_per_gpu=8, and data.batch_size makes it 4",
        "train_batch_size=64, and data.batch_size x trainer.accumulate x processes makes it 8",
        "gradient_clipping=0.5, and optimizer.clip makes it 1.0",
        "zero_optimization.stage=2, and strategy=zero3 makes it 3",
        "bf16.enabled=True, and trainer.precision makes it False",
        "optimizer.params.adam_w_mode=False, and AdamW's decay",
        "optimizer.params.lr=0.0003, and optimizer.lr makes it 0.001",
        "optimizer.params.betas=[0.9, 0.999], and optimizer.betas makes it [0.9, 0.95]",
        'change one of each, or write "auto"',
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no zero_optimization.stage; strategy=zero2 asks for 2"),
    ],
)
def test_no_such_json(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        strategy.engine_config(settings("zero2", tmp_path / "ds.json"), 4, ["a"])


def test_a_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.config=.*none\.json: cannot be read"):
        strategy.engine_config(settings("zero2", tmp_path / "none.json"), 4, ["a"])


ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def test_several_heads_and_one_norm() -> None:
    """DeepSpeed clips everything by one norm: with several heads that must have been asked for."""
    with pytest.raises(ConfigError, match=r"ZeRO clips a, b by one norm.*clip_scope=global.*clip=null"):
        strategy.engine_config(settings("zero2", deepspeed=ZERO2), 4, ["b", "a"])
    both = settings("zero2", deepspeed=ZERO2, optimizer=OptimizerConfig(clip=0.5, clip_scope="global"))
    assert strategy.engine_config(both, 4, ["a", "b"])["gradient_clipping"] == 0.5
    none = settings("zero2", deepspeed=ZERO2, optimizer=OptimizerConfig(clip=None))
    assert strategy.engine_config(none, 4, ["a", "b"])["gradient_clipping"] == 0.0
    own = settings("zero2", deepspeed=ZERO2, optimizer=OptimizerConfig(heads={"a": {"clip": 0.3}}))
    assert strategy.engine_config(own, 4, ["a"])["gradient_clipping"] == 0.3
