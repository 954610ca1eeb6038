"""Which dataclass types which part of a verb's configuration: the one table, read by the tests that check every yaml
and by reference.py, which writes docs/reference.md."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from draftsmith import (
    adopt,
    bench,
    bench_data,
    bench_decoding,
    config,
    evaluate,
    plan,
    prepare,
    pushing,
    report,
    searching,
    tune,
)
from draftsmith.data.labels import LabelsConfig
from draftsmith.data.prompts import PromptsConfig
from draftsmith.data.settings import DataConfig
from draftsmith.data.store import StoreConfig
from draftsmith.decoding.certificate import CertificateConfig
from draftsmith.decoding.company import BaselinesConfig
from draftsmith.decoding.gates import GateConfig
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.decoding.tree import TreeSpec
from draftsmith.reporting.planning import HardwareConfig
from draftsmith.training.settings import (
    LoggerConfig,
    LossConfig,
    OptimizerConfig,
    ResumeConfig,
    SchedulerConfig,
    StrategyConfig,
    TrainerConfig,
)

CONF = resources.files("draftsmith.conf")
# group -> the dataclass of its values; a head or an exporter names its own by `_target_`
SCHEMAS: dict[str, type] = {
    "base": prepare.BaseConfig,
    "baselines": BaselinesConfig,
    "companion": prepare.BaseConfig,
    "data": DataConfig,
    "decoding": DecodingConfig,
    "figures": bench.FiguresConfig,
    "gate": GateConfig,
    "logger": LoggerConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "strategy": StrategyConfig,
    "trainer": TrainerConfig,
    "tree": TreeSpec,
}
INSIDE = {"tree": "decoding.tree"}  # group -> where it goes, if not to a key of its own name
TARGETED = {"head", "exporter"}
# what a verb's own file holds beside the groups: (verb, key) -> its dataclass
OWN: dict[tuple[str, str], type] = {
    ("train", "loss"): LossConfig,
    ("train", "resume"): ResumeConfig,
    ("plan", "loss"): LossConfig,
    ("plan", "resume"): ResumeConfig,
    ("plan", "hardware"): HardwareConfig,
    ("evaluate", "prompts"): PromptsConfig,
    ("evaluate", "certificate"): CertificateConfig,
    ("tune", "prompts"): PromptsConfig,
    ("bakeoff", "selection"): PromptsConfig,
    ("bakeoff", "prompts"): PromptsConfig,
    ("sweep", "selection"): PromptsConfig,
    ("sweep", "sampler"): searching.SamplerConfig,
    ("sweep", "pruner"): searching.PrunerConfig,
    ("capture", "store"): StoreConfig,
    ("label", "labels"): LabelsConfig,
    ("bench", "loss"): LossConfig,
    ("bench_data", "bench"): bench_data.BenchDataConfig,
    ("bench_decoding", "bench"): bench_decoding.BenchDecodingConfig,
}
# and the dataclass of some of its keys at the top
TOP: dict[str, type] = {
    "adopt": adopt.AdoptConfig,
    "evaluate": evaluate.EvaluateConfig,
    "export": pushing.PushConfig,
    "plan": plan.PlanConfig,
    "report": report.ReportConfig,
    "sweep": searching.SweepConfig,
    "tune": tune.TuneConfig,
}


def roots() -> list[str]:
    """The verbs: everything with a yaml of its own but command.yaml, which all of them share."""
    return [name for name in _yamls(CONF) if name != "command"]


def choices() -> dict[str, list[str]]:
    """group -> the names of its yamls."""
    found = {folder.name: _yamls(folder) for folder in CONF.iterdir() if folder.is_dir()}
    return {group: names for group, names in sorted(found.items()) if names}


def _yamls(folder: Traversable) -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


@functools.cache
def defaults_of(verb: str) -> dict[str, list[str]]:
    """group -> what the verb chooses of it when nothing is said; [] for none. A root that begins from another one
    offers the groups of that too."""
    chosen: dict[str, list[str]] = {}
    for entry in OmegaConf.load(str(CONF.joinpath(f"{verb}.yaml"))).defaults:
        if OmegaConf.is_dict(entry):
            for group, n in entry.items():
                chosen[str(group)] = [] if n is None else [n] if isinstance(n, str) else list(n)
        elif entry in roots():
            chosen |= defaults_of(entry)
    return chosen


def fill(cfg: DictConfig) -> DictConfig:
    """A word in place of everything that only a user can know, in place."""
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "given")
    data, prompts = cfg.get("data"), OmegaConf.select(cfg, "data.prompts")
    if data is not None and prompts is None and "sources" in data and not (data.path or data.sources or data.random):
        data.path = "given"  # which of path and sources a user gives is open
    if prompts is not None and not (prompts.path or prompts.sources or prompts.synthetic or prompts.text):
        prompts.path = "given"
    return cfg


def parts(verb: str, cfg: DictConfig) -> Iterator[tuple[str, Any, type]]:
    """(key, node, dataclass) of everything in a verb's configuration that has one."""
    for name in cfg.get("heads") or {}:
        yield f"heads.{name}", cfg.heads[name], config.target(cfg.heads[name], f"heads.{name}").Config
    if "exporter" in cfg:
        yield "exporter", cfg.exporter, config.target(cfg.exporter, "exporter").Config
    for group, schema in SCHEMAS.items():
        key = INSIDE.get(group, group)
        if group in defaults_of(verb) and (node := OmegaConf.select(cfg, key)) is not None:
            yield key, node, schema
    for (owner, key), schema in OWN.items():
        if owner == verb:
            yield key, cfg[key], schema


def check(verb: str, cfg: DictConfig) -> int:
    """Types every part, ConfigError for what does not fit; the number of parts."""
    from draftsmith.training.pretrain import PretrainConfig

    made: list[Any] = [config.typed(node, schema, key) for key, node, schema in parts(verb, cfg)]
    for base in made:
        if isinstance(base, prepare.BaseConfig) and base.recipe and base.recipe["training"]:
            config.typed(base.recipe["training"], PretrainConfig, "base.recipe.training")
    return len(made)
