"""Whose words are these? Against a loop of one forward per token."""

import math

import pytest
import torch

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.data.policy import own_words
from draftsmith.data.rows import Row, Rows

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PROMPTS = [[3, 9, 27], [5, 6], [8, 1, 2, 30, 4]]


@pytest.fixture(scope="module")
def base() -> BaseLM:
    return BaseLM(create.llama(SHAPE, None, seed=1))


def answered(base: BaseLM, temperature: float, count: int = 40, copies: int = 1) -> Rows:
    prompts = PROMPTS * copies
    new = base.answer(prompts, max_new_tokens=count, temperature=temperature, seeds=range(len(prompts)))
    pairs = zip(prompts, new, strict=True)
    return Rows.of([Row(str(i), [*p, *a], [0] * len(p) + [1] * len(a)) for i, (p, a) in enumerate(pairs)])


@torch.no_grad()
def slowly(base: BaseLM, rows: Rows) -> dict[str, float]:
    sums = {"nll": 0.0, "entropy": 0.0, "agreement": 0.0, "expected": 0.0, "tokens": 0}
    for row in rows:
        for i in range(1, len(row.ids)):
            if row.mask[i]:
                logits = base.model(torch.tensor([list(map(int, row.ids[:i]))])).logits[0, -1].double()
                p = logits.softmax(-1)
                sums["nll"] -= math.log(p[int(row.ids[i])])
                sums["entropy"] -= float((p * p.log()).sum())
                sums["agreement"] += float(int(p.argmax()) == int(row.ids[i]))
                sums["expected"] += float(p.max())
                sums["tokens"] += 1
    return {k: v if k == "tokens" else v / sums["tokens"] for k, v in sums.items()}


def test_equals_one_forward_per_token(base: BaseLM) -> None:
    rows = answered(base, 1.0, count=9)
    assert own_words(base, rows, 64) == pytest.approx(slowly(base, rows), abs=2e-4)


def test_its_own_samples_have_the_entropy_it_says(base: BaseLM) -> None:
    told = own_words(base, answered(base, 1.0, count=100, copies=12), 128)
    assert told["nll"] == pytest.approx(told["entropy"], abs=0.08)
    assert told["agreement"] == pytest.approx(told["expected"], abs=0.04)


def test_greedy_text_and_strangers_words_lie_on_either_side(base: BaseLM) -> None:
    greedy = own_words(base, answered(base, 0.0), 128)
    assert greedy["agreement"] == 1.0
    assert greedy["nll"] < greedy["entropy"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (60,), generator=generator).tolist()
    other = own_words(base, Rows.of([Row("a", ids, [0] + [1] * 59)]), 128)
    assert other["nll"] > other["entropy"] + 1


def test_nothing_learned_is_no_error(base: BaseLM) -> None:
    assert own_words(base, Rows.of([Row("a", [1, 2, 3], [0, 0, 0])]), 8)["tokens"] == 0
