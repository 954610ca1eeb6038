"""A micro base and Medusa heads with random weights everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.heads.medusa import Medusa, MedusaConfig


@pytest.fixture(scope="session")
def base() -> BaseLM:
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    return BaseLM(create.llama(shape, None, seed=0), path="some/base", revision="main")


@pytest.fixture
def make_head(base: BaseLM) -> Callable[..., Medusa]:
    def make(**settings: Any) -> Medusa:
        torch.manual_seed(2)
        head = Medusa(MedusaConfig(**settings), base.spec)
        head.initialise(base)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return head

    return make


@pytest.fixture
def mixed_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a form take one of our tensors for another when it reads back what it wrote."""

    def mix(form: type, one: str, two: str) -> None:
        original: Any = form.names  # type: ignore[attr-defined]
        calls = 0

        def names(self: Any, head: Any) -> dict[str, str]:
            nonlocal calls
            calls += 1
            found = original(self, head)
            return {**found, one: found[two], two: found[one]} if calls == 2 else found

        monkeypatch.setattr(form, "names", names)

    return mix
