"""What of a proposal is kept. Pure functions: no model, no K/V; the randomness is the caller's generator."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.roles import Proposal, Verdict, draw


def greedy(proposal: Proposal, best_N: Tensor) -> Verdict:
    """Keep the longest path from the root on which every token is the base's own choice after its parent.

    best_N[n] is the base's argmax after node n. Siblings may carry the same token: of equally long paths the
    one whose last node comes first is kept. Plain lists, because a walk over at most some hundred nodes costs
    less than the tensor operations that would replace it.
    """
    tokens, parents, best = proposal.tokens_N.tolist(), proposal.parents_N.tolist(), best_N.tolist()
    reached = [0] + [-1] * (len(tokens) - 1)  # accepted tokens from the root to this node; -1 = not accepted
    last = 0
    for node in range(1, len(tokens)):
        parent = parents[node]
        if reached[parent] >= 0 and tokens[node] == best[parent]:
            reached[node] = reached[parent] + 1
            if reached[node] > reached[last]:
                last = node
    path = [last]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return Verdict(torch.tensor(path[::-1], device=best_N.device), best[last])


def drawn(proposal: Proposal, chances_NV: Tensor, generator: torch.Generator | None) -> Verdict:
    """Speculative sampling of a chain whose tokens were drawn (Leviathan et al. 2023, arXiv 2211.17192; Chen et al.
    2023, arXiv 2302.01318): y ~ q is kept with probability min(1, p(y) / q(y)), else the bonus is drawn from what p has
    over q; after the last one, from p. What is emitted is distributed as p, whatever q is.

    chances_NV: the base's distribution after each node. A proposal of a smaller vocabulary has nothing beyond it.
    """
    assert proposal.drawn_NV is not None
    tokens, nodes = proposal.tokens_N.tolist(), len(proposal.tokens_N)
    assert proposal.parents_N.tolist() == list(range(-1, nodes - 1)), "drawn tokens are verified in a chain"
    more = chances_NV.shape[1] - proposal.drawn_NV.shape[1]
    drawn_NV = torch.nn.functional.pad(proposal.drawn_NV.to(chances_NV.device, chances_NV.dtype), (0, more))
    kept, left_V = 0, chances_NV[-1]
    for node in range(1, nodes):
        p, q = chances_NV[node - 1, tokens[node]], drawn_NV[node, tokens[node]]
        if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q) >= float(p):
            left_V = (chances_NV[node - 1] - drawn_NV[node]).clamp(min=0)
            left_V = left_V if bool(left_V.any()) else chances_NV[node - 1]  # equal up to rounding
            break
        kept = node
    uniform_1 = torch.rand(1, generator=generator, dtype=torch.float64).to(left_V.device)
    bonus = int(draw(left_V[None], uniform_1))
    return Verdict(torch.arange(kept + 1, device=chances_NV.device), bonus)
