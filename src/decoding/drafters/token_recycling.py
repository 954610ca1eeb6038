"""Token recycling: what the base last thought after this token is what it may think again. No training, no forward.

Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(arXiv 2408.08696). A matrix keeps, for every token of the vocabulary, the k tokens that the base held for likeliest
after it when it last read it, in the prompt, in the text or in a draft that was refused. A draft tree is that matrix
followed from the root downwards.

Deviations. The paper searches breadth-first over one static tree of 80 nodes; here the tree is whatever the decoding
asks for. The k logits are kept beside the k tokens, so that trees which grow by probability, and drawing, have a
distribution over those k. A token that the base never read has no children where a whole level is of that kind;
beside others it gets k fillers, any ids, equally likely and judged like all drafts. (The published matrix starts
at zeros and drafts token 0 there.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.contracts import BaseView, Needs
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.roles import Proposal, State


@dataclass(frozen=True)
class TokenRecyclingConfig:
    depth: int = 6
    candidates: int = 8  # k: next tokens kept per token; no tree can be wider below one node

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"token_recycling.depth: {self.depth}; give at least 1 drafted token")
        if self.candidates < 1:
            raise ConfigError(f"token_recycling.candidates: {self.candidates}; keep at least 1 next token per token")


class TokenRecycling:
    """The matrix belongs to this object: made anew for a prompt it starts cold, kept from prompt to prompt it stays
    warm (the paper's hot start), and then what is drafted depends on the prompts before."""

    Config = TokenRecyclingConfig
    lossy = False
    gated = True
    runs_base = False

    def __init__(self, config: TokenRecyclingConfig) -> None:
        self.config = config
        self.needs = Needs(logits=True)
        self.max_depth = config.depth
        self._matrix: tuple[Tensor, Tensor, Tensor] | None = None  # ids_VK, logits_VK, known_V

    def update(self, tokens_N: Tensor, logits_NV: Tensor) -> None:
        """Remember what the base thinks after each of these tokens; of equal tokens the last one counts."""
        (nodes, vocabulary), device = logits_NV.shape, logits_NV.device
        if self._matrix is None:
            ids_K = torch.arange(min(self.config.candidates, vocabulary), device=device)
            unknown_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._matrix = ids_K.repeat(vocabulary, 1), torch.zeros(vocabulary, len(ids_K), device=device), unknown_V
        ids_VK, logits_VK, known_V = self._matrix
        # To write a row twice at once leaves either there, on a GPU, so the last occurrence is sought first.
        last_V = tokens_N.new_full((vocabulary,), -1)
        last_V.scatter_reduce_(0, tokens_N, torch.arange(nodes, device=device), "amax")
        read_A = (last_V >= 0).nonzero()[:, 0]
        best = logits_NV[last_V[read_A]].float().topk(ids_VK.shape[1], dim=-1)
        ids_VK[read_A], logits_VK[read_A], known_V[read_A] = best.indices, best.values, True

    def propose(self, base: BaseView, state: State) -> Proposal:
        assert state.read is not None, "token recycling needs the logits of the base's last forward"
        self.update(*state.read)
        root = torch.tensor([state.root], device=state.read[1].device)
        found = self._after(root)
        if found is None:
            return Proposal(root, torch.tensor([-1]))

        drawn = state.drawn  # then what was drawn must not end the draft

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, ...] | None:
            return self._after(tokens_C[level.expanded_A], drawn) if len(level.expanded_A) else None

        logits_1K, hidden_1D, ids_1K = found
        return fill(state, logits_1K[0], hidden_1D[0], deeper, ids_1K)

    def _after(self, tokens_A: Tensor, always: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
        """(logits [A, K], no hidden state [A, 0], ids [A, K]); None where the base has read none of these tokens,
        unless an answer is wanted always."""
        assert self._matrix is not None
        ids_VK, logits_VK, known_V = self._matrix
        if not always and not bool(known_V[tokens_A].any()):
            return None
        logits_AK = logits_VK[tokens_A]
        return logits_AK, logits_AK[:, :0], ids_VK[tokens_A]
