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
from draftsmith.decoding.measure import Contender, Result
from draftsmith.decoding.tree import TreeConfig
from draftsmith.errors import ConfigError
from draftsmith.roles import Drafter

HF = "hf_generate"
PLAIN = "autoregressive"
COMPANY = ("prompt_lookup", "oracle")


@dataclass(frozen=True)
class DecodingConfig(TreeConfig):
    temperature: float = 0.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 0:
            raise ConfigError(f"temperature={self.temperature}: only greedy decoding (0) is built so far")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: give at least 1")


@dataclass(frozen=True)
class BaselinesConfig:
    """The training-free company. oracle_depth: null = as deep as the deepest head."""

    prompt_lookup: PromptLookupConfig = field(default_factory=PromptLookupConfig)
    oracle_depth: int | None = None


@dataclass
class Referee:
    """hugging_face(prompt ids) -> new ids by transformers' own generate; rescore(ids) -> fp64 logits [V] of
    the next token, the judge of near ties. batch_sizes beyond 1 are measured on the first batch_prompts prompts."""

    base: BaseView
    decoding: DecodingConfig
    baselines: BaselinesConfig
    eos_ids: frozenset[int]
    hugging_face: Callable[[Sequence[int]], list[int]]
    rescore: Callable[[list[int]], Tensor]
    repeats: int = 3
    batch_sizes: Sequence[int] = (1,)
    batch_prompts: int = 8

    def evaluate(self, drafters: Mapping[str, Drafter], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The parts autoregressive, hf_generate, baselines and heads of evaluation.json."""
        own = {n: Contender(_always(d), self.decoding.shape(d.max_depth)) for n, d in drafters.items()}
        company = self._company(own)
        results = measure.measure(
            self.base,
            prompts,
            {**own, **company},
            {HF: self.hugging_face},
            max_new_tokens=self.decoding.max_new_tokens,
            eos_ids=self.eos_ids,
            repeats=self.repeats,
        )
        plain, hf = results[PLAIN], results[HF]
        by_batch = self._by_batch(own, prompts)
        heads = {}
        for name, contender in own.items():
            assert contender.shape is not None
            heads[name] = {
                **self._described(results[name], plain),
                "tree": {"nodes": len(contender.shape.parents_N), "depth": contender.shape.depth},
                "lossless": self._proof(name, contender, prompts, results, (PLAIN, HF)),
                "by_batch": {str(size): told[name] for size, told in by_batch.items()},
            }
        return {
            "autoregressive": {
                "tokens_per_second": plain.tokens_per_second,
                "tokens": sum(map(len, plain.tokens)),
                "distinct_4": measure.distinct(plain.tokens),
            },
            HF: {
                "tokens_per_second": hf.tokens_per_second,
                "lossless": self._proof(PLAIN, Contender(_always(None)), prompts, results, (HF,)),
            },
            "baselines": {name: self._described(results[name], plain) for name in company},
            "heads": heads,
        }

    def _company(self, own: Mapping[str, Contender]) -> dict[str, Contender]:
        deepest = max((c.shape.depth for c in own.values() if c.shape), default=4)
        oracle = OracleConfig(self.baselines.oracle_depth or deepest)
        return {
            "prompt_lookup": Contender(_always(PromptLookup(self.baselines.prompt_lookup))),
            "oracle": Contender(lambda prompt, answer: Oracle(oracle, [*prompt, *answer])),
        }

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
                max_new_tokens=self.decoding.max_new_tokens,
                eos_ids=self.eos_ids,
                repeats=self.repeats,
                copies=size,
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


def _always(drafter: Drafter | None) -> measure.Make:
    return lambda prompt, answer: drafter
