"""Rows decoded together: each has the tokens, the counts and the view of its drafter that it would have alone."""

import functools
import itertools
import random

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.gates import Fixed
from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.rules import Rules
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import Proposal

EIGHT = [[int(c) for c in ids] for ids in ["3", "132230", "441", "012340123", "22", "10432", "0000000", "3141"]]
ROOMY = Beam(2, 6)  # only its bounds count: of a depth of six, thirteen nodes
BRANCHED = tree.from_paths([[0], [1], [2], [0, 0], [1, 0], [1, 1], [1, 1, 0], [1, 1, 1]])
EVERYTHING = Needs(hidden=frozenset({0, 2}), final=True, logits=True)
T = 12.0  # the toy's logits are far apart


@pytest.fixture
def base(toy_base):
    return toy_base(vocab=5, deep=True)


def alone(base, prompts, drafters=None, seeds=None, **how):
    """The same rows one by one."""
    each = drafters if isinstance(drafters, list) else [drafters] * len(prompts)
    more = enumerate(zip(prompts, each, strict=True))
    return [generate(base, p, drafter=d, seed=seeds[b] if seeds else 0, **how) for b, (p, d) in more]


def counts(out):
    stats = out.stats
    kept = (stats.steps, stats.emitted, stats.kept, stats.accepted_by_depth, stats.offered_by_depth)
    return out.tokens, out.finish, *kept


def same(together, apart):
    assert [counts(out) for out in together] == [counts(out) for out in apart]


class Knows:
    """Was told the text and drafts it along the last of the deepest paths, right for `right` levels, whatever it
    proposes beside is wrong."""

    gated = runs_base = False
    needs = Needs()

    def __init__(self, text, right, max_depth=4):
        self.text, self.right, self.max_depth = text, right, max_depth

    def propose(self, base, state):
        parents, depths = state.shape.parents_N.tolist(), state.shape.depths_N.tolist()
        path, node = [], len(parents) - 1  # the last node is one of the deepest
        while node > 0:
            path, node = [*path, node], parents[node]
        tokens = [state.root]
        for node in range(1, len(parents)):
            true = self.text[len(state.tokens) + depths[node] - 1]
            tokens.append(true if node in path and depths[node] <= self.right else (true + 1) % 5)
        return Proposal(torch.tensor(tokens), state.shape.parents_N)


# Always right, always wrong, half right


@pytest.mark.parametrize("shape", [tree.chain(3), BRANCHED], ids=["chain", "tree"])
@pytest.mark.parametrize("right", [3, 0, 2, 1], ids=["right", "wrong", "two", "one"])
@pytest.mark.parametrize("prompts", [EIGHT[1:2], EIGHT], ids=["1", "8"])
def test_check_30_exact_counts(base, shape, right, prompts):
    drafters = [Knows(p + base.continuation(p, 40), right) for p in prompts]
    found = decode(base, prompts, drafters=drafters, shape=shape, max_new_tokens=1 + 5 * (right + 1))
    assert [out.tokens for out in found] == [base.continuation(p, 1 + 5 * (right + 1)) for p in prompts]
    for out in found:
        assert (out.steps, out.stats.accepted, out.finish) == (5, 5 * right, "length")
        assert out.stats.kept == [right] * 5
        assert out.stats.offered_by_depth == [5, 5, 5]
        assert out.stats.acceptance_by_depth == [1.0] * right + [0.0] * (3 - right)
        assert out.tokens_per_step == 1 + right


def simulated(prompt, text, rights, depth, limit, eos, positions):
    """The slow oracle of the bookkeeping: (new tokens, finish, accepted per step, offered per step)."""
    new, kept, offered = [text[0]], [], []
    whole = 1  # tokens before the cut
    while True:
        cut = next((i for i, t in enumerate(new) if t == eos), len(new))
        if cut < len(new) and cut < limit:
            return new[: cut + 1], "eos", kept, offered
        if len(new) >= limit:
            return new[:limit], "length", kept, offered
        room = positions - len(prompt) - whole
        if room < 0:
            return new, "positions", kept, offered
        offered.append(min(depth, room))
        kept.append(min(rights, offered[-1]))
        whole += kept[-1] + 1
        new = text[:whole]


