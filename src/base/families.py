"""Where each Hugging Face family keeps its parts: the one table through which a base is adapted.

A family is a row of data, never a copied modelling file. Quirks that other families lack are fields with
a default, so that a new family is usually one line. Written against transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from draftsmith.errors import ConfigError


@dataclass(frozen=True)
class Paths:
    """Attribute paths inside an `AutoModelForCausalLM`, and what is particular about the family.

    kv_argument: the name under which a block takes its K/V.
    rotary: "" where the family has none; rotary_by_type: it is called with the layer's type as well.
    learned_positions: a table of positions added to the embedding before block 0 ("" = none).
    window: which blocks slide over `config.sliding_window` keys: none, all, or those that
        `config.layer_types` calls "sliding_attention".
    softcap: the key of the configuration that bounds the logits ("" = none).
    attention: the Hugging Face attention that computes this family correctly; "eager" where sdpa cannot.
    intermediate: the key of the configuration with the width of the MLP.
    llama_blocks: its blocks are Llama's: RMSNorm, rotated keys, gated SiLU MLP, parameters by the same names.
    """

    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    kv_argument: str = "past_key_values"
    rotary_by_type: bool = False
    learned_positions: str = ""
    window: Literal["none", "all", "by_type"] = "none"
    softcap: str = ""
    attention: Literal["sdpa", "eager"] = "sdpa"
    intermediate: str = "intermediate_size"
    llama_blocks: bool = False


FAMILIES: dict[str, Paths] = {
    "llama": Paths(llama_blocks=True),
    "qwen2": Paths(window="by_type", llama_blocks=True),
    "qwen3": Paths(window="by_type", llama_blocks=True),
    "mistral": Paths(window="all", llama_blocks=True),
    "phi3": Paths(window="all"),
    # The three gemmas scale their embedding inside the embedding module, so the table need not know of it.
    "gemma": Paths(),
    # The attention scores of gemma2 are soft-capped, which sdpa refuses.
    "gemma2": Paths(window="by_type", softcap="final_logit_softcapping", attention="eager"),
    "gemma3_text": Paths(window="by_type", softcap="final_logit_softcapping", rotary_by_type=True),
    "gpt_neox": Paths(
        embed="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        rotary="gpt_neox.rotary_emb",
        kv_argument="layer_past",
    ),
    "opt": Paths(
        embed="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        rotary="",
        learned_positions="model.decoder.embed_positions",
        intermediate="ffn_dim",
    ),
}


def paths_of(config: Any) -> Paths:
    """The table's row for a Hugging Face configuration; ConfigError for what the table cannot serve."""
    family = config.model_type
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"base: family '{family}' is not in the table of src/base/families.py; known: {known}")
    if getattr(config, "word_embed_proj_dim", None) not in (None, config.hidden_size):
        raise ConfigError(
            f"base: {family} with word_embed_proj_dim {config.word_embed_proj_dim} != hidden_size "
            f"{config.hidden_size} projects its embedding, which heads cannot follow; choose another base"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ConfigError(f"base: {family} with use_bidirectional_attention is no causal language model")
    return FAMILIES[family]


def part(model: nn.Module, path: str) -> Any:
    """The submodule at a dotted path; identity where the path is "" or leads to None (a norm left out)."""
    found: Any = model
    for name in path.split(".") if path else []:
        found = getattr(found, name)
    return nn.Identity() if found is None or not path else found


def layer_types(config: Any, paths: Paths, num_layers: int) -> list[str]:
    """The type of each block ("full_attention", "sliding_attention"), as rotary_by_type needs it."""
    if paths.window == "by_type":
        return list(config.layer_types)[:num_layers]
    return ["full_attention"] * num_layers


def windows(config: Any, paths: Paths, num_layers: int) -> list[int | None]:
    """How many keys back each block sees, its own included: key visible iff q_pos - k_pos < window."""
    window = getattr(config, "sliding_window", None)
    if paths.window == "all":
        return [window] * num_layers
    types = layer_types(config, paths, num_layers)
    return [window if kind == "sliding_attention" else None for kind in types]
