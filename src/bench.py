"""draftsmith bench: what one training step costs, beside the base's forward alone and the plain reference step."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, comparing, config, prepare, room, train
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.training.settings import Settings

PLAIN = ("data.packing=false", "loss.impl=plain", "loss.skip_masked=false", "capture=null")
PLAINLY = ", plain"  # a variant's name and this: the same step with PLAIN
WAYS = {"": (), PLAINLY: PLAIN}
STEP, KINDS = "step", ("faster", "cost", "floor", "memory", "answering")
UNTIMED = ("memory", "answering")  # kinds that time no training step
MOVED = 0.15  # ratios repeat within about so much on a shared machine
COUNTED = 15  # steps that count at least in step_cost


@dataclass(frozen=True)
class FigureConfig:
    """One ratio; see conf/figures/all.yaml. least, most: what it is to reach."""

    kind: str
    of: str
    over: list[str] = field(default_factory=list)
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind='{self.kind}': choose one of {', '.join(KINDS)}")
        if (self.kind in ("floor", "answering")) == bool(self.over):
            raise ConfigError("over: names the variants that `of` is compared with; floor and answering have none")


@dataclass(frozen=True)
class FiguresConfig:
    variants: dict[str, Any]
    figures: dict[str, FigureConfig]

    def __post_init__(self) -> None:
        named = {name.removesuffix(PLAINLY) for name in self.named()}
        if unknown := sorted(named - set(self.variants)):
            raise ConfigError(f"figures: {', '.join(unknown)} is no variant; there are {', '.join(self.variants)}")

    def named(self) -> set[str]:
        return {name for figure in self.figures.values() for name in (figure.of, *figure.over)}

    def overrides(self) -> dict[str, list[str]]:
        """name -> overrides of every variant that a figure names."""
        every = {own + suffix: [*given, *more] for own, given in self.variants.items() for suffix, more in WAYS.items()}
        return {name: given for name, given in every.items() if name in self.named()}


@dataclass(frozen=True)
class BenchConfig:
    plain: bool
    memory: bool
    repeats: int
    capture: list[str] | None
    only: list[str] | None
    against: str | None
    record: bool
    measure: bool

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: give at least 1")
        if self.record and not self.against:
            raise ConfigError("record: give the file too, as against=docs/benchmarks.json")


def recorded(path: Path) -> dict[str, float]:
    """name -> ratio, as record=true wrote them."""
    told = artifacts.read_json(path)
    if not isinstance(told, dict) or not isinstance(told.get("figures"), dict):
        raise DataError(f"{path}: holds no recorded ratios; record=true writes them")
    return told["figures"]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Times the variants, measures their memory, prints ratios and writes bench.json."""
    own = config.typed({k: cfg[k] for k in BenchConfig.__dataclass_fields__}, BenchConfig, "bench")
    _check(cfg)
    if own.against and not own.record:
        recorded(Path(own.against))  # an hour before it is needed
    run_dir = config.run_dir(cfg, "bench")
    room.ready(run_dir, "run_dir")
    if own.measure:
        artifacts.write_json(run_dir / comparing.PEAK, {"extra": comparing.Steps(cfg, {}).peak()})
        return {}
    chosen = _chosen(cfg, own)
    variants = {name: config.changed(cfg, "bench", overrides) for name, overrides in chosen.overrides().items()}
    import torch

    if threads := cfg.trainer.threads:
        torch.set_num_threads(threads)
    used = {kind: set[str]() for kind in KINDS}
    for figure in chosen.figures.values():
        used[figure.kind] |= {figure.of, *figure.over}
    timed = set[str]().union(*(names for kind, names in used.items() if kind not in UNTIMED))
    clocked = {name: v for name, v in variants.items() if name in timed}
    runs = comparing.timed(clocked, own.repeats, cfg.seed, used["floor"])
    peaks = {name: comparing.peak_of(v) for name, v in variants.items() if name in used["memory"]}
    found = {
        name: comparing.answering(variants[figure.of], own.repeats)
        if figure.kind == "answering"
        else _values(figure, runs, peaks)
        for name, figure in chosen.figures.items()
    }
    result = {
        "figures": {name: {"median": statistics.median(values), "runs": values} for name, values in found.items()},
        "runs": runs,
        "peaks": peaks,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "config": OmegaConf.to_container(cfg, throw_on_missing=False),
    }
    artifacts.write_json(run_dir / "bench.json", result)
    _tell(chosen, runs, peaks, found)
    prepare.say(f"-> {run_dir}/bench.json")
    if own.against:
        _compare(Path(own.against), result, record=own.record)
    return result


def _check(cfg: DictConfig) -> None:
    """What can be wrong of a configuration that is to be timed, before anything is loaded."""
    config.typed(cfg.data, DataConfig, "data")
    config.typed(cfg.base, prepare.BaseConfig, "base")
    trainer = Settings.of(cfg).trainer
    if trainer.accumulate != 1 or trainer.devices * trainer.num_nodes != 1:
        raise ConfigError(
            "trainer: a benched step is one micro-batch in one process; leave accumulate and devices at 1"
        )
    if (trainer.max_steps or 0) < trainer.log_every:
        raise ConfigError("trainer.max_steps: give at least trainer.log_every steps, so that metrics are timed too")
    prepare.check_seed(cfg.seed)
    train.heads_of(cfg)