@pytest.mark.parametrize("right", [0, 1, 2, 4])
@pytest.mark.parametrize("eos", [None, 2])
def test_rows_end_by_the_end_of_text_by_length_and_by_the_last_position(toy_base, right, eos):
    base = toy_base(vocab=5, max_positions=30, deep=True)
    prompts = [*EIGHT, [1] * 29, [2] * 30, [0, 4] * 12]
    texts = [p + base.continuation(p, 30 - len(p) + 1) for p in prompts]
    drafters = [Knows([*text, *[0] * 9], right) for text in texts]
    limit = 19 if eos is None else 6
    how = {"max_new_tokens": limit, "eos_ids": frozenset() if eos is None else frozenset({eos})}
    found = decode(base, prompts, drafters=drafters, **how)
    for out, prompt, text in zip(found, prompts, texts, strict=True):
        tokens, finish, kept, offered = simulated(prompt, text[len(prompt) :], right, 4, limit, eos, 30)
        assert (out.tokens, out.finish, out.stats.kept) == (tokens, finish, kept)
        assert out.stats.emitted == len(tokens)
        assert out.stats.offered_by_depth == [sum(o >= d for o in offered) for d in range(1, 5)]
        assert out.stats.accepted_by_depth == [sum(k >= d for k in kept) for d in range(1, 5)]
    assert {out.finish for out in found} == ({"positions", "length"} if eos is None else {"eos", "positions", "length"})
    same(found, alone(base, prompts, drafters, **how))


def test_a_batch_reads_once_per_step_and_asks_no_row_that_has_ended(base, scripted):
    drafters = [scripted(lambda state, above, node: 0) for _ in EIGHT]
    base.forwards.clear()
    found = decode(base, EIGHT, drafters=drafters, shape=BRANCHED, max_new_tokens=12)
    assert base.forwards == [max(map(len, EIGHT))] + [BRANCHED.nodes] * max(out.steps for out in found)
    assert [len(d.states) for d in drafters] == [out.steps for out in found]
    assert len({out.steps for out in found}) > 1


# Another tree in every step and row


@functools.cache
def best_of(base):
    """The base's own next token after a text, remembered."""
    return functools.cache(lambda text: int(base.logits(text).argmax()))


class Whimsical:
    """A tree of its own in every step, from the root alone to twelve nodes, its tokens mostly the base's. What it does
    depends on its text alone, so a row alone and in a batch is drafted for alike. Keeps what it was shown."""

    gated, max_depth = False, 6

    def __init__(self, base, seed, needs=EVERYTHING, runs=0.0, keeps=True):
        self.best, self.seed, self.needs = best_of(base), seed, needs
        self.runs, self.keeps, self.runs_base = runs, keeps, runs > 0
        self.states, self.proposals = [], []

    def propose(self, base, state):
        rng = random.Random(1000 * self.seed + len(state.tokens))
        parents, depths, paths = [-1], [0], [[state.root]]
        while rng.random() < 0.9 and len(parents) < min(12, state.shape.nodes):
            parent = rng.randrange(max(0, len(parents) - 3), len(parents))
            if depths[parent] < state.shape.depth:
                parents.append(parent)
                depths.append(depths[parent] + 1)
                token = self.best((*state.tokens[:-1], *paths[parent]))
                paths.append([*paths[parent], token if rng.random() < 0.7 else rng.randrange(5)])
        tokens_N, parents_N = torch.tensor([p[-1] for p in paths]), torch.tensor(parents)
        self.states.append((list(state.tokens), state.root, state.seen, state.read))
        proposal = Proposal(tokens_N, parents_N)
        if rng.random() < self.runs:
            proposal = self.run(base, state, proposal)
        self.proposals.append(proposal)
        return proposal

    def run(self, base, state, proposal):
        """The base's first block for every node, as a drafter does that exits early; or it is forgotten."""
        start = state.kv.length
        where = {
            "positions_BQ": start + tree.depths(proposal.parents_N)[None],
            "mask_BQS": torch.cat(
                [torch.ones(len(proposal.tokens_N), start).bool(), tree.ancestor_mask(proposal.parents_N)], 1
            )[None],
        }
        hidden = base.capture(Needs(frozenset({1})), proposal.tokens_N[None], kv=state.kv, **where).hidden[1]
        if not self.keeps:
            state.kv.crop(start)
            return proposal
        return Proposal(proposal.tokens_N, proposal.parents_N, entered=(1, hidden))


