"""What of a run others may see: no configuration but the parts named here, and no secret in any text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# What a tracker and a report are told of a configuration. Where servers lie and what DeepSpeed is told is nobody's.
TOLD = (
    "experiment",
    "seed",
    "base",
    "companion",
    "drafter",
    "start_from",
    "heads",
    "data",
    "optimizer",
    "scheduler",
    "loss",
    "trainer",
    "strategy.name",
)
UNTOLD = ("data.generation.server",)

USERINFO = re.compile(r"(?<=://)[^\s\"'?#]*@")
ASSIGNED = re.compile(
    r"(?i)([\w.]*(?:password|passwd|secret|api_?key|access_?key|token|authorization)[\"']?\s?[=:]\s?)"
    r"(?!null\b)(\"[^\"]*\"|'[^']*'|bearer \S+|[^\s}\]]+)"
)
NAMES = re.compile(r"(?i)(^|_)(key|token|secret|password|credentials)$")
SHORTEST = 8  # characters of a variable's value below which it is no secret, and may be part of any word


def _secrets() -> dict[str, str]:
    """Environment variables that sound like secrets."""
    return {k: v for k, v in os.environ.items() if NAMES.search(k) and len(v) >= SHORTEST}


def clean(text: str) -> str:
    """The text without passwords in addresses, without what is assigned to keys that sound like secrets, and without
    the values of environment variables that do."""
    for value in _secrets().values():
        text = text.replace(value, "***")
    return ASSIGNED.sub(r"\1***", USERINFO.sub("***@", text))


def secret_in(text: str) -> str:
    """What secret the text holds, without quoting it; "" for none."""
    if USERINFO.search(text):
        return "an address with a password in it"
    return next((f"the value of ${name}" for name, value in _secrets().items() if value in text), "")


def of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that may be shown, cleaned; plain dicts and lists."""
    return {str(k): v for k, v in config.items() for v in [_part(v, str(k))] if _told(str(k)) and v is not None}


def _told(key: str) -> bool:
    return any(key == t or t.startswith(f"{key}.") or key.startswith(f"{t}.") for t in TOLD) and key not in UNTOLD


def _part(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _part(v, f"{key}.{k}") for k, v in value.items() if _told(f"{key}.{k}")}
    if isinstance(value, list | tuple):
        return [_part(v, key) for v in value]
    return clean(value) if isinstance(value, str) else value
