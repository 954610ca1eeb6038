"""Published heads of every kind become ours with the settings they have; what contradicts tensors or base does not."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith import adopt
from draftsmith.contracts import BaseSpec, Head
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import published
from draftsmith.exporters.reference import Reference, ReferenceConfig

D, V = 16, 40
SPEC = BaseSpec("llama", D, 24, V, 4, 4, 2, 4, 64, llama_blocks=True, path="org/base")

Tensors = dict[str, Tensor]


def base_of(**changes: Any) -> Any:
    """As much of a base as adopting looks at."""
    generator = torch.Generator().manual_seed(1)
    embedding, lm_head = (0.02 * torch.randn(V, D, generator=generator) for _ in range(2))
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=embedding))
    spec = dataclasses.replace(SPEC, **changes)
    return SimpleNamespace(spec=spec, model=model, lm_head_weight=lm_head, device=torch.device("cpu"))


BASE = base_of()


@functools.cache
def kind_of(yaml: str) -> Any:
    """Composing takes longer than all else here."""
    return adopt.kind_of(yaml, {})


def head_of(yaml: str, spec: BaseSpec = SPEC, **settings: Any) -> Any:
    """A head of ours with random weights."""
    cls, usual = kind_of(yaml)
    own: Any = adopt.config.typed({**usual, **settings}, cls.Config, yaml)
    torch.manual_seed(0)
    head = cls(own, spec)
    if yaml == "eagle3":
        head.initialise(BASE, torch.rand(V))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p))
    return head


def write(folder: Path, head: Head) -> Path:
    """The published layout, as exporter=reference writes it."""
    return Reference(ReferenceConfig()).save(folder, head, SimpleNamespace(adapter=None), name="x")  # type: ignore[arg-type]


def rewrite(folder: Path, change: Callable[[Tensors, dict[str, Any]], Any], name: str = "model") -> Path:
    """Somebody else's folder: other tensors, another config.json, no manifest."""
    tensors, told = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    change(tensors, told)
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def adopted(path: Path, yaml: str, base: Any = BASE, layer_ids: str = "vllm", despite: Any = (), **given: Any) -> Any:
    how: dict[str, Any] = {"layer_ids": layer_ids, "despite": despite}
    return adopt.adopted(published.read(path), kind_of(yaml), base, given, **how)


def same(one: Head, other: Head) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def names(tensors: Tensors, change: Callable[[str], str]) -> None:
    new = {change(k): t for k, t in tensors.items()}
    tensors.clear()
    tensors.update(new)


# Settings


@pytest.mark.parametrize(
    ("yaml", "settings", "told"),
    [
        ("medusa", {"num_heads": 5, "num_layers": 2}, {}),
        ("medusa", {"num_heads": 2, "share_lm_head": True}, {}),
        ("medusa2", {"num_heads": 1}, {}),
        ("hydra", {"num_heads": 3, "num_layers": 2}, {}),
        ("hydra_pp", {"num_heads": 2, "num_layers": 3}, {}),
        ("kangaroo", {"exit_layer": 3}, {}),
        ("eagle3", {"draft_vocab_size": 10, "layers": [1, 2, 4]}, {}),
        ("eagle3", {"draft_vocab_size": V}, {}),
        ("clover", {"num_heads": 2}, {}),
        ("clover2", {"num_heads": 3, "num_layers": 1, "decay": 0.9}, {}),
        ("acceptance", {"num_layers": 2, "hidden_size": 8}, {}),
        ("kv_prediction", {}, {"keep": 0.25}),  # of what the auxiliary is nothing tells
    ],
)
@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "weights alone"])
def test_what_we_export_comes_back_with_its_settings(
    tmp_path: Path, yaml: str, settings: dict[str, Any], told: dict[str, Any], config: bool
) -> None:
    head = head_of(yaml, **settings)
    folder = write(tmp_path / "there", head)
    if not config:
        (folder / "config.json").unlink()
        told = {**told, **{k: settings[k] for k in ("exit_layer", "layers") if k in settings}}
        if yaml == "clover2":
            told = {"num_heads": 3, "decay": 0.9}
        if yaml == "eagle3" and "layers" not in settings:
            told = {"layers": [1, 2, 3]}  # of four layers nobody but us has a usual choice
    back = adopted(folder, yaml, **told)
    assert type(back) is type(head)
    for name in settings:
        assert getattr(back.config, name) == getattr(head.config, name), name
    if yaml == "eagle3":
        assert back.layers == head.layers
    assert same(back, head)
    assert {p.requires_grad for p in back.parameters()} == {False}


