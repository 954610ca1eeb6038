import random

import torch

from draftsmith.decoding import tree, verify
from draftsmith.roles import Proposal


def slow(tokens, parents, best):
    """Walk every root path; keep the longest valid one, the first of several."""
    kept = [0]
    for node in range(len(tokens)):
        path = [node]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        good = all(tokens[n] == best[parents[n]] for n in path[1:])
        if good and len(path) > len(kept):
            kept = path
    return kept, best[kept[-1]]


def check(tokens, parents, best):
    verdict = verify.greedy(Proposal(torch.tensor(tokens), torch.tensor(parents)), torch.tensor(best))
    assert (verdict.path_A.tolist(), verdict.bonus) == slow(tokens, parents, best)
    assert verdict.accepted == len(verdict.path_A) - 1
    return verdict


def test_greedy_equals_the_slow_oracle_on_random_trees():
    rng, lengths = random.Random(0), set()
    for _ in range(600):
        count, vocab = rng.randrange(1, 20), rng.choice([1, 2, 3, 5])  # few tokens: doubles among siblings
        parents = [-1] + [rng.randrange(node) for node in range(1, count)]
        best = [rng.randrange(vocab) for _ in range(count)]
        lengths.add(check([rng.randrange(vocab) for _ in range(count)], parents, best).accepted)
    assert lengths >= {0, 1, 2, 3, 4}


def test_greedy_equals_the_slow_oracle_on_random_chains():
    rng = random.Random(1)
    for _ in range(200):
        parents = tree.chain(rng.randrange(8)).parents_N.tolist()
        check([rng.randrange(2) for _ in parents], parents, [rng.randrange(2) for _ in parents])


def test_root_alone_keeps_itself_and_the_bonus():
    assert check([3], [-1], [5]).bonus == 5


def test_of_two_equal_siblings_the_longer_then_the_first_is_kept():
    assert check([9, 4, 4], [-1, 0, 0], [4, 0, 0]).path_A.tolist() == [0, 1]
    assert check([9, 4, 4, 7], [-1, 0, 0, 2], [4, 0, 7, 1]).path_A.tolist() == [0, 2, 3]


def test_a_right_token_below_a_wrong_one_is_not_kept():
    assert check([9, 1, 2], [-1, 0, 1], [5, 2, 2]).accepted == 0
