"""Blocks kept as integers: the base that they stand for, computed without ever being kept dense."""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith import artifacts, prepare
from draftsmith.base import lm
from draftsmith.base.lm import BaseLM
from draftsmith.base.quantise import QuantisedLinear, made_dense
from draftsmith.contracts import Needs
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError
from draftsmith.exporters import native
from draftsmith.heads.kv_prediction import KVPrediction, KVPredictionConfig
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.training.fit import new_head

pytest.importorskip("torchao", reason="needs torchao: pip install 'draftsmith[quant]'")

KINDS = ["int8", "int4"]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
EVERYTHING = Needs(frozenset(range(4)), final=True, logits=True)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def pair(make_model: Any) -> Any:
    """pair(kind, name, **config changes): a quantised base, and the dense one whose weights it stands for."""

    def make(kind: str, name: str = "llama", **more: Any) -> tuple[BaseLM, BaseLM]:
        base = BaseLM(make_model(name, **({"intermediate_size": 64} if kind == "int4" else {}), **more)).quantise(kind)
        return base, BaseLM(made_dense(copy.deepcopy(base.model)))

    return make


def quantised_in(module: nn.Module) -> list[QuantisedLinear]:
    return [m for m in module.modules() if isinstance(m, QuantisedLinear)]


def block_bytes(base: BaseLM) -> int:
    tensors = [t for layer in base._layers for t in (*layer.parameters(), *layer.buffers())]
    return sum(t.nbytes for t in tensors)


