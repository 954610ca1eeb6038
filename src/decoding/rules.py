"""How a text's tokens come about: the base's own choice at every position, and by which rule drafts are kept.

Greedy: the best token. With a temperature, and top_k and top_p where given, every position has a uniform number of its
own, made from the seed before the first step, and the base's token there is the one at which its cumulative
distribution passes it. So what is emitted is a function of (seed, prompt) alone, the same with every drafter that
chooses its tokens, every tree and every gate. Drafts that are drawn are verified by speculative sampling, whose text is
another one of the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftsmith.decoding import verify
from draftsmith.errors import ConfigError
from draftsmith.growth import GREEDY, Draws, Warp, draw
from draftsmith.roles import Proposal, Verdict

DRAFTS = ("best", "iid", "distinct")
ACCEPTS = ("exact", "spectr", "typical")


@dataclass(frozen=True)
class Rules:
    """warp: of the base's distribution, and of a drafter's that draws. drafts: how a drafter picks tokens of a text
    with a temperature: its best ones, independent draws (iid), draws without replacement (distinct); None: its own
    way. accept: exact; spectr (of iid drafts; exact too); typical, which is lossy, with epsilon and delta.
    """

    warp: Warp = GREEDY
    drafts: Draws | Literal["best"] | None = None
    accept: Literal["exact", "spectr", "typical"] = "exact"
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if self.drafts is not None and self.drafts not in DRAFTS:
            raise ConfigError(f"drafts='{self.drafts}': choose {', '.join(DRAFTS)}, or null for the drafter's own way")
        if self.accept not in ACCEPTS:
            raise ConfigError(f"accept='{self.accept}': choose {', '.join(ACCEPTS)}")
        if self.accept == "spectr" and self.drafts != "iid":
            raise ConfigError("accept=spectr: selects among independent draws; give drafts=iid with it")
        if self.greedy and (self.accept != "exact" or self.drafts in ("iid", "distinct")):
            which = f"accept={self.accept}" if self.accept != "exact" else f"drafts={self.drafts}"
            raise ConfigError(f"{which}: of a sampled text; give decoding.temperature above 0 with it")
        if not 0 < self.epsilon <= 1 or not 0 < self.delta <= 1:
            raise ConfigError(f"epsilon={self.epsilon}, delta={self.delta}: give numbers above 0, at most 1")

    @property
    def greedy(self) -> bool:
        return not self.warp.temperature

    @property
    def lossy(self) -> bool:
        return self.accept == "typical"


class Chance:
    """The randomness of one text."""

    def __init__(self, rules: Rules, seed: int, positions: int, device: torch.device) -> None:
        self.rules = rules
        self.generator = None if rules.greedy else torch.Generator().manual_seed(seed)
        if not rules.greedy:
            self._uniform_T = torch.rand(positions, generator=self.generator, dtype=torch.float64).to(device)

    def choose(self, logits_NV: Tensor, positions: list[int]) -> Tensor:
        """The base's token after each position [N]: the lowest id of equal logits, or the one at which the cumulative
        distribution passes the position's number. (On a CPU, argmax gives the same as max but takes four times as
        long in bf16.)"""
        if self.rules.greedy:
            return logits_NV.max(-1).indices
        return draw(self.rules.warp.chances(logits_NV), self._uniform_T[positions])

    def verdict(self, proposal: Proposal, logits_NV: Tensor, positions: list[int]) -> Verdict:
        """What is kept of a proposal of a text with a temperature; positions: of its nodes."""
        rules = self.rules
        if rules.accept == "typical":
            chances_NV = rules.warp.chances(logits_NV)
            told = {"epsilon": rules.epsilon, "delta": rules.delta}
            return verify.typical(proposal, chances_NV, self.generator, **told)
        if proposal.drawn_NV is None:
            return verify.greedy(proposal, self.choose(logits_NV, positions))
        exact = verify.spectr if rules.accept == "spectr" else verify.recursive
        return exact(proposal, rules.warp.chances(logits_NV), self.generator)
