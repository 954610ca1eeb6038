"""Head-only checkpoints, one format for every strategy: safetensors and JSON.

checkpoints/step-00000100/ holds, per head (and for the base's adapter), <name>.safetensors with `weight.<parameter>`,
`exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, and state.json; COMPLETE.json seals it with sizes and
sha256. The file `last` names the newest complete one. Order and randomness are functions of the step number,
so the step is all the position there is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftsmith import artifacts
from draftsmith.errors import DataError

SEAL = "COMPLETE.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Checkpoint:
    """One loaded checkpoint. tensors: head -> the file's tensors; updates: head -> optimiser updates made;
    ties: fingerprints of what the run trains on."""

    step: int
    ties: dict[str, str]
    tensors: dict[str, dict[str, torch.Tensor]]
    updates: dict[str, int]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    ties: Mapping[str, str],
) -> Path:
    """Publishes step `step`, moves `last`, then deletes all but the newest `keep`."""
    target = folder / f"step-{step:08d}"
    updates: dict[str, int] = {}
    with artifacts.publish(target, manifest=SEAL, kind="checkpoint", step=step) as temporary:
        for name, part in parts.items():
            tensors, updates[name] = _tensors(part, optimizer)
            artifacts.write_tensors(temporary / f"{name}.safetensors", tensors)
        artifacts.write_json(temporary / "state.json", {"step": step, "updates": updates, "ties": dict(ties)})
    artifacts.write_json(folder / "last", {"checkpoint": target.name})
    done = [name for name in _complete(folder) if name <= target.name]  # a later one is damaged, or it had resumed
    for old in done[:-keep]:
        shutil.rmtree(folder / old)
    return target


def load_last(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a warning per newer one that is not."""
    warnings: list[str] = []
    for name in reversed(_complete(folder)):
        try:
            return load(folder / name), warnings
        except DataError as e:
            warnings.append(f"checkpoint skipped: {e}")
    return None, warnings


def load(path: Path) -> Checkpoint:
    artifacts.verify(path, manifest=SEAL)
    state = artifacts.read_json(path / "state.json")
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in state["updates"]}
    except SafetensorError as e:
        raise DataError(f"{path}: not safetensors ({e})") from None
    return Checkpoint(state["step"], state["ties"], tensors, state["updates"])


def restore(checkpoint: Checkpoint, parts: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and moments back, in place and bit for bit."""
    if set(checkpoint.tensors) != set(parts):
        raise DataError(
            f"checkpoint of step {checkpoint.step}: holds heads {sorted(checkpoint.tensors)}, the run trains"
            f" {sorted(parts)}; use another run_dir"
        )
    for name, part in parts.items():
        tensors = checkpoint.tensors[name]
        for parameter_name, p in part.named_parameters():
            with torch.no_grad():
                p.copy_(_expect(tensors, f"weight.{parameter_name}", p, name))
            if checkpoint.updates[name]:
                optimizer.state[p] = {
                    "step": torch.tensor(float(checkpoint.updates[name]), device=p.device),
                    **{m: _expect(tensors, f"{m}.{parameter_name}", p, name).clone() for m in MOMENTS},
                }


def _tensors(part: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], int]:
    tensors: dict[str, torch.Tensor] = {}
    updates = 0
    for name, p in part.named_parameters():
        tensors[f"weight.{name}"] = p.detach().contiguous()
        state: dict[str, Any] = optimizer.state.get(p, {})
        if state:
            updates = int(state["step"])
            tensors |= {f"{m}.{name}": state[m].contiguous() for m in MOMENTS}
    return tensors, updates


def _expect(tensors: dict[str, torch.Tensor], key: str, p: torch.Tensor, head: str) -> torch.Tensor:
    if key not in tensors or tensors[key].shape != p.shape:
        have = tuple(tensors[key].shape) if key in tensors else "nothing"
        raise DataError(f"checkpoint: {head}.{key} is {have}, the head needs {tuple(p.shape)}; use another run_dir")
    return tensors[key].to(p.device)


def _complete(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*") if artifacts.is_complete(p, manifest=SEAL))
