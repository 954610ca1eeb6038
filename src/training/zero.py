"""DeepSpeed ZeRO through Lightning: the engine of the heads, and a frozen base whose blocks lie in pieces.

Two engines. The heads and the adapter are trained by the first, at the stage that the strategy names: gradients and
Adam moments are partitioned. Under stage 3 a second engine without an optimiser holds the base's blocks, each
process a part, and puts a block together for as long as it runs; embedding, final norm and lm_head stay whole.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from draftsmith.training import processes
from draftsmith.training.settings import MOMENTS

T = TypeVar("T")

PERSISTENT = 10_000  # weights of up to so many numbers (norms, biases) stay whole: gathering costs more than they do


def library(accelerator: str) -> Any:
    """The module deepspeed, told where it runs before it looks for itself."""
    if accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Used for inference only, and compiled at the first meeting of processes: half a minute of g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*torch.distributed.*is deprecated.*")  # DeepSpeed's calls, in every collective
    return deepspeed


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, on CPUs too, that stops where a gradient is not finite."""

    def setup_environment(self) -> None:
        # The parent refuses everything but CUDA, compares device numbers with local ranks, and passes the number on:
        # a CPU device has none.
        if isinstance(self.accelerator, CPUAccelerator):
            self.parallel_devices = [torch.device("cpu", n) for n in range(len(self.parallel_devices or []))]
        DDPStrategy.setup_environment(self)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        out = super().optimizer_step(optimizer, closure, model, **kwargs)
        if getattr(self.deepspeed_engine.optimizer, "overflow", False):
            module: Any = self.lightning_module
            module.not_finite({"all heads": {"gradient norm": float("nan")}})  # which of them, the engine does not say
        return out


def link(optimizer: Any) -> None:
    """Lets parameters find their moments. DeepSpeed 0.19 does it once, after the first group's first step, when the
    other groups have none yet. Call it before `moments`."""
    if not _is_stage3(optimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def moments(optimizer: Any, p: nn.Parameter) -> tuple[dict[str, Tensor], int]:
    """Adam's moments of a parameter in its own shape, fp32, and how many updates made them. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    updates = _updates(optimizer)
    if not updates:
        return {}, 0
    return {m: safe_get_full_optimizer_state(p, m) for m in MOMENTS}, updates


def weight(p: nn.Parameter) -> Tensor:
    """A parameter's fp32 master in its own shape. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(p)


def put_moments(optimizer: Any, found: Mapping[nn.Parameter, Mapping[str, Tensor]], updates: int) -> None:
    """Gives every parameter its moments back, each process its part of them."""
    inner = optimizer.optimizer
    stage3 = _is_stage3(optimizer)
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:  # Adam itself makes them in its first step, which comes later
        step = torch.tensor(float(updates), device=flat.device)
        inner.state[flat] = {"step": step, **{m: torch.zeros_like(flat) for m in MOMENTS}}
    link(optimizer)
    for p, tensors in found.items():
        for name, value in tensors.items():
            if stage3:
                optimizer.set_local_hp_param(_part(optimizer, p, value), p, name)
            else:
                p.set_full_hp_param(value.to(p.device), name)  # type: ignore[attr-defined]


def _part(optimizer: Any, p: Any, value: Tensor) -> Tensor:
    """This process's piece of a full tensor, padded as DeepSpeed pads it. (Its own setter of full tensors cuts past
    their end where the pieces do not divide.)"""
    size = p.ds_tensor.ds_numel
    rank = optimizer._get_param_partition_rank(p)
    flat = value.flatten().float()
    piece = torch.zeros(size, dtype=torch.float32)
    mine = flat[rank * size : (rank + 1) * size]
    piece[: len(mine)] = mine
    return piece


def _updates(optimizer: Any) -> int:
    states = [s for s in optimizer.optimizer.state.values() if "step" in s]
    return int(states[0]["step"]) if states else 0


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Partitioned parameters put together; those that are whole stay as they are. Collective."""
    pieces = [p for p in parameters if hasattr(p, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces, modifier_rank=None):
        yield


def release(engine: Any, parts: Iterable[nn.Module]) -> None:
    """After training: the modules as they were before, plain, with the fp32 masters as their weights. Collective."""
    parts = list(parts)
    parameters = [p for part in parts for p in part.parameters()]
    masters = [weight(p).clone() if p.requires_grad else None for p in parameters]
    engine.destroy()
    for part in parts:
        for module in part.modules():
            own: Any = module._parameters
            module._parameters = dict(own.items())
    for p, master in zip(parameters, masters, strict=True):
        for name in list(vars(p)):  # all of them DeepSpeed's
            delattr(p, name)
        if master is not None:
            p.data = master


class Pieces:
    """A base's blocks under ZeRO-3 without an optimiser."""

    def __init__(self, config: Mapping[str, Any], accelerator: str) -> None:
        self._library = library(accelerator)
        zero = {k: v for k, v in config["zero_optimization"].items() if k == "offload_param" or "stage3" in k}
        zero |= {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": PERSISTENT}
        self._config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        self._root: Any = None

    def take(self, block: nn.Module, fill: Callable[[], None]) -> None:
        """Cuts up one block, of which the first process has the weights after fill(). Collective."""
        processes.by_first(fill)
        dtype = next(block.parameters()).dtype
        self._library.zero.Init(module=block, config_dict_or_path=self._config, dtype=dtype)

    def hold(self, blocks: Sequence[nn.Module]) -> None:
        """All blocks have been taken: from here on they come together when they run."""
        root = _Root(blocks)
        engine, *_ = self._library.initialize(model=root, config=self._config)
        self._root = engine.module

    def run(self, work: Callable[[], T]) -> T:
        """work(), which runs some of the blocks, in order. Every process must call it equally often."""
        found: list[T] = []
        self._root(lambda: found.append(work()))
        return found[0]

    whole = staticmethod(whole)


class _Root(nn.Module):
    """What DeepSpeed takes for the model: its forward is whatever runs the blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, work: Callable[[], Any]) -> tuple[()]:
        work()
        return ()  # DeepSpeed would look for tensors in what it is given