def test_a_half_precision_file_becomes_a_full_precision_head(tmp_path: Path) -> None:
    head = head_of("medusa", num_heads=2)
    folder = rewrite(write(tmp_path / "a", head), lambda t, _: t.update({k: v.half() for k, v in t.items()}))
    assert same(adopted(folder, "medusa"), head.half().float())


def test_published_blocks_that_are_one_module_are_so_many_copies(tmp_path: Path) -> None:
    head = head_of("medusa", num_heads=2, num_layers=3)

    def repeat(tensors: Tensors, _: Any) -> None:
        for k in range(2):
            for j in (1, 2):
                for part in ("weight", "bias"):
                    tensors[f"{k}.{j}.linear.{part}"] = tensors[f"{k}.0.linear.{part}"]

    back = adopted(rewrite(write(tmp_path / "a", head), repeat), "medusa")
    assert back.config.num_layers == 3
    for block in back.blocks:
        assert all(torch.equal(each.linear.weight, block[0].linear.weight) for each in block)


# Whose names

MEDUSA_NAMES: dict[str, Callable[[str], str]] = {
    "the authors'": lambda k: k,
    "vLLM's prefix": lambda k: f"medusa_heads.{k}",
    "MLC-LLM's": lambda k: f"medusa_head.{k}",
    "vLLM's own": lambda k: (
        f"blocks.{k[0]}.layers.{k[2]}.{k.rpartition('.')[2]}" if "linear" in k else f"lm_heads.{k[0]}.weight"
    ),
    "both of vLLM's": lambda k: "medusa_heads." + MEDUSA_NAMES["vLLM's own"](k),
}


@pytest.mark.parametrize("whose", MEDUSA_NAMES)
def test_medusa_under_every_name(tmp_path: Path, whose: str) -> None:
    head = head_of("medusa", num_heads=3, num_layers=2)

    def change(tensors: Tensors, told: dict[str, Any]) -> None:
        names(tensors, MEDUSA_NAMES[whose])
        if "own" in whose:
            told.clear()
            told.update({"model_type": "medusa", "num_heads": 3, "num_hidden_layers": 2, "hidden_size": D})
            told.update({"vocab_size": V, "medusa_fc_bias": True, "truncated_vocab_size": None, "logit_scale": 1.0})

    assert same(adopted(rewrite(write(tmp_path / "a", head), change, "medusa_lm_head"), "medusa"), head)


def test_medusa_inside_a_whole_model(tmp_path: Path) -> None:
    head = head_of("medusa", num_heads=2)

    def merge(tensors: Tensors, told: dict[str, Any]) -> None:
        names(tensors, MEDUSA_NAMES["MLC-LLM's"])
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(D, D)
        tensors["lm_head.weight"] = BASE.lm_head_weight.half()
        told.update({"num_hidden_layers": None, "num_attention_heads": 4})

    folder = rewrite(write(tmp_path / "a", head), merge)
    assert same(adopted(folder, "medusa"), head)
    rewrite(folder, lambda t, _: t.update({"lm_head.weight": 2 * t["lm_head.weight"]}))
    with pytest.raises(DataError, match=r"lm_head\.weight is not the base's lm_head"):
        adopted(folder, "medusa")


def test_medusa_without_biases_has_none(tmp_path: Path) -> None:
    """vLLM's default."""
    head = head_of("medusa", num_heads=2, num_layers=2)
    with torch.no_grad():
        for name, p in head.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    folder = rewrite(
        write(tmp_path / "a", head),
        lambda t, told: (told.update(medusa_fc_bias=False), [t.pop(k) for k in list(t) if k.endswith("bias")]),
    )
    assert same(adopted(folder, "medusa"), head)
    rewrite(folder, lambda _, told: told.update(medusa_fc_bias=True))
    with pytest.raises(DataError, match=r"missing: 0\.0\.linear\.bias"):
        adopted(folder, "medusa")


