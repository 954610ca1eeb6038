"""What a sweep tries, and how one trial of it is trained and judged. Who proposes the values is sweep.py's."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, bakeoff, config, prepare
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.training.settings import Settings

if TYPE_CHECKING:
    from draftsmith.asking import Asked
    from draftsmith.base.lm import BaseLM
    from draftsmith.decoding.referee import DecodingConfig

# Two trials that differ in these alone would be one run; a batch may be split anew and be another one.
NOT_SEARCHED = config.MACHINE_KEYS - {"data.batch_size", "trainer.accumulate"}
# Trials on other bases or rows do not compare.
SHARED = ("base", "companion", "head", "experiment", *(f"data.{k}" for k in ("path", "sources", "prompts", "random")))


@dataclasses.dataclass(frozen=True)
class Searched:
    """What is tried of one key: a range, or choices, which then count alone."""

    low: Any = None
    high: Any = None
    log: bool = False
    step: Any = None
    choices: list[Any] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if not self.choices or len({text(c) for c in self.choices}) < len(self.choices):
                raise ConfigError(f"choices={self.choices}: give at least one, and none twice")
            return
        ends = (self.low, self.high)
        if not all(_number(end) for end in ends) or self.low > self.high:
            raise ConfigError(f"low={self.low}, high={self.high}: give two numbers in order, or choices=[…]")
        if self.log and (self.step is not None or self.low <= 0):
            raise ConfigError(f"log=true: low={self.low}, step={self.step}; give a low above 0 and no step")
        if self.step is not None and (not _number(self.step) or self.step <= 0):
            raise ConfigError(f"step={self.step}: give a positive number")
        if self.whole and self.step is not None and not isinstance(self.step, int):
            raise ConfigError(f"step={self.step}: low and high are whole numbers; give another")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Any, key: str) -> Any:
        """The value that an Optuna trial has for this key, or gets now."""
        if self.choices is not None:
            plain = {c if _plain(c) else text(c): c for c in self.choices}  # Optuna keeps no lists
            return plain[trial.suggest_categorical(key, list(plain))]
        if self.whole:
            return trial.suggest_int(key, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(key, float(self.low), float(self.high), step=self.step, log=self.log)

    def probes(self) -> list[Any]:
        """Values that stand for all: every choice, or both ends."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def text(value: Any) -> str:
    """A value as an override says it; floats to the last bit."""
    if isinstance(value, dict):
        raise ConfigError(f"{value}: give numbers, words, true, false, null, or lists of them")
    return json.dumps(value, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    kind: str = "tpe"
    startup: int = 8

    def __post_init__(self) -> None:
        if self.kind not in ("tpe", "random"):
            raise ConfigError(f"kind='{self.kind}': choose tpe or random")
        if self.startup < 0:
            raise ConfigError(f"startup={self.startup}: give 0 or more")


@dataclasses.dataclass(frozen=True)
class PrunerConfig:
    kind: str = "median"
    startup: int = 4
    warmup: int = 40
    factor: int = 3

    def __post_init__(self) -> None:
        if self.kind not in ("median", "halving", "none"):
            raise ConfigError(f"kind='{self.kind}': choose median, halving or none")
        for name, least in (("startup", 0), ("warmup", 1), ("factor", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least {least}")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    compare: list[str]
    space: dict[str, Any]
    each: dict[str, Any]
    trials: int
    objective: str
    seed: int
    sampler: SamplerConfig
    pruner: PrunerConfig
    like: str
    train: list[str]
    threads: int
    out: str | None

    def __post_init__(self) -> None:
        if not self.compare or len(set(self.compare)) < len(self.compare):
            raise ConfigError(f"compare={self.compare}: give at least one head, and none twice")
        if self.objective not in ("measured", "estimated"):
            raise ConfigError(f"objective='{self.objective}': choose measured or estimated")
        for name in ("trials", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        yamls = resources.files("draftsmith.conf").joinpath("head")
        for head in self.each:
            if not yamls.joinpath(f"{head}.yaml").is_file():
                raise ConfigError(f"each.{head}: no such head{_nearest(head, self.compare)}")

    def searched(self, head: str) -> dict[str, Searched]:
        """key -> what is tried of it with this head; what `each` says of a key, it says in the place of `space`."""
        given = {k: (f"space.{k}", v) for k, v in self.space.items()}
        given |= {k: (f"each.{head}.{k}", v) for k, v in (self.each.get(head) or {}).items()}
        return {k: config.typed(v, Searched, where) for k, (where, v) in given.items() if v is not None}

    def overrides(self, head: str, values: Mapping[str, Any]) -> list[str]:
        """Of draftsmith train, for this trial."""
        chosen = [f"{key}={text(value)}" for key, value in values.items()]
        return [f"experiment={self.like}", f"head=[{head}]", *self.train, *chosen, f"trainer.threads={self.threads}"]

    def training(self, head: str, values: Mapping[str, Any], group: str | None = None) -> DictConfig:
        """draftsmith train's configuration of a trial; ConfigError if it does not fit."""
        cfg = config.compose("train", self.overrides(head, values))
        if "logger" in cfg and cfg.logger.group is None:
            cfg.logger.group = group
        bakeoff.check_comparable(cfg, head)
        config.typed(cfg.data, DataConfig, "data")
        trainer = Settings.of(cfg).trainer
        if trainer.devices * trainer.num_nodes > 1:
            raise ConfigError("train: a trial is trained in one process; leave trainer.devices and num_nodes")
        return cfg

    def check(self) -> None:
        """ConfigError for what cannot be tried, before anything is: keys that are not there, and values at the ends."""
        for head in self.compare:
            known = _keys(config.compose("train", self.overrides(head, {})))
            tried = self.searched(head)
            for key in tried:
                where = f"each.{head}" if key in (self.each.get(head) or {}) else "space"
                if any(key == k or key.startswith(f"{k}.") for k in (*NOT_SEARCHED, *SHARED)):
                    raise ConfigError(f"{where}.{key}: is the same for all trials; set it in train=[…]")
                if key not in known:
                    raise ConfigError(f"{where}.{key}: {head} has no such key{_nearest(key, known)}")
            if not tried and len(self.compare) == 1:
                raise ConfigError(
                    "space: nothing to search; give e.g. '+space={optimizer.lr: {low: 1e-3, high: 1e-2}}'"
                )
            probes = [searched.probes() for searched in tried.values()]
            for n in range(max(map(len, probes), default=1)):
                self.training(head, {key: p[min(n, len(p) - 1)] for key, p in zip(tried, probes, strict=True)})


def _keys(cfg: DictConfig) -> list[str]:
    """Every dotted key, those of groups included."""
    leaves = [key.split(".") for key, _ in config.flat(cast("dict[str, Any]", OmegaConf.to_container(cfg)))]
    return sorted({".".join(parts[: i + 1]) for parts in leaves for i in range(len(parts))})


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def watched(cfg: DictConfig, head: str) -> str:
    """The metric that estimates the head's tokens per step: of rows that are not learned where there are some."""
    held_out = cfg.data.validation.share or cfg.data.validation.path
    return f"{'validation' if held_out else 'train'}/{head}/tokens_per_step"


@dataclasses.dataclass
class Judge:
    """Tokens per step of trained heads on the same prompts; base and prompts are loaded when first needed."""

    selection: PromptsConfig
    decoding: DecodingConfig
    base: BaseLM | None = None
    asked: Sequence[Asked] = ()

    def tokens_per_step(self, cfg: DictConfig, folder: Path) -> float:
        """Of the only head of a complete run."""
        from draftsmith.exporters import native

        if self.base is None:
            self._load(cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True)))
        assert self.base is not None
        (name,) = cfg.heads
        head = native.load(folder / "heads" / name, self.base.spec, device=self.base.device)
        return bakeoff.decoded(self.base, head, self.asked, self.decoding)

    def _load(self, of_run: dict[str, Any]) -> None:
        from draftsmith import evaluate

        told = config.typed(of_run["data"].get("chat") or {}, ChatConfig, "chat")
        self.base = prepare.load_base(config.typed(of_run["base"], prepare.BaseConfig, "base"))
        most = self.decoding.max_new_tokens
        self.asked, _ = evaluate.held_out(self.base, self.selection, of_run, told, most)


def same_data(folders: Sequence[Path]) -> None:
    """DataError if the data of complete runs changed from one to another."""
    if len({artifacts.read_json(f / "COMPLETE.json")["data_sha256"] for f in folders}) > 1:
        raise DataError(f"{folders[0].parent}: its trials were trained on different data; choose another run_dir")
