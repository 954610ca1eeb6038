import random
from dataclasses import replace

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.decoding.drafters.oracle import Oracle, OracleConfig
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.engine import generate
from draftsmith.decoding.gates import Fixed
from draftsmith.errors import ConfigError
from draftsmith.roles import Proposal

PROMPT = [1, 3, 2, 2, 3, 0]
SHAPES = {
    "root": tree.chain(0),
    "chain": tree.chain(4),
    "tree": tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 1]]),
    "full": tree.by_widths([3, 2, 2]),
}
EVERYTHING = Needs(hidden=frozenset({0, 2}), final=True, logits=True)


def answer(base, count=40):
    return base.continuation(PROMPT, count)


def guesser(base, right, seed=0):
    """Fills a node with the base's own choice with probability `right`, else with any token.
    (The toy base refuses positions it does not have, so this also checks that nobody asks for them.)"""
    rng = random.Random(seed)

    def fill(state, above, node):
        if rng.random() < right:
            return int(base.logits(state.tokens[:-1] + above).argmax())
        return rng.randrange(base.spec.vocab_size)

    return fill


def test_without_a_drafter_it_is_plain_greedy_decoding(toy_base):
    base = toy_base()
    out = generate(base, PROMPT, max_new_tokens=20)
    assert base.forwards == [len(PROMPT)] + [1] * 19
    assert base.head_rows == [1] * 20  # of the prompt only the last position
    assert out.tokens == answer(base, 20)
    assert (out.steps, out.tokens_per_step, out.accepted_drafts_per_step) == (19, 1.0, 0.0)
    assert (out.finish, out.stats.emitted, out.stats.acceptance_by_depth) == ("length", 20, [])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_check_27_the_tokens_are_the_bases_own_whatever_is_drafted(toy_base, scripted, shape, right, seed):
    base = toy_base(seed=seed, vocab=5)
    drafter = scripted(guesser(base, right, seed), needs=EVERYTHING if seed else None)
    out = generate(base, PROMPT, drafter=drafter, shape=shape, max_new_tokens=40)
    assert out.tokens == answer(base)
    assert len(out.stats.acceptance_by_depth) == shape.depth


def test_check_27_with_a_different_tree_every_step(toy_base, scripted):
    base, rng, lengths = toy_base(vocab=4), random.Random(3), set()
    fill = guesser(base, 0.7)

    class Dynamic(scripted):
        def propose(self, base, state):
            parents = [-1]
            while rng.random() < 0.9 and len(parents) < 12:
                parents.append(rng.randrange(max(0, len(parents) - 3), len(parents)))
            lengths.add(len(parents))
            none = torch.zeros(0)
            return super().propose(base, replace(state, shape=tree.TreeShape(torch.tensor(parents), none, none)))

    out = generate(base, PROMPT, drafter=Dynamic(fill, max_depth=12), max_new_tokens=50)
    assert out.tokens == answer(base, 50)
    assert len(lengths) > 3
    assert out.tokens_per_step > 1.3


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_check_30_an_oracle_gives_depth_plus_one_tokens_in_every_step(toy_base, depth):
    base = toy_base()
    oracle = Oracle(OracleConfig(depth=depth), PROMPT + answer(base, 57))
    out = generate(base, PROMPT, drafter=oracle, max_new_tokens=1 + 4 * (depth + 1))
    assert out.tokens == answer(base, 1 + 4 * (depth + 1))
    assert (out.steps, out.tokens_per_step) == (4, depth + 1)
    assert out.stats.acceptance_by_depth == [1.0] * depth


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_check_30_always_wrong_gives_one_token_in_every_step(toy_base, scripted, shape):
    base = toy_base()
    wrong = scripted(lambda state, above, node: int(base.logits(state.tokens[:-1] + above).argmin()))
    out = generate(base, PROMPT, drafter=wrong, shape=shape, max_new_tokens=20)
    assert out.tokens == answer(base, 20)
    assert (out.steps, out.tokens_per_step) == (19, 1.0)
    assert out.stats.acceptance_by_depth == [0.0] * shape.depth


