"""The referee: heads beside plain decoding, Hugging Face's generate, prompt look-up and an oracle.

One harness for everybody: the same prompts, the same engine, times interleaved in one process. What it
returns is evaluation.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding import measure
from draftsmith.decoding.drafters.oracle import Oracle, OracleConfig
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.measure import Contender, MakeGate, Result
from draftsmith.decoding.tree import TreeConfig, chain
from draftsmith.errors import ConfigError
from draftsmith.roles import Drafter

HF = "hf_generate"
PLAIN = "autoregressive"
COMPANY = ("prompt_lookup", "draft_model", "oracle")


@dataclass(frozen=True)
class DecodingConfig(TreeConfig):
    """temperature 0 is greedy. seed: of the sampling."""

    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: give 0 for greedy decoding, or a positive number")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: give at least 1")


@dataclass(frozen=True)
class BaselinesConfig:
    """The company. oracle_depth: null = as deep as the deepest head. draft_depth: of the companion as a draft model."""

    prompt_lookup: PromptLookupConfig = field(default_factory=PromptLookupConfig)
    oracle_depth: int | None = None
    draft_depth: int = 4

    def __post_init__(self) -> None:
        if self.draft_depth < 1:
            raise ConfigError(f"draft_depth={self.draft_depth}: give at least 1 drafted token")


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
        return {**limits, "temperature": d.temperature, "seed": d.seed}

    def contender(self, drafter: Drafter, depth: int | None = None, gate: MakeGate | None = None) -> Contender:
        """The drafter with the decoding's tree, at most `depth` deep."""
        reach = drafter.max_depth if depth is None else min(depth, drafter.max_depth)
        return Contender(always(drafter), self.decoding.shape(reach), gate)

    def evaluate(self, own: Mapping[str, Contender], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The parts autoregressive, hf_generate, baselines and heads of evaluation.json. Sampled text is compared with
        nobody's: Hugging Face's generate draws other numbers, and so does a draft model."""
        greedy = not self.decoding.temperature
        company = self._company(own)
        outside = {HF: self.hugging_face} if greedy else {}
        results = measure.measure(self.base, prompts, {**own, **company}, outside, **self.how)
        plain = results[PLAIN]
        by_batch = self._by_batch(own, prompts)
        heads = {}
        for name, contender in own.items():
            assert contender.shape is not None
            heads[name] = {
                **self._described(results[name], plain),
                "tree": {"nodes": len(contender.shape.parents_N), "depth": contender.shape.depth},
                "lossless": self._proof(name, contender, prompts, results, (PLAIN, HF)) if greedy else None,
                "by_batch": {str(size): told[name] for size, told in by_batch.items()},
            }
        told = {
            "autoregressive": {
                "tokens_per_second": plain.tokens_per_second,
                "tokens": sum(map(len, plain.tokens)),
                "distinct_4": measure.distinct(plain.tokens),
            },
            "baselines": {name: self._described(results[name], plain) for name in company},
            "heads": heads,
        }
        if greedy:
            proof = self._proof(PLAIN, Contender(lambda prompt, answer: None), prompts, results, (HF,))
            told[HF] = {"tokens_per_second": results[HF].tokens_per_second, "lossless": proof}
        return told

    def _company(self, own: Mapping[str, Contender]) -> dict[str, Contender]:
        """Prompt look-up, the companion as a draft model, and who was told the text (of a greedy one)."""
        deepest = max((c.shape.depth for c in own.values() if c.shape), default=4)
        oracle = OracleConfig(self.baselines.oracle_depth or deepest)
        company = {"prompt_lookup": Contender(always(PromptLookup(self.baselines.prompt_lookup)))}
        if self.draft_model is not None:
            company["draft_model"] = Contender(always(self.draft_model), chain(self.baselines.draft_depth))
        if not self.decoding.temperature:
            company["oracle"] = Contender(lambda prompt, answer: Oracle(oracle, [*prompt, *answer]))
        return company

    def _by_batch(
        self, own: Mapping[str, Contender], prompts: Sequence[Sequence[int]]
    ) -> dict[int, dict[str, dict[str, Any]]]:
        """Batch size -> head -> what it gains over plain decoding of as many rows. The rows of a batch are equal,
        which excludes raggedness: this is the upper bound of a batch."""
        found = {}
        for size in sorted({n for n in self.batch_sizes if n > 1}):
            results = measure.measure(
                self.base,
                prompts[: self.batch_prompts],
                own,
                {},
                copies=size,
                **self.how,
            )
            found[size] = {name: self._gain(results[name], results[PLAIN]) for name in own}
        return found

    def _gain(self, own: Result, plain: Result) -> dict[str, Any]:
        terms = measure.terms(own.stats, plain.stats, self.repeats)
        speedup = own.tokens_per_second / plain.tokens_per_second
        return {"speedup": speedup, "predicted_speedup": terms.get("predicted_speedup"), "terms": terms}

    def _described(self, own: Result, plain: Result) -> dict[str, Any]:
        return {
            "tokens_per_step": own.stats.tokens_per_step,
            "accepted_drafts_per_step": own.stats.accepted_drafts_per_step,
            "acceptance_by_depth": own.stats.acceptance_by_depth,
            "steps": own.stats.steps,
            "tokens_per_second": own.tokens_per_second,
            "speedup": own.tokens_per_second / plain.tokens_per_second,
            "terms": measure.terms(own.stats, plain.stats, self.repeats),
        }

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


def always(drafter: Drafter) -> measure.Make:
    return lambda prompt, answer: drafter
