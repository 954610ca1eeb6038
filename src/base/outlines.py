"""A base without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.base.families import paths_of
from draftsmith.base.loading import outline_of
from draftsmith.base.spec import eos_ids_of, spec_of
from draftsmith.contracts import BaseSpec


@dataclass(frozen=True)
class Outline:
    """A base without its weights: what encoding chats and talking to a server that holds it need."""

    spec: BaseSpec
    tokenizer: Any
    eos_ids: frozenset[int]


def outline(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Outline:
    """The base's sizes, fingerprints, tokenizer and end tokens, equal to those of `load`; no weight is read."""
    model, tokenizer = outline_of(path, revision, trust_remote_code)
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    spec = spec_of(model, paths_of(model.config), tokenizer, path, revision)
    return Outline(spec, tokenizer, eos_ids_of(model, tokenizer))
