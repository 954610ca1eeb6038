"""draftsmith capture: the base's captures of a folder of rows, on disk, so that training need not run it again."""

from __future__ import annotations

import dataclasses
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, room
from draftsmith.data.rows import read_folder, verified
from draftsmith.errors import ConfigError, DataError
from draftsmith.train import heads_of
from draftsmith.training import processes

if TYPE_CHECKING:
    from draftsmith.contracts import BaseSpec, Head


def run(cfg: DictConfig) -> Path:
    """Writes cfg.out for cfg.heads; the same command goes on where it was stopped."""
    from draftsmith.data import labels, store, storing

    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    settings = config.typed(cfg.store, store.StoreConfig, "store")
    machine = config.typed({"threads": cfg.threads, "device": cfg.device}, prepare.MachineConfig, "capture")
    rows, out, here = Path(cfg.rows), Path(cfg.out), processes.place()
    _check(cfg, base_config, rows, out)
    machine.apply()
    base = prepare.load_base(base_config, processes.own_device(machine.device))
    heads = _outlines(cfg, base.spec)
    needs = reduce(or_, (head.needs for head in heads.values()))
    reading = [name for name, head in heads.items() if not head.reads_counted]
    horizon = max(head.horizon for head in heads.values())
    kept = storing.kept_of(settings, needs, horizon, reading, base.spec.hidden_size, base.dtype)
    told, _ = read_folder(rows, base.spec)
    plan = {
        "base": labels.identity(base.spec, base.weights_sha256()),
        "rows": {"manifest_sha256": prepare.content_sha256(rows)},
        "store": store.identity(kept),
    }
    job = storing.Job(out, told, plan, base, settings, rank=here.rank, world=here.world)
    room.ready(out, "out", job.to_write(rows), "choose another folder, a smaller store.dtype, or store.keep=counted")
    with prepare.held(out, here.rank):
        complete = artifacts.is_complete(out)
        job.begin(rows)
        if complete:
            store.verify(out)
            prepare.say(f"{out}: already complete")
            return out
        prepare.say(job.forecast())
        job.run(prepare.say)
        positions = int(job.store.offsets_N[-1])
        done = job.seal(base=dataclasses.asdict(base.spec), heads=sorted(heads), positions=positions)
    others = f"{out}: this process's shards are done; others are at work"
    prepare.say(f"{len(told):,} rows, {positions:,} positions -> {out}" if done else others)
    return out


def _check(cfg: DictConfig, base: prepare.BaseConfig, rows: Path, out: Path) -> None:
    """Refuses what no store can be made of, before anything is loaded."""
    if rows.resolve() == out.resolve():
        raise ConfigError(f"out: {out} is the folder of rows itself; choose another folder")
    if base.lora is not None:
        raise ConfigError("base.lora: an adapter that is being trained changes the captures; leave it out")
    for name, (kind, _) in heads_of(cfg).items():
        if kind.adapts:
            raise ConfigError(
                f"head: {name} trains an adapter of the base, which changes its captures; no store for it"
            )
        if kind.wants:
            raise ConfigError(f"head: {name} stands beside a {kind.wants}; a store is made for heads that stand alone")
    facts = verified(rows)
    if facts["kind"] != "rows":
        raise DataError(f"{rows}: holds {facts['kind']}; rows= wants what distill writes")


def _outlines(cfg: DictConfig, spec: BaseSpec) -> dict[str, Head]:
    """The heads without weights: what they need is all that is asked of them."""
    import torch

    found = {}
    for name, (kind, own) in heads_of(cfg).items():
        with torch.device("meta"):
            try:
                found[name] = kind(kind.completed(own, spec, None), spec)
            except ConfigError as e:
                raise ConfigError(f"heads.{name}: {e}") from None
    return found


def main() -> None:
    config.command("capture", run)


if __name__ == "__main__":
    main()