RUNNING = {
    "none": lambda base, b: Whimsical(base, b),
    "all enter": lambda base, b: Whimsical(base, b, Needs(frozenset({2})), runs=1.0),
    "some enter": lambda base, b: Whimsical(base, b, Needs(frozenset({2})), runs=0.6),
    "one enters": lambda base, b: Whimsical(base, b, runs=1.0 if b == 2 else 0.0),
    "all skip": lambda base, b: Whimsical(base, b, runs=1.0, keeps=False),
}


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_check_27_a_batch_is_its_rows_one_by_one(base, kind, rows):
    prompts, how = EIGHT[:rows], {"max_new_tokens": 30, "eos_ids": frozenset({4}), "shape": ROOMY}
    drafters, again = ([RUNNING[kind](base, b) for b in range(rows)] for _ in range(2))
    together = decode(base, prompts, drafters=drafters, **how)
    same(together, alone(base, prompts, again, **how))
    for out, prompt in zip(together, prompts, strict=True):
        text = base.continuation(prompt, 30)
        assert out.tokens == (text[: text.index(4) + 1] if 4 in text else text)
    for one, other in zip(drafters, again, strict=True):
        assert [p.tokens_N.tolist() for p in one.proposals] == [p.tokens_N.tolist() for p in other.proposals]
    if rows == 8:
        sizes = {len(p.tokens_N) for d in drafters for p in d.proposals}
        assert {1, 12} < sizes
        assert {0, 1, 2} < {k for out in together for k in out.stats.kept}


@pytest.mark.parametrize("rules", [Rules(Warp(T)), Rules(Warp(T, top_k=3, top_p=0.9))], ids=["all", "cut"])
def test_a_sampled_row_has_the_text_of_the_row_alone(base, rules):
    how = {"max_new_tokens": 24, "rules": rules, "shape": ROOMY, "seeds": [5, 6, 5, 8, 9, 10, 11, 12]}
    drafters, again = ([Whimsical(base, b, runs=0.5) for b in range(8)] for _ in range(2))
    together = decode(base, EIGHT, drafters=drafters, **how)
    same(together, alone(base, EIGHT, again, **how))
    assert [out.tokens for out in together] == [out.tokens for out in decode(base, EIGHT, **how)]
    twins = decode(base, [EIGHT[1]] * 3, **{**how, "seeds": [3, 4, 3]})
    assert twins[0].tokens == twins[2].tokens != twins[1].tokens


@pytest.mark.parametrize("drafts", ["iid", "distinct"])
def test_a_row_whose_drafts_are_drawn_has_the_text_of_the_row_alone(base, drafts, tabled):
    rules, seeds = Rules(Warp(T), drafts), list(range(8))
    how = {"max_new_tokens": 24, "rules": rules, "shape": BRANCHED, "seeds": seeds}
    together = decode(base, EIGHT, drafters=tabled(5), **how)
    same(together, alone(base, EIGHT, tabled(5), **how))
    assert sum(out.stats.accepted for out in together) > 20


# What a drafter is shown


