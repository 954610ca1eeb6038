"""The layouts in which the authors of the methods publish their weights: one row per head, read and written.

A row says how our parameter names become theirs (regular expressions, the first that matches counts) and which
of their tensors we do not want: copies of the base's, buffers, parts that their code never uses. Only safetensors
are read and written (published.py). Which settings a published file is a head of, recognise.py tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from draftsmith import artifacts
from draftsmith.contracts import BaseSpec, BaseView, Head
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.exporters import capsule
from draftsmith.exporters.card import FILE, card
from draftsmith.exporters.forms import check_dtype, in_dtype
from draftsmith.exporters.native import describe, save_adapter
from draftsmith.exporters.published import Published, Weights, read

WEIGHTS = "model.safetensors"
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """names: (our name, their key) as patterns for re.fullmatch and Match.expand; or what gives them for a head, where
    they differ with its settings. ignored: patterns of their keys that we leave out. copies: of those that
    must then be the base's own, with "embedding" or "lm_head". describe(head) -> the keys that
    their config.json has beside our name for the base."""

    names: Rules | Callable[[Any], Rules]
    describe: Callable[[Any], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    copies: Rules = ()

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


def _turns(spec: BaseSpec) -> dict[str, Any]:
    """How keys turn. What a scaling makes of rope_theta no key of theirs tells from here: the numbers themselves go
    along, for recognise.py; a server that shall scale too needs the base's rope_scaling written in."""
    size, told = spec.head_dim, {"rope_theta": spec.rope_theta}
    plain = [spec.rope_theta ** (-2 * i / size) for i in range(size // 2)]
    pairs = zip(spec.rope_frequencies or plain, plain, strict=True)
    if spec.rope_scale == 1.0 and all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs):
        return told
    return {**told, "rope_frequencies": spec.rope_frequencies, "rope_scale": spec.rope_scale}


def _taps(head: Any) -> dict[str, Any]:
    """vLLM's ids, which are ours; SGLang adds one to what it is told. Of the triple that both take by default neither
    is told."""
    depth = head.spec.num_layers
    told = list(head.layers)
    return {} if told == [2, depth // 2, depth - 3] else {"eagle_aux_hidden_state_layer_ids": told}


# FasterDecoding/Medusa, medusa_lm_head: residual blocks of head k, then its lm_head
MEDUSA = Layout(
    names=((r"blocks\.(\d+)\.(\d+)\.(.*)", r"\1.\2.\3"), (r"lm_heads\.(\d+)\.(weight)", r"\1.{num_layers}.\2")),
    describe=lambda head: {
        "medusa_num_heads": head.config.num_heads,
        "medusa_num_layers": head.config.num_layers,
        "version": "2" if head.config.share_lm_head else "1",
    },
    # of a whole model with its heads, or of vLLM's original_lm_head
    ignored=(r"model\..*",),
    copies=((r"lm_head\.weight", "lm_head"),),
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
            **_turns(head.spec),
            "exit_layer": head.exit_layer,
        },
        ignored=(r"layers\.0\.self_attn\.rotary_emb\..*",),
    ),
    # SafeAILab/EAGLE, EAGLE-3: our names are theirs; the embedding is the base's
    "Eagle3": Layout(
        names=((r"(.*)", r"\1"),),
        ignored=(r"verifier_(norm|lm_head)\.weight",),  # of the speculators library
        copies=((r"embed_tokens\.weight", "embedding"),),
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
            **_turns(head.spec),
            "vocab_size": head.spec.vocab_size,
            "draft_vocab_size": head.draft_vocab,
            **_taps(head),
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
        copies=((r"input_embed_fn\.weight", "embedding"),),
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
        check_dtype(self.dtype)


class Reference:
    """Writes a head under the names its authors published."""

    Config = ReferenceConfig

    def __init__(self, config: ReferenceConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: BaseView, *, name: str) -> Path:
        """Publishes the folder after it was read back as `draftsmith adopt` reads it, equal bit for bit."""
        layout, meant = layout_of(type(head)), in_dtype(head, self.config.dtype)
        state = meant.state_dict()
        tensors = {theirs: state[ours] for ours, theirs in keys(meant).items()}
        described = {**layout.describe(head), "base_model_name_or_path": head.spec.path}
        kind = type(head).__name__.lower().replace("kvprediction", "kv_prediction")
        adopting = f"draftsmith adopt path=this-folder kind={kind} base=hf base.path={quote(head.spec.path)} out={kind}"
        with artifacts.publish(folder, kind=f"export reference {type(head).__name__.lower()}") as temporary:
            artifacts.write_tensors(temporary / WEIGHTS, tensors)
            artifacts.write_json(temporary / "config.json", described)
            save_adapter(temporary, base.adapter)
            parameters = sum(t.numel() for t in state.values())
            (temporary / FILE).write_text(card(describe(meant, name), parameters, served=adopting))
            back = load(temporary, type(head), head.config, head.spec)
            if any(not torch.equal(t, state[n].to(t.dtype)) for n, t in back.state_dict().items()):
                raise NumericsError(f"{folder}: what was written does not read back equal; check the disk")
            if head.golden is not None and self.config.dtype is None:
                capsule.check(back, base, head.golden, folder)
        return folder


def load(
    source: Path | str | Published,
    kind: type[Head],
    config: Any,
    spec: BaseSpec,
    *,
    base: Mapping[str, Tensor] | None = None,
    despite: Collection[str] = (),
) -> Head:
    """A head with the weights of a published file or folder, in fp32. base: its "embedding" and its "lm_head", to hold
    the file's copies of them against; keys in `despite` may differ.

    DataError names every key that is missing, left over or of another shape.
    """
    weights = (source if isinstance(source, Published) else read(source)).weights
    layout = layout_of(kind)
    with torch.device("meta"):
        head = kind(config, spec)
    wanted, own = keys(head), head.state_dict()
    _compare(weights, {wanted[n]: tuple(t.shape) for n, t in own.items()}, layout)
    for name, whose in base.items() if base else ():
        _check_copies(weights, layout, name, whose, despite)
    # copies, since a file's tensors begin wherever they do: some CPU kernels round by a pointer's alignment
    tensors = {name: weights[key].to(own[name].dtype, copy=True) for name, key in wanted.items()}
    head.load_state_dict(tensors, strict=True, assign=True)
    return head.eval().requires_grad_(False)


def _compare(weights: Weights, wanted: Mapping[str, tuple[int, ...]], layout: Layout) -> None:
    have, unwanted = weights.shapes, [*layout.ignored, *(pattern for pattern, _ in layout.copies)]
    left = [k for k in have if k not in wanted and not any(re.fullmatch(p, k) for p in unwanted)]
    missing = [k for k in wanted if k not in have]
    shapes = [f"{k} {have[k]}, not {wanted[k]}" for k in wanted if k in have and have[k] != wanted[k]]
    told = [f"{what}: {_some(which)}" for what, which in
            (("missing", missing), ("left over", left), ("of another shape", shapes)) if which]  # fmt: skip
    if told:
        raise DataError(f"{weights.path}: not this head with these settings on this base; {'; '.join(told)}")


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _check_copies(weights: Weights, layout: Layout, name: str, own: Tensor, despite: Collection[str]) -> None:
    """What the file copied of the base is the base's, to a half-precision file's rounding."""
    for pattern, whose in layout.copies:
        for key in (k for k in weights if whose == name and k not in despite and re.fullmatch(pattern, k)):
            theirs = weights[key].to(own.device, torch.float32)
            if theirs.shape != own.shape or not torch.allclose(theirs, own.float(), rtol=1e-2, atol=1e-3):
                raise DataError(
                    f"{weights.path}: {key} is not the base's {name}: the head was made for another base, or trained"
                    f" one of its own, which ours has not; give the base it was made for, or despite=[{key}]"
                )
