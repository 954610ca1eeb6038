"""One sequence, with or without a drafter: the same loop, so its two speeds can be compared.

Prefill reads the prompt and gives the first token, the first root; a primer may write the K/V of all but the prompt's
last token in the base's place. Each step then drafts below the root, lets
the base read root and drafts in one forward under a tree mask, keeps what the base would have said itself,
and emits that and the base's own next token, the next root. The K/V always holds every emitted token but the
root, so a node stands at position kv.length + its depth, whatever slot it was written to.

During a step the K/V holds all N nodes, so it must have room for N - 1 slots beyond the last position.

With a temperature every position has a uniform number of its own, made from the seed before the first step, and the
base's token there is the one at which its cumulative distribution passes it. So what is emitted is a function of
(seed, prompt) alone, the same with every drafter that chooses its tokens and every gate; a drafter that draws them is
verified by speculative sampling, whose text is another one of the same distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.contracts import BaseView, Capture, Needs
from draftsmith.decoding import tree, verify
from draftsmith.decoding.plan import Plans
from draftsmith.decoding.stats import Stats
from draftsmith.errors import ConfigError
from draftsmith.roles import Drafter, Gate, Primer, Proposal, State, TreeShape, Verdict, draw

Watch = Callable[[Proposal, Verdict], None]


@dataclass
class Generation:
    """tokens: the new ids only, the end-of-text id kept. finish: why it ended: "eos", "length" (as many
    tokens as asked for) or "positions" (the base cannot read further)."""

    tokens: list[int]
    stats: Stats
    finish: str

    @property
    def steps(self) -> int:
        return self.stats.steps

    @property
    def tokens_per_step(self) -> float:
        return self.stats.tokens_per_step

    @property
    def accepted_drafts_per_step(self) -> float:
        return self.stats.accepted_drafts_per_step


@torch.no_grad()
def generate(
    base: BaseView,
    prompt: Sequence[int],
    *,
    drafter: Drafter | None = None,
    shape: TreeShape | None = None,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
    gate: Gate | None = None,
    primer: Primer | None = None,
    watch: Watch | None = None,
    copies: int = 1,
) -> Generation:
    """Continuation of `prompt`, greedy or sampled at `temperature`; the drafter and the gate change its speed, never
    its tokens (their distribution, where the drafter draws). A primer changes the tokens too.

    shape: the tree to draft, by default a chain as deep as the drafter goes. Ends after the first id of
    `eos_ids`, after `max_new_tokens`, or when the newest token stands at a position the base does not have
    (spec.max_positions); near it the tree is cut to the positions left. Statistics count before these cuts.
    watch: called after every step with what was proposed and what was kept.
    copies: so many equal rows are decoded in lockstep, every forward over all of them; tokens and counts are one
    row's. It is what a batch costs where no row waits for another, the least that a batch can cost.
    """
    _check(base, prompt, max_new_tokens, temperature)
    _check_company(drafter, gate, primer)
    shape = _shape(drafter, shape)
    run = _Run(base, _RootAlone() if drafter is None else drafter, shape, copies, gate, Chance(base, temperature, seed))
    run.watch = watch
    tokens, finish = _cut([], [run.prefill(prompt, primer)], eos_ids, max_new_tokens)
    while finish is None and run.room >= 0:
        tokens, finish = _cut(tokens, run.step(), eos_ids, max_new_tokens)
    run.stats.emitted = len(tokens)
    return Generation(tokens, run.stats, finish or "positions")


class _Run:
    """One sequence on its way: its K/V, what the drafter may look at, the statistics so far."""

    watch: Watch | None = None

    def __init__(
        self, base: BaseView, drafter: Drafter, shape: TreeShape, copies: int, gate: Gate | None, chance: Chance
    ) -> None:
        device = base.lm_head_weight.device
        self.gate, self.chance = gate, chance
        self.base, self.drafter, self.device, self.copies = base, drafter, device, copies
        self.shape = TreeShape(shape.parents_N.to(device), shape.depths_N.to(device), shape.ranks_N.to(device))
        self.depth = shape.depth
        self.plans = Plans(self.shape)
        self.kv = base.new_kv()
        self.asked = Needs(drafter.needs.hidden, final=True, logits=drafter.needs.logits)
        self.stats = Stats(accepted_by_depth=[0] * shape.depth, offered_by_depth=[0] * shape.depth)
        self.clock = _clock(device)
        self.now = self.clock()

    @property
    def room(self) -> int:
        """How many positions the base has below the root; negative if it has none for the root itself."""
        return self.base.spec.max_positions - 1 - self.kv.length

    def prefill(self, prompt: Sequence[int], primer: Primer | None) -> int:
        """Read the prompt; the first token. lm_head runs on the last position only."""
        tokens_BT = torch.tensor([list(prompt)] * self.copies, device=self.device)
        if primer is not None and len(prompt) > 1:
            self.kv = primer.prime(self.base, tokens_BT[:, :-1])
            tokens_BT = tokens_BT[:, -1:]
        capture = self.base.capture(self.asked, tokens_BT, kv=self.kv)
        last = capture.at(torch.tensor([tokens_BT.shape[1] - 1], device=self.device))
        root = int(self.chance.choose(_logits(self.base, last), [len(prompt) - 1]))
        told = (self.copies, self.gate, self.chance.temperature, self.chance.generator)
        seen = _only(capture, self.drafter.needs)
        self.state = State([*prompt, root], root, seen, self.shape, self.kv, None, *told)
        before, self.now = self.now, self.clock()
        self.stats.prefill_seconds = self.now - before
        return root

    def step(self) -> list[int]:
        """Draft, verify, keep; the emitted tokens, at least one."""
        state, kv, stats, start = self.state, self.kv, self.stats, self.kv.length
        if self.depth > self.room:
            self.depth, state.shape = self.room, tree.cut(self.shape, self.room)
        proposal = self.drafter.propose(self.base, state)
        plan = self.plans.of(proposal.parents_N)
        assert plan.depth <= self.depth, "a proposal must not be deeper than the shape"
        entered = proposal.entered
        proposal = Proposal(proposal.tokens_N.to(self.device), plan.parents_N, drawn_NV=proposal.drawn_NV)
        drafted = self.clock()
        capture = self.base.capture(
            self.asked,
            proposal.tokens_N.expand(self.copies, -1),
            positions_BQ=plan.depths_BN + start,
            mask_BQS=None if plan.causal else plan.mask(start),
            kv=kv,
            entered=entered,
        )
        logits_NV = _logits(self.base, capture)
        if proposal.drawn_NV is None:
            best_N = self.chance.choose(logits_NV, [start + depth for depth in plan.depths])
            verified = self.clock()
            verdict = verify.greedy(proposal, best_N)
        else:
            verdict = verify.drawn(proposal, self.chance.of(logits_NV), self.chance.generator)
            verified = self.clock()
        root, *accepted = proposal.tokens_N.index_select(0, verdict.path_A).tolist()
        assert root == state.root, "node 0 of a proposal must be the root"
        seen = _only(capture, self.drafter.needs)
        if len(verdict.path_A) < plan.nodes:
            seen = seen.at(verdict.path_A)
            if plan.causal:  # then the accepted slots already stand in front
                kv.crop(start + len(verdict.path_A))
            else:
                kv.keep(start, verdict.path_A)
        emitted = [*accepted, verdict.bonus]
        state.tokens += emitted
        state.root, state.seen = verdict.bonus, seen
        stats.record(plan.depth, verdict.accepted)
        if self.watch is not None:
            self.watch(proposal, verdict)
        before, self.now = self.now, self.clock()
        stats.draft_seconds += drafted - before
        stats.verify_seconds += verified - drafted
        stats.other_seconds += self.now - verified
        return emitted


class _RootAlone:
    """Drafts nothing: plain autoregressive decoding."""

    needs = Needs()
    max_depth = 0
    gated = True  # there is nothing to stop

    def propose(self, base: BaseView, state: State) -> Proposal:
        return Proposal(torch.tensor([state.root]), state.shape.parents_N)


def _shape(drafter: Drafter | None, shape: TreeShape | None) -> TreeShape:
    if drafter is None:
        return tree.chain(0)
    if shape is None:
        return tree.chain(drafter.max_depth)
    if shape.depth > drafter.max_depth:
        raise ConfigError(
            f"decoding.depth: the tree is {shape.depth} deep and the drafter goes to {drafter.max_depth}; "
            "give a shallower tree"
        )
    return shape


def _check(base: BaseView, prompt: Sequence[int], max_new_tokens: int, temperature: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature}: give 0 for greedy decoding, or a positive number")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens}; give at least 1")
    if not 0 < len(prompt) <= base.spec.max_positions:
        raise ConfigError(f"prompt: {len(prompt)} tokens; give 1 to {base.spec.max_positions}, the base's positions")
    if min(prompt) < 0 or max(prompt) >= base.spec.vocab_size:
        raise ConfigError(f"prompt: ids {min(prompt)}..{max(prompt)}; the base's are 0..{base.spec.vocab_size - 1}")


def _check_company(drafter: Drafter | None, gate: Gate | None, primer: Primer | None) -> None:
    if gate is not None and (drafter is None or not drafter.gated):
        raise ConfigError(
            f"gate: {'there is no drafter' if drafter is None else f'{type(drafter).__name__} drafts all at once'};"
            " a gate stops one that drafts level by level"
        )
    if primer is not None and drafter is not None:
        raise ConfigError("primer: the drafter needs what the base makes of the whole prompt; use one of the two")


def _logits(base: BaseView, capture: Capture) -> Tensor:
    """[N, V] after each position; of equal rows the first one's."""
    if capture.logits is not None:
        return capture.logits[0]
    assert capture.final is not None
    return base.lm_head(capture.final)[0]


