"""Head-only checkpoints, one format for every strategy: safetensors and JSON.

checkpoints/step-00000100/ holds, per head (and for the base's adapter), <name>.safetensors with `weight.<parameter>`,
`exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, and state.json; COMPLETE.json seals it with sizes and
sha256. The file `last` names the newest complete one. Order and randomness are functions of the step number,
so the step is all the position there is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftsmith import artifacts, faults, room
from draftsmith.errors import DataError, TooNew
from draftsmith.training.settings import MOMENTS, STEP

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
    """Publishes step `step`, then rotates."""
    target = folder / f"step-{step:08d}"
    room.still(folder)
    with artifacts.publish(target, manifest=SEAL, kind="checkpoint", step=step) as temporary:
        for name, (tensors, _) in found.items():
            artifacts.write_tensors(temporary / f"{name}.safetensors", tensors)
        updates = {name: updates for name, (_, updates) in found.items()}
        state = {"step": step, "updates": updates, "ties": dict(ties), "tracked": dict(tracked or {})}
        artifacts.write_json(temporary / "state.json", state)
    faults.point("save.published")
    rotate(folder, step, keep)
    return target


def rotate(folder: Path, step: int, keep: int) -> None:
    """Moves `last` to this step, then deletes all but the newest `keep`: once more where a process was killed before it
    had done so."""
    name = f"step-{step:08d}"
    artifacts.write_json(folder / "last", {"checkpoint": name})
    faults.point("save.pointed")
    done = [n for n in _complete(folder) if n <= name]  # a later one is damaged, or it had resumed
    for old in done[:-keep]:
        artifacts.remove(folder / old)


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
    """The newest checkpoint that is whole, and a warning that tells each newer one that is not, and what that costs."""
    skipped: list[str] = []
    found = None
    newest = max(map(_step, _complete(folder)), default=0)
    for name in reversed(_complete(folder)):
        try:
            found = load(folder / name)
            break
        except TooNew:
            raise
        except DataError as e:
            skipped.append(f"checkpoint skipped: {e}")
    if skipped:
        lost = newest - (found.step if found else 0)
        whence = f"after step {found.step}" if found else "at the beginning"
        skipped[-1] += f"; {lost} steps are lost: training goes on {whence}"
    return found, skipped


def load(path: Path) -> Checkpoint:
    artifacts.verify(path, manifest=SEAL)
    state = artifacts.read_object(path / "state.json")
    kinds = {"step": int, "updates": dict, "ties": dict, "tracked": dict}
    state.setdefault("tracked", {})
    updates = state.get("updates")
    if not all(type(state.get(key)) is kind for key, kind in kinds.items()) or not all(
        type(count) is int and Path(name).name == name
        for name, count in updates.items()  # type: ignore[union-attr]
    ):
        raise DataError(f"{path / 'state.json'}: tells no step, updates and ties; it is damaged")
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in state["updates"]}
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path}: not safetensors ({e})") from None
    return Checkpoint(state["step"], state["ties"], tensors, state["updates"], state["tracked"])


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


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _complete(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob(STEP) if artifacts.is_complete(p, manifest=SEAL))
