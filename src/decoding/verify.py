"""What of a proposal is kept. Pure functions: no model, no K/V; the randomness is the caller's generator.

    greedy      drafts that are the base's own choice                         any proposal      exact
    recursive   speculative sampling, one sibling after the other             drawn proposals   exact
    spectr      speculative sampling, one threshold for all siblings          drawn "iid"       exact
    typical     drafts that are likely enough by the base's distribution      any proposal      lossy

Exact: the text is distributed as the base's own, whatever the drafter. chances_NV is the base's distribution after each
node, of the text's temperature, in fp64. A drawn proposal may have fewer columns; it has no probability beyond them.

Each node has one uniform number of its own, which decides about it, and the root's draws the bonus: all of them are
taken from the host's generator at once, so that a seed means the same on any device and however the walk goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftsmith.errors import ConfigError
from draftsmith.growth import draw, uniforms
from draftsmith.roles import Proposal, Verdict


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
    return Verdict(_path(parents, last, best_N.device), best[last])


def recursive(proposal: Proposal, chances_NV: Tensor, generator: torch.Generator | None) -> Verdict:
    """Speculative sampling of a drawn tree. After an accepted node its children are tried in their order: x ~ q is
    accepted with probability min(1, p(x) / q(x)), else p becomes what it has over q, norm(max(p - q, 0)), for the next
    of them. The bonus is drawn from what p is in the end.

    For one child it is the rule of Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318),
    for children drawn independently that of SpecInfer (Miao et al. 2023, arXiv 2305.09781), for those drawn without
    replacement that of RSD (Jeon et al. 2024, arXiv 2402.14160). A child that its own distribution has no chance for is
    passed over.
    """
    drawn = _Drawn(proposal, chances_NV, generator)

    def choose(node: int, siblings: list[int]) -> int | Tensor:
        left_V, refused = chances_NV[node], False
        for child in siblings:
            q = drawn.q[child]
            p = float(left_V[drawn.tokens[child]]) if refused else drawn.p[child]
            if q > 0:
                if drawn.uniform[child] * q < p:
                    return child
                left_V, refused = _without(left_V, drawn.drawn_NV[child]), True
        return left_V

    return drawn.walk(choose)


def spectr(proposal: Proposal, chances_NV: Tensor, generator: torch.Generator | None) -> Verdict:
    """SpecTr's k-sequential selection (Sun et al. 2023, arXiv 2310.15141) after every node with k children, all drawn
    from one q: they are accepted in their order with probability min(1, p(x) / (rho q(x))), one rho for all. One of
    them is with probability 1 - (1 - beta)^k, beta = sum min(p / rho, q); else the bonus is drawn from what p has over
    what they could have given, min(p / rho, q) (1 - (1 - beta)^k) / beta. For one child rho is 1: the ordinary rule.

    ConfigError: siblings were drawn from different distributions.
    """
    drawn = _Drawn(proposal, chances_NV, generator)

    def choose(node: int, siblings: list[int]) -> int | Tensor:
        p_V = chances_NV[node]
        if not siblings:
            return p_V
        q_W = drawn.drawn_NV[siblings[0]]
        if any(not torch.equal(q_W, drawn.drawn_NV[child]) for child in siblings[1:]):
            raise ConfigError(
                "accept=spectr: selects among independent draws, and these siblings were drawn without replacement; "
                "give drafts=iid with it, or accept=exact"
            )
        p_W = p_V[: len(q_W)]
        rho, given = selection(p_W, q_W, len(siblings))
        for child in siblings:
            if drawn.q[child] > 0 and drawn.uniform[child] * rho * drawn.q[child] < drawn.p[child]:
                return child
        return _without(p_V, torch.minimum(p_W / rho, q_W) * given)

    return drawn.walk(choose)


def selection(p_V: Tensor, q_V: Tensor, count: int) -> tuple[float, float]:
    """(rho, (1 - (1 - beta)^count) / beta) of k-sequential selection among `count` draws from q.

    rho is the least number in [1, count] for which 1 - (1 - beta)^count <= rho beta: no token is given more than p has
    of it. The left side falls with rho and the right side, sum min(p, rho q), rises. Between two neighbouring ratios
    p / q it is always the same tokens that give p / rho and the others q, so one sort finds the neighbours, and
    bisection between them needs the vocabulary no more. The upper end is returned: the rule is exact for every rho
    above the least, so precision costs no exactness.
    """
    if count == 1:
        return 1.0, 1.0
    less_V, more_V = torch.minimum(p_V, q_V), torch.minimum(p_V, count * q_V)  # the same for every rho in [1, count]
    has_V = less_V > 0
    ratio_V, order_V = (more_V[has_V] / less_V[has_V]).sort()
    p_V, q_V = more_V[has_V][order_V], less_V[has_V][order_V]
    upto_V, beyond_V = p_V.cumsum(0), q_V.flip(0).cumsum(0).flip(0) - q_V
    beta_V = upto_V / ratio_V + beyond_V
    first = int((1 - (1 - beta_V) ** count > ratio_V * beta_V).sum())  # at which the ratio itself is enough
    edges = torch.nn.functional.pad(torch.stack([ratio_V, upto_V, beyond_V + q_V]), (1, 1))[:, first : first + 2]
    (low, high), (upto, _), (_, beyond) = edges.tolist()
    low, high = max(low, 1.0), high or float(count)

    def given(rho: float) -> float:
        return sum((1 - upto / rho - beyond) ** tried for tried in range(count))

    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if given(middle) <= middle else (middle, high)
    return high, given(high)


def typical(
    proposal: Proposal,
    chances_NV: Tensor,
    generator: torch.Generator | None,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
) -> Verdict:
    """Medusa's typical acceptance (Cai et al. 2024, arXiv 2401.10774): a draft is accepted if the base gives it more
    than min(epsilon, delta exp(-H(p))) after its parent. The longest accepted path is kept, of equally long ones the
    likeliest; the bonus is drawn after it.

    Deviations: the entropy is that of the distribution the text is sampled from, after top-k and top-p; the bonus is
    drawn from it, where the published code takes its best token or draws from what the same bar leaves.

    Lossy: what is accepted depends on what was drafted, so the text is not distributed as the base's.
    """
    parents, device = proposal.parents_N.tolist(), chances_NV.device
    parents_C, tokens_C = proposal.parents_N[1:].to(device), proposal.tokens_N[1:].to(device)
    asked_A, of_C = parents_C.unique(return_inverse=True)
    bar_A = (delta * (-torch.special.entr(chances_NV[asked_A]).sum(-1)).exp()).clamp(max=epsilon)
    p_C = chances_NV[parents_C, tokens_C]
    accepted = [True, *(p_C > bar_A[of_C]).tolist()]
    rank = [(0, 0.0)] + [(-1, 0.0)] * (len(parents) - 1)  # (accepted drafts, their sum of log p) down to a node
    for node, log_p in enumerate(p_C.log().tolist(), start=1):
        depth, above = rank[parents[node]]
        if depth >= 0 and accepted[node]:
            rank[node] = (depth + 1, above + log_p)
    last = max(range(len(parents)), key=rank.__getitem__)
    bonus = draw(chances_NV[last, None], uniforms((1,), chances_NV, generator))
    return Verdict(_path(parents, last, device), int(bonus))


class _Drawn:
    """A drawn proposal as it is walked down. tokens, p, q, uniform: of each node, on the host at once; p is the base's
    probability of its token after its parent, q the drafter's."""

    def __init__(self, proposal: Proposal, chances_NV: Tensor, generator: torch.Generator | None) -> None:
        assert proposal.drawn_NV is not None, "only what was drawn can be verified by its distribution"
        self.drawn_NV = proposal.drawn_NV.to(chances_NV)
        self.tokens: list[int] = proposal.tokens_N.tolist()
        self.children: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(proposal.parents_N.tolist()[1:], start=1):
            self.children[parent].append(node)
        parents_C, tokens_C = (t[1:].to(chances_NV.device) for t in (proposal.parents_N, proposal.tokens_N))
        p_C, q_C = chances_NV[parents_C, tokens_C], self.drawn_NV[1:].gather(1, tokens_C[:, None])[:, 0]
        self.p, self.q = ([0.0, *row] for row in torch.stack([p_C, q_C]).tolist())
        self.uniform_N = uniforms((len(self.tokens),), torch.empty(0), generator)  # on the host
        self.uniform: list[float] = self.uniform_N.tolist()

    def walk(self, choose: Callable[[int, list[int]], int | Tensor]) -> Verdict:
        """choose(node, its children) -> the one that is accepted, or else the distribution of the bonus."""
        path = [0]
        while isinstance(chosen := choose(path[-1], self.children[path[-1]]), int):
            path.append(chosen)
        bonus = draw(chosen[None], self.uniform_N[:1].to(chosen.device))
        return Verdict(torch.tensor(path, device=chosen.device), int(bonus))


def _without(p_V: Tensor, given_W: Tensor) -> Tensor:
    """norm(max(p - given, 0)); p itself where rounding leaves nothing."""
    left_V = p_V.clone()
    left_V[: len(given_W)] -= given_W
    total = float(left_V.clamp_(min=0).sum())
    return left_V / total if total > 0 else p_V


def _path(parents: list[int], last: int, device: torch.device) -> Tensor:
    """The nodes from the root to `last`."""
    path = [last]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return torch.tensor(path[::-1], device=device)
