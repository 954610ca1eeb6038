"""Rows answered together against one-by-one argmax loops, and sampling against the base's own softmax."""

import pytest
import torch

from draftsmith.base import answering
from draftsmith.base.lm import BaseLM
from draftsmith.errors import ConfigError, DataError

PROMPTS = [[3, 9, 27], [50] * 2 + list(range(12)), [8], list(range(20, 30))]


def test_together_is_one_by_one(base, greedy):
    """Every family: learned positions, sliding windows, partial rotation."""
    expected = [greedy(base, prompt, 12) for prompt in PROMPTS]
    assert base.answer(PROMPTS, max_new_tokens=12, batch_size=3) == expected


@pytest.mark.parametrize("leave", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_row_that_ends_changes_nothing_for_the_others(make_model, monkeypatch, name, leave, greedy):
    """Ended rows leave the batch: at once, half of them together, or never."""
    base = BaseLM(make_model(name))
    monkeypatch.setattr(answering, "LEAVE", leave)
    free = [greedy(base, prompt, 14) for prompt in PROMPTS]
    base.eos_ids = frozenset({free[0][2], free[1][7], free[3][4]})
    expected = [next((f[: n + 1] for n, t in enumerate(f) if t in base.eos_ids), f) for f in free]
    assert len({len(ids) for ids in expected}) > 1
    assert base.answer(PROMPTS, max_new_tokens=14) == expected


def test_rows_leave(make_model, monkeypatch, greedy):
    """The forwards get narrower as rows end."""
    base = BaseLM(make_model("llama"))
    free = [greedy(base, prompt, 10) for prompt in PROMPTS]
    base.eos_ids = frozenset({free[0][0]} | {free[1][3]})
    widths, capture = [], base.capture

    def spy(needs, tokens, **rest):
        widths.append(len(tokens))
        return capture(needs, tokens, **rest)

    monkeypatch.setattr(base, "capture", spy)
    base.answer(PROMPTS, max_new_tokens=10)
    assert widths[0] == 4
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 4


def test_a_sample_depends_on_its_own_seed_alone(make_model):
    base = BaseLM(make_model("llama"))
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    state = torch.random.get_rng_state()
    together = base.answer(PROMPTS, seeds=[4, 5, 6, 7], batch_size=8, **settings)
    assert torch.equal(state, torch.random.get_rng_state())
    assert base.answer(PROMPTS, seeds=[4, 5, 6, 7], batch_size=2, **settings) == together
    assert [base.answer([p], seeds=[s], **settings)[0] for p, s in zip(PROMPTS, (4, 5, 6, 7), strict=True)] == together
    others = base.answer(PROMPTS, seeds=[4, 15, 6, 17], **settings)
    assert others[0] == together[0]
    assert others[2] == together[2]
    assert others[1] != together[1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.3)])
def test_sampling_follows_the_base(make_model, temperature, top_p):
    """Chi-square of the first token against softmax(logits / temperature) in its top_p nucleus."""
    base, prompt, draws = BaseLM(make_model("llama")), [4, 2], 2000
    logits = base.model(torch.tensor([prompt])).logits[0, -1].double() * 6  # sharper than a random base is
    base.lm_head = lambda final, inner=base.lm_head: inner(final) * 6
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    nucleus = probabilities.cumsum(0) - probabilities < top_p
    p = torch.zeros(61, dtype=torch.float64)
    p[order[nucleus]] = probabilities[nucleus] / probabilities[nucleus].sum()
    out = base.answer(
        [prompt] * draws, max_new_tokens=1, temperature=temperature, top_p=top_p, seeds=range(draws), batch_size=500
    )
    found = torch.bincount(torch.tensor(out)[:, 0], minlength=61)
    assert not found[p == 0].any()
    common = p * draws >= 5
    expected = torch.cat([p[common], p[~common].sum()[None]]) * draws
    counted = torch.cat([found[common], found[~common].sum()[None]])
    kept = expected > 0
    chi_square = float(((counted - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_refusals(make_model):
    base = BaseLM(make_model("llama"))
    assert base.answer([], max_new_tokens=4) == []
    assert base.answer(PROMPTS, max_new_tokens=0) == [[], [], [], []]
    with pytest.raises(DataError, match="prompt 1 is empty"):
        base.answer([[3], []], max_new_tokens=4)
    with pytest.raises(ConfigError, match="prompt 0 has 90 tokens"):
        base.answer([[1] * 90], max_new_tokens=7)
    with pytest.raises(ConfigError, match="top_p 0"):
        base.answer([[1]], max_new_tokens=7, top_p=0.0)
