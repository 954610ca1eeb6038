"""Head-only checkpoints, one format for every strategy: safetensors and JSON.

checkpoints/step-00000100/ holds, per head (and for the base's adapter), <name>.safetensors with `weight.<parameter>`,
`exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, and state.json; COMPLETE.json seals it with sizes and
sha256. The file `last` names the newest complete one. Order and randomness are functions of the step number,
so the step is all the position there is.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftsmith import artifacts
from draftsmith.errors import DataError
from draftsmith.training.settings import MOMENTS

SEAL = "COMPLETE.json"


@dataclass
class Checkpoint:
    """One loaded checkpoint. tensors: head -> the file's tensors, {} on all processes but the first; updates: head ->
    optimiser updates made; ties: fingerprints of what the run trains on; tracked: where a tracker keeps the run."""

    step: int
    ties: dict[str, str]
    tensors: dict[str, dict[str, torch.Tensor]]
    updates: dict[str, int]
    tracked: dict[str, str] = field(default_factory=dict)


Found = Mapping[str, tuple[Mapping[str, torch.Tensor], int]]  # head -> its tensors, and the updates made


def save(
    folder: Path,
    step: int,
    found: Found,
    *,
    keep: int,
    ties: Mapping[str, str],
    tracked: Mapping[str, str] | None = None,
) -> Path:
    """Publishes step `step`, moves `last`, then deletes all but the newest `keep`."""
    target = folder / f"step-{step:08d}"
    with artifacts.publish(target, manifest=SEAL, kind="checkpoint", step=step) as temporary:
        for name, (tensors, _) in found.items():
            artifacts.write_tensors(temporary / f"{name}.safetensors", tensors)
        updates = {name: updates for name, (_, updates) in found.items()}
        state = {"step": step, "updates": updates, "ties": dict(ties), "tracked": dict(tracked or {})}
        artifacts.write_json(temporary / "state.json", state)
    artifacts.write_json(folder / "last", {"checkpoint": target.name})
    done = [name for name in _complete(folder) if name <= target.name]  # a later one is damaged, or it had resumed
    with artifacts.disk(folder, "its rotation"):
        for old in done[:-keep]:
            shutil.rmtree(folder / old)
    return target


class Writer:
    """Saves beside the training, one checkpoint at a time: the tensors are copies already, and hashing, writing and
    syncing leave the interpreter free."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Begins work(); `finish` must have been called since the last one."""
        assert self._thread is None, "a checkpoint is being written"

        def run() -> None:
            try:
                work()
            except BaseException as e:
                self._failed = e

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Waits for what was begun, if anything was, and raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed


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
    return Checkpoint(state["step"], state["ties"], tensors, state["updates"], state.get("tracked", {}))


def check(checkpoint: Checkpoint, parts: Mapping[str, nn.Module]) -> None:
    """DataError unless the checkpoint holds these parts, with tensors of these sizes."""
    if set(checkpoint.updates) != set(parts):
        raise DataError(
            f"checkpoint of step {checkpoint.step}: holds heads {sorted(checkpoint.updates)}, the run trains"
            f" {sorted(parts)}; use another run_dir"
        )
    for name, tensors in checkpoint.tensors.items():
        kinds = ("weight", *(MOMENTS if checkpoint.updates[name] else ()))
        for parameter, p in parts[name].named_parameters():
            for key in (f"{kind}.{parameter}" for kind in kinds):
                if key not in tensors or tensors[key].shape != p.shape:
                    have = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise DataError(
                        f"checkpoint: {name}.{key} is {have}, the head needs {tuple(p.shape)}; use another run_dir"
                    )


def restore(
    checkpoint: Checkpoint, parts: Mapping[str, nn.Module], spread: Callable[[torch.Tensor], torch.Tensor]
) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """Puts the weights back, in place and bit for bit; returns the moments of every parameter, on its device. Call
    `check` first. spread: gives every process the first one's tensor."""
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for name, part in parts.items():
        stored = checkpoint.tensors.get(name, {})
        for parameter, p in part.named_parameters():
            kinds = ("weight", *(MOMENTS if checkpoint.updates[name] else ()))
            found = {}
            for kind in kinds:
                dtype = p.dtype if kind == "weight" else torch.float32
                tensor = torch.empty(p.shape, dtype=dtype, device=p.device)
                if stored:
                    tensor.copy_(stored[f"{kind}.{parameter}"])
                found[kind] = spread(tensor)
            with torch.no_grad():
                p.copy_(found.pop("weight"))
            if found:
                moments[p] = found
    return moments


def _complete(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*") if artifacts.is_complete(p, manifest=SEAL))
