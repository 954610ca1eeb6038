"""What is known of a base before it is loaded: its sizes, how many parameters they make, a small random stand-in.

Pure arithmetic for the families whose blocks are Llama's; of any other the model itself is counted, on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from draftsmith.base.settings import ShapeConfig
from draftsmith.contracts import BaseSpec
from draftsmith.errors import ConfigError, DataError

FAKE_PART = 64  # a stand-in's width, MLP and vocabulary are such a part of the base's, so that their ratios stay
FAKE_LAYERS = 8  # at most
SMALL = 512  # a base no wider than this stands for itself, with random weights
BIASED = ("qwen2",)  # families with biases on queries, keys and values
NORMED = ("qwen3",)  # and with a norm on each head's queries and keys


def of(
    path: str | None, revision: str | None, shape: ShapeConfig | None, recipe: Mapping[str, Any] | None
) -> ShapeConfig:
    """The sizes of a base as its configuration tells them: said there, of a recipe, of a folder, or of a hub id whose
    config.json is on this machine. No network; ConfigError where they are nowhere."""
    if shape is not None:
        return shape
    if recipe is not None:
        told = {"vocab_size": recipe.get("vocab_size"), **recipe["model"]}
        return _read({"model_type": "llama", **told}, "base.recipe.model")
    local = Path(str(path)) / "config.json"
    if local.is_file():
        try:
            told = json.loads(local.read_text())
        except (OSError, ValueError) as e:
            raise DataError(f"base: {local} cannot be read as JSON: {e}") from None
        return _read(told, str(local))
    return _read(_cached(str(path), revision), str(path))


def _cached(path: str, revision: str | None) -> dict[str, Any]:
    """config.json of a hub id, if an earlier download left it here."""
    from transformers import AutoConfig

    try:
        how: dict[str, Any] = {"revision": revision, "local_files_only": True, "trust_remote_code": False}
        return AutoConfig.from_pretrained(path, **how).to_dict()
    except (OSError, ValueError):
        raise ConfigError(
            f"base.shape: the sizes of {path} are not on this machine; choose a yaml of conf/base that has them, or"
            " give base.shape={vocab_size: …, hidden_size: …}, as in conf/base/vicuna_7b.yaml"
        ) from None


def _read(told: Mapping[str, Any], where: str) -> ShapeConfig:
    """A config.json's sizes; families differ in how they name some of them."""
    told = {**told, "intermediate_size": told.get("intermediate_size") or told.get("ffn_dim")}
    told["num_key_value_heads"] = told.get("num_key_value_heads") or told.get("num_attention_heads")
    known = {f.name: told[f.name] for f in fields(ShapeConfig) if told.get(f.name) is not None}
    try:
        return ShapeConfig(**known)
    except TypeError as e:
        raise ConfigError(f"base: {where} does not tell its sizes ({e}); give base.shape") from None


def spec_of(shape: ShapeConfig, path: str = "") -> BaseSpec:
    """The BaseSpec of a base that is not loaded: what heads need to be built on the meta device."""
    from draftsmith.base.families import FAMILIES

    if shape.model_type not in FAMILIES:
        raise ConfigError(f"base.shape.model_type: '{shape.model_type}' is none of {', '.join(sorted(FAMILIES))}")
    return BaseSpec(
        family=shape.model_type,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_key_value_heads,
        head_dim=shape.size,
        max_positions=shape.max_position_embeddings,
        llama_blocks=FAMILIES[shape.model_type].llama_blocks,
        qkv_bias=shape.model_type in BIASED,
        qk_norm=shape.model_type in NORMED,
        path=path,
    )


def block_parameters(shape: ShapeConfig) -> int:
    """Of one of its blocks."""
    d, queries = shape.hidden_size, shape.num_attention_heads * shape.size
    keys = shape.num_key_value_heads * shape.size
    own = 2 * d * queries + 2 * d * keys + 3 * d * shape.intermediate_size + 2 * d
    own += (queries + 2 * keys) * (shape.model_type in BIASED)
    return own + 2 * shape.size * (shape.model_type in NORMED)


