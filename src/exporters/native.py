"""Our own folder for every head: safetensors, a config that rebuilds it, a manifest, a card.

It loads without Hydra and without pickle, and it names the base it belongs to; another base is refused.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from draftsmith import artifacts, config
from draftsmith.contracts import BaseSpec, Head
from draftsmith.errors import ConfigError, DataError, NumericsError

FORMAT = "draftsmith-head"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"

# What must be equal for a head to mean anything on a base; `path` and `revision` are only told.
# (The config's hash is only told too: it changes with every default that transformers adds. So is `quantised`: a head
# may serve the base at full precision that was trained on it as integers.)
TIES = ("family", "hidden_size", "vocab_size", "num_layers", "tokenizer_sha256", "adapter_sha256")


SAID = ("training", "beside", "tuned")


def save(folder: Path, head: Head, *, name: str, adapter: Any = None) -> Path:
    """Publishes the head whole or not at all, with what is said of it (head.said: how it was trained; who stood beside
    the base, without whom a gate means nothing; how its threshold or its tree was chosen). adapter: the base's, if it
    was trained with the head; it goes into the folder `adapter`, in peft's format."""
    kind = type(head)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "draftsmith": _version(),
        "name": name,
        "role": kind.role,
        "lossy": kind.lossy,
        "head": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(head.config)},
        "base": dataclasses.asdict(head.spec),
        "needs": {
            "hidden": sorted(head.needs.hidden),
            "final": head.needs.final or head.needs.teacher,
            "logits": head.needs.logits,
            "convention": "hidden[l] leaves block l-1 (0 = embeddings), before the final norm; final is after it",
        },
        **{part: head.said.get(part) or {} for part in SAID},
    }
    tensors = {k: v.detach().clone().contiguous() for k, v in head.state_dict().items()}
    with artifacts.publish(folder, kind="head") as temporary:
        artifacts.write_tensors(temporary / WEIGHTS, tensors)
        artifacts.write_json(temporary / "config.json", described)
        save_adapter(temporary, adapter)
        (temporary / "README.md").write_text(_card(described, sum(t.numel() for t in tensors.values())))
    return folder


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
    artifacts.verify(folder)
    described = artifacts.read_json(folder / "config.json")
    said = described if isinstance(described, dict) else {}
    if said.get("format") != FORMAT or said.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}/config.json: format {said.get('format')} {said.get('format_version')};"
            f" this version reads {FORMAT} {FORMAT_VERSION}, the folder run_dir/heads/<name>"
        )
    if not all(isinstance(said.get(group), dict) for group in ("base", "head")):
        raise DataError(f"{folder}/config.json: does not describe its base and its head")
    for tie in TIES:
        theirs, ours = described["base"].get(tie, getattr(BaseSpec, tie, None)), getattr(spec, tie)
        if theirs != ours:
            raise DataError(
                f"{folder}: made for base {described['base'].get('path')} with {tie}={theirs}, this base"
                f" ({spec.path}) has {ours or 'none'}; load the base it was trained on"
                + (f" with base.adapter={folder}/adapter" if tie == "adapter_sha256" and theirs else "")
            )
    try:
        kind = config.target(described["head"], f"{folder}/config.json: head")
        if not issubclass(kind, Head):
            raise ConfigError(f"{folder}/config.json: head._target_: {kind.__name__} is no head")
        with torch.device("meta"):
            trained = dataclasses.replace(spec, quantised=described["base"].get("quantised", ""))
            head: Head = kind(config.typed(described["head"], kind.Config, "head"), trained)
    except ConfigError as e:
        raise DataError(str(e)) from None
    try:
        # Clones, since a file's tensors begin wherever they do: some CPU kernels round by a pointer's alignment.
        tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS, device=str(device)).items()}
        head.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, RuntimeError, FileNotFoundError) as e:
        raise DataError(f"{folder / WEIGHTS}: {' '.join(str(e).split())}") from None
    head.said = {"name": said.get("name"), **{part: said.get(part) or {} for part in SAID}}
    return head.eval().requires_grad_(False)


