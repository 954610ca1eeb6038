"""A toy base whose next token depends on every token it attends to, on where each stands and on where it
stands itself. A wrong mask, position or K/V slot therefore changes the logits. Its context sums are integers
in fp64, so two forwards of different shape agree bit for bit."""

from dataclasses import dataclass

import pytest
import torch

from draftsmith.contracts import BaseSpec, Capture, Needs
from draftsmith.decoding import goodness
from draftsmith.roles import Proposal

WIDTH = 12


@dataclass
class ToyKV:
    tokens_S: torch.Tensor
    positions_S: torch.Tensor

    @property
    def length(self):
        return len(self.tokens_S)

    def crop(self, length):
        assert 0 <= length <= self.length
        self.tokens_S, self.positions_S = self.tokens_S[:length], self.positions_S[:length]

    def fork(self):
        return ToyKV(self.tokens_S.clone(), self.positions_S.clone())

    def keep(self, start, path_A):
        assert path_A.tolist() == sorted(set(path_A.tolist()))
        kept = torch.cat([torch.arange(start), start + path_A])
        self.tokens_S, self.positions_S = self.tokens_S[kept], self.positions_S[kept]


class ToyBase:
    def __init__(self, vocab=7, seed=0, max_positions=64):
        self.spec = BaseSpec("toy", WIDTH, WIDTH, vocab, 2, 1, 1, WIDTH, max_positions)
        g = torch.Generator().manual_seed(seed)
        # whom it sees (token, position there, position here) -> integers; then a fixed non-linear read-out
        self.table = torch.randint(-9, 10, (vocab, max_positions, max_positions, WIDTH), generator=g).double()
        self.lm_head_weight = torch.randn(vocab, WIDTH, generator=g, dtype=torch.float64)
        self.lm_head_bias = None
        self.forwards, self.head_rows = [], []  # what was asked of it, for the tests

    def new_kv(self):
        return ToyKV(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))

    def lm_head(self, final_BTD):
        self.head_rows.append(final_BTD.shape[1])
        return final_BTD @ self.lm_head_weight.T

    def capture(self, needs, tokens_BQ, *, positions_BQ=None, mask_BQS=None, kv=None, entered=None):
        assert entered is None, "the toy has no blocks to enter between"
        kv = kv if kv is not None else self.new_kv()
        tokens_Q, before = tokens_BQ[0], kv.length
        count = len(tokens_Q)
        positions_Q = before + torch.arange(count) if positions_BQ is None else positions_BQ[0]
        assert positions_Q.max() < self.spec.max_positions
        kv.tokens_S = torch.cat([kv.tokens_S, tokens_Q])
        kv.positions_S = torch.cat([kv.positions_S, positions_Q])
        if mask_BQS is None:
            mask_BQS = torch.ones(1, count, before + count, dtype=torch.bool).tril(before)
        assert mask_BQS.shape == (1, count, before + count)
        self.forwards.append(count)
        seen_QSD = self.table[kv.tokens_S[None], kv.positions_S[None], positions_Q[:, None]]
        final_BTD = ((seen_QSD * mask_BQS[0, :, :, None]).sum(1)[None] % 17) - 8
        return Capture(
            {layer: final_BTD + 100 * layer for layer in needs.hidden},
            final_BTD if needs.final else None,
            self.lm_head(final_BTD) if needs.logits else None,
        )

    def logits(self, tokens):
        """Logits [V] for the token after `tokens`, by one plain causal forward."""
        return self.capture(Needs(logits=True), torch.tensor([list(tokens)])).logits[0, -1]

    def continuation(self, prompt, count):
        """The answer, without engine, K/V or mask: the base's greedy tokens, each from a whole forward."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logits(text).argmax()))
        return text[len(prompt) :]


class Scripted:
    """A drafter that fills each node by fill(state, path of tokens above it, node) and records its states."""

    lossy = gated = runs_base = False

    def __init__(self, fill, max_depth=8, needs=None):
        self.fill, self.max_depth, self.needs = fill, max_depth, needs or Needs()
        self.states = []

    def propose(self, base, state):
        self.states.append((list(state.tokens), state.root, state.seen))
        parents, tokens, above = state.shape.parents_N.tolist(), [state.root], [[state.root]]
        for node in range(1, len(parents)):
            tokens.append(self.fill(state, above[parents[node]], node))
            above.append([*above[parents[node]], tokens[node]])
        return Proposal(torch.tensor(tokens), state.shape.parents_N)


@pytest.fixture
def toy_base():
    return ToyBase


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def chance_of():
    """The p-value of counts against what they are to follow."""

    def chance(counts, expected):
        assert len(goodness.pooled(counts, expected)[0]) > 3, "too few counts to tell anything"
        return goodness.chi_square(counts, expected)

    return chance
