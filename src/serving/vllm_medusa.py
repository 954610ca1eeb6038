"""Hydra as vLLM <= 0.32 serves Medusa: a model that is given the base's last state and nothing else.

The newest token is not told. It is taken to be the base's best one, from copies of the base's embedding and lm_head in
the folder: so drafts are the engine's own in greedy texts, and those of a sampled text accept less than through
vllm_plugin.py, which knows the token. Verification, and with it the output, is vLLM's in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith import artifacts
from draftsmith.contracts import BaseSpec
from draftsmith.errors import DataError
from draftsmith.exporters import native
from draftsmith.exporters.vllm_medusa import VOCABULARY


class HydraModel(nn.Module):
    """vLLM's interface of a Medusa model: forward, compute_logits, load_weights."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        folder = Path(vllm_config.speculative_config.draft_model_config.model)
        told = artifacts.read_json(folder / "config.json")
        self.head: Any = native.load(folder, BaseSpec(**told["base"]))
        base = vllm_config.model_config.hf_text_config
        for key in ("hidden_size", "vocab_size"):
            if told["base"][key] != getattr(base, key):
                raise DataError(f"{folder}: made for a base with {key}={told['base'][key]}, not {getattr(base, key)}")
        dtype, size = vllm_config.model_config.dtype, (told["base"]["vocab_size"], told["base"]["hidden_size"])
        self.head.to(dtype=dtype)
        self.depth = min(self.head.max_depth, vllm_config.speculative_config.num_speculative_tokens)
        self.embedding = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.lm_head = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.view = SimpleNamespace(embed=lambda tokens: F.embedding(tokens, self.embedding))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def compute_logits(self, final_BD: Tensor) -> list[Tensor]:
        """logits_BV of as many heads as vLLM was told to ask, each after the best tokens of those before."""
        newest_B, found = (final_BD @ self.lm_head.T).argmax(-1), []
        drafted_BkD = self.view.embed(newest_B[:, None])
        for _ in range(self.depth):
            logits_BV, _ = self.head(self.view, final_BD, drafted_BkD)
            found.append(logits_BV)
            drafted_BkD = torch.cat([drafted_BkD, self.view.embed(logits_BV.argmax(-1)[:, None])], 1)
        return found

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The vocabulary's; the head's own were read, and checked, by native.load."""
        wanted = dict(zip(VOCABULARY, (self.embedding, self.lm_head), strict=True))
        for name, tensor in weights:
            if name in wanted:
                wanted.pop(name).data.copy_(tensor)
        if wanted:
            raise DataError(f"vLLM: the folder lacks {', '.join(wanted)}; export it with exporter=vllm_medusa")
        return {name for name, _ in self.named_parameters()}