def test_medusa_with_one_lm_head_for_all(tmp_path: Path) -> None:
    """vLLM's original_lm_head: the base's own, in the file; ours shares the base's."""
    head = head_of("medusa", num_heads=2, share_lm_head=True)

    def change(tensors: Tensors, told: dict[str, Any]) -> None:
        names(tensors, MEDUSA_NAMES["vLLM's own"])
        tensors["lm_heads.0.weight"] = BASE.lm_head_weight
        told.clear()
        told.update({"num_heads": 2, "num_hidden_layers": 1, "original_lm_head": True})

    folder = rewrite(write(tmp_path / "a", head), change)
    back = adopted(folder, "medusa")
    assert back.config.share_lm_head
    assert same(back, head)
    rewrite(folder, lambda t, _: t.update({"lm_heads.0.weight": t["lm_heads.0.weight"].flip(0)}))
    with pytest.raises(DataError, match="is not the base's lm_head"):
        adopted(folder, "medusa")


def as_speculators(tensors: Tensors, told: dict[str, Any]) -> None:
    """A folder of the speculators library."""
    names(tensors, lambda k: k.replace("midlayer.", "layers.0."))
    layer = {k: told.pop(k) for k in list(told) if k not in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")}
    layer["rope_parameters"] = {"rope_type": "default", "rope_theta": layer.pop("rope_theta")}
    layer["model_type"] = "llama"
    told |= {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], "norm_before_residual": False}
    told |= {"transformer_layer_config": layer, "norm_before_fc": False, "fc_norm": False, "norm_output": False}
    told |= {"target_hidden_size": None, "embed_requires_grad": False}
    tensors["embed_tokens.weight"] = BASE.model.get_input_embeddings().weight.bfloat16()


@pytest.mark.parametrize("whose", ["the authors'", "vLLM's", "a model of its own", "speculators"])
def test_eagle3_under_every_name(tmp_path: Path, whose: str) -> None:
    head = head_of("eagle3", draft_vocab_size=10, layers=[0, 2, 3])

    def change(tensors: Tensors, told: dict[str, Any]) -> None:
        if whose == "vLLM's":
            names(tensors, lambda k: k.replace("midlayer.", "layers.0."))
            told["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": told.pop("eagle_aux_hidden_state_layer_ids")}
        elif whose == "a model of its own":
            names(tensors, lambda k: "model." + k.replace("midlayer.", "layers.0."))
        elif whose == "speculators":
            as_speculators(tensors, told)

    assert same(adopted(rewrite(write(tmp_path / "a", head), change), "eagle3"), head)


def test_kangaroo_as_its_authors_write_it(tmp_path: Path) -> None:
    """Their config.json is a Llama's of one layer; it says nothing of rotation, K/V heads and exit layer."""
    head = head_of("kangaroo", exit_layer=2, spec=dataclasses.replace(SPEC, norm_eps=1e-6))

    def change(tensors: Tensors, told: dict[str, Any]) -> None:
        for key in ("exit_layer", "rope_theta", "num_key_value_heads"):
            del told[key]
        told |= {"hidden_act": "silu", "intermediate_size": 24, "vocab_size": V, "max_position_embeddings": 2048}

    folder, base = rewrite(write(tmp_path / "a", head), change), base_of(norm_eps=1e-6)
    with pytest.raises(ConfigError, match=r"settings\.exit_layer: .*of the base's 4 layers .*2 of 32, 3 of 40"):
        adopted(folder, "kangaroo", base)
    back = adopted(folder, "kangaroo", base, exit_layer=2)
    assert back.exit_layer == 2
    assert same(back, head)


