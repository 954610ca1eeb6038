"""How many processes train, and what their engine does to a loss. The only file that knows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from draftsmith.training.settings import StrategyConfig, TrainerConfig

if TYPE_CHECKING:
    import lightning as L

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def arguments(strategy: StrategyConfig, trainer: TrainerConfig) -> dict[str, Any]:
    """Lightning's Trainer arguments for this strategy."""
    distributed = strategy.name == "ddp" or trainer.devices * trainer.num_nodes > 1
    return {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "precision": PRECISION[trainer.precision],
        "strategy": "ddp" if distributed else "auto",
        "accumulate_grad_batches": trainer.accumulate,
    }


def undo(trainer: L.Trainer) -> int:
    """What to multiply a loss by whose normaliser is already global: Lightning divides it by the number of
    micro-batches, DDP averages gradients over processes."""
    return trainer.accumulate_grad_batches * trainer.world_size


def is_first_process() -> bool:
    """Whether this process speaks and writes for all, before and after a trainer exists."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
