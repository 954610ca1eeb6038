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
