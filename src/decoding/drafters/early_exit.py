"""The base's first blocks draft, as many as pay at the moment; the others verify. No training.

After Entezari Zarch et al. 2025, "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding"
(arXiv 2504.05598). A draft is what final norm and lm_head say of the residual stream after block l. What those blocks
made of root and drafts goes on into the other blocks (Proposal.entered), so no block runs twice for a token.

Before every step l and the draft length k are chosen anew. At every position that the text kept, the exit after each
candidate layer said the base's own best token or did not; the rate alpha_l is the mean of these hits, one `decay`
times less for every later position, beginning with the prompt's. A step with k drafts runs l blocks k + 1 times (for
the root and each draft) and L - l blocks once: k l / L + 1 base forwards. It emits 1 + alpha + ... + alpha^k tokens,
were drafts right independently of each other. Of all (l, k) that with most tokens per forward is taken; of equal ones
the shorter, then the lower. k = 0, a plain step, is one of them.

Deviations. Exits cost nothing in that account, as in the paper, though the lm_head of a small base is no small part
of it. The paper also stops drafting when unsure; that is a gate's office here. In a tree the rates are still those of
the best token, as if it were a chain, and k cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from draftsmith.contracts import KV, BaseSpec, BaseView, Needs
from draftsmith.drafting import Ancestors, fill, with_entered
from draftsmith.errors import ConfigError
from draftsmith.growth import Level, Shape
from draftsmith.roles import Proposal, State

FORGOTTEN = 0.01  # positions of less weight than this are not looked at: a long prompt's exits would cost more than it
ROWS = 256  # of the lm_head at once


@dataclass(frozen=True)
class EarlyExitConfig:
    layers: list[int] | None = (
        None  # exits to choose from, by how many blocks have run; null: after every block but the last
    )
    depth: int = 6  # the most tokens drafted in a step
    min_depth: int = 0  # the fewest; 0: none where no exit pays
    decay: float = 0.95

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or min(self.layers) < 1):
            raise ConfigError(f"early_exit.layers: {self.layers}; give numbers of blocks from 1 on, or null")
        if self.depth < 1:
            raise ConfigError(f"early_exit.depth: {self.depth}; give at least 1 drafted token")
        if not 0 <= self.min_depth <= self.depth:
            raise ConfigError(f"early_exit.min_depth: {self.min_depth}; give 0 to depth={self.depth}")
        if not 0 < self.decay < 1:
            raise ConfigError(f"early_exit.decay: {self.decay}; give a number between 0 and 1")


@dataclass
class _Drafted:
    """The last proposal and the residual streams it left at the exits up to the one it was drafted from."""

    tokens: list[int]
    parents: list[int]
    hidden: dict[int, Tensor]


class EarlyExit:
    """The rates belong to this object: made anew for a prompt it starts from that prompt, else from the texts before it
    too."""

    Config = EarlyExitConfig
    lossy = False
    gated = True
    runs_base = True

    def __init__(self, config: EarlyExitConfig, spec: BaseSpec) -> None:
        if spec.num_layers < 2:
            raise ConfigError("early_exit: the base has one block, and none before the last; take another drafter")
        layers = sorted(set(range(1, spec.num_layers) if config.layers is None else config.layers))
        if layers[-1] >= spec.num_layers:
            raise ConfigError(
                f"early_exit.layers: {config.layers}; the base has {spec.num_layers} blocks, give numbers below that"
            )
        self.config, self.layers, self.num_layers = config, layers, spec.num_layers
        self.needs = Needs(frozenset(layers), final=True)
        self.max_depth = config.depth
        self._hits = dict.fromkeys(layers, 0.0)
        self._seen = dict.fromkeys(layers, 0.0)
        self._drafted: _Drafted | None = None
        self._cuts: tuple[Shape, dict[int, Shape]] | None = None

    @property
    def rates(self) -> dict[int, float]:
        """alpha of every exit; 0 where nothing is known."""
        return {layer: self._hits[layer] / self._seen[layer] if self._seen[layer] else 0.0 for layer in self.layers}

    def choose(self, limit: int) -> tuple[int, int]:
        """(exit, drafts) with the most expected tokens per base forward, of at most `limit` drafts."""
        lengths = range(min(self.config.min_depth, limit), limit + 1)
        return best_exit(self.rates, lengths, self.num_layers)

    def propose(self, base: BaseView, state: State) -> Proposal:
        """Root and drafts at the text's end in the first blocks of state.kv, where their slots stay."""
        self._observe(base, state)
        self._drafted = None
        layer, depth = self.choose(min(self.config.depth, state.shape.depth))
        if not depth:
            root = torch.tensor([state.root], device=base.lm_head_weight.device)
            return Proposal(root, torch.tensor([-1]))
        return self._draft(base, replace(state, shape=self._cut(state.shape, depth)), layer)

    def _draft(self, base: BaseView, state: State, layer: int) -> Proposal:
        kv, device = cast(KV, state.kv), base.lm_head_weight.device
        start, depth, tree = kv.length, 0, Ancestors(device)
        wanted, streams = [x for x in self.layers if x <= layer], []

        def enter(tokens_C: Tensor, mask: Tensor | None) -> Tensor:
            positions = torch.full((1, len(tokens_C)), start + depth, device=device)
            needs = Needs(frozenset(wanted))
            streams.append(base.capture(needs, tokens_C[None], positions_BQ=positions, mask_BQS=mask, kv=kv).hidden)
            return streams[-1][layer]

        def leave(hidden_1AD: Tensor) -> tuple[Tensor, Tensor]:
            final_1AD = base.final_norm(hidden_1AD)
            return base.lm_head(final_1AD)[0], final_1AD[0]

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal depth
            depth += 1
            hidden_1CD = enter(tokens_C, tree.below(level.above_C, start + 1))
            return leave(hidden_1CD[:, level.expanded_A]) if len(level.expanded_A) else None

        logits_1V, final_1D = leave(enter(torch.tensor([state.root], device=device), None))
        proposal = fill(state, logits_1V[0], final_1D[0], deeper)
        hidden = {x: torch.cat([stream[x] for stream in streams], 1) for x in wanted}
        proposal = with_entered(proposal, layer, hidden[layer], kv, start)
        if proposal.kept_N is not None:
            hidden = {x: stream_1ND.index_select(1, proposal.kept_N) for x, stream_1ND in hidden.items()}
        self._drafted = _Drafted(proposal.tokens_N.tolist(), proposal.parents_N.tolist(), hidden)
        return proposal

    def _observe(self, base: BaseView, state: State) -> None:
        """Whether each exit would have said the base's best token: at the positions accepted since the last step, or
        at the prompt's last ones."""
        final_1AD = cast(Tensor, state.seen.final)
        streams = self._streams(state, final_1AD.shape[1])
        count = min(final_1AD.shape[1], math.ceil(math.log(FORGOTTEN) / math.log(self.config.decay)))
        exits = [base.final_norm(stream_1AD[:, -count:]) for stream_1AD in streams.values()]
        rows_ED = torch.cat([*exits, final_1AD[:, -count:]], 1)[0]
        best_E = torch.cat([base.lm_head(part_ED[None])[0].argmax(-1) for part_ED in rows_ED.split(ROWS)])
        best_XA = best_E.view(-1, count)
        hits_XA = (best_XA[:-1] == best_XA[-1]).tolist()
        for layer, hits in zip(streams, hits_XA, strict=True):
            for hit in hits:
                self._hits[layer] = self.config.decay * self._hits[layer] + hit
                self._seen[layer] = self.config.decay * self._seen[layer] + 1

    def _streams(self, state: State, accepted: int) -> dict[int, Tensor]:
        """The residual stream of every exit at the accepted positions. Verification began at the exit that was drafted
        from, so below it the drafter's own stand in."""
        found = {layer: state.seen.hidden[layer] for layer in self.layers if layer in state.seen.hidden}
        if self._drafted is not None and len(found) < len(self.layers):
            path = path_of(self._drafted.tokens, self._drafted.parents, state.tokens[-1 - accepted : -1])
            if path is not None:
                for layer, stream_1ND in self._drafted.hidden.items():
                    found.setdefault(layer, stream_1ND[:, path])
        return found

    def _cut(self, shape: Shape, depth: int) -> Shape:
        """The shape's own cut, made once: a static tree works out its levels when first used."""
        if depth == shape.depth:
            return shape
        if self._cuts is None or self._cuts[0] is not shape:
            self._cuts = (shape, {})
        made = self._cuts[1]
        if depth not in made:
            made[depth] = shape.cut(depth)
        return made[depth]


def best_exit(rates: Mapping[int, float], lengths: range, num_layers: int) -> tuple[int, int]:
    """(layer, drafts): the most of (1 + a + ... + a^k) / (k l / L + 1), a the layer's rate."""

    def worth(layer: int, drafts: int) -> float:
        return sum(rates[layer] ** i for i in range(drafts + 1)) / (drafts * layer / num_layers + 1)

    pairs = [(layer, drafts) for drafts in lengths for layer in sorted(rates)]
    return max(pairs, key=lambda pair: worth(*pair))


def path_of(tokens: list[int], parents: list[int], text: list[int]) -> list[int] | None:
    """The nodes from the root down that say `text`, if there are such; of equal siblings any one that goes on."""
    found = [0] if text and tokens[0] == text[0] else []
    for token in text[1:]:
        found = [node for node, parent in enumerate(parents) if parent in found and tokens[node] == token]
    if not found:
        return None
    path = found[:1]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
