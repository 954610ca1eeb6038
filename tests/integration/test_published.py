"""Published weights become a head that evaluate and train take; an export in the published layout comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith import artifacts, generate, load_base, load_head, load_published, save_head
from draftsmith.errors import ConfigError, DataError

from .conftest import call


def test_from_our_run_to_the_published_layout_and_back(training: list[str], micro: Path, tmp_path: Path) -> None:
    code, told = call("train", *training, "head=[kangaroo]", "trainer.max_steps=2", "run_dir=run", cwd=tmp_path)
    assert code == 0, told
    code, told = call("export", "run_dir=run", "exporter=reference", "out=published", cwd=tmp_path)
    assert code == 0, told
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "published" / "model.safetensors")
    base = load_base(micro / "base")
    head = load_published(tmp_path / "published", "kangaroo", base=base, depth=3)
    assert head.max_depth == 3
    ours = load_head(tmp_path / "run" / "heads" / "kangaroo", base=base)
    assert all(torch.equal(t, head.state_dict()[name]) for name, t in ours.state_dict().items())
    save_head(tmp_path / "native", head, name="kangaroo")
    back = load_head(tmp_path / "native", base=base)
    prompt = [20, 21, 22, 23]
    plain = generate(base, prompt, max_new_tokens=12).tokens
    assert generate(base, prompt, head=back, max_new_tokens=12).tokens == plain


def test_a_setting_that_is_none_is_named(micro: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kangaroo\.dept: no such key; did you mean 'depth'"):
        load_published(tmp_path, "kangaroo", base=load_base(micro / "base"), dept=3)


def test_load_published_reads_the_config_beside_the_weights(micro: Path, tmp_path: Path) -> None:
    """Settings that the yaml does not have: a head of four layers in one place, a base of others in another."""
    base = load_base(micro / "base")
    size, vocabulary = base.spec.hidden_size, base.spec.vocab_size
    tensors = {f"{k}.{j}.linear.weight": torch.randn(size, size) for k in range(4) for j in range(2)}
    tensors |= {f"{k}.{j}.linear.bias": torch.randn(size) for k in range(4) for j in range(2)}
    tensors |= {f"{k}.2.weight": torch.randn(vocabulary, size) for k in range(4)}
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    told = {"medusa_num_heads": 4, "medusa_num_layers": 2, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for path in (tmp_path, tmp_path / "medusa_lm_head.safetensors"):
        head = load_published(path, "medusa", base=base, decay=0.9)
        assert (head.config.num_heads, head.config.num_layers, head.config.decay) == (4, 2, 0.9)
    (tmp_path / "config.json").write_text(json.dumps({**told, "hidden_size": 4096}))
    with pytest.raises(DataError, match="hidden_size=4096"):
        load_published(tmp_path, "medusa", base=base)
    assert load_published(tmp_path, "medusa", base=base, despite=["hidden_size"]).max_depth == 4


@pytest.fixture(scope="module")
def theirs(training: list[str], micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Medusa as its authors publish it: five heads under a config.json that tells of two."""
    folder = tmp_path_factory.mktemp("theirs")
    more = ["head=[medusa]", "heads.medusa.num_heads=5", "trainer.max_steps=4", "run_dir=run"]
    code, told = call("train", *training, *more, cwd=folder)
    assert code == 0, told
    code, told = call("export", "run_dir=run", "exporter=reference", "out=there", cwd=folder)
    assert code == 0, told
    tensors = load_file(folder / "there" / "model.safetensors")
    shutil.rmtree(folder / "there")
    (folder / "there").mkdir()
    save_file(tensors, folder / "there" / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "there" / "config.json").write_text(json.dumps(config))
    return folder / "there"


def on(micro: Path) -> list[str]:
    return ["base=hf", f"base.path={micro / 'base'}"]


def test_adopted_evaluated_and_trained_on(theirs: Path, training: list[str], micro: Path, tmp_path: Path) -> None:
    adopt = [f"path={theirs}", "kind=medusa", "out=adopted/vicuna", *on(micro)]
    code, told = call("adopt", *adopt, cwd=tmp_path)
    assert code == 3, told
    assert "config.json: medusa_num_heads=2, but medusa_lm_head.safetensors holds 5" in told
    assert not (tmp_path / "adopted").exists()
    code, told = call("adopt", *adopt, "settings={num_heads: 5}", cwd=tmp_path)
    assert code == 0, told
    assert "Medusa, MedusaConfig(num_heads=5, num_layers=1" in told
    folder = tmp_path / "adopted" / "vicuna"
    artifacts.verify(folder)
    card = (folder / "README.md").read_text()
    assert "# vicuna\n" in card
    assert "| adopted | there |" in card
    tensors, published = load_file(folder / "model.safetensors"), load_file(theirs / "medusa_lm_head.safetensors")
    assert torch.equal(tensors["lm_heads.4.weight"], published["4.1.weight"])

    short = [f"prompts.path={micro / 'prompts.jsonl'}", "decoding.max_new_tokens=8", "repeats=1", "threads=1"]
    load = [f"load=[{folder}]", "run_dir=judged", "baselines=few"]
    code, told = call("evaluate", *load, *on(micro), *short, cwd=tmp_path)
    assert code == 0, told
    found = artifacts.read_json(tmp_path / "judged" / "evaluation.json")["heads"]["vicuna"]
    assert found["lossless"]["ok"]
    assert found["tree"]["depth"] == 5

    start = ["head=[medusa]", "heads.medusa.num_heads=5", f"start_from={{medusa: {folder}}}"]
    code, told = call("train", *training, *start, "trainer.max_steps=1", "run_dir=tuned", cwd=tmp_path)
    assert code == 0, told
    tuned = load_file(tmp_path / "tuned" / "heads" / "medusa" / "model.safetensors")
    moved = {name: float((t - tensors[name]).abs().max()) for name, t in tuned.items()}
    assert 0 < max(moved.values()) < 0.01  # one step on from the published weights
    code, told = call("adopt", *adopt, "settings={num_heads: 5}", cwd=tmp_path)
    assert code == 0, told  # its own folder may be made again


