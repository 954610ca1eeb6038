"""draftsmith tune: what is fastest on this machine, stored with the head: a drafter's tree, a gate's threshold."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig

from draftsmith import config, evaluate, prepare, room, tuning
from draftsmith.beside import Beside
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.errors import ConfigError
from draftsmith.reporting import tree

if TYPE_CHECKING:
    from draftsmith.heads.acceptance import Acceptance


@dataclasses.dataclass(frozen=True)
class TuneConfig(prepare.MachineConfig):
    load: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    thresholds: list[float] = dataclasses.field(default_factory=list)
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: give at least 1")
        if not self.sizes or min(self.sizes) < 2:
            raise ConfigError(f"sizes={self.sizes}: give numbers of nodes, at least 2: the root and one draft")
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise ConfigError(f"thresholds={self.thresholds}: give probabilities between 0 and 1")


def run(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Tunes the drafters and gates of cfg.run_dir or cfg.load in place; name -> what was found."""
    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    if decoding.paths is not None or decoding.tree.kind != "auto":
        raise ConfigError(
            "decoding.paths, tree: tune chooses the tree, and a gate's threshold on chains; decoding.depth bounds both"
        )
    prompts = config.typed(cfg.prompts, PromptsConfig, "prompts")
    own = {k: cfg[k] for k in ("load", "sizes", "thresholds", "repeats", "threads", "device")}
    settings = config.typed(own, TuneConfig, "tune")
    run_dir = config.run_dir(cfg, "tune")
    folders, of_run = evaluate.heads_of(run_dir, settings.load)
    for folder in folders.values():
        room.ready(folder.parent, "run_dir")
    base_config = evaluate.base_of(cfg, folders, of_run)
    chat = config.typed(cfg.chat or (of_run or {}).get("data", {}).get("chat") or {}, ChatConfig, "chat")
    settings.apply()
    base = prepare.load_base(base_config, settings.device)
    around = Beside.of(cfg, base)
    heads = {name: around.load(folder) for name, folder in folders.items()}
    tunable = {name: head for name, head in heads.items() if head.role in ("drafter", "gate")}
    if not tunable:
        raise ConfigError(f"load: {', '.join(heads)} have nothing to tune; drafters have a tree, gates a threshold")
    asked, source = evaluate.held_out(base, prompts, of_run, chat, decoding.max_new_tokens)
    keys = sorted(user_turns(evaluate.chosen_prompts(prompts, of_run)))
    result = {}
    for name, head in tunable.items():
        if head.role == "gate":
            found = tuning.threshold(base, cast("Acceptance", head), asked, decoding, settings)
        else:
            found = tuning.tree(base, head, asked, decoding, settings)
        result[name] = {**found, "prompts": source, "asked": keys}
        tuning.store(folders[name], head, result[name], base.adapter)
        if head.role == "gate":
            prepare.say(tuning.told(name, found, folders[name]))
        else:
            prepare.say(f"{tree.text(name, found)}\n-> {folders[name]}\n{tree.write(run_dir, name, found)}")
    return result


def main() -> None:
    config.command("tune", run)


if __name__ == "__main__":
    main()
