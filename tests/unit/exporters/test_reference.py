"""§11.36: published key layouts, written down here by hand from the authors' code: names, shapes, and nothing else."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from draftsmith import config
from draftsmith.contracts import BaseSpec
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import reference
from draftsmith.exporters.reference import LAYOUTS, Reference, ReferenceConfig

D, FF, V, HEADS, KV_HEADS, SIZE = 16, 24, 40, 4, 2, 4
SPEC = BaseSpec("llama", D, FF, V, 4, HEADS, KV_HEADS, SIZE, 64, llama_blocks=True)
FOLDER = Path(__file__).parents[3] / "conf" / "head"
YAMLS = sorted(p.stem for p in FOLDER.glob("*.yaml"))

Shapes = dict[str, tuple[int, ...]]


def attention(prefix: str, size: int = D) -> Shapes:
    """Of a Llama block."""
    return {
        f"{prefix}.q_proj.weight": (HEADS * SIZE, size),
        f"{prefix}.k_proj.weight": (KV_HEADS * SIZE, size),
        f"{prefix}.v_proj.weight": (KV_HEADS * SIZE, size),
        f"{prefix}.o_proj.weight": (D, HEADS * SIZE),
    }


def mlp(prefix: str) -> Shapes:
    """Of a Llama block."""
    return {
        f"{prefix}.gate_proj.weight": (FF, D),
        f"{prefix}.up_proj.weight": (FF, D),
        f"{prefix}.down_proj.weight": (D, FF),
    }


def medusa() -> Shapes:
    found: Shapes = {}
    for k in range(2):
        found |= {f"{k}.0.linear.weight": (D, D), f"{k}.0.linear.bias": (D,), f"{k}.1.weight": (V, D)}
    return found


def hydra() -> Shapes:
    """Two heads of one layer: hydra_head_arch mlp."""
    found: Shapes = {}
    for k in range(2):
        wide = (D, (k + 2) * D)
        for name in ("linear", "res_connection"):
            found |= {f"hydra_mlp.{k}.0.{name}.weight": wide, f"hydra_mlp.{k}.0.{name}.bias": (D,)}
        found |= {f"hydra_lm_head.{k}.weight": (V, D), f"hydra_lm_head.{k}.bias": (V,)}
    return found


def hydra_pp() -> Shapes:
    """Two heads of three layers: hydra_head_arch prefix-mlp, where dropout modules take every other number."""
    found: Shapes = {}
    for k in range(2):
        wide = (D, (k + 2) * D)
        for name in ("linear", "res_connection"):
            found |= {f"hydra_mlp.{k}.1.{name}.weight": wide, f"hydra_mlp.{k}.1.{name}.bias": (D,)}
        for j in (3, 5):
            found |= {f"hydra_mlp.{k}.{j}.linear.weight": (D, D), f"hydra_mlp.{k}.{j}.linear.bias": (D,)}
        found |= {f"hydra_lm_head.{k}.1.weight": (V, D), f"hydra_lm_head.{k}.1.bias": (V,)}
    layer = "prefix_embeding_layer.layers.0"
    norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "prefix_embeding_layer.norm")
    return found | attention(f"{layer}.self_attn") | mlp(f"{layer}.mlp") | {f"{name}.weight": (D,) for name in norms}


def block(prefix: str) -> Shapes:
    """A whole Llama block."""
    norms = ("input_layernorm", "post_attention_layernorm")
    return attention(f"{prefix}.self_attn") | mlp(f"{prefix}.mlp") | {f"{prefix}.{n}.weight": (D,) for n in norms}


def clover() -> Shapes:
    """Two heads. Nothing was published; the names are ours after Clover-2's."""
    found = block("layers.0")
    for k in range(2):
        found |= {f"clover_head_mlp_rnn.{k}.{name}.weight": (D, D) for name in "qkv"}
        found |= {f"clover_head_mlp_rnn.{k}.input_layernorm.weight": (D,)}
        found |= {f"clover_head_mlp.{k}.linear.weight": (D, D), f"clover_head_mlp.{k}.linear.bias": (D,)}
    return found


def clover2() -> Shapes:
    found = block("layers.0") | block("layers.1")
    for name in ("clover_head_mlp_rnn", "clover_head_mlp_rnn2"):
        found |= {f"{name}.input_layernorm.weight": (D,)}
        for part in "qkv":
            found |= {f"{name}.{part}.weight": (D, D), f"{name}.{part}.bias": (D,)}
    found |= {"clover_head_mlp.weight": (D, D), "clover_head_mlp2.weight": (D, 2 * D)}
    found |= {f"clover_head_mlp{n}.bias": (D,) for n in ("", "2")}
    return found | {"clover_norm.weight": (D,), "clover_head_norm.weight": (D,)}


def acceptance() -> Shapes:
    """Two blocks and the map to two classes."""
    found: Shapes = {"model.2.weight": (2, D), "model.2.bias": (2,)}
    for n in range(2):
        found |= {f"model.{n}.linear.weight": (D, D), f"model.{n}.linear.bias": (D,)}
    return found


