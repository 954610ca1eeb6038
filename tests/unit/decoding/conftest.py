"""A toy base whose next token depends on every token it attends to, on where each stands and on where it
stands itself. A wrong mask, position or K/V slot therefore changes the logits. Its context sums are integers
in fp64, so two forwards of different shape agree bit for bit, and so do a row alone and the same row in a batch."""

import pytest
import torch

from draftsmith.contracts import BaseSpec, Capture, Needs
from draftsmith.decoding import goodness
from draftsmith.drafting import fill
from draftsmith.roles import Proposal

WIDTH, LAYERS, SLOTS = 12, 2, 256


class ToyKV:
    """contracts.KV, a tensor per layer and row: what the layer read in every slot, and its position there. Stricter
    than the real one: a slot that was never written, or that a row forgot, holds NaN, and a view may not write where no
    room was reserved."""

    def __init__(self, memory=()):
        self.memory = memory or [[] for _ in range(LAYERS)]  # [layer][row] -> [SLOTS, WIDTH + 1]
        self.lengths, self.room, self.is_view = [0] * LAYERS, 0, False

    @property
    def length(self):
        return min(self.lengths)

    def write(self, layer, read_BQD, positions_BQ):
        if not self.memory[layer]:
            self.memory = [[nothing(SLOTS) for _ in read_BQD] for _ in range(LAYERS)]
        assert len(read_BQD) == len(self.memory[layer]), "not the rows of the first forward"
        start, stop = self.lengths[layer], self.lengths[layer] + read_BQD.shape[1]
        assert not self.is_view or stop <= self.room, "a view wrote where no room was reserved"
        for slots, read_QD, positions_Q in zip(self.memory[layer], read_BQD, positions_BQ, strict=True):
            slots[start:stop, :WIDTH], slots[start:stop, WIDTH] = read_QD, positions_Q.double()
        self.lengths[layer], self.room = stop, max(self.room, stop)

    def crop(self, length):
        assert length >= 0
        self.lengths = [min(n, length) for n in self.lengths]

    def fork(self):
        copy = ToyKV([[slots.clone() for slots in layer] for layer in self.memory])
        copy.lengths = list(self.lengths)
        return copy

    def keep(self, start, path_A):
        path = path_A.tolist()
        assert path == sorted(set(path))
        for layer, length in enumerate(self.lengths):
            if length > start:
                assert not path or start + path[-1] < length
                for slots in self.memory[layer]:
                    slots[start : start + len(path)] = slots[start + path_A]
                self.lengths[layer] = start + len(path)

    def row(self, row, length):
        view = ToyKV([[layer[row]] for layer in self.memory])
        view.lengths, view.room, view.is_view = [length] * LAYERS, self.room, True
        return view

    def reserve(self, slots):
        self.room = max(self.room, slots)

    def adopt(self, row, source, target, count):
        for layer in self.memory:
            layer[row][target : target + count] = layer[row][source : source + count].clone()

    def lengthen(self, layers, length):
        self.lengths[:layers] = [length] * layers

    def keep_rows(self, start, lengths, paths):
        assert len(lengths) == len(paths) == len(self.memory[0])
        for layer in self.memory:
            for slots, length, path in zip(layer, lengths, paths, strict=True):
                kept = slots[start + torch.tensor(path)]
                slots[length:] = torch.nan
                slots[length : length + len(path)] = kept
        self.lengths = [max(n + len(path) for n, path in zip(lengths, paths, strict=True))] * LAYERS

    def leave(self, row):
        for layer in self.memory:
            layer[row] = layer[-1]
            layer.pop()


def nothing(slots):
    return torch.full((slots, WIDTH + 1), torch.nan, dtype=torch.float64)