def saved_by(work: Any) -> int:
    """Bytes that autograd keeps for the backward pass, the base's own parameters and buffers apart."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.is_leaf and isinstance(t, nn.Parameter):
            return t
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return sum(kept.values())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_torchaos(kind: str, dtype: torch.dtype, make_model: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    theirs = make_model("llama", intermediate_size=64).to(dtype)
    ours, plain = BaseLM(copy.deepcopy(theirs)).quantise(kind), copy.deepcopy(theirs)
    four: Any = IntxWeightOnlyConfig(getattr(torch, "int4"), PerGroup(32), mapping_type=MappingType.ASYMMETRIC)  # noqa: B009
    plain.requires_grad_(False)
    quantize_(theirs.model.layers, Int8WeightOnlyConfig() if kind == "int8" else four)
    linears = {n: m for n, m in theirs.model.layers.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == len(quantised_in(ours.model)) == 3 * 7
    most, mean = {"int8": (0.01, 0.008), "int4": (0.15, 0.1)}[kind]
    for name, linear in linears.items():
        weight, before = (
            ours.model.model.layers.get_submodule(name).weight,
            plain.model.layers.get_submodule(name).weight,
        )
        assert weight.dtype == dtype
        assert torch.equal(weight, linear.weight.dequantize())
        off = (weight - before).float()
        assert float(off.abs().max()) < most * float(before.abs().max())
        assert float(off.norm()) < mean * float(before.float().norm())


@each_kind
def test_embedding_norms_and_lm_head_stay_and_the_blocks_shrink(kind: str, pair: Any, make_model: Any) -> None:
    base, dense = pair(kind)
    plain = BaseLM(make_model("llama", intermediate_size=64) if kind == "int4" else make_model("llama"))
    assert torch.equal(base.lm_head_weight, plain.lm_head_weight)
    assert torch.equal(base.embed(TOKENS), plain.embed(TOKENS))
    kept = dict(base.model.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in plain.model.named_parameters() if n in kept)
    assert {n for n in kept if "layers" in n and "norm" not in n} == set()
    assert block_bytes(dense) == block_bytes(plain)
    # 1 byte a weight and 4 per row of 32; half a byte a weight and 5 per 32 of them
    assert block_bytes(base) < {"int8": 0.31, "int4": 0.19}[kind] * block_bytes(plain)
    assert base.spec == dataclasses.replace(plain.spec, quantised=kind)


def test_every_family_computes_what_its_dense_twin_does(base_names: list[str], pair: Any, close: Any) -> None:
    for name in base_names:
        base, dense = pair("int8", name)
        assert quantised_in(base.model)
        ours, theirs = base.capture(EVERYTHING, TOKENS), dense.capture(EVERYTHING, TOKENS)
        close(ours.logits, theirs.logits)
        for layer, hidden in theirs.hidden.items():
            close(ours.hidden[layer], hidden)


def test_int4_computes_what_its_dense_twin_does_and_decodes_as_hugging_face_does(pair: Any, close: Any) -> None:
    base, dense = pair("int4")
    close(base.capture(EVERYTHING, TOKENS).logits, dense.capture(EVERYTHING, TOKENS).logits)
    out = generate(base, [3, 1, 4], max_new_tokens=20).tokens
    assert out == base.generate([[3, 1, 4]], max_new_tokens=20)[0] == dense.generate([[3, 1, 4]], max_new_tokens=20)[0]
    exact = base.in_float64()  # the referee: its weights are those that the integers stand for
    assert exact.dtype == torch.float64
    assert torch.equal(
        exact.block_weights(1)["mlp.up_proj.weight"].float(), dense.block_weights(1)["mlp.up_proj.weight"]
    )


@each_kind
def test_gradients_pass_to_the_input_as_through_the_dense_twin(kind: str, pair: Any, close: Any) -> None:
    positions, grads, saved = torch.arange(8)[None], [], []
    for base in pair(kind):
        hidden = base.embed(TOKENS).clone().requires_grad_()

        def run(base: BaseLM = base, hidden: Tensor = hidden) -> None:
            base.run_layers(hidden, 0, 3, positions_BQ=positions).square().sum().backward()

        saved.append(saved_by(run))
        grads.append(hidden.grad)
    close(*grads)
    # Not one dense weight is kept: what stands there beside the activations would be 3 blocks of them.
    assert saved[0] <= saved[1] < 3 * block_bytes(base)


@each_kind
def test_a_primer_learns_through_the_base_as_through_its_dense_twin(kind: str, pair: Any, close: Any) -> None:
    from draftsmith.data.pack import collate
    from draftsmith.data.rows import Row, Rows

    rows = [Row("a", TOKENS[0].tolist(), [1] * 8), Row("b", TOKENS[1].tolist(), [0, 1] * 4)]
    batch = collate([rows], 20, torch.from_numpy(Rows.of(rows).counts(1).sum(0)))
    grads = []
    for base in pair(kind):
        head = new_head(KVPrediction, KVPredictionConfig(keep=0.5, kv_weight=0.3), "primer", base, 0)
        seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        before = base.weights_sha256()
        head.loss(base, seen, batch).sum.backward()
        assert base.weights_sha256() == before
        grads.append({name: p.grad for name, p in head.named_parameters()})
    for name, grad in grads[1].items():
        assert grad.any(), name
        close(grads[0][name], grad)


@each_kind
def test_the_hash_knows_every_integer_and_scale(kind: str, pair: Any, make_model: Any) -> None:
    base, dense = pair(kind)
    again = pair(kind)[0]
    assert base.weights_sha256() == again.weights_sha256()
    assert len({base.weights_sha256(), dense.weights_sha256(), BaseLM(make_model("llama")).weights_sha256()}) == 3
    layer = quantised_in(again.model)[-1]
    for name, tensor in layer.named_buffers():
        before = tensor.clone()
        tensor[0, 0] += 1
        assert base.weights_sha256() != again.weights_sha256(), name
        tensor.copy_(before)
    assert base.weights_sha256() == again.weights_sha256()


@each_kind
def test_block_weights_are_the_dense_ones_by_their_names(kind: str, pair: Any) -> None:
    base, dense = pair(kind, "qwen2")  # with biases
    ours, theirs = base.block_weights(1), dense.block_weights(1)
    assert set(ours) == set(theirs)
    assert len(ours) == len(theirs)
    assert all(torch.equal(ours[name], w) for name, w in theirs.items())
    assert ours.get("self_attn.o_proj.bias") is None
    with pytest.raises(KeyError):
        ours["self_attn.o_proj.bias"]


@each_kind
def test_a_head_learns_on_it_what_it_learns_on_the_full_base(kind: str, make_model: Any) -> None:
    from draftsmith.data.pack import collate
    from draftsmith.data.rows import Row, Rows

    plain = BaseLM(make_model("llama", intermediate_size=64))
    said = [[t, *plain.generate([[t]], max_new_tokens=24)[0]] for t in (3, 20, 41)]
    rows = [Row(str(n), ids, [1] * len(ids)) for n, ids in enumerate(said)]
    batch, ends = collate([rows], 80, torch.from_numpy(Rows.of(rows).counts(4).sum(0))), []
    for base in (plain, BaseLM(make_model("llama", intermediate_size=64)).quantise(kind)):
        before = base.weights_sha256()
        head = new_head(Medusa, MedusaConfig(num_heads=3), "medusa", base, 0)
        optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
        seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        for _ in range(30):
            out = head.loss(base, seen, batch)
            optimizer.zero_grad()
            (out.sum / out.count).backward()
            optimizer.step()
        ends.append(float(out.sum.detach() / out.count))
        assert base.weights_sha256() == before
    assert ends[1] == pytest.approx(ends[0], rel={"int8": 0.02, "int4": 0.2}[kind])


def test_a_heads_folder_tells_how_the_base_was_and_serves_the_full_one_too(pair: Any, tmp_path: Path) -> None:
    base, full = pair("int8")
    head = new_head(Medusa, MedusaConfig(), "medusa", base, 0)
    native.save(tmp_path / "head", head, name="medusa")
    assert artifacts.read_json(tmp_path / "head" / "config.json")["base"]["quantised"] == "int8"
    card = (tmp_path / "head" / "README.md").read_text()
    assert "trained with that base's weights as int8" in card
    assert 'load_base("", quantise="int8")' in card
    back = native.load(tmp_path / "head", full.spec)
    assert full.spec.quantised == ""
    assert back.spec == dataclasses.replace(full.spec, quantised="int8")  # exported again, it says so still


@each_kind
def test_it_is_loaded_so_and_told_before_it_is_loaded(kind: str, make_model: Any, tmp_path: Path) -> None:
    make_model("llama", intermediate_size=64).save_pretrained(tmp_path)
    settings = prepare.BaseConfig(path=str(tmp_path), dtype="bfloat16", quantise=kind, recompute=True)
    base = prepare.load_base(settings)
    assert base.recompute
    assert base.spec.quantised == kind
    assert {m.weight.dtype for m in quantised_in(base.model)} == {torch.bfloat16}
    assert prepare.outline(settings).spec == base.spec
    assert base.weights_sha256() == lm.load(str(tmp_path), dtype="bfloat16", quantise=kind).weights_sha256()


# What is refused


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quantise": "int2"}, "quantise='int2': choose int8 or int4"),
        ({"quantise": "int8", "lora": prepare.LoraConfig()}, "quantise, lora"),
        ({"quantise": "int8", "adapter": "folder"}, "quantise, adapter"),
        ({"quantise": "int4", "compile": True}, "quantise, compile"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare.BaseConfig(path="somewhere", **settings)


def test_what_cannot_be_quantised_is_told(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"base\.quantise=int4: mlp\.down_proj reads 48 values.*choose int8"):
        BaseLM(make_model("llama")).quantise("int4")
    with pytest.raises(ConfigError, match=r"base\.quantise='int3'"):
        BaseLM(make_model("llama")).quantise("int3")
    with pytest.raises(ConfigError, match=r"base\.adapter, base\.quantise"):
        lm.load(str(tmp_path), adapter="folder", quantise="int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"base\.quantise: .*pip install 'draftsmith\[quant\]'"):
        BaseLM(make_model("llama")).quantise("int8")
