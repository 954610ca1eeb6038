"""draftsmith tune: what a gate's threshold should be on this machine, stored with the gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig

from draftsmith import config, evaluate, prepare
from draftsmith.beside import Beside
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.decoding import gating
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.errors import ConfigError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.heads.acceptance import Acceptance


@dataclasses.dataclass(frozen=True)
class TuneConfig(prepare.MachineConfig):
    load: list[str] = dataclasses.field(default_factory=list)
    thresholds: list[float] = dataclasses.field(default_factory=list)
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: give at least 1")
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise ConfigError(f"thresholds={self.thresholds}: give probabilities between 0 and 1")


def run(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Tunes the gates of cfg.run_dir or cfg.load in place; name -> what was found."""
    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    if decoding.paths is not None:
        raise ConfigError("decoding.paths: a gate is tuned on chains; give decoding.depth, or neither")
    prompts = config.typed(cfg.prompts, PromptsConfig, "prompts")
    own = {k: cfg[k] for k in ("load", "thresholds", "repeats", "threads", "device")}
    settings = config.typed(own, TuneConfig, "tune")
    folders, of_run = evaluate.heads_of(config.run_dir(cfg, "tune"), settings.load)
    base_config = evaluate.base_of(cfg, folders, of_run)
    chat = config.typed(cfg.chat or (of_run or {}).get("data", {}).get("chat") or {}, ChatConfig, "chat")
    settings.apply()
    base = prepare.load_base(base_config, settings.device)
    around = Beside.of(cfg, base)
    heads = {name: around.load(folder) for name, folder in folders.items()}
    gates = {name: cast("Acceptance", head) for name, head in heads.items() if head.role == "gate"}
    if not gates:
        raise ConfigError(f"load: {', '.join(heads)} have nothing to tune; only gates (head=acceptance) do so far")
    asked, source = evaluate.held_out(base, prompts, of_run, chat, decoding.max_new_tokens)
    ids = [a.ids for a in asked]
    keys = sorted(user_turns(evaluate.chosen_prompts(prompts, of_run)))
    found = {}
    for name, head in gates.items():
        found[name] = {**_tuned(base, head, ids, decoding, settings), "prompts": source, "asked": keys}
        _store(folders[name], head, found[name], base.adapter)
        prepare.say(_said(name, found[name], folders[name]))
    return found


def _tuned(
    base: BaseLM, head: Acceptance, asked: list[list[int]], decoding: DecodingConfig, settings: TuneConfig
) -> dict[str, Any]:
    """The costs of this machine, the theory's threshold, what each threshold would bring, and the best of them."""
    how = {
        "max_new_tokens": decoding.max_new_tokens,
        "eos_ids": base.eos_ids,
        "repeats": settings.repeats,
        "rules": decoding.rules,
        "seed": decoding.seed,
    }
    deepest = min(head.beside.max_depth, head.config.max_depth, decoding.depth or head.config.max_depth)
    trial = gating.Trial(base, head.beside, deepest, how)
    costs = trial.costs(head.gate(NEVER), asked)
    best, table = trial.choose(head.gate, settings.thresholds, costs, asked)
    return {
        "threshold": best,
        "theory": costs.threshold,
        "seconds": dataclasses.asdict(costs),
        "temperature": decoding.temperature,
        "depth": deepest,
        "table": table,
    }


NEVER = 2.0  # above every probability


def _store(folder: Path, head: Acceptance, found: dict[str, Any], adapter: Any) -> None:
    """The same folder again, whole, with the new threshold and how it was chosen."""
    from draftsmith.exporters import native

    head.config = dataclasses.replace(head.config, threshold=found["threshold"])
    head.said = {**head.said, "tuned": found}
    native.save(folder, head, name=head.said["name"], adapter=adapter)


def _said(name: str, found: dict[str, Any], folder: Path) -> str:
    seconds = {k: 1e3 * v for k, v in found["seconds"].items()}
    lines = [
        f"{name}: a drafted level costs {seconds['level']:.2f} ms, asking {seconds['ask']:.2f} ms, all else"
        f" {seconds['step']:.2f} ms a step; the theory stops at P(refusal) >= {found['theory']:.2f}"
    ]
    for row in found["table"]:
        chosen = "  <- chosen" if row["threshold"] == found["threshold"] else ""
        lines.append(
            f"{name}: threshold {row['threshold']:.2f}  tau {row['tokens_per_step']:.2f}  {row['drafts_per_step']:.2f}"
            f" drafts a step  {row['tokens_per_second']:.0f} tokens/s{chosen}"
        )
    return "\n".join([*lines, f"-> {folder}"])


def main() -> None:
    config.command("tune", run)


if __name__ == "__main__":
    main()
