"""draftsmith evaluate: tokens per step, speed, and proof that the output is the base's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, asking, certify, claims, config, judging, prepare, report, room, supply
from draftsmith.beside import Beside
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.data.records import Record
from draftsmith.data.settings import DataConfig
from draftsmith.decoding.certificate import CertificateConfig
from draftsmith.decoding.company import COMPANY, BaselinesConfig
from draftsmith.decoding.gates import GateConfig
from draftsmith.decoding.referee import HF, PLAIN, DecodingConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.reporting import gates, leaderboard, primers, table
from draftsmith.training import tracking

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(prepare.MachineConfig):
    load: list[str] = dataclasses.field(default_factory=list)
    repeats: int = 3
    batch_sizes: list[int] = dataclasses.field(default_factory=lambda: [1])
    batch_prompts: int = 8
    prompt_lengths: list[int] = dataclasses.field(default_factory=lambda: [64, 256, 512])
    certify: bool = False
    certificate: CertificateConfig = dataclasses.field(default_factory=CertificateConfig)

    def __post_init__(self) -> None:
        for name in ("repeats", "batch_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        if any(n < 2 for n in self.prompt_lengths):
            raise ConfigError(f"prompt_lengths={self.prompt_lengths}: every prompt has at least 2 tokens")
        if any(n < 1 for n in self.batch_sizes):
            raise ConfigError(f"batch_sizes={self.batch_sizes}: every size is at least 1")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates the heads of cfg.run_dir or cfg.load and returns what it writes to evaluation.json. Raises
    NumericsError, after writing, if an fp32 base's tokens were not kept or a head is not certified that was to be."""
    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    prompts = config.typed(cfg.prompts, PromptsConfig, "prompts")
    baselines = config.typed(cfg.baselines, BaselinesConfig, "baselines")
    gate = config.typed(cfg.get("gate"), GateConfig, "gate") if cfg.get("gate") is not None else None
    own = {field.name: cfg[field.name] for field in dataclasses.fields(EvaluateConfig)}
    settings = config.typed(own, EvaluateConfig, "evaluate")
    if gate is not None and gate.kind == "oracle" and (decoding.temperature or settings.certify):
        raise ConfigError("gate=oracle: knows a greedy text only; give decoding.temperature=0 and certify=false")
    run_dir = config.run_dir(cfg, "evaluate")
    folders, of_run = heads_of(run_dir, settings.load)
    room.ready(run_dir, "run_dir")
    base_config = base_of(cfg, folders, of_run)
    chat = cfg.chat or (of_run or {}).get("data", {}).get("chat") or {}
    told = config.typed(chat, ChatConfig, "chat")

    settings.apply()
    base = prepare.load_base(base_config, settings.device)
    around = Beside.of(cfg, base)
    heads = {name: around.load(f) for name, f in folders.items()}
    for name, head in heads.items():
        if head.spec.quantised != base.spec.quantised:
            then, now = (spec.quantised or "not quantised" for spec in (head.spec, base.spec))
            prepare.say(f"note: {name} was trained on the base {then}; here the base is {now}")
    limit = base.spec.max_positions
    if any(h.role == "primer" for h in heads.values()) and max(settings.prompt_lengths, default=0) > limit:
        raise ConfigError(f"prompt_lengths={settings.prompt_lengths}: the base has {limit} positions")
    asked, source = held_out(base, prompts, of_run, told, decoding.max_new_tokens, tuned_on(heads.values()))
    most, longest = max([1, *settings.batch_sizes]), max(len(a.ids) for a in asked) + decoding.max_new_tokens
    smaller = f"lower batch_sizes, now at most {most}, or decoding.max_new_tokens"
    with room.memory(f"evaluate: {most} x up to {longest} tokens", smaller):
        found = judging.judged(base, heads, asked, decoding, baselines, settings, gate, around.companion)
    dtype = str(base.dtype).removeprefix("torch.")
    how = {"prompts": source, "repeats": settings.repeats, "threads": settings.threads, "device": str(base.device)}
    result = {
        "base": {**dataclasses.asdict(base.spec), "dtype": dtype},
        "decoding": {**dataclasses.asdict(decoding), **how},
        **({} if gate is None else {"gate": dataclasses.asdict(gate)}),
        **found,
    }
    artifacts.write_json(run_dir / "evaluation.json", result)
    prepare.say(table.evaluation(result))
    prepare.say(f"-> {run_dir / 'evaluation.json'}")
    if len(found["heads"]) > 1:
        prepare.say(leaderboard.write(run_dir, leaderboard.entries(found["heads"])))
    if "primers" in found:
        prepare.say(primers.markdown(found["primers"]))
        prepare.say(primers.write(run_dir, found["primers"]))
    if any("gate" in head for head in found["heads"].values()):
        prepare.say(gates.write(run_dir, found["heads"]))
    case = certify.Case(base, heads, [a.ids for a in asked], decoding, gate, settings.certificate)
    certificate = certify.write(run_dir, cfg, case) if settings.certify else None
    report.write(run_dir)
    tracking.conclude(run_dir, result)
    judging.check_proofs(found, dtype, run_dir / "evaluation.json")
    if certificate is not None:
        certify.check(certificate, run_dir / certify.FILE)
    return result


