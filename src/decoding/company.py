"""Who stands beside a trained head when it is judged: drafters without training, a draft model, one who was told.

They answer whether a trained head is worth it on these prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from draftsmith.contracts import BaseView
from draftsmith.decoding.drafters.early_exit import EarlyExit, EarlyExitConfig
from draftsmith.decoding.drafters.layer_skip import LayerSkip, LayerSkipConfig, select
from draftsmith.decoding.drafters.ngram import NGram, NGramConfig
from draftsmith.decoding.drafters.oracle import Oracle, OracleConfig
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.drafters.token_recycling import TokenRecycling, TokenRecyclingConfig
from draftsmith.decoding.measure import Contender, Make
from draftsmith.decoding.tree import TreeSpec, chain
from draftsmith.errors import ConfigError
from draftsmith.growth import Shape, TreeShape
from draftsmith.roles import Drafter

COMPANY = ("prompt_lookup", "token_recycling", "ngram", "layer_skip", "early_exit", "draft_model", "oracle")


@dataclass(frozen=True)
class BaselinesConfig:
    """The company; null leaves one out. nodes: of the trees of token_recycling and ngram, where the decoding names
    none. oracle_depth: null = as deep as the deepest head. draft_depth: of the companion as a draft model."""

    prompt_lookup: PromptLookupConfig | None = field(default_factory=PromptLookupConfig)
    token_recycling: TokenRecyclingConfig | None = None
    ngram: NGramConfig | None = None
    layer_skip: LayerSkipConfig | None = None
    early_exit: EarlyExitConfig | None = None
    nodes: int = 8
    oracle_depth: int | None = None
    draft_depth: int = 4

    def __post_init__(self) -> None:
        if self.draft_depth < 1:
            raise ConfigError(f"draft_depth={self.draft_depth}: give at least 1 drafted token")
        if self.nodes < 2:
            raise ConfigError(f"nodes={self.nodes}: give at least 2, the root and one drafted token")


class Shaper(Protocol):
    def __call__(self, max_depth: int, tuned: TreeSpec | None = None) -> Shape: ...


def beside(
    base: BaseView,
    told: BaselinesConfig,
    shape: Shaper,
    prompts: Sequence[Sequence[int]],
    deepest: int | None,
    draft_model: Drafter | None,
    draws: str | None = None,
) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
    """The company by name, and what was chosen for them on these prompts. shape: the decoding's tree for a depth.
    deepest: an oracle's, where nothing else is said; None: no oracle, since the text is not known beforehand. draws:
    how the drafts of this text are drawn; None: they are chosen, or drawn in the drafter's own way.

    What learns from a text begins anew with every prompt.
    """
    company: dict[str, Contender] = {}
    chosen: dict[str, dict[str, Any]] = {}
    kind = {"iid": "chain", "distinct": "dyspec"}.get(draws or "", "eagle2")  # whose tokens can be taken so
    small = TreeSpec(kind, nodes=told.nodes)
    if told.prompt_lookup is not None:
        company["prompt_lookup"] = Contender(always(PromptLookup(told.prompt_lookup)))
    if (recycling := told.token_recycling) is not None:
        form = _within(shape, recycling.depth, recycling.candidates, small)
        company["token_recycling"] = Contender(lambda p, a: TokenRecycling(recycling), form)
    if (ngram := told.ngram) is not None:
        form = _within(shape, ngram.depth, ngram.candidates, small)
        company["ngram"] = Contender(lambda p, a: NGram(ngram), form)
    if told.layer_skip is not None and base.spec.num_layers > 1:
        began = time.perf_counter()
        skip = select(base, prompts, told.layer_skip)
        chosen["layer_skip"] = {"skipped_blocks": list(skip), "selection_seconds": time.perf_counter() - began}
        company["layer_skip"] = Contender(always(LayerSkip(told.layer_skip, skip)))
    if (exits := told.early_exit) is not None and base.spec.num_layers > 1:
        company["early_exit"] = Contender(lambda p, a: EarlyExit(exits, base.spec))
    if draft_model is not None:
        company["draft_model"] = Contender(always(draft_model), chain(told.draft_depth))
    if deepest is not None:
        oracle = OracleConfig(told.oracle_depth or max(deepest, 1))
        company["oracle"] = Contender(lambda prompt, answer: Oracle(oracle, [*prompt, *answer]))
    return company, chosen


def _within(shape: Shaper, depth: int, candidates: int, small: TreeSpec) -> Shape:
    """The decoding's tree as far as a drafter goes; `small` where it asks for more candidates than the drafter has."""
    form = shape(depth, small).cut(depth)
    return small.shape(depth) if isinstance(form, TreeShape) and form.width > candidates else form


def always(drafter: Drafter) -> Make:
    return lambda prompt, answer: drafter
