"""What is told of a base before it is loaded is what it turns out to be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith import config, prepare
from draftsmith.base import shapes
from draftsmith.base.settings import ShapeConfig
from draftsmith.errors import ConfigError

SHAPE = ShapeConfig(60, 32, 48, 2, 4, 2, 160)
# billions of parameters, as the models' own pages print them
PUBLISHED = {
    "vicuna_7b": 6.74,
    "vicuna_7b_v13": 6.74,
    "llama2_7b_chat": 6.74,
    "llama2_70b_chat": 68.98,
    "llama31_8b": 8.03,
    "llama32_1b": 1.24,
    "qwen3_8b": 8.19,
    "qwen3_32b": 32.76,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt_neox", "opt"])
def test_parameters_are_those_of_the_model(family: str, tiny_base: Any) -> None:
    base = tiny_base(family)
    shape = shapes._read(base.model.config.to_dict(), "here")
    if family == "opt":  # its table of positions has two rows more than positions, its MLP a name of its own
        assert shape.intermediate_size == base.spec.intermediate_size
        return
    if family == "gpt_neox":
        assert shape.num_key_value_heads == shape.num_attention_heads
    assert shapes.parameters(shape) == sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_known_base_has_as_many_parameters_as_published(name: str) -> None:
    base = config.typed(config.compose("train", [f"base={name}"]).base, prepare.BaseConfig, "base")
    assert base.shape is not None
    assert round(shapes.parameters(base.shape) / 1e9, 2) == PUBLISHED[name]


def test_every_base_with_a_shape_is_checked_here() -> None:
    conf = Path(__file__).parents[3] / "conf" / "base"
    assert sorted(p.stem for p in conf.glob("*.yaml") if "model_type" in p.read_text()) == sorted(PUBLISHED)


def test_a_spec_of_sizes_is_that_of_the_loaded_base(tiny_base: Any) -> None:
    base = tiny_base("qwen3")
    told = shapes.spec_of(shapes._read(base.model.config.to_dict(), "here"))
    names = ("family", "hidden_size", "intermediate_size", "vocab_size", "num_layers", "num_heads", "num_kv_heads")
    for name in (*names, "head_dim", "max_positions", "llama_blocks", "qkv_bias", "qk_norm"):
        assert getattr(told, name) == getattr(base.spec, name), name


def test_a_wrong_size_is_named_with_both_values(tiny_base: Any) -> None:
    base = tiny_base("llama")
    shapes.check(SHAPE, base.spec, base.model.config)
    with pytest.raises(ConfigError, match=r"base\.shape\.num_hidden_layers=3, where .* has 2; correct the shape"):
        shapes.check(replace(SHAPE, num_hidden_layers=3), base.spec, base.model.config)
    with pytest.raises(ConfigError, match=r"vocab_size=61.*tie_word_embeddings=True"):
        shapes.check(replace(SHAPE, vocab_size=61, tie_word_embeddings=True), base.spec, base.model.config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 0}, "hidden_size=0: give at least 1"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"hidden_size": 30}, "head_dim: say it"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(SHAPE, **change)


def test_sizes_are_found_in_a_folder_or_are_asked_for(tmp_path: Path, tiny_base: Any) -> None:
    tiny_base("llama").model.config.save_pretrained(tmp_path)
    assert shapes.of(str(tmp_path), None, None, None) == replace(SHAPE, head_dim=8)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ConfigError, match=r"does not tell its sizes.*give base\.shape"):
        shapes.of(str(tmp_path), None, None, None)
    with pytest.raises(ConfigError, match=r"base\.shape: the sizes of no/body are not on this machine"):
        shapes.of("no/body", None, None, None)


def test_a_stand_in_keeps_proportions_and_two_bases_one_vocabulary() -> None:
    whole = config.compose("train", ["base=llama2_70b_chat", "companion=llama2_7b_chat", "debug=fake"])
    base, companion = (config.typed(whole[n], prepare.BaseConfig, n) for n in ("base", "companion"))
    assert base.fake
    assert companion.fake
    large, small = (prepare.stand_in(b).recipe["model"] for b in (base, companion))
    assert large["vocab_size"] == small["vocab_size"] == 500
    assert (large["hidden_size"], large["intermediate_size"], large["num_hidden_layers"]) == (128, 448, 8)
    assert large["num_attention_heads"] // large["num_key_value_heads"] == 8
    model = shapes.model(large, seed=0)
    again = shapes.model(large, seed=0)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_without_fake_nothing_stands_in() -> None:
    base = prepare.BaseConfig(path="anything")
    assert prepare.stand_in(base) is base
