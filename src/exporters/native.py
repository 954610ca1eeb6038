"""Our own folder for every head: safetensors, a config that rebuilds it, a manifest, a card.

It loads without Hydra and without pickle, and it names the base it belongs to; another base is refused.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from draftsmith import artifacts, config, room
from draftsmith.contracts import BaseSpec, Head
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.exporters import capsule
from draftsmith.exporters.card import card

FORMAT = "draftsmith-head"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
AGAIN = capsule.AGAIN

# What must be equal for a head to mean anything on a base; `path` and `revision` are only told.
# (The config's hash is only told too: it changes with every default that transformers adds. So is `quantised`: a head
# may serve the base at full precision that was trained on it as integers.)
TIES = ("family", "hidden_size", "vocab_size", "num_layers", "tokenizer_sha256", "adapter_sha256")


# What shapes a head's own layers, in numbers that rounding may touch.
ALIKE = ("norm_eps", "rope_frequencies", "rope_scale", "qkv_bias", "qk_norm")


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-5))


SAID = ("training", "beside", "tuned")
NUMBER = (int, float)
# Of that, what is read again, and what it must be.
READ: dict[str, dict[str, tuple[type, ...]]] = {
    "beside": {"kind": (str,), "path": (str, type(None)), "sha256": (str,)},
    "tuned": {
        **{"tree": (dict,), "asked": (list,), "depth": (int,), "nodes": (int,)},
        **dict.fromkeys(("threshold", "temperature", "measured_speedup", "predicted_speedup"), NUMBER),
    },
}
DRAFTER = "drafter"  # where a gate's drafter lies in its folder, if it travels with it


def save(
    folder: Path, head: Head, *, name: str, adapter: Any = None, drafter: Head | None = None, kind: str = "head"
) -> Path:
    """Publishes the head whole or not at all, with what is said of it (head.said: how it was trained; who stood beside
    the base, without whom a gate means nothing; how its threshold or its tree was chosen). adapter: the base's, if it
    was trained with the head; it goes into the folder `adapter`, in peft's format. drafter: a gate's, where it is to
    travel with it; into the folder `drafter`. kind: of the folder, for its manifest."""
    with artifacts.publish(folder, kind=kind) as temporary:
        write(temporary, head, name=name, adapter=adapter, drafter=drafter)
    return folder


def write(folder: Path, head: Head, *, name: str, adapter: Any = None, drafter: Head | None = None) -> None:
    """All of it but the manifest, into a folder that somebody else publishes."""
    answered = None if head.golden is None else head.golden.told.get("weights_sha256")
    if answered is not None and answered != artifacts.tensors_sha256(head.state_dict()):
        raise ConfigError(
            f"{name}: its weights are not those whose answers were recorded; save_head(…, base=…) records them anew"
        )
    told = describe(head, name)
    tensors = {k: v.detach().clone().contiguous() for k, v in head.state_dict().items()}
    artifacts.write_tensors(folder / WEIGHTS, tensors)
    if head.golden is not None:
        capsule.write(folder / capsule.FILE, head.golden, head)
    artifacts.write_json(folder / "config.json", told)
    save_adapter(folder, adapter)
    if drafter is not None:
        called = str(drafter.said.get("name") or type(drafter).__name__.lower())
        save(folder / DRAFTER, drafter, name=called, adapter=adapter)
    (folder / "README.md").write_text(card(told, sum(t.numel() for t in tensors.values())))


def describe(head: Head, name: str) -> dict[str, Any]:
    """config.json: all that rebuilds a head and names its base, and what is said of it."""
    kind = type(head)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "draftsmith": _version(),
        "name": name,
        "role": kind.role,
        "dtype": str(next(p.dtype for p in head.parameters())).removeprefix("torch."),
        "lossy": kind.lossy,
        "head": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(head.config)},
        "base": dataclasses.asdict(head.spec),
        "needs": {
            "hidden": sorted(head.needs.hidden),
            "final": head.needs.final,
            "logits": head.needs.logits,
            "convention": "hidden[l] leaves block l-1 (0 = embeddings), before the final norm; final is after it",
        },
        **{part: head.said.get(part) or {} for part in SAID},
    }


def drafter_of(head: Head, base: Any, name: str) -> Head | None:
    """The drafter that a gate needs, as it was in training; None for every other head."""
    if head.role != "gate":
        return None
    recorded = head.said.get("beside") or {}
    drafter, path = head.beside, recorded.get("path")
    if drafter is None and recorded.get("kind") != "draft_model":
        if not path or not Path(path).is_dir():
            raise DataError(f"{name}: a gate, whose drafter was at {path}, where nothing is now; put it back there")
        drafter = load(path, base.spec, device=base.device)
    if not isinstance(drafter, Head):
        raise ConfigError(
            f"exporter: {name} is a gate for a draft model, a whole language model of its own, which"
            " no folder carries; use exporter=native and draftsmith.generate"
        )
    sha256 = artifacts.tensors_sha256(drafter.state_dict())
    if not recorded:  # a gate that has not been saved yet
        head.said = {**head.said, "beside": {"kind": type(drafter).__name__, "path": None, "sha256": sha256}}
    elif recorded.get("sha256") != sha256:
        raise DataError(f"{name}: a gate made for another drafter than {path or 'the one beside it'}; train a new one")
    return drafter


def save_adapter(folder: Path, adapter: Any) -> None:
    """The base's adapter, where there is one, beside the head: without it the head is another base's."""
    if adapter is not None:
        (folder / "adapter").mkdir()
        adapter.save(folder / "adapter")


def load(folder: Path | str, spec: BaseSpec, *, device: torch.device | str = "cpu") -> Head:
    """The head of a native folder, for a base with this spec, in its trained precision. head.spec is that spec, but
    `quantised` as it was in training.

    Raises DataError for a folder that is not whole, a head of another base (both values named) or tensors
    that are not exactly the head's.
    """
    folder = Path(folder)
    try:
        listed = artifacts.verify(folder, cure=AGAIN)["files"]
    except DataError as e:
        raise DataError(f"{e}{_differing(folder)}") from None
    described = artifacts.read_json(folder / "config.json")
    said = described if isinstance(described, dict) else {}
    if said.get("format") != FORMAT or said.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}/config.json: format {said.get('format')} {said.get('format_version')};"
            f" this version reads {FORMAT} {FORMAT_VERSION}, the folder run_dir/heads/<name>"
        )
    if not all(isinstance(said.get(group), dict) for group in ("base", "head")):
        raise DataError(f"{folder}/config.json: does not describe its base and its head")
    _check_said(said, f"{folder}/config.json")
    for tie in TIES:
        theirs, ours = described["base"].get(tie, getattr(BaseSpec, tie, None)), getattr(spec, tie)
        if theirs != ours:
            raise DataError(
                f"{folder}: made for base {described['base'].get('path')} with {tie}={theirs}, this base"
                f" ({spec.path}) has {ours or 'none'}; load the base it was trained on"
                + (f" with base.adapter={folder}/adapter" if tie == "adapter_sha256" and theirs else "")
            )
    for key in ALIKE:
        theirs, ours = described["base"].get(key), getattr(spec, key)
        if theirs is not None and not _alike(theirs, ours):
            raise DataError(
                f"{folder}: made for a base with {key}={theirs}, this one ({spec.path}) has {ours}; load the base it"
                " was trained on"
            )
    try:
        kind = config.target(described["head"], f"{folder}/config.json: head")
        if not issubclass(kind, Head):
            raise ConfigError(f"{folder}/config.json: head._target_: {kind.__name__} is no head")
        with torch.device("meta"):
            trained = dataclasses.replace(spec, quantised=described["base"].get("quantised", ""))
            head: Head = kind(config.typed(described["head"], kind.Config, f"{folder}/config.json: head"), trained)
    except ConfigError as e:
        raise DataError(f"{e}; {AGAIN}") from None
    try:
        # Clones, since a file's tensors begin wherever they do: some CPU kernels round by a pointer's alignment.
        tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS, device=str(device)).items()}
        head.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, RuntimeError, FileNotFoundError) as e:
        raise DataError(f"{folder / WEIGHTS}: {' '.join(str(e).split())}; {AGAIN}") from None
    head.said = {"name": said.get("name"), **{part: said.get(part) or {} for part in SAID}}
    if capsule.FILE in listed:
        if found := capsule.differences(folder / capsule.FILE, described["head"], head.state_dict()):
            raise DataError(f"{folder}: not the head that was saved: {'; '.join(found[:3])}")
        head.golden = capsule.read(folder / capsule.FILE)
    return head.eval().requires_grad_(False)


def _check_said(said: Mapping[str, Any], where: str) -> None:
    """DataError where what is said of a head could not be read later."""
    for part in SAID:
        told = said.get(part) or {}
        if not isinstance(told, dict):
            raise DataError(f"{where}: {part} is no JSON object; {AGAIN}")
        for key, kinds in READ.get(part, {}).items():
            if key in told and (not isinstance(told[key], kinds) or isinstance(told[key], bool)):
                raise DataError(f"{where}: {part}.{key} is {told[key]!r:.50}; {AGAIN}")
    if not isinstance(said["base"].get("quantised", ""), str):
        raise DataError(f"{where}: base.quantised is no text; {AGAIN}")


def check(folder: Path, spec: BaseSpec) -> Head:
    """Reads a folder that `write` filled as it will be read, before anybody can see it: what it holds so far, under a
    manifest that does not stay."""
    artifacts.seal(folder, [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()])
    head = load(folder, spec)
    (folder / artifacts.MANIFEST).unlink()
    return head


def _differing(folder: Path) -> str:
    """What of a damaged folder its capsule can tell to be otherwise, for the message; nothing, where that is gone."""
    try:
        described, tensors = artifacts.read_json(folder / "config.json"), load_file(folder / WEIGHTS)
        found = capsule.differences(folder / capsule.FILE, described["head"], tensors)
    except (DataError, SafetensorError, OSError, KeyError, TypeError):
        return ""
    return f" ({'; '.join(found[:3])})" if found else ""


def size(head: Head, adapter: Any = None) -> float:
    """Bytes on the disk of what `save` writes."""
    answers = [] if head.golden is None else list(head.golden.tensors.values())
    beside = [] if adapter is None else list(adapter.parameters())
    return room.tensors(head.state_dict().values(), answers, beside) + 4 * room.PAGE


def rehearse(run_dir: Path, heads: Mapping[str, Head], adapter: Any = None, *, keep: int = 0, lines: int = 0) -> None:
    """ResourceError unless the whole run fits on the disk: its exports, one checkpoint more than it keeps, so many
    lines of metrics. Then writes every head as it is, reads it back, compares bit for bit, and leaves nothing: a head
    that cannot be exported is known before step 1. adapter: the base's, if it is trained."""
    parts = [*heads.values(), *([] if adapter is None else [adapter])]
    exports = sum(size(head, adapter) for head in heads.values())
    needs = room.of_run(parts, exports, keep, lines) - room.taken(run_dir / "checkpoints")
    fewer = "trainer.keep=1 or another run_dir" if keep > 1 else "choose another run_dir"
    room.ready(run_dir, "run_dir", needs, fewer)
    folder = run_dir / ".rehearsal"
    try:
        for name, head in heads.items():
            back = load(save(folder / name, head, name=name), head.spec).state_dict()
            if any(not torch.equal(back[k], v.cpu()) for k, v in head.state_dict().items()):
                raise NumericsError(f"heads.{name}: the export does not read back equal; nothing was trained")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _version() -> str:
    try:
        return version("draftsmith")
    except PackageNotFoundError:
        return "unknown"


@dataclasses.dataclass(frozen=True)
class NativeConfig:
    pass


class Native:
    """The exporter's form of `save`."""

    Config = NativeConfig

    def __init__(self, config: NativeConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: Any, *, name: str) -> Path:
        return save(folder, head, name=name, adapter=base.adapter, kind="export native")
