"""draftsmith adopt: published weights -> a native head, which evaluate, export and train start_from take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, export, prepare, room
from draftsmith.beside import Beside, told
from draftsmith.errors import ConfigError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head
    from draftsmith.exporters.published import Published

Kind = tuple["type[Head]", dict[str, Any]]


ADOPTED = "adopted head"  # in the manifest of what it writes


@dataclasses.dataclass(frozen=True)
class AdoptConfig(prepare.MachineConfig):
    path: str = ""
    kind: str = ""  # a yaml of conf/head
    out: str = ""
    settings: dict[str, Any] | None = None
    layer_ids: str | None = None
    despite: list[str] = dataclasses.field(default_factory=list)
    drafter: str | None = None


def run(cfg: DictConfig) -> Path:
    """Writes the native folder cfg.out and returns it."""
    from draftsmith.exporters import capsule, native, published

    own = config.typed({f.name: cfg[f.name] for f in dataclasses.fields(AdoptConfig)}, AdoptConfig, "adopt")
    given, out = own.settings or {}, Path(own.out)
    kind, source = kind_of(own.kind, given), published.read(own.path)
    export.refuse_foreign(out, ADOPTED)
    if not cfg.get("base"):
        raise ConfigError("base: which one? give the base that the head was made for, as base=hf base.path=…")
    own.apply()
    base = prepare.load_base(config.typed(cfg.base, prepare.BaseConfig, "base"), own.device)
    head = adopted(source, kind, base, given, layer_ids=own.layer_ids, despite=own.despite)
    beside = Beside.of(cfg, base).of_kind(type(head))
    if head.wants == "drafter":
        completed = type(head).completed(head.config, base.spec, beside)
        if completed != head.config:
            raise ConfigError(f"companion, drafter: it would be judged by {completed}; the weights are {head.config}")
        head.attach(beside)
    room.ready(out.absolute().parent, "out", native.size(head, base.adapter))
    facts = {"adopted": Path(own.path).name, "sha256": artifacts.tensors_sha256(head.state_dict())}
    head.said = {"training": facts, "beside": told(beside, own.drafter)}
    head.golden = capsule.record(head, base)
    native.save(out, head, name=out.name, adapter=base.adapter, kind=ADOPTED)
    prepare.say(f"{own.path}: {type(head).__name__}, {head.config} -> {out}")
    if isinstance(taps := getattr(head, "layers", None), tuple):
        prepare.say(
            f"it reads the base's hidden states {', '.join(map(str, taps))} (layer_ids={own.layer_ids or 'vllm'})"
        )
    return out


def kind_of(name: str, given: Mapping[str, Any]) -> Kind:
    """(class, settings) of a yaml of conf/head; ConfigError for one that is none, and for given settings of no head."""
    heads = config.compose("train", [f"head=[{name}]"]).heads
    if name not in heads:
        raise ConfigError(f"kind='{name}': no such head")
    cls, usual = config.target(heads[name], name), cast("dict[str, Any]", OmegaConf.to_container(heads[name]))
    config.typed({**usual, **given}, cls.Config, name)
    return cls, usual


def adopted(
    source: Published,
    kind: Kind,
    base: BaseLM,
    given: Mapping[str, Any],
    *,
    layer_ids: str | None = None,
    despite: Collection[str] = (),
) -> Head:
    """The head of published weights, on the base's device: as given, else as its files tell, else as its kind is."""
    from draftsmith.exporters import recognise, reference

    cls, usual = kind
    found = recognise.settings(source, cls, base.spec, given, despite=despite, layer_ids=layer_ids)
    own: Any = config.typed({**usual, **found, **given}, cls.Config, "settings")
    copied = {"embedding": base.model.get_input_embeddings().weight, "lm_head": base.lm_head_weight}
    return reference.load(source, cls, own, base.spec, base=copied, despite=despite).to(base.device)


def main() -> None:
    config.command("adopt", run)


if __name__ == "__main__":
    main()
