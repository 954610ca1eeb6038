"""draftsmith bench: what one training step costs, as a ratio of the base's forward."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, prepare, train
from draftsmith.data.rows import Row
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError
from draftsmith.training.settings import Settings

if TYPE_CHECKING:
    import numpy as np

    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head
    from draftsmith.training.timing import StepTimer

WARM = 5  # micro-batches that are not counted
COUNTED = 15  # steps that count at least in step_cost


@dataclass(frozen=True)
class ChatsConfig:
    chats: int
    length: int
    real: float
    labelled: float

    def __post_init__(self) -> None:
        if self.chats < 1 or self.length < 8 or not 0 < self.real <= 1 or not 0 < self.labelled <= 1:
            raise ConfigError("give chats >= 1, length >= 8, real and labelled in (0, 1]")


@dataclass(frozen=True)
class ShapeConfig:
    dtype: str
    shape: dict[str, Any]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Trains on made-up rows for a few steps, timing each beside a base forward on the same batch."""
    chats = config.typed(cfg.data, ChatsConfig, "data")
    shape = config.typed(cfg.base, ShapeConfig, "base")
    settings = Settings.of(cfg)
    if settings.trainer.accumulate != 1:
        raise ConfigError("trainer.accumulate: a benched step is one micro-batch; leave it at 1")
    if (settings.trainer.max_steps or 0) < settings.trainer.log_every:
        raise ConfigError("trainer.max_steps: give at least trainer.log_every steps, so that metrics are timed too")
    prepare.check_seed(cfg.seed)
    chosen = train.heads_of(cfg)
    run_dir = config.run_dir(cfg, "bench")

    import torch

    from draftsmith.base import create
    from draftsmith.base.lm import BaseLM
    from draftsmith.data.module import Steps
    from draftsmith.training.fit import new_head

    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    model = create.llama(shape.shape, None, cfg.seed).to(getattr(torch, shape.dtype))
    base = BaseLM(model).to("cuda" if settings.trainer.accelerator == "gpu" else "cpu")
    rows = made_up(chats, base.spec.vocab_size, cfg.seed)
    layout = {"length": chats.length, "accumulate": 1, "horizon": 1, "seed": cfg.seed}
    packs = len(Steps(rows, batch_size=1, **layout).packs(0))  # a step is all the chats, packed
    steps = settings.trainer.steps(packs, packs)

    def cost(names: Sequence[str]) -> dict[str, Any]:
        heads = {n: new_head(chosen[n][0], chosen[n][1], n, base, cfg.seed) for n in names}
        layout: dict[str, Any] = {"length": chats.length, "batch_size": packs, "steps": steps}
        return timed(base, heads, rows, settings, cfg.seed, **layout).result(settings.trainer.log_every)

    result = cost(list(chosen))
    if len(chosen) > 1:
        result |= company({name: cost([name]) for name in chosen}, [result, cost(list(chosen))])
    result |= {
        "threads": torch.get_num_threads(),
        "config": OmegaConf.to_container(cfg, throw_on_missing=False),
    }
    artifacts.write_json(run_dir / "bench.json", result)
    prepare.say(
        f"base forward {result['base_forward_ms']:.0f} ms, training step {result['step_ms']:.0f} ms:"
        f" {result['ratio_of_sums']:.2f} x (medians {result['ratio_of_medians']:.2f} x) -> {run_dir}/bench.json"
    )
    if len(chosen) > 1:
        apart = ", ".join(f"{name} {own['mean_step_ms']:.0f}" for name, own in result["apart"].items())
        prepare.say(f"one step of each alone: {apart} ms; together: {result['together_over_apart']:.2f} x their sum")
    return result


def company(apart: dict[str, dict[str, Any]], together: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one base forward for all saves; together is timed before and after the others."""
    joint = statistics.mean(r["mean_step_ms"] for r in together)
    return {"apart": apart, "together_over_apart": joint / sum(own["mean_step_ms"] for own in apart.values())}


def timed(
    base: BaseLM,
    heads: Mapping[str, Head],
    rows: Sequence[Row],
    settings: Settings,
    seed: int,
    *,
    length: int,
    batch_size: int,
    steps: int,
    weights_N: np.ndarray | None = None,
) -> StepTimer:
    """Trains the heads for so many counted steps and a few before them, and leaves nothing but their times."""
    from draftsmith.data.module import RowsModule
    from draftsmith.training.fit import fit
    from draftsmith.training.timing import StepTimer

    layout: dict[str, Any] = {
        "length": length,
        "batch_size": batch_size,
        "accumulate": settings.trainer.accumulate,
        "horizon": max(head.horizon for head in heads.values()),
        "seed": seed,
        "weights_N": weights_N,
    }
    timer = StepTimer(warm=WARM)

    def serve(start: int, stop: int) -> RowsModule:
        return RowsModule(rows, start=start, stop=stop, **layout)

    with tempfile.TemporaryDirectory() as scratch:
        told: dict[str, Any] = {"run_dir": Path(scratch), "seed": seed, "settings": settings, "ties": {}}
        fit(base, heads, serve, steps=steps + WARM + 1, more=[timer], **told)
    return timer


def step_cost(cfg: DictConfig) -> dict[str, Any]:
    """What an optimiser step of draftsmith train's configuration costs on its own base and rows: CPU-seconds, and
    as a ratio of the base's forward. Whole logging windows are counted, since metrics cost time too."""
    from draftsmith.training.fit import new_head

    data, settings = config.typed(cfg.data, DataConfig, "data"), Settings.of(cfg)
    log_every, accumulate = settings.trainer.log_every, settings.trainer.accumulate
    base = prepare.load_base(config.typed(cfg.base, prepare.BaseConfig, "base"))
    rows = train.rows_for(data, base)
    heads = {name: new_head(kind, own, name, base, cfg.seed) for name, (kind, own) in train.heads_of(cfg).items()}
    timer = timed(
        base,
        heads,
        rows.training,
        settings,
        cfg.seed,
        length=data.length,
        batch_size=data.batch_size,
        steps=log_every * math.ceil(COUNTED / log_every),
        weights_N=rows.weights_N,
    )
    result = timer.result(log_every * accumulate)
    return {**result, "step_cpu_seconds": accumulate * result["mean_step_ms"] / 1e3}


def made_up(chats: ChatsConfig, vocab_size: int, seed: int) -> list[Row]:
    """Rows of random ids with lognormal lengths; the last part of each counts, as an answer would."""
    rng = random.Random(seed)
    drawn = [rng.lognormvariate(0, 0.6) for _ in range(chats.chats)]
    scale = chats.real * chats.length * chats.chats / sum(drawn)
    rows = []
    for i, size in enumerate(drawn):
        n = max(8, min(chats.length, round(size * scale)))
        counted = round(n * chats.labelled)
        ids = [rng.randrange(vocab_size) for _ in range(n)]
        rows.append(Row(str(i), ids, [0] * (n - counted) + [1] * counted))
    return rows


def main() -> None:
    config.command("bench", run)


if __name__ == "__main__":
    main()
