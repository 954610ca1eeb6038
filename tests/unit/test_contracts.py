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
    seen = Capture({2: zeros}, zeros, likeliest=(zeros, zeros))
    moved = Batch(zeros, zeros, zeros, zeros.bool(), torch.zeros(3), zeros.float(), seen).to("meta")
    found = vars(moved).pop("seen")
    assert all(t.device.type == "meta" for t in vars(moved).values())
    assert all(t.device.type == "meta" for t in (found.hidden[2], found.final, *found.likeliest))
    assert Batch(zeros, zeros, zeros, zeros.bool(), torch.zeros(3)).to("meta").labels_BT is None


def test_what_a_capture_holds_is_not_needed_and_the_rest_is() -> None:
    one = torch.zeros(1, 2, 3)
    needs = Needs(frozenset({1, 4}), final=True, logits=True, teacher=True)
    assert needs.beyond(Capture()) == needs
    assert needs.beyond(Capture({1: one}, final=one)) == Needs(frozenset({4}), logits=True)  # final teaches too
    assert needs.beyond(Capture({4: one}, likeliest=(one, one))) == Needs(frozenset({1}), final=True, logits=True)


def test_of_two_captures_the_first_has_the_say() -> None:
    one, two = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    both = Capture({1: one}, final=one) | Capture({1: two, 2: two}, final=two, logits=two)
    assert (both.hidden[1] is one, both.hidden[2] is two, both.final is one, both.logits is two) == (True,) * 4
    assert both.at(torch.tensor([1])).hidden[2].shape == both.row(0).at(torch.tensor([0])).final.shape == (1, 1, 3)


def test_tree_shape_and_verdict() -> None:
    shape = TreeShape(torch.tensor([-1, 0, 0, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 2, 0]))
    assert (shape.depth, shape.width) == (2, 3)
    assert Verdict(torch.tensor([0, 1, 3]), bonus=7).accepted == 2
