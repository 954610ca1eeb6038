"""What evaluate finds out: the referee's figures, gates between their bounds, primers against the base; and whether the
proofs hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from draftsmith import artifacts, config, prepare
from draftsmith.beside import DEPTH
from draftsmith.contracts import Head, Needs
from draftsmith.decoding import gating, priming, samples
from draftsmith.decoding.breakdown import Label
from draftsmith.decoding.company import BaselinesConfig
from draftsmith.decoding.engine import generate
from draftsmith.decoding.gates import Confidence, Fixed, GateConfig, Oracle
from draftsmith.decoding.measure import Contender, MakeGate
from draftsmith.decoding.referee import HF, DecodingConfig, Referee
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.heads.acceptance import Acceptance, AcceptanceGate
from draftsmith.heads.draft_model import DraftModel
from draftsmith.roles import Drafter

if TYPE_CHECKING:
    from draftsmith.asking import Asked
    from draftsmith.base.lm import BaseLM
    from draftsmith.evaluate import EvaluateConfig


def judged(
    base: BaseLM,
    heads: Mapping[str, Head],
    asked: list[Asked],
    decoding: DecodingConfig,
    baselines: BaselinesConfig,
    settings: EvaluateConfig,
    gate: GateConfig | None = None,
    companion: BaseLM | None = None,
) -> dict[str, Any]:
    """What the referee finds of these heads, with how large each is; of gates, between which bounds they stand; of
    primers, what they cost and save."""
    drafting = [h.beside for h in heads.values() if isinstance(h.beside, DraftModel)]
    referee = Referee(
        base,
        decoding,
        baselines,
        base.eos_ids,
        lambda p: base.generate([list(p)], max_new_tokens=decoding.max_new_tokens)[0],
        _rescorer(base),
        DraftModel(companion, DEPTH) if companion is not None else next(iter(drafting), None),
        settings.repeats,
        settings.batch_sizes,
        settings.batch_prompts,
    )
    own = contenders(referee, heads, gate)
    prompts = [a.ids for a in asked]
    found = referee.evaluate(own, prompts, [Label(a.source, a.turn, a.question) for a in asked])
    for name in own:
        weights = {"weights_sha256": artifacts.tensors_sha256(heads[name].state_dict())}  # a card knows its own by it
        found["heads"][name] |= {"parameters": sum(p.numel() for p in heads[name].parameters()), **weights}
        found["heads"][name]["samples"] = shown(base, referee, own[name], prompts)
        if heads[name].role == "gate":
            found["heads"][name]["gate"] = of_gate(referee, cast(Acceptance, heads[name]), gate, prompts)
    priming_heads = {name: head for name, head in heads.items() if head.role == "primer"}
    if priming_heads:
        limits: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "eos_ids": base.eos_ids}
        answers = [generate(base, prompt, **limits).tokens for prompt in prompts]
        how: dict[str, Any] = {"lengths": settings.prompt_lengths, "repeats": settings.repeats}
        found["primers"] = priming.judge(base, cast(Any, priming_heads), prompts, answers, **how)
    return found


def shown(
    base: BaseLM, referee: Referee, contender: Contender, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """The first prompts and, step by step, what was accepted, said by the base and refused; control tokens are shown as
    themselves."""
    how = {k: v for k, v in referee.how.items() if k not in ("repeats", "seed")}

    def decode(ids: Sequence[int]) -> str:
        return base.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    found = []
    for n, prompt in enumerate(prompts[: samples.PROMPTS]):  # seeds as when it was measured
        steps = samples.steps_of(base, prompt, contender, seed=referee.decoding.seed + n, **how)
        found.append({"prompt": decode(prompt), "steps": samples.told(steps, decode)})
    return found


def check_proofs(found: Mapping[str, Any], dtype: str, written: Path) -> None:
    """NumericsError if a base in fp32 or more did not keep its own tokens, be it with a head or with a baseline."""
    judged = [*found["heads"].items(), *found["baselines"].items(), *([(HF, found[HF])] if HF in found else [])]
    proofs = {name: r.get("lossless") for name, r in judged}
    wrong = [name for name, proof in proofs.items() if proof and not proof["ok"]]
    if wrong and dtype in ("float32", "float64"):
        raise NumericsError(f"{', '.join(wrong)}: the output differs from the base's own; see {written}")
    if wrong:
        prepare.say(f"note: in {dtype} rounding decides between near-equal logits; base.dtype=float32 is the proof")


def contenders(referee: Referee, heads: Mapping[str, Head], gate: GateConfig | None) -> dict[str, Contender]:
    """Drafters, under the gate that was asked for; gates with the drafter each was trained for."""
    found = {}
    gates = [name for name, head in heads.items() if head.role == "gate"]
    if gates and (referee.decoding.paths is not None or referee.decoding.tree.kind not in ("auto", "chain")):
        raise ConfigError(f"decoding.paths, tree: {gates[0]} is judged on chains; give decoding.depth, or neither")
    if gate is not None and gate.kind == "acceptance" and not gates:
        raise ConfigError("gate=acceptance: a trained one is wanted; load=[…] its folder, alone or beside others")
    for name, head in heads.items():
        if head.role == "drafter":
            maker = None if gate is None or gate.kind == "acceptance" else without_weights(gate)
            found[name] = referee.contender(cast(Drafter, head), gate=maker, tuned=None if maker else tuned_tree(head))
        elif head.role == "gate":
            if gate is not None and gate.kind != "acceptance":
                raise ConfigError(f"gate={gate.kind}: {name} is a gate itself; give gate=acceptance, or none")
            own = trained(cast(Acceptance, head), gate)
            found[name] = referee.contender(head.beside, own.head.config.max_depth, gating.always(own))
    if gate is not None and not found:
        raise ConfigError(f"gate={gate.kind}: nobody drafts here, so there is nothing to stop; leave it out")
    return found


def tuned_tree(head: Head) -> TreeSpec | None:
    """What draftsmith tune found best for it, if it was asked."""
    told = head.said.get("tuned", {}).get("tree")
    try:
        return None if told is None else config.typed(told, TreeSpec, "tuned.tree")
    except ConfigError as e:
        raise DataError(f"{head.said.get('name')}/config.json: {e}; it is damaged: tune it again") from None


def without_weights(gate: GateConfig) -> MakeGate:
    if gate.kind == "fixed":
        return gating.always(Fixed(gate.depth))
    if gate.kind == "confidence":
        return gating.always(Confidence(cast(float, gate.threshold)))
    return lambda prompt, answer: Oracle([*prompt, *answer])


def trained(head: Acceptance, gate: GateConfig | None) -> AcceptanceGate:
    return head.gate(gate.threshold, gate.min_depth) if gate else head.gate()


def of_gate(referee: Referee, head: Acceptance, gate: GateConfig | None, asked: list[list[int]]) -> dict[str, Any]:
    """A gate between its bounds, and whether its chances are true, on these prompts."""
    own = trained(head, gate)
    deepest = min(head.beside.max_depth, head.config.max_depth)
    trial = gating.Trial(referee.base, head.beside, min(deepest, referee.decoding.depth or deepest), referee.how)
    hearing = gating.Hearing(head.chances)
    trial.run(hearing, asked, hearing.watch)
    return {
        "threshold": own.threshold,
        "min_depth": own.min_depth,
        **trial.bounds(own, asked),
        "calibration": gating.calibration(hearing.said, hearing.right),
    }


def _rescorer(base: BaseLM) -> Any:
    """fp64 logits of the token after a prefix; the copy of the base is made when first asked."""
    copies: list[BaseLM] = []

    def rescore(prefix: list[int]) -> torch.Tensor:
        if not copies:
            copies.append(base.in_float64())
        seen = copies[0].capture(Needs(final=True), torch.tensor([prefix], device=base.device))
        assert seen.final is not None
        return copies[0].lm_head(seen.final[:, -1:])[0, -1]

    return rescore
