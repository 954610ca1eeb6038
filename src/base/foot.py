"""The first blocks of a base with its embedding, final norm and lm_head: what a head needs beside a server that runs
the base itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith.base.lm import BaseLM
from draftsmith.base.loading import read


def load_foot(
    path: str, blocks: int, num_layers: int, *, revision: str | None, dtype: str, device: Any, trust_remote_code: bool
) -> BaseLM:
    """spec tells of the whole base, which has num_layers blocks; a capture ends after the `blocks` that are here."""
    model, tokenizer = read(path, revision, dtype, trust_remote_code, blocks)
    foot = BaseLM(model, tokenizer, path, revision).to(device)
    foot.spec = dataclasses.replace(foot.spec, num_layers=num_layers)
    return foot


def share(foot: BaseLM, embedding: Tensor | None, lm_head: Tensor | None) -> None:
    """Its vocabulary matrices become views of a server's, [V or more, D], where those are equal; else they stay its
    own copies."""
    for own, theirs in ((foot._embed, embedding), (foot._head, lm_head)):
        weight = own.weight
        if theirs is None or theirs.dim() != 2 or theirs.dtype != weight.dtype or theirs.device != weight.device:
            continue
        view = theirs.detach()[: len(weight)]
        if view.shape == weight.shape and torch.equal(view, weight):
            own.weight = nn.Parameter(view, requires_grad=False)
