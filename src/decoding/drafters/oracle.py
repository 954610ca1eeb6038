"""A drafter that was told the answer: every token it drafts is right, so tokens per step are depth + 1.

The upper bound of any drafter of that depth, with a drafting cost of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.contracts import BaseView, Needs
from draftsmith.decoding.tree import chain
from draftsmith.errors import ConfigError
from draftsmith.roles import Proposal, State


@dataclass(frozen=True)
class OracleConfig:
    depth: int = 4

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"oracle.depth: {self.depth}; give at least 1 drafted token")


class Oracle:
    """`text` is the prompt and its whole continuation; beyond its end nothing is drafted."""

    Config = OracleConfig
    lossy = False
    gated = False
    runs_base = False

    def __init__(self, config: OracleConfig, text: Sequence[int]) -> None:
        self.config = config
        self.needs = Needs()
        self.max_depth = config.depth
        self._text = list(text)
        self._parents_N = chain(config.depth).parents_N

    def propose(self, base: BaseView, state: State) -> Proposal:
        start = len(state.tokens)
        drafted = self._text[start : start + min(self.config.depth, state.shape.depth)]
        return Proposal(torch.tensor([state.root, *drafted]), self._parents_N[: 1 + len(drafted)])
