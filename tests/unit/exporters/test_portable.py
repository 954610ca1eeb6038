"""Medusa's folders, read as inference servers read them: plain torch, nothing of ours."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draftsmith import artifacts
from draftsmith.base.lm import BaseLM
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.exporters import forms, medusa
from draftsmith.exporters.runtimes import Runtime, RuntimeConfig
from draftsmith.heads.medusa import Medusa

MakeHead = Callable[..., Medusa]
FORMS = [{}, {"share_lm_head": True}, {"num_heads": 5, "num_layers": 3}, {"num_heads": 1}]
RUNTIMES = ("portable", "tgi", "tensorrt_llm", "vllm", "mlc")
FILE = {**dict.fromkeys(RUNTIMES, "medusa_lm_head.safetensors"), **dict.fromkeys(("vllm", "mlc"), "model.safetensors")}


def export(folder: Path, head: Medusa, base: BaseLM, dtype: str | None = None, runtime: str = "portable") -> Path:
    return Runtime(RuntimeConfig(runtime, dtype)).save(folder, head, base, name="mine")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (file,) = folder.glob("*.safetensors")
    return json.loads((folder / "config.json").read_text()), load_file(file)


def served(folder: Path, final_ND: Tensor) -> Tensor:
    """logits_NKV as TGI, TensorRT-LLM (bare names) and MLC-LLM (under `medusa_head.`) compute them: sizes from
    config.json, names and sizes strict."""
    config, tensors = read(folder)
    K, n, D, V = (config[k] for k in ("medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size"))
    prefix = "medusa_head." if (folder / "model.safetensors").exists() else ""
    logits = []
    for i in range(K):
        h = final_ND
        for j in range(n):
            weight, bias = (tensors.pop(f"{prefix}{i}.{j}.linear.{w}") for w in ("weight", "bias"))
            assert (weight.shape, bias.shape) == ((D, D), (D,))
            h = h + nn.functional.silu(nn.functional.linear(h, weight, bias))
        end = tensors.pop(f"{prefix}{i}.{n}.weight")
        assert end.shape == (V, D)
        logits.append(nn.functional.linear(h, end))
    assert not tensors
    return torch.stack(logits, 1)


def vllm_reads(folder: Path, final_ND: Tensor) -> Tensor:
    """logits_NKV as vLLM 0.32 computes them (models/medusa.py, configs/medusa.py): any key that speaks of a number of
    heads or layers is its own, old names are put into its own, a bias counts only with medusa_fc_bias, and every
    parameter that the config makes has to come from the file; what else is in the file is left aside."""
    config, tensors = read(folder)
    for key in [k for k in config if "num" in k]:
        for what, mine in (("heads", "num_heads"), ("layers", "num_hidden_layers")):
            if what in key:
                config[mine] = config.pop(key)
                break
    K, n, D, V = (config[k] for k in ("num_heads", "num_hidden_layers", "hidden_size", "vocab_size"))
    mine: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0].isdigit() and parts[1].isdigit():
            name = f"lm_heads.{parts[0]}.{parts[2]}"
            if parts[2] == "linear":
                name = f"blocks.{parts[0]}.layers.{parts[1]}.{parts[3]}"
        mine[name] = tensor
    biased, shared = config.get("medusa_fc_bias", False), config.get("original_lm_head", False)
    logits = []
    for i in range(K):
        h = final_ND
        for j in range(n):
            weight = mine[f"blocks.{i}.layers.{j}.weight"]
            assert weight.shape == (D, D)
            bias = mine[f"blocks.{i}.layers.{j}.bias"] if biased else None
            h = h + nn.functional.silu(nn.functional.linear(h, weight, bias))
        end = mine["lm_heads.0.weight" if shared else f"lm_heads.{i}.weight"]
        assert end.shape == (V, D)
        logits.append(nn.functional.linear(h, end))
    return torch.stack(logits, 1)


def of_server(runtime: str, folder: Path, final_ND: Tensor) -> Tensor:
    return (vllm_reads if runtime == "vllm" else served)(folder, final_ND)


def change(folder: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """The folder as a wrong exporter would have left it."""
    config, tensors = read(folder)
    edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file)


@pytest.fixture
def final_ND() -> Tensor:
    return torch.randn(11, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("settings", FORMS)
def test_11_36_a_server_computes_our_logits(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor, settings: dict[str, Any], runtime: str
) -> None:
    """§11.36: fp32, bit for bit."""
    head = make_head(**settings)
    folder = export(tmp_path / "out", head, base, runtime=runtime)
    assert torch.equal(of_server(runtime, folder, final_ND), head(base, final_ND))
    if runtime == "portable":  # vLLM reads it too
        assert torch.equal(vllm_reads(folder, final_ND), head(base, final_ND))


def rotated(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Head i stands where head i + 1 belongs."""
    old = dict(tensors)
    number = next(k for k in ("num_heads", "medusa_num_heads") if k in config)
    for name in old:
        parts = name.split(".")
        at = next(k for k, p in enumerate(parts) if p.isdigit())
        parts[at] = str((int(parts[at]) + 1) % config[number])
        tensors[".".join(parts)] = old[name].clone()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_readers_notice_what_is_wrong(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor, runtime: str
) -> None:
    """Negative controls: heads in another order, blocks of a head in another order, a bias that is not written."""
    head = make_head(num_layers=2)
    want = head(base, final_ND)
    block = {"vllm": "blocks.0.layers.{}.weight", "mlc": "medusa_head.0.{}.linear.weight"}
    first, second = (block.get(runtime, "0.{}.linear.weight").format(j) for j in range(2))

    def blocks(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    for n, edit in enumerate((rotated, blocks)):
        folder = export(tmp_path / str(n), head, base, runtime=runtime)
        change(folder, edit)
        assert not torch.allclose(of_server(runtime, folder, final_ND), want, atol=1e-3)
    folder = export(tmp_path / "bias", head, base, runtime=runtime)
    change(folder, lambda config, tensors: [tensors.pop(k) for k in list(tensors) if k.endswith("bias")])
    with pytest.raises(KeyError, match="bias"):
        of_server(runtime, folder, final_ND)


@pytest.mark.parametrize("runtime", ["portable", "vllm"])
def test_the_bias_flag_matters_to_vllm(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor, runtime: str
) -> None:
    """Without it vLLM drops the biases and says nothing."""
    head = make_head()
    folder = export(tmp_path / "out", head, base, runtime=runtime)
    change(folder, lambda config, tensors: config.pop("medusa_fc_bias"))
    assert not torch.allclose(vllm_reads(folder, final_ND), head(base, final_ND), atol=1e-2)


def test_a_stray_number_breaks_vllm(tmp_path: Path, base: BaseLM, make_head: MakeHead, final_ND: Tensor) -> None:
    """The control of "no other key with num and layers": vLLM takes the last one for its own."""
    folder = export(tmp_path / "out", make_head(), base)
    change(folder, lambda config, tensors: config.update(base_num_hidden_layers=4))
    with pytest.raises(KeyError, match=r"layers\.1"):
        vllm_reads(folder, final_ND)


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


@pytest.mark.parametrize("settings", FORMS)
def test_vllms_own_names(tmp_path: Path, base: BaseLM, make_head: MakeHead, settings: dict[str, Any]) -> None:
    """A shared lm_head once and no cut vocabulary, which vLLM 0.32 cannot load."""
    head = make_head(**settings)
    folder = export(tmp_path / "out", head, base, runtime="vllm")
    K, n = head.config.num_heads, head.config.num_layers
    want = {f"lm_heads.{i}.weight": (40, 16) for i in range(1 if head.config.share_lm_head else K)}
    for i in range(K):
        for j in range(n):
            want |= {f"blocks.{i}.layers.{j}.weight": (16, 16), f"blocks.{i}.layers.{j}.bias": (16,)}
    config, tensors = read(folder)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == want
    assert config == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "num_heads": K,
        "num_hidden_layers": n,
        "hidden_size": 16,
        "vocab_size": 40,
        "medusa_fc_bias": True,
        "original_lm_head": head.config.share_lm_head,
        "n_predict": K,
        "base_model_name_or_path": "some/base",
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("settings", [{}, {"share_lm_head": True}])
def test_tensors_are_contiguous_and_unshared(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, settings: dict[str, Any], runtime: str
) -> None:
    """Also where the head's own are not: a transposed weight, or one tensor behind three heads."""
    head = make_head(**settings)
    with torch.no_grad():
        weight = head.blocks[0][0].linear.weight
        head.blocks[0][0].linear.weight = nn.Parameter(weight.t().contiguous().t())
    folder = export(tmp_path / "out", head, base, runtime=runtime)
    with safe_open(folder / FILE[runtime], "pt") as f:
        assert f.metadata() == {"format": "pt"}
        sizes = [f.get_tensor(k).numel() * 4 for k in f.keys()]  # noqa: SIM118
    header = int.from_bytes((folder / FILE[runtime]).read_bytes()[:8], "little")
    assert (folder / FILE[runtime]).stat().st_size == 8 + header + sum(sizes)  # each in a place of its own
    copied = forms.in_dtype(head, None).state_dict()
    assert all(t.is_contiguous() for t in copied.values())
    assert not {t.data_ptr() for t in copied.values()} & {p.data_ptr() for p in head.parameters()}


@pytest.mark.parametrize("runtime", ["portable", "tgi", "tensorrt_llm", "mlc"])
def test_config_has_exactly_these_keys(tmp_path: Path, base: BaseLM, make_head: MakeHead, runtime: str) -> None:
    folder = export(tmp_path / "out", make_head(num_heads=4, num_layers=2), base, runtime=runtime)
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
    assert "architectures" not in config  # its presence makes TGI ignore the head
    assert [k for k in config if "num" in k and "heads" in k] == ["medusa_num_heads"]
    assert [k for k in config if "num" in k and "layers" in k] == ["medusa_num_layers"]
    more = ["medusa_choices.json"] if runtime == "tensorrt_llm" else []
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "config.json", "manifest.json", FILE[runtime], *more]
    )
    assert artifacts.verify(folder)["kind"] == f"export {runtime} medusa"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_lower_precision(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, dtype: str, bits: int, runtime: str
) -> None:
    head = make_head()
    config, tensors = read(export(tmp_path / "out", head, base, dtype, runtime))
    _, exact = read(export(tmp_path / "exact", head, base, None, runtime))
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert config["torch_dtype"] == dtype
    for name, tensor in exact.items():
        error = (tensors[name].float() - tensor).abs()
        assert (error <= tensor.abs() * 2.0**-bits + 1e-7).all()  # half a unit in the last place


