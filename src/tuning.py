"""What draftsmith tune finds for a head on this machine: the tree of a drafter, the threshold of a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.decoding import gating
from draftsmith.decoding.optimise import Optimiser
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.roles import Drafter

if TYPE_CHECKING:
    from draftsmith.asking import Asked
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head
    from draftsmith.decoding.referee import DecodingConfig
    from draftsmith.heads.acceptance import Acceptance
    from draftsmith.tune import TuneConfig

NEVER = 2.0  # above every probability


def tree(
    base: BaseLM, head: Head, asked: Sequence[Asked], decoding: DecodingConfig, settings: TuneConfig
) -> dict[str, Any]:
    """The tree that promises the most tokens per second on the prompts of every other question, and what it brings on
    the rest, as predicted and as measured, beside the best published tree and the chain as deep as the head goes."""
    if decoding.drafts not in (None, "best") or decoding.accept != "exact":
        raise ConfigError(
            f"decoding.drafts={decoding.drafts}, accept={decoding.accept}: what is kept must not be left to chance;"
            " tune with drafts=best and accept=exact"
        )
    drafter = cast(Drafter, head)
    deepest = min(drafter.max_depth, decoding.depth or drafter.max_depth)
    first, rest = halves(asked)
    chosen_on, measured_on = ([one.ids for one in half] for half in (first, rest))
    optimiser = Optimiser(base, drafter, deepest, _how(base, decoding, settings), settings.sizes, published())
    choice = optimiser.choose(chosen_on)
    predicted = optimiser.predicted(choice, measured_on)
    measured = optimiser.measured(choice, measured_on, [one.question for one in rest])

    def both(name: str) -> dict[str, Any]:
        kept = ("tokens_per_step", "tokens_per_second", "speedup")
        parts = {"promised": choice.row(name), "predicted": predicted[name], "measured": measured[name]}
        figures = {f"{part}_{k}": told[k] for part, told in parts.items() for k in kept}
        spread = {f"measured_{k}": measured[name][k] for k in ("interval", "speedups")}
        return {"name": name, **figures, **spread}

    return {
        "tree": dataclasses.asdict(choice.best.spec),
        "nodes": choice.best.nodes,
        "depth": choice.best.depth,
        "temperature": decoding.temperature,
        **both(choice.best.name),
        "published": None if choice.published is None else both(choice.published.name),
        "chain": both(choice.chain.name),
        "shares": optimiser.shares(choice.best, chosen_on),
        "costs": [{"name": name, **dataclasses.asdict(cost)} for name, cost in choice.costs.items()],
        "table": choice.table,
        "replayed": optimiser.replayable,
        "chosen_on": len(chosen_on),
        "measured_on": len(measured_on),
    }


def halves(asked: Sequence[Asked]) -> tuple[list[Asked], list[Asked]]:
    """The prompts of every other question of each source, and the rest."""
    sources: dict[str, list[int]] = {}
    for one in asked:
        questions = sources.setdefault(one.source, [])
        if one.question not in questions:
            questions.append(one.question)
    order = [question for questions in sources.values() for question in questions]
    if len(order) < 2:
        raise ConfigError(f"prompts: {len(order)} question; a tree is chosen on half of them and measured on the rest")
    first = set(order[::2])
    return [one for one in asked if one.question in first], [one for one in asked if one.question not in first]


def published() -> dict[str, TreeSpec]:
    """The static trees of conf/tree by name."""
    found = {}
    for file in sorted(resources.files("draftsmith.conf.tree").iterdir(), key=lambda file: file.name):
        name, _, suffix = file.name.rpartition(".")
        if suffix == "yaml":
            spec = config.typed(OmegaConf.create(file.read_text()), TreeSpec, f"tree={name}")
            if spec.kind == "static":
                found[name] = spec
    return found


def threshold(
    base: BaseLM, head: Acceptance, asked: Sequence[Asked], decoding: DecodingConfig, settings: TuneConfig
) -> dict[str, Any]:
    """The costs of this machine, the theory's threshold, what each threshold would bring, and the best of them."""
    prompts = [one.ids for one in asked]
    deepest = min(head.beside.max_depth, head.config.max_depth, decoding.depth or head.config.max_depth)
    trial = gating.Trial(base, head.beside, deepest, _how(base, decoding, settings))
    costs = trial.costs(head.gate(NEVER), prompts)
    best, table = trial.choose(head.gate, settings.thresholds, costs, prompts)
    return {
        "threshold": best,
        "theory": costs.threshold,
        "seconds": dataclasses.asdict(costs),
        "temperature": decoding.temperature,
        "depth": deepest,
        "table": table,
    }


def store(folder: Path, head: Head, found: Mapping[str, Any], adapter: Any) -> None:
    """The same folder again, whole, with what was found and how it was chosen."""
    from draftsmith.exporters import native

    if "threshold" in found:
        head.config = dataclasses.replace(head.config, threshold=found["threshold"])
    head.said = {**head.said, "tuned": dict(found)}
    native.save(folder, head, name=head.said["name"], adapter=adapter)


def told(name: str, found: Mapping[str, Any], folder: Path) -> str:
    """A gate's threshold in words."""
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


def _how(base: BaseLM, decoding: DecodingConfig, settings: TuneConfig) -> dict[str, Any]:
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "eos_ids": base.eos_ids,
        "repeats": settings.repeats,
        "rules": decoding.rules,
        "seed": decoding.seed,
    }