def test_every_rows_drafter_sees_its_own_text_capture_and_read(base):
    drafters = [Whimsical(base, b) for b in range(8)]
    together = decode(base, EIGHT, drafters=drafters, max_new_tokens=30)
    for drafter, prompt, out in zip(drafters, EIGHT, together, strict=True):
        before, text, last, whole_text = 0, drafter.states[0][0], None, prompt + base.continuation(prompt, 40)
        for (tokens, root, seen, read), proposal in zip(drafter.states, drafter.proposals, strict=True):
            assert tokens[-1] == root
            assert tokens == whole_text[: len(tokens)]
            whole, new = base.capture(EVERYTHING, torch.tensor([tokens[:-1]])), torch.arange(before, len(tokens) - 1)
            assert set(seen.hidden) == {0, 2}
            for got, expected in (
                (seen.final, whole.final),
                (seen.logits, whole.logits),
                *((seen.hidden[layer], whole.hidden[layer]) for layer in (0, 2)),
            ):
                torch.testing.assert_close(got, expected.index_select(1, new), rtol=0, atol=1e-12)
            was_read(base, text, last, read)
            before, text, last = len(tokens) - 1, tokens, proposal
        assert len({seen.final.shape[1] for _, _, seen, _ in drafter.states[1:]}) >= 3
        assert len(drafter.states) == out.steps


def was_read(base, text, proposal, read):
    """All nodes of the last proposal, refused ones too, or the prompt; and the base's logits after each."""
    tokens_N, logits_NV = read
    if proposal is None:
        paths = [text[:n] for n in range(1, len(text))]
    else:
        paths = []
        for node, parent in zip(proposal.tokens_N.tolist(), proposal.parents_N.tolist(), strict=True):
            paths.append([*(text[:-1] if parent < 0 else paths[parent]), node])
    assert tokens_N.tolist() == [path[-1] for path in paths]
    assert len(logits_NV) == len(paths)
    for path, logits_V in zip(paths, logits_NV, strict=True):
        torch.testing.assert_close(logits_V, base.logits(path), rtol=0, atol=1e-12)


def test_a_drafter_sees_nothing_that_another_row_asked_for(base, scripted):
    asked = [Needs(), Needs(frozenset({1})), EVERYTHING]
    drafters = [scripted(lambda state, above, node: 0, max_depth=2 + b, needs=n) for b, n in enumerate(asked)]
    together = decode(base, EIGHT[:4], drafters=[*drafters, None], max_new_tokens=20)
    assert [out.tokens for out in together] == [base.continuation(p, 20) for p in EIGHT[:4]]
    assert [len(out.stats.acceptance_by_depth) for out in together] == [2, 3, 4, 0]
    for needs, drafter in zip(asked, drafters, strict=True):
        for _, _, seen in drafter.states:
            assert (set(seen.hidden), seen.final is not None, seen.logits is not None) == (
                set(needs.hidden),
                needs.final,
                needs.logits,
            )


def test_every_row_has_its_own_gate(base, tabled):
    watched = []
    how = {"shape": tree.chain(3), "max_new_tokens": 20, "watch": lambda p, verdict: watched.append(len(p.tokens_N))}
    together = decode(base, EIGHT[:3], drafters=tabled(5), gates=[Fixed(1), None, Fixed(2)], **how)
    assert [len([n for n in out.stats.offered_by_depth if n]) for out in together] == [1, 3, 2]
    assert [out.tokens for out in together] == [base.continuation(p, 20) for p in EIGHT[:3]]
    assert sorted(watched) == sorted(n for out, n in zip(together, (2, 4, 3), strict=True) for _ in range(out.steps))


def test_one_drafter_of_all_rows_may_draft_for_them_at_once(base, tabled):
    class Together(tabled):
        def propose_rows(self, base, states):
            asked.append(len(states))
            return [self.propose(base, state) for state in states]

    asked, prompts, how = [], EIGHT[:4], {"shape": BRANCHED, "max_new_tokens": 20}
    expected = decode(base, prompts, drafters=tabled(5), **how)
    same(decode(base, prompts, drafters=[Together(5) for _ in prompts], **how), expected)
    assert not asked
    same(decode(base, prompts, drafters=Together(5), **how), expected)
    steps = sorted(out.steps for out in expected)
    assert steps[-1] > steps[-2]  # the last row goes on alone, and is then asked as one
    assert asked == [sum(n > i for n in steps) for i in range(steps[-2])]


# Rows that leave