def test_hydra_carries_the_embedding(tmp_path: Path) -> None:
    """Their heads hold the base's embedding as a module of theirs, so that it lies in the file."""
    head = head_of("hydra", num_heads=2)
    copied = BASE.model.get_input_embeddings().weight
    folder = rewrite(write(tmp_path / "a", head), lambda t, _: t.update({"input_embed_fn.weight": copied}))
    assert same(adopted(folder, "hydra"), head)


@pytest.mark.parametrize(
    ("exporter", "kind"),
    [
        ("vllm", "medusa"),
        ("tgi", "medusa"),
        ("mlc", "medusa"),
        ("vllm", "eagle3"),
        ("sglang", "eagle3"),
        ("speculators", "eagle3"),
    ],
)
def test_what_we_write_for_a_server_comes_back(tmp_path: Path, tiny_base: Any, exporter: str, kind: str) -> None:
    """On a base whose keys turn by a scaled rope."""
    base = tiny_base.__wrapped__(num_hidden_layers=10, rope_parameters=dict(LLAMA3, rope_theta=5e5))
    settings = {"medusa": {"num_heads": 3, "num_layers": 2}, "eagle3": {"draft_vocab_size": 20, "layers": [3, 5, 7]}}
    head = head_of(kind, base.spec, **settings[kind])
    if kind == "eagle3":
        head.initialise(base, torch.rand(base.spec.vocab_size))
    made = adopt.config.build(
        adopt.config.compose("export", [f"exporter={exporter}", "run_dir=x"]).exporter, "exporter"
    )
    made.save(tmp_path / "there", head, base, name="mine")
    layer_ids = "sglang" if exporter == "sglang" else "vllm"
    back = adopted(tmp_path / "there", kind, base, layer_ids)
    assert same(back, head)
    assert getattr(back, "layers", None) == getattr(head, "layers", None)


# Refusals


def missing_lm_heads(tensors: Tensors, told: dict[str, Any]) -> None:
    for k in (0, 1):
        del tensors[f"{k}.1.weight"]


def ungrounded(tensors: Tensors, told: dict[str, Any]) -> None:
    for name in list(tensors):
        if "res_connection" in name:
            del tensors[name]
        elif "hydra_mlp" in name and name.endswith("weight"):
            tensors[name] = tensors[name][:, :D]


