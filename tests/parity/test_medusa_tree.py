"""The engine's tree step against a plain one that has no K/V, no tree mask, no positions and none of our code:
it reads the whole text again for every question, with transformers' own forward, takes each head's best tokens
by the paper's formula and walks every path of the tree by itself (arXiv 2401.10774, greedy acceptance)."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from draftsmith.decoding.engine import generate
from draftsmith.decoding.tree import from_paths
from draftsmith.heads.medusa import Medusa, MedusaConfig

WIDE = [[r] for r in range(6)] + [[0, r] for r in range(4)] + [[1, 0], [1, 1], [2, 0], [3, 0]]
DEEP = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13] * 6]


def plain(model: Any, weights: dict[str, Any], prompt: list[int], paths: list[list[int]], count: int) -> Any:
    """(tokens, accepted drafts per step) of at least `count` tokens."""

    @functools.cache
    def read(*text: int) -> tuple[Any, int]:
        """(f of the last position, the base's next token)."""
        out = model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0, -1], int(out.logits[0, -1].argmax())

    def best(f: Any, k: int) -> list[int]:
        """Head k's tokens, best first."""
        h, layer = f, 0
        while f"blocks.{k}.{layer}.linear.weight" in weights:
            at = f"blocks.{k}.{layer}.linear."
            h, layer = h + silu(weights[at + "weight"] @ h + weights[at + "bias"]), layer + 1
        lm_head = weights.get(f"lm_heads.{k}.weight", model.lm_head.weight)
        return (lm_head @ h).argsort(descending=True).tolist()

    text, steps = [*prompt, read(*prompt)[1]], []
    while len(text) - len(prompt) < count:
        f, _ = read(*text[:-1])
        ranked = [best(f, k) for k in range(max(map(len, paths)))]
        kept: list[int] = []
        for path in sorted(paths, key=lambda p: (len(p), p)):
            drafted = [ranked[k][rank] for k, rank in enumerate(path)]
            right = all(read(*text, *drafted[:k])[1] == token for k, token in enumerate(drafted))
            if right and len(drafted) > len(kept):
                kept = drafted
        text += [*kept, read(*text, *kept)[1]]
        steps.append(len(kept))
    return text[len(prompt) :], steps


@pytest.mark.parametrize(
    "config",
    [MedusaConfig(num_heads=3), MedusaConfig(num_heads=3, num_layers=2, share_lm_head=True)],
    ids=["own lm_heads", "two blocks, shared lm_head"],
)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_tree_steps_equal_the_plain_ones(
    config: MedusaConfig, seed: int, tiny_base: Callable[..., Any], noisy: Any, recording: Any
) -> None:
    base = tiny_base(seed=seed)
    head = Medusa(config, base.spec)
    head.initialise(base)
    noisy(head, 0.05, seed)
    every_step = []
    for prompt in PROMPTS:
        tokens, steps = plain(base.model, dict(head.state_dict()), prompt, WIDE + DEEP, 40)
        drafter = recording(head)
        shape = from_paths(WIDE + DEEP)
        out = generate(base, prompt, drafter=drafter, shape=shape, max_new_tokens=len(tokens))
        assert out.tokens == tokens
        assert drafter.accepted(out.stats) == steps
        assert out.tokens_per_step == pytest.approx(1 + sum(steps) / len(steps))
        every_step += steps
    assert {0, 1, 2} <= set(every_step)  # a tree in which nothing, little and much was right


def test_the_tree_is_one_of_twenty_nodes() -> None:
    shape = from_paths(WIDE + DEEP)
    assert (len(shape.parents_N) - 1, shape.depth) == (20, 3)
