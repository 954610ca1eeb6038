"""draftsmith bakeoff: heads compared at equal rows and equal CPU-seconds of training.

A step of every head is timed first, in the real loop; the times stay in calibration.json, so that a second call trains
as many steps as the first. Then every head is trained alone: at every learning rate with the first seed, and at its
best one with the others. Best is the most tokens per step on prompts of their own (`selection`). A seed changes
initialisation and order, never the rows. The same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, prepare, room, supply, train
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.errors import ConfigError, DataError, Diverged, NumericsError
from draftsmith.reporting import leaderboard
from draftsmith.training.settings import Settings

if TYPE_CHECKING:
    from draftsmith.asking import Asked
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head
    from draftsmith.decoding.referee import DecodingConfig
    from draftsmith.evaluate import EvaluateConfig
    from draftsmith.roles import Drafter

Run = dict[str, Any]
"""head, lr, seed, steps; cpu_seconds it took, loading included; tokens_per_step on the selection prompts; failed: why
it has none; chosen: whether its lr is its head's."""


@dataclasses.dataclass(frozen=True)
class BakeoffConfig:
    compare: list[str]
    lrs: list[float]
    seeds: list[int]
    cpu_seconds: float
    like: str
    train: list[str]
    each: dict[str, Any]
    batch_sizes: list[int]
    batch_prompts: int
    repeats: int
    threads: int
    out: str | None

    def __post_init__(self) -> None:
        for name in ("compare", "lrs", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ConfigError(f"{name}={given}: give at least one, and none twice")
        if self.cpu_seconds <= 0 or min(self.lrs) <= 0:
            raise ConfigError("cpu_seconds, lrs: give positive numbers")
        for head, settings in self.each.items():
            if not isinstance(settings, list):
                raise ConfigError(f"each.{head}={settings!r}: give a list of settings, as [num_heads=4]")

    def training(self, head: str, *more: str) -> DictConfig:
        """draftsmith train's configuration for this head alone."""
        settings = [f"heads.{head}.{setting}" for setting in self.each.get(head, [])]
        own = [f"experiment={self.like}", f"head=[{head}]", *self.train, *settings]
        fixed = ["trainer.epochs=null", "trainer.max_steps=1", f"trainer.threads={self.threads}"]
        cfg = config.compose("train", [*own, *fixed, *more])
        check_comparable(cfg, head)
        trainer = Settings.of(cfg).trainer
        if trainer.accelerator != "cpu" or trainer.devices * trainer.num_nodes > 1:
            raise ConfigError("train: CPU-seconds are counted in one process; leave trainer.accelerator and devices")
        return cfg


@dataclasses.dataclass
class Contest:
    """What all runs share. asked: the prompts `selection` and `prompts`."""

    own: BakeoffConfig
    run_dir: Path
    base: BaseLM
    decoding: DecodingConfig
    asked: Mapping[str, list[Asked]]

    def runs(self, head: str, steps: int) -> list[Run]:
        """This head at every learning rate, then its best one with the other seeds."""
        tried = [self.trained(head, lr, self.own.seeds[0], steps) for lr in self.own.lrs]
        lr = best(tried)
        if lr in (min(self.own.lrs), max(self.own.lrs)) and len(self.own.lrs) > 1:
            prepare.say(f"note: {head}'s best lr={lr:g} is at the end of lrs; a wider grid may hold a better one")
        tried += [self.trained(head, lr, seed, steps) for seed in self.own.seeds[1:]]
        return [{**r, "chosen": r["lr"] == lr} for r in tried]

    def trained(self, head: str, lr: float, seed: int, steps: int) -> Run:
        run: Run = {"head": head, "lr": lr, "seed": seed, "steps": steps}
        folder = self.folder(run)
        own = [f"optimizer.lr={lr}", f"seed={seed}", f"trainer.max_steps={steps}", f"run_dir={folder}"]
        prepare.say(f"\n{folder.name}: {steps} steps")
        failed, spent = None, self.run_dir / "cpu_seconds.json"
        before = artifacts.read_json(spent) if spent.exists() else {}
        complete = artifacts.is_complete(folder, manifest="COMPLETE.json")
        began = time.process_time()
        try:
            train.run(self.own.training(head, *own))
        except Diverged as e:  # too high an lr for this head
            failed = str(e)
            prepare.say(f"failed: {failed}")
        finally:
            if not complete:  # a run that was interrupted costs what its parts do
                before[folder.name] = before.get(folder.name, 0.0) + time.process_time() - began
                artifacts.write_json(spent, before)
        tau = None if failed else self.tokens_per_step(run, "selection")
        return {**run, "cpu_seconds": before.get(folder.name, 0.0), "tokens_per_step": tau, "failed": failed}

    def folder(self, run: Run) -> Path:
        return self.run_dir / f"{run['head']}-lr{run['lr']:g}-seed{run['seed']}"

    def head(self, run: Run) -> Any:
        from draftsmith.exporters import native

        return native.load(self.folder(run) / "heads" / run["head"], self.base.spec, device=self.base.device)

    def tokens_per_step(self, run: Run, which: str) -> float:
        return decoded(self.base, self.head(run), self.asked[which], self.decoding)

    def same_rows(self, runs: Sequence[Run]) -> str:
        """The rows' hash, the same for every run; DataError otherwise."""
        made = [self.folder(r) / "provenance.json" for r in runs if not r["failed"]]
        found = {artifacts.read_json(path)["sha256"]["rows"] for path in made}
        if len(found) != 1:
            raise DataError(f"{self.run_dir}: its runs were trained on different rows; choose another run_dir")
        return str(found.pop())

    def figures(self, runs: Sequence[Run], settings: EvaluateConfig) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """What the referee finds of every head with the first seed, and the tokens per step of the other seeds."""
        from draftsmith import judging
        from draftsmith.decoding.company import BaselinesConfig

        kept = [r for r in runs if r["chosen"] and not r["failed"]]
        prepare.say(f"\ndecoding {len(self.asked['prompts'])} prompts with every head, {settings.repeats} times each")
        heads = {r["head"]: self.head(r) for r in kept if r["seed"] == self.own.seeds[0]}
        found = judging.judged(self.base, heads, self.asked["prompts"], self.decoding, BaselinesConfig(), settings)
        others: dict[str, list[float]] = {name: [] for name in heads}
        for r in kept:
            if r["seed"] != self.own.seeds[0]:
                others[r["head"]].append(self.tokens_per_step(r, "prompts"))
        return found, others


def check_comparable(cfg: DictConfig, head: str) -> None:
    """ConfigError unless this configuration of draftsmith train trains one drafter, on the base that all have."""
    kinds = [kind for kind, _ in train.heads_of(cfg).values()]
    if any(kind.role != "drafter" for kind in kinds):
        raise ConfigError(f"compare: {head} does not draft; leave it out")
    if any(kind.adapts for kind in kinds):
        raise ConfigError(f"compare: {head} trains an adapter, so its base is not the others'; leave it out")
    if list(cfg.heads) != [head]:
        raise ConfigError(f"compare: {head} would train {list(cfg.heads)}; name yamls of conf/head")


def decoded(base: BaseLM, head: Head, asked: Sequence[Asked], decoding: DecodingConfig) -> float:
    """Tokens per step of a drafter on these prompts."""
    from draftsmith.decoding.engine import generate
    from draftsmith.decoding.stats import Stats

    drafter, total = cast("Drafter", head), Stats()
    how: dict[str, Any] = {"drafter": drafter, "shape": decoding.shape(drafter.max_depth)}
    how |= {"rules": decoding.rules, "seed": decoding.seed}
    how |= {"max_new_tokens": decoding.max_new_tokens, "eos_ids": base.eos_ids}
    for prompt in asked:
        total += generate(base, prompt.ids, **how).stats
    return total.tokens_per_step


def run(cfg: DictConfig) -> dict[str, Any]:
    """Calibrates, trains, chooses and measures; returns what it writes to bakeoff.json."""
    own = config.typed({f.name: cfg[f.name] for f in dataclasses.fields(BakeoffConfig)}, BakeoffConfig, "bakeoff")
    asking = {key: config.typed(cfg[key], PromptsConfig, key) for key in ("selection", "prompts")}
    trainings = {head: own.training(head) for head in own.compare}

    from draftsmith import bench, evaluate, judging
    from draftsmith.decoding.referee import DecodingConfig

    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    own_keys = {name: getattr(own, name) for name in ("threads", "repeats", "batch_sizes", "batch_prompts")}
    settings = config.typed(own_keys, evaluate.EvaluateConfig, "bakeoff")
    run_dir = config.run_dir(cfg, "bakeoff")
    room.ready(run_dir, "run_dir")
    if own.out:
        room.ready(Path(own.out), "out")
    settings.apply()
    with prepare.held(run_dir):
        costs = calibrated(run_dir / "calibration.json", trainings, bench.step_cost)
        of_run = cast("dict[str, Any]", OmegaConf.to_container(trainings[own.compare[0]]))
        base = prepare.load_base(config.typed(of_run["base"], prepare.BaseConfig, "base"))
        asked, sources = prompts_of(base, asking, of_run, decoding.max_new_tokens)
        contest = Contest(own, run_dir, base, decoding, asked)
        runs = [r for head in own.compare for r in contest.runs(head, steps_for(own.cpu_seconds, costs[head]))]
        rows = contest.same_rows(runs)
        found, others = contest.figures(runs, settings)
        told = {"cpu_seconds": own.cpu_seconds, "rows_sha256": rows, "prompts": sources, "calibration": costs}
        result = {**told, "runs": runs, "other_seeds": others, **found}
        artifacts.write_json(run_dir / "bakeoff.json", result)
    entries = leaderboard.entries(found["heads"], {h: c["ratio_of_sums"] for h, c in costs.items()}, others)
    prepare.say(f"\n{leaderboard.runs(runs)}\n\n{leaderboard.text(entries)}\n-> {run_dir / 'bakeoff.json'}")
    prepare.say(leaderboard.write(Path(own.out) if own.out else run_dir, entries, ("svg", "png")))
    judging.check_proofs(found, str(base.dtype).removeprefix("torch."), run_dir / "bakeoff.json")
    return result


def calibrated(
    path: Path, trainings: Mapping[str, DictConfig], measure: Callable[[DictConfig], dict[str, Any]]
) -> dict[str, Any]:
    """head -> what a step of it costs: as the file has it, or measured now and written there."""
    kept = artifacts.read_json(path) if path.exists() else {}
    for head, cfg in trainings.items():
        identity = artifacts.fingerprint(config.identity(cfg))
        if kept.get(head, {}).get("identity") != identity:
            prepare.say(f"\n{head}: timing a training step")
            kept[head] = {"identity": identity, **measure(cfg)}
            artifacts.write_json(path, kept)
    return {head: kept[head] for head in trainings}


def steps_for(cpu_seconds: float, cost: Mapping[str, Any]) -> int:
    return max(1, round(cpu_seconds / cost["step_cpu_seconds"]))


def best(runs: Sequence[Run]) -> float:
    """The learning rate with the most tokens per step, the lowest of equals; NumericsError if every one failed."""
    done = [r for r in runs if not r["failed"]]
    if not done:
        raise NumericsError(f"{runs[0]['head']}: every lr failed: {runs[0]['failed']}; give lower lrs")
    return float(min(done, key=lambda r: (-r["tokens_per_step"], r["lr"]))["lr"])


def prompts_of(
    base: BaseLM, asking: Mapping[str, PromptsConfig], of_run: dict[str, Any], max_new_tokens: int
) -> tuple[dict[str, list[Asked]], dict[str, Any]]:
    """Both sets of prompts and what is told of them; made-up ones of one are not in the other."""
    from draftsmith import evaluate

    told = config.typed(of_run["data"].get("chat") or {}, ChatConfig, "chat")
    trained = user_turns(evaluate.trained_on(of_run) or [])
    seen = user_turns(supply.collect(asking["selection"], trained))
    found = {
        "selection": evaluate.held_out(base, asking["selection"], of_run, told, max_new_tokens),
        "prompts": evaluate.held_out(base, asking["prompts"], of_run, told, max_new_tokens, seen),
    }
    return {k: asked for k, (asked, _) in found.items()}, {k: source for k, (_, source) in found.items()}


def main() -> None:
    config.command("bakeoff", run)


if __name__ == "__main__":
    main()
