"""A micro base, made in code, and packed batches with several documents, padding and masks."""

from collections.abc import Callable

import pytest
import torch

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Batch
from draftsmith.targets import count_targets

VOCABULARY, SIZE = 40, 16


@pytest.fixture(scope="session")
def base() -> BaseLM:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": SIZE,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = create.llama(shape, None, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # fresh logits are nearly uniform: liven them up
    return BaseLM(model)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(seed: int = 0, horizon: int = 4, rows: int = 2, length: int = 20) -> Batch:
        g = torch.Generator().manual_seed(seed)
        tokens_BT = torch.randint(VOCABULARY, (rows, length), generator=g)
        mask_BT = torch.rand(rows, length, generator=g) < 0.7
        documents_BT, positions_BT = torch.full((rows, length), -1), torch.zeros(rows, length, dtype=torch.long)
        for b in range(rows):
            at = 0
            for document, size in enumerate(torch.randint(1, 8, (3,), generator=g).tolist()):
                size = min(size, length - at)
                documents_BT[b, at : at + size] = document
                positions_BT[b, at : at + size] = torch.arange(size)
                at += size
            mask_BT[b, at:] = False
        counts_K = count_targets(mask_BT, documents_BT, horizon)
        return Batch(tokens_BT, positions_BT, documents_BT, mask_BT, counts_K)

    return make
