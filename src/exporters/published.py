"""Weights as somebody published them: what lies in a folder or file, and the config.json beside it.

Only safetensors are read, whole or in shards. A .pt or .bin is a pickle, which can run any program when it is read: it
stays unread, and whoever trusts it is told how to convert it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith import artifacts
from draftsmith.errors import DataError

INDEX = "model.safetensors.index.json"
BY_METHOD = tuple(f"{method}_lm_head{end}" for end in (".safetensors", ".pt") for method in ("medusa", "hydra"))
"""Goes first: such a folder may hold a whole model as well."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class Weights(Mapping[str, Tensor]):
    """Named tensors of safetensors files, read when they are asked for; `shapes` without reading. `rename` gives them
    other names, `add` adds some that the files leave out."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self._made, self._where = path, {}, {}  # type: ignore[var-annotated]
        for file in files:
            try:
                opened = safe_open(file, "pt")
                self._where |= {name: (opened, name) for name in opened.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as e:
                raise DataError(f"{file}: {' '.join(str(e).split())}") from None
        self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name, (opened, _) in self._where.items()}

    def rename(self, *rules: tuple[str, str]) -> None:
        """By (pattern of the whole name, what it becomes): the first that matches counts; others stay."""
        new = {name: _changed(name, rules) for name in self.shapes}
        if len(set(new.values())) < len(new):
            twice = next(to for to, times in Counter(new.values()).items() if times > 1)
            raise DataError(f"{self.path}: {' and '.join(n for n in new if new[n] == twice)} are names of one tensor")
        self.shapes = {new[name]: shape for name, shape in self.shapes.items()}
        self._where = {new[name]: place for name, place in self._where.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        self._made[name], self.shapes[name] = tensor, tuple(tensor.shape)

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers that the names hold there, ascending."""
        return sorted({int(found[1]) for name in self.shapes if (found := re.match(pattern, name))})

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]
        opened, own = self._where[name]
        return opened.get_tensor(own)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _changed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    return next((found.expand(new) for old, new in rules if (found := re.fullmatch(old, name))), name)


@dataclass
class Published:
    """weights, and what the config.json beside them says; {} where there is none."""

    weights: Weights
    config: dict[str, Any]
    file: Path  # the config.json


def read(path: Path | str) -> Published:
    """A folder or file of published weights; DataError where there are none, or only a pickle, which stays unread."""
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; what lies on a hub has to be fetched first, as by"
            f" `hf download ORGANISATION/NAME --local-dir {path.name}`"
        )
    files = _files(path) if path.is_dir() else [path]
    for file in files:
        if path.is_dir() and (elsewhere := artifacts.outside(path, file)):
            raise DataError(f"{file}: is a link to {elsewhere}, outside its folder; put the file itself there")
        if file.suffix in PICKLES:
            raise DataError(
                f"{file}: is a pickle, which can run any program when it is read, so it stays unread; if you trust it,"
                f" convert it: {conversion(file)}"
            )
        if file.suffix != ".safetensors":
            raise DataError(f"{file}: not safetensors; give the file of the weights, or its folder")
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = artifacts.read_json(beside) if beside.is_file() else {}
    if not isinstance(config, dict):
        raise DataError(f"{beside}: does not describe a head")
    if config.get("format") == "draftsmith-head":
        raise DataError(f"{path}: is one of our own folders already; load_head and load=[…] take it as it is")
    return Published(Weights(files[0] if len(files) == 1 else path, files), config, beside)


def conversion(file: Path) -> str:
    """The command that makes safetensors of a pickle. (Clones: published blocks are one module under several names.)"""
    pickled, safe = (json.dumps(str(path), ensure_ascii=False) for path in (file, file.with_suffix(".safetensors")))
    code = (
        "import torch; from safetensors.torch import save_file;"
        f' t = torch.load({pickled}, map_location="cpu", weights_only=True);'
        f" save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {safe})"
    )
    return f"python -c {shlex.quote(code)}"


def _files(folder: Path) -> list[Path]:
    for name in BY_METHOD:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / INDEX).is_file():
        index = artifacts.read_json(folder / INDEX)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        shards = list(listed.values()) if isinstance(listed, dict) else []
        if not shards or any(not isinstance(name, str) or Path(name).name != name for name in shards):
            raise DataError(f"{folder / INDEX}: does not list files of this folder")
        return [folder / name for name in sorted(set(shards))]
    found = sorted(folder.glob("*.safetensors"))
    if folder / "model.safetensors" in found:
        return [folder / "model.safetensors"]
    found = found or sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if len(found) != 1:
        what = f"holds {', '.join(p.name for p in found)}" if found else "holds no *.safetensors"
        raise DataError(f"{folder}: {what}; name the file of the weights itself")
    return found
