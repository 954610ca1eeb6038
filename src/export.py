"""draftsmith export: a trained head -> a folder that an inference server loads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from draftsmith import certify, config, evaluate, prepare


def run(cfg: DictConfig) -> list[Path]:
    """Exports every head of the run; returns the folders."""
    run_dir = config.run_dir(cfg, "export")
    exporter = config.build(cfg.exporter, "exporter")
    folders, of_run = evaluate.heads_of(run_dir, cfg.load)
    base_config = evaluate.base_of(cfg, folders, of_run)
    out = Path(cfg.out) if cfg.out else run_dir / "export" / cfg.exporter._target_.split(".")[-2]

    from draftsmith.exporters import native

    base = prepare.load_base(base_config)
    made = []
    for name, folder in folders.items():
        head = native.load(folder, base.spec)
        made.append(exporter.save(out / name if len(folders) > 1 else out, head, base, name=name))
        prepare.say(f"{name} -> {made[-1]}")
        travels = certify.travel(run_dir, made[-1], head, getattr(exporter.config, "dtype", None))
        if travels is not None:
            prepare.say(f"{name}: {travels}")
    return made


def main() -> None:
    config.command("export", run)


if __name__ == "__main__":
    main()
