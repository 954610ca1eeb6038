"""draftsmith plan: memory, disk, hours and the cheapest mode of a training, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, counting, prepare, room, train
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError
from draftsmith.reporting import plan_table, planning
from draftsmith.reporting.planning import Facts, HardwareConfig, Layout, Work
from draftsmith.training.settings import STRATEGIES, TrainerConfig


@dataclass(frozen=True)
class PlanConfig:
    """What a plan asks beside a training's own configuration."""

    devices: int | None = None  # processes per node; null: trainer.devices
    rows: int | None = None  # null: those that are here, else counting.ROWS
    row_tokens: float = 1000.0  # of a row on average
    learned: float = 0.65  # share of them that is learned

    def __post_init__(self) -> None:
        for name in ("devices", "rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if not 0 < self.learned <= 1 or self.row_tokens < 1:
            raise ConfigError("learned, row_tokens: a share in (0, 1], and at least 1 token")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Prints the plan of cfg, a training's configuration, and writes it to run_dir/plan.json if that is given."""
    own = config.typed({f.name: cfg[f.name] for f in fields(PlanConfig)}, PlanConfig, "plan")
    if own.devices is not None:
        cfg.trainer.devices = own.devices
    trainer = config.typed(cfg.trainer, TrainerConfig, "trainer")
    hardware = config.typed(cfg.hardware, HardwareConfig, "hardware")
    if trainer.accelerator == "cpu":  # its process needs no driver, and no table knows it
        hardware = HardwareConfig(**{**vars(hardware), "name": None, "overhead_gb": 0.0})
    if cfg.strategy.name not in STRATEGIES:
        raise ConfigError(f"strategy.name='{cfg.strategy.name}': choose one of {', '.join(STRATEGIES)}")
    parts = counting.read(cfg, train.heads_of(cfg))
    layout = Layout(trainer.devices, trainer.num_nodes, trainer.accumulate)
    work, known = counting.work_of(cfg, parts.data, layout, own.row_tokens)
    facts = counting.facts_of(cfg, parts, _learned(own.learned, parts.data), own.row_tokens)
    plan = _plan(cfg, facts, layout, work, hardware) | {"work": _work(cfg, facts, work, parts, known)}
    prepare.say(plan_table.table(plan))
    if cfg.run_dir is not None:
        target = Path(cfg.run_dir) / "plan.json"
        room.ready(target.parent, "run_dir")
        artifacts.write_json(target, plan)
        prepare.say(f"-> {target}")
    return plan


def _learned(share: float, data: DataConfig) -> float:
    """Share of positions that learn."""
    if data.random is not None:
        return data.random.learned
    return counting.FULL if data.loss_on == "all" else share


def _plan(cfg: DictConfig, facts: Facts, layout: Layout, work: Work, hardware: HardwareConfig) -> dict[str, Any]:
    overhead, found = hardware.overhead_gb * planning.GB, hardware.accelerator
    room = None if found is None else found.memory
    every = {name: planning.memory(facts, name, layout, overhead) for name in _offered(layout)}
    totals = {name: sum(sizes.values()) for name, sizes in every.items()}
    chosen, best = counting.strategy_of(cfg), planning.fitting(totals, room, layout.world)
    heads = " + ".join(cfg.heads)
    seconds = planning.seconds(facts, work, layout, hardware)
    store = work.tokens / counting.FULL
    return {
        "what": f"{heads} on {cfg.base.path or 'a made base'}, {layout.world} process{'es' * (layout.world > 1)}"
        f" ({layout.nodes} x {layout.devices}), {chosen}",
        "strategy": chosen,
        "parameters": {"base": facts.base, "heads": dict(facts.heads)},
        "memory": {
            name: {
                "parts": sizes,
                "bytes": totals[name],
                "host": planning.host(facts, name, layout),
                "fits": room is None or totals[name] <= room,
            }
            for name, sizes in every.items()
        },
        "room": room,
        "advice": _advice(totals, chosen, best, room),
        "disk": {
            "checkpoint": 12.0 * facts.trained,
            "checkpoints_kept": cfg.trainer.keep,
            "heads": 4.0 * facts.trained,
            "stores": {k: store * planning.position_bytes(facts, k) for k in ("fp32", "bf16", "int8", "fp8")},
        },
        "hardware": f"{layout.world} x {hardware.name or 'the given accelerator'}",
        "utilisation": hardware.utilisation,
        "hours": None
        if seconds is None
        else {
            "together": sum(seconds.values()) / 3600,
            "parts": {name: value / 3600 for name, value in seconds.items()},
            "tokens_per_second": work.steps * work.positions * counting.FULL / sum(seconds.values()),
        },
        "mode": _mode(facts, work, layout, hardware, seconds),
    }


def _offered(layout: Layout) -> list[str]:
    """single is of one process, ddp of several; the ZeROs of any number."""
    return [name for name in planning.STRATEGIES if name != ("ddp" if layout.world == 1 else "single")]


def _advice(totals: dict[str, float], chosen: str, best: str | None, room: float | None) -> str:
    if room is None:
        return "what fits is unknown without hardware.memory_gb="
    if best is None:
        return "nothing fits: lower data.batch_size or data.length, share the lm_head, or take more or larger devices"
    if chosen not in totals:
        return f"{chosen} is not for so many processes; strategy={best} fits"
    if totals[chosen] > room:
        return f"{chosen} does not fit: strategy={best} does, or lower data.batch_size"
    return f"{best} is the cheapest that fits" if best != chosen else "the cheapest that fits"


def _work(cfg: DictConfig, facts: Facts, work: Work, parts: counting.Read, known: str) -> dict[str, Any]:
    rows, _ = counting.rows_of(cfg, parts.data)
    each = facts.base_flops + facts.head_flops
    return {
        "rows": rows,
        "rows_known": known,
        "tokens": work.tokens,
        "epochs": work.epochs,
        "steps": work.steps,
        "positions_per_step": work.positions,
        "base_flops": facts.base_flops,
        "head_flops": facts.head_flops,
        "flops_per_token": each,
        "flops": each * work.steps * work.positions,
    }


def _mode(facts: Facts, work: Work, layout: Layout, hardware: HardwareConfig, seconds: dict[str, float] | None) -> str:
    """online or a store, by epochs."""
    if facts.company or "adapter" in facts.heads:
        return "online: an adapter or a companion runs in every step, so a store saves nothing"
    if seconds is None:
        return "unknown without the accelerator's speed; a store pays from the second epoch on where the disk keeps up"
    kind = "fp32" if facts.weight_bytes == 4 else "bf16"
    size = work.tokens / counting.FULL * planning.position_bytes(facts, kind)
    reading = size / (hardware.disk_gb * planning.GB * layout.nodes)
    per = max(work.epochs, 1e-9)
    base, heads = seconds["base"] / per, (seconds["heads"] + seconds["optimizer"]) / per
    even = planning.break_even(base, heads, reading)
    told = f"a store of {plan_table.size(size)} in {kind} reads in {plan_table.duration(reading / 3600)} an epoch at"
    told += f" {hardware.disk_gb:g} GB/s"
    if even is None:
        return f"online: {told}, no faster than the base's forward"
    better = "a store" if work.epochs >= even else "online"
    return f"{better} for {work.epochs:.3g} epochs: {told} and is faster from {even} epochs on"


def main() -> None:
    config.command("plan", run)


if __name__ == "__main__":
    main()
