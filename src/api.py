"""The public Python API: load_base, load_head, generate; load_published, save_head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.base import lm
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Head
from draftsmith.decoding.engine import Generation
from draftsmith.decoding.engine import generate as decode
from draftsmith.decoding.tree import TreeConfig
from draftsmith.errors import ConfigError
from draftsmith.exporters import native, reference
from draftsmith.roles import Drafter

if TYPE_CHECKING:
    from torch import Tensor


def load_base(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    adapter: str | Path | None = None,
) -> BaseLM:
    """A frozen base from a folder or hub id that transformers loads (safetensors only, no remote code); adapter: the
    folder of a LoRA adapter that was trained with a head."""
    return lm.load(
        str(path), revision=revision, dtype=dtype, device=device, adapter=None if adapter is None else str(adapter)
    )


def load_head(path: str | Path, *, base: BaseLM) -> Head:
    """A head from its native folder (run_dir/heads/<name>), checked against its manifest and this base.

    Raises DataError where the folder is incomplete or altered, or the head belongs to another base.
    """
    return native.load(path, base.spec, device=base.device)


def load_published(path: str | Path, kind: str, *, base: BaseLM, **settings: Any) -> Head:
    """A head from weights in the key layout its authors publish, as safetensors; `kind` is a yaml of conf/head, whose
    settings hold where none are given. DataError names every key that is missing, left over or of another shape."""
    cfg = config.compose("train", [f"head=[{kind}]"])
    if kind not in cfg.heads:
        raise ConfigError(f"kind='{kind}': no such head")
    cls = config.target(cfg.heads[kind], kind)
    own = config.typed({**cast(dict, OmegaConf.to_container(cfg.heads[kind])), **settings}, cls.Config, kind)
    return reference.load(path, cls, own, base.spec).to(base.device)


def save_head(folder: str | Path, head: Head, *, name: str) -> Path:
    """Writes the native folder that load_head and `draftsmith evaluate load=[…]` read."""
    return native.save(Path(folder), head, name=name)


def generate(
    base: BaseLM,
    input_ids: Sequence[int] | Tensor,
    *,
    head: Head | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    depth: int | None = None,
    paths: list[list[int]] | None = None,
) -> Generation:
    """Continues one prompt; with a head, faster and with the same tokens.

    input_ids: ids as a list, or a tensor of shape [T] or [1, T]. depth: a shorter chain than the head's;
    paths: a static tree of rank paths. Without a head: plain autoregressive decoding by the same engine.
    Returns .tokens (new ids, end-of-text kept), .tokens_per_step, .accepted_drafts_per_step, .steps.
    `seed` is for sampling, which is not built yet: ConfigError for a temperature other than 0.
    """
    if temperature != 0:
        raise ConfigError(f"temperature={temperature}: only greedy decoding (0) is built so far")
    if head is not None and head.role != "drafter":
        raise ConfigError(f"head: a {head.role} does not draft; give a drafter")
    prompt = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if prompt and isinstance(prompt[0], list):
        if len(prompt) != 1:
            raise ConfigError(f"input_ids: {len(prompt)} rows; one prompt at a time")
        prompt = prompt[0]
    if not all(type(i) is int for i in prompt):
        raise ConfigError("input_ids: give token ids, e.g. base.tokenizer(text)['input_ids']")
    drafter = cast(Drafter, head) if head is not None else None
    shape = TreeConfig(depth, paths).shape(drafter.max_depth) if drafter else None
    return decode(base, prompt, drafter=drafter, shape=shape, max_new_tokens=max_new_tokens, eos_ids=base.eos_ids)
