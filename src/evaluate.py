"""draftsmith evaluate: tokens per step, speed, and proof that the output is the base's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, distill, prepare
from draftsmith.contracts import Drafter, Needs
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.decoding.referee import BaselinesConfig, DecodingConfig, Referee
from draftsmith.errors import ConfigError, DataError
from draftsmith.reporting import table

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates the heads of cfg.run_dir or cfg.load and returns what it writes to evaluation.json."""
    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    prompts = config.typed(cfg.prompts, PromptsConfig, "prompts")
    baselines = config.typed(cfg.baselines, BaselinesConfig, "baselines")
    if cfg.repeats < 1:
        raise ConfigError(f"repeats={cfg.repeats}: give at least 1")
    run_dir = Path(cfg.run_dir)
    folders, of_run = heads_of(run_dir, cfg.load)
    node = cfg.get("base") or (of_run or {}).get("base")
    if node is None:
        raise ConfigError("base: which one? give base=… beside load=…")
    base_config = config.typed(node, prepare.BaseConfig, "base")

    import torch

    from draftsmith.exporters import native

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    base = prepare.load_base(base_config, cfg.device)
    heads = {name: native.load(f, base.spec, device=base.device) for name, f in folders.items()}
    asked = held_out(base, prompts, of_run)
    referee = Referee(
        base,
        decoding,
        baselines,
        base.eos_ids,
        lambda p: base.generate([list(p)], max_new_tokens=decoding.max_new_tokens)[0],
        _rescorer(base),
        cfg.repeats,
    )
    drafters = {name: cast(Drafter, head) for name, head in heads.items() if head.role == "drafter"}
    found = referee.evaluate(drafters, asked)
    for name, head in heads.items():
        found["heads"][name]["parameters"] = sum(p.numel() for p in head.parameters())
    told = {"prompts": len(asked), "repeats": cfg.repeats, "threads": cfg.threads, "device": str(base.device)}
    result = {
        "base": {**dataclasses.asdict(base.spec), "dtype": str(base.dtype).removeprefix("torch.")},
        "decoding": {**dataclasses.asdict(decoding), **told},
        **found,
    }
    with artifacts.disk(run_dir, "evaluation.json"):
        run_dir.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(run_dir / "evaluation.json", result)
    prepare.say(table.evaluation(result))
    prepare.say(f"-> {run_dir / 'evaluation.json'}")
    return result


def heads_of(run_dir: Path, load: Any) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """name -> native folder, and the run's configuration if it is a run of ours."""
    if load:
        return {Path(p).name: Path(p) for p in load}, None
    if not artifacts.is_complete(run_dir, manifest="COMPLETE.json"):
        raise DataError(f"{run_dir}: no complete run of draftsmith train; run_dir=… names one, load=[…] heads")
    names = artifacts.read_json(run_dir / "COMPLETE.json")["heads"]
    of_run = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    return {name: run_dir / "heads" / name for name in names}, cast("dict[str, Any]", of_run)


def held_out(base: BaseLM, prompts: PromptsConfig, of_run: dict[str, Any] | None) -> list[list[int]]:
    """Token ids of the prompts; made-up ones share no user turn with the run's training prompts."""
    from draftsmith.data import chat

    exclude: frozenset[str] = frozenset()
    if of_run and of_run["data"].get("prompts"):
        trained = config.typed(of_run["data"]["prompts"], PromptsConfig, "data.prompts")
        exclude = user_turns(distill.collect(trained))
    asked = distill.collect(prompts, exclude)
    if not asked:
        raise DataError(f"{prompts.path}: no prompt in it")
    return [
        chat.text_ids(base.tokenizer, p.text) if p.text else chat.prompt_ids(base.tokenizer, p.messages) for p in asked
    ]


def _rescorer(base: BaseLM) -> Any:
    """fp64 logits of the token after a prefix; the copy of the base is made when first asked."""
    import torch

    copies: list[BaseLM] = []

    def rescore(prefix: list[int]) -> torch.Tensor:
        if not copies:
            copies.append(base.in_float64())
        seen = copies[0].capture(Needs(final=True), torch.tensor([prefix], device=base.device))
        assert seen.final is not None
        return copies[0].lm_head(seen.final[:, -1:])[0, -1]

    return rescore


def main() -> None:
    config.command("evaluate", run)


if __name__ == "__main__":
    main()
