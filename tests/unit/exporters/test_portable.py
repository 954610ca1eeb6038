"""Medusa's portable folder, read as an inference server would read it: plain torch, nothing of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from draftsmith import artifacts
from draftsmith.base.lm import BaseLM
from draftsmith.errors import ConfigError
from draftsmith.exporters.portable import Portable, PortableConfig
from draftsmith.heads.medusa import Medusa

MakeHead = Callable[..., Medusa]
FORMS = [{}, {"share_lm_head": True}, {"num_heads": 5, "num_layers": 3}, {"num_heads": 1}]


def export(folder: Path, head: Medusa, base: BaseLM, dtype: str | None = None) -> Path:
    return Portable(PortableConfig(dtype)).save(folder, head, base, name="mine")


def served(folder: Path, final_ND: Tensor, rotate: int = 0) -> Tensor:
    """logits_NKV as a server computes them: sizes from config.json, names and sizes strict; a block is
    x + SiLU(Wx + b) with the bias only if medusa_fc_bias says so."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    # one server takes any key that speaks of a number of heads or layers for its own
    heads = {v for k, v in config.items() if "num" in k and "heads" in k}
    layers = {v for k, v in config.items() if "num" in k and "layers" in k}
    (K,), (n,) = heads, layers
    D, V = config["hidden_size"], config["vocab_size"]
    logits = []
    for i in range(K):
        h = final_ND
        source = (i + rotate) % K
        for j in range(n):
            weight, bias = (tensors.pop(f"{source}.{j}.linear.{w}") for w in ("weight", "bias"))
            assert (weight.shape, bias.shape) == ((D, D), (D,))
            pre = nn.functional.linear(h, weight, bias if config.get("medusa_fc_bias", False) else None)
            h = h + nn.functional.silu(pre)
        end = tensors.pop(f"{source}.{n}.weight")
        assert end.shape == (V, D)
        logits.append(nn.functional.linear(h, end))
    assert not tensors
    return torch.stack(logits, 1)


@pytest.fixture
def final_ND() -> Tensor:
    return torch.randn(11, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", FORMS)
def test_11_36_a_server_computes_our_logits(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor, settings: dict[str, Any]
) -> None:
    """§11.36: fp32, bit for bit; reading the heads in another order is noticed."""
    head = make_head(**settings)
    folder = export(tmp_path / "out", head, base)
    want = head(base, final_ND)
    assert torch.equal(served(folder, final_ND), want)
    if head.config.num_heads > 1:
        assert not torch.allclose(served(folder, final_ND, rotate=1), want, atol=1e-3)


@pytest.mark.parametrize("settings", FORMS)
def test_exact_names_shapes_and_storage(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, settings: dict[str, Any]
) -> None:
    """No prefix, biases always, every head its own lm_head (a shared one copied), n distinct blocks."""
    head = make_head(**settings)
    folder = export(tmp_path / "out", head, base)
    K, n = head.config.num_heads, head.config.num_layers
    want = {f"{i}.{n}.weight": (40, 16) for i in range(K)}
    for i in range(K):
        for j in range(n):
            want |= {f"{i}.{j}.linear.weight": (16, 16), f"{i}.{j}.linear.bias": (16,)}
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == want
    blocks = [t for k, t in tensors.items() if "linear.weight" in k]
    assert len({tuple(t.flatten().tolist()) for t in blocks}) == K * n
    if head.config.share_lm_head:
        assert all(torch.equal(tensors[f"{i}.{n}.weight"], base.lm_head_weight) for i in range(K))
    with safe_open(folder / "medusa_lm_head.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("settings", [{}, {"share_lm_head": True}])
def test_tensors_are_contiguous_and_unshared(base: BaseLM, make_head: MakeHead, settings: dict[str, Any]) -> None:
    """Also where the head's own are not: a transposed weight, or one tensor behind three heads."""
    head = make_head(**settings)
    with torch.no_grad():
        weight = head.blocks[0][0].linear.weight
        head.blocks[0][0].linear.weight = nn.Parameter(weight.t().contiguous().t())
    tensors = Portable(PortableConfig()).tensors(head, base)
    assert all(t.is_contiguous() for t in tensors.values())
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)
    assert not {t.data_ptr() for t in tensors.values()} & {p.data_ptr() for p in head.parameters()}


def test_config_has_exactly_these_keys(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    folder = export(tmp_path / "out", make_head(num_heads=4, num_layers=2), base)
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "model_type": "medusa",
        "medusa_num_heads": 4,
        "medusa_num_layers": 2,
        "hidden_size": 16,
        "vocab_size": 40,
        "medusa_fc_bias": True,  # without it the biases are dropped silently
        "n_predict": 4,
        "base_model_name_or_path": "some/base",
        "torch_dtype": "float32",
    }
    assert "architectures" not in config  # its presence makes one server ignore the head
    assert [k for k in config if "num" in k and "heads" in k] == ["medusa_num_heads"]
    assert [k for k in config if "num" in k and "layers" in k] == ["medusa_num_layers"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "medusa_lm_head.safetensors"]
    assert artifacts.verify(folder)["kind"] == "portable medusa"


def test_the_bias_flag_matters(tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor) -> None:
    """The negative control of the flag above: the reader does drop biases without it."""
    head = make_head()
    folder = export(tmp_path / "out", head, base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "medusa_fc_bias": False}))
    assert not torch.allclose(served(folder, final_ND), head(base, final_ND), atol=1e-2)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_lower_precision(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor, dtype: str, bits: int
) -> None:
    head = make_head()
    folder = export(tmp_path / "out", head, base, dtype)
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    for name, exact in Portable(PortableConfig()).tensors(head, base).items():
        error = (tensors[name].float() - exact).abs()
        assert (error <= exact.abs() * 2.0**-bits + 1e-7).all()  # half a unit in the last place


def test_heads_trained_in_bf16_are_written_as_trained(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    folder = export(tmp_path / "out", make_head().bfloat16(), base)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("share", [False, True])
def test_an_lm_head_with_a_bias_is_refused(tmp_path: Path, base: BaseLM, make_head: MakeHead, share: bool) -> None:
    """The format has no place for it."""
    other = BaseLM(base.in_float64().model.float())
    other._head.bias = nn.Parameter(torch.randn(40), requires_grad=False)
    head = make_head(share_lm_head=share)
    if not share:
        for lm_head in head.lm_heads:
            lm_head.bias = nn.Parameter(torch.randn(40))
    with pytest.raises(ConfigError, match=r"bias.*use native"):
        export(tmp_path / "out", head, other)
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_head_is_refused(tmp_path: Path, base: BaseLM) -> None:
    head: Any = nn.Linear(2, 2)
    head.config = object()
    with pytest.raises(ConfigError, match="cannot hold Linear 'mine'"):
        export(tmp_path / "out", head, base)
    assert list(tmp_path.iterdir()) == []


def test_same_bytes_twice(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    head = make_head()
    first = {p.name: p.read_bytes() for p in export(tmp_path / "out", head, base).iterdir()}
    assert {p.name: p.read_bytes() for p in export(tmp_path / "out", head, base).iterdir()} == first


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float64"])
def test_bad_settings(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype='{dtype}'"):
        PortableConfig(dtype)
