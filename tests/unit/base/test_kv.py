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


# Rows that go their own ways


@pytest.fixture
def poisoned():
    """Memory that nobody has written to holds NaN (torch.utils.deterministic.fill_uninitialized_memory). The public
    switch would import the compiler, for seconds."""
    torch._C._set_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(False)


class Batch:
    """A K/V of several rows beside the slow oracle: per row and layer a list of (key, position); values are the keys'
    negatives."""

    def __init__(self, lengths, rng, generator):
        self.kv, self.rng, self.generator = KV(LAYERS, capacity=4, windowed=True), rng, generator
        read = [self.new(max(lengths)) for _ in lengths]
        for layer in range(LAYERS):
            self.write(self.kv, layer, read)
        self.texts = [[layer[:n] for layer in row] for row, n in zip(read, lengths, strict=True)]

    @property
    def lengths(self):
        return [len(text[0]) for text in self.texts]

    def new(self, count):
        """[layer][slot] of one row; all layers stand at the same positions."""
        keys = torch.randn(LAYERS, count, HEADS, DIM, generator=self.generator)
        positions = torch.randint(0, 99, (count,), generator=self.generator).tolist()
        return [list(zip(layer, positions, strict=True)) for layer in keys]

    def write(self, kv, layer, rows):
        """A forward of one layer over these rows' slots; (keys, values, positions) of all that the layer has."""
        keys = torch.stack([torch.stack([key for key, _ in row[layer]], 1) for row in rows])
        placed = kv.place(torch.tensor([[at for _, at in row[layer]] for row in rows]), layer)
        return *kv.update(keys, -keys, layer), placed

    def step(self, entered, used=True):
        """Nodes of different number per row, the first `entered` layers run row by row; some of them are kept."""
        start, counts = self.kv.length, [self.rng.randint(1, 5) for _ in self.texts]
        nodes = [self.new(count) for count in counts]
        self.kv.reserve(start + max(counts) + 2)
        for b, count in enumerate(counts if entered else []):
            length, view = self.lengths[b], self.kv.row(b, self.lengths[b])
            drafted = self.new(count + 2)  # two more than are proposed
            path = sorted(self.rng.sample(range(count + 2), count))
            for layer in range(entered):
                holds(self.write(view, layer, [drafted]), 0, self.texts[b][layer] + drafted[layer])
            view.keep(length, torch.tensor(path))
            expected = [length + count if layer < entered else length for layer in range(LAYERS)]
            assert [view.get_seq_length(layer) for layer in range(LAYERS)] == expected
            nodes[b] = [[layer[i] for i in path] for layer in drafted]
        assert self.kv.length == start, "views have lengths of their own"
        if entered and used:
            for b, count in enumerate(counts):
                self.kv.adopt(b, self.lengths[b], start, count)
            self.kv.lengthen(entered, start + max(counts))
        fillers = [[layer[n:] for layer in self.new(max(counts))] for n in counts]
        padded = [[a + b for a, b in zip(*both, strict=True)] for both in zip(nodes, fillers, strict=True)]
        for layer in range(entered if used else 0, LAYERS):
            self.write(self.kv, layer, padded)
        assert [self.kv.get_seq_length(x) for x in range(LAYERS)] == [start + max(counts)] * LAYERS
        paths = [sorted(self.rng.sample(range(n), self.rng.randint(1, n))) for n in counts]
        self.kv.keep_rows(start, self.lengths, paths)
        for text, row, path in zip(self.texts, nodes, paths, strict=True):
            text[:] = [own + [layer[i] for i in path] for own, layer in zip(text, row, strict=True)]
        self.check()

    def leave(self, row):
        self.kv.leave(row)
        self.texts[row] = self.texts[-1]
        self.texts.pop()
        self.kv.crop(max(self.lengths))
        self.check()

    def check(self):
        """By what the next forward of every layer would see."""
        length = self.kv.length
        assert length == max(self.lengths)
        one = [self.new(1) for _ in self.texts]
        for layer in range(LAYERS):
            told = self.write(self.kv, layer, one)
            assert all(bool(t.isfinite().all()) for t in told[:2]), "NaN spoils attention where it is masked, too"
            for b, text in enumerate(self.texts):
                holds(told, b, text[layer])
        self.kv.crop(length)


def holds(told, row, slots):
    """Whether a layer has these slots at the front."""
    keys, values, positions = (t[row] for t in told)
    expected = torch.stack([key for key, _ in slots], 1)
    assert torch.equal(keys[:, : len(slots)], expected)
    assert torch.equal(values[:, : len(slots)], -expected)
    assert positions[: len(slots)].tolist() == [at for _, at in slots]


def test_random_histories_of_ragged_rows_equal_the_oracle(poisoned):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(30):
        batch = Batch([rng.randint(1, 9) for _ in range(rng.randint(1, 5))], rng, generator)
        for _ in range(6):
            batch.step(rng.randrange(LAYERS), used=rng.random() < 0.7)
            if len(batch.texts) > 1 and rng.random() < 0.5:
                batch.leave(rng.randrange(len(batch.texts)))


