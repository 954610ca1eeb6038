"""Weight-only quantisation of the linear layers inside the base's blocks. Embedding, norms and lm_head stay as they
are: heads read them.

torchao chooses the integers and their scales: int8 with a scale per row, symmetric; int4 with a scale and a zero point
per 32 weights of a row (symmetric ones would be biased: 7.5 steps cut to 7). The layer around them is ours. torchao's
own keeps a dense copy of its weight for the backward pass, which undoes what was saved where gradients pass through the
base, and its int4 takes a whole byte on a CPU or has no gradient at all.

Shapes: N outputs, K inputs, G groups of a row that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.base.settings import QUANTISED
from draftsmith.errors import ConfigError

GROUP = 32  # int4 weights of a row that share a scale


class QuantisedLinear(nn.Module):
    """A frozen linear layer that keeps its weight as integers and makes it dense for the moment of each product."""

    packed: Tensor  # int8 [N, K], or uint8 [N, K / 2] with two int4 a byte, the earlier one in the lower half
    scale_NG: Tensor
    zero_NG: Tensor | None  # int8; None: 0 everywhere

    def __init__(self, linear: nn.Linear, integers_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None = None) -> None:
        """zero_NG: of int4; integers_NK are then -8..7."""
        super().__init__()
        self.out_features, self.in_features, self.dtype = linear.out_features, linear.in_features, linear.weight.dtype
        if zero_NG is not None:
            low, high = (integers_NK[:, n::2].add(8).to(torch.uint8) for n in (0, 1))
            integers_NK = low | (high << 4)
        self.register_buffer("packed", integers_NK.contiguous())
        self.register_buffer("scale_NG", scale_NG.contiguous())
        self.register_buffer("zero_NG", zero_NG)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """[N, K], dense, made anew each time."""
        integers_NK = self.packed
        if self.zero_NG is not None:
            integers_NK = torch.stack([integers_NK & 15, integers_NK >> 4], -1).flatten(1).to(torch.int8) - 8
        grouped = integers_NK.unflatten(1, (self.scale_NG.shape[1], -1))
        if self.zero_NG is not None:
            grouped = grouped - self.zero_NG[..., None]
        return (grouped * self.scale_NG[..., None]).flatten(1).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T + b, differentiable with respect to x; for the backward pass W is made dense a second time, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None


def quantise(blocks: Sequence[nn.Module], kind: str) -> None:
    """Every linear layer inside the blocks, in place and where they are; kind: int8 or int4. Maxima and elementwise
    steps alone choose the integers, so the same weights give the same ones. ConfigError for another kind, without
    torchao, or for a layer of int4 whose width is no multiple of 32."""
    if kind not in QUANTISED:
        raise ConfigError(f"base.quantise='{kind}': choose {' or '.join(QUANTISED)}, or null")
    quantize_, config = _torchao(kind)
    for block in blocks:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            if kind == "int4" and linear.in_features % GROUP:
                raise ConfigError(
                    f"base.quantise=int4: {name} reads {linear.in_features} values, no multiple of {GROUP}; choose int8"
                )
            quantize_(nn.Sequential(linear), config)
            found: Any = linear.weight  # in the dtype it had
            zero_NG = found.zero_point if kind == "int4" else None
            block.set_submodule(name, QuantisedLinear(linear, found.qdata, found.scale, zero_NG))


def _torchao(kind: str) -> tuple[Any, Any]:
    """torchao's quantize_ and its config."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, quantize_
        from torchao.quantization.granularity import PerGroup
    except ModuleNotFoundError:
        raise ConfigError("base.quantise: quantising needs torchao; pip install 'draftsmith[quant]'") from None
    if kind == "int8":
        return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
    int4: Any = getattr(torch, "int4")  # noqa: B009 (torch's stubs lack it)
    return quantize_, IntxWeightOnlyConfig(int4, PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC)


class BlockWeights(Mapping[str, Tensor]):
    """A block's weights by the names they have in the dense block; a quantised one is made dense when it is asked for,
    so that whoever reads two of them does not pay for all."""

    def __init__(self, block: nn.Module) -> None:
        self._kept = dict(block.named_parameters())
        self._quantised = {f"{n}.weight": m for n, m in block.named_modules() if isinstance(m, QuantisedLinear)}

    def __getitem__(self, name: str) -> Tensor:
        return self._quantised[name].weight if name in self._quantised else self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._kept, *self._quantised])

    def __len__(self) -> int:
        return len(self._kept) + len(self._quantised)


def made_dense(model: nn.Module) -> nn.Module:
    """The model with every quantised layer replaced, in place, by the dense one it stands for; returns it."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]:
        with torch.device("meta"):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
        dense.weight = nn.Parameter(layer.weight, requires_grad=False)
        dense.bias = layer.bias
        model.set_submodule(name, dense)
    return model
