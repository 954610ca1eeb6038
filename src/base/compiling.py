"""The base's blocks through torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

FORWARD_KINDS = 8  # one token or several, with a mask or without, with K/V or without: graphs of one block


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Every block compiles for itself, in place, at the first forwards of each kind (one token, several, with a mask),
    some seconds each: torch tells blocks apart by their number. For any number of tokens and slots."""
    # Beyond its limit torch goes on uncompiled, with a warning at most; blocks share one limit, and their code.
    limits, kinds = torch._dynamo.config, FORWARD_KINDS * len(blocks)
    limits.recompile_limit = max(limits.recompile_limit, kinds)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * kinds)
    for block in blocks:
        block.compile(dynamic=True)