@pytest.mark.parametrize("runs", [0.0, 1.0])
def test_rows_leave_in_every_order(toy_base, runs):
    """The longer the prompt, the earlier the base's last position ends the row."""
    base = toy_base(vocab=5, max_positions=26, deep=True)
    prompts = [EIGHT[3][:n] + [0] * max(0, n - 9) for n in (2, 8, 14, 20)]
    expected = [base.continuation(p, 26 - len(p) + 1) for p in prompts]
    for order in itertools.permutations(range(4)):
        drafters = [Whimsical(base, b, Needs(frozenset({2})), runs) for b in order]
        together = decode(base, [prompts[b] for b in order], drafters=drafters, shape=ROOMY, max_new_tokens=99)
        assert [(out.tokens, out.finish) for out in together] == [(expected[b], "positions") for b in order]


def test_rows_that_end_at_once_or_together(base):
    first = [base.continuation(p, 1)[0] for p in EIGHT]
    for eos in set(first):
        together = decode(base, EIGHT, max_new_tokens=9, eos_ids=frozenset({eos}))
        same(together, alone(base, EIGHT, max_new_tokens=9, eos_ids=frozenset({eos})))
        assert [out.steps == 0 for out in together] == [token == eos for token in first]
    assert {out.steps for out in decode(base, EIGHT, max_new_tokens=1)} == {0}
    assert {out.steps for out in decode(base, EIGHT, max_new_tokens=6)} == {5}


# Texts that go on


@pytest.mark.parametrize("rules", [Rules(), Rules(Warp(T))], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_rooted_text_goes_on_after_its_root(base, rules, rows):
    prompts, how = EIGHT[:rows], {"rules": rules, "seeds": list(range(rows)), "shape": ROOMY}
    whole = decode(base, prompts, max_new_tokens=21, **how)
    given = [[*p, *out.tokens[:3]] for p, out in zip(prompts, whole, strict=True)]
    for drafters in (None, [Whimsical(base, b, runs=0.5) for b in range(rows)]):
        base.forwards.clear()
        rest = decode(base, given, rooted=True, drafters=drafters, max_new_tokens=18, **how)
        assert base.forwards[0] == max(map(len, given)) - 1  # the root is read in the first step
        assert [out.tokens for out in rest] == [out.tokens[3:] for out in whole]
        if drafters is None:
            assert {(out.steps, out.stats.emitted) for out in rest} == {(18, 18)}
        else:
            assert [d.states[0][0] for d in drafters] == given
    eos = frozenset(whole[0].tokens[2:3])  # it has been emitted before: the text goes on
    assert decode(base, given, rooted=True, max_new_tokens=18, eos_ids=eos, **how)[0].steps > 0


def test_a_rooted_text_up_to_the_last_position(toy_base):
    base = toy_base(vocab=5, max_positions=12)
    text = base.continuation([1, 2], 11)
    for length in (8, 11, 12):
        out = decode(base, [[1, 2, *text][:length]], rooted=True, max_new_tokens=20)[0]
        assert (out.tokens, out.finish) == (text[length - 2 :], "positions")


# What cannot be


def test_what_does_not_go_together_is_refused(base, scripted):
    class Priming:
        def prime(self, base, tokens_BT):
            raise AssertionError("not to be asked")

    for how in ({"prompts": EIGHT[:2]}, {"prompts": EIGHT[1:2], "rooted": True}):
        with pytest.raises(ConfigError, match=r"primer: .*one by one"):
            decode(base, primer=Priming(), max_new_tokens=3, **how)
    with pytest.raises(ConfigError, match="prompt: 1 tokens; give 2 to"):
        decode(base, EIGHT, rooted=True, max_new_tokens=3)
    drafter = scripted(lambda state, above, node: 0, max_depth=2)
    with pytest.raises(ConfigError, match=r"decoding\.depth.*3 deep.*goes to 2"):
        decode(base, EIGHT[:2], drafters=[None, drafter], shape=tree.chain(3), max_new_tokens=3)
    for how in ({"seeds": [1]}, {"drafters": [drafter] * 3}, {"gates": [None]}):
        with pytest.raises(ValueError, match="zip"):
            decode(base, EIGHT[:2], max_new_tokens=3, **how)


def test_no_prompts_are_no_texts(base):
    assert decode(base, [], max_new_tokens=3) == []
