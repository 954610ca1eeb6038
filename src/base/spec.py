"""What a base says of itself before and after loading: its BaseSpec, its fingerprints, its stop tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.artifacts import fingerprint, tensors_sha256
from draftsmith.base.families import Paths, part
from draftsmith.base.lora import own_name
from draftsmith.contracts import BaseSpec

# Where a configuration came from, how it was stored or what one call should return: none of it says what
# the base computes.
NOISE = frozenset(
    {
        *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
        *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type"),
    }
)


NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of what turns text into ids: the fast tokenizer's own JSON, or the vocabulary without one.

    Padding and truncation are left out: calling a tokenizer changes them.
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = dict(tokenizer.get_vocab()) if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules["padding"] = rules["truncation"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint([rules, special])


def template_sha256(tokenizer: Any) -> str:
    """Fingerprint of the chat template; "" without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else fingerprint(template)


def spec_of(model: Any, paths: Paths, tokenizer: Any, path: str, revision: str | None) -> BaseSpec:
    """BaseSpec of a loaded Hugging Face model."""
    config = model.config
    heads = config.num_attention_heads
    head = part(model, paths.head)
    names = dict(part(model, paths.layers)[0].named_parameters()) if paths.llama_blocks else {}
    # a bias elsewhere (Llama's attention_bias, mlp_bias) makes a block that a head's own cannot copy
    plain = not any(n.endswith("bias") and not n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for n in names)
    shape = {k: v for k, v in config.to_dict().items() if k not in NOISE}
    return BaseSpec(
        family=config.model_type,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, paths.intermediate),
        vocab_size=head.weight.shape[0],
        num_layers=len(part(model, paths.layers)),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
        lm_head_bias=head.bias is not None,
        norm_eps=next((v for k in NORM_EPS if (v := getattr(config, k, None)) is not None), BaseSpec.norm_eps),
        **_rope(model, paths),
        llama_blocks=paths.llama_blocks and plain,
        qkv_bias=plain and "self_attn.q_proj.bias" in names,
        qk_norm="self_attn.q_norm.weight" in names,
        path=path,
        revision=revision,
        config_sha256=fingerprint(shape),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        template_sha256=template_sha256(tokenizer),
    )


def _rope(model: Any, paths: Paths) -> dict[str, Any]:
    """How its keys turn, scaling included; made anew on the CPU, since an outline's buffers hold nothing."""
    if not paths.llama_blocks:
        return {}
    with torch.device("cpu"):
        rotary = type(part(model, paths.rotary))(config=model.config)
    return {
        "rope_theta": float((getattr(model.config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)),
        "rope_frequencies": rotary.inv_freq.tolist(),
        "rope_scale": float(rotary.attention_scaling),
    }


def eos_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the config's, else the tokenizer's, in the order
    in which Hugging Face's own `generate` looks."""
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def weights_sha256(
    model: nn.Module, rotary: str = "", whole: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
) -> str:
    """Hash of every parameter and buffer by name, dtype, shape and bytes.

    The rotary module's buffers (prefix `rotary`) are left out: some families recompute them in place as
    sequences grow, and they follow from the configuration alone. whole: puts a tensor together while it is read.
    """
    everything: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    named = [(own, t) for n, t in everything if (own := own_name(n))]
    return tensors_sha256({n: t for n, t in named if not (rotary and n.startswith(rotary + "."))}, whole)
