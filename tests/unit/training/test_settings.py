"""Ranges of the settings, and the learning rate as a function of the step."""

import math
from typing import Any

import pytest

from draftsmith import config
from draftsmith.errors import ConfigError
from draftsmith.training import settings as settings_module
from draftsmith.training import strategy
from draftsmith.training.settings import OptimizerConfig, SchedulerConfig, Settings, StrategyConfig, TrainerConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "max_steps, epochs"),
        ({"max_steps": 1, "epochs": 1.0}, "max_steps, epochs"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"epochs": 0.0}, "epochs"),
        ({"epochs": -1.0}, "epochs"),
        *(({"max_steps": 1, k: 0}, k) for k in ("accumulate", "devices", "num_nodes", "threads", "log_every", "keep")),
        ({"max_steps": 1, "checkpoint_every": 0}, "checkpoint_every"),
        ({"max_steps": 1, "precision": "fp16"}, "precision='fp16'"),
        ({"max_steps": 1, "accelerator": "tpu"}, "accelerator='tpu'"),
    ],
)
def test_bad_trainer(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainerConfig(**settings)


@pytest.mark.parametrize(
    ("epochs", "packs", "per_step", "want"),
    [(1.0, 10, 4, 3), (1.0, 12, 4, 3), (2.0, 10, 4, 5), (0.5, 12, 4, 2), (0.01, 10, 4, 1), (3.0, 1, 8, 1)],
)
def test_steps_of_epochs(epochs: float, packs: int, per_step: int, want: int) -> None:
    assert TrainerConfig(epochs=epochs).steps(epochs * packs, per_step) == want


def test_max_steps_is_max_steps() -> None:
    assert TrainerConfig(max_steps=7).steps(1000, 1) == 7


@pytest.mark.parametrize("kind", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10, 101])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_schedule(kind: str, steps: int, warmup: float) -> None:
    """Up a straight line that starts above 0, then down the cosine (or level), never beyond the peak."""
    schedule = SchedulerConfig(kind, warmup, final=0.1)
    warm = math.ceil(warmup * steps)
    factors = [schedule.factor(s, steps) for s in range(steps)]
    assert factors == [schedule.factor(s, steps) for s in range(steps)]
    for s, f in enumerate(factors):
        if s < warm:
            assert f == pytest.approx((s + 1) / (warm + 1))
        elif kind == "constant":
            assert f == 1
        else:
            half_turn = math.pi * (s - warm) / max(1, steps - warm)
            assert f == pytest.approx(0.1 + 0.9 * (1 + math.cos(half_turn)) / 2)
    assert all(0 < f <= 1 for f in factors)
    if warm < steps:
        assert factors[warm] == 1


def test_the_cosine_ends_where_it_should() -> None:
    assert SchedulerConfig(warmup=0, final=0.25).factor(100, 100) == pytest.approx(0.25)
    assert SchedulerConfig(warmup=0).factor(500, 100) == pytest.approx(0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "linear"}, "kind='linear'"),
        *(({k: v}, k) for k, v in (("warmup", 1.0), ("warmup", -0.1), ("final", 2.0))),
    ],
)
def test_bad_scheduler(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SchedulerConfig(**settings)


def test_a_head_may_differ() -> None:
    optimizer = OptimizerConfig(lr=1.0, clip=2.0, heads={"a": {"lr": 3.0}, "b": {"clip": None}})
    assert [optimizer.of(h, "lr") for h in "abc"] == [3.0, 1.0, 1.0]
    assert [optimizer.of(h, "clip") for h in "abc"] == [2.0, None, 2.0]
    with pytest.raises(ConfigError, match=r"heads\.a: \['eps'\]"):
        OptimizerConfig(heads={"a": {"eps": 1}})


def test_single_is_one_process() -> None:
    with pytest.raises(ConfigError, match="single with 2 processes"):
        Settings.of(config.compose("train", ["strategy=single", "trainer.devices=2"]))
    with pytest.raises(ConfigError, match="name='fsdp'"):
        StrategyConfig("fsdp")


def test_a_clip_has_a_scope() -> None:
    with pytest.raises(ConfigError, match="clip_scope='all': choose head or global"):
        OptimizerConfig(clip_scope="all")
    with pytest.raises(ConfigError, match=r"heads\.a\.clip: clip_scope=global has one norm"):
        OptimizerConfig(clip_scope="global", heads={"a": {"clip": 1.0}})


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_wants_deepspeed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config.compose("train", [f"strategy={name}"])
    made = Settings.of(cfg).strategy
    assert made.deepspeed is not None
    assert made.zero == made.deepspeed["zero_optimization"]["stage"] == int(name[4])
    assert made.in_pieces == (made.zero == 3)
    assert strategy.engine_config(Settings.of(cfg), 4, ["medusa"])["zero_optimization"]["stage"] == made.zero
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"strategy: name='{name}': .*pip install 'draftsmith\[deepspeed\]'"):
        Settings.of(cfg)


def test_a_strategy_s_keys() -> None:
    with pytest.raises(ConfigError, match=r"config=ds\.json: a DeepSpeed configuration; choose strategy=zero1"):
        StrategyConfig("ddp", config="ds.json")
    with pytest.raises(ConfigError, match="timeout=0"):
        StrategyConfig("ddp", timeout=0)


def test_the_shipped_groups_fit() -> None:
    for overrides in ([], ["trainer=gpu"], ["strategy=ddp"], ["scheduler=constant"], ["experiment=quickstart"]):
        cfg = config.compose("train", overrides)
        settings = Settings.of(cfg)
        assert settings.trainer.precision == cfg.trainer.precision
        assert (settings.strategy.name, settings.scheduler.kind) == (cfg.strategy.name, cfg.scheduler.kind)
        assert settings.optimizer.lr == cfg.optimizer.lr