class Chance:
    """How the base's tokens come out of its logits: the best ones, or drawn with a uniform number per position."""

    def __init__(self, base: BaseView, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed) if temperature else None
        if temperature:
            uniform_T = torch.rand(base.spec.max_positions, generator=self.generator, dtype=torch.float64)
            self._uniform_T = uniform_T.to(base.lm_head_weight.device)

    def of(self, logits_NV: Tensor) -> Tensor:
        """The distributions, fp64."""
        return (logits_NV.double() / self.temperature).softmax(-1)

    def choose(self, logits_NV: Tensor, positions: list[int]) -> Tensor:
        """The base's token after each position [N]: the lowest id of equal logits, or the one at which the cumulative
        distribution passes the position's number. (On a CPU, argmax gives the same as max but takes four times as
        long in bf16.)"""
        if not self.temperature:
            return logits_NV.max(-1).indices
        return draw(self.of(logits_NV), self._uniform_T[positions])


def _only(capture: Capture, needs: Needs) -> Capture:
    """The drafter sees what it asked for; `final` may have been captured for us alone."""
    return Capture(capture.hidden, capture.final if needs.final else None, capture.logits)


def _cut(have: list[int], new: list[int], eos_ids: frozenset[int], limit: int) -> tuple[list[int], str | None]:
    """`have` and the new tokens up to the first end of text or the limit, and whether that ends the run."""
    for token in new:
        have.append(token)
        if token in eos_ids:
            return have, "eos"
        if len(have) == limit:
            return have, "length"
    return have, None


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall time after the device's work is done, so that a part's seconds are its own."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
