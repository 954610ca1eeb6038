"""The public Python API: load_base, load_head, generate; load_companion, load_published, save_head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from draftsmith import config, prepare
from draftsmith.base import lm
from draftsmith.base.lm import BaseLM
from draftsmith.beside import DEPTH, Beside
from draftsmith.contracts import Head
from draftsmith.data.labels import check_pair
from draftsmith.decoding.engine import Generation
from draftsmith.decoding.engine import generate as decode
from draftsmith.decoding.tree import TreeConfig
from draftsmith.errors import ConfigError
from draftsmith.exporters import native, reference
from draftsmith.heads.acceptance import Acceptance
from draftsmith.heads.draft_model import DraftModel
from draftsmith.roles import Drafter, Primer

if TYPE_CHECKING:
    from torch import Tensor

DRAFTS = 4  # tokens that a draft model drafts in a step where nobody says


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
    """A head from its native folder (run_dir/heads/<name>), checked against its manifest and this base. A gate comes
    with the drafter that its folder names.

    Raises DataError where the folder is incomplete or altered, or the head belongs to another base.
    """
    return Beside(base, None, None).load(path)


def load_companion(path: str | Path, *, base: BaseLM, dtype: str = "float32") -> BaseLM:
    """A second, smaller language model to draft with (`generate(…, draft=)`), on the base's device; DataError where it
    has another tokenizer."""
    companion = Beside(base, prepare.BaseConfig(path=str(path), dtype=dtype), None).companion
    assert companion is not None
    return companion


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
    draft: BaseLM | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    depth: int | None = None,
    paths: list[list[int]] | None = None,
) -> Generation:
    """Continues one prompt; with a head, faster.

    input_ids: ids as a list, or a tensor of shape [T] or [1, T]. head: a drafter; or a gate, which drafts with the
    drafter it was trained for; or a primer, which is lossy: the text may be another one. draft: a companion as the
    draft model. Without either: plain autoregressive decoding by the same engine. depth: a shorter chain than the
    head's; paths: a static tree of rank paths.

    temperature 0 is greedy; above it the text is drawn from the base's own distribution, the same for the same seed
    with every head that drafts, while a draft model draws another text of the same distribution.
    Returns .tokens (new ids, end-of-text kept), .tokens_per_step, .accepted_drafts_per_step, .steps.
    """
    prompt = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if prompt and isinstance(prompt[0], list):
        if len(prompt) != 1:
            raise ConfigError(f"input_ids: {len(prompt)} rows; one prompt at a time")
        prompt = prompt[0]
    if not all(type(i) is int for i in prompt):
        raise ConfigError("input_ids: give token ids, e.g. base.tokenizer(text)['input_ids']")
    given = _company(base, head, draft)
    shape = TreeConfig(depth, paths).shape(given.pop("deepest")) if given["drafter"] else None
    return decode(
        base,
        prompt,
        shape=shape,
        max_new_tokens=max_new_tokens,
        eos_ids=base.eos_ids,
        temperature=temperature,
        seed=seed,
        **given,
    )


def _company(base: BaseLM, head: Head | None, draft: BaseLM | None) -> dict[str, Any]:
    """Who plays which role in the engine; where somebody drafts, `deepest` says how far that goes."""
    if head is not None and draft is not None:
        raise ConfigError("head, draft: give one of them")
    if draft is not None:
        check_pair(base.spec, draft.spec)
        return {"drafter": DraftModel(draft, DEPTH), "deepest": DRAFTS}
    if isinstance(head, Acceptance):
        if head.beside is None:
            raise ConfigError("head: a gate without the drafter it was trained for; load it with load_head")
        drafter: Drafter = head.beside
        return {"drafter": drafter, "gate": head.gate(), "deepest": min(drafter.max_depth, head.config.max_depth)}
    if head is None or head.role == "primer":
        return {"drafter": None, "primer": cast("Primer | None", head)}
    drafter = cast(Drafter, head)
    return {"drafter": drafter, "deepest": drafter.max_depth}
