"""Training at the smallest size that still has everything: several packs, documents, padding, epochs."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from draftsmith.artifacts import tensors_sha256
from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Head
from draftsmith.data.module import RowsModule, Steps
from draftsmith.data.rows import Row
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.training import fit
from draftsmith.training.settings import (
    LossConfig,
    OptimizerConfig,
    SchedulerConfig,
    Settings,
    StrategyConfig,
    TrainerConfig,
)

LENGTH = 16
TIES = {"base": "b", "rows": "r"}


@pytest.fixture(scope="session")
def base() -> BaseLM:
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return BaseLM(create.llama(shape, None, seed=0))


def make_rows(packs: int) -> list[Row]:
    """Rows that fill exactly `packs` packs: two to a pack, of 9 and 6 tokens."""
    rng = random.Random(0)
    return [
        Row(str(i), [rng.randrange(40) for _ in range(n)], [int(rng.random() < 0.7) for _ in range(n)])
        for i in range(packs)
        for n in (9, 6)
    ]


@dataclass
class Run:
    """One training, or the rest of one."""

    run_dir: Path
    heads: dict[str, Head]
    trainer: L.Trainer

    @property
    def weights(self) -> str:
        return tensors_sha256({f"{n}.{k}": v for n, h in self.heads.items() for k, v in h.state_dict().items()})

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without the clock."""
        found = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        timed = ("tokens_per_second", "base_forward_share")
        return [{k: v for k, v in line.items() if k not in timed} for line in found]


@dataclass
class Plan:
    """What to train; defaults are cheap and cross an epoch's edge."""

    heads: Mapping[str, MedusaConfig] = field(default_factory=lambda: {"medusa": MedusaConfig(num_heads=2)})
    kind: type[Head] = Medusa
    packs: int = 6
    steps: int = 5
    batch_size: int = 2
    accumulate: int = 1
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1
    precision: str = "fp32"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=0.01, weight_decay=0.01))
    scheduler: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(warmup=0.3))
    ties: Mapping[str, str] = field(default_factory=lambda: TIES)
    measured: int = 0  # packs that are not learned
    validate_every: int | None = None
    more: Sequence[L.Callback] = ()
    loss: LossConfig = field(default_factory=LossConfig)
    packing: bool = True


@pytest.fixture
def train(base: BaseLM) -> Callable[..., Run]:
    """Trains Plan(**settings) in run_dir, from wherever it stopped, and gives what the run left."""

    def go(run_dir: Path, made: dict[str, Head] | None = None, **settings: Any) -> Run:
        plan = Plan(**settings)
        heads = made if made is not None else {}
        heads.update({n: fit.new_head(plan.kind, c, n, base, 3) for n, c in plan.heads.items()})
        layout = {
            "length": LENGTH,
            "batch_size": plan.batch_size,
            "accumulate": plan.accumulate,
            "horizon": max(h.horizon for h in heads.values()),
            "seed": 3,
            "packing": plan.packing,
        }
        trainer = TrainerConfig(
            max_steps=plan.steps,
            accumulate=plan.accumulate,
            precision=plan.precision,
            log_every=plan.log_every,
            checkpoint_every=plan.checkpoint_every,
            keep=plan.keep,
        )

        def serve(start: int, stop: int) -> RowsModule:
            return RowsModule(
                make_rows(plan.packs), start=start, stop=stop, measured=make_rows(plan.measured), **layout
            )

        engine = fit.fit(
            base,
            heads,
            serve,
            run_dir=run_dir,
            steps=plan.steps,
            seed=3,
            settings=Settings(trainer, StrategyConfig(), plan.optimizer, plan.scheduler, torch.optim.AdamW, plan.loss),
            ties=plan.ties,
            validate_every=plan.validate_every,
            more=plan.more,
        )
        return Run(run_dir, heads, engine)

    return go


@pytest.fixture
def stream() -> Callable[..., Steps]:
    """The micro-batches that such a training reads."""

    def make(packs: int = 6, batch_size: int = 2, horizon: int = 3) -> Steps:
        settings = {"length": LENGTH, "accumulate": 1, "horizon": horizon, "seed": 3}
        return Steps(make_rows(packs), batch_size=batch_size, **settings)

    return make