def kv_prediction() -> Shapes:
    """The auxiliary is two of the base's four layers. (The published one is an OpenELM; its layers' names are Llama's
    here.)"""
    found: Shapes = {"auxiliary.model.embed_tokens.weight": (V, D), "auxiliary.model.norm.weight": (D,)}
    found |= {**block("auxiliary.model.layers.0"), **block("auxiliary.model.layers.1")}
    wide = KV_HEADS * SIZE
    for n in range(4):
        for what in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{what}_transforms.{n}"
            found |= {f"{name}.weight": (wide, wide), f"{name}.bias": (wide,)}
    return found | {"auxiliary.lm_head.weight": (V, D)}


HYDRA_UNUSED: Shapes = {
    "prefix_embeding_layer.embed_tokens.weight": (V, D),
    "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq": (SIZE // 2,),
}


# yaml -> (settings, the published tensors, of which these are copies or unused and left out)
PUBLISHED: dict[str, tuple[dict[str, Any], Shapes, Shapes]] = {
    "medusa": ({"num_heads": 2, "num_layers": 1}, medusa(), {}),
    "medusa2": ({"num_heads": 2, "num_layers": 1}, medusa(), {}),
    "eagle3": (
        {"draft_vocab_size": 10},
        {
            "fc.weight": (D, 3 * D),
            **attention("midlayer.self_attn", 2 * D),
            **mlp("midlayer.mlp"),
            **{f"midlayer.{n}.weight": (D,) for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
            "norm.weight": (D,),
            "lm_head.weight": (10, D),
            "d2t": (10,),
            "t2d": (V,),
        },
        {"embed_tokens.weight": (V, D)},
    ),
    "kangaroo": (
        {"exit_layer": 1},
        {**attention("layers.0.self_attn"), "layers.0.input_layernorm.weight": (D,), "norm.weight": (D,)},
        {},
    ),
    "clover": ({"num_heads": 2}, clover(), {}),
    "clover2": ({}, clover2(), {"clover_embed_tokens.weight": (V, D), "lm_head.weight": (V, D)}),
    "hydra": ({"num_heads": 2}, hydra(), {}),
    "acceptance": ({"num_layers": 2}, acceptance(), {}),
    "kv_prediction": ({"keep": 0.5}, kv_prediction(), {"base.embed_tokens.weight": (V, D)}),
    "hydra_pp": ({"num_heads": 2, "num_layers": 3}, hydra_pp(), HYDRA_UNUSED),
}


def head_of(yaml: str, **settings: Any) -> tuple[Any, Any]:
    """(class, typed config) of a head's yaml with these settings."""
    node: Any = {**OmegaConf.to_container(OmegaConf.load(FOLDER / f"{yaml}.yaml")), **settings}
    kind = config.target(node, yaml)
    return kind, config.typed(node, kind.Config, yaml)


def fill(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        if not re.fullmatch("d2t|t2d", name)
        else torch.arange(shape[0]) % 2 == 0
        if name == "t2d"
        else torch.arange(shape[0])
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("yaml", YAMLS)
def test_published_weights_load_and_are_written_back_the_same(yaml: str, tmp_path: Path) -> None:
    settings, shapes, unused = PUBLISHED[yaml]
    theirs = fill(shapes)
    save_file({**theirs, **fill(unused)}, tmp_path / "published.safetensors")
    kind, own = head_of(yaml, **settings)
    head = reference.load(tmp_path / "published.safetensors", kind, own, SPEC)
    values = sorted(float(t.double().sum()) for t in head.state_dict().values())
    assert values == sorted(float(t.double().sum()) for t in theirs.values())  # every tensor, each once
    plain: Any = SimpleNamespace(adapter=None)
    Reference(ReferenceConfig()).save(tmp_path / "again", head, plain, name=yaml)
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], t) for k, t in theirs.items())


@pytest.mark.parametrize("yaml", YAMLS)
def test_a_head_of_other_sizes_is_refused_by_name(yaml: str, tmp_path: Path) -> None:
    settings, shapes, _ = PUBLISHED[yaml]
    theirs = fill(shapes)
    first, *rest = theirs
    kind, own = head_of(yaml, **settings)
    for changed, told in (
        ({k: theirs[k] for k in rest}, f"missing: {first}"),
        ({**theirs, "stray": torch.zeros(1)}, "left over: stray"),
        ({**theirs, first: theirs[first][:-1].clone()}, f"of another shape: {first}"),
    ):
        save_file(changed, tmp_path / "published.safetensors")
        with pytest.raises(DataError, match=re.escape(told)):
            reference.load(tmp_path / "published.safetensors", kind, own, SPEC)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="is a pickle"):
        reference.load(tmp_path / "medusa_lm_head.pt", *head_of("medusa"), SPEC)


def test_every_row_belongs_to_a_head() -> None:
    assert {head_of(yaml)[0].__name__ for yaml in YAMLS} == LAYOUTS.keys()


def test_a_head_without_a_row_is_refused() -> None:
    class Other(head_of("medusa")[0]):  # type: ignore[misc]
        pass

    with pytest.raises(ConfigError, match="Other has no published layout"):
        reference.layout_of(Other)
