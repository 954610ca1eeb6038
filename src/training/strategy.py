"""How many processes train, and what their engine does to a loss, a gradient and the tensors of a part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.errors import ConfigError
from draftsmith.training.engine_config import merged
from draftsmith.training.processes import place
from draftsmith.training.settings import MOMENTS, Settings

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor, nn

    from draftsmith.training.zero import Pieces

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}


def engine_config(settings: Settings, batch_size: int, parts: Iterable[str]) -> dict[str, Any]:
    """DeepSpeed's configuration for this run, {} without DeepSpeed. parts: what is trained. ConfigError with every
    clash between it and our own keys."""
    strategy, trainer, optimizer = settings.strategy, settings.trainer, settings.optimizer
    if not strategy.zero:
        return {}
    several = sorted(parts)
    clips = {name: optimizer.of(name, "clip") for name in several}
    if len(several) > 1 and optimizer.clip_scope == "head" and any(clip is not None for clip in clips.values()):
        raise ConfigError(
            f"optimizer.clip: ZeRO clips {', '.join(several)} by one norm of them all; say optimizer.clip_scope=global,"
            " or optimizer.clip=null"
        )
    given, where = _given(settings)
    zero = given.get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero:
        raise ConfigError(f"{where}: has no zero_optimization.stage; strategy={strategy.name} asks for {strategy.zero}")
    clip = optimizer.clip if optimizer.clip_scope == "global" else clips[several[0]] if len(several) == 1 else None
    only = several[0] if len(several) == 1 else ""
    config = merged(
        given,
        {
            "train_micro_batch_size_per_gpu": ("data.batch_size", batch_size),
            "gradient_accumulation_steps": ("trainer.accumulate", trainer.accumulate),
            "train_batch_size": (
                "data.batch_size x trainer.accumulate x processes",
                batch_size * trainer.accumulate * settings.world,
            ),
            "gradient_clipping": ("optimizer.clip", clip or 0.0),
            "zero_optimization.stage": (f"strategy={strategy.name}", strategy.zero),
            "bf16.enabled": ("trainer.precision", trainer.precision == "bf16"),
            "fp16.enabled": ("trainer.precision", False),
            "optimizer.params.lr": ("optimizer.lr", optimizer.of(only, "lr")),
            "optimizer.params.betas": ("optimizer.betas", optimizer.betas),
            "optimizer.params.eps": ("optimizer.eps", optimizer.eps),
            "optimizer.params.weight_decay": ("optimizer.weight_decay", optimizer.of(only, "weight_decay")),
        },
        where,
    )
    # Offloaded moments are updated by torch's own fused AdamW, as everywhere, not by an operator to be compiled.
    own = {"gradient_clipping": clip or 0.0, "train_micro_batch_size_per_gpu": batch_size}
    return {"zero_force_ds_cpu_optimizer": False, **config, **own} if "offload_optimizer" in zero else config | own


def _given(settings: Settings) -> tuple[dict[str, Any], str]:
    """The configuration as it was given, and what to call it."""
    path = settings.strategy.config
    if path is None:
        return settings.strategy.deepspeed or {}, "strategy.deepspeed"
    where = f"strategy.config={path}"
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{where}: cannot be read as JSON: {e}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: holds no JSON object")
    return found, where


def arguments(settings: Settings, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's Trainer arguments. engine: what `engine_config` gave."""
    trainer, strategy = settings.trainer, settings.strategy
    precision = PRECISION[trainer.precision]
    chosen: Any = "auto"
    plugins: list[Any] = []
    if strategy.zero:
        from draftsmith.training.zero import ZeroStrategy, library

        library(trainer.accelerator)
        chosen = ZeroStrategy(config=dict(engine))
        precision = "32-true"  # the module computes under autocast itself: DeepSpeed's bf16 would cast the weights
    elif strategy.name == "ddp" or settings.world > 1:
        chosen = "ddp"
    if place().world > 1:
        from lightning.pytorch.plugins.environments import TorchElasticEnvironment

        plugins = [TorchElasticEnvironment()]
    return {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "precision": precision,
        "strategy": chosen,
        "plugins": plugins,
        "accumulate_grad_batches": trainer.accumulate,
    }


def is_zero(trainer: L.Trainer) -> bool:
    """Whether DeepSpeed's engine trains."""
    return hasattr(trainer.strategy, "deepspeed_engine")


def undo(trainer: L.Trainer) -> int:
    """What to multiply a loss by whose normaliser is already global: Lightning divides it by the number of
    micro-batches, DeepSpeed does so once more; both average gradients over processes."""
    micro_batches = trainer.accumulate_grad_batches
    return micro_batches * trainer.world_size * (micro_batches if is_zero(trainer) else 1)


def pieces(settings: Settings, engine: Mapping[str, Any]) -> Pieces | None:
    """Where the base's blocks go if no process is to hold them all."""
    if not settings.strategy.in_pieces:
        return None
    from draftsmith.training.zero import Pieces

    return Pieces(engine, settings.trainer.accelerator)


def tensors(trainer: L.Trainer, part: nn.Module) -> tuple[dict[str, Tensor], int]:
    """(`weight.<parameter>`, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`: fp32 copies on the CPU; the number of
    updates that made the moments). Collective; {} but on the first process."""
    optimizer: Any = trainer.optimizers[0]
    found: dict[str, Tensor] = {}
    updates = 0
    if is_zero(trainer):
        from draftsmith.training import zero

        zero.link(optimizer)
    for name, p in part.named_parameters():
        if is_zero(trainer):
            weight, (moments, updates) = zero.weight(p), zero.moments(optimizer, p)
        else:
            state = optimizer.state.get(p, {})
            weight, moments = p.detach(), {m: state[m] for m in MOMENTS if m in state}
            updates = max(updates, int(state["step"]) if moments else 0)
        if trainer.is_global_zero:
            named = {f"weight.{name}": weight, **{f"{m}.{name}": t for m, t in moments.items()}}
            found |= {key: t.detach().to("cpu", copy=True).contiguous() for key, t in named.items()}
    return found, updates


def put_moments(trainer: L.Trainer, found: Mapping[nn.Parameter, Mapping[str, Tensor]], updates: int) -> None:
    """Gives the optimiser what `tensors` took from it."""
    import torch

    optimizer: Any = trainer.optimizers[0]
    if is_zero(trainer):
        from draftsmith.training import zero

        return zero.put_moments(optimizer, found, updates)
    for p, moments in found.items():
        step = torch.tensor(float(updates), device=p.device)
        optimizer.state[p] = {"step": step, **{m: t.to(p.device) for m, t in moments.items()}}


def whole(trainer: L.Trainer, parts: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """The parts' weights put together, to compute with them outside a training step. Collective."""
    if not is_zero(trainer):
        return contextlib.nullcontext()
    from draftsmith.training import zero

    return zero.whole([p for part in parts for p in part.parameters()])


def release(trainer: L.Trainer, parts: Iterable[nn.Module]) -> None:
    """After training: the parts are plain modules again. Collective."""
    if is_zero(trainer):
        from draftsmith.training import zero

        zero.release(trainer.strategy.deepspeed_engine, parts)  # type: ignore[attr-defined]
