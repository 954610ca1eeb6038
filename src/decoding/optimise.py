"""The tree of a head on this machine: the one with the most tokens per second, by what is kept times what a step costs.

What is kept is exact: replayed from the positions of held-out texts (probing.py), where the drafter has no rule of its
own for ending drafts; else counted by decoding. What a step costs is measured by decoding, all candidates in turn and
again and again: first everybody on the beginnings of texts, then the best of them on whole ones, then the chosen one
anew. A tree's speedup is that of all the texts, the reading of prompts included, as draftsmith evaluate counts it. Then
it is measured on other prompts, beside what is to be expected there: prompts differ, so what is kept on some is no
promise for others.

The candidates: chains of every depth; trees grown from the counts, with the nodes that are kept most often (Medusa's
rule, arXiv 2401.10774), of every size; EAGLE-2's trees of the same sizes; published trees, cut to the depth that the
drafter goes to. So a size is found as in PPD (arXiv 2405.18628): tau(n) over the measured cost of n nodes.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

from draftsmith.contracts import BaseView
from draftsmith.decoding import measure
from draftsmith.decoding.breakdown import interval
from draftsmith.decoding.costs import clock_of
from draftsmith.decoding.engine import generate
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.probing import Counts, Position, kept_by, probed, replayed
from draftsmith.decoding.stats import Stats
from draftsmith.decoding.tree import TreeSpec
from draftsmith.growth import TreeShape
from draftsmith.roles import Drafter, Proposal, Verdict

RANKS = 10  # best tokens per depth that a tree may take; the published ones take no more
SAME = 0.02  # of the best speed: less is noise, and the smaller tree is preferred
FINALISTS = 6  # of all candidates, timed again
FEW, MANY, MORE = 3, 8, 12  # prompts that everybody is timed on, the finalists, and those that are compared at the end
BEGINNING = 48  # tokens of a text that everybody is timed on
PLAIN = "autoregressive"

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """A tree and what is kept with it on the texts. nodes: root included; published: its name is of conf/tree."""

    name: str
    spec: TreeSpec
    nodes: int
    depth: int
    counts: Counts
    published: bool = False


@dataclass(frozen=True)
class Cost:
    """Seconds: of a step, and its parts as the engine's clock splits them; of reading a prompt."""

    step: float
    draft: float
    verify: float
    other: float
    prompt: float

    def rate(self, counts: Counts, prompts: int) -> float:
        """Tokens per second of such decoding, prompts included."""
        return counts.tokens / (prompts * self.prompt + counts.steps * self.step)

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * seconds for seconds in astuple(self)))


@dataclass(frozen=True)
class Choice:
    """best; the best published one; the chain as deep as the drafter goes. table: every candidate, the best first,
    those that were timed again before the others; its speedups are what the counts and the costs promise. costs: of
    these three and of plain decoding by name, measured anew, since the best is likely to have been timed too well."""

    best: Candidate
    published: Candidate | None
    chain: Candidate
    table: list[dict[str, Any]]
    costs: dict[str, Cost]

    @property
    def compared(self) -> dict[str, Candidate]:
        """By name, those to measure on other prompts."""
        told = (self.best, self.published, self.chain)
        return {c.name: c for c in told if c is not None}

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.table if row["name"] == name)


