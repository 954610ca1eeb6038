"""Prompt look-up: what followed the last time these tokens stood here? No training, no forward.

The longest suffix of the tokens so far, from max_ngram down to min_ngram tokens, that also occurs earlier; of
its earlier occurrences the most recent; the tokens after that one become a chain. The copy may run into the
tokens it has just drafted (as in LZ77), so a text that repeats itself is drafted to full depth.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from draftsmith.contracts import BaseView, Needs
from draftsmith.decoding.tree import chain
from draftsmith.errors import ConfigError
from draftsmith.roles import Proposal, State


@dataclass(frozen=True)
class PromptLookupConfig:
    depth: int = 4
    max_ngram: int = 3
    min_ngram: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"prompt_lookup.depth: {self.depth}; give at least 1 drafted token")
        if self.min_ngram < 1:
            raise ConfigError(f"prompt_lookup.min_ngram: {self.min_ngram}; give at least 1 token to match")
        if self.max_ngram < self.min_ngram:
            raise ConfigError(
                f"prompt_lookup.max_ngram: {self.max_ngram} is below min_ngram={self.min_ngram}; raise it"
            )


class PromptLookup:
    Config = PromptLookupConfig
    lossy = False
    gated = False
    runs_base = False

    def __init__(self, config: PromptLookupConfig) -> None:
        self.config = config
        self.needs = Needs()
        self.max_depth = config.depth
        self._parents_N = chain(config.depth).parents_N

    def propose(self, base: BaseView, state: State) -> Proposal:
        drafted = look_up(state.tokens, min(self.config.depth, state.shape.depth), self.config)
        return Proposal(torch.tensor([state.root, *drafted]), self._parents_N[: 1 + len(drafted)])


def look_up(tokens: list[int], depth: int, config: PromptLookupConfig) -> list[int]:
    """The `depth` tokens to draft after `tokens`, or none. Searches bytes: the search then runs in C."""
    text = array("q", tokens)
    width, raw = text.itemsize, text.tobytes()
    for n in range(min(config.max_ngram, len(tokens) - 1), config.min_ngram - 1, -1):
        suffix, end = raw[-n * width :], len(raw) - width  # an earlier occurrence ends before the last token
        while (found := raw.rfind(suffix, 0, end)) >= 0:
            if found % width == 0:
                copy = tokens[found // width + n :]
                return [copy[k % len(copy)] for k in range(depth)]
            end = found + len(suffix) - 1  # the bytes match across a token's edge: look further to the left
    return []
