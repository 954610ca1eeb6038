"""Train the modules that make a large language model decode faster, on a frozen base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.api import generate, load_base, load_companion, load_head, load_published, save_head

__all__ = ["generate", "load_base", "load_companion", "load_head", "load_published", "save_head"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from draftsmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'draftsmith' has no attribute '{name}'")