def add(**more: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda _, told: told.update(more)


def put(name: str, tensor: Tensor) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, _: tensors.update({name: tensor})


SETTINGS: dict[str, dict[str, Any]] = {
    "medusa": {"num_heads": 2},
    "hydra": {"num_heads": 2},
    "hydra_pp": {"num_heads": 2, "num_layers": 2},
    "kangaroo": {"exit_layer": 1},
    "eagle3": {"draft_vocab_size": 10, "layers": [1, 2, 3]},
}


@pytest.mark.parametrize(
    ("yaml", "change", "says"),
    [
        ("medusa", add(medusa_num_heads=5), r"medusa_num_heads=5, but model\.safetensors holds 2; .*\.num_heads=2"),
        ("medusa", add(medusa_num_layers=2), r"medusa_num_layers=2, but .* holds 1; .*settings\.num_layers=1"),
        ("medusa", missing_lm_heads, r"version=1: whose heads end in their own lm_head, but.*share_lm_head=true"),
        ("medusa", add(version="2"), r"version=2: whose heads end in the base lm_head.*share_lm_head=false"),
        ("medusa", add(hidden_size=32), r"hidden_size=32, the base \(org/base\) has 16; .*despite=\[hidden_size\]"),
        ("medusa", add(vocab_size=41), "vocab_size=41, the base"),
        ("medusa", add(truncated_vocab_size=8), "truncated_vocab_size=8: our heads draft from the whole vocabulary"),
        ("medusa", add(logit_scale=0.5), r"logit_scale=0\.5"),
        ("medusa", lambda t, _: names(t, lambda k: k.replace("linear", "fc")), "no residual block of a Medusa head"),
        ("medusa", put("0.0.linear.weight", torch.ones(2, 2)), r"shape: 0\.0\.linear\.weight \(2, 2\), not \(16, 16\)"),
        ("medusa", lambda t, _: t.update({f"x{n}": torch.ones(1) for n in range(9)}), "left over: x0, .*x5 and 3 more"),
        ("hydra", add(grounded_heads=False), "grounded_heads=False: its heads do not hear the tokens drafted before"),
        ("hydra", ungrounded, "no res_connection in it: its heads do not hear"),
        ("hydra", add(hidden_state_offset=1), "hidden_state_offset=1: ours reads the newest"),
        ("hydra", add(hydra_head_arch="eagle-attn"), "hydra_head_arch=eagle-attn: ours are mlp and prefix-mlp"),
        ("hydra", add(hydra_head_arch="cross-attn"), "hydra_head_arch=cross-attn: ours are"),
        ("hydra", add(hydra_head_arch="prefix-mlp"), "prefix-mlp: but there is no prefix_embeding_layer"),
        ("hydra_pp", add(hydra_head_arch="mlp"), "hydra_head_arch=mlp: but there is a prefix_embeding_layer"),
        ("hydra", add(hydra_num_heads=4), r"hydra_num_heads=4, but .* holds 2"),
        ("hydra_pp", add(hydra_num_layers=4), r"hydra_num_layers=4, but .* holds 2"),
        ("hydra", lambda t, _: names(t, lambda k: f"x.{k}"), "no block of a Hydra head"),
        ("hydra", put("input_embed_fn.weight", torch.ones(V, D)), r"embed_fn\.weight is not the base's embedding"),
        ("kangaroo", add(num_hidden_layers=2), "num_hidden_layers=2: our head has one layer"),
        ("kangaroo", add(num_attention_heads=8), "num_attention_heads=8, the base"),
        ("kangaroo", add(rms_norm_eps=1e-6), "rms_norm_eps=1e-06, the base .* has 1e-05"),
        ("eagle3", add(draft_vocab_size=20), r"draft_vocab_size=20, but .* holds 10"),
        ("eagle3", add(norm_before_residual=True), "norm_before_residual=True: our EAGLE-3 is the paper's"),
        ("eagle3", add(norm_before_fc=True), "norm_before_fc=True"),
        ("eagle3", add(fc_norm=True), "fc_norm=True"),
        ("eagle3", add(norm_output=True), "norm_output=True"),
        ("eagle3", add(eagle_config={"norm_before_residual": True}), "norm_before_residual=True"),
        ("eagle3", add(attention_bias=True), "attention_bias=True"),
        ("eagle3", add(num_aux_hidden_states=1), "num_aux_hidden_states=1"),
        ("eagle3", add(target_hidden_size=64), "target_hidden_size=64, the base"),
        ("eagle3", add(hidden_act="gelu"), "hidden_act=gelu"),
        ("eagle3", add(speculators_model_type="dflash"), "speculators_model_type=dflash: this library's kinds"),
        ("eagle3", put("midlayer.self_attn.q_norm.weight", torch.ones(4)), "model_type=llama: its attention norms"),
        ("eagle3", lambda t, _: t.pop("lm_head.weight"), r"no lm_head\.weight in it"),
        ("eagle3", lambda t, _: t.pop("d2t"), "no d2t in it, which tells its 10 draft tokens"),
        ("eagle3", lambda t, _: t["d2t"].add_(V), "d2t does not map 10 draft tokens"),
        ("eagle3", lambda t, _: t["d2t"][1:].copy_(t["d2t"][0] - torch.arange(1, 10)), "d2t does not map"),
        ("eagle3", lambda t, _: t["t2d"].logical_not_(), "d2t and t2d tell of other tokens"),
        ("eagle3", put("embed_tokens.weight", torch.ones(V, D)), r"not the base's embedding: .*despite=\[embed_tokens"),
        ("eagle3", add(eagle_aux_hidden_state_layer_ids=[1, 2]), r"that is \[1, 2\] of a base of 4 layers; give three"),
        ("eagle3", add(eagle_aux_hidden_state_layer_ids=[3, 2, 1]), "low to high"),
        ("eagle3", add(eagle_aux_hidden_state_layer_ids=[1, 2, 5]), "of a base of 4 layers"),
        ("eagle3", add(eagle_aux_hidden_state_layer_ids=["1"]), "no numbers of layers"),
    ],
)  # fmt: skip
def test_contradictions_are_named(tmp_path: Path, yaml: str, change: Any, says: str) -> None:
    folder = rewrite(write(tmp_path / "a", head_of(yaml, **SETTINGS[yaml])), change)
    with pytest.raises(DataError, match=says) as caught:
        adopted(folder, yaml)
    assert str(folder) in str(caught.value)


def test_what_the_user_gives_goes_before_a_config_json_but_not_before_the_weights(tmp_path: Path) -> None:
    """FasterDecoding/medusa-vicuna-7b-v1.3: five heads under a config.json that says two."""
    head = head_of("medusa", num_heads=5)
    folder = rewrite(write(tmp_path / "a", head), add(medusa_num_heads=2))
    assert same(adopted(folder, "medusa", num_heads=5, decay=0.7), head)
    assert adopted(folder, "medusa", num_heads=5, decay=0.7).config.decay == 0.7
    with pytest.raises(ConfigError, match=r"settings\.num_heads=2: .*holds a head of num_heads=5; leave it out"):
        adopted(folder, "medusa", num_heads=2)
    with pytest.raises(ConfigError, match=r"medusa\.num_head: no such key; did you mean 'num_heads'"):
        adopt.kind_of("medusa", {"num_head": 2})


def test_a_copy_of_another_base_may_be_taken(tmp_path: Path) -> None:
    head = head_of("eagle3", **SETTINGS["eagle3"])
    folder = rewrite(write(tmp_path / "a", head), lambda t, _: t.update({"embed_tokens.weight": torch.ones(V, D)}))
    assert same(adopted(folder, "eagle3", despite=["embed_tokens.weight"]), head)


@pytest.mark.parametrize("missing", [["t2d"], ["d2t", "t2d"]])
def test_maps_that_follow_from_what_is_there(tmp_path: Path, missing: list[str]) -> None:
    head = head_of("eagle3", draft_vocab_size=V if len(missing) == 2 else 10, layers=[1, 2, 3])
    folder = rewrite(write(tmp_path / "a", head), lambda t, _: [t.pop(name) for name in missing])
    assert same(adopted(folder, "eagle3"), head)


# Where an EAGLE-3 reads


@pytest.mark.parametrize(
    ("layer_ids", "told", "taps", "given"),
    [
        ("vllm", [3, 5, 7], (3, 5, 7), [3, 5, 7]),
        ("sglang", [2, 4, 6], (3, 5, 7), [3, 5, 7]),
        ("vllm", [2, 6, 9], (2, 6, 9), None),
        ("sglang", [1, 5, 8], (2, 6, 9), None),
        ("vllm", None, (2, 6, 9), None),
        ("sglang", None, (2, 6, 9), None),
    ],
)
def test_layer_ids_by_either_convention(
    tmp_path: Path, layer_ids: str, told: Any, taps: tuple[int, ...], given: Any
) -> None:
    spec = dataclasses.replace(SPEC, num_layers=12)
    head = head_of("eagle3", spec, draft_vocab_size=10, layers=list(taps))
    written = write(tmp_path / "a", head)
    ours = json.loads((written / "config.json").read_text()).get("eagle_aux_hidden_state_layer_ids")
    assert ours == given  # vLLM's; the usual ones are not told, since servers count differently
    folder = rewrite(written, add(eagle_aux_hidden_state_layer_ids=told))
    back = adopted(folder, "eagle3", base_of(num_layers=12), layer_ids)
    assert back.layers == taps
    assert back.config.layers == given
    with pytest.raises(ConfigError, match="layer_ids='trt': choose vllm or sglang"):
        adopted(folder, "eagle3", base_of(num_layers=12), "trt")


def test_the_usual_layers_of_a_shallow_base_are_nobodys(tmp_path: Path) -> None:
    """2, L/2 and L-3 are no three layers, low to high, of four."""
    folder = write(tmp_path / "a", head_of("eagle3", draft_vocab_size=10))
    rewrite(folder, lambda _, told: told.pop("eagle_aux_hidden_state_layer_ids"))
    with pytest.raises(DataError, match=r"eagle_aux_hidden_state_layer_ids=None: that is \[2, 2, 1\] of a base of 4"):
        adopted(folder, "eagle3")
    assert adopted(folder, "eagle3", layers=[1, 2, 3]).layers == (1, 2, 3)


# How keys turn

T5 = {"rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def turning(**rope: Any) -> Any:
    """A base that turns as transformers does with these rope_parameters."""
    told = LlamaConfig(hidden_size=D, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope)
    rotary: nn.Module = LlamaRotaryEmbedding(told)
    frequencies: Any = rotary.inv_freq
    scale = float(rotary.attention_scaling)  # type: ignore[arg-type]
    return base_of(rope_theta=rope["rope_theta"], rope_frequencies=frequencies.tolist(), rope_scale=scale)


def rope(**told: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(_: Tensors, config: dict[str, Any]) -> None:
        config.pop("rope_theta")
        config.update(told)

    return change


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ({"rope_theta": 10000.0}, {}),
        (T5, T5),
        (T5, {"rope_theta": 500000, "rope_scaling": None}),
        (T5, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({**T5, **LLAMA3}, {**T5, "rope_scaling": LLAMA3}),
        ({**T5, **LLAMA3}, {"rope_parameters": {**T5, **LLAMA3}}),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}, {"rope_scaling": {"type": "linear", "factor": 4}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("yaml", ["eagle3", "kangaroo"])
def test_keys_that_turn_as_the_bases(tmp_path: Path, yaml: str, base: dict[str, Any], told: dict[str, Any]) -> None:
    head = head_of(yaml, **SETTINGS[yaml])
    folder = rewrite(write(tmp_path / "a", head), rope(**told))
    assert same(adopted(folder, yaml, turning(**base)), head)


@pytest.mark.parametrize(
    ("base", "told", "key"),
    [
        (T5, {}, "rope_theta"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta"),
        ({**T5, **LLAMA3}, T5, "rope_theta"),
        ({**T5, **LLAMA3}, {**T5, "rope_scaling": {**LLAMA3, "factor": 32.0}}, "rope_scaling"),
        (T5, {**T5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        (T5, {**T5, "rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        (T5, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
    ],
)  # fmt: skip
def test_keys_that_turn_otherwise_are_refused_or_a_start(tmp_path: Path, base: Any, told: Any, key: str) -> None:
    """SafeAILab's EAGLE-3 heads for Llama-3 say nothing of rope: they turn by 10000, the base by 500000, stretched."""
    head = head_of("eagle3", **SETTINGS["eagle3"])
    folder = rewrite(write(tmp_path / "a", head), rope(**told))
    with pytest.raises(DataError, match=rf"config\.json: {key}=.*turns otherwise than its base.*despite=\[{key}\]"):
        adopted(folder, "eagle3", turning(**base))
    assert same(adopted(folder, "eagle3", turning(**base), despite=[key]), head)


@pytest.mark.parametrize(
    "base",
    [{**T5, **LLAMA3}, {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}, {"rope_theta": 1e6}],
    ids=lambda told: told.get("rope_type", "plain"),
)
def test_our_own_export_says_how_a_stretched_base_turns(tmp_path: Path, base: dict[str, Any]) -> None:
    own = turning(**base)
    head = head_of("kangaroo", own.spec, exit_layer=1)
    folder = write(tmp_path / "a", head)
    told = json.loads((folder / "config.json").read_text())
    assert ("rope_frequencies" in told) == ("rope_type" in base)
    assert same(adopted(folder, "kangaroo", own), head)
    with pytest.raises(DataError, match="turns otherwise than its base"):
        adopted(folder, "kangaroo", BASE)
    if "rope_scale" in told and not math.isclose(told["rope_scale"], 1.0):
        rewrite(folder, add(rope_scale=1.0))
        with pytest.raises(DataError, match="turns otherwise"):
            adopted(folder, "kangaroo", own)
