"""What a gate is worth: its speed between the best fixed length and an oracle, and whether its chances are true.

Cost model of a step that drafts k levels: c2 + k (c1 + cg), c1 a drafted level, cg asking the gate, c2 everything that
is paid once (the drafter's first read, verification, the rest). Counts are exact and do not depend on the machine's
mood; the three costs are measured once. So a threshold is chosen by counts times costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.decoding import measure
from draftsmith.decoding.engine import generate
from draftsmith.decoding.gates import Fixed, Oracle
from draftsmith.decoding.measure import Contender, Result
from draftsmith.decoding.stats import Stats
from draftsmith.decoding.tree import chain
from draftsmith.roles import Drafter, Gate, Partial, Proposal, State, Verdict

BINS = 10  # of the reliability curve
GATE, ORACLE = "gate", "oracle"


@dataclass
class Hearing:
    """A gate that never stops, and writes down what another would have said of every draft that was read."""

    chances_of: Callable[[Partial], Sequence[Tensor]]
    said: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    _step: list[float] = field(default_factory=list)

    def stop(self, state: State, partial: Partial) -> bool:
        self._step = [float(chance_A[0]) for chance_A in self.chances_of(partial)]
        return False

    def watch(self, proposal: Proposal, verdict: Verdict) -> None:
        """Drafts up to the first refused one were put to the test; those below it were not."""
        for depth, chance in enumerate(self._step[: verdict.accepted + 1], start=1):
            self.said.append(chance)
            self.right.append(depth <= verdict.accepted)
        self._step = []


def calibration(said: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """Of predicted chances and what happened: the reliability curve (per bin of predicted chance: how many, mean
    prediction, share that happened), ECE (mean of |prediction - share| over drafts), AUC (the chance that a kept draft
    was given more than a refused one; None where there was only one kind), Brier score."""
    said_N, right_N = torch.tensor(said, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    curve = []
    bin_N = (said_N * BINS).long().clamp(max=BINS - 1)
    for b in range(BINS):
        at_N = bin_N == b
        if bool(at_N.any()):
            told = {"count": int(at_N.sum()), "predicted": float(said_N[at_N].mean())}
            curve.append({**told, "accepted": float(right_N[at_N].mean())})
    count = max(len(said), 1)
    return {
        "drafts": len(said),
        "accepted": float(right_N.mean()) if len(said) else None,
        "auc": auc(said_N, right_N.bool()),
        "ece": sum(c["count"] * abs(c["predicted"] - c["accepted"]) for c in curve) / count,
        "brier": float((said_N - right_N).square().mean()) if len(said) else None,
        "curve": curve,
    }


def auc(said_N: Tensor, right_N: Tensor) -> float | None:
    """Mann-Whitney: P(said of a kept draft > said of a refused one), ties counting half."""
    kept, refused = int(right_N.sum()), int((~right_N).sum())
    if not kept or not refused:
        return None
    _, group_N, size_G = said_N.unique(return_inverse=True, return_counts=True)
    last_G = size_G.cumsum(0).double()
    rank_N = (last_G - (size_G - 1) / 2)[group_N]  # mean rank of equal values
    return float((rank_N[right_N].sum() - kept * (kept + 1) / 2) / (kept * refused))


@dataclass(frozen=True)
class Costs:
    """Seconds: c1 of a drafted level, c2 once per step, cg of asking the gate once."""

    level: float
    step: float
    ask: float

    def rate(self, stats: Stats, depth: int) -> float:
        """Tokens per second of such a run, chains being at most `depth` deep. The last level is not asked about."""
        levels = sum(stats.offered_by_depth)
        asked = sum(stats.offered_by_depth[: depth - 1])
        tokens = stats.steps + stats.accepted
        return tokens / (stats.steps * self.step + levels * self.level + asked * self.ask)

    @property
    def threshold(self) -> float:
        """Where the theory stops (arXiv 2405.19715): P(refusal) >= (c2 + d) / (c1 + c2 + d), here with d = 0; the cost
        of drafting includes asking."""
        return self.step / (self.level + self.ask + self.step)


@dataclass(frozen=True)
class Trial:
    """A drafter whose chains a gate ends, at most `depth` deep, on one base. how: as measure.measure takes it."""

    base: BaseView
    drafter: Drafter
    depth: int
    how: Mapping[str, Any]

    def contender(self, gate: measure.MakeGate | None) -> Contender:
        return Contender(lambda prompt, answer: self.drafter, chain(self.depth), gate)

    def fixed(self) -> dict[str, Contender]:
        """Every length; a gate of their own keeps a drafter's (Kangaroo's) from stopping them."""
        found = {}
        for k in range(1, self.depth + 1):
            found[f"fixed_{k}"] = Contender(lambda p, a: self.drafter, chain(k), always(Fixed(k)))
        return found

    def bounds(self, gate: Gate, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The gate beside every fixed length and, of a greedy text, the oracle, interleaved in one run: speeds, the
        share of the gap between the best fixed length and the oracle that the gate recovers, and its regret, 1 - its
        speed / the oracle's. Sampled text has no oracle."""
        contenders = {**self.fixed(), GATE: self.contender(always(gate))}
        if self.how["rules"].greedy:
            contenders[ORACLE] = self.contender(lambda p, a: Oracle([*p, *a]))
        results = measure.measure(self.base, prompts, contenders, {}, **self.how)
        plain = results.pop("autoregressive")
        told = {name: described(r, plain) for name, r in results.items()}
        best = max(self.fixed(), key=lambda name: told[name]["tokens_per_second"])
        found = {"by_length": told, "best_fixed": best, "over_best_fixed": _ratio(told, GATE, best)}
        if ORACLE in told:
            speeds = {name: told[name]["tokens_per_second"] for name in (best, GATE, ORACLE)}
            gap = speeds[ORACLE] - speeds[best]
            found["oracle_over_best_fixed"] = _ratio(told, ORACLE, best)
            found["recovered"] = (speeds[GATE] - speeds[best]) / gap if gap > 0 else None
            found["regret"] = 1 - speeds[GATE] / speeds[ORACLE]
        return found

    def run(self, gate: Gate, prompts: Sequence[Sequence[int]], watch: Any = None) -> Stats:
        """One untimed pass, for its counts."""
        how = {k: v for k, v in self.how.items() if k != "repeats"}
        total = Stats()
        for prompt in prompts:
            shape = chain(self.depth)
            out = generate(self.base, prompt, drafter=self.drafter, shape=shape, gate=gate, watch=watch, **how)
            total += out.stats
        return total

    def costs(self, gate_that_never_stops: Gate, prompts: Sequence[Sequence[int]]) -> Costs:
        """Measured: a line through the fixed lengths' drafting seconds per step, and what the same drafts cost with the
        gate being asked."""
        asked = self.contender(always(gate_that_never_stops))
        results = measure.measure(self.base, prompts, {**self.fixed(), GATE: asked}, {}, **self.how)
        repeats = self.how["repeats"]
        per_step = {name: r.stats.draft_seconds_per_step / repeats for name, r in results.items()}
        lengths = list(range(1, self.depth + 1))
        drafts = [per_step[f"fixed_{k}"] for k in lengths]
        level, first = statistics.linear_regression(lengths, drafts) if len(lengths) > 1 else (drafts[0], 0.0)
        once = [
            (r.stats.verify_seconds_per_step + r.stats.other_seconds_per_step) / repeats
            for name, r in results.items()
            if name in self.fixed()
        ]
        ask = (per_step[GATE] - per_step[f"fixed_{self.depth}"]) / max(self.depth - 1, 1)
        return Costs(max(level, 0.0), max(first, 0.0) + statistics.median(once), max(ask, 0.0))

    def choose(
        self,
        gate_at: Callable[[float], Gate],
        thresholds: Sequence[float],
        costs: Costs,
        prompts: Sequence[Sequence[int]],
    ) -> tuple[float, list[dict[str, float]]]:
        """The threshold with the most tokens per second by counts and costs, and what each would bring."""
        table = []
        for threshold in thresholds:
            stats = self.run(gate_at(threshold), prompts)
            counts = {"tokens_per_step": stats.tokens_per_step, "drafts_per_step": _drafts(stats)}
            table.append({"threshold": threshold, **counts, "tokens_per_second": costs.rate(stats, self.depth)})
        return max(table, key=lambda row: row["tokens_per_second"])["threshold"], table


def always(gate: Gate) -> measure.MakeGate:
    return lambda prompt, answer: gate


def described(own: Result, plain: Result) -> dict[str, float]:
    return {
        "tokens_per_step": own.stats.tokens_per_step,
        "drafts_per_step": _drafts(own.stats),
        "tokens_per_second": own.tokens_per_second,
        "speedup": own.tokens_per_second / plain.tokens_per_second,
    }


def _drafts(stats: Stats) -> float:
    return sum(stats.offered_by_depth) / max(stats.steps, 1)


def _ratio(told: Mapping[str, Mapping[str, float]], one: str, other: str) -> float:
    return told[one]["tokens_per_second"] / told[other]["tokens_per_second"]
