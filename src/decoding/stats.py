"""What a run of speculative decoding did, as sums that can be merged over prompts and processes.

A step is one verification forward. Prefill and the token it gives are no step. tokens_per_step is
micro-averaged, 1 + accepted / steps over all steps together, and counts what verification accepted *before*
the end-of-text or length cut, as inference servers count. `emitted` is what the user received, after the cut.

acceptance_by_depth is *conditional*: entry k - 1 is P(depth k accepted | depth k - 1 accepted), where depth 0
is the root, accepted in every step. A depth that was not offered below the accepted token counts as not
accepted, so tokens_per_step = 1 + sum_k prod_{j <= k} a_j holds exactly, for trees and silent drafters too.
(Servers often print the *marginal* rate accepted_by_depth[k - 1] / steps instead.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass
class Stats:
    """Sums over steps. Entry k - 1 of the lists is depth k.

    accepted_by_depth: steps in which a drafted token of this depth was accepted.
    offered_by_depth: steps whose proposal had at least one token of this depth, reachable or not.
    kept: of every step, in order, how many drafted tokens were accepted.
    Seconds: prefill; drafting; the verification forward with lm_head and argmax; everything else of a step.
    """

    steps: int = 0
    emitted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    offered_by_depth: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    def record(self, offered: int, accepted: int) -> None:
        """Count one step whose proposal was `offered` deep and of which `accepted` tokens were kept."""
        self.steps += 1
        self.kept.append(accepted)
        while len(self.offered_by_depth) < offered:
            self.offered_by_depth.append(0)
            self.accepted_by_depth.append(0)
        for depth in range(offered):
            self.offered_by_depth[depth] += 1
        for depth in range(accepted):
            self.accepted_by_depth[depth] += 1

    def spend(self, draft: float, verify: float, other: float) -> None:
        """Seconds of one step."""
        self.draft_seconds += draft
        self.verify_seconds += verify
        self.other_seconds += other

    def __add__(self, other: Stats) -> Stats:
        sums = {name: _sum(mine, vars(other)[name]) for name, mine in vars(self).items() if name != "kept"}
        return Stats(**sums, kept=self.kept + other.kept)

    @property
    def accepted(self) -> int:
        """Accepted drafted tokens."""
        return sum(self.accepted_by_depth)

    @property
    def accepted_drafts_per_step(self) -> float:
        """tau - 1; 0.0 if there was no step."""
        return self.accepted / max(self.steps, 1)

    @property
    def tokens_per_step(self) -> float:
        """tau; 1.0 if there was no step."""
        return 1.0 + self.accepted_drafts_per_step

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Conditional acceptance; 0.0 at a depth whose parent depth was never accepted."""
        before = [self.steps, *self.accepted_by_depth]
        return [kept / max(of, 1) for kept, of in zip(self.accepted_by_depth, before, strict=False)]

    @property
    def seconds(self) -> float:
        """Wall time of everything, prefill included."""
        return self.prefill_seconds + self.draft_seconds + self.verify_seconds + self.other_seconds

    @property
    def draft_seconds_per_step(self) -> float:
        return self.draft_seconds / max(self.steps, 1)

    @property
    def verify_seconds_per_step(self) -> float:
        return self.verify_seconds / max(self.steps, 1)

    @property
    def other_seconds_per_step(self) -> float:
        return self.other_seconds / max(self.steps, 1)


def _sum(mine: Any, other: Any) -> Any:
    if isinstance(mine, list):
        return [a + b for a, b in zip_longest(mine, other, fillvalue=0)]
    return mine + other
