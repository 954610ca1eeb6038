"""What draftsmith needs, extra by extra, as the installed packages say: for scripts/lock.sh, and for the test that
holds constraints.txt and requirements.lock to it."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    """pyproject.toml's own: the core's, and those of the extras."""
    more = (r for extra in extras for r in PROJECT["optional-dependencies"][extra])
    return [Requirement(r) for r in [*PROJECT["dependencies"], *more]]


def needed(extras: Collection[str], pinned: Collection[str]) -> set[str]:
    """Canonical names of all that these ask for, and of what that asks for, and so on. Not what a build of torch brings
    along (triton, CUDA), unless it is pinned. A package that is not installed here cannot say what it needs."""
    todo, seen = requirements(*extras), set[tuple[str, frozenset[str]]]()
    while todo:
        r = todo.pop()
        key = (canonicalize_name(r.name), frozenset(r.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            asked = [Requirement(text) for text in distribution(r.name).requires or []]
        except PackageNotFoundError:
            continue
        for more in asked:
            wanted = more.marker is None or any(more.marker.evaluate({"extra": e}) for e in {"", *r.extras})
            if wanted and (key[0] != "torch" or canonicalize_name(more.name) in pinned):
                todo.append(more)
    return {name for name, _ in seen}
