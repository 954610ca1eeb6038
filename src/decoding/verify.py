"""What of a proposal is kept. Pure functions: no model, no K/V, no randomness of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.contracts import Proposal, Verdict


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
