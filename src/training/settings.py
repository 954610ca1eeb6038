"""Typed settings of training, apart from Lightning so that a mistake in them answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from draftsmith import config
from draftsmith.errors import ConfigError


@dataclass(frozen=True)
class TrainerConfig:
    max_steps: int | None = None  # optimiser steps; or
    epochs: float | None = None  # passes over the rows
    accumulate: int = 1  # micro-batches per optimiser step and process
    precision: str = "fp32"  # of the heads' computation: fp32 | bf16 (fp32 master weights)
    accelerator: str = "cpu"  # cpu | gpu
    devices: int = 1  # processes per node
    num_nodes: int = 1
    threads: int | None = None  # torch threads per process; null: torch's own choice
    log_every: int = 10  # steps between lines of metrics.jsonl
    checkpoint_every: int = 100  # steps
    keep: int = 2  # newest checkpoints kept
    skip_nonfinite: int = 0  # steps that may be left out because a loss or gradient is not finite; the next one stops
    profile: int | None = None  # the last so many steps under torch's profiler

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError("max_steps, epochs: give one of them; set the other to null, as trainer.epochs=null")
        for name, choices in (("precision", ("fp32", "bf16")), ("accelerator", ("cpu", "gpu"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}='{getattr(self, name)}': choose one of {', '.join(choices)}")
        for name in ("max_steps", "accumulate", "devices", "num_nodes", "threads", "log_every", "keep", "profile"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if self.skip_nonfinite < 0:
            raise ConfigError(f"skip_nonfinite={self.skip_nonfinite}: give 0, or how many steps may be left out")
        if self.checkpoint_every < 1 or (self.epochs is not None and not 0 < self.epochs < math.inf):
            raise ConfigError("checkpoint_every, epochs: give a positive number")

    def steps(self, packs: float, packs_per_step: int) -> int:
        """Optimiser steps of the whole run, computed here and never asked of the trainer; packs: of all epochs."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(packs / packs_per_step))


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # gradient norm, of clip_scope
    clip_scope: str = "head"  # head: each by its own norm, as if trained alone | global: one norm of everything trained
    heads: dict[str, Any] = field(default_factory=dict)  # <head>: {lr, weight_decay, clip} where it differs

    def __post_init__(self) -> None:
        if self.clip_scope not in ("head", "global"):
            raise ConfigError(f"clip_scope='{self.clip_scope}': choose head or global")
        if wrong := [name for name, own in self.heads.items() if not isinstance(own, dict)]:
            raise ConfigError(f"heads.{wrong[0]}: {self.heads[wrong[0]]!r} is not a group of keys; give {{lr: …}}")
        for where, own in (("", vars(self)), *((f"heads.{name}.", own) for name, own in self.heads.items())):
            for key, least in (("lr", "positive"), ("weight_decay", "0 or positive"), ("clip", "positive")):
                value = own.get(key)
                if value is not None and (value < 0 or (least == "positive" and not value)):
                    raise ConfigError(f"{where}{key}={value}: give a {least} number")
            if self.clip_scope == "global" and where and "clip" in own:
                raise ConfigError(f"{where}clip: clip_scope=global has one norm; set clip")
        for name, own in self.heads.items():
            unknown = set(own) - {"lr", "weight_decay", "clip"}
            if unknown:
                raise ConfigError(f"heads.{name}: {sorted(unknown)}; a head may set lr, weight_decay, clip")

    def of(self, head: str, key: str) -> Any:
        return self.heads.get(head, {}).get(key, getattr(self, key))


@dataclass(frozen=True)
class SchedulerConfig:
    kind: str = "cosine"  # cosine | constant
    warmup: float = 0.03  # share of the steps
    final: float = 0.0  # where the cosine ends, as a share of the peak

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "constant"):
            raise ConfigError(f"kind='{self.kind}': choose cosine or constant")
        if not 0 <= self.warmup < 1 or not 0 <= self.final <= 1:
            raise ConfigError("warmup, final: shares lie between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate in optimiser step `step` = 0..steps-1: a pure function."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - warm) / max(1, steps - warm))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


