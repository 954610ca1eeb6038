"""What any tree would keep at every position of a text, found without decoding with any of them.

What a head drafts after a text depends on the text alone, not on how it was decoded. So the head is asked at every
position of the base's own text, and what is written down is how it ranks the tokens that truly follow: that decides
for every tree of ranks what is kept there, and for EAGLE-2's tree of every size. Decoding with one of them is then
replayed by adding up. (Rounding apart: forwards of other shapes may rank two near-equal tokens the other way round.)

Not so for a drafter that ends its drafts by a rule of its own (Kangaroo): what it drafts depends on the tree as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding.engine import generate
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.tree import TreeSpec, chain
from draftsmith.growth import Draws, Growing, Level, Picked, Warp, best
from draftsmith.roles import Drafter, Partial, Proposal, State


@dataclass(frozen=True)
class Position:
    """ranks: of the true tokens of depth 1, 2, … (0 = the drafter's best), up to the first that is not among its best.

    budgets[d - 1][k - 1]: how many nodes EAGLE-2's tree of at most d depths must have to hold the true token of depth
    k, root included.
    """

    ranks: tuple[int, ...]
    budgets: tuple[tuple[int, ...], ...] = ()


@dataclass
class Counts:
    """Decoding of some texts with one tree. by_depth[k - 1]: steps that kept a draft of depth k; tokens: emitted."""

    steps: int = 0
    tokens: int = 0
    by_depth: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.by_depth)

    @property
    def tokens_per_step(self) -> float:
        return 1.0 + self.accepted / max(self.steps, 1)


class TrueRanks:
    """A tree that goes on below the true token alone: shape, tree in the making and gate in one. It has the `width`
    best tokens per depth; as the gate it sees which of them is the true one, and ends it where none is."""

    def __init__(self, truth: Sequence[int], width: int) -> None:
        self.truth, self.width = list(truth), width
        self.depth = len(self.truth)
        self.nodes = self.drafted = 1 + width * self.depth
        self.drawable = frozenset[str]()
        self._parents, self._level, self._at = [-1], 0, 0

    def cut(self, depth: int) -> TrueRanks:
        return TrueRanks(self.truth[:depth], self.width)

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        return self

    def next(self, logits_AV: Tensor) -> Picked | None:
        if self._level == self.depth:
            return None
        self.width = min(self.width, logits_AV.shape[1])
        self._level += 1
        start, device = len(self._parents), logits_AV.device
        parent = start - self.width + self._at if start > 1 else 0
        self._parents += [parent] * self.width
        above_C = torch.full((self.width,), self._at, device=device)
        expanded_A = torch.arange(self.width if self._level < self.depth else 0, device=device)
        level = Level(slice(start, start + self.width), above_C, above_C, expanded_A)
        return Picked(level, best(logits_AV[self._at : self._at + 1], self.width)[0])

    def stop(self, state: State, partial: Partial) -> bool:
        tokens = partial.tokens[-1].tolist()
        true = self.truth[self._level - 1]
        if true not in tokens:
            return True
        self._at = tokens.index(true)
        return False

    def parents(self, count: int) -> Tensor:
        return torch.tensor(self._parents[:count])

    def kept(self, count: int) -> Tensor | None:
        return None

    def read(self, proposal: Proposal) -> tuple[int, ...]:
        """Position.ranks."""
        tokens, ranks = proposal.tokens_N.tolist()[1:], []
        for k, true in enumerate(self.truth):
            level = tokens[k * self.width : (k + 1) * self.width]
            if true not in level:
                break
            ranks.append(level.index(true))
        return tuple(ranks)


class TrueBudgets:
    """EAGLE-2's tree of `nodes` nodes with everything that was drafted on the way, so that every smaller one is part of
    it: they take the likeliest. Shape, tree in the making and gate in one; the gate never ends it."""

    def __init__(self, truth: Sequence[int], nodes: int) -> None:
        self.truth = list(truth)
        self.shape = ByProbability(nodes, len(self.truth))
        self.depth = len(self.truth)
        self.nodes = self.drafted = self.shape.drafted
        self.drawable = frozenset[str]()

    def cut(self, depth: int) -> TrueBudgets:
        return TrueBudgets(self.truth[:depth], self.shape.nodes)

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        self.growing = cast(Any, self.shape.grow(draws, warp, generator))
        return self

    def next(self, logits_AV: Tensor) -> Picked | None:
        return self.growing.next(logits_AV)

    def stop(self, state: State, partial: Partial) -> bool:
        return False

    def parents(self, count: int) -> Tensor:
        return self.growing.parents(count)

    def kept(self, count: int) -> Tensor | None:
        return None

    def read(self, proposal: Proposal) -> tuple[tuple[int, ...], ...]:
        """Position.budgets."""
        tokens, parents, path, node = proposal.tokens_N.tolist(), proposal.parents_N.tolist(), [], 0
        for true in self.truth:
            below = [n for n in range(node + 1, len(tokens)) if parents[n] == node and tokens[n] == true]
            if not below:
                break
            node = below[0]
            path.append(node)
        levels = [len(logs_C) for logs_C in self.growing.logs]
        logs_N = torch.cat([torch.zeros(1), *(logs_C.cpu() for logs_C in self.growing.logs)])
        found = []
        for d in range(1, len(levels) + 1):
            upto_N = logs_N[: 1 + sum(levels[:d])]
            before = [int((upto_N > logs_N[n]).sum() + (upto_N[:n] == logs_N[n]).sum()) for n in path[:d]]
            found.append(tuple(1 + n for n in before))
        return tuple(found)


class Probe(Protocol):
    """Asked for at every position: what stands in the state as shape and gate, and reads the proposal afterwards."""

    def __call__(self, truth: Sequence[int]) -> Any: ...


class Probing:
    """Drafts nothing, so that the text goes on token by token; but asks a drafter at every step, and forgets it.

    text: prompt and what truly follows. found: what the probe read, step by step.
    """

    max_depth = 0

    def __init__(self, drafter: Drafter, text: Sequence[int], depth: int, probe: Probe) -> None:
        self.drafter, self.text, self.depth, self.probe = drafter, list(text), depth, probe
        self.needs, self.gated, self.runs_base = drafter.needs, drafter.gated, drafter.runs_base
        self.found: list[Any] = []

    def propose(self, base: BaseView, state: State) -> Proposal:
        at = len(state.tokens)
        depth = min(self.depth, base.spec.max_positions - at)
        asked = self.probe(self.text[at : at + depth])
        given, kept = (state.shape, state.gate), None if state.kv is None else state.kv.length
        state.shape = state.gate = asked
        self.found.append(asked.read(self.drafter.propose(base, state)))
        state.shape, state.gate = given
        if state.kv is not None and kept is not None:
            state.kv.crop(kept)  # what a drafter that runs blocks of the base left there
        return Proposal(torch.tensor([state.root]), cast(Any, state.shape).parents_N)


def probed(
    base: BaseView, drafter: Drafter, prompt: Sequence[int], depth: int, how: Mapping[str, Any], width: int, nodes: int
) -> list[Position]:
    """The positions of one text after which a token is emitted by a step, in order. how: as `generate` takes it.

    width: how many of the drafter's best tokens count per depth; nodes: of the largest of EAGLE-2's trees, 0 for none.
    """
    further = {**how, "max_new_tokens": how["max_new_tokens"] + depth, "eos_ids": frozenset()}
    text = [*prompt, *generate(base, prompt, **further).tokens]  # past the end: statistics count before the cut

    def asked(probe: Probe) -> list[Any]:
        probing = Probing(drafter, text, depth, probe)
        generate(base, prompt, drafter=cast(Drafter, probing), shape=chain(0), **how)
        return probing.found

    ranks = asked(lambda truth: TrueRanks(truth, width))
    budgets = asked(lambda truth: TrueBudgets(truth, nodes)) if nodes else [()] * len(ranks)
    return [Position(*both) for both in zip(ranks, budgets, strict=True)]


def kept_by(spec: TreeSpec, depth: int) -> Callable[[Position], int]:
    """How many drafts of a tree at most `depth` deep are kept at a position."""
    deepest = depth if spec.depth is None else min(spec.depth, depth)
    if spec.kind == "eagle2":

        def within(position: Position) -> int:
            levels = position.budgets[: max(deepest, 0)]
            return sum(nodes <= spec.nodes for nodes in levels[-1]) if levels else 0

        return within
    assert spec.kind in ("chain", "static"), f"kind={spec.kind} cannot be replayed"
    nodes = {tuple(path) for path in spec.paths or ((0,) * k for k in range(1, deepest + 1))}

    def along(position: Position) -> int:
        kept = 0
        while kept < min(deepest, len(position.ranks)) and position.ranks[: kept + 1] in nodes:
            kept += 1
        return kept

    return along


def replayed(texts: Sequence[Sequence[Position]], kept: Callable[[Position], int], depth: int) -> Counts:
    """Decoding of these texts with a tree at most `depth` deep."""
    found = Counts(by_depth=[0] * depth)
    for text in texts:
        at = 0
        while at < len(text):
            accepted = kept(text[at])
            for k in range(accepted):
                found.by_depth[k] += 1
            found.steps += 1
            at += accepted + 1
        found.tokens += len(text) + 1
    return found
