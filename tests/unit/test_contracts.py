"""The small behaviours of the nouns."""

import torch

from draftsmith.contracts import Batch, Capture, Needs
from draftsmith.growth import TreeShape
from draftsmith.roles import Verdict


def test_needs_add_up() -> None:
    both = Needs(frozenset({0, 2}), logits=True) | Needs(frozenset({2, 3}), final=True)
    assert both == Needs(frozenset({0, 2, 3}), final=True, logits=True)
    assert Needs() | Needs() == Needs()


def test_capture_at_reorders_every_part() -> None:
    final = torch.arange(12.0).view(1, 4, 3)
    seen = Capture({2: final + 100}, final, final + 200).at(torch.tensor([3, 1]))
    assert torch.equal(seen.final, final[:, [3, 1]])
    assert torch.equal(seen.hidden[2], final[:, [3, 1]] + 100)
    assert torch.equal(seen.logits, final[:, [3, 1]] + 200)
    empty = Capture().at(torch.tensor([0]))
    assert (empty.hidden, empty.final, empty.logits) == ({}, None, None)


def test_visible_is_own_document_up_to_oneself() -> None:
    documents = [[0, 0, 1, 1, -1, -1], [0, 1, 2, 2, 2, -1]]
    documents_BT = torch.tensor(documents)
    zeros = torch.zeros_like(documents_BT)
    visible = Batch(zeros, zeros, documents_BT, zeros.bool(), torch.zeros(3)).visible()
    want = [[[row[q] == row[s] and s <= q for s in range(6)] for q in range(6)] for row in documents]
    assert visible.tolist() == want
    assert visible.any(-1).all()  # no empty row, also in padding


def test_batch_moves_whole() -> None:
    zeros = torch.zeros(1, 2, dtype=torch.long)
    moved = Batch(zeros, zeros, zeros, zeros.bool(), torch.zeros(3), zeros.float()).to("meta")
    assert all(t.device.type == "meta" for t in vars(moved).values())
    assert Batch(zeros, zeros, zeros, zeros.bool(), torch.zeros(3)).to("meta").labels_BT is None


def test_tree_shape_and_verdict() -> None:
    shape = TreeShape(torch.tensor([-1, 0, 0, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 2, 0]))
    assert (shape.depth, shape.width) == (2, 3)
    assert Verdict(torch.tensor([0, 1, 3]), bonus=7).accepted == 2
