"""draftsmith distill: prompts -> rows, written by the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, room, supply
from draftsmith.data.rows import verified
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError
from draftsmith.training import processes

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.base.outlines import Outline


def run(cfg: DictConfig) -> Path:
    """Answers cfg.data.prompts and publishes the rows in cfg.out; the same command goes on after any stop."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    if data.prompts is None:
        raise ConfigError("data.prompts: nothing to answer; use data=prompts data.prompts.path=<JSON lines>")
    machine = config.typed({"threads": cfg.threads, "device": cfg.device}, prepare.MachineConfig, "distill")
    out, here = Path(cfg.out), processes.place()
    out = out if out.name else out.resolve()
    if _complete(out, base_config, data):
        supply.journal.tidy(out)
        prepare.say(f"{out}: already complete")
        return out
    room.ready(out, "out")
    with prepare.held(out, here.rank):
        machine.apply()
        base: BaseLM | Outline
        if data.generation.engine == "base":
            base = prepare.load_base(base_config, processes.own_device(machine.device))
        else:
            base = prepare.outline(base_config)
        supply.answer(data, base, out, rank=here.rank, world=here.world)
    return out


def _complete(out: Path, base: prepare.BaseConfig, data: DataConfig) -> bool:
    """Whether `out` is complete and undamaged. ConfigError for a folder of rows that other prompts, settings or
    another base made; DataError for damage."""
    claim = out if artifacts.is_complete(out) else out / supply.journal.ASKED
    if not artifacts.is_complete(claim):
        supply.check(data)
        return False
    facts = artifacts.read_json(claim / artifacts.MANIFEST)
    asked = supply.facts_of(data, facts)
    changed = [k for k, v in asked.items() if facts.get(k) != v]
    if changed:
        before, now = (dict(config.flat({k: f.get(k) for k in changed})) for f in (facts, asked))
        table = ", ".join(f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v)
        raise ConfigError(f"out: {out} holds rows of another {' and '.join(changed)} ({table}); choose another folder")
    if claim is not out:
        return False
    verified(out)
    if prepare.path_of(base) != facts["base"]["path"]:  # moved, or another one: its contents tell
        supply.check_base(facts, prepare.load_base(base), out)
    return True


def main() -> None:
    config.command("distill", run)


if __name__ == "__main__":
    main()