@pytest.mark.parametrize("kind", ["hydra", "eagle3", "kv_prediction"])
def test_other_kinds_come_through_the_command(training: list[str], micro: Path, tmp_path: Path, kind: str) -> None:
    """Of which the reference export tells the settings; for a primer the user has to."""
    more = {"hydra": ["heads.hydra.num_heads=2"], "eagle3": ["heads.eagle3.draft_vocab_size=50"]}.get(kind, [])
    code, told = call("train", *training, f"head=[{kind}]", *more, "trainer.max_steps=1", "run_dir=run", cwd=tmp_path)
    assert code == 0, told
    code, told = call("export", "run_dir=run", "exporter=reference", "out=there", cwd=tmp_path)
    assert code == 0, told
    code, told = call("adopt", "path=there", f"kind={kind}", f"out={kind}", *on(micro), cwd=tmp_path)
    assert code == 0, told
    assert ("it reads the base's hidden states 1, 0, 0 (layer_ids=vllm)" in told) == (kind == "eagle3")
    base = load_base(micro / "base")
    ours, back = (load_head(tmp_path / f, base=base) for f in (f"run/heads/{kind}", kind))
    assert back.config == ours.config
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in ours.state_dict().items())


def test_a_gate_comes_with_whose_drafts_it_judges(micro: Path, tmp_path: Path) -> None:
    """SpecDec++'s folder: numbered modules, hidden_size and num_layers."""
    base = load_base(micro / "base")
    size = base.spec.hidden_size
    tensors = {"model.0.linear.weight": torch.randn(size, size), "model.0.linear.bias": torch.randn(size)}
    (tmp_path / "there").mkdir()
    save_file({**tensors, "model.1.weight": torch.randn(2, size), "model.1.bias": torch.zeros(2)},
              tmp_path / "there" / "model.safetensors")  # fmt: skip
    (tmp_path / "there" / "config.json").write_text(json.dumps({"hidden_size": size, "num_layers": 1}))
    adopt = ["path=there", "kind=acceptance", "out=gate", *on(micro)]
    code, told = call("adopt", *adopt, cwd=tmp_path)
    assert code == 2, told
    assert "nothing stands beside it; give companion=" in told
    companion = ["companion=hf", f"companion.path={micro / 'base'}"]
    code, told = call("adopt", *adopt, *companion, cwd=tmp_path)
    assert code == 0, told
    gate: Any = load_head(tmp_path / "gate", base=base)
    assert gate.config.num_layers == 1
    assert gate.beside.companion.spec.path == str(micro / "base")
    text = generate(base, [11, 12, 13], head=gate, max_new_tokens=12).tokens
    assert text == generate(base, [11, 12, 13], max_new_tokens=12).tokens


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["path=nowhere"], 3, "nowhere: no such file or folder"),
        (["kind=medsua"], 2, "no such choice 'medsua'; did you mean 'medusa'"),
        (["kind=[medusa,hydra]"], 2, "adopt.kind: "),
        (["settings={num_head: 5}"], 2, "medusa.num_head: no such key; did you mean 'num_heads'"),
        (["settings=5"], 2, "adopt.settings: "),
        (["~base"], 2, "base: which one? give the base that the head was made for"),
        (["base.path=nowhere"], 3, "nowhere"),
        (["out=kept"], 2, "out: kept exists and is no adopted head of ours"),
        (["layer_ids=trt"], 2, "layer_ids='trt': choose vllm or sglang"),
        (["kind=hydra"], 3, "no block of a Hydra head in it"),
        (["device=nope"], 2, "device=nope"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_mistakes(theirs: Path, micro: Path, tmp_path: Path, given: list[str], code: int, says: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    usual = {"path": str(theirs), "kind": "medusa", "out": "out", "base": "hf", "base.path": str(micro / "base")}
    told = dict(g.partition("=")[::2] for g in given)
    if "~base" in told:
        usual = {k: v for k, v in usual.items() if not k.startswith("base")}
        told = {}
    found, output = call("adopt", *(f"{k}={v}" for k, v in {**usual, **told}.items()), cwd=tmp_path)
    assert found == code, output
    assert says in output
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] in (["kept"], ["kept", "cache"], ["cache", "kept"])
    assert (tmp_path / "kept" / "mine.txt").read_text() == "mine"
