"""The jobs of a grid, `draftsmith VERB -m key=1,2`: one process runs them one after the other."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from draftsmith import shown

READERS = ("evaluate", "export", "tune")  # their run_dir is one that is there


def is_job(verb: str) -> bool:
    """Whether this is a job of a grid that makes a folder of its own; a verb that it calls is told where to write."""
    grid = HydraConfig.initialized() and getattr(HydraConfig.get().mode, "name", None) == "MULTIRUN"
    return grid and HydraConfig.get().job.config_name == verb and verb not in READERS


def begin(cfg: DictConfig, folder: Path) -> None:
    """Tells which job this is: what the command line has several values of, and where it goes. In a tracker the jobs
    are a group by their common folder's name."""
    if not OmegaConf.is_missing(cfg, "run_dir") and cfg.run_dir is not None and "logger" in cfg:
        cfg.logger.group = cfg.logger.group or Path(cfg.run_dir).name
    if os.environ.get("RANK", "0") == "0":
        own = [o for o in HydraConfig.get().overrides.task if o not in sys.argv]
        print(shown.clean(f"job {HydraConfig.get().job.num}: {shlex.join(own)} -> {folder}"), flush=True)
