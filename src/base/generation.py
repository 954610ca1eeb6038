"""The base's own text, by Hugging Face's `generate`: the yardstick of our decoding and the maker of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from draftsmith.base.loading import quiet
from draftsmith.errors import ConfigError, DataError


def generate(
    model: Any,
    prompts: list[list[int]],
    *,
    eos_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> list[list[int]]:
    """New ids per prompt, in the caller's order: at most max_new_tokens, the EOS kept, no padding.

    temperature 0 is greedy; otherwise sampling, seeded by (seed, prompts, batch_size) in a forked RNG, so
    the caller's random state stays as it was. eos_ids empty: every row runs to max_new_tokens.
    Prompts of similar length share a batch, padded on the left. Whatever a checkpoint's generation_config
    asks for (repetition penalties, top-k, no cache) does not apply here.
    ConfigError if a prompt and its new tokens exceed the base's positions; DataError for an empty prompt.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(eos_ids) or None,
        "pad_token_id": 0,  # any id: padded positions are masked on the left and cut on the right
        **(sampling if temperature > 0 else {"do_sample": False}),
    }
    with quiet(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for first in range(0, len(order) if max_new_tokens else 0, batch_size):
            rows = order[first : first + batch_size]
            made = _one_batch(model, [prompts[i] for i in rows], settings)
            for i, ids in zip(rows, made, strict=True):
                end = next((n for n, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
                out[i] = ids[: end + 1]
    return out


@torch.no_grad()
def bare_loop(model: Any, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """New greedy ids: the model's own forward with its own growing cache, argmax, once more. Nothing ends it early."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(config=model.config), torch.tensor([list(prompt)], device=model.device)
    out: list[int] = []
    while len(out) < max_new_tokens:
        logits_BTV = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        out.append(int(logits_BTV[0, -1].argmax()))
        ids = torch.tensor([out[-1:]], device=model.device)
    return out


def _check(model: Any, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> None:
    if temperature < 0 or not 0 < top_p <= 1 or new < 0:
        raise ConfigError(
            f"generate: max_new_tokens {new}, temperature {temperature}, top_p {top_p}; "
            "needs max_new_tokens >= 0, temperature >= 0 and 0 < top_p <= 1"
        )
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"generate: prompt {i} is empty; give it at least one token")
        if len(prompt) + new > limit:
            raise ConfigError(
                f"max_new_tokens: prompt {i} has {len(prompt)} tokens, {new} more exceed the base's {limit} "
                "positions; shorten either"
            )


def _one_batch(model: Any, prompts: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    saved = model.generation_config
    # What `settings` leaves open, generate would take from the checkpoint's own generation config.
    model.generation_config = GenerationConfig()
    try:
        out = model.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            # Said outright: a checkpoint saved after training with use_cache=False would recompute the
            # whole prefix for each token, 3x slower, and flatter every speed-up measured against it.
            generation_config=GenerationConfig(use_cache=True, return_dict_in_generate=True, **settings),
        )
    finally:
        model.generation_config = saved
    assert out.past_key_values is not None, "generate ran without its K/V cache"
    return out.sequences[:, longest:].tolist()
