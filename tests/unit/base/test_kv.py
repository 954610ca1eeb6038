"""The K/V against a slow oracle: plain lists of slots."""

import random

import pytest
import torch

from draftsmith.base.kv import KV

LAYERS, ROWS, HEADS, DIM = 3, 2, 2, 4


class Oracle:
    """A list of (key, value, position) slots."""

    def __init__(self, slots=()):
        self.slots = list(slots)

    def crop(self, length):
        self.slots = self.slots[:length]

    def keep(self, start, path):
        self.slots = self.slots[:start] + [self.slots[start + i] for i in path]


def write(kv, oracle, count, generator):
    positions = torch.randint(0, 99, (ROWS, count), generator=generator)
    key = torch.randn(ROWS, HEADS, count, DIM, generator=generator)
    for layer in range(LAYERS):
        placed = kv.place(positions, layer)
        keys, values = kv.update(key + layer, -key - layer, layer)
    oracle.slots += [(key[:, :, i], positions[:, i]) for i in range(count)]
    expected = torch.stack([slot[0] for slot in oracle.slots], 2) + (LAYERS - 1)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)
    assert torch.equal(placed, torch.stack([slot[1] for slot in oracle.slots], 1))


def test_random_histories_equal_the_oracle():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(30):
        pairs = [(KV(LAYERS, capacity=2, windowed=True), Oracle())]
        for _ in range(12):
            kv, oracle = pairs[rng.randrange(len(pairs))]
            write(kv, oracle, rng.randint(1, 5), generator)
            length = kv.length
            assert length == len(oracle.slots)
            action = rng.choice(["crop", "fork", "keep", "none"])
            if action == "crop":
                to = rng.randint(0, length)
                kv.crop(to)
                oracle.crop(to)
            elif action == "fork":
                pairs.append((kv.fork(), Oracle(oracle.slots)))
            elif action == "keep":
                start = rng.randint(0, length)
                path = sorted(rng.sample(range(length - start), rng.randint(0, length - start)))
                kv.keep(start, torch.tensor(path, dtype=torch.long))
                oracle.keep(start, path)
            assert kv.length == len(oracle.slots)
        for kv, oracle in pairs:
            write(kv, oracle, 1, generator)


def test_grows_by_doubling_and_does_not_move_otherwise():
    kv, one = KV(1, capacity=4), torch.ones(1, 1, 1, 2)
    addresses = []
    for _ in range(9):
        keys, _ = kv.update(one, one, 0)
        addresses.append(keys.data_ptr())
    assert len(dict.fromkeys(addresses)) == 3
    assert kv._capacity == 16


def test_rollback_writes_nothing():
    kv, key = KV(1), torch.randn(1, 1, 6, 2)
    before, _ = kv.update(key, key, 0)
    kv.crop(2)
    assert kv.length == 2
    assert torch.equal(before, key)


def test_layers_may_differ_in_length():
    kv, key = KV(2), torch.randn(1, 1, 4, 2)
    for layer in range(2):
        kv.update(key, key, layer)
    kv.update(key[:, :, :3], key[:, :, :3], 0)
    assert (kv.get_seq_length(0), kv.get_seq_length(1), kv.length) == (7, 4, 4)
    kv.keep(4, torch.tensor([0, 2]))
    assert (kv.get_seq_length(0), kv.get_seq_length(1)) == (6, 4)
    kv.crop(kv.length)
    assert kv.get_seq_length(0) == 4


def test_keeping_an_unwritten_slot_is_refused():
    kv, key = KV(1), torch.randn(1, 1, 4, 2)
    kv.update(key, key, 0)
    with pytest.raises(AssertionError, match="4 in use"):
        kv.keep(2, torch.tensor([0, 2]))


def test_rows_cannot_change_between_forwards():
    kv = KV(1)
    kv.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
    with pytest.raises(AssertionError, match="rows"):
        kv.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
