"""Gates without parameters: the yardsticks of a trained one, and the bound of any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from draftsmith.errors import ConfigError
from draftsmith.roles import Partial, State

KINDS = ("fixed", "confidence", "oracle", "acceptance")


@dataclass(frozen=True)
class GateConfig:
    """threshold, min_depth: null = the trained gate's own."""

    kind: Literal["fixed", "confidence", "oracle", "acceptance"]
    depth: int = 4  # of `fixed`
    threshold: float | None = None
    min_depth: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind='{self.kind}': choose {', '.join(KINDS)}")
        if self.depth < 1:
            raise ConfigError(f"depth={self.depth}: give at least 1")
        if self.min_depth is not None and self.min_depth < 1:
            raise ConfigError(f"min_depth={self.min_depth}: give at least 1, or null")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold}: a probability between 0 and 1")
        if self.kind == "confidence" and self.threshold is None:
            raise ConfigError("threshold: null; gate=confidence wants the least probability of a draft to go on from")


@dataclass(frozen=True)
class Fixed:
    """Always the same number of levels."""

    depth: int

    def stop(self, state: State, partial: Partial) -> bool:
        return len(partial.levels) >= self.depth


@dataclass(frozen=True)
class Confidence:
    """Stops after a draft that the drafter itself holds for less likely than this (Kangaroo, arXiv 2404.18911)."""

    threshold: float

    def stop(self, state: State, partial: Partial) -> bool:
        return partial.surest < self.threshold


class Oracle:
    """Was told the text: stops as soon as nothing that can be gone on from will be kept. The bound of any gate that is
    asked once a level has been drafted."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)

    def stop(self, state: State, partial: Partial) -> bool:
        """partial.notes: per level, which of its nodes the text runs through [C]."""
        for n in range(len(partial.notes), len(partial.levels)):
            level, at = partial.levels[n], len(state.tokens) + n
            right_C = torch.zeros_like(partial.tokens[n], dtype=torch.bool)
            if at < len(self._text):
                right_C = partial.tokens[n] == self._text[at]
            partial.notes.append(right_C & partial.notes[n - 1][level.above_C] if n else right_C)
        return not bool(partial.notes[-1][partial.levels[-1].expanded_A].any())
