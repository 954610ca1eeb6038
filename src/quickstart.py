"""draftsmith quickstart: the whole loop on this machine, each stage the verb a user would type."""

from __future__ import annotations

import time
from pathlib import Path

from omegaconf import DictConfig

from draftsmith import config, evaluate, export, prepare, train
from draftsmith.errors import NumericsError


def run(cfg: DictConfig) -> Path:
    """Base and rows, head, proof and speed, export; ends with the table. Returns the run directory."""
    began = time.perf_counter()
    own = [] if cfg.run_dir is None else [f"run_dir={cfg.run_dir}"]
    training = _told("train", ["experiment=quickstart", f"seed={cfg.seed}", *own, *cfg.train])
    run_dir = train.run(training)
    result = evaluate.run(_told("evaluate", [f"run_dir={run_dir}", *cfg.evaluate]))
    out = run_dir / "export" / "portable"
    export.run(_told("export", [f"run_dir={run_dir}", "exporter=portable", f"out={out}"]))
    prepare.say(f"\nthe whole loop took {time.perf_counter() - began:.0f} s; everything is in {run_dir}")
    wrong = {name: h["lossless"] for name, h in result["heads"].items() if not h["lossless"]["ok"]}
    if wrong:
        raise NumericsError(f"the output differs from the base's own: {wrong}; see {run_dir}/evaluation.json")
    return run_dir


def _told(verb: str, overrides: list[str]) -> DictConfig:
    """The verb's configuration, after showing the command line that is the same thing."""
    prepare.say(f"\n$ draftsmith {verb} {' '.join(overrides)}")
    return config.compose(verb, overrides)


def main() -> None:
    config.command("quickstart", run)


if __name__ == "__main__":
    main()
