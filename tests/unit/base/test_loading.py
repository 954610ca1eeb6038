"""From a folder and back; what is missing or unknown ends in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.base.lm import BaseLM, load
from draftsmith.contracts import Needs
from draftsmith.errors import ConfigError, DataError


def tokenizer(words=("a", "b", "c")):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<eos>": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="<eos>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template="{{ messages }}")


@pytest.fixture
def folder(tmp_path, make_model):
    make_model("llama", eos_token_id=[5, 6]).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_neox", "opt"])
def test_round_trip(tmp_path, make_model, name):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    made, loaded = BaseLM(model), load(str(tmp_path))
    tokens = torch.arange(20)[None]
    needs = Needs(logits=True)
    assert torch.equal(loaded.capture(needs, tokens).logits, made.capture(needs, tokens).logits)
    assert loaded.weights_sha256() == made.weights_sha256()
    assert loaded.spec.config_sha256 == made.spec.config_sha256
    assert loaded.spec.path == str(tmp_path)
    assert loaded.tokenizer is None
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_spec(folder):
    base = load(str(folder), dtype="bfloat16")
    spec = base.spec
    shape = (spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.num_layers)
    assert (spec.family, *shape) == ("llama", 32, 48, 61, 3)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (4, 2, 8, 96)
    assert (base.dtype, base.device.type, base.eos_ids) == (torch.bfloat16, "cpu", {5, 6})
    assert len({spec.config_sha256, spec.tokenizer_sha256, spec.template_sha256, ""}) == 4
    again = load(str(folder))
    assert (again.spec, again.dtype) == (spec, torch.float32)  # the storage type is no part of the spec


def test_tokenizer_fingerprint_follows_the_rules_and_not_the_calls(make_model):
    one, other = tokenizer(), tokenizer(("a", "b", "d"))
    first = BaseLM(make_model("llama"), one).spec
    one.pad_token = one.eos_token
    padded = BaseLM(make_model("llama"), one).spec.tokenizer_sha256
    one(["a", "a b"], padding=True, truncation=True, max_length=5)
    assert BaseLM(make_model("llama"), one).spec.tokenizer_sha256 == padded
    assert BaseLM(make_model("llama"), other).spec.tokenizer_sha256 != first.tokenizer_sha256
    one.chat_template = "{{ other }}"
    assert BaseLM(make_model("llama"), one).spec.template_sha256 != first.template_sha256


def test_config_fingerprint_sees_the_shape(make_model):
    spec = BaseLM(make_model("llama")).spec
    assert BaseLM(make_model("llama", rms_norm_eps=1e-3)).spec.config_sha256 != spec.config_sha256


def test_eos_falls_back_to_the_tokenizer(make_model):
    assert BaseLM(make_model("llama"), tokenizer()).eos_ids == {0}
    assert BaseLM(make_model("llama")).eos_ids == frozenset()


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_missing_weight_is_named(folder):
    change_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(DataError, match=r"lacks weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(folder))


def test_a_weight_of_another_shape_is_named(folder):
    change_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(DataError, match=r"another shape .*model\.norm\.weight"):
        load(str(folder))


def test_unknown_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gptj"}))
    with pytest.raises(ConfigError, match=r"family 'gptj' is not in the table .*; known: gemma, .*qwen3"):
        load(str(folder))


def test_projected_embeddings_are_refused(make_model):
    with pytest.raises(ConfigError, match="word_embed_proj_dim 16 != hidden_size 32"):
        BaseLM(make_model("opt", word_embed_proj_dim=16))


@pytest.mark.parametrize("break_it", ["nothing", "config", "weights", "bytes", "tokenizer"])
def test_broken_folders_end_in_one_line(folder, break_it):
    if break_it == "nothing":
        shutil.rmtree(folder)
    elif break_it == "config":
        (folder / "config.json").unlink()
    elif break_it == "weights":
        (folder / "model.safetensors").unlink()
    elif break_it == "bytes":
        (folder / "model.safetensors").write_bytes(b"\x10" * 40)
    else:
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="base: ") as error:
        load(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_unknown_dtype(folder):
    with pytest.raises(ConfigError, match=r"base.dtype: 'int8' is none of float32"):
        load(str(folder), dtype="int8")


def test_importing_the_base_leaves_transformers_alone():
    import subprocess
    import sys

    code = "import sys, draftsmith.base.lm; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
