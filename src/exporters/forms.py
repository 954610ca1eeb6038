"""A head in a runtime's own form: written as that runtime reads it, read back, and started by a command.

What is wrong with such a folder shows nowhere: the server starts, its text is right, and fewer drafts are accepted.
So it is published only after its files were opened again, their tensors put back under our names, and the head that
they make gave the answers of the one that was meant (capsule.py).
"""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from draftsmith import artifacts
from draftsmith.contracts import BaseView, Head
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.exporters import capsule, native
from draftsmith.exporters.card import FILE, card


class Form(ABC):
    """How one runtime reads one kind of head. weights: the file of its tensors."""

    weights: str = "model.safetensors"

    @abstractmethod
    def names(self, head: Any) -> dict[str, str]:
        """Our tensor -> theirs, of every one that the folder holds."""

    @abstractmethod
    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        """config.json: exactly these keys. dtype: of the tensors."""

    @abstractmethod
    def start(self, folder: Path, head: Any, base: Any) -> str:
        """The command that serves it."""

    def refusal(self, head: Any, base: Any) -> str | None:
        """What of this head the form cannot say."""
        return None

    def copies(self, head: Any, base: BaseView) -> dict[str, Tensor]:
        """Theirs -> a tensor of the base's that this runtime wants from the head's files."""
        return {}

    def implied(self, head: Any) -> dict[str, Tensor]:
        """Ours that the folder does not hold, with the value that its reader takes for granted."""
        return {}

    def others(self, folder: Path, head: Any) -> dict[str, Any]:
        """Further JSON files by name. folder: where they will lie."""
        return {}

    def save(self, folder: Path, head: Head, base: BaseView, dtype: str | None, *, name: str, runtime: str) -> Path:
        """Publishes the folder whole and read back, or nothing."""
        meant = in_dtype(head, dtype)
        golden, state = capsule.record(meant, base), meant.state_dict()
        floats = next(t.dtype for t in state.values() if t.is_floating_point())
        tensors = {theirs: state[ours] for ours, theirs in self.names(meant).items()}
        tensors |= {k: t.detach().to("cpu", floats).clone().contiguous() for k, t in self.copies(meant, base).items()}
        described = self.describe(meant, base, str(floats).removeprefix("torch."))
        files = {"config.json": described, **self.others(folder, meant)}
        with artifacts.publish(folder, kind=f"export {runtime} {type(head).__name__.lower()}") as temporary:
            artifacts.write_tensors(temporary / self.weights, tensors)
            for file, content in files.items():
                artifacts.write_json(temporary / file, content)
            native.save_adapter(temporary, base.adapter)
            parameters = sum(t.numel() for t in state.values())
            served = self.start(Path("this-folder"), meant, base)
            (temporary / FILE).write_text(card(native.describe(meant, name), parameters, served=served))
            back = reopened(temporary / self.weights, tensors)
            for file, content in files.items():
                if artifacts.read_json(temporary / file) != json.loads(json.dumps(content)):
                    raise NumericsError(f"{folder}/{file}: does not read back as it was written; check the disk")
            ours = {name: back[theirs] for name, theirs in self.names(meant).items()}
            capsule.check(same(meant, {**self.implied(meant), **ours}), base, golden, folder)
        return folder


def check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype='{dtype}': choose float32, bfloat16, float16 or null")


def in_dtype(head: Head, dtype: str | None) -> Head:
    """A copy of the head on the CPU, in this precision; None: as it is. Token ids stay integers."""
    floats = getattr(torch, dtype) if dtype else None
    tensors = {
        name: t.detach().to("cpu", floats if t.is_floating_point() else None).clone().contiguous()
        for name, t in head.state_dict().items()
    }
    return _made(head, tensors)


def same(meant: Head, tensors: Mapping[str, Tensor]) -> Head:
    """The head that these tensors make; NumericsError where it is not bit for bit the one that was meant."""
    wanted = meant.state_dict()
    wrong = [n for n, t in wanted.items() if n not in tensors or not torch.equal(tensors[n], t)]
    if wrong or tensors.keys() != wanted.keys():
        what = ", ".join([*wrong, *sorted(tensors.keys() - wanted.keys())][:3])
        raise NumericsError(f"exporter: {type(meant).__name__} does not read back equal: {what}")
    return _made(meant, tensors)


def reopened(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors; NumericsError where its keys, shapes, dtypes or header are not those that were written."""
    with safe_open(path, "pt") as file:
        back = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    told, found = ({k: (t.dtype, tuple(t.shape)) for k, t in ts.items()} for ts in (wanted, back))
    if told != found or header != {"format": "pt"} or any(not torch.equal(back[k], t) for k, t in wanted.items()):
        raise NumericsError(f"{path}: does not read back as it was written; check the disk")
    return back


def _made(head: Head, tensors: Mapping[str, Tensor]) -> Head:
    with torch.device("meta"):
        made = type(head)(head.config, head.spec)
    made.load_state_dict(dict(tensors), strict=True, assign=True)
    made.said, made.golden = head.said, head.golden
    return made.eval().requires_grad_(False)


def drafts(head: Any) -> int:
    """How long a chain a server is told to draft: as deep as draftsmith tune found best, else as the head goes."""
    tuned = head.said.get("tuned") or {}
    return max(1, min(tuned.get("depth", head.max_depth), head.max_depth))


def vllm(base: str, **told: Any) -> str:
    """vLLM's command with this speculative_config."""
    return f"vllm serve {shlex.quote(base)} --speculative-config {shlex.quote(json.dumps(told))}"
