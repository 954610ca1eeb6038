"""draftsmith evaluate: tokens per step, speed, and proof that the output is the base's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, prepare, supply
from draftsmith.beside import DEPTH, Beside
from draftsmith.contracts import Head, Needs
from draftsmith.data.chat import ChatConfig
from draftsmith.data.prompts import PromptsConfig, user_turns
from draftsmith.data.records import Record
from draftsmith.data.settings import DataConfig
from draftsmith.decoding import gating, priming
from draftsmith.decoding.engine import generate
from draftsmith.decoding.gates import Confidence, Fixed, GateConfig, Oracle
from draftsmith.decoding.measure import Contender, MakeGate
from draftsmith.decoding.referee import COMPANY, HF, PLAIN, BaselinesConfig, DecodingConfig, Referee
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.heads.acceptance import Acceptance, AcceptanceGate
from draftsmith.heads.draft_model import DraftModel
from draftsmith.reporting import gates, leaderboard, primers, table
from draftsmith.roles import Drafter

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(prepare.MachineConfig):
    load: list[str] = dataclasses.field(default_factory=list)
    repeats: int = 3
    batch_sizes: list[int] = dataclasses.field(default_factory=lambda: [1])
    batch_prompts: int = 8
    prompt_lengths: list[int] = dataclasses.field(default_factory=lambda: [64, 256, 512])

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
    NumericsError, after writing, if an fp32 base's tokens were not kept."""
    decoding = config.typed(cfg.decoding, DecodingConfig, "decoding")
    prompts = config.typed(cfg.prompts, PromptsConfig, "prompts")
    baselines = config.typed(cfg.baselines, BaselinesConfig, "baselines")
    gate = config.typed(cfg.get("gate"), GateConfig, "gate") if cfg.get("gate") is not None else None
    own = {
        k: cfg[k] for k in ("load", "repeats", "batch_sizes", "batch_prompts", "prompt_lengths", "threads", "device")
    }
    settings = config.typed(own, EvaluateConfig, "evaluate")
    if gate is not None and gate.kind == "oracle" and decoding.temperature:
        raise ConfigError(
            f"gate=oracle: knows a greedy text only; decoding.temperature={decoding.temperature:g} is not"
        )
    run_dir = config.run_dir(cfg, "evaluate")
    folders, of_run = heads_of(run_dir, settings.load)
    base_config = base_of(cfg, folders, of_run)
    chat = cfg.chat or (of_run or {}).get("data", {}).get("chat") or {}
    told = config.typed(chat, ChatConfig, "chat")

    settings.apply()
    base = prepare.load_base(base_config, settings.device)
    around = Beside.of(around_of(cfg, of_run), base)
    heads = {name: around.load(f) for name, f in folders.items()}
    room = base.spec.max_positions - decoding.max_new_tokens
    asked, source = held_out(base, prompts, of_run, told, room, tuned_on(folders.values()))
    found = judged(base, heads, asked, decoding, baselines, settings, gate, around.companion)
    dtype = str(base.dtype).removeprefix("torch.")
    how = {"prompts": source, "repeats": settings.repeats, "threads": settings.threads, "device": str(base.device)}
    result = {
        "base": {**dataclasses.asdict(base.spec), "dtype": dtype},
        "decoding": {**dataclasses.asdict(decoding), **how},
        **({} if gate is None else {"gate": dataclasses.asdict(gate)}),
        **found,
    }
    with artifacts.disk(run_dir, "evaluation.json"):
        run_dir.mkdir(parents=True, exist_ok=True)
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
    check_proofs(found, dtype, run_dir / "evaluation.json")
    return result


