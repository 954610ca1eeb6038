import random

import pytest

from draftsmith.contracts import Capture
from draftsmith.decoding.drafters.oracle import Oracle, OracleConfig
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig, look_up
from draftsmith.decoding.engine import generate
from draftsmith.decoding.tree import chain
from draftsmith.errors import ConfigError
from draftsmith.roles import State


def slow(tokens, depth, config):
    for n in range(config.max_ngram, config.min_ngram - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)
                for k in range(depth):
                    text.append(text[start + n + k])
                return text[len(tokens) :]
    return []


def test_look_up_equals_the_slow_oracle():
    rng, found = random.Random(0), 0
    for _ in range(2000):
        vocab = rng.choice([[0, 1], [0, 1, 256, 65536], list(range(12)), [0, 2**32, 2**40]])
        tokens = rng.choices(vocab, k=rng.randrange(1, 30))
        low = rng.randrange(1, 4)
        config = PromptLookupConfig(depth=5, min_ngram=low, max_ngram=low + rng.randrange(3))
        depth = rng.randrange(1, 6)
        drafted = look_up(tokens, depth, config)
        assert drafted == slow(tokens, depth, config)
        found += bool(drafted)
    assert 500 < found < 2000


def test_the_longest_then_the_most_recent_match_is_copied():
    config = PromptLookupConfig(max_ngram=2)
    assert look_up([1, 2, 3, 9, 2, 4, 1, 2], 2, config) == [3, 9]  # "1 2" beats the more recent "2"
    assert look_up([5, 7, 6, 7, 8, 0, 7], 2, config) == [8, 0]
    assert look_up([4, 4, 4], 3, config) == [4, 4, 4]  # copies what it drafted
    assert look_up([1, 2, 3], 3, config) == []


def test_a_proposal_is_a_chain_below_the_root_and_may_be_the_root_alone():
    drafter = PromptLookup(PromptLookupConfig(depth=4))

    def propose(tokens, depth):
        return drafter.propose(None, State(tokens, tokens[-1], Capture(), chain(depth)))

    proposal = propose([1, 2, 3, 1], 2)
    assert proposal.tokens_N.tolist() == [1, 2, 3]
    assert proposal.parents_N.tolist() == [-1, 0, 1]
    assert propose([1, 2, 3], 2).tokens_N.tolist() == [3]


def test_lossless_in_the_engine_and_faster_on_text_that_repeats(toy_base):
    base, prompt = toy_base(), [1, 2, 3, 0]
    base.table.zero_()  # sees nothing: always says the same
    out = generate(base, prompt, drafter=PromptLookup(PromptLookupConfig(depth=4)), max_new_tokens=20)
    assert out.tokens == base.continuation(prompt, 20)
    assert out.tokens_per_step > 4


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("prompt_lookup.depth", lambda: PromptLookupConfig(depth=0)),
        ("prompt_lookup.min_ngram", lambda: PromptLookupConfig(min_ngram=0)),
        ("prompt_lookup.max_ngram", lambda: PromptLookupConfig(max_ngram=1, min_ngram=2)),
        ("oracle.depth", lambda: OracleConfig(depth=0)),
    ],
)
def test_a_bad_config_names_its_field(field, make):
    with pytest.raises(ConfigError, match=field):
        make()


def test_drafters_declare_themselves():
    for drafter in (PromptLookup(PromptLookupConfig(depth=3)), Oracle(OracleConfig(depth=3), [])):
        assert (drafter.max_depth, drafter.lossy, drafter.needs.final) == (3, False, False)
        assert drafter.Config is type(drafter.config)
