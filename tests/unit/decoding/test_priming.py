"""Judging primers: a perfect one is the base, a broken one is found out, and arithmetic is counted by hand."""

import json
import math
from typing import Any

import pytest
import torch

from draftsmith.contracts import BaseSpec, Needs
from draftsmith.decoding import priming
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError, DataError

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(20, 45))]
LENGTHS = {"lengths": [8, 40], "repeats": 2}


class Perfect:
    """The base's own K/V, and the base as its own auxiliary."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def prime(self, base: Any, tokens_BT: Any) -> Any:
        kv = base.new_kv()
        base.capture(Needs(frozenset({base.spec.num_layers})), tokens_BT, kv=kv)
        return kv

    def auxiliary_logits(self, tokens_BT: Any, last: int) -> Any:
        return self.base.capture(Needs(logits=True), tokens_BT).logits[:, -last:]


class Broken(Perfect):
    """Reads every prompt as if it were another; alone it finds all tokens equally likely."""

    def prime(self, base: Any, tokens_BT: Any) -> Any:
        return super().prime(base, (tokens_BT + 17) % 60)

    def auxiliary_logits(self, tokens_BT: Any, last: int) -> Any:
        return torch.zeros(1, last, 60)


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> Any:
    return tiny_base()


@pytest.fixture(scope="module")
def continuations(base: Any) -> list[list[int]]:
    return [generate(base, p, max_new_tokens=20).tokens for p in PROMPTS]


@pytest.fixture(scope="module")
def found(base: Any, continuations: Any) -> Any:
    return priming.judge(base, {"good": Perfect(base), "bad": Broken(base)}, PROMPTS, continuations, **LENGTHS)


def test_a_perfect_primer_is_the_base(found: Any) -> None:
    good, own = found["primers"]["good"], found["base"]
    assert (good["lossy"], good["agreement"], good["tokens"]) == (True, 1.0, 60)
    assert good["perplexity"] == own["perplexity"]
    assert good["auxiliary"]["agreement"] == 1.0
    assert good["auxiliary"]["perplexity"] == pytest.approx(own["perplexity"], rel=1e-4)


def test_perplexity_and_agreement_are_those_of_whole_forwards(base: Any, found: Any, continuations: Any) -> None:
    nats = wrong = 0.0
    for prompt, answer in zip(PROMPTS, continuations, strict=True):
        logits = base.capture(Needs(logits=True), torch.tensor([[*prompt, *answer]])).logits[0].double()
        shifted = [(t + 17) % 60 for t in prompt[:-1]] + prompt[-1:]
        other = base.capture(Needs(logits=True), torch.tensor([[*shifted, *answer]])).logits[0]
        for n, token in enumerate(answer, start=len(prompt) - 1):
            nats -= float(logits[n].log_softmax(-1)[token])
            assert int(logits[n].argmax()) == token
            wrong += int(other[n].argmax()) != token
    assert found["base"]["perplexity"] == pytest.approx(math.exp(nats / 60), rel=1e-5)
    assert found["primers"]["bad"]["agreement"] == pytest.approx(1 - wrong / 60)
    assert wrong > 0


def test_a_broken_primer_is_found_out(found: Any) -> None:
    bad, own = found["primers"]["bad"], found["base"]
    assert bad["agreement"] < 0.9
    assert bad["perplexity"] > 1.2 * own["perplexity"]
    assert bad["auxiliary"]["perplexity"] == pytest.approx(60)
    assert bad["auxiliary"]["agreement"] < 0.2


def test_what_is_found_is_plain_and_whole(found: Any) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, one in found["primers"].items():
        assert list(one["by_length"]) == ["8", "40"]
        for length, costs in one["by_length"].items():
            own = found["base"]["by_length"][length]
            assert costs["over_base"] == costs["seconds"] / own["seconds"] > 0
            assert costs["flops_over_base"] == costs["flops"] / own["flops"], name
            assert costs["auxiliary_seconds"] > 0


def block_flops(spec: BaseSpec, queries: int, slots: int) -> int:
    """Multiplications and additions of one block, by hand."""
    wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linear = queries * spec.hidden_size * (2 * wide + 2 * narrow + 3 * spec.intermediate_size)
    return 2 * (linear + 2 * queries * slots * wide)


@pytest.mark.parametrize(("family", "length"), [("llama", 8), ("qwen3", 8), ("llama", 40)])
def test_arithmetic_is_counted_by_hand(tiny_base: Any, family: str, length: int) -> None:
    """The base reads all; a primer of ours its auxiliary, the maps, and the base one token with all slots."""
    from draftsmith.heads.kv_prediction import KVPrediction, KVPredictionConfig

    base = tiny_base(family, num_hidden_layers=4)
    spec, size = base.spec, base.spec.num_kv_heads * base.spec.head_dim
    head = KVPrediction(KVPredictionConfig(keep=0.5), spec).eval()
    costs = priming.judge(base, {"kvp": head}, [[5, 6]], [[7]], lengths=[length], repeats=1)
    lm_head = 2 * spec.hidden_size * spec.vocab_size
    assert costs["base"]["by_length"][str(length)]["flops"] == 4 * block_flops(spec, length, length) + lm_head
    told, before = costs["primers"]["kvp"]["by_length"][str(length)], length - 1
    tap = 2 * before * spec.hidden_size * 2 * size  # of the upper of its two layers only keys and values
    maps = 4 * 2 * 2 * before * size * size
    last = 4 * block_flops(spec, 1, length) + lm_head
    assert told["flops"] == block_flops(spec, before, before) + tap + maps + last
    assert told["auxiliary_flops"] == 2 * block_flops(spec, length, length) + lm_head


def test_what_cannot_be_judged_is_named(base: Any, continuations: Any) -> None:
    with pytest.raises(ConfigError, match=r"lengths: 161; give 2 to 160"):
        priming.judge(base, {}, PROMPTS, continuations, lengths=[161], repeats=1)
    with pytest.raises(ConfigError, match="lengths: 1;"):
        priming.judge(base, {}, PROMPTS, continuations, lengths=[1], repeats=1)
    with pytest.raises(DataError, match="continued none"):
        priming.judge(base, {}, PROMPTS, [[], [], []], lengths=[8], repeats=1)
