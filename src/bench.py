"""draftsmith bench: what one training step costs, as a ratio of the base's forward."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, prepare, train
from draftsmith.data.rows import Row
from draftsmith.errors import ConfigError
from draftsmith.training.settings import Settings


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
    from draftsmith.data.module import RowsModule, Steps
    from draftsmith.training.fit import fit, new_head
    from draftsmith.training.timing import StepTimer

    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    model = create.llama(shape.shape, None, cfg.seed).to(getattr(torch, shape.dtype))
    base = BaseLM(model).to("cuda" if settings.trainer.accelerator == "gpu" else "cpu")
    heads = {name: new_head(kind, own, name, base, cfg.seed) for name, (kind, own) in chosen.items()}
    rows = made_up(chats, base.spec.vocab_size, cfg.seed)
    horizon = max(head.horizon for head in heads.values())
    layout = {"length": chats.length, "accumulate": 1, "horizon": horizon, "seed": cfg.seed}
    packs = len(Steps(rows, batch_size=1, **layout).packs(0))  # a step is all the chats, packed
    timer = StepTimer(warm=5)
    steps = settings.trainer.steps(packs, packs) + timer.warm + 1

    def serve(start: int, stop: int) -> RowsModule:
        return RowsModule(rows, batch_size=packs, start=start, stop=stop, **layout)

    with tempfile.TemporaryDirectory() as scratch:
        fit(
            base,
            heads,
            serve,
            run_dir=Path(scratch),
            steps=steps,
            seed=cfg.seed,
            settings=settings,
            ties={},
            more=[timer],
        )
    result = {
        **timer.result(settings.trainer.log_every),
        "threads": torch.get_num_threads(),
        "config": OmegaConf.to_container(cfg, throw_on_missing=False),
    }
    artifacts.write_json(run_dir / "bench.json", result)
    prepare.say(
        f"base forward {result['base_forward_ms']:.0f} ms, training step {result['step_ms']:.0f} ms:"
        f" {result['ratio_of_sums']:.2f} x (medians {result['ratio_of_medians']:.2f} x) -> {run_dir}/bench.json"
    )
    return result


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