def test_check_30_half_right_gives_the_exact_count(toy_base, scripted):
    base = toy_base()
    right = guesser(base, 1.0)

    def fill(state, above, node):  # right in depths 1 and 2 of 4
        return right(state, above, node) if node <= 2 else int(base.logits(state.tokens[:-1] + above).argmin())

    out = generate(base, PROMPT, drafter=scripted(fill), shape=tree.chain(4), max_new_tokens=31)
    assert out.tokens == answer(base, 31)
    assert (out.steps, out.tokens_per_step) == (10, 3.0)
    assert out.stats.acceptance_by_depth == [1.0, 1.0, 0.0, 0.0]
    assert out.stats.offered_by_depth == [10, 10, 10, 10]


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_the_drafter_sees_the_text_and_the_capture_of_what_was_accepted(toy_base, scripted, name):
    base = toy_base(vocab=5)
    drafter = scripted(guesser(base, 0.7), needs=EVERYTHING)
    generate(base, PROMPT, drafter=drafter, shape=SHAPES[name], max_new_tokens=40)
    before = 0
    for tokens, root, seen in drafter.states:
        assert tokens[-1] == root
        assert tokens == (PROMPT + answer(base, 50))[: len(tokens)]
        whole = base.capture(EVERYTHING, torch.tensor([tokens[:-1]]))
        new = torch.arange(before, len(tokens) - 1)
        for got, expected in (
            (seen.final, whole.final),
            (seen.logits, whole.logits),
            *((seen.hidden[layer], whole.hidden[layer]) for layer in (0, 2)),
        ):
            torch.testing.assert_close(got, expected.index_select(1, new), rtol=0, atol=1e-12)
        before = len(tokens) - 1
    assert len({seen.final.shape[1] for _, _, seen in drafter.states[1:]}) >= 3


def test_the_drafter_sees_nothing_it_did_not_ask_for(toy_base, scripted):
    base = toy_base()
    drafter = scripted(guesser(base, 0.5), needs=Needs(hidden=frozenset({1})))
    generate(base, PROMPT, drafter=drafter, shape=SHAPES["tree"], max_new_tokens=20)
    for _, _, seen in drafter.states:
        assert (set(seen.hidden), seen.final, seen.logits) == ({1}, None, None)


def test_a_drafter_may_propose_nothing_or_less_than_the_shape(toy_base):
    base = toy_base(vocab=40)

    class Nothing:
        needs, max_depth = Needs(), 3

        def propose(self, base, state):
            return Proposal(torch.tensor([state.root]), torch.tensor([-1]))

    out = generate(base, PROMPT, drafter=Nothing(), max_new_tokens=10)
    assert out.tokens == answer(base, 10)
    assert (out.steps, out.stats.offered_by_depth, out.tokens_per_step) == (9, [0, 0, 0], 1.0)
    lookup = PromptLookup(PromptLookupConfig(depth=3))
    assert generate(base, PROMPT, drafter=lookup, max_new_tokens=40).tokens == answer(base)


def test_a_proposal_deeper_than_the_shape_is_refused(toy_base):
    class Eager:
        needs, max_depth = Needs(), 3

        def propose(self, base, state):
            return Proposal(torch.tensor([state.root, 0, 0]), torch.tensor([-1, 0, 1]))

    with pytest.raises(AssertionError, match="deeper"):
        generate(toy_base(), PROMPT, drafter=Eager(), shape=tree.chain(1), max_new_tokens=5)


@pytest.mark.parametrize("drafted", [False, True])
def test_the_first_end_of_text_cuts_and_is_kept_and_statistics_count_before_the_cut(toy_base, drafted):
    base = toy_base()
    tokens = answer(base)
    eos = next(t for t in dict.fromkeys(tokens) if tokens.index(t) == 6 or tokens.index(t) == 7)
    cut = tokens.index(eos) + 1
    oracle = Oracle(OracleConfig(depth=4), PROMPT + tokens) if drafted else None
    out = generate(base, PROMPT, drafter=oracle, max_new_tokens=30, eos_ids=frozenset({eos}))
    assert out.tokens == tokens[:cut]
    assert (out.finish, out.stats.emitted) == ("eos", cut)
    assert out.tokens_per_step == (5.0 if drafted else 1.0)
    assert out.steps == (2 if drafted else cut - 1)


def test_the_length_cuts_inside_a_step_and_statistics_count_before_it(toy_base):
    base = toy_base()
    oracle = Oracle(OracleConfig(depth=4), PROMPT + answer(base))
    out = generate(base, PROMPT, drafter=oracle, max_new_tokens=8)
    assert out.tokens == answer(base, 8)
    assert (out.steps, out.stats.accepted, out.tokens_per_step) == (2, 8, 5.0)


def test_prefills_token_is_no_step(toy_base):
    base = toy_base()
    first = answer(base, 1)
    for limit, eos in ((1, frozenset()), (9, frozenset(first))):
        out = generate(base, PROMPT, max_new_tokens=limit, eos_ids=eos)
        assert (out.tokens, out.steps, out.tokens_per_step) == (first, 0, 1.0)
        assert out.finish == ("eos" if eos else "length")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_last_position_of_the_base_ends_the_text_at_the_same_token(toy_base, scripted, shape):
    base = toy_base(max_positions=17, vocab=5)
    count = 17 - len(PROMPT) + 1  # the last token is emitted by the last position and never read
    plain = generate(base, PROMPT, max_new_tokens=99)
    assert plain.tokens == answer(base, count)
    assert plain.finish == "positions"
    for right in (0.0, 0.6, 1.0):
        drafter = scripted(guesser(base, right))
        assert generate(base, PROMPT, drafter=drafter, shape=shape, max_new_tokens=99).tokens == plain.tokens