@dataclass
class Optimiser:
    """A drafter on a base, its trees at most `depth` deep. how: as measure.measure takes it; sizes: of the trees tried,
    roots included; published: by name."""

    base: BaseView
    drafter: Drafter
    depth: int
    how: Mapping[str, Any]
    sizes: Sequence[int]
    published: Mapping[str, TreeSpec]

    @property
    def replayable(self) -> bool:
        """Whether what it drafts depends on the text alone: not where it is its own gate."""
        return not hasattr(self.drafter, "stop")

    def of_text(self, number: int) -> dict[str, Any]:
        """How one of several prompts is decoded once; the seeds are those of measure.measure."""
        return {k: v for k, v in self.how.items() if k != "repeats"} | {"seed": self.how["seed"] + number}

    def choose(self, prompts: Sequence[Sequence[int]]) -> Choice:
        """The best tree for these prompts, and how it stands among the others."""
        texts = self.looked_at(prompts, max(self.sizes))
        candidates = self.candidates(texts, prompts)
        costs = self.costs(candidates, spaced(prompts, FEW), BEGINNING)

        def rate(c: Candidate) -> float:
            return costs[c.name].rate(c.counts, len(prompts))

        ranked = sorted(candidates, key=rate, reverse=True)
        published = next((c for c in ranked if c.published), None)
        chain = max((c for c in candidates if c.spec.kind == "chain"), key=lambda c: c.depth)
        again = [c for c in ranked if c in ranked[:FINALISTS] or c in (published, chain)]
        exact = self.costs(again, spaced(prompts, MANY), self.how["max_new_tokens"])
        slower = statistics.median(exact[name].step / costs[name].step for name in exact)  # the machine, meanwhile
        costs = {name: cost.times(slower) for name, cost in costs.items()} | exact
        plain = costs[PLAIN].rate(plain_counts(texts), len(prompts))
        best = smallest_of_the_best(again, [rate(c) for c in again])
        table = [
            {
                "name": c.name,
                "kind": c.spec.kind,
                "published": c.published,
                "nodes": c.nodes,
                "depth": c.depth,
                "tokens_per_step": c.counts.tokens_per_step,
                "seconds_per_step": costs[c.name].step,
                "tokens_per_second": rate(c),
                "speedup": rate(c) / plain,
                "timed_again": c in again,
            }
            for c in sorted(candidates, key=lambda c: (c not in again, -rate(c)))
        ]
        compared = {c.name: c for c in (best, published, chain) if c is not None}
        fresh = self.costs([*compared.values()], spaced(prompts, MORE), self.how["max_new_tokens"])
        return Choice(best, published, chain, table, fresh)

    def looked_at(self, prompts: Sequence[Sequence[int]], nodes: int) -> list[list[Position]]:
        """The texts after these prompts; nodes: of the largest of EAGLE-2's trees to be replayed."""
        nodes = nodes if self.replayable else 0
        each = [(p, self.of_text(n)) for n, p in enumerate(prompts)]
        return [probed(self.base, self.drafter, p, self.depth, how, RANKS, nodes) for p, how in each]

    def candidates(self, texts: Sequence[Sequence[Position]], prompts: Sequence[Sequence[int]]) -> list[Candidate]:
        """All that are tried; of trees that are one under two names the first. Shallower trees than the drafter goes
        are tried where every level costs a forward of its own."""
        limits = levels(self.depth) if self.drafter.gated and self.replayable else [self.depth]
        specs = {f"chain {d}": TreeSpec("chain", d) for d in range(1, self.depth + 1)}
        for d in limits:
            less = "" if d == self.depth else f", {d} deep"
            by_size = grown([p.ranks for text in texts for p in text], self.sizes, d)
            specs |= {f"grown {n}{less}": TreeSpec("static", paths=paths) for n, paths in by_size.items()}
            specs |= {f"eagle2 {n}{less}": TreeSpec("eagle2", d, nodes=n) for n in self.sizes if n > d + 1}
        found, seen = [], set()
        for name, spec in [*specs.items(), *self.published.items()]:
            shape, own = spec.shape(self.depth), name in self.published
            if isinstance(shape, TreeShape):
                paths = paths_of(shape)
                if not paths or (own, str(paths)) in seen:
                    continue
                seen.add((own, str(paths)))
                if spec.kind == "static":
                    spec = replace(spec, paths=paths)
            counts = self.counts(spec, texts, prompts)
            found.append(Candidate(name, spec, shape.nodes, shape.depth, counts, own))
        return found

    def counts(self, spec: TreeSpec, texts: Sequence[Sequence[Position]], prompts: Sequence[Sequence[int]]) -> Counts:
        if self.replayable:
            return replayed(texts, kept_by(spec, self.depth), self.depth)
        stats = self._decoded(spec, prompts)
        return Counts(stats.steps, stats.emitted, stats.accepted_by_depth)

    def costs(self, candidates: Sequence[Candidate], prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Cost]:
        """By name, plain decoding's too: everybody decodes every prompt in some order, as often as measurements are
        repeated, at most so many tokens."""
        how = {**self.of_text(0), "max_new_tokens": min(tokens, self.how["max_new_tokens"])}
        company: dict[str, dict[str, Any]] = {PLAIN: {}}
        company |= {c.name: {"drafter": self.drafter, "shape": c.spec.shape(self.depth)} for c in candidates}
        names, clock = list(company), clock_of(self.base.lm_head_weight.device)
        sweeps: list[dict[str, tuple[float, Stats]]] = []
        for n, prompt in enumerate([prompts[0], *list(prompts) * self.how["repeats"]]):
            sweep = {}
            for name in random.Random(n).sample(names, len(names)):  # nobody always follows the same one
                began = clock()
                stats = generate(self.base, prompt, **how, **company[name]).stats
                sweep[name] = (clock() - began, stats)
            sweeps.append(sweep)
        return costs_of(sweeps[1:])  # everybody's first call warms up

    def predicted(self, choice: Choice, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """By name, what those to compare should bring on other prompts: what would be kept there, at the same costs."""
        nodes = max((c.spec.nodes for c in choice.compared.values() if c.spec.kind == "eagle2"), default=0)
        texts = self.looked_at(prompts, nodes)
        plain = choice.costs[PLAIN].rate(plain_counts(texts), len(prompts))
        found = {}
        for name, c in choice.compared.items():
            counts = self.counts(c.spec, texts, prompts)
            rate = choice.costs[name].rate(counts, len(prompts))
            found[name] = {
                "tokens_per_step": counts.tokens_per_step,
                "tokens_per_second": rate,
                "speedup": rate / plain,
            }
        return found

    def measured(
        self, choice: Choice, prompts: Sequence[Sequence[int]], questions: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """By name, what they do bring there: medians over passes through all the prompts, each pass's `speedups` beside
        them, since they tell the noise of this machine. interval: of tokens per step, 95 %, over questions, whose
        prompts these are."""
        contenders = {name: self._contender(c) for name, c in choice.compared.items()}
        once = {**self.how, "repeats": 1}
        passes = [measure.measure(self.base, prompts, contenders, {}, **once) for _ in range(self.how["repeats"])]
        found = {}
        for name in contenders:
            own = passes[0][name]
            speedups = [one[name].tokens_per_second / one[PLAIN].tokens_per_second for one in passes]
            found[name] = {
                "tokens_per_step": own.stats.tokens_per_step,
                "interval": interval(own.each, questions),
                "tokens_per_second": statistics.median(one[name].tokens_per_second for one in passes),
                "speedup": statistics.median(speedups),
                "speedups": speedups,
            }
        return found

    def shares(self, candidate: Candidate, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """How often a step keeps each node of a static tree or a chain: path of ranks and share. Of a tree that is
        another one at every step: how often it keeps some node of each depth."""
        shape, kept = candidate.spec.shape(self.depth), Counter[int]()

        def watch(proposal: Proposal, verdict: Verdict) -> None:
            kept.update(verdict.path_A.tolist()[1:])

        stats = self._decoded(candidate.spec, prompts, watch)
        steps = max(stats.steps, 1)
        if isinstance(shape, TreeShape):
            return [{"path": p, "share": kept[n] / steps} for n, p in enumerate(paths_of(shape), start=1)]
        return [{"depth": k, "share": n / steps} for k, n in enumerate(stats.accepted_by_depth, start=1)]

    def _contender(self, candidate: Candidate) -> Contender:
        return Contender(lambda prompt, answer: self.drafter, candidate.spec.shape(self.depth))

    def _decoded(self, spec: TreeSpec, prompts: Sequence[Sequence[int]], watch: Any = None) -> Stats:
        own: dict[str, Any] = {"drafter": self.drafter, "shape": spec.shape(self.depth), "watch": watch}
        each = (generate(self.base, p, **self.of_text(n), **own).stats for n, p in enumerate(prompts))
        return sum(each, Stats())


def grown(ranks: Sequence[tuple[int, ...]], sizes: Sequence[int], depth: int) -> dict[int, list[list[int]]]:
    """Size -> the paths of the tree of so many nodes, root included, at most `depth` deep, whose nodes are kept most
    often at these positions. A node is never kept more often than its parent, so the likeliest are a tree. Sizes that
    the counts cannot fill are left out."""
    often = Counter(path[:k] for path in ranks for k in range(1, min(depth, len(path)) + 1))
    order = sorted(often, key=lambda path: (-often[path], len(path), path))
    return {n: [list(path) for path in order[: n - 1]] for n in sizes if n - 1 <= len(order)}


def paths_of(shape: TreeShape) -> list[list[int]]:
    """The rank path of every node but the root, in the order of the nodes."""
    found: list[list[int]] = [[]]
    for parent, rank in zip(shape.parents_N.tolist()[1:], shape.ranks_N.tolist()[1:], strict=True):
        found.append([*found[parent], rank])
    return found[1:]


def levels(depth: int) -> list[int]:
    """At most three depths up to this one, evenly spaced."""
    return sorted({-(-depth * third // 3) for third in range(1, 4)})


def smallest_of_the_best(candidates: Sequence[Candidate], rates: Sequence[float]) -> Candidate:
    """Of those within SAME of the best rate the one with the fewest nodes, of equal ones the faster."""
    least = (1 - SAME) * max(rates)
    near = [(c.nodes, -rate, n) for n, (c, rate) in enumerate(zip(candidates, rates, strict=True)) if rate >= least]
    return candidates[min(near)[2]]


def spaced(given: Sequence[T], count: int) -> list[T]:
    """At most so many of them, evenly spaced."""
    some = min(count, len(given))
    return [given[n * len(given) // some] for n in range(some)]


def plain_counts(texts: Sequence[Sequence[Position]]) -> Counts:
    """Decoding without a drafter: a step per token but the prompt's own."""
    steps = sum(map(len, texts))
    return Counts(steps, steps + len(texts))


def costs_of(sweeps: Sequence[Mapping[str, tuple[float, Stats]]]) -> dict[str, Cost]:
    """What everybody's calls cost, seconds and counts by name, sweep by sweep.

    On a machine that others use too, whole sweeps are slow or fast together. So a step counts relative to the median of
    its sweep, and the median of that over the sweeps is taken.
    """
    steps = [{name: _per_step(*call) for name, call in sweep.items()} for sweep in sweeps]
    loads = [statistics.median(sweep.values()) for sweep in steps]
    usual = statistics.median(loads)
    prompts = [
        statistics.median(stats.prefill_seconds for _, stats in sweep.values()) / load
        for sweep, load in zip(sweeps, loads, strict=True)
    ]
    prompt = usual * statistics.fmean(prompts)
    found = {}
    for name in sweeps[0]:
        step = usual * statistics.median(own[name] / load for own, load in zip(steps, loads, strict=True))
        total = sum((sweep[name][1] for sweep in sweeps), Stats())
        part = step / ((total.seconds - total.prefill_seconds) or 1.0)
        split = (part * total.draft_seconds, part * total.verify_seconds, part * total.other_seconds)
        found[name] = Cost(step, *split, prompt)
    return found


def _per_step(seconds: float, stats: Stats) -> float:
    return (seconds - stats.prefill_seconds) / max(stats.steps, 1)
