"""draftsmith quickstart: the whole loop on this machine, each stage the verb a user would type."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from draftsmith import config, prepare
from draftsmith.training import processes


def run(cfg: DictConfig) -> Path:
    """Base and rows, head, proof and speed, export; ends with the table. Returns the run directory."""
    from draftsmith import evaluate, export, train

    began = time.perf_counter()
    own = [] if cfg.run_dir is None else [f"run_dir={cfg.run_dir}"]
    training = _told("train", ["experiment=quickstart", f"seed={cfg.seed}", *own, *cfg.train])
    run_dir = train.run(training)
    if not processes.is_first():  # started by a launcher; the rest is the first one's
        return run_dir
    evaluate.run(_told("evaluate", [f"run_dir={run_dir}", *cfg.evaluate]))
    out = run_dir / "export" / "portable"
    export.run(_told("export", [f"run_dir={run_dir}", "exporter=portable", f"out={out}"]))
    prepare.say(f"\nthe whole loop took {time.perf_counter() - began:.0f} s; everything is in {run_dir}")
    return run_dir


def _told(verb: str, overrides: list[str]) -> DictConfig:
    """The verb's configuration, after showing the command line that is the same thing."""
    prepare.say(f"\n$ draftsmith {verb} {' '.join(overrides)}")
    return config.compose(verb, overrides)


def main() -> None:
    config.command("quickstart", run)


if __name__ == "__main__":
    main()
