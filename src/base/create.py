"""A small Llama-architecture base from nothing, saved as transformers saves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from draftsmith.errors import ConfigError


def llama(shape: dict[str, Any], tokenizer: Any | None, seed: int) -> Any:
    """A randomly initialised LlamaForCausalLM; `shape` holds LlamaConfig's arguments. A tokenizer gives the
    vocabulary's size and the special ids; without one there are none. Weights depend on `seed` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
    size: dict[str, Any] = {"vocab_size": len(tokenizer)} if tokenizer is not None else {}
    try:
        config = LlamaConfig(**special, **size, **shape)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"base.recipe.model: {e}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save(model: Any, tokenizer: Any | None, folder: Path) -> None:
    """Writes config, safetensors, generation config and tokenizer, if any, into an existing folder.

    use_cache is asserted: a base saved without it makes transformers' generate recompute the whole prefix,
    and every speedup measured against that would be a fake.
    """
    model.config.use_cache = True
    model.generation_config.use_cache = True
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
