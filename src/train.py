"""draftsmith train: rows -> heads, on the frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, distill, prepare
from draftsmith.contracts import Head
from draftsmith.data.rows import DataConfig, read_rows
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.training import strategy
from draftsmith.training.settings import OptimizerConfig, SchedulerConfig, StrategyConfig, TrainerConfig

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM


def run(cfg: DictConfig) -> Path:
    """Trains cfg.heads and returns the run directory; the same configuration resumes, or is complete."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    trainer = config.typed(cfg.trainer, TrainerConfig, "trainer")
    settings = {
        "trainer": trainer,
        "strategy_config": config.typed(cfg.strategy, StrategyConfig, "strategy"),
        "optimizer": config.typed(cfg.optimizer, OptimizerConfig, "optimizer"),
        "optimizer_class": config.target(cfg.optimizer, "optimizer"),
        "scheduler": config.typed(cfg.scheduler, SchedulerConfig, "scheduler"),
    }
    if not cfg.get("heads"):
        raise ConfigError("head: nothing to train; choose at least one, e.g. head=[medusa]")
    kinds = {name: config.target(node, f"heads.{name}") for name, node in cfg.heads.items()}
    configs = {n: config.typed(cfg.heads[n], kind.Config, f"heads.{n}") for n, kind in kinds.items()}
    run_dir = config.run_dir(cfg, "train")
    if artifacts.is_complete(run_dir, manifest="COMPLETE.json"):
        prepare.say(f"{run_dir}: already complete")
        return run_dir
    if strategy.is_first_process():
        config.claim(cfg, run_dir)

    base = prepare.load_base(base_config, "cuda" if trainer.accelerator == "gpu" else "cpu")
    before = base.weights_sha256()
    path = Path(data.path) if data.path else distill.rows_folder(data, base)
    rows = read_rows(path, data, base.spec, base.tokenizer)
    heads = {name: _new(kinds[name], configs[name], name, base, cfg.seed) for name in kinds}
    _train(base, heads, rows, data, run_dir, cfg.seed, settings)
    if base.weights_sha256() != before:
        raise NumericsError("base: its weights changed during training; nothing was exported")
    facts = {"rows": len(rows), "rows_path": str(path), "base_sha256": before}
    _finish(cfg, run_dir, heads, prepare.provenance(cfg, **facts), settings)
    return run_dir


def _new(kind: type[Head], settings: Any, name: str, base: BaseLM, seed: int) -> Head:
    """A head as it starts: random where it is random from (seed, name) alone, the rest from the base."""
    from draftsmith.training.module import rekeyed

    with rekeyed(seed, "initialisation", name):
        head = kind(settings, base.spec)
    head.initialise(base)
    return head.to(base.device)


def _train(
    base: BaseLM,
    heads: dict[str, Head],
    rows: list,
    data: DataConfig,
    run_dir: Path,
    seed: int,
    settings: dict,
) -> None:
    from draftsmith.data.module import RowsModule, Steps
    from draftsmith.exporters import native
    from draftsmith.training import fit

    trainer = settings["trainer"]
    shape = {
        "length": data.length,
        "batch_size": data.batch_size,
        "accumulate": trainer.accumulate,
        "horizon": max(head.horizon for head in heads.values()),
        "seed": seed,
    }
    world = trainer.devices * trainer.num_nodes
    stream = Steps(rows, world=world, **shape)
    steps = trainer.steps(len(stream.packs), stream.packs_per_step)
    tokens, room = sum(len(r.ids) for r in rows), len(stream.packs) * data.length
    prepare.say(f"{len(rows)} rows, {tokens:,} tokens in {len(stream.packs)} packs ({tokens / room:.0%} full)")
    fit.rehearse(base, heads, stream[0].to(base.device))
    if strategy.is_first_process():
        native.rehearse(run_dir, heads)

    def serve(start: int, stop: int) -> RowsModule:
        return RowsModule(rows, start=start, stop=stop, num_workers=data.num_workers, **shape)

    fit.fit(base, heads, serve, run_dir=run_dir, steps=steps, seed=seed, **settings)


def _finish(cfg: DictConfig, run_dir: Path, heads: dict[str, Head], facts: dict, settings: dict) -> None:
    """The native exports, provenance.json and, last, the mark that the run is complete."""
    from draftsmith.exporters import native

    if not strategy.is_first_process():
        return
    training = {
        "rows": facts["rows"],
        "lr": cfg.optimizer.lr,
        "seed": cfg.seed,
        "identity": facts["identity"],
    }
    for name, head in heads.items():
        native.save(run_dir / "heads" / name, head, name=name, training=training)
    artifacts.write_json(run_dir / "provenance.json", facts)
    artifacts.write_json(run_dir / "COMPLETE.json", {"heads": sorted(heads)})
    prepare.say(f"heads -> {run_dir / 'heads'}")


def main() -> None:
    config.command("train", run)


if __name__ == "__main__":
    main()