def rehearse(run_dir: Path, heads: Mapping[str, Head]) -> None:
    """Writes every head as it is, reads it back, compares bit for bit, and leaves nothing: a folder that
    cannot be written, or a head that cannot be exported, is known before step 1."""
    folder = run_dir / ".rehearsal"
    try:
        for name, head in heads.items():
            back = load(save(folder / name, head, name=name), head.spec).state_dict()
            if any(not torch.equal(back[k], v.cpu()) for k, v in head.state_dict().items()):
                raise NumericsError(f"heads.{name}: the export does not read back equal; nothing was trained")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _whose_drafts(described: dict[str, Any]) -> str:
    beside, tuned = described["beside"], described["tuned"]
    told = f" Its drafter: {beside['kind']} of `{beside['path']}`." if beside else ""
    if not tuned:
        return told + " Its threshold is not tuned; draftsmith tune finds the one for a machine."
    return told + f" Threshold {tuned['threshold']:g}, by draftsmith tune at temperature {tuned['temperature']:g}."


def _which_tree(tuned: Mapping[str, Any]) -> str:
    """Of a drafter: the tree it drafts where nobody names another, and what it brought on the machine that chose it."""
    if "tree" not in tuned:
        return ""
    kind, nodes, depth = tuned["tree"]["kind"], tuned["nodes"], tuned["depth"]
    return (
        f" Its tree: {kind}, {nodes} nodes, {depth} deep, by draftsmith tune at temperature {tuned['temperature']:g}"
        f" ({tuned['measured_speedup']:.2f}x plain decoding there, {tuned['predicted_speedup']:.2f}x predicted)."
    )


def _version() -> str:
    try:
        return version("draftsmith")
    except PackageNotFoundError:
        return "unknown"


def _card(described: dict[str, Any], parameters: int) -> str:
    base, head = described["base"], described["head"]
    loading = ', adapter="this folder/adapter"' if base["adapter_sha256"] else ""
    loading += f', quantise="{base["quantised"]}"' if base["quantised"] else ""
    settings = "\n".join(f"| {k} | {v} |" for k, v in head.items() if k != "_target_")
    training = "\n".join(f"| {k} | {v} |" for k, v in described["training"].items())
    whose = "the base's own with its adapter (folder `adapter`)" if base["adapter_sha256"] else "the base's own"
    if described["lossy"]:
        promise = "**Lossy**: decoding with it may change the base's output."
    elif described["role"] == "gate":
        promise = f"It ends drafting early and changes nothing in the output.{_whose_drafts(described)}"
    else:
        promise = f"Greedy decoding with it returns exactly the tokens of {whose}."
        promise = promise.replace("the tokens of the base's own.", "the base's own tokens.")
        promise += _which_tree(described["tuned"])
    return f"""# {described["name"]}

A {described["role"]} ({head["_target_"].rpartition(".")[2]}, {parameters:,} parameters) for the base
`{base["path"]}`{f" at revision {base['revision']}" if base["revision"] else ""}{
        f", trained with that base's weights as {base['quantised']}" if base["quantised"] else ""
    }. {promise}

```python
from draftsmith import generate, load_base, load_head

base = load_base("{base["path"]}"{loading})
head = load_head("this folder", base=base)
print(generate(base, input_ids, head=head, max_new_tokens=64).tokens)
```

| setting | value |
|---|---|
{settings}

| training | value |
|---|---|
{training or "| | |"}
"""


@dataclasses.dataclass(frozen=True)
class NativeConfig:
    pass


class Native:
    """The exporter's form of `save`."""

    Config = NativeConfig

    def __init__(self, config: NativeConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: Any, *, name: str) -> Path:
        return save(folder, head, name=name, adapter=base.adapter)