@pytest.mark.parametrize("runtime", ["portable", "vllm"])
def test_heads_trained_in_bf16_are_written_as_trained(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, runtime: str
) -> None:
    """A shared lm_head too: a file of one precision."""
    head = make_head(share_lm_head=True).bfloat16()
    config, tensors = read(export(tmp_path / "out", head, base, runtime=runtime))
    assert config["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("share", [False, True])
def test_an_lm_head_with_a_bias_is_refused(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, share: bool, runtime: str
) -> None:
    """No format has a place for it."""
    head = make_head(share_lm_head=share)
    head.spec = dataclasses.replace(head.spec, lm_head_bias=True)
    with pytest.raises(ConfigError, match=r"bias.* use exporter=reference, custom_generate or native$"):
        export(tmp_path / "out", head, base, runtime=runtime)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_bounded_lm_head_is_refused(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    """gemma2's logits are soft-capped; a head's own lm_head never was."""
    bounded: Any = BaseLM(base.in_float64().model.float(), path="some/base")
    bounded._softcap = 30.0
    with pytest.raises(ConfigError, match="bounds its logits"):
        export(tmp_path / "out", make_head(share_lm_head=True), bounded)
    export(tmp_path / "out", make_head(), bounded)


def test_same_bytes_twice(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    head = make_head()
    for runtime in RUNTIMES:
        first = {p.name: p.read_bytes() for p in export(tmp_path / "out", head, base, runtime=runtime).iterdir()}
        again = export(tmp_path / "out", head, base, runtime=runtime)
        assert {p.name: p.read_bytes() for p in again.iterdir()} == first


@pytest.mark.parametrize(
    ("tuned", "want"),
    [
        ({}, [[0], [0, 0], [0, 0, 0]]),
        ({"tree": {"kind": "chain", "paths": None}, "depth": 2}, [[0], [0, 0]]),
        ({"tree": {"kind": "eagle2", "paths": None}, "depth": 3}, [[0], [0, 0], [0, 0, 0]]),
        (
            {"tree": {"kind": "static", "paths": [[0], [1], [0, 0], [0, 1], [0, 0, 0], [0, 0, 0, 0]]}, "depth": 3},
            [[0], [1], [0, 0], [0, 1], [0, 0, 0]],
        ),
    ],
)
def test_the_tree_of_tensorrt_llm(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, tuned: dict[str, Any], want: list[list[int]]
) -> None:
    """The tuned one where it is one of fixed paths, cut where the head ends; else a chain as deep as was best."""
    head = make_head()
    rest = {"nodes": 7, "temperature": 0.0, "measured_speedup": 1.5, "predicted_speedup": 1.6}  # for the card
    head.said = {"tuned": {**rest, **tuned} if tuned else {}}
    folder = export(tmp_path / "out", head, base, runtime="tensorrt_llm")
    assert json.loads((folder / "medusa_choices.json").read_text()) == want
    assert f"--max_medusa_token_len {len(want)} " in Runtime(RuntimeConfig("tensorrt_llm")).start(folder, head, base)


def test_a_form_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, mixed_up: Callable[..., None]
) -> None:
    """A table that puts two heads' blocks in each other's place on the way back; nothing appears."""
    mixed_up(medusa.Medusa, "blocks.0.0.linear.weight", "blocks.1.0.linear.weight")
    with pytest.raises(NumericsError, match=r"does not read back equal: blocks\.0\.0\.linear\.weight"):
        export(tmp_path / "out", make_head(), base)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, tensors: dict[str, Tensor]) -> None:
        save_file({k: t + 1 if k.endswith("bias") else t for k, t in tensors.items()}, path, metadata={"format": "pt"})

    monkeypatch.setattr(artifacts, "write_tensors", write)
    with pytest.raises(NumericsError, match="does not read back as it was written"):
        export(tmp_path / "out", make_head(), base)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_travels(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    def save(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")

    adapted: Any = BaseLM(base.model, path="some/base")
    adapted.adapter = SimpleNamespace(save=save)
    exporter = Runtime(RuntimeConfig("vllm"))
    head = make_head()
    folder = exporter.save(tmp_path / "out", head, adapted, name="mine")
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert exporter.start(folder, head, adapted).endswith("and the base with the folder's adapter merged into it")


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float64"])
def test_bad_settings(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype='{dtype}'"):
        RuntimeConfig("portable", dtype)
