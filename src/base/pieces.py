"""A base that no process holds whole: each keeps a part of every block, and a block is put together while it runs.

The blocks are read one by one, straight from the checkpoint's safetensors files, and cut up before the next one is
read, so that a process never has more than its part and one block. Embedding, final norm and lm_head stay whole.
Who cuts and puts together is passed in (`Cutter`); every process must run the base equally often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from draftsmith.base.families import part, paths_of
from draftsmith.base.lm import BaseLM
from draftsmith.base.loading import DTYPES, INDEX, found, outline_of, refuse_files
from draftsmith.base.spec import weights_sha256
from draftsmith.contracts import Capture
from draftsmith.errors import ConfigError, DataError

T = TypeVar("T")

SINGLE = "model.safetensors"


class Cutter(Protocol):
    """Who keeps the blocks in pieces (training/zero.py)."""

    def take(self, block: nn.Module, fill: Callable[[], None]) -> None:
        """Cuts up one block; fill() reads its weights, and is called by one process at least."""
        ...

    def hold(self, blocks: Sequence[nn.Module]) -> None:
        """All blocks have been taken."""
        ...

    def run(self, work: Callable[[], T]) -> T:
        """work(), which runs some of the blocks, in order."""
        ...

    def whole(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """These parameters put together."""
        ...


class PiecewiseLM(BaseLM):
    """`BaseLM` whose blocks are in pieces. It captures, passes gradients and takes an adapter like any other; it
    answers no prompts."""

    def __init__(self, model: Any, tokenizer: Any, path: str, revision: str | None, cutter: Cutter) -> None:
        super().__init__(model, tokenizer, path, revision)
        self.cutter = cutter
        cutter.hold(self._layers)

    def run_layers(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.cutter.run(lambda: BaseLM.run_layers(self, *args, **kwargs))

    def _capture(self, *args: Any, **kwargs: Any) -> Capture:
        return self.cutter.run(lambda: BaseLM._capture(self, *args, **kwargs))

    def block_weights(self, layer: int) -> dict[str, Tensor]:
        with self.cutter.whole(self._layers[layer].parameters()):
            return {name: t.detach().clone() for name, t in super().block_weights(layer).items()}

    def weights_sha256(self) -> str:
        """The same as of the whole base; one weight is put together at a time. Collective."""

        def whole(t: Tensor) -> AbstractContextManager[None]:
            return self.cutter.whole([t] if isinstance(t, nn.Parameter) else [])

        return weights_sha256(self.model, self.paths.rotary, whole)

    def compile(self) -> BaseLM:
        raise ConfigError("base.compile: not with strategy=zero3, which puts blocks together as they run")

    def in_float64(self) -> BaseLM:
        raise ConfigError("base: in pieces under strategy=zero3; evaluate it with a whole one")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError("base: in pieces under strategy=zero3; make the rows first, with draftsmith distill")

    answer = generate


def load(
    path: str,
    cutter: Cutter,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    adapter: str | None = None,
) -> PiecewiseLM:
    """As `lm.load`, in pieces. DataError where the checkpoint lacks a weight, names it otherwise than the model, or
    is of a family with tables that are no weights."""
    if dtype not in DTYPES:
        raise ConfigError(f"base.dtype: '{dtype}' is none of {', '.join(DTYPES)}")
    model, tokenizer = outline_of(path, revision, trust_remote_code)
    paths = paths_of(model.config)
    model.set_attn_implementation(paths.attention)
    model.to(DTYPES[dtype]).requires_grad_(False)
    stored = Stored(path, revision)
    layers = part(model, paths.layers)
    for number, block in enumerate(layers):
        prefix = f"{paths.layers}.{number}."
        _refuse_tables(block, prefix, path)
        block.to_empty(device=device)
        cutter.take(block, lambda block=block, prefix=prefix: stored.fill(block, prefix))  # type: ignore[misc]
    inside = {id(p) for p in layers.parameters()}
    _fill_the_rest(model, paths, stored, inside, torch.device(device))
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    base = PiecewiseLM(model, tokenizer, path, revision, cutter)
    if adapter:
        base.add_adapter(Path(adapter))
    return base


def _fill_the_rest(model: nn.Module, paths: Any, stored: Stored, inside: set[int], device: torch.device) -> None:
    """Everything outside the blocks, whole on every process."""
    if paths.rotary:  # its tables follow from the configuration
        name, _, attribute = paths.rotary.rpartition(".")
        fresh = type(part(model, paths.rotary))(config=model.config).to(device)
        setattr(part(model, name) if name else model, attribute, fresh)
    for prefix, module in model.named_modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_meta and id(p) not in inside:
                key = f"{prefix}.{name}" if prefix else name
                tied = key not in stored and key.startswith(paths.head + ".")
                if not tied:  # else tie_weights puts the embedding there
                    module._parameters[name] = nn.Parameter(stored.read(key, p).to(device), requires_grad=False)
    model.tie_weights()  # type: ignore[operator]
    lacking = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if lacking:
        names = ", ".join(lacking[:5])
        raise DataError(f"base: {stored.path}: its files hold no {names}, and zero3 cannot make it; use strategy=zero2")


def _refuse_tables(block: nn.Module, prefix: str, path: str) -> None:
    tables = [prefix + n for n, _ in block.named_buffers()]
    if tables:
        raise DataError(f"base: {path} has tables that are no weights ({tables[0]}); zero3 cannot cut it up, use zero2")


class Stored:
    """The tensors of a checkpoint by name, read from its safetensors files when they are asked for."""

    def __init__(self, path: str, revision: str | None) -> None:
        self.path = path
        refuse_files(path, revision)
        index = found(path, INDEX, revision)
        if index is not None:
            self.files = json.loads(Path(index).read_text())["weight_map"]
            files = {name: found(path, name, revision) for name in sorted(set(self.files.values()))}
        else:
            files = {SINGLE: found(path, SINGLE, revision)}
        missing = [name for name, file in files.items() if file is None]
        if missing:
            raise DataError(f"base: {path} has no {missing[0]}; zero3 reads safetensors only")
        self._open = {name: _opened(str(file)) for name, file in files.items()}
        if index is None:
            self.files = dict.fromkeys(self._open[SINGLE].keys(), SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor in the dtype of `like`; DataError if it is not there or of another shape."""
        if name not in self.files:
            raise DataError(f"base: {self.path} lacks the weight {name} that its config.json asks for")
        tensor = self._open[self.files[name]].get_tensor(name)
        if tensor.shape != like.shape:
            raise DataError(
                f"base: {self.path} has {name} of shape {tuple(tensor.shape)}, its config.json asks for"
                f" {tuple(like.shape)}"
            )
        return tensor.to(like.dtype)

    def fill(self, block: nn.Module, prefix: str) -> None:
        with torch.no_grad():
            for name, p in block.named_parameters():
                p.copy_(self.read(prefix + name, p))


def _opened(file: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise DataError(f"base: {file}: not safetensors ({e})") from None