def written(rows, length, capacity=8, **more):
    kv = KV(LAYERS, capacity, **more)
    key = torch.randn(rows, HEADS, length, DIM, generator=torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        if kv.windowed:
            kv.place(torch.arange(length).repeat(rows, 1), layer)
        kv.update(key + layer, -key - layer, layer)
    return kv, key


def test_a_row_is_a_view_of_the_same_memory_with_lengths_of_its_own():
    kv, key = written(3, 5, windowed=True)
    view, one = kv.row(1, 3), torch.ones(1, HEADS, 1, DIM)
    assert view.windowed
    assert (view.length, kv.length) == (3, 5)
    assert view.place(torch.tensor([[70]]), 0).tolist() == [[0, 1, 2, 70]]
    keys, _ = view.update(one, 2 * one, 0)
    assert torch.equal(keys[0, :, :3], key[1, :, :3])
    assert (view.get_seq_length(0), view.length, kv.get_seq_length(0)) == (4, 3, 5)
    whole = kv.update(torch.zeros(3, HEADS, 1, DIM), torch.zeros(3, HEADS, 1, DIM), 0)
    assert torch.equal(whole[0][1, :, 3], one[0, :, 0])
    assert torch.equal(whole[1][1, :, 3], 2 * one[0, :, 0])
    assert torch.equal(whole[0][[0, 2], :, :5], key[[0, 2]])  # the other rows are as they were
    assert kv.place(torch.zeros(3, 1, dtype=torch.long), 1)[:, 3].tolist() == [3, 70, 3]


def test_a_view_has_no_memory_of_its_own_to_grow():
    kv, _ = written(2, 5)
    wide = torch.ones(1, HEADS, 4, DIM)
    with pytest.raises(AssertionError, match="9 slots were not reserved"):
        kv.row(0, 5).update(wide, wide, 0)
    kv.reserve(9)
    keys, _ = kv.row(0, 5).update(wide, wide, 0)
    assert keys.shape[2] == 9
    assert kv.length == 5


def test_reserving_moves_nothing_that_is_there_and_nothing_where_there_is_room():
    kv, key = written(2, 5, windowed=True)
    address = kv.row(0, 5).update(key[:1, :, :1], key[:1, :, :1], 0)[0].data_ptr()
    kv.reserve(8)
    assert kv.row(0, 5).update(key[:1, :, :1], key[:1, :, :1], 0)[0].data_ptr() == address
    kv.reserve(100)
    view = kv.row(1, 5)
    assert view.place(torch.tensor([[9]]), 0).tolist() == [[0, 1, 2, 3, 4, 9]]
    assert torch.equal(view.update(key[:1, :, :1], key[:1, :, :1], 0)[0][0, :, :5], key[1])
    assert kv.place(torch.zeros(2, 1, dtype=torch.long), 1)[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_adopted_slots_may_overlap_their_source():
    for source, target in ((2, 4), (4, 2), (3, 3)):
        kv, key = written(2, 8)
        kv.adopt(1, source, target, 4)
        keys = kv._keys[1]
        assert torch.equal(keys[1, :, target : target + 4], key[1, :, source : source + 4] + 1)
        assert torch.equal(keys[0], key[0] + 1)


def test_rows_that_leave_give_their_place_to_the_last():
    kv, key = written(4, 3, windowed=True)
    alive = [0, 1, 2, 3]
    for row in (1, 2, 0):
        kv.leave(row)
        alive[row] = alive[-1]
        alive.pop()
        one = torch.zeros(len(alive), HEADS, 1, DIM)
        assert torch.equal(kv.update(one, one, 0)[0][:, :, :3], key[alive])
        assert kv.place(torch.zeros(len(alive), 1, dtype=torch.long), 1).shape[0] == len(alive)
        kv.crop(3)


def test_slots_that_no_row_wrote_stay_finite(poisoned):
    """A row that entered with fewer nodes leaves holes below the longest text's slots; zeros times NaN would be NaN."""
    kv, _ = written(2, 5, capacity=4)
    kv.reserve(12)
    for b, (length, count) in enumerate(((5, 5), (2, 1))):
        one = torch.ones(1, HEADS, count, DIM)
        kv.row(b, length).update(one, one, 0)
        kv.adopt(b, length, 5, count)
    kv.lengthen(1, 10)
    one = torch.ones(2, HEADS, 5, DIM)
    for layer in range(1, LAYERS):
        kv.update(one, one, layer)
    kv.keep_rows(5, [5, 2], [[0, 1, 2, 3, 4], [0]])
    assert kv.length == 10
    for told in kv.update(one[:, :, :1], one[:, :, :1], 0):
        assert told.isfinite().all()
