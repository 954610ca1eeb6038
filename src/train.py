"""draftsmith train: rows -> heads, on the frozen base."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, distill, prepare
from draftsmith.data.rows import DataConfig, Row, read_rows
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.training import strategy
from draftsmith.training.settings import Settings

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head

FEW_STEPS = 50  # the quickstart's head is useful after about a hundred


def run(cfg: DictConfig) -> Path:
    """Trains cfg.heads and returns the run directory; the same configuration resumes, or is complete."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    settings = Settings.of(cfg)
    prepare.check_seed(cfg.seed)
    chosen = heads_of(cfg)
    if data.path and not Path(data.path).exists():
        raise DataError(f"{data.path}: no such file or folder; data.path names rows, chats or text")
    run_dir = config.run_dir(cfg, "train")
    first = strategy.is_first_process()
    if first:
        config.claim(cfg, run_dir)
    source = prepare.content_sha256(data.path or (data.prompts.path if data.prompts else None))
    if artifacts.is_complete(run_dir, manifest="COMPLETE.json"):
        if artifacts.read_json(run_dir / "COMPLETE.json")["data_sha256"] != source:
            raise DataError(f"{run_dir}: complete, but with other data than there is now; choose another run_dir")
        prepare.say(f"{run_dir}: already complete")
        return run_dir
    with prepare.held(run_dir) if first else contextlib.nullcontext():
        _run(cfg, run_dir, base_config, data, settings, chosen, source)
    return run_dir


def _run(
    cfg: DictConfig,
    run_dir: Path,
    base_config: prepare.BaseConfig,
    data: DataConfig,
    settings: Settings,
    chosen: dict[str, tuple[type[Head], Any]],
    source: str | None,
) -> None:
    """Base, rows, heads, training, exports; nothing marks the run complete before the end."""

    import torch

    from draftsmith.training.fit import new_head

    if settings.trainer.threads:  # before the base writes rows: two threads on one busy core are far slower
        torch.set_num_threads(settings.trainer.threads)
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    base = prepare.load_base(base_config, own_gpu if settings.trainer.accelerator == "gpu" else "cpu")
    before = base.weights_sha256()
    path = Path(data.path) if data.path else distill.rows_folder(data, base)
    rows = read_rows(path, data, base.spec, base.tokenizer)
    heads = {name: new_head(kind, own, name, base, cfg.seed) for name, (kind, own) in chosen.items()}
    ties = {"base": before, "rows": artifacts.fingerprint([[r.ids, r.mask] for r in rows])}
    _fit(base, heads, rows, data, run_dir, cfg.seed, settings, ties)
    if base.weights_sha256() != before:
        raise NumericsError("base: its weights changed during training; nothing was exported")
    if strategy.is_first_process():
        facts = {"rows": len(rows), "sha256": ties}
        _finish(run_dir, heads, prepare.provenance(cfg, **facts), source)


def heads_of(cfg: DictConfig) -> dict[str, tuple[type[Head], Any]]:
    """name -> (class, typed config) of every node under `heads`."""
    if not cfg.get("heads"):
        raise ConfigError("head: nothing to train; choose at least one, e.g. head=[medusa]")
    kinds = {str(name): config.target(node, f"heads.{name}") for name, node in cfg.heads.items()}
    from draftsmith.contracts import Head

    for name, kind in kinds.items():
        if not issubclass(kind, Head):
            raise ConfigError(f"heads.{name}._target_: {kind.__name__} is no head")
    return {n: (kind, config.typed(cfg.heads[n], kind.Config, f"heads.{n}")) for n, kind in kinds.items()}


def _fit(
    base: BaseLM,
    heads: dict[str, Head],
    rows: list[Row],
    data: DataConfig,
    run_dir: Path,
    seed: int,
    settings: Settings,
    ties: dict[str, str],
) -> None:
    from draftsmith.data.module import RowsModule, Steps
    from draftsmith.exporters import native
    from draftsmith.training import fit

    trainer = settings.trainer
    layout = {
        "length": data.length,
        "batch_size": data.batch_size,
        "accumulate": trainer.accumulate,
        "horizon": max(head.horizon for head in heads.values()),
        "seed": seed,
    }
    stream = Steps(rows, world=trainer.devices * trainer.num_nodes, **layout)
    steps = trainer.steps(len(stream.packs), stream.packs_per_step)
    tokens, room = sum(len(r.ids) for r in rows), len(stream.packs) * data.length
    prepare.say(
        f"{len(rows)} rows, {tokens:,} tokens in {len(stream.packs)} packs ({tokens / room:.0%} full), {steps} steps"
    )
    if steps < FEW_STEPS:
        prepare.say(f"note: {steps} steps teach a head little; more rows, epochs, or a smaller global batch make more")
    fit.rehearse(base, heads, stream[0].to(base.device))
    if strategy.is_first_process():
        native.rehearse(run_dir, heads)

    def serve(start: int, stop: int) -> RowsModule:
        return RowsModule(rows, start=start, stop=stop, num_workers=data.num_workers, **layout)

    fit.fit(base, heads, serve, run_dir=run_dir, steps=steps, seed=seed, settings=settings, ties=ties)


def _finish(run_dir: Path, heads: dict[str, Head], facts: dict[str, Any], source: str | None) -> None:
    """The native exports, provenance.json and, last, the mark that the run is complete."""
    from draftsmith.exporters import native

    told = {name: facts[name] for name in ("rows", "seed", "identity")}
    for name, head in heads.items():
        native.save(run_dir / "heads" / name, head, name=name, training=told)
    artifacts.write_json(run_dir / "provenance.json", facts)
    artifacts.write_json(run_dir / "COMPLETE.json", {"heads": sorted(heads), "data_sha256": source})
    prepare.say(f"heads -> {run_dir / 'heads'}")


def main() -> None:
    config.command("train", run)


if __name__ == "__main__":
    main()
