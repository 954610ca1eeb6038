"""Many prompts answered together, for rows: prompts of similar length share a forward, padded on the left, and a
row that has ended leaves the batch.

Shapes: B rows of the batch, T positions of the longest prompt, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftsmith.contracts import Needs
from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM

LEAVE = 0.25  # the share of ended rows at which a batch is cut down to those still going


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"answer: max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p};"
                " needs max_new_tokens >= 0, temperature >= 0 and 0 < top_p <= 1"
            )


@torch.no_grad()
def answer(
    base: BaseLM, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], batch_size: int
) -> list[list[int]]:
    """New ids per prompt, in the caller's order: at most max_new_tokens, the end-of-text token kept.

    With a temperature every row samples with its own seed, so that its text does not depend on its neighbours
    (but for rounding). ConfigError if a prompt and its new tokens exceed the base's positions; DataError for an
    empty prompt.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"answer: prompt {i} is empty; give it at least one token")
        if len(prompt) + sampling.max_new_tokens > base.spec.max_positions:
            raise ConfigError(
                f"max_new_tokens: prompt {i} has {len(prompt)} tokens, {sampling.max_new_tokens} more exceed the"
                f" base's {base.spec.max_positions} positions; shorten either"
            )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order) if sampling.max_new_tokens else 0, batch_size):
        rows = order[first : first + batch_size]
        draws = [torch.Generator().manual_seed(seeds[i]) for i in rows] if sampling.temperature else []
        for i, ids in zip(rows, _batch(base, [prompts[i] for i in rows], sampling, draws), strict=True):
            out[i] = ids
    return out


def _batch(
    base: BaseLM, prompts: list[Sequence[int]], sampling: Sampling, draws: list[torch.Generator]
) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    tokens_BT, real_BS = _padded(prompts, base.device)
    positions_BT = (real_BS.cumsum(1) - 1).clamp(min=0)
    going = list(range(len(prompts)))  # which prompts the rows of the batch are
    kv = base.new_kv(capacity=tokens_BT.shape[1] + sampling.max_new_tokens)
    wanted = Needs(final=True)
    slots = torch.arange(tokens_BT.shape[1], device=base.device)
    mask_BQS = real_BS[:, None, :] & (slots[:, None] >= slots[None, :])
    while True:
        seen = base.capture(wanted, tokens_BT, positions_BQ=positions_BT, mask_BQS=mask_BQS, kv=kv)
        assert seen.final is not None
        next_B = _pick(base.lm_head(seen.final[:, -1]), sampling, [draws[i] for i in going] if draws else [])
        picked = next_B.tolist()
        for row, token in zip(going, picked, strict=True):
            if not _ended(out[row], sampling, base.eos_ids):
                out[row].append(token)
        stay = [b for b, row in enumerate(going) if not _ended(out[row], sampling, base.eos_ids)]
        if not stay:
            return out
        positions_BT = positions_BT[:, -1:] + 1
        if len(stay) <= (1 - LEAVE) * len(going):
            rows_A = torch.tensor(stay, device=base.device)
            kv.select(rows_A)
            next_B, positions_BT, real_BS = next_B[rows_A], positions_BT[rows_A], real_BS[rows_A]
            going = [going[b] for b in stay]
        positions_BT = positions_BT.clamp(max=base.spec.max_positions - 1)  # of rows that ended but have not left
        tokens_BT = next_B[:, None]
        real_BS = torch.cat([real_BS, real_BS.new_ones(len(going), 1)], 1)
        mask_BQS = real_BS[:, None, :]


def _ended(ids: list[int], sampling: Sampling, eos_ids: frozenset[int]) -> bool:
    return len(ids) >= sampling.max_new_tokens or (bool(ids) and ids[-1] in eos_ids)


def _padded(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens_BT, real_BT): padded on the left with id 0."""
    longest = max(map(len, prompts))
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    real_BT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        tokens_BT[b, longest - len(prompt) :] = torch.tensor(prompt)
        real_BT[b, longest - len(prompt) :] = True
    return tokens_BT.to(device), real_BT.to(device)


def _pick(logits_BV: Tensor, sampling: Sampling, draws: list[torch.Generator]) -> Tensor:
    """The next token of every row: the largest logit; or, with a temperature, the largest of the scaled
    log-probabilities plus independent Gumbel noise, which is an exact sample of them."""
    if not draws:
        return logits_BV.argmax(-1)
    scores_BV = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = scores_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()  # the mass of the better ones
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p, float("-inf"))
        scores_BV = torch.empty_like(scores_BV).scatter_(-1, order_BV, sorted_BV)
    noise = [-torch.empty(scores_BV.shape[1]).exponential_(generator=g).log() for g in draws]
    return (scores_BV + torch.stack(noise).to(scores_BV.device)).argmax(-1)