class ToyBase:
    """deep: its second block attends as well; otherwise it reads its own position alone."""

    def __init__(self, vocab=7, seed=0, max_positions=64, deep=False):
        self.spec = BaseSpec("toy", WIDTH, WIDTH, vocab, LAYERS, 1, 1, WIDTH, max_positions)
        g = torch.Generator().manual_seed(seed)
        # whom it sees (token, position there, position here) -> integers; then a fixed non-linear read-out
        self.table = torch.randint(-9, 10, (vocab, max_positions, max_positions, WIDTH), generator=g).double()
        self.lm_head_weight = torch.randn(vocab, WIDTH, generator=g, dtype=torch.float64)
        self.lm_head_bias = None
        self.second = torch.randint(-9, 10, (max_positions,) * 2, generator=g).double() if deep else None
        self.forwards, self.head_rows = [], []  # what was asked of it, for the tests

    def new_kv(self):
        return ToyKV()

    def embed(self, tokens_BT):
        """The token itself, in every column."""
        return tokens_BT[..., None].expand(*tokens_BT.shape, WIDTH).double()

    def final_norm(self, hidden_BTD):
        return hidden_BTD - 8

    def lm_head(self, final_BTD):
        self.head_rows.append(final_BTD.shape[1])
        return final_BTD @ self.lm_head_weight.T

    def run_layers(self, hidden_BQD, start, stop, *, positions_BQ, mask_BQS=None, kv=None):
        kv, (rows, count) = kv if kv is not None else self.new_kv(), hidden_BQD.shape[:2]
        positions_BQ = positions_BQ.expand(rows, -1)
        assert positions_BQ.max() < self.spec.max_positions
        for layer in range(start, stop):
            past, mask = kv.lengths[layer], mask_BQS
            if mask is None:
                mask = torch.ones(1, count, past + count, dtype=torch.bool).tril(past)
            assert mask.dtype == torch.bool
            assert mask.shape in {(1, count, past + count), (rows, count, past + count)}
            kv.write(layer, hidden_BQD, positions_BQ)
            if layer == 0 or self.second is not None:
                held = [slots[: past + count] for slots in kv.memory[layer]]
                seen = [
                    self.attend(layer, *each)
                    for each in zip(held, positions_BQ, mask.expand(rows, -1, -1), strict=True)
                ]
                hidden_BQD = (torch.stack(seen) + (hidden_BQD if layer else 0)) % 17
        return hidden_BQD

    def attend(self, layer, slots_S, positions_Q, mask_QS):
        read_SD, holes_S = slots_S[:, :WIDTH].nan_to_num(0), slots_S[:, WIDTH].isnan()
        assert not (mask_QS & holes_S).any(), "someone sees a slot that holds nothing"
        positions_S = slots_S[:, WIDTH].nan_to_num(0).long()
        if layer == 0:
            seen_QSD = self.table[read_SD[:, 0].long()[None], positions_S[None], positions_Q[:, None]]
        else:
            seen_QSD = read_SD * self.second[positions_S[None], positions_Q[:, None]][..., None]
        return (seen_QSD * mask_QS[..., None]).sum(1)

    def capture(self, needs, tokens_BQ, *, positions_BQ=None, mask_BQS=None, kv=None, entered=None):
        """As the real one: stops after the last block that is needed, begins after the block that was entered."""
        kv = kv if kv is not None else self.new_kv()
        begin, hidden_BQD = (0, self.embed(tokens_BQ)) if entered is None else entered
        assert min(needs.hidden, default=begin) >= begin, "hidden of a block that was not run"
        assert hidden_BQD.shape[:2] == tokens_BQ.shape
        if positions_BQ is None:
            positions_BQ = kv.lengths[0] + torch.arange(tokens_BQ.shape[1])[None]
        top = LAYERS if needs.final or needs.logits else max(needs.hidden, default=0)
        self.forwards.append(tokens_BQ.shape[1])
        hidden = {begin: hidden_BQD}
        for layer in range(begin, top):
            where = {"positions_BQ": positions_BQ, "mask_BQS": mask_BQS, "kv": kv}
            hidden[layer + 1] = self.run_layers(hidden[layer], layer, layer + 1, **where)
        final_BQD = self.final_norm(hidden[LAYERS]) if top == LAYERS else None
        return Capture(
            {layer: hidden[layer] for layer in needs.hidden},
            final_BQD if needs.final else None,
            self.lm_head(final_BQD) if needs.logits else None,
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


class Tabled:
    """Fills its shape level by level from a table of its own under the state's gate; its own way is to draw."""

    gated, runs_base = True, False
    needs, max_depth = Needs(), 4

    def __init__(self, vocab, seed=0, scale=10.0):
        g = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(vocab, vocab, generator=g, dtype=torch.float64)

    def propose(self, base, state):
        def deeper(level, tokens_C):
            below = tokens_C[level.expanded_A]
            return (self.table[below], torch.zeros(len(below), 1)) if len(below) else None

        return fill(state, self.table[state.root], torch.zeros(1), deeper, draws="iid")


@pytest.fixture
def toy_base():
    return ToyBase


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def tabled():
    return Tabled


@pytest.fixture
def chance_of():
    """The p-value of counts against what they are to follow."""

    def chance(counts, expected):
        assert len(goodness.pooled(counts, expected)[0]) > 3, "too few counts to tell anything"
        return goodness.chi_square(counts, expected)

    return chance
