"""N-grams against dictionaries that are filled by loops, node by node."""

import math
import random

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding.drafters.ngram import NGram, NGramConfig
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import by_widths, chain, from_paths
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import State

VOCABULARY = 6
CONFIG = NGramConfig(candidates=3, memory=0.7, text_weight=0.5, backoff=0.4)
SHAPES = {"chain": chain(4), "full": by_widths([3, 2, 1]), "bushy": from_paths([[0], [2], [0, 0], [0, 1], [2, 0]])}


def logits_of(rng, count):
    g = torch.Generator().manual_seed(rng.randrange(10**6))
    return 2 * torch.randn(count, VOCABULARY, generator=g)


class Story:
    """A text that goes on as a base would let it: a prompt, then trees of which a path is kept."""

    def __init__(self, rng):
        self.rng = rng
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))]
        logits = logits_of(rng, len(tokens))
        self.text = [*tokens, rng.randrange(VOCABULARY)]
        self.read, self.seen = (torch.tensor(tokens), logits), logits[None]

    def state(self, shape):
        return State(list(self.text), self.text[-1], Capture(logits=self.seen), shape, read=self.read)

    def go_on(self):
        nodes = self.rng.randrange(1, 6)
        tokens = [self.text[-1], *(self.rng.randrange(VOCABULARY) for _ in range(nodes - 1))]
        path = [0, *sorted(self.rng.sample(range(1, nodes), self.rng.randrange(nodes)))]
        logits = logits_of(self.rng, nodes)
        self.read, self.seen = (torch.tensor(tokens), logits), logits[None, path]
        self.text += [*(tokens[n] for n in path[1:]), self.rng.randrange(VOCABULARY)]


def best(row, count):
    return sorted(row, key=lambda t: (-row[t], t))[:count]


class Slow:
    """The same rows, told position by position."""

    def __init__(self):
        self.rows = {}

    def tell(self, context, told, memory):
        row = self.rows.setdefault(context, {})
        for token in row:
            row[token] *= memory
        for token, weight in told:
            row[token] = row.get(token, 0) + weight
        self.rows[context] = {t: row[t] for t in best(row, CONFIG.candidates)}

    def learn(self, state):
        def top(logits):
            chances = logits.softmax(-1).tolist()
            return [(t, chances[t]) for t in best(dict(enumerate(chances)), CONFIG.candidates)]

        for token, logits in zip(state.read[0].tolist(), state.read[1], strict=True):
            self.tell((token,), top(logits), CONFIG.memory)
        text, count = state.tokens, state.seen.logits.shape[1]
        for i in range(count):
            at = len(text) - 1 - count + i
            said = (text[at + 1], CONFIG.text_weight)
            self.tell((text[at],), [said], 1.0)
            if at:
                self.tell((text[at - 1], text[at]), [*top(state.seen.logits[0, i]), said], CONFIG.memory)

    def after(self, before, last):
        found = {}
        for context, scale in (((last,), CONFIG.backoff), ((before, last), 1.0)):
            row = self.rows.get(context, {})
            for token, weight in row.items():
                found[token] = scale * weight / sum(row.values())
        return best(found, CONFIG.candidates)

    def check(self, state, drafted, shape):
        """How many of the drafted tokens are fillers; every other one must be the candidate of its rank."""
        parents, ranks, depths = (t.tolist() for t in (shape.parents_N, shape.ranks_N, shape.depths_N))
        before, fillers, nodes = [state.tokens[-2]], 0, 1
        for depth in range(1, shape.depth + 1):
            level = [n for n, d in enumerate(depths) if d == depth]
            if not any(self.after(before[parents[n]], drafted[parents[n]]) for n in level):
                break
            for n in level:
                candidates = self.after(before[parents[n]], drafted[parents[n]])
                before.append(drafted[parents[n]])
                if ranks[n] < len(candidates):
                    assert drafted[n] == candidates[ranks[n]]
                else:
                    fillers += 1
                    assert drafted[n] not in candidates
            nodes += len(level)
        assert len(drafted) == nodes
        return fillers


@pytest.mark.parametrize("name", SHAPES)
def test_drafts_are_the_weightiest_of_rows_filled_by_loops(name):
    rng, shape, fillers, longest = random.Random(0), SHAPES[name], 0, 0
    for _ in range(60):
        story, drafter, slow = Story(rng), NGram(CONFIG), Slow()
        for _ in range(5):
            state = story.state(shape)
            drafted = drafter.propose(None, state).tokens_N.tolist()
            slow.learn(state)
            assert drafted[0] == state.root
            assert all(0 <= token < VOCABULARY for token in drafted)
            fillers += slow.check(state, drafted, shape)
            longest += len(drafted) == shape.nodes
            story.go_on()
    assert longest > 100
    assert (fillers > 5) == (name != "chain")


