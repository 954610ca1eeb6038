"""The base without some of its blocks drafts for the whole base. No training; which blocks is a search.

After Xia et al. 2024, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration" (arXiv
2410.06916). The root and the drafts run through the kept blocks only, on the base's own K/V: they attend to what the
*whole* base left of the text, so the drafter needs no prompt of its own. The slots it writes are forgotten before
verification.

`select` looks for the blocks to skip: random sets, the best by matchness, the share of positions of given texts at
which the skipping base's best next token is the whole base's.

Deviations. The paper skips attention and MLP apart, ours whole blocks. The paper searches while it decodes and mixes
Bayesian optimisation into the random search; ours searches once, beforehand, at random. The paper's matchness reads a
window of tokens that see the skipping base's states of that window; in ours every position attends to the whole
base's K/V before it, as the first draft of a step does. The paper stops drafting when unsure; that is a gate's office
here. A base of two blocks has no inner one: its last block is skipped, which is an early exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, cast

import torch
from torch import Tensor

from draftsmith.contracts import KV, BaseView, Needs
from draftsmith.drafting import Ancestors, fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.roles import Proposal, State

ROWS = 256  # of the lm_head at once


@dataclass(frozen=True)
class LayerSkipConfig:
    skip: list[int] | None = None  # blocks, counted from 0; null: `select` searches
    ratio: float = 0.45  # the share of the inner blocks to skip, in the search
    trials: int = 24  # sets to try
    depth: int = 4
    seed: int = 0  # of the search

    def __post_init__(self) -> None:
        if self.skip is not None and (not self.skip or min(self.skip) < 0 or len(set(self.skip)) < len(self.skip)):
            raise ConfigError(f"layer_skip.skip: {self.skip}; give different blocks, counted from 0, or null")
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"layer_skip.ratio: {self.ratio}; give a share above 0, at most 1")
        if self.trials < 1:
            raise ConfigError(f"layer_skip.trials: {self.trials}; try at least 1 set of blocks")
        if self.depth < 1:
            raise ConfigError(f"layer_skip.depth: {self.depth}; give at least 1 drafted token")


class LayerSkip:
    """skip: the blocks to leave out, as `select` returns them. Nothing is remembered from step to step."""

    Config = LayerSkipConfig
    lossy = False
    gated = True
    runs_base = True

    def __init__(self, config: LayerSkipConfig, skip: tuple[int, ...]) -> None:
        self.config, self.skip = config, skip
        self.needs = Needs()
        self.max_depth = config.depth

    def propose(self, base: BaseView, state: State) -> Proposal:
        """Root and drafts at the text's end in the kept blocks of state.kv, whose slots are forgotten at the end."""
        kv, device = cast(KV, state.kv), base.lm_head_weight.device
        kept, start = pieces(self.skip, base.spec.num_layers), kv.length
        tree, depth = Ancestors(device), 0

        def read(tokens_A: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            positions = torch.full((1, len(tokens_A)), start + depth, device=device)
            final_AD = run(base, kept, tokens_A[None], positions, mask, kv)[0]
            return base.lm_head(final_AD[None])[0], final_AD

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal depth
            at_A = level.expanded_A
            if not len(at_A):
                return None
            depth += 1
            return read(tokens_C[at_A], tree.below(level.of_C[at_A], start + 1))

        logits_1V, final_1D = read(torch.tensor([state.root], device=device), None)
        proposal = fill(state, logits_1V[0], final_1D[0], deeper)
        kv.crop(start)
        return proposal


def pieces(skip: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """The kept blocks as runs [start, stop) of neighbours, in order."""
    if not set(skip) <= set(range(num_layers)):
        raise ConfigError(f"layer_skip.skip: {list(skip)}; the base has the blocks 0..{num_layers - 1}")
    kept = [layer for layer in range(num_layers) if layer not in set(skip)]
    if not kept:
        raise ConfigError(f"layer_skip.skip: {list(skip)} are all blocks of the base; keep one")
    starts = [layer for layer in kept if layer - 1 not in kept]
    stops = [layer + 1 for layer in kept if layer + 1 not in kept]
    return list(zip(starts, stops, strict=True))


def run(
    base: BaseView,
    kept: Sequence[tuple[int, int]],
    tokens_BQ: Tensor,
    positions_BQ: Tensor,
    mask_BQS: Tensor | None,
    kv: KV,
) -> Tensor:
    """What the lm_head reads [B, Q, D] after the kept blocks alone. Their K/V grows by Q slots, that of others not."""
    hidden_BQD = base.capture(Needs(frozenset({0})), tokens_BQ, positions_BQ=positions_BQ).hidden[0]
    for start, stop in kept:
        hidden_BQD = base.run_layers(hidden_BQD, start, stop, positions_BQ=positions_BQ, mask_BQS=mask_BQS, kv=kv)
    return base.final_norm(hidden_BQD)


@torch.no_grad()
def select(
    base: BaseView, texts: Sequence[Sequence[int]], config: LayerSkipConfig, generator: torch.Generator | None = None
) -> tuple[int, ...]:
    """The blocks to skip, ascending: config.skip, or of up to config.trials sets that of the highest matchness on the
    token ids `texts`; of equal ones that which skips more, then the one tried first. generator: the host's; by default
    a new one with config.seed. Every trial reads each text once, in one forward of the kept blocks."""
    if config.skip is not None:
        pieces(config.skip, base.spec.num_layers)
        return tuple(sorted(config.skip))
    texts = [text for text in texts if len(text)]
    if not texts:
        raise ConfigError("layer_skip.skip: null searches on texts, and there are none; give prompts, or the blocks")
    generator = torch.Generator().manual_seed(config.seed) if generator is None else generator
    sets = trial_sets(base.spec.num_layers, config, generator)
    if len(sets) == 1:
        return sets[0]
    right, positions = [0] * len(sets), sum(map(len, texts))
    for text in texts:
        for i, hits in enumerate(matches(base, text, sets)):
            right[i] += hits
    best = max(range(len(sets)), key=lambda i: (right[i] / positions, len(sets[i]), -i))
    return sets[best]


def trial_sets(num_layers: int, config: LayerSkipConfig, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Different sets of blocks: `ratio` of the inner ones, at least one, or one more than that; all of them where there
    are no more than config.trials."""
    if num_layers < 2:
        raise ConfigError("layer_skip: the base has one block, and none to skip; take another drafter")
    inner = list(range(1, num_layers - 1)) or [1]
    few = max(1, round(config.ratio * len(inner)))
    sizes = [size for size in (few, few + 1) if size <= len(inner)]
    if sum(comb(len(inner), size) for size in sizes) <= config.trials:
        return [chosen for size in sizes for chosen in combinations(inner, size)]
    found: dict[tuple[int, ...], None] = {}
    while len(found) < config.trials:
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        order = torch.randperm(len(inner), generator=generator)[:size].sort().values
        found[tuple(inner[i] for i in order.tolist())] = None
    return list(found)


def matches(base: BaseView, text: Sequence[int], sets: Sequence[Sequence[int]]) -> list[int]:
    """For each set of skipped blocks, at how many positions of the text the best next token is the whole base's."""
    kv, length = base.new_kv(), len(text)
    tokens_BT = torch.tensor([list(text)], device=base.lm_head_weight.device)
    best_T = _best(base, cast(Tensor, base.capture(Needs(final=True), tokens_BT, kv=kv).final))
    own_TT = torch.eye(length, dtype=torch.bool, device=tokens_BT.device)
    where: dict[str, Any] = {
        "positions_BQ": torch.arange(length, device=tokens_BT.device)[None],
        # a position sees the whole base's slots before it, and its own of this forward
        "mask_BQS": torch.cat([torch.ones_like(own_TT).tril(-1), own_TT], 1)[None],
    }
    hits = []
    for skip in sets:
        final_BTD = run(base, pieces(skip, base.spec.num_layers), tokens_BT, kv=kv, **where)
        kv.crop(length)
        hits.append(int((_best(base, final_BTD) == best_T).sum()))
    return hits


def _best(base: BaseView, final_BTD: Tensor) -> Tensor:
    """The best next tokens of one text [T], some rows of logits at a time."""
    return torch.cat([base.lm_head(part_BTD)[0].argmax(-1) for part_BTD in final_BTD.split(ROWS, dim=1)])
