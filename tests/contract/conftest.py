"""All drafters: where they are found, and how one is made beside a tiny base. Tests that take `kind` are asked of every
class without training, those that take `exact_kind` of the exact ones, those that take `anyone` of all exact drafters:
heads, training-free ones, and a draft model."""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.base.lm import BaseLM
from draftsmith.base.settings import LoraConfig
from draftsmith.decoding.drafters.layer_skip import LayerSkip, select
from draftsmith.heads.draft_model import DraftModel
from draftsmith.training.fit import new_adapter, new_head

ROOT = Path(__file__).parents[2]
MODULES = sorted(p.stem for p in (ROOT / "src" / "decoding" / "drafters").glob("*.py") if p.stem != "__init__")
# What a drafter would not do by default beside a random base, whose early exits seldom pay.
SETTINGS: dict[str, dict[str, Any]] = {"EarlyExit": {"min_depth": 1}}
SPOKEN = 8  # the tokens that the bases of `anyone` keep to, so that a random draft is right now and then


def kinds_in(module: str) -> list[Any]:
    """The public classes of a module that can propose."""
    members = vars(import_module(f"draftsmith.decoding.drafters.{module}")).values()
    own = [m for m in members if inspect.isclass(m) and m.__module__.endswith(f".{module}")]
    return [m for m in own if hasattr(m, "propose") and not m.__name__.startswith("_")]


KINDS = {module: kinds_in(module) for module in MODULES}


@dataclasses.dataclass(frozen=True)
class Anyone:
    """name: of a head's yaml or of a class. config: a head's."""

    name: str
    kind: Any
    config: Any = None


def heads() -> list[Anyone]:
    """The exact drafters of conf/head, started from the base where they have the choice."""
    found = []
    for path in sorted((ROOT / "conf" / "head").glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        kind = config.target(node, f"heads.{path.stem}")
        if kind.role == "drafter" and not kind.lossy:
            values = {key: True if key == "start_from_base" else value for key, value in node.items()}
            found.append(Anyone(path.stem, kind, config.typed(values, kind.Config, f"heads.{path.stem}")))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = [kind for found in KINDS.values() for kind in found]
    exact = [kind for kind in kinds if not kind.lossy]
    everyone = {"kind": kinds, "exact_kind": exact, "anyone": []}
    if "anyone" in metafunc.fixturenames:
        everyone["anyone"] = [*heads(), *(Anyone(kind.__name__, kind) for kind in [DraftModel, *exact])]
    for name in everyone.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, everyone[name], ids=lambda k: k.__name__ if inspect.isclass(k) else k.name)


@pytest.fixture(scope="session")
def kinds() -> dict[str, list[Any]]:
    """Module -> its classes."""
    return KINDS


@pytest.fixture(scope="session")
def untrained() -> Callable[..., Any]:
    """untrained(kind, base, text, texts): with its default settings and whatever else it asks to be given. text: the
    prompt and what the base says to it; texts: what may be searched beforehand."""

    def of(kind: Any, base: Any, text: Sequence[int], texts: Sequence[Sequence[int]]) -> Any:
        own, skip = kind.Config(**SETTINGS.get(kind.__name__, {})), ()
        if kind is LayerSkip:
            skip = select(base, texts, own)
        at_hand = {"config": own, "text": text, "spec": base.spec, "skip": skip}
        asked = list(inspect.signature(kind).parameters)
        assert set(asked) <= at_hand.keys(), f"{kind.__name__} asks for {asked}; give this a way to make it"
        return kind(**{name: at_hand[name] for name in asked})

    return of


@pytest.fixture(scope="session")
def spoken(tiny_base: Any, noisy: Any) -> Callable[..., Any]:
    """spoken(family, adapted): a base that keeps to few tokens, with an adapter if asked. Leave it as it was."""

    @functools.cache
    def of(family: str, adapted: bool) -> Any:
        base = tiny_base.__wrapped__(family)
        with torch.no_grad():
            base.lm_head_weight.mul_(6)  # surer of itself, so that a temperature of 1 leaves it a choice of few
            base.lm_head_weight[SPOKEN:] = 0
        if adapted:
            new_adapter(base, LoraConfig(rank=3), 0)
            noisy(base.adapter, 0.1)
        return base

    return of


@pytest.fixture(scope="session")
def made(spoken: Any, noisy: Any, untrained: Any) -> Callable[..., tuple[Any, Callable[..., Any]]]:
    """made(anyone, family) -> (the base, drafter(text, texts)). A head or a draft model is one for all texts; what
    learns from a text is made anew."""

    @functools.cache
    def of(anyone: Anyone, family: str) -> tuple[Any, Callable[..., Any]]:
        base = spoken(family, anyone.config is not None and anyone.kind.adapts)
        if anyone.config is not None:
            one = noisy(new_head(anyone.kind, anyone.config, anyone.name, base, 0), 0.02).eval()
        elif anyone.kind is DraftModel:
            one = DraftModel(BaseLM(noisy(copy.deepcopy(base.model), 0.05)))
        else:
            return base, lambda text, texts: untrained(anyone.kind, base, text, texts)
        return base, lambda text, texts: one

    return of
