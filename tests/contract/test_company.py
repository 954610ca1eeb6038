"""Several heads on one base forward: each ends with the weights it would have alone, bit for bit.

Heads are found in conf/head/*.yaml; those that train an adapter of the base have no company. Whoever wants a drafter
beside it gets a draft model; one that learns from rows with labels would have no company either, and none does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.data.module import RowsModule
from draftsmith.data.rows import Row
from draftsmith.heads.draft_model import DraftModel
from draftsmith.training.fit import fit, new_head
from draftsmith.training.settings import OptimizerConfig, SchedulerConfig, Settings, StrategyConfig, TrainerConfig

FOLDER = Path(__file__).parents[2] / "conf" / "head"
STEPS, ACCUMULATE, PACKS = 3, 2, 12


def chosen() -> dict[str, tuple[Any, Any]]:
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        kind = config.target(node, path.stem)
        if not kind.adapts:
            found[path.stem] = (kind, config.typed(node, kind.Config, path.stem))
    return found


HEADS = chosen()


def beside(name: str, tiny_base: Any) -> Any:
    kind, own = HEADS[name]
    if kind.wants != "drafter":
        return None
    drafter = DraftModel(tiny_base("llama", seed=3, hidden_size=24))
    assert not kind.reads_labels(own, drafter)
    return drafter


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(9, 24, (30,), generator=g).tolist()
    return [
        Row(str(i), torch.randint(0, 60, (n,), generator=g).tolist(), [int(t > 2) for t in range(n)])
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def train(rows: list[Row], tiny_base: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """train(names, …) -> (state dicts of the heads, base forwards of the training steps)"""

    def go(names: Sequence[str]) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
        base = tiny_base()
        heads = {n: new_head(*HEADS[n], n, base, 7, beside=beside(n, tiny_base)) for n in names}
        horizon = max(h.horizon for h in heads.values())
        layout = {"length": 32, "batch_size": 2, "accumulate": ACCUMULATE, "horizon": horizon, "seed": 7}
        trainer = TrainerConfig(max_steps=STEPS, accumulate=ACCUMULATE, log_every=2)
        own = {name: {"lr": 1e-3 * (i + 1)} for i, name in enumerate(HEADS)}  # so that groups cannot be mixed up
        optimizer = OptimizerConfig(lr=5e-3, weight_decay=0.01, clip=0.5, heads=own)
        settings = Settings(trainer, StrategyConfig("single"), optimizer, SchedulerConfig(), torch.optim.AdamW)
        counted = Counted(base)

        def serve(start: int, stop: int) -> RowsModule:
            return RowsModule(rows, start=start, stop=stop, **layout)

        run_dir = tmp_path_factory.mktemp("company")
        fit(counted, heads, serve, run_dir=run_dir, steps=STEPS, seed=7, settings=settings, ties={})
        return {n: h.state_dict() for n, h in heads.items()}, counted.forwards

    return go


class Counted:
    """A base that counts its forwards."""

    def __init__(self, base: Any) -> None:
        self.base, self.forwards = base, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def to(self, device: Any) -> Any:
        return self

    def capture(self, *args: Any, **more: Any) -> Any:
        self.forwards += 1
        return self.base.capture(*args, **more)


@pytest.fixture(scope="module")
def together(train: Any) -> Any:
    return train(list(HEADS))


def test_the_base_runs_once_per_micro_batch_for_all_of_them(together: Any) -> None:
    assert len(HEADS) > 1
    assert together[1] == STEPS * ACCUMULATE


@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_company_is_the_head_alone_bit_for_bit(name: str, together: Any, train: Any, tiny_base: Any) -> None:
    alone, forwards = train([name])
    fresh = new_head(*HEADS[name], name, tiny_base(), 7, beside=beside(name, tiny_base)).state_dict()
    assert any(not torch.equal(t, fresh[key]) for key, t in alone[name].items()), "nothing was learned"
    assert forwards == STEPS * ACCUMULATE
    assert all(torch.equal(t, together[0][name][key]) for key, t in alone[name].items())