STEP = "step-" + 8 * "[0-9]"  # the folder of a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter beside the number of its updates
STRATEGIES = ("auto", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True)
class StrategyConfig:
    name: str = "auto"
    timeout: float = 1800.0  # seconds that a process waits for the others in one collective
    config: str | None = None  # a DeepSpeed JSON, in the place of `deepspeed`
    deepspeed: dict[str, Any] | None = None  # DeepSpeed's own configuration

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ConfigError(f"name='{self.name}': choose one of {', '.join(STRATEGIES)}")
        if self.timeout <= 0:
            raise ConfigError(f"timeout={self.timeout}: give a positive number of seconds")
        if self.zero and find_spec("deepspeed") is None:
            raise ConfigError(f"name='{self.name}': ZeRO needs DeepSpeed; pip install 'draftsmith[deepspeed]'")
        if self.config is not None and not self.zero:
            raise ConfigError(f"config={self.config}: a DeepSpeed configuration; choose strategy=zero1, zero2 or zero3")

    @property
    def zero(self) -> int:
        """The ZeRO stage; 0 without DeepSpeed."""
        return int(self.name[4]) if self.name.startswith("zero") else 0

    @property
    def in_pieces(self) -> bool:
        """Whether each process holds a part of the base only."""
        return self.zero == 3


# kind of tracker -> the packages that serve it; any one of them will do
TRACKERS = {
    "none": (),
    "wandb": ("wandb",),
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
}


@dataclass(frozen=True)
class LoggerConfig:
    kind: str = "none"  # none | wandb | csv | tensorboard | mlflow
    project: str = "draftsmith"  # where the run is put: W&B's project, MLflow's experiment
    entity: str | None = None  # W&B's team or user
    name: str | None = None  # of the run; null: its folder's
    group: str | None = None  # runs to be seen together; null: the experiment's name
    tags: list[str] = field(default_factory=list)
    offline: bool = False  # W&B: files beside the run, for `wandb sync` later
    uri: str | None = None  # MLflow's tracking server; null: $MLFLOW_TRACKING_URI, else a file beside the run
    weights: bool = False  # the heads' weights go to the tracker too, not only their hashes
    patience: float = 20.0  # seconds that the end of a run waits for a tracker that is slow or gone

    def __post_init__(self) -> None:
        if self.kind not in TRACKERS:
            raise ConfigError(f"kind='{self.kind}': choose one of {', '.join(TRACKERS)}")
        needs = TRACKERS[self.kind]
        if needs and not any(find_spec(name) for name in needs):
            raise ConfigError(f"kind='{self.kind}': pip install 'draftsmith[{self.kind}]'")
        if self.patience < 0:
            raise ConfigError(f"patience={self.patience}: seconds cannot be negative")


@dataclass(frozen=True)
class LossConfig:
    """How losses are computed, never what they are: a bench compares the ways."""

    impl: str = "fused"  # fused: the logits of a few hundred rows at a time | plain: all of them at once, by autograd
    skip_masked: bool = True  # False: positions that count for nothing are computed like any other

    def __post_init__(self) -> None:
        if self.impl not in ("fused", "plain"):
            raise ConfigError(f"impl='{self.impl}': choose fused or plain")


# what a checkpoint is tied to -> the keys that say which it is; any other tie is to who stands beside the base
TIED = {"base": ("base",), "rows": ("data",), "store": ("data",)}
BESIDE = ("companion", "drafter")


def covers(key: str, other: str) -> bool:
    """Whether a key is the other one, or a group that holds it."""
    return other == key or other.startswith(f"{key}.")


@dataclass(frozen=True)
class ResumeConfig:
    """What may be otherwise where a run goes on; no part of what the run is."""

    allow: list[str] = field(default_factory=list)  # keys, or whole groups of them, as optimizer.lr or data

    def lets(self, tie: str) -> bool:
        """Whether the checkpoint may have been trained on another one of these."""
        return any(covers(group, key) for group in TIED.get(tie, BESIDE) for key in self.allow)


@dataclass(frozen=True)
class Settings:
    """Everything about training that is neither the base, nor a head, nor the rows."""

    trainer: TrainerConfig
    strategy: StrategyConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    optimizer_class: type
    loss: LossConfig = LossConfig()

    def __post_init__(self) -> None:
        if self.strategy.name == "single" and self.world > 1:
            raise ConfigError(f"strategy: single with {self.world} processes; use strategy=ddp or trainer.devices=1")
        if self.strategy.zero and self.trainer.skip_nonfinite:
            raise ConfigError(
                f"trainer.skip_nonfinite={self.trainer.skip_nonfinite}: {self.strategy.name} always stops at the first"
                " step that is not finite; leave it 0, or use strategy=ddp"
            )

    @property
    def world(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @classmethod
    def of(cls, cfg: Any) -> Settings:
        """From the groups trainer, strategy, optimizer, scheduler and loss of a verb's configuration."""
        return cls(
            config.typed(cfg.trainer, TrainerConfig, "trainer"),
            config.typed(cfg.strategy, StrategyConfig, "strategy"),
            config.typed(cfg.optimizer, OptimizerConfig, "optimizer"),
            config.typed(cfg.scheduler, SchedulerConfig, "scheduler"),
            config.target(cfg.optimizer, "optimizer"),
            config.typed(cfg.loss, LossConfig, "loss"),
        )