def judged(
    base: BaseLM,
    heads: Mapping[str, Head],
    asked: list[list[int]],
    decoding: DecodingConfig,
    baselines: BaselinesConfig,
    settings: EvaluateConfig,
    gate: GateConfig | None = None,
    companion: BaseLM | None = None,
) -> dict[str, Any]:
    """What the referee finds of these heads, with how large each is; of gates, between which bounds they stand; of
    primers, what they cost and save."""
    referee = Referee(
        base,
        decoding,
        baselines,
        base.eos_ids,
        lambda p: base.generate([list(p)], max_new_tokens=decoding.max_new_tokens)[0],
        _rescorer(base),
        None if companion is None else DraftModel(companion, DEPTH),
        settings.repeats,
        settings.batch_sizes,
        settings.batch_prompts,
    )
    own = contenders(referee, heads, gate)
    found = referee.evaluate(own, asked)
    for name in own:
        found["heads"][name]["parameters"] = sum(p.numel() for p in heads[name].parameters())
        if heads[name].role == "gate":
            found["heads"][name]["gate"] = of_gate(referee, cast(Acceptance, heads[name]), gate, asked)
    priming_heads = {name: head for name, head in heads.items() if head.role == "primer"}
    if priming_heads:
        limits: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "eos_ids": base.eos_ids}
        answers = [generate(base, prompt, **limits).tokens for prompt in asked]
        how: dict[str, Any] = {"lengths": settings.prompt_lengths, "repeats": settings.repeats}
        found["primers"] = priming.judge(base, cast(Any, priming_heads), asked, answers, **how)
    return found


def contenders(referee: Referee, heads: Mapping[str, Head], gate: GateConfig | None) -> dict[str, Contender]:
    """Drafters, under the gate that was asked for; gates with the drafter each was trained for."""
    found = {}
    for name, head in heads.items():
        if head.role == "drafter":
            maker = None if gate is None else without_weights(gate)
            found[name] = referee.contender(cast(Drafter, head), gate=maker)
        elif head.role == "gate":
            if gate is not None and gate.kind != "acceptance":
                raise ConfigError(f"gate={gate.kind}: {name} is a gate itself; give gate=acceptance, or none")
            own = trained(cast(Acceptance, head), gate)
            found[name] = referee.contender(head.beside, own.head.config.max_depth, gating.always(own))
    return found


def without_weights(gate: GateConfig) -> MakeGate:
    if gate.kind == "fixed":
        return gating.always(Fixed(gate.depth))
    if gate.kind == "confidence":
        return gating.always(Confidence(cast(float, gate.threshold)))
    if gate.kind == "oracle":
        return lambda prompt, answer: Oracle([*prompt, *answer])
    raise ConfigError("gate=acceptance: a trained one is wanted; load=[…] its folder, alone or beside others")


def trained(head: Acceptance, gate: GateConfig | None) -> AcceptanceGate:
    return head.gate(gate.threshold, gate.min_depth) if gate else head.gate()


def of_gate(referee: Referee, head: Acceptance, gate: GateConfig | None, asked: list[list[int]]) -> dict[str, Any]:
    """A gate between its bounds, and whether its chances are true, on these prompts."""
    own = trained(head, gate)
    judge = gating.Judge(referee.base, head.beside, min(head.beside.max_depth, head.config.max_depth), referee.how)
    hearing = gating.Hearing(head.chances)
    judge.run(hearing, asked, hearing.watch)
    return {
        "threshold": own.threshold,
        "min_depth": own.min_depth,
        **judge.bounds(own, asked),
        "calibration": gating.calibration(hearing.said, hearing.right),
    }


def around_of(cfg: DictConfig, of_run: dict[str, Any] | None) -> Mapping[str, Any]:
    """companion and drafter of this command line, else the run's."""
    if cfg.get("companion") is not None or cfg.drafter is not None or of_run is None:
        return {"companion": cfg.get("companion"), "drafter": cfg.drafter}
    return {"companion": of_run.get("companion"), "drafter": of_run.get("drafter")}


def check_proofs(found: Mapping[str, Any], dtype: str, written: Path) -> None:
    """NumericsError if a base in fp32 or more did not keep its own tokens."""
    proofs = {n: r["lossless"] for n, r in [*found["heads"].items(), *([(HF, found[HF])] if HF in found else [])]}
    wrong = [name for name, proof in proofs.items() if proof and not proof["ok"]]
    if wrong and dtype in ("float32", "float64"):
        raise NumericsError(f"{', '.join(wrong)}: the output differs from the base's own; see {written}")
    if wrong:
        prepare.say(f"note: in {dtype} rounding decides between near-equal logits; base.dtype=float32 is the proof")