def test_two_runs_are_equal_and_share_nothing(toy_base, scripted):
    base, prompt = toy_base(vocab=5), list(PROMPT)
    runs = [
        generate(base, prompt, drafter=scripted(guesser(base, 0.6)), shape=SHAPES["full"], max_new_tokens=40)
        for _ in range(2)
    ]
    assert prompt == PROMPT
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].stats.accepted_by_depth == runs[1].stats.accepted_by_depth
    assert runs[0].stats.accepted_by_depth is not runs[1].stats.accepted_by_depth


def test_the_parts_of_the_time_are_counted(toy_base, scripted):
    base = toy_base()
    stats = generate(base, PROMPT, drafter=scripted(guesser(base, 0.5)), max_new_tokens=20).stats
    parts = (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds)
    assert min(parts) > 0
    assert stats.seconds == pytest.approx(sum(parts))


def test_a_wrong_root_is_refused(toy_base):
    class Liar:
        needs, max_depth = Needs(), 1

        def propose(self, base, state):
            return Proposal(torch.tensor([(state.root + 1) % 7, 0]), state.shape.parents_N)

    with pytest.raises(AssertionError, match="root"):
        generate(toy_base(), PROMPT, drafter=Liar(), max_new_tokens=5)


def test_what_the_user_can_get_wrong_is_named(toy_base):
    base, oracle = toy_base(max_positions=8), Oracle(OracleConfig(depth=2), [])
    with pytest.raises(ConfigError, match=r"decoding\.depth.*3 deep.*goes to 2"):
        generate(base, [1], drafter=oracle, shape=tree.chain(3), max_new_tokens=5)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(base, [1], max_new_tokens=0)
    for prompt in ([], [1] * 9):
        with pytest.raises(ConfigError, match="prompt: "):
            generate(base, prompt, max_new_tokens=5)


# The roles around the drafter


def test_a_gate_wants_a_drafter_that_asks(toy_base, scripted):
    with pytest.raises(ConfigError, match="gate: there is no drafter"):
        generate(toy_base(), PROMPT, gate=Fixed(1), max_new_tokens=2)
    at_once = scripted(lambda state, above, node: 0)
    at_once.gated = False
    with pytest.raises(ConfigError, match="gate: Scripted drafts all at once"):
        generate(toy_base(), PROMPT, drafter=at_once, gate=Fixed(1), max_new_tokens=2)


class Priming:
    """Reads the prompt as the base does, and says what it was given."""

    def __init__(self):
        self.told = []

    def prime(self, base, tokens_BT):
        self.told.append(tokens_BT.tolist())
        kv = base.new_kv()
        base.capture(Needs(final=True), tokens_BT, kv=kv)
        base.forwards.clear()
        return kv


def test_a_primer_reads_all_but_the_prompts_last_token(toy_base):
    base, primer = toy_base(), Priming()
    out = generate(base, PROMPT, primer=primer, max_new_tokens=10)
    assert primer.told == [[PROMPT[:-1]]]
    assert base.forwards == [1] * 10  # the prompt's last token, then one step each
    assert base.head_rows == [1] * 10
    assert out.tokens == answer(base, 10)
    sampled = {"max_new_tokens": 10, "temperature": 12.0, "seed": 4}  # the toy's logits are far apart
    assert generate(base, PROMPT, primer=primer, **sampled).tokens == generate(base, PROMPT, **sampled).tokens


def test_a_prompt_of_one_token_leaves_a_primer_nothing_to_read(toy_base):
    base, primer = toy_base(), Priming()
    assert generate(base, [3], primer=primer, max_new_tokens=5).tokens == base.continuation([3], 5)
    assert primer.told == []


def test_a_primer_and_a_drafter_exclude_each_other(toy_base, scripted):
    drafter = scripted(lambda state, above, node: 0)
    with pytest.raises(ConfigError, match=r"^primer: .* use one of the two"):
        generate(toy_base(), PROMPT, drafter=drafter, primer=Priming(), max_new_tokens=2)


def test_whoever_watches_sees_every_step(toy_base, scripted):
    base, steps = toy_base(vocab=5), []

    def watch(proposal, verdict):
        steps.append((proposal.tokens_N.tolist(), verdict.path_A.tolist(), verdict.bonus))

    drafter = scripted(guesser(base, 0.6))
    out = generate(base, PROMPT, drafter=drafter, shape=SHAPES["tree"], max_new_tokens=30, watch=watch)
    assert len(steps) == out.steps
    text = [steps[0][0][0]]  # the first root
    for tokens, path, bonus in steps:
        assert tokens[0] == text[-1]
        text += [*(tokens[n] for n in path[1:]), bonus]
    assert text[:30] == out.tokens
    assert sum(len(path) - 1 for _, path, _ in steps) == out.stats.accepted
