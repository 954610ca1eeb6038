"""Batched generation against one-by-one argmax loops of full forwards."""

import pytest
import torch

from draftsmith.base.lm import BaseLM
from draftsmith.errors import ConfigError, DataError

PROMPTS = [[3, 9, 27], [50] * 2 + list(range(12)), [8], list(range(20, 30))]


def test_batches_equal_one_by_one_greedy(base, greedy):
    expected = [greedy(base, prompt, 12) for prompt in PROMPTS]
    assert base.generate(PROMPTS, max_new_tokens=12, batch_size=3) == expected


def test_stops_after_eos_and_keeps_it(make_model):
    model = make_model("llama")
    free = BaseLM(model).generate(PROMPTS, max_new_tokens=16)
    stop = free[1][4]
    model.generation_config.eos_token_id = stop
    base = BaseLM(model)
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert base.eos_ids == {stop}
    assert len(expected[1]) <= 5
    assert base.generate(PROMPTS, max_new_tokens=16) == expected
    assert base.generate(PROMPTS, max_new_tokens=16, eos=False) == free


def test_sampling_is_seeded_and_leaves_the_callers_rng_alone(llama):
    state = torch.random.get_rng_state()
    one, again, other = (
        llama.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampling_follows_the_base(make_model):
    """Chi-square of the first sampled token against the base's own softmax, 3 tokens of enough mass."""
    base = BaseLM(make_model("llama"))
    prompt, draws = [4, 2], 600
    probabilities = base.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    out = base.generate([prompt] * draws, max_new_tokens=1, temperature=1.0, seed=3, batch_size=200)
    counts = torch.bincount(torch.tensor(out)[:, 0], minlength=61)
    common = probabilities * draws >= 5
    expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]]) * draws
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    chi_square = float(((found - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_checkpoints_generation_config_does_not_leak(make_model, monkeypatch, greedy):
    model = make_model("llama")
    expected = [greedy(BaseLM(model), prompt, 8) for prompt in PROMPTS]
    config = model.generation_config
    config.use_cache, config.repetition_penalty, config.max_length = False, 5.0, 3
    read = []
    inner = model.model.forward

    def spy(*args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    assert BaseLM(model).generate(PROMPTS, max_new_tokens=8) == expected
    assert read == [14] + [1] * 7  # the cache is on: after the prompt, one token per forward
    assert model.generation_config is config


def test_refusals(llama):
    with pytest.raises(ConfigError, match="prompt 1 has 90 tokens, 7 more exceed the base's 96"):
        llama.generate([[1], [1] * 90], max_new_tokens=7)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        llama.generate([[1], []], max_new_tokens=7)
    with pytest.raises(ConfigError, match="temperature -1"):
        llama.generate([[1]], max_new_tokens=7, temperature=-1.0)
    assert llama.generate([[1], [2]], max_new_tokens=0) == [[], []]
    assert llama.generate([], max_new_tokens=5) == []
