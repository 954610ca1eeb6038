"""The referee: heads beside plain decoding, Hugging Face's generate, prompt look-up and an oracle.

One harness for everybody: the same prompts, the same engine, times interleaved in one process. What it
returns is evaluation.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding import breakdown, measure
from draftsmith.decoding.breakdown import Label
from draftsmith.decoding.company import BaselinesConfig, always, beside
from draftsmith.decoding.measure import Contender, MakeGate, Result
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import TreeConfig, TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.growth import Shape, Warp
from draftsmith.roles import Drafter

HF = "hf_generate"
PLAIN = "autoregressive"


@dataclass(frozen=True)
class DecodingConfig(TreeConfig):
    """temperature 0 is greedy; the rest as Rules and TreeConfig say. seed: of the sampling."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    drafts: str | None = None
    accept: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        assert self.rules

    def shape(self, max_depth: int, tuned: TreeSpec | None = None) -> Shape:
        """A tuned tree that cannot be drawn as asked gives way to a chain."""
        if tuned is not None and self.drafts in ("iid", "distinct"):
            tuned = tuned if self.drafts in tuned.shape(max_depth).drawable else None
        return super().shape(max_depth, tuned)

    @property
    def rules(self) -> Rules:
        warp = Warp(self.temperature, self.top_k, self.top_p)
        return Rules(warp, cast(Any, self.drafts), cast(Any, self.accept), self.epsilon, self.delta)


