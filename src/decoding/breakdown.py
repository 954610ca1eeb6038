"""Where tokens per step come from: with confidence intervals, by context length, by whatever the prompts are told apart
by; and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.decoding.stats import Stats

RESAMPLED = 2000
LEAST = 8  # questions; from fewer the interval is far too narrow (in simulation 49 % of them hold the truth from two)
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Label:
    """What a prompt is reported under. question: the prompts of one question (its turns) are not independent."""

    source: str
    turn: int
    question: int


def interval(
    each: Sequence[Stats], questions: Sequence[int] | None = None, *, level: float = 0.95, seed: int = 0
) -> list[float] | None:
    """Percentile bootstrap of tokens per step over questions (Efron 1979): whole questions are drawn again with
    replacement, since the steps of one text are not independent, nor are a question's turns. questions: whose prompt
    each is; None: each its own. None of fewer than 8 questions with a step. Simulated with equal questions, 88 % of the
    intervals hold the truth from 8 of them and 93 % from 20."""
    sums: dict[int, list[int]] = {}
    for stats, question in zip(each, range(len(each)) if questions is None else questions, strict=True):
        if stats.steps:
            own = sums.setdefault(question, [0, 0])
            own[0] += stats.steps
            own[1] += stats.accepted
    if len(sums) < LEAST:
        return None
    counts_P2 = torch.tensor(list(sums.values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn_RP = torch.randint(len(sums), (RESAMPLED, len(sums)), generator=generator)
    sums_R2 = counts_P2[drawn_RP].sum(1)
    taus_R = 1 + sums_R2[:, 1] / sums_R2[:, 0]
    tail = (1 - level) / 2
    return taus_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def grouped(each: Sequence[Stats], labels: Sequence[Hashable], questions: Sequence[int]) -> dict[str, dict[str, Any]]:
    """label -> prompts, steps, tokens per step and its interval, in the labels' order of appearance."""
    found = {}
    for label in dict.fromkeys(labels):
        mine = [i for i, own in enumerate(labels) if own == label]
        stats = [each[i] for i in mine]
        total = sum(stats, Stats())
        found[str(label)] = {
            "prompts": len(mine),
            "steps": total.steps,
            "tokens_per_step": total.tokens_per_step,
            "interval": interval(stats, [questions[i] for i in mine]),
        }
    return found


def by_context(each: Sequence[Stats], prompt_lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """ "64-127" -> steps and tokens per step of those that began with so many tokens of text, the root included."""
    steps, kept = [0] * len(EDGES), [0] * len(EDGES)
    for stats, length in zip(each, prompt_lengths, strict=True):
        text = length + 1
        for accepted in stats.kept:
            bucket = max(i for i, edge in enumerate(EDGES) if edge <= text)
            steps[bucket] += 1
            kept[bucket] += accepted
            text += accepted + 1
    return {
        (f"{low}-{high - 1}" if high else f"{low}-"): {"steps": steps[i], "tokens_per_step": 1 + kept[i] / steps[i]}
        for i, (low, high) in enumerate(zip(EDGES, (*EDGES[1:], None), strict=True))
        if steps[i]
    }


def split(stats: Stats) -> dict[str, float]:
    """Shares of the wall-clock time of decoding: prefill, draft, verify, bookkeeping."""
    total = stats.seconds or 1.0
    parts = (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds)
    return dict(zip(("prefill", "draft", "verify", "bookkeeping"), (part / total for part in parts), strict=True))