def test_a_trigram_is_heard_before_a_bigram_and_a_bigram_without_one():
    drafter = NGram(NGramConfig(candidates=4, text_weight=0.0, backoff=0.4))
    says = torch.full((4, VOCABULARY), -math.inf)
    says[0, 3] = says[1, 2] = says[2, 1] = says[3, 2] = 0.0  # certain
    read = torch.tensor([0, 1, 0, 2]), says
    state = State([0, 1, 0, 2, 0], 0, Capture(logits=says[None]), chain(1), read=read)
    drafter.update(state)
    assert drafter.ranked((1, 0))[1] == 1.0  # the trigram 1 0 -> 1
    assert list(drafter.ranked((1, 0))) == [1, 3]  # then what 0 was read to be followed by: 1, and before that 3
    assert drafter.ranked((5, 1)) == pytest.approx({2: 0.4})  # the bigram alone
    assert drafter.ranked((1, 5)) == {}


def test_the_text_weighs_beside_the_base():
    """A base that says something else than its prompt's words: the text's own next token leads if it weighs more."""
    says = torch.full((3, VOCABULARY), -math.inf)
    says[:, 5] = 0.0
    for weight, leads in [(0.5, 5), (1.5, 2)]:
        drafter = NGram(NGramConfig(text_weight=weight))
        state = State([0, 1, 2, 5], 5, Capture(logits=says[None]), chain(1), read=(torch.tensor([0, 1, 2]), says))
        drafter.update(state)
        assert next(iter(drafter.ranked((0, 1)))) == leads


def test_a_context_never_read_is_the_root_alone():
    says = torch.zeros(1, VOCABULARY)
    state = State([0, 5], 5, Capture(logits=says[None]), chain(3), read=(torch.tensor([0]), says))
    proposal = NGram(NGramConfig()).propose(None, state)
    assert (proposal.tokens_N.tolist(), proposal.parents_N.tolist()) == ([5], [-1])


@pytest.mark.parametrize(
    "shape", [chain(4), by_widths([3, 2, 1]), ByProbability(8, 4, 3)], ids=["chain", "tree", "dynamic"]
)
def test_lossless_in_the_engine(toy_base, shape):
    base, prompt = toy_base(), [1, 2, 3, 0, 1, 2, 3]
    out = generate(base, prompt, drafter=NGram(NGramConfig()), shape=shape, max_new_tokens=40)
    assert out.tokens == base.continuation(prompt, 40)


def test_faster_on_text_that_follows_pairs(toy_base):
    """A base that looks at its last two tokens: the trigram is right where the bigram cannot know."""
    base, prompt = toy_base(vocab=5), [1, 2, 3, 0]
    one, two = torch.randint(-9, 10, (2, 5, 12), generator=torch.Generator().manual_seed(4)).double()
    base.table = torch.zeros_like(base.table)
    here = torch.arange(64)
    base.table[:, here, here], base.table[:, here[:-1], here[1:]] = one[:, None], two[:, None]
    pairs = generate(base, prompt, drafter=NGram(NGramConfig()), max_new_tokens=55)
    assert pairs.tokens == base.continuation(prompt, 55)
    assert pairs.tokens_per_step > 2


@pytest.mark.parametrize(
    ("shape", "drafts"),
    [
        (by_widths([2, 2]), "best"),
        (by_widths([2, 2]), "iid"),
        (by_widths([2, 2]), "distinct"),
        (DySpec(6, 3), "distinct"),
    ],
)
def test_rows_of_a_batch_and_a_temperature(tiny_base, shape, drafts):
    base, prompts, rules = tiny_base(), [[7], [3, 1, 4, 1, 5, 9], [11, 12, 13, 11, 12]], Rules(Warp(0.7), drafts)
    told = {"max_new_tokens": 20, "rules": rules, "seeds": [1, 2, 3]}
    out = decode(base, prompts, drafters=[NGram(NGramConfig()) for _ in prompts], shape=shape, **told)
    assert [len(g.tokens) for g in out] == [20] * 3
    if drafts == "best":  # then the text is that of no drafter at all
        assert [g.tokens for g in out] == [g.tokens for g in decode(base, prompts, **told)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", 0), ("candidates", 0), ("memory", 1.5), ("text_weight", -1.0), ("backoff", 0.0)],
)
def test_a_bad_config_names_its_field(field, value):
    with pytest.raises(ConfigError, match=f"ngram.{field}"):
        NGramConfig(**{field: value})
