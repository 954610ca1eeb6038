"""N-grams of the base's own: what it thinks after two tokens, learned while it decodes. No training, no forward.

After Liu et al. 2024, "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED, arXiv
2407.12021): a trigram matrix stands for the base, drafts come from it, and every verification corrects it. Here a row
of weights belongs to the context (x_{t-1}, x_t), and one to x_t alone. When the base has read x_t, weights it had are
multiplied by `memory`, the probabilities of the base's best next tokens are added, and `text_weight` to the token
that did follow. So a row follows the base, and the text where it is no text of the base's. A draft's candidates are
those of the trigram, then those of the bigram times `backoff`, each row's weights first made to sum to 1 (the "stupid
back-off" of Brants et al. 2007).

Deviations. The paper starts from a matrix made of a corpus; here rows are made from the prompt on. The paper's draft
maker searches like MCTS with a bonus for what was tried rarely; here the decoding's tree is filled with the
weightiest, without a bonus: a tree has many siblings anyway, and what it refuses is read by the base too. The tokens
of a refused draft teach bigrams only. A context that was never read has no children where a whole level is of that
kind; else missing candidates are fillers, any ids, judged like all drafts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from draftsmith.contracts import BaseView, Needs
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.roles import Proposal, State

Weights = dict[int, float]  # next token -> weight, the weightiest first


@dataclass(frozen=True)
class NGramConfig:
    depth: int = 4
    candidates: int = 8  # next tokens kept per context; no tree can be wider below one node
    memory: float = 0.9  # what is left of a row's weights when the base reads the context again
    text_weight: float = 1.0  # of the token that followed in the text, beside the base's probabilities
    backoff: float = 0.4  # of a bigram's weights beside a trigram's

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"ngram.depth: {self.depth}; give at least 1 drafted token")
        if self.candidates < 1:
            raise ConfigError(f"ngram.candidates: {self.candidates}; keep at least 1 next token per context")
        if not 0 <= self.memory <= 1:
            raise ConfigError(f"ngram.memory: {self.memory}; give 0 (only the last reading) to 1 (all alike)")
        if not 0 <= self.text_weight < math.inf:
            raise ConfigError(f"ngram.text_weight: {self.text_weight}; give 0 (only the base's view) or more")
        if not 0 < self.backoff <= 1:
            raise ConfigError(f"ngram.backoff: {self.backoff}; give a number above 0, at most 1")


class NGram:
    """The rows belong to this object: made anew for a prompt it starts cold, kept from prompt to prompt it stays warm,
    and then what is drafted depends on the prompts before."""

    Config = NGramConfig
    lossy = False
    gated = True
    runs_base = False

    def __init__(self, config: NGramConfig) -> None:
        self.config = config
        self.needs = Needs(logits=True)
        self.max_depth = config.depth
        self._rows: dict[tuple[int, ...], Weights] = {}

    def ranked(self, context: tuple[int, int]) -> Weights:
        """Candidates after these two tokens, the weightiest first, `candidates` at most; {}: never read."""
        found: Weights = {}
        for row, scale in ((self._rows.get(context), 1.0), (self._rows.get(context[1:]), self.config.backoff)):
            if row:
                total = sum(row.values())
                found = {t: scale * w / total for t, w in row.items() if w > 0} | found
        return _weightiest(found, self.config.candidates)

    def update(self, state: State) -> None:
        """Learn from what the base has read since the last step, or from the prompt."""
        assert state.read is not None, "n-grams need the logits of the base's last forward"
        tokens_N, logits_NV = state.read
        read = _likeliest(logits_NV, self.config.candidates)
        for token, told in zip(tokens_N.tolist(), read, strict=True):
            self._learn((token,), told, self.config.memory)
        text, seen_AV = state.tokens, cast(Tensor, state.seen.logits)[0]
        # The accepted positions are all that was read, in its order, but where a draft was refused.
        accepted = read if len(seen_AV) == len(read) else _likeliest(seen_AV, self.config.candidates)
        for at, told in enumerate(accepted, start=len(text) - 1 - len(accepted)):
            said = (text[at + 1], self.config.text_weight)
            self._learn((text[at],), [said], 1.0)
            if at > 0:
                self._learn((text[at - 1], text[at]), [*told, said], self.config.memory)

    def _learn(self, context: tuple[int, ...], told: Iterable[tuple[int, float]], memory: float) -> None:
        row = {token: memory * weight for token, weight in self._rows.get(context, {}).items()}
        for token, weight in told:
            row[token] = row.get(token, 0.0) + weight
        self._rows[context] = _weightiest(row, self.config.candidates)

    def propose(self, base: BaseView, state: State) -> Proposal:
        self.update(state)
        logits_NV = cast(tuple[Tensor, Tensor], state.read)[1]
        asked = state.tokens[-1:]  # the tokens of those nodes whose children are chosen next

        def after(contexts: Sequence[tuple[int, int]], always: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
            rows = [self.ranked(context) for context in contexts]
            columns = min(self.config.candidates, logits_NV.shape[1])
            return _table(rows, columns, logits_NV.device) if rows and (always or any(rows)) else None

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, ...] | None:
            nonlocal asked
            expanded, of, tokens = level.expanded_A.tolist(), level.of_C.tolist(), tokens_C.tolist()
            contexts = [(asked[of[node]], tokens[node]) for node in expanded]
            asked = [tokens[node] for node in expanded]
            return after(contexts, state.drawn)  # what was drawn must not end the draft

        found = after([(state.tokens[-2], state.root)])
        if found is None:
            return Proposal(torch.tensor([state.root], device=logits_NV.device), torch.tensor([-1]))
        logits_1K, hidden_1D, ids_1K = found
        return fill(state, logits_1K[0], hidden_1D[0], deeper, ids_1K)


def _weightiest(weights: Weights, count: int) -> Weights:
    """The `count` largest in order; of equal ones the lower id first."""
    return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:count])


def _likeliest(logits_NV: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Of every row the `count` likeliest tokens and their probabilities."""
    logits_NV = logits_NV.float()
    best = logits_NV.topk(min(count, logits_NV.shape[1]), dim=-1)
    chances_NK = (best.values - logits_NV.logsumexp(-1, keepdim=True)).exp()
    pairs = zip(best.indices.tolist(), chances_NK.tolist(), strict=True)
    return [list(zip(ids, chances, strict=True)) for ids, chances in pairs]


def _table(rows: Sequence[Weights], columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [A, K], no hidden state [A, 0], ids [A, K]) of candidates; what a row lacks are fillers without
    probability, and a row that has nothing holds fillers of equal probability, since no distribution is empty."""
    ids, logits = [], []
    for row in rows:
        spare = (token for token in range(2 * columns) if token not in row)
        ids.append([*row, *(next(spare) for _ in range(columns - len(row)))])
        known = [math.log(weight) for weight in row.values()]
        logits.append([*known, *[-math.inf if known else 0.0] * (columns - len(known))])
    logits_AK = torch.tensor(logits, device=device)
    return logits_AK, logits_AK[:, :0], torch.tensor(ids, device=device)
