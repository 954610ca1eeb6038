"""The shift, against loops over positions."""

import random

import pytest
import torch

from draftsmith.targets import count_targets, counted_targets, future_tokens, lessons

CASES = 300


def slow_future(tokens: list[int], documents: list[int], k: int) -> list[tuple[int, bool]]:
    found = []
    for t, document in enumerate(documents):
        exists = t + k < len(tokens) and document >= 0 and documents[t + k] == document
        found.append((tokens[t + k] if exists else 0, exists))
    return found


def random_row(rng: random.Random, length: int) -> tuple[list[int], list[int], list[bool]]:
    """Tokens, documents one after the other (neighbours may be one token long) with padding behind, mask."""
    documents, document = [], 0
    while len(documents) < length:
        if rng.random() < 0.2:
            documents += [-1] * (length - len(documents))
        documents += [document] * rng.randint(1, 4)
        document += 1
    tokens = [rng.randint(1, 50) for _ in range(length)]
    return tokens, documents[:length], [rng.random() < 0.6 for _ in range(length)]


@pytest.mark.parametrize("seed", range(CASES))
def test_equals_the_loop(seed: int) -> None:
    rng = random.Random(seed)
    length, rows = rng.randint(1, 12), rng.randint(1, 3)
    made = [random_row(rng, length) for _ in range(rows)]
    tokens_BT, documents_BT, mask_BT = (torch.tensor([row[i] for row in made]) for i in range(3))
    horizon = length + 2  # beyond the row as well
    totals = []
    for k in range(horizon + 1):
        want = [slow_future(tokens, documents, k) for tokens, documents, _ in made]
        target_BT, valid_BT = future_tokens(tokens_BT, documents_BT, k)
        assert target_BT.tolist() == [[v for v, _ in row] for row in want]
        assert valid_BT.tolist() == [[e for _, e in row] for row in want]
        counted = [
            [exists and mask[t + k] for t, (_, exists) in enumerate(row)]
            for row, (_, _, mask) in zip(want, made, strict=True)
        ]
        same_BT, counted_BT = counted_targets(tokens_BT, mask_BT, documents_BT, k)
        assert torch.equal(same_BT, target_BT)
        assert counted_BT.tolist() == counted
        totals.append(sum(map(sum, counted)))
    counts_K = count_targets(mask_BT, documents_BT, horizon)
    assert counts_K.tolist() == totals
    assert counts_K.dtype == torch.int64


def test_counter_sequence() -> None:
    """§11.12: on x_t = t the label k ahead of t is t + k; for Medusa's head k that is t + 1 + k."""
    tokens_BT, documents_BT = torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.long)
    for head in (1, 2, 3):
        target_BT, valid_BT = future_tokens(tokens_BT, documents_BT, head + 1)
        assert target_BT[valid_BT].tolist() == [t + 1 + head for t in range(20 - 1 - head)]


def test_the_end_never_wraps() -> None:
    """§11.14: the last k positions have no target, and nothing comes back from the front."""
    tokens_BT, documents_BT = torch.arange(1, 9)[None], torch.zeros(1, 8, dtype=torch.long)
    for k in range(1, 12):
        target_BT, valid_BT = future_tokens(tokens_BT, documents_BT, k)
        assert not valid_BT[0, max(0, 8 - k) :].any()
        assert not target_BT[0, max(0, 8 - k) :].any()


def test_a_document_that_comes_back_is_another_row_of_no_concern() -> None:
    """Documents 0 0 1 1: from the end of 0, one ahead is 1's first token, which is no target."""
    target_BT, valid_BT = future_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]]), 1)
    assert target_BT.tolist() == [[6, 0, 8, 0]]
    assert valid_BT.tolist() == [[True, False, True, False]]


def test_the_past_and_the_far_future_are_not_read() -> None:
    """§11.13: the target at t depends on x_{t+k} alone."""
    torch.manual_seed(0)
    tokens_BT, documents_BT, k = torch.randint(50, (1, 10)), torch.zeros(1, 10, dtype=torch.long), 3
    before, _ = future_tokens(tokens_BT, documents_BT, k)
    for changed in range(10):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] += 1
        after, _ = future_tokens(other_BT, documents_BT, k)
        moved = (after != before).nonzero()[:, 1].tolist()
        assert moved == ([changed - k] if changed >= k else [])


def test_the_mask_selects_the_predicted_token() -> None:
    """A user's token that precedes an assistant's is a place to predict from; the reverse is not."""
    mask_BT = torch.tensor([[0, 0, 1, 1, 0, 0]])
    _, counted_BT = counted_targets(torch.arange(6)[None], mask_BT, torch.zeros(1, 6, dtype=torch.long), 2)
    assert counted_BT.tolist() == [[True, True, False, False, False, False]]


def test_looking_back_is_refused() -> None:
    with pytest.raises(ValueError, match="k=-1"):
        future_tokens(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), -1)


@pytest.mark.parametrize("seed", range(20))
def test_lessons_pair_every_student_with_the_distribution_of_its_token(seed: int) -> None:
    """Against loops: student k at t imitates the base at t + ahead[k], once per token that counts."""
    g = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(1, 50, (2, 14), generator=g)
    mask_BT = torch.rand(2, 14, generator=g) < 0.6
    documents_BT = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 3, [0] * 14])
    ahead = [0, 1, 3]
    found = lessons(tokens_BT, mask_BT, documents_BT, ahead)
    want: set[tuple[int, int, int, int]] = set()
    for k, a in enumerate(ahead):
        for b in range(2):
            for t in range(14 - a - 1):
                then = t + a + 1
                if documents_BT[b, t] == documents_BT[b, then] >= 0 and mask_BT[b, then]:
                    want.add((k, b * 14 + t, b * 14 + t + a, int(tokens_BT[b, then])))
    got = {
        (k, int(found.students_KN[k, n]), int(found.rows_N[n]), int(found.gold_N[n]))
        for k, n in found.counted_KN.nonzero().tolist()
    }
    assert got == want
    assert len(found.rows_N) == len({row for _, _, row, _ in want})
    laid = found.at_students(torch.ones_like(found.counted_KN), tokens_BT)
    assert {(k, b * 14 + t) for k, b, t in laid.nonzero().tolist()} == {(k, at) for k, at, _, _ in want}


def test_no_lesson_where_nothing_counts() -> None:
    tokens_BT = torch.zeros(1, 4, dtype=torch.long)
    found = lessons(tokens_BT, torch.zeros(1, 4, dtype=torch.bool), torch.zeros_like(tokens_BT), [0, 2])
    assert found.rows_N.shape == found.gold_N.shape == (0,)
    assert found.counted_KN.shape == (2, 0)
