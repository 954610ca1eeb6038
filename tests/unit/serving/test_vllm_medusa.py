"""Hydra behind vLLM's interface of a Medusa model, from the exported folder's files. (vLLM itself: tests/runtime.)"""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Capture
from draftsmith.decoding import tree
from draftsmith.errors import DataError
from draftsmith.exporters import native
from draftsmith.exporters.vllm_medusa import ARCHITECTURE, FILE, HYDRA
from draftsmith.heads.hydra import Hydra, HydraConfig
from draftsmith.roles import State
from draftsmith.serving import entry
from draftsmith.serving.vllm_medusa import HydraModel

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def base() -> BaseLM:
    return BaseLM(create.llama(SHAPE, None, seed=0), path="some/base")


@pytest.fixture
def folder(base: BaseLM, tmp_path: Path) -> Path:
    torch.manual_seed(2)
    head = Hydra(HydraConfig(num_layers=2), base.spec)
    head.initialise(base)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return HYDRA.save(tmp_path / "out", head.eval(), base, None, name="mine", runtime="vllm_medusa")


def configured(folder: Path, **changed: Any) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(model=str(folder)), num_speculative_tokens=changed.pop("depth", 4)
        ),
        model_config=SimpleNamespace(
            dtype=torch.float32, hf_text_config=SimpleNamespace(**{"hidden_size": 16, "vocab_size": 40, **changed})
        ),
    )


def read(folder: Path) -> HydraModel:
    """As vLLM loads a model: every safetensors file of the folder."""
    model = HydraModel(vllm_config=configured(folder))
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    told = model.load_weights(pair for tensors in files for pair in tensors.items())
    assert told == {name for name, _ in model.named_parameters()}
    return model


def test_it_drafts_what_the_head_drafts_after_the_best_token(folder: Path, base: BaseLM) -> None:
    model, head = read(folder), native.load(folder, base.spec)
    final_BD = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    drafts_BK = torch.stack([logits.argmax(-1) for logits in model.compute_logits(model(final_BD))], 1)
    for final_D, drafts_K in zip(final_BD, drafts_BK, strict=True):
        root = int(base.lm_head(final_D).argmax())
        state = State([root], root, Capture(final=final_D[None, None]), tree.chain(4))
        assert drafts_K.tolist() == head.propose(base, state).tokens_N[1:].tolist()  # type: ignore[operator]


def test_it_drafts_no_more_than_vllm_was_told(folder: Path) -> None:
    model = HydraModel(vllm_config=configured(folder, depth=2))
    assert len(model.compute_logits(torch.zeros(1, 16))) == 2


def test_vllm_finds_no_other_number_of_heads_or_layers(folder: Path) -> None:
    told = json.loads((folder / "config.json").read_text())
    assert [k for k in told if "num" in k and "heads" in k] == ["num_heads"]
    assert [k for k in told if "num" in k and "layers" in k] == ["num_hidden_layers"]
    assert told["model_type"] == "medusa"
    assert told["architectures"] == [ARCHITECTURE] == [entry.ARCHITECTURE]


def test_a_folder_without_the_vocabulary_and_another_base_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=40, not 41"):
        HydraModel(vllm_config=configured(folder, vocab_size=41))
    tensors = load_file(folder / FILE)
    save_file({"vocabulary.embedding": tensors["vocabulary.embedding"]}, folder / FILE)
    model = HydraModel.__new__(HydraModel)
    torch.nn.Module.__init__(model)
    model.embedding = model.lm_head = torch.nn.Parameter(torch.empty(40, 16))
    with pytest.raises(DataError, match=r"lacks vocabulary\.lm_head"):
        model.load_weights(load_file(folder / FILE).items())
    with pytest.raises(DataError, match=FILE):  # the manifest knows it
        HydraModel(vllm_config=configured(folder))


def test_the_entry_point_names_the_architecture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process of vLLM, and again where it is loaded twice."""
    known: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=lambda: set(known), register_model=known.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["draftsmith"].partition(":")
    register = getattr(import_module(module), name)
    register()
    register()
    module, _, name = known.pop(ARCHITECTURE).partition(":")
    assert getattr(import_module(module), name) is HydraModel
    assert not known
