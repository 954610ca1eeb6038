"""A tokenizer made from a few lines, the spec of a base that has it, and `datasets` without a network."""

from pathlib import Path
from typing import Any

import pytest

from draftsmith.base.spec import template_sha256, tokenizer_sha256
from draftsmith.contracts import BaseSpec
from draftsmith.data import synthetic


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return synthetic.train_tokenizer(["the cat sat on the mat", "a dog and a cat", "héllo wörld 你好"], 300)


@pytest.fixture(scope="session")
def spec(tokenizer: Any) -> BaseSpec:
    return BaseSpec(
        family="llama",
        hidden_size=16,
        intermediate_size=24,
        vocab_size=len(tokenizer),
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=64,
        path="some/base",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        template_sha256=template_sha256(tokenizer),
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets
