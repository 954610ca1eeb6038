"""One text, step by step: the pieces add up to the text, and the counts are those of the statistics."""

import pytest

from draftsmith.decoding import samples, tree
from draftsmith.decoding.engine import generate
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.samples import Step

PROMPT = [1, 2, 3]


def sometimes(truth):
    """Right but for every third token of the text."""
    return lambda state, path, node: truth(state, path) if (len(state.tokens) + len(path)) % 3 else 0


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_steps_add_up_to_the_text_and_to_the_counts(toy_base, scripted, count):
    base = toy_base()
    answer = [*PROMPT, *base.continuation(PROMPT, 30)]
    draft = sometimes(lambda state, path: answer[len(state.tokens) + len(path) - 1])
    how = {"max_new_tokens": count, "eos_ids": frozenset()}
    steps = samples.steps_of(
        base, PROMPT, Contender(lambda p, a: scripted(draft, 4), tree.chain(4)), rules=Rules(), **how
    )
    out = generate(base, PROMPT, drafter=scripted(draft, 4), shape=tree.chain(4), **how)
    text = [n for s in steps for n in (*s.accepted, *([] if s.own is None else [s.own]))]
    assert text == out.tokens == answer[3 : 3 + count]
    assert steps[0] == Step([], answer[3], [])  # prefill's token, which no step gave
    assert len(steps) - 1 == out.steps
    whole = [s for s in steps[1:] if s.own is not None]
    assert [len(s.accepted) for s in whole] == out.stats.kept[: len(whole)]
    assert len(whole) >= out.steps - 1  # the last one alone may be cut
    for s in whole:
        assert len(s.accepted) + len(s.rejected) == 4


def test_of_a_tree_the_best_ranked_path_beyond_the_accepted_part_is_the_rejected_one(toy_base, scripted):
    """Node 1 (rank 1) is wrong, node 2 right; below node 2 stand two wrong ones, the first with a child."""
    base = toy_base()
    answer = [*PROMPT, *base.continuation(PROMPT, 30)]
    shape = tree.TreeSpec("static", paths=[[0], [1], [1, 0], [1, 1], [1, 0, 0]]).shape(3)
    parents = shape.parents_N.tolist()
    right = next(n for n in range(1, 6) if parents[n] == 0 and n != 1)

    def fill(state, path, node):
        true = answer[len(state.tokens) + len(path) - 1]
        return true if node == right else (true + node) % 7

    contender = Contender(lambda p, a: scripted(fill, 3), shape)
    found = samples.steps_of(base, PROMPT, contender, max_new_tokens=9, eos_ids=frozenset(), rules=Rules())
    first, true = found[1], answer[len(PROMPT) + 1 :]
    assert (first.accepted, first.own) == (true[:1], true[1])
    assert len(first.rejected) == 2
    assert first.rejected[0] == (true[1] + parents.index(right)) % 7


def test_the_text_ends_where_it_ended(toy_base, scripted):
    base = toy_base()
    answer = [*PROMPT, *base.continuation(PROMPT, 30)]
    end = answer[6]
    first = answer.index(end, 3)
    contender = Contender(
        lambda p, a: scripted(lambda state, path, node: answer[len(state.tokens) + len(path) - 1], 6), tree.chain(6)
    )
    found = samples.steps_of(base, PROMPT, contender, max_new_tokens=20, eos_ids=frozenset({end}), rules=Rules())
    assert [n for s in found for n in (*s.accepted, *([] if s.own is None else [s.own]))] == answer[3 : first + 1]
    if first > 3:
        assert (found[-1].own, found[-1].rejected) == (None, [])


BYTES = {
    0: b"a",
    1: "é".encode()[:1],
    2: "é".encode()[1:],
    3: b" b",
    4: b"<end>",
    5: "€".encode()[:2],
    6: "€".encode()[2:],
}


def decode(ids):
    return b"".join(BYTES[n] for n in ids).decode("utf-8", "replace")


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5, 6, 0], [1, 2, 1, 2], [0, 1], [4], [], [0, 3, 4, 5]])
def test_pieces_add_up_whatever_stands_inside_a_character(ids):
    found = samples.pieces(ids, decode)
    assert len(found) == len(ids)
    assert "".join(found) == decode(ids)


def test_a_character_goes_to_the_token_that_completes_it():
    assert samples.pieces([0, 1, 2, 3], decode) == ["a", "", "é", " b"]
    assert samples.pieces([0, 1, 2, 3], decode, 2) == ["é", " b"]


def test_steps_as_text():
    steps = [Step([], 0, []), Step([3, 1], 2, [3]), Step([4], None, [])]
    assert samples.told(steps, decode) == [
        {"accepted": [], "own": "a", "rejected": []},
        {"accepted": [" b", ""], "own": "é", "rejected": [" b"]},
        {"accepted": ["<end>"], "own": "", "rejected": []},
    ]
