"""Building blocks that several heads share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResBlock(nn.Module):
    """x + SiLU(W x + b), W square. Zero W and b make it the identity (`reset` does)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def reset(self) -> None:
        """The identity. PyTorch's own bias init is not zero and would leave the block off the identity."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))
