"""Texts, with or without a drafter: the same loop, so that its speeds can be compared; one text or many together.

Prefill reads the prompts and gives the first tokens, the first roots; a primer may write the K/V of all but a prompt's
last token in the base's place. Each step then drafts below the roots, lets the base read roots and drafts of all rows
in one forward under a tree mask, keeps what the base would have said itself, and emits that and the base's own next
token, the next root.

Row b's text but its root fills the K/V's slots 0..length_b - 1, so a node stands at position length_b + its depth. All
rows write their nodes to the same slots, behind the longest text (plan.together); what a row keeps is then moved to the
end of its own text. Rows accept different numbers of tokens and end at different times: an ended row leaves the batch.

During a step the K/V holds all N nodes, so it must have room for N - 1 slots beyond the last position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.contracts import BaseView, Capture, Needs
from draftsmith.decoding import tree, verify
from draftsmith.decoding.costs import clock_of
from draftsmith.decoding.plan import Plan, Plans, together
from draftsmith.decoding.rows import Row, only
from draftsmith.decoding.rules import Chance, Rules
from draftsmith.decoding.stats import Stats
from draftsmith.errors import ConfigError
from draftsmith.growth import Shape, TreeShape, Warp
from draftsmith.roles import Drafter, Gate, Primer, Proposal, RowsDrafter, State, Verdict

T = TypeVar("T")

ROOT = torch.zeros(1, dtype=torch.long)

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


def generate(
    base: BaseView,
    prompt: Sequence[int],
    *,
    drafter: Drafter | None = None,
    shape: Shape | None = None,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    rules: Rules | None = None,
    seed: int = 0,
    gate: Gate | None = None,
    primer: Primer | None = None,
    watch: Watch | None = None,
) -> Generation:
    """Continuation of `prompt`, greedy or sampled; the drafter and the gate change its speed, never its tokens (their
    distribution, where the drafter draws), unless the rules are lossy. A primer changes the tokens too.

    rules: how tokens come about; `temperature` alone is short for exact sampling at it.
    shape: the tree to draft, by default a chain as deep as the drafter goes. Ends after the first id of
    `eos_ids`, after `max_new_tokens`, or when the newest token stands at a position the base does not have
    (spec.max_positions); near it the tree is cut to the positions left. Statistics count before these cuts.
    watch: called after every step with what was proposed and what was kept.
    """
    rules = Rules(Warp(temperature)) if rules is None else rules
    limits = {"shape": shape, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "rules": rules}
    more = {"drafters": drafter, "gates": gate, "seeds": [seed], "primer": primer, "watch": watch}
    return decode(base, [prompt], **limits, **more)[0]  # type: ignore[arg-type]


@torch.no_grad()
def decode(
    base: BaseView,
    prompts: Sequence[Sequence[int]],
    *,
    drafters: Drafter | Sequence[Drafter] | None = None,
    gates: Gate | Sequence[Gate] | None = None,
    shape: Shape | None = None,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    rules: Rules | None = None,
    seeds: Sequence[int] | None = None,
    rooted: bool = False,
    primer: Primer | None = None,
    watch: Watch | None = None,
) -> list[Generation]:
    """Continuations of several prompts, one batch; each row's tokens and counts are those it would have alone (but for
    rounding), seconds are its share of the batch's.

    drafters, gates: one for all rows, or one per row, where they know their text. seeds: per row; default 0 for all.
    rooted: the last id of every prompt has been emitted already, and is the first root; so the first new token comes
    from a step. Otherwise as `generate`.
    """
    rules = Rules() if rules is None else rules
    if primer is not None and (len(prompts) > 1 or rooted):
        raise ConfigError("primer: writes the K/V of one prompt; decode prompts one by one")
    rows, device = [], base.lm_head_weight.device
    forms: dict[int, Shape] = {}  # one for all drafters of a depth, so that their trees are known to be alike
    seeds = [0] * len(prompts) if seeds is None else seeds
    everybody = zip(prompts, _each(drafters, len(prompts)), _each(gates, len(prompts)), seeds, strict=True)
    for b, (prompt, own, gate, seed) in enumerate(everybody):
        _check(base, prompt, max_new_tokens, rooted)
        _check_company(own, gate, primer)
        depth = 0 if own is None else own.max_depth
        form = forms[depth] = forms.get(depth) or _shape(own, shape, device)
        chance = Chance(rules, seed, base.spec.max_positions, device)
        stats = Stats(accepted_by_depth=[0] * form.depth, offered_by_depth=[0] * form.depth)
        rows.append(Row(b, list(prompt), own or _RootAlone(), gate, form, chance, eos_ids, max_new_tokens, stats))
    if not rows:
        return []
    run = _Run(base, rows, rules, watch)
    run.prefill(primer, rooted)
    while run.rows:
        run.step()
    for row in rows:
        row.stats.emitted = len(row.tokens)
    return [Generation(row.tokens, row.stats, row.finish or "positions") for row in rows]


class _Run:
    """The rows that go on, and the base's K/V of them."""

    def __init__(self, base: BaseView, rows: list[Row], rules: Rules, watch: Watch | None) -> None:
        self.base, self.rows, self.rules, self.watch = base, list(rows), rules, watch
        self.device = base.lm_head_weight.device
        self.plans = {id(row.shape): Plans(row.shape, self.device) for row in rows}
        self.kv = base.new_kv()
        needs = Needs(final=True)
        for row in rows:
            needs = needs | Needs(row.drafter.needs.hidden, logits=row.drafter.needs.logits)
        self.asked = needs
        drafter, shared = rows[0].drafter, all(row.drafter is rows[0].drafter for row in rows)
        self.for_all = drafter if shared and isinstance(drafter, RowsDrafter) else None
        self.clock = _clock(self.device)
        self.now = self.clock()

    def prefill(self, primer: Primer | None, rooted: bool) -> None:
        """Read the prompts; the first roots. lm_head runs on last positions only, unless a drafter needs logits."""
        texts = [row.prompt[:-1] if rooted else row.prompt for row in self.rows]
        lengths = [len(text) for text in texts]
        tokens_BT = torch.zeros(len(texts), max(lengths), dtype=torch.long)
        for b, text in enumerate(texts):
            tokens_BT[b, : len(text)] = torch.tensor(text)  # what stands to the right is never looked at
        tokens_BT = tokens_BT.to(self.device)
        skipped = 0
        if primer is not None and lengths[0] > 1:
            self.kv = primer.prime(self.base, tokens_BT[:, :-1])
            tokens_BT, skipped = tokens_BT[:, -1:], lengths[0] - 1
        capture = self.base.capture(self.asked, tokens_BT, kv=self.kv)
        for b, (row, length) in enumerate(zip(self.rows, lengths, strict=True)):
            mine, read = capture.row(b), torch.arange(length - skipped, device=self.device)
            if len(read) < tokens_BT.shape[1]:
                mine = mine.at(read)
            if rooted:
                root = row.prompt[-1]
            else:
                root = int(row.chance.choose(_logits(self.base, mine.at(read[-1:]))[0], [length - 1]))
            row.begin(root, length, only(mine, row.drafter.needs))
            if row.drafter.needs.logits and mine.logits is not None:
                row.state.read = (tokens_BT[b, : len(read)], mine.logits[0])
            if not rooted:
                row.emit([root])
        before, self.now = self.now, self.clock()
        for row in self.rows:
            row.stats.prefill_seconds = (self.now - before) / len(self.rows)
        self._leave()

    def step(self) -> None:
        """Draft, verify, keep, emit: all rows together."""
        rows, kv, start = list(self.rows), self.kv, self.kv.length
        proposals = self._drafted()
        plans = [self.plans[id(r.shape)].of(p.parents_N) for r, p in zip(rows, proposals, strict=True)]
        for row, plan in zip(rows, plans, strict=True):
            assert plan.depth <= row.state.shape.depth, "a proposal must not be deeper than the shape"
        tokens_BN = _stacked([p.tokens_N for p in proposals], self.device)
        entered = self._entered(proposals, start)
        asked = self.asked
        if entered is not None:  # the blocks below have run already
            asked = replace(asked, hidden=frozenset(layer for layer in asked.hidden if layer >= entered[0]))
        positions_BN, mask_BNS = together(plans, [r.length for r in rows], start)
        drafted = self.clock()
        capture = self.base.capture(
            asked, tokens_BN, positions_BQ=positions_BN, mask_BQS=mask_BNS, kv=kv, entered=entered
        )
        verdicts, tokens = self._verdicts(proposals, plans, tokens_BN, _logits(self.base, capture))
        verified = self.clock()
        paths = [v.path_A.tolist() for v in verdicts]
        self._keep(start, plans, paths)
        ended = False
        for b, (row, plan, verdict) in enumerate(zip(rows, plans, verdicts, strict=True)):
            assert tokens[b][0] == row.state.root, "node 0 of a proposal must be the root"
            mine = capture if len(rows) == 1 else capture.row(b)
            if row.drafter.needs.logits and mine.logits is not None:
                row.state.read = (tokens_BN[b, : plan.nodes], mine.logits[0, : plan.nodes])
            seen = only(mine, row.drafter.needs)
            row.state.seen = seen if len(paths[b]) == positions_BN.shape[1] else seen.at(verdict.path_A.to(self.device))
            row.emit(row.advance(paths[b], tokens[b], verdict, plan.depth))
            ended = ended or row.finish is not None or row.room(self.base) < 0
            if self.watch is not None:
                self.watch(proposals[b], verdict)
        if ended:
            self._leave()
        before, self.now = self.now, self.clock()
        parts = (drafted - before, verified - drafted, self.now - verified)
        for row in rows:
            row.stats.spend(*(part / len(rows) for part in parts))

    def _drafted(self) -> list[Proposal]:
        """Every row's proposal. Drafters that run the base's blocks find the row's own K/V in their state."""
        rows, alone = self.rows, len(self.rows) == 1
        running = [row.shape.drafted for row in rows if not alone and row.drafter.runs_base]
        if running:
            self.kv.reserve(self.kv.length + max(running))
        for b, row in enumerate(rows):
            row.state.kv = self.kv if alone else self.kv.row(b, row.length) if row.drafter.runs_base else None
        states = [row.ready(self.base) for row in rows]
        if not alone and self.for_all is not None:
            return self.for_all.propose_rows(self.base, states)
        return [row.drafter.propose(self.base, state) for row, state in zip(rows, states, strict=True)]

    def _entered(self, proposals: list[Proposal], start: int) -> tuple[int, Tensor] | None:
        """Where blocks have run for the proposals: their states, and their slots among the batch's. Rows that left
        the base at different blocks, or did not run it, begin again at the embedding."""
        entered = [p.entered for p in proposals]
        if len(entered) == 1:
            return entered[0]
        told = [e for e in entered if e is not None]
        if len({e[0] for e in told}) != 1 or len(told) < len(entered):
            return None
        layer = told[0][0]
        for b, (row, (_, hidden)) in enumerate(zip(self.rows, told, strict=True)):
            self.kv.adopt(b, row.length, start, hidden.shape[1])
        nodes = max(h.shape[1] for _, h in told)
        self.kv.lengthen(layer, start + nodes)
        return layer, torch.cat([F.pad(h, (0, 0, 0, nodes - h.shape[1])) for _, h in told])

    def _verdicts(
        self, proposals: list[Proposal], plans: list[Plan], tokens_BN: Tensor, logits_BNV: Tensor
    ) -> tuple[list[Verdict], list[list[int]]]:
        """What of each is kept, and the tokens of all nodes; of a greedy text with one wait for the device."""
        found = []
        if self.rules.greedy:
            best_BN = logits_BNV.max(-1).indices
            if tokens_BN.shape[1] == 1:  # roots alone, which are always kept: plain decoding's every step
                return [Verdict(ROOT, bonus) for (bonus,) in best_BN.tolist()], [[row.state.root] for row in self.rows]
            told = torch.stack([tokens_BN, best_BN]).cpu()
            for b, plan in enumerate(plans):
                mine = Proposal(told[0, b, : plan.nodes], plan.parents_N)
                found.append(verify.greedy(mine, told[1, b, : plan.nodes]))
            return found, told[0].tolist()
        for b, (row, plan, proposal) in enumerate(zip(self.rows, plans, proposals, strict=True)):
            mine = Proposal(tokens_BN[b, : plan.nodes], plan.parents_N, drawn_NV=proposal.drawn_NV)
            positions = [row.length + depth for depth in plan.depths]
            found.append(row.chance.verdict(mine, logits_BNV[b, : plan.nodes], positions))
        return found, tokens_BN.tolist()

    def _keep(self, start: int, plans: list[Plan], paths: list[list[int]]) -> None:
        """The K/V of what was kept, at the end of each row's own text."""
        if len(paths) > 1:
            self.kv.keep_rows(start, [row.length for row in self.rows], paths)
        elif plans[0].causal:  # then the accepted slots already stand in front
            self.kv.crop(start + len(paths[0]))
        elif len(paths[0]) < plans[0].nodes:
            self.kv.keep(start, torch.tensor(paths[0], device=self.device))

    def _leave(self) -> None:
        """Rows that have ended, out of the batch."""
        for b in reversed(range(len(self.rows))):
            if self.rows[b].finish is None and self.rows[b].room(self.base) >= 0:
                continue
            if len(self.rows) > 1:
                self.kv.leave(b)
                self.rows[b] = self.rows[-1]
            self.rows.pop()
        if self.rows:
            self.kv.crop(max(row.length for row in self.rows))