def _chosen(cfg: DictConfig, own: BenchConfig) -> FiguresConfig:
    """The published figures, or this configuration beside the plain step and, of several heads, beside each alone."""
    if cfg.get("figures") is not None:
        found = config.typed(cfg.figures, FiguresConfig, "figures")
        if own.only is None:
            return found
        if unknown := sorted(set(own.only) - set(found.figures)):
            raise ConfigError(f"only: no figure {', '.join(unknown)}; there are {', '.join(found.figures)}")
        return FiguresConfig(found.variants, {name: found.figures[name] for name in own.only})
    variants: dict[str, Any] = {STEP: []}
    # a store is read ahead by a thread of its own, whose time a forward beside the step would take for its own
    figures = {} if own.capture is not None else {"over the base's forward": FigureConfig("floor", STEP)}
    if own.plain:
        figures["faster than the plain step"] = FigureConfig("faster", STEP, [STEP + PLAINLY])
        if own.memory:
            figures["memory of the plain step over its own"] = FigureConfig("memory", STEP, [STEP + PLAINLY])
    if len(cfg.heads) > 1:
        others = {name: [f"~heads.{other}" for other in cfg.heads if other != name] for name in cfg.heads}
        variants |= {f"{name} alone": dropped for name, dropped in others.items()}
        figures["faster than each head alone"] = FigureConfig("faster", STEP, [f"{name} alone" for name in cfg.heads])
    return FiguresConfig(variants, figures)


def _values(figure: FigureConfig, runs: Mapping[str, list[dict[str, Any]]], peaks: Mapping[str, int]) -> list[float]:
    """The ratio in each repeat; of memory, which does not vary, one."""
    if figure.kind == "memory":
        return [sum(peaks[name] for name in figure.over) / peaks[figure.of]]
    steps = [r["step_ms"] for r in runs[figure.of]]
    if figure.kind == "floor":
        return [r["step_ms"] / r["floor_ms"] for r in runs[figure.of]]
    others = [sum(r["step_ms"] for r in some) for some in zip(*(runs[name] for name in figure.over), strict=True)]
    pairs = zip(others, steps, strict=True)
    return [other / step if figure.kind == "faster" else step / other for other, step in pairs]


def _tell(
    chosen: FiguresConfig,
    runs: Mapping[str, list[dict[str, Any]]],
    peaks: Mapping[str, int],
    found: Mapping[str, list[float]],
) -> None:
    from draftsmith.training.timing import PARTS

    wide = max(map(len, (*runs, *found)))
    parts = "".join(f"{name:>11}" for name in PARTS)
    prepare.say(f"{'ms, medians':<{wide}}{'step':>9}{'floor':>9}{parts}   MB")
    for name, repeats in runs.items():
        median = {key: statistics.median(r[f"{key}_ms"] for r in repeats) for key in ("step", "floor", *PARTS)}
        told = "".join(f"{median[key]:11.1f}" for key in PARTS)
        peak = f"{peaks[name] / 1e6:5.0f}" if name in peaks else ""
        prepare.say(f"{name:<{wide}}{median['step']:9.1f}{median['floor']:9.1f}{told}{peak}")
    for name, values in found.items():
        figure, middle = chosen.figures[name], statistics.median(values)
        reach = f"  least {figure.least:g}" if figure.least else f"  most {figure.most:g}" if figure.most else ""
        fails = middle < (figure.least or 0) or middle > (figure.most or math.inf)
        told = ", ".join(f"{v:.2f}" for v in values) if len(values) > 1 else ""
        prepare.say(f"{name:<{wide}}{middle:9.2f} x{reach}{'  NOT REACHED' if fails else ''}   {told}".rstrip())


def _compare(path: Path, result: Mapping[str, Any], *, record: bool) -> None:
    """Says which ratios are other than they were when they were recorded, or records them."""
    now = {name: round(figure["median"], 3) for name, figure in result["figures"].items()}
    if record:
        before = recorded(path) if path.exists() else {}
        artifacts.write_json(path, {"machine": result["machine"], "figures": {**before, **now}})
        prepare.say(f"{len(now)} ratios recorded -> {path}")
        return
    then = recorded(path)
    moved = {n: (then[n], now[n]) for n in now if n in then and abs(now[n] / then[n] - 1) > MOVED}
    for name, (old, new) in moved.items():
        prepare.say(f"moved: {name} {old:.2f} -> {new:.2f}")
    added = [name for name in now if name not in then]
    prepare.say(
        f"{len(now) - len(moved) - len(added)} ratios within {MOVED:.0%} of {path}"
        + (f"; new: {added}" if added else "")
    )


def step_cost(cfg: DictConfig) -> dict[str, Any]:
    """What an optimiser step of draftsmith train's configuration costs on its own base and rows: CPU-seconds, and
    as a ratio of the base's forward. Whole logging windows are counted, since metrics cost time too."""
    from draftsmith.training.timing import StepTimer

    steps = comparing.Steps(cfg, {})
    trainer, timer = steps.settings.trainer, StepTimer(comparing.WARM)
    counted = trainer.log_every * math.ceil(COUNTED / trainer.log_every)
    steps.run(counted + comparing.WARM + 1, timer)
    result = timer.result(trainer.log_every * trainer.accumulate)
    cost = {"step_cpu_seconds": trainer.accumulate * result["step_ms"] / 1e3}
    return {**result, **cost, "ratio_of_sums": result["step_ms"] / result["floor_ms"]}


def main() -> None:
    config.command("bench", run)


if __name__ == "__main__":
    main()