def heads_of(run_dir: Path, load: Any) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """name -> native folder, and the run's configuration if it is a run of ours."""
    if load:
        folders = {Path(p).name: Path(p) for p in load}
        if len(folders) < len(load) or {PLAIN, HF, *COMPANY} & set(folders):
            raise ConfigError(f"load: the folders' names name the heads; {list(load)} are not distinct or are taken")
        return folders, None
    if not artifacts.is_complete(run_dir, manifest="COMPLETE.json"):
        raise DataError(f"{run_dir}: no complete run of draftsmith train; run_dir=… names one, load=[…] heads")
    names = artifacts.read_json(run_dir / "COMPLETE.json")["heads"]
    of_run = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    return {name: run_dir / "heads" / name for name in names}, cast("dict[str, Any]", of_run)


def base_of(cfg: DictConfig, folders: Mapping[str, Path], of_run: dict[str, Any] | None) -> prepare.BaseConfig:
    """The base of this command line, else the run's, whose remote code is never run without being asked for
    here. A folder that the run named relative to elsewhere is found through the head's own record."""
    if cfg.get("base"):
        return config.typed(cfg.base, prepare.BaseConfig, "base")
    if of_run is None:
        raise ConfigError("base: which one? give base=… beside load=…")
    base = dataclasses.replace(config.typed(of_run["base"], prepare.BaseConfig, "base"), trust_remote_code=False)
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
    room: int,
    also: frozenset[str] = frozenset(),
) -> tuple[list[list[int]], dict[str, Any]]:
    """Token ids of the prompts, and what evaluation.json tells of them. Made-up prompts share no user turn with
    the made-up ones the run was trained on, nor any in `also`; of others, those trained on are counted (trained_on;
    null: unknown).
    """
    trained = trained_on(of_run)
    asked = supply.collect(prompts, user_turns(trained or []) | also)
    if not asked:
        raise DataError(f"{prompts.path}: no prompt in it")
    seen = None if trained is None else len({r.asked for r in asked} & {r.asked for r in trained})
    if seen:
        prepare.say(f"warning: {seen} of {len(asked)} prompts were trained on; these figures flatter the head")
    ids = [_prompt_ids(base, r, told, room) for r in asked]
    return ids, {**dataclasses.asdict(prompts), "count": len(asked), "trained_on": seen}


def tuned_on(folders: Iterable[Path]) -> frozenset[str]:
    """What was asked when these gates were tuned: no result may come from the same prompts."""
    asked: frozenset[str] = frozenset()
    for folder in folders:
        said = artifacts.read_json(folder / "config.json").get("tuned") or {}
        kept = {k: v for k, v in said.get("prompts", {}).items() if k not in ("count", "trained_on")}
        if kept:
            asked |= user_turns(supply.collect(config.typed(kept, PromptsConfig, f"{folder}: tuned.prompts")))
    return asked


def _prompt_ids(base: BaseLM, record: Record, told: ChatConfig, room: int) -> list[int]:
    from draftsmith.data import chat

    ids = (
        chat.prompt_ids(base.tokenizer, record.messages, record.where, told, tools=record.tools)
        if record.messages
        else chat.text_ids(base.tokenizer, record.prompt or record.text)
    )
    if len(ids) > room:
        raise DataError(
            f"{record.where}: a prompt of {len(ids)} tokens leaves no room for decoding.max_new_tokens in the base's"
            f" context of {base.spec.max_positions}; shorten either or take it out"
        )
    return ids


def trained_on(of_run: dict[str, Any] | None) -> list[Record] | None:
    """What was asked behind a run's rows; None where nothing says."""
    if of_run is None:
        return None
    return supply.asked_of(config.typed(of_run["data"], DataConfig, "data"))


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
