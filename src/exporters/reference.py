"""The layouts in which the authors of the methods publish their weights: one row per head, read and written.

A row says how our parameter names become theirs (regular expressions, the first that matches counts) and which
of their tensors we do not want: copies of the base's, buffers, parts that their code never uses. Only safetensors
are read and written; a published .pt or .bin is a pickle and has to be converted first, by whoever trusts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from draftsmith import artifacts
from draftsmith.contracts import BaseSpec, BaseView, Head
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters.native import save_adapter

WEIGHTS = "model.safetensors"
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """names: (our name, their key) as patterns for re.fullmatch and Match.expand; or what gives them for a head, where
    they differ with its settings. ignored: patterns of their keys that we leave out. describe(head) -> the keys that
    their config.json has beside our name for the base."""

    names: Rules | Callable[[Any], Rules]
    describe: Callable[[Any], dict[str, Any]]
    ignored: tuple[str, ...] = ()

    def key(self, name: str, head: Head) -> str:
        for ours, theirs in self.names(head) if callable(self.names) else self.names:
            if found := re.fullmatch(ours, name):
                return found.expand(theirs)
        raise AssertionError(f"{name}: no rule of this layout names it")


def _hydra(head: Any) -> Rules:
    """With a prefix layer a dropout module stands before every block and lm_head, and counts."""
    between, inner = (2, ".1") if head.config.prefix_layer else (1, "")
    blocks = [(j, between * (j + 1) - 1) for j in range(head.config.num_layers)]
    return (
        (r"blocks\.(\d+)\.0\.residual\.(.*)", rf"hydra_mlp.\1.{blocks[0][1]}.res_connection.\2"),
        *((rf"blocks\.(\d+)\.{ours}\.(.*)", rf"hydra_mlp.\1.{theirs}.\2") for ours, theirs in blocks),
        (r"lm_heads\.(\d+)\.(.*)", rf"hydra_lm_head.\1{inner}.\2"),
        (r"prefix\.layer\.(.*)", r"prefix_embeding_layer.layers.0.\1"),
        (r"prefix\.(norm\..*)", r"prefix_embeding_layer.\1"),
    )


# FasterDecoding/Medusa, medusa_lm_head: residual blocks of head k, then its lm_head
MEDUSA = Layout(
    names=((r"blocks\.(\d+)\.(\d+)\.(.*)", r"\1.\2.\3"), (r"lm_heads\.(\d+)\.(weight)", r"\1.{num_layers}.\2")),
    describe=lambda head: {
        "medusa_num_heads": head.config.num_heads,
        "medusa_num_layers": head.config.num_layers,
        "version": "2" if head.config.share_lm_head else "1",
    },
)

LAYOUTS: dict[str, Layout] = {
    "Medusa": MEDUSA,
    "Medusa2": MEDUSA,  # the adapter lies beside it, in peft's format
    # Equationliu/Kangaroo, the adapter: a Llama of one layer without MLP
    "Kangaroo": Layout(
        names=((r"(norm\..*)", r"\1"), (r"(.*)", r"layers.0.\1")),
        describe=lambda head: {
            "num_hidden_layers": 1,
            "hidden_size": head.spec.hidden_size,
            "num_attention_heads": head.spec.num_heads,
            "num_key_value_heads": head.spec.num_kv_heads,
            "rms_norm_eps": head.spec.norm_eps,
            "rope_theta": head.spec.rope_theta,
            "exit_layer": head.exit_layer,
        },
    ),
    # SafeAILab/EAGLE, EAGLE-3: our names are theirs; the embedding is the base's
    "Eagle3": Layout(
        names=((r"(.*)", r"\1"),),
        ignored=(r"embed_tokens\.weight",),
        describe=lambda head: {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": head.spec.hidden_size,
            "intermediate_size": head.spec.intermediate_size,
            "num_attention_heads": head.spec.num_heads,
            "num_key_value_heads": head.spec.num_kv_heads,
            "head_dim": head.spec.head_dim,
            "max_position_embeddings": head.spec.max_positions,
            "rms_norm_eps": head.spec.norm_eps,
            "rope_theta": head.spec.rope_theta,
            "vocab_size": head.spec.vocab_size,
            "draft_vocab_size": head.draft_vocab,
        },
    ),
    # Kaffaljidhmah2/SpecDec_pp, the acceptance head: blocks in a row, then the map to (refuse, accept)
    "Acceptance": Layout(
        names=lambda head: (
            (r"blocks\.(\d+)\.(.*)", r"model.\1.\2"),
            (r"out\.(.*)", rf"model.{head.config.num_layers}.\1"),
        ),
        describe=lambda head: {
            "hidden_size": head.config.hidden_size or head.spec.hidden_size,
            "num_layers": head.config.num_layers,
        },
    ),
    # apple/corenet, KV prediction: the maps by their names; of the auxiliary, which is OpenELM there, the names are
    # Llama's under their prefix; `base` is the frozen model
    "KVPrediction": Layout(
        names=(
            (r"(key|value)s\.(.*)", r"predicter.auxkv_to_basekv.\1_transforms.\2"),
            (r"lm_head\.(.*)", r"auxiliary.lm_head.\1"),
            (r"(.*)", r"auxiliary.model.\1"),
        ),
        ignored=(r"base\..*",),
        describe=lambda head: {"auxkv_num_layers_to_basekv_num_layers": head.layer_map},
    ),
    # For Clover nothing was published: these keys are our choice, in the naming of the Clover-2 release
    "Clover": Layout(
        names=(
            (r"layer\.(.*)", r"layers.0.\1"),
            (r"connections\.(.*)", r"clover_head_mlp_rnn.\1"),
            (r"blocks\.(.*)", r"clover_head_mlp.\1"),
        ),
        describe=lambda head: {
            "clover": {
                "num_heads": head.config.num_heads,
                "num_layers": int(head.config.augment),
                "decay_coefficient": head.config.decay,
            }
        },
    ),
    # XiaoBin1992/clover, Clover2Model; its embedding and its lm_head are the base's lm_head
    "Clover2": Layout(
        names=(
            (r"(layers\..*)", r"\1"),
            (r"norm\.(.*)", r"clover_norm.\1"),
            (r"head_norm\.(.*)", r"clover_head_norm.\1"),
            (r"first\.(.*)", r"clover_head_mlp.\1"),
            (r"later\.(.*)", r"clover_head_mlp2.\1"),
            (r"advance\.(.*)", r"clover_head_mlp_rnn.\1"),
            (r"regress\.(.*)", r"clover_head_mlp_rnn2.\1"),
        ),
        ignored=(r"clover_embed_tokens\.weight", r"lm_head\.weight"),
        describe=lambda head: {
            "clover": {
                "num_heads": head.config.num_heads,
                "num_layers": head.config.num_layers,
                "heads_coefficient": 1.0,
                "decay_coefficient": head.config.decay,
            }
        },
    ),
    # zankner/Hydra, hydra_lm_head: the blocks of head k, its lm_head; of Hydra++ the prefix layer (their spelling) too
    "Hydra": Layout(
        names=_hydra,
        describe=lambda head: {
            "hydra_num_heads": head.config.num_heads,
            "hydra_num_layers": head.config.num_layers,
            "hydra_head_arch": "prefix-mlp" if head.config.prefix_layer else "mlp",
            "grounded_heads": True,
            "hidden_state_offset": 0,
        },
        ignored=(r"prefix_embeding_layer\.(embed_tokens\.weight|layers\.0\.self_attn\.rotary_emb\..*)",),
    ),
}


def keys(head: Head) -> dict[str, str]:
    """Our name -> the published key, for every tensor of this head."""
    layout = layout_of(type(head))
    settings = {k: str(v) for k, v in vars(head.config).items()}
    found = {name: layout.key(name, head) for name in head.state_dict()}
    return {name: re.sub(r"\{(\w+)\}", lambda m: settings[m[1]], key) for name, key in found.items()}


def layout_of(kind: type[Head]) -> Layout:
    if kind.__name__ not in LAYOUTS:
        raise ConfigError(f"exporter: {kind.__name__} has no published layout; use exporter=native")
    return LAYOUTS[kind.__name__]


@dataclass(frozen=True)
class ReferenceConfig:
    dtype: str | None = None  # float32 | bfloat16 | float16; null: as trained

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype='{self.dtype}': choose float32, bfloat16, float16 or null")


class Reference:
    """Writes a head under the names its authors published."""

    Config = ReferenceConfig

    def __init__(self, config: ReferenceConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: BaseView, *, name: str) -> Path:
        layout, dtype = layout_of(type(head)), getattr(torch, self.config.dtype) if self.config.dtype else None
        tensors = {}
        for ours, theirs in keys(head).items():
            tensor = head.state_dict()[ours].detach().cpu()
            tensors[theirs] = tensor.to(dtype if tensor.is_floating_point() else None).clone().contiguous()
        described = {**layout.describe(head), "base_model_name_or_path": head.spec.path}
        with artifacts.publish(folder, kind=f"reference {type(head).__name__}") as temporary:
            artifacts.write_tensors(temporary / WEIGHTS, tensors)
            artifacts.write_json(temporary / "config.json", described)
            save_adapter(temporary, base.adapter)
        return folder


def load(path: Path | str, kind: type[Head], config: Any, spec: BaseSpec) -> Head:
    """A head with the weights of a published file (or a folder with model.safetensors).

    DataError names every key that is missing, left over or of another shape.
    """
    path = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: not safetensors; a .pt or .bin is a pickle: convert it first, if you trust it")
    layout = layout_of(kind)
    try:
        theirs = load_file(path)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path}: {' '.join(str(e).split())}") from None
    with torch.device("meta"):
        head = kind(config, spec)
    wanted, own = keys(head), head.state_dict()
    _compare(path, {wanted[n]: tuple(t.shape) for n, t in own.items()}, theirs, layout)
    tensors = {name: theirs[key].to(own[name].dtype) for name, key in wanted.items()}
    head.load_state_dict(tensors, strict=True, assign=True)
    return head.eval().requires_grad_(False)


def _compare(path: Path, wanted: Mapping[str, tuple[int, ...]], have: Mapping[str, torch.Tensor], by: Layout) -> None:
    left = [k for k in have if k not in wanted and not any(re.fullmatch(p, k) for p in by.ignored)]
    missing = [k for k in wanted if k not in have]
    shapes = [
        f"{k} {tuple(have[k].shape)}, not {wanted[k]}" for k in wanted if k in have and have[k].shape != wanted[k]
    ]
    told = [f"{what}: {', '.join(sorted(which))}" for what, which in
            (("missing", missing), ("left over", left), ("of another shape", shapes)) if which]  # fmt: skip
    if told:
        raise DataError(f"{path}: not this head with these settings; {'; '.join(told)}")
