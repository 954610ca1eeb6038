"""A DeepSpeed configuration beside ours: "auto" filled in, contradictions listed, no deepspeed imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from draftsmith.errors import ConfigError

ADAM = ("adam", "adamw")
# Compared, then left to our own keys. (Of bf16: the heads keep fp32 weights and compute under autocast, as they do
# without DeepSpeed, whose own bf16 casts the weights.)
OURS = ("gradient_accumulation_steps", "train_batch_size", "optimizer", "scheduler", "bf16", "fp16")


def merged(given: Mapping[str, Any], ours: Mapping[str, tuple[str, Any]], where: str) -> dict[str, Any]:
    """`given` with its "auto"s replaced: by ours[dotted key] = (our key, value) where there is one, else left to
    DeepSpeed. What our own keys say already is taken out of it.

    ConfigError with every key whose value contradicts ours. where: how messages call the configuration.
    """
    clashes, config = [], _copy(given)
    kind = str((config.get("optimizer") or {}).get("type", "AdamW"))
    if kind.lower() not in ADAM:
        clashes.append(f"optimizer.type={kind}, and draftsmith trains with AdamW")
    if _get(config, "optimizer.params.adam_w_mode") is False:
        clashes.append("optimizer.params.adam_w_mode=False, and AdamW's decay is not in the gradient")
    for key in list(_leaves(config.get("scheduler") or {}, "scheduler.params.", "params")):
        clashes.append(f"{key}, and the learning rate follows the group scheduler here")
    for key, (own, value) in ours.items():
        found = _get(config, key)
        if found is None:
            continue
        if found == "auto":
            _set(config, key, value)
        elif not _equal(found, value):
            clashes.append(f"{key}={found}, and {own} makes it {value}")
    if clashes:
        raise ConfigError(f'{where}: {"; ".join(clashes)}; change one of each, or write "auto"')
    return {k: v for k, v in _without_autos(config).items() if k not in OURS}


def _leaves(node: Mapping[str, Any], prefix: str, part: str) -> Iterator[str]:
    for key, value in (node.get(part) or {}).items():
        if value != "auto":
            yield f"{prefix}{key}={value}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return [float(x) for x in a] == [float(x) for x in b]
    return bool(a == b)


def _copy(node: Any) -> Any:
    return {str(k): _copy(v) for k, v in node.items()} if isinstance(node, Mapping) else node


def _get(node: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    return node


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        node = node[name]
    node[last] = value


def _without_autos(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: _without_autos(v) for k, v in node.items() if v != "auto"}
