"""A small Llama-architecture base from nothing, saved as transformers saves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from draftsmith.errors import ConfigError


def llama(shape: dict[str, Any], tokenizer: Any, seed: int) -> Any:
    """A randomly initialised LlamaForCausalLM; `shape` holds LlamaConfig's arguments, the vocabulary is the
    tokenizer's. The weights depend on `seed` alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"base.recipe.model: {e}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes config, safetensors, generation config and tokenizer into an existing folder.

    use_cache is asserted: a base saved without it makes transformers' generate recompute the whole prefix,
    and every speedup measured against that would be a fake.
    """
    model.config.use_cache = True
    model.generation_config.use_cache = True
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