@dataclass
class Referee:
    """hugging_face(prompt ids) -> new ids by transformers' own generate; rescore(ids) -> fp64 logits [V] of
    the next token, the judge of near ties. draft_model: the companion as a drafter, where there is one. batch_sizes
    beyond 1 are measured on the first batch_prompts prompts."""

    base: BaseView
    decoding: DecodingConfig
    baselines: BaselinesConfig
    eos_ids: frozenset[int]
    hugging_face: Callable[[Sequence[int]], list[int]]
    rescore: Callable[[list[int]], Tensor]
    draft_model: Drafter | None = None
    repeats: int = 3
    batch_sizes: Sequence[int] = (1,)
    batch_prompts: int = 8

    @property
    def how(self) -> dict[str, Any]:
        """What every measurement here has in common."""
        d = self.decoding
        limits = {"max_new_tokens": d.max_new_tokens, "eos_ids": self.eos_ids, "repeats": self.repeats}
        return {**limits, "rules": d.rules, "seed": d.seed}

    def contender(
        self,
        drafter: Drafter,
        depth: int | None = None,
        gate: MakeGate | None = None,
        tuned: TreeSpec | None = None,
    ) -> Contender:
        """The drafter with the decoding's tree, at most `depth` deep. tuned: the tree that was found best for it."""
        reach = drafter.max_depth if depth is None else min(depth, drafter.max_depth)
        return Contender(always(drafter), self.decoding.shape(reach, tuned), gate)

    def evaluate(
        self,
        own: Mapping[str, Contender],
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Label] | None = None,
    ) -> dict[str, Any]:
        """The parts autoregressive, hf_generate, baselines and heads of evaluation.json. labels: what every prompt
        is reported under. Sampled text is compared with plain decoding where its drafts were
        chosen, never with Hugging Face's generate, which draws other numbers."""
        deepest = max((c.shape.depth for c in own.values() if c.shape), default=4)
        shape, rules = self.decoding.shape, self.decoding.rules
        greedy = rules.greedy
        known, draws = (deepest, None) if greedy else (None, rules.drafts)
        company, chosen = beside(self.base, self.baselines, shape, prompts, known, self.draft_model, draws)
        outside = {HF: self.hugging_face} if greedy else {}
        results = measure.measure(self.base, prompts, {**own, **company}, outside, **self.how)
        plain = results[PLAIN]
        by_batch = self._by_batch(own, prompts)
        heads = {}
        for name, contender in own.items():
            assert contender.shape is not None
            heads[name] = {
                **self._described(results[name], plain),
                **self._broken_down(results[name], prompts, labels),
                "tree": {"nodes": contender.shape.nodes, "depth": contender.shape.depth},
                "lossless": self._proof(name, contender, prompts, results, (PLAIN, HF)) if greedy else None,
                "by_batch": {str(size): told[name] for size, told in by_batch.items()},
            }
        told: dict[str, Any] = {
            "autoregressive": {
                "tokens_per_second": plain.tokens_per_second,
                "tokens": sum(map(len, plain.tokens)),
                "distinct_4": measure.distinct(plain.tokens),
            },
            "baselines": {name: {**self._described(results[name], plain), **chosen.get(name, {})} for name in company},
            "heads": heads,
        }
        if greedy:
            for name, contender in company.items():
                told["baselines"][name]["lossless"] = self._proof(name, contender, prompts, results, (PLAIN,))
            proof = self._proof(PLAIN, Contender(lambda prompt, answer: None), prompts, results, (HF,))
            told[HF] = {"tokens_per_second": results[HF].tokens_per_second, "lossless": proof}
        return told

    def _by_batch(
        self, own: Mapping[str, Contender], prompts: Sequence[Sequence[int]]
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """Batch size -> head -> what it gains over plain decoding of the same batches, whose rows differ in length,
        accept differently and end when they end."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        some = prompts[: self.batch_prompts]
        alone = None
        for size in sorted({n for n in self.batch_sizes if n > 1}):
            if alone is None:
                alone = measure.measure(self.base, some, own, {}, **{**self.how, "repeats": 1})
            results = measure.measure(self.base, some, own, {}, batch_size=size, **self.how)
            found[size] = {}
            for name in own:
                pairs = zip(results[name].tokens, alone[name].tokens, strict=True)
                found[size][name] = {
                    **self._gain(results[name], results[PLAIN]),
                    "tokens_per_step": results[name].stats.tokens_per_step,
                    "prompts": len(some),
                    "same_text_as_alone": sum(one == other for one, other in pairs),
                }
        return found

    def _gain(self, own: Result, plain: Result) -> dict[str, Any]:
        terms = measure.terms(own.stats, plain.stats, self.repeats)
        speedup = own.tokens_per_second / plain.tokens_per_second
        return {"speedup": speedup, "predicted_speedup": terms.get("predicted_speedup"), "terms": terms}

    def _described(self, own: Result, plain: Result) -> dict[str, Any]:
        stats = own.stats
        told = {
            "tokens_per_step": stats.tokens_per_step,
            "tokens_per_step_interval": breakdown.interval(own.each),
            "accepted_drafts_per_step": stats.accepted_drafts_per_step,
            "acceptance_by_depth": stats.acceptance_by_depth,
            "steps": stats.steps,
            "tokens_per_second": own.tokens_per_second,
            "speedup": own.tokens_per_second / plain.tokens_per_second,
            "terms": measure.terms(stats, plain.stats, self.repeats),
            "time": breakdown.split(stats),
        }
        if not self.decoding.rules.greedy:
            told["same_text_as_plain"] = sum(a == b for a, b in zip(own.tokens, plain.tokens, strict=True))
            told["lossy"] = self.decoding.rules.lossy
        return told

    def _broken_down(
        self, own: Result, prompts: Sequence[Sequence[int]], labels: Sequence[Label] | None
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"by_context": breakdown.by_context(own.each, [len(p) for p in prompts])}
        if labels is not None:
            questions = [label.question for label in labels]
            found["tokens_per_step_interval"] = breakdown.interval(own.each, questions)
            found["by_source"] = breakdown.grouped(own.each, [label.source for label in labels], questions)
            found["by_turn"] = breakdown.grouped(own.each, [label.turn for label in labels], questions)
        return found

    def _proof(
        self,
        name: str,
        contender: Contender,
        prompts: Sequence[Sequence[int]],
        results: Mapping[str, Result],
        against: Sequence[str],
    ) -> dict[str, Any]:
        """Against every reference; the counts told are those of the worst one."""
        compared = [
            measure.lossless(
                self.base,
                prompts,
                contender,
                results[name].tokens,
                results[reference].tokens,
                self.rescore,
                max_new_tokens=self.decoding.max_new_tokens,
                eos_ids=self.eos_ids,
            )
            for reference in against
        ]
        worst = max(compared, key=lambda c: (c.mismatches, c.near_ties))
        return {**vars(worst), "ok": all(c.ok for c in compared), "against": list(against)}