def heads_of(run_dir: Path, load: Any) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """name -> native folder, and the run's configuration if it is a run of ours."""
    if load:
        folders = {Path(p).name: Path(p) for p in load}
        if len(folders) < len(load) or {PLAIN, HF, *COMPANY} & set(folders):
            raise ConfigError(f"load: the folders' names name the heads; {list(load)} are not distinct or are taken")
        return folders, None
    if not artifacts.is_complete(run_dir, manifest="COMPLETE.json"):
        raise DataError(f"{run_dir}: no complete run of draftsmith train; run_dir=… names one, load=[…] heads")
    names = artifacts.read_object(run_dir / "COMPLETE.json").get("heads")
    if not isinstance(names, list) or not all(isinstance(n, str) and Path(n).name == n for n in names) or not names:
        cure = f"load=[{run_dir}/heads/…] names one"
        raise DataError(f"{run_dir / 'COMPLETE.json'}: names no heads; it is damaged: {cure}")
    if (of_run := claims.stored(run_dir)) is None:
        raise DataError(f"{run_dir}: config.yaml is gone; bring it back, or name heads by load=[…] beside base=…")
    kept = cast("dict[str, Any]", OmegaConf.to_container(of_run))
    return {name: run_dir / "heads" / name for name in names}, kept


def base_of(cfg: DictConfig, folders: Mapping[str, Path], of_run: dict[str, Any] | None) -> prepare.BaseConfig:
    """The base of this command line, else the run's, whose remote code is never run without being asked for
    here. A folder that the run named relative to elsewhere is found through the head's own record."""
    if cfg.get("base"):
        return config.typed(cfg.base, prepare.BaseConfig, "base")
    if of_run is None:
        raise ConfigError("base: which one? give base=… beside load=…")
    try:
        recorded_base = config.typed(of_run.get("base"), prepare.BaseConfig, "base")
    except ConfigError as e:
        path = next(iter(folders.values())).parents[1] / "config.yaml"
        raise DataError(f"{path}: {e}; bring it back, or give base=…") from None
    base = dataclasses.replace(recorded_base, trust_remote_code=False)
    first = next(iter(folders.values()))
    if (first / "adapter").is_dir():  # what was trained of the base lies with the head
        base = dataclasses.replace(base, lora=None, adapter=str(first / "adapter"))
    recorded = artifacts.read_json(first / "config.json")["base"]["path"]
    if base.path and not Path(base.path).exists() and Path(recorded).is_dir():
        return dataclasses.replace(base, path=recorded)
    return base


def held_out(
    base: BaseLM,
    prompts: PromptsConfig,
    of_run: dict[str, Any] | None,
    told: ChatConfig,
    max_new_tokens: int,
    also: frozenset[str] = frozenset(),
) -> tuple[list[asking.Asked], dict[str, Any]]:
    """The prompts, and what evaluation.json tells of them: count prompts made of so many questions, one for each of
    their turns but the left_out. Made-up ones share no user turn with the made-up ones the run was trained on, nor any
    in `also`; of other questions, those trained on are counted (trained_on; null: unknown).
    """
    trained = trained_on(of_run)
    questions = chosen_prompts(prompts, of_run, also)
    if not questions:
        raise DataError(f"{prompts.path or ', '.join(prompts.chosen)}: no prompt in it")
    chose, some = sum(bool(user_turns([r]) & also) for r in questions), f"of {len(questions)} prompts"
    if chose:
        prepare.say(f"warning: {chose} {some} tuned a threshold or a tree; these figures flatter it")
    seen = None if trained is None else len({r.asked for r in questions} & {r.asked for r in trained})
    if seen:
        prepare.say(f"warning: {seen} {some} were trained on; these figures flatter the head")
    asked, lost = asking.opened(base, questions, told, max_new_tokens, prompts.label)
    if lost:
        prepare.say(f"note: {len(lost)} later turns are left out, the first for this: {lost[0]}")
    counts = {"count": len(asked), "questions": len(questions), "left_out": len(lost), "trained_on": seen}
    return asked, {**dataclasses.asdict(prompts), **counts}


def chosen_prompts(
    prompts: PromptsConfig, of_run: dict[str, Any] | None, also: frozenset[str] = frozenset()
) -> list[Record]:
    return supply.collect(prompts, user_turns(trained_on(of_run) or []) | also)


def tuned_on(heads: Iterable[Head]) -> frozenset[str]:
    """The keys of what was asked when these gates were tuned: no result may come from the same prompts."""
    return frozenset(str(key) for head in heads for key in head.said.get("tuned", {}).get("asked", []))


def trained_on(of_run: dict[str, Any] | None) -> list[Record] | None:
    """What was asked behind a run's rows; None where nothing says."""
    if of_run is None:
        return None
    return supply.asked_of(config.typed(of_run["data"], DataConfig, "data"))


def main() -> None:
    config.command("evaluate", run)


if __name__ == "__main__":
    main()