def parameters(shape: ShapeConfig) -> int:
    """Of the whole base, a tied embedding once."""
    if not spec_of(shape).llama_blocks:
        return sum(p.numel() for p in model(asdict(shape), seed=0, device="meta").parameters())
    tables = 1 if shape.tie_word_embeddings else 2
    d = shape.hidden_size
    return shape.num_hidden_layers * block_parameters(shape) + tables * shape.vocab_size * d + d


def check(shape: ShapeConfig, spec: BaseSpec, config: Any) -> None:
    """ConfigError with every size that the loaded base has otherwise."""
    found = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_positions,
        "model_type": spec.family,
        "head_dim": spec.head_dim,
        "tie_word_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
    }
    said = {**asdict(shape), "head_dim": shape.size}
    wrong = [f"{name}={said[name]}, where {spec.path} has {found[name]}" for name in found if said[name] != found[name]]
    if wrong:
        raise ConfigError(f"base.shape.{'; base.shape.'.join(wrong)}; correct the shape, or base.path")


def fake(shape: ShapeConfig) -> dict[str, Any]:
    """The keys of a small model in the proportions of this one: d : V : ff, query heads per key head, and layers up to
    FAKE_LAYERS. Two bases of one vocabulary keep one."""
    part = FAKE_PART if shape.hidden_size > SMALL else 1
    groups = shape.num_attention_heads // shape.num_key_value_heads
    keys = max(1, 4 // groups)
    heads = groups * keys
    width = heads * max(2, round(shape.hidden_size / part / heads))
    wide = shape.num_attention_heads * shape.size / shape.hidden_size  # of all heads together, as a share of d
    sizes = {
        "model_type": shape.model_type,
        "vocab_size": max(64, round(shape.vocab_size / part)),
        "hidden_size": width,
        "intermediate_size": max(2, round(width * shape.intermediate_size / shape.hidden_size)),
        "num_hidden_layers": min(shape.num_hidden_layers, FAKE_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": min(shape.max_position_embeddings, 512),
        "head_dim": 2 * max(2, round(width * wide / heads / 2)),
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    return sizes | (
        {"word_embed_proj_dim": width, "ffn_dim": sizes["intermediate_size"]} if shape.model_type == "opt" else {}
    )


def model(sizes: Mapping[str, Any], *, seed: int, device: str = "cpu") -> Any:
    """A transformers model of these sizes with random weights, from the seed alone; none on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    given = {name: value for name, value in sizes.items() if value is not None}
    config = AutoConfig.for_model(**{**special, **given})
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def forward_bytes(shape: ShapeConfig, positions: int, size: int) -> float:
    """The most that a forward without gradients holds: in a block's MLP gate, up and their product; the residual stream
    twice, the normed one, and the rotation's cosines and sines. size: bytes of a number."""
    mlp = 3 * shape.intermediate_size + 3 * shape.hidden_size
    queries, keys = shape.num_attention_heads * shape.size, shape.num_key_value_heads * shape.size
    attention = 2 * shape.hidden_size + 3 * queries + 3 * keys
    return float(positions * size * (max(mlp, attention) + 2 * shape.size))


def kept_bytes(shape: ShapeConfig, positions: int, size: int, *, recompute: bool) -> float:
    """What a forward keeps of every block for the backward pass, where gradients go through them: both norms' input and
    output, queries, keys and values before and after their rotation, what attention gives, and the MLP's four. With
    recompute only what enters, and one block's whole."""
    queries, keys = shape.num_attention_heads * shape.size, shape.num_key_value_heads * shape.size
    block = 4 * shape.hidden_size + 3 * queries + 3 * keys + 4 * shape.intermediate_size
    layers = shape.num_hidden_layers
    numbers = layers * shape.hidden_size + block if recompute else layers * block
    return float(positions * size * numbers)
