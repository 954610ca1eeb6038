"""The public Python API: load_base, load_head, generate; load_companion, load_published, save_head."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from draftsmith import adopt, config, prepare
from draftsmith.base import lm
from draftsmith.base.lm import BaseLM
from draftsmith.beside import DEPTH, Beside
from draftsmith.contracts import Head
from draftsmith.data.labels import check_pair
from draftsmith.decoding.engine import decode
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.exporters import capsule, native, published
from draftsmith.heads.acceptance import Acceptance
from draftsmith.heads.draft_model import DraftModel
from draftsmith.judging import tuned_tree
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
    quantise: str | None = None,
) -> BaseLM:
    """A frozen base from a folder or hub id that transformers loads (safetensors only, no remote code); adapter: the
    folder of a LoRA adapter that was trained with a head; quantise: int8 or int4, how its blocks' weights are kept."""
    return lm.load(
        str(path),
        revision=revision,
        dtype=dtype,
        device=device,
        adapter=None if adapter is None else str(adapter),
        quantise=quantise,
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


def load_published(
    path: str | Path,
    kind: str,
    *,
    base: BaseLM,
    layer_ids: str | None = None,
    despite: Sequence[str] = (),
    **settings: Any,
) -> Head:
    """A head from weights in a key layout that its authors, or a server, publish, as safetensors. `kind` is a yaml of
    conf/head; its settings hold where none are given and the tensors, or a config.json beside them, tell none.

    layer_ids: whose convention an EAGLE-3's layer ids follow, vllm (the default) or sglang. despite: keys of the
    config.json that may differ from the base. DataError names whatever is missing, left over, of another shape or not
    this base's.
    """
    chosen = adopt.kind_of(kind, settings)
    return adopt.adopted(published.read(path), chosen, base, settings, layer_ids=layer_ids, despite=despite)


def save_head(folder: str | Path, head: Head, *, name: str, base: BaseLM | None = None) -> Path:
    """Writes the native folder that load_head and `draftsmith evaluate load=[…]` read. base: what it answers on this
    base goes into the folder too, for load_head to check; without one that stays as it was recorded, if it was."""
    if base is not None:
        head.golden = capsule.record(head, base)
    return native.save(Path(folder), head, name=name)


def generate(
    base: BaseLM,
    input_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    head: Head | None = None,
    draft: BaseLM | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    drafts: str | None = None,
    accept: str = "exact",
    seed: int = 0,
    depth: int | None = None,
    paths: list[list[int]] | None = None,
    tree: str | None = None,
) -> Any:
    """Continues one prompt, or several in one batch; with a head, faster.

    input_ids: ids as a list, or a tensor of shape [T] or [1, T]: one prompt, one Generation. A list of lists: a batch
    of prompts of any lengths, a list of Generations; row b is what it would be alone with seed + b. head: a drafter; or
    a gate, which drafts with the drafter it was trained for; or a primer, which is lossy: the text may be another
    one. draft: a companion as the draft model. Without either: plain autoregressive decoding by the same engine. depth:
    a chain of so many drafts; paths: a static tree of rank paths; tree: a yaml of conf/tree by name ("eagle2"). With
    none of them, the tree that `draftsmith tune` stored with the head, or a chain as deep as it goes.

    temperature 0 is greedy; above it the text is drawn from the base's own distribution (after top_k and top_p), the
    same for the same seed with every head that chooses its drafts, while drawn drafts (a draft model's; drafts="iid" or
    "distinct") give another text of the same distribution. accept: "exact", "spectr", or "typical", which is lossy.
    Returns .tokens (new ids, end-of-text kept), .tokens_per_step, .accepted_drafts_per_step, .steps.
    """
    prompts, one = _prompts(input_ids)
    told: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    told |= {"drafts": drafts, "accept": accept, "depth": depth, "paths": paths}
    if tree is not None:
        told["tree"] = _tree(tree)
    decoding = DecodingConfig(**told)
    given = company(base, head, draft)
    tuned = None if head is None or given["gates"] is not None else tuned_tree(head)
    shape = decoding.shape(given.pop("deepest"), tuned) if given["drafters"] else None
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": base.eos_ids}
    seeds = [seed + b for b in range(len(prompts))]
    out = decode(base, prompts, shape=shape, rules=decoding.rules, seeds=seeds, **limits, **given)
    return out[0] if one else out


@functools.cache  # composing takes longer than a short text
def _tree(name: str) -> TreeSpec:
    """A yaml of conf/tree; ConfigError names the nearest where there is no such one."""
    return config.typed(config.compose("evaluate", [f"tree={name}"]).decoding.tree, TreeSpec, "tree")


def _prompts(input_ids: Any) -> tuple[list[list[int]], bool]:
    """The prompts, and whether there was one alone."""
    given = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if not given or not isinstance(given[0], list | tuple):
        given, one = [given], True
    else:
        one = hasattr(input_ids, "tolist") and len(given) == 1
    if not all(type(i) is int for prompt in given for i in prompt):
        raise ConfigError("input_ids: give token ids, e.g. base.tokenizer(text)['input_ids']")
    return [list(prompt) for prompt in given], one


def company(base: BaseLM, head: Head | None, draft: BaseLM | None = None) -> dict[str, Any]:
    """Who plays which role in the engine; where somebody drafts, `deepest` says how far that goes."""
    if head is not None and draft is not None:
        raise ConfigError("head, draft: give one of them")
    if draft is not None:
        check_pair(base.spec, draft.spec)
        return {"drafters": DraftModel(draft, DEPTH), "gates": None, "deepest": DRAFTS}
    if isinstance(head, Acceptance):
        if head.beside is None:
            raise ConfigError("head: a gate without the drafter it was trained for; load it with load_head")
        drafter: Drafter = head.beside
        return {"drafters": drafter, "gates": head.gate(), "deepest": min(drafter.max_depth, head.config.max_depth)}
    if head is None or head.role == "primer":
        return {"drafters": None, "gates": None, "primer": cast("Primer | None", head)}
    drafter = cast(Drafter, head)
    return {"drafters": drafter, "gates": None, "deepest": drafter.max_depth}