class _RootAlone:
    """Drafts nothing: plain autoregressive decoding."""

    needs = Needs()
    max_depth = 0
    gated = True  # there is nothing to stop
    runs_base = False

    def propose(self, base: BaseView, state: State) -> Proposal:
        return Proposal(torch.tensor([state.root]), state.shape.parents_N)  # type: ignore[attr-defined]


def _each(given: T | Sequence[T] | None, count: int) -> Sequence[T | None]:
    """One per row."""
    return given if isinstance(given, Sequence) else [given] * count


def _stacked(tokens: list[Tensor], device: torch.device) -> Tensor:
    """[B, N]; shorter rows are filled up with their root."""
    if len(tokens) == 1:
        return tokens[0].to(device)[None]
    nodes = max(map(len, tokens))
    filled = [torch.cat([t, t[:1].expand(nodes - len(t))]) if len(t) < nodes else t for t in tokens]
    return torch.stack([t.to(device) for t in filled])


def _shape(drafter: Drafter | None, shape: Shape | None, device: torch.device) -> Shape:
    if drafter is None or shape is None:
        return tree.chain(0 if drafter is None else drafter.max_depth).to(device)
    if shape.depth > drafter.max_depth:
        raise ConfigError(
            f"decoding.depth: the tree is {shape.depth} deep and the drafter goes to {drafter.max_depth}; "
            "give a shallower tree"
        )
    return shape.to(device) if isinstance(shape, TreeShape) else shape


def _check(base: BaseView, prompt: Sequence[int], max_new_tokens: int, rooted: bool) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens}; give at least 1")
    least = 2 if rooted else 1
    if not least <= len(prompt) <= base.spec.max_positions:
        limit = base.spec.max_positions
        raise ConfigError(f"prompt: {len(prompt)} tokens; give {least} to {limit}, the base's positions")
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
    """[B, N, V] after each position."""
    if capture.logits is not None:
        return capture.logits
    assert capture.final is not None
    return base.lm_head(capture.final)


def _clock(device: torch.device) -> Callable[[], float]:
    """Time after the device's work is done, so that a part's seconds are its own."""
    if device.type != "cuda":
        return clock_of(device)

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
