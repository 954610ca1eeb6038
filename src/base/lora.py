"""A low-rank adapter on the base, for the methods that train base and head together. The base's own weights stay
as they are and where they are: switched off, the adapter leaves its logits as they were, bit for bit.

The adapter's folder is peft's own (adapter_config.json, adapter_model.safetensors), so whatever serves peft
adapters serves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from draftsmith import artifacts
from draftsmith.base.settings import LoraConfig
from draftsmith.errors import ConfigError, DataError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
IMPORTS = ("megatron_config", "auto_mapping")  # of peft's settings, by which it imports modules by name


class Adapter(nn.Module):
    """What a base's adapter trains: its matrices, fp32, by the names they have in the model ("." written "/"), and
    its dropout, so that train() and eval() reach it. The modules themselves are the model's."""

    def __init__(self, model: nn.Module, settings: Any) -> None:
        super().__init__()
        self.settings = settings  # peft's
        named = {n: p for n, p in model.named_parameters() if "lora_" in n}
        self.matrices = nn.ParameterDict({n.replace(".", "/"): p for n, p in named.items()})
        self.dropouts = nn.ModuleList(m.lora_dropout for m in _layers(model))

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the names under which peft keeps them."""
        return {
            "base_model.model." + n.replace("/", ".").replace(".default.", "."): p.detach().cpu().contiguous()
            for n, p in self.matrices.items()
        }

    def sha256(self) -> str:
        return artifacts.tensors_sha256(self.weights)

    def save(self, folder: Path) -> None:
        """Writes peft's two files into an existing folder."""
        artifacts.write_tensors(folder / WEIGHTS, {n: t.clone() for n, t in self.weights.items()})
        told = {k: sorted(v) if isinstance(v, set) else v for k, v in self.settings.to_dict().items()}
        artifacts.write_json(folder / SETTINGS, {**told, "inference_mode": True})


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError:
        raise ConfigError("base.lora, base.adapter: an adapter needs peft; pip install 'draftsmith[lora]'") from None
    return peft


def inject(model: nn.Module, config: LoraConfig) -> Adapter:
    """Puts a new adapter into the model, in place: it starts as none at all (B = 0)."""
    settings = _peft().LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.targets)
    )
    return _inject(model, settings)


def load(model: nn.Module, folder: Path) -> Adapter:
    """Puts a saved adapter into the model, in place; DataError where its tensors are not the model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / SETTINGS).is_file():
        raise DataError(f"{folder}: not a LoRA adapter in peft's format: it has no {SETTINGS}")
    told = artifacts.read_json(folder / SETTINGS)
    named = [key for key in IMPORTS if told.get(key)] if isinstance(told, dict) else []
    if named:
        raise DataError(f"{folder / SETTINGS}: {named[0]} names modules to import; an adapter is read without that")
    try:
        settings = _peft().LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as e:
        raise DataError(f"{folder}: not a LoRA adapter in peft's format: {' '.join(str(e).split())}") from None
    adapter = _inject(model, settings)
    wanted = adapter.weights
    if wanted.keys() != tensors.keys() or any(tensors[n].shape != t.shape for n, t in wanted.items()):
        raise DataError(f"{folder}: an adapter of another base; its tensors do not fit this one")
    with torch.no_grad():
        for name, p in adapter.matrices.items():
            p.copy_(tensors["base_model.model." + name.replace("/", ".").replace(".default.", ".")])
    adapter.requires_grad_(False)
    return adapter


def _inject(model: nn.Module, settings: Any) -> Adapter:
    try:
        _peft().inject_adapter_in_model(settings, cast(Any, model))
    except ValueError as e:
        raise ConfigError(f"base.lora.targets: {' '.join(str(e).split())}") from None
    for layer in _layers(model):
        for part in (layer.lora_A, layer.lora_B):  # in fp32 whatever the base's dtype: their updates are small
            part.float()
        layer.lora_dropout.eval()
    model.requires_grad_(False)
    adapter = Adapter(model, settings)
    adapter.requires_grad_(True)
    return adapter.eval()


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter. (peft's own switch also turns the matrices' gradients off and on.)"""
    layers = list(_layers(model))
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def own_name(name: str) -> str | None:
    """What a parameter of an adapted model is called in the model without; None for the adapter's own."""
    return None if "lora_" in name else name.replace(".base_layer.", ".")


def _layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (m for m in model.modules() if isinstance(m, LoraLayer))
