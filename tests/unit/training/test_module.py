"""What one training does to the heads, and to nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from draftsmith.artifacts import tensors_sha256
from draftsmith.base.lm import BaseLM
from draftsmith.data.module import Steps
from draftsmith.errors import NumericsError
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.training import fit
from draftsmith.training.module import rekeyed
from draftsmith.training.settings import LossConfig, OptimizerConfig, SchedulerConfig

Train = Callable[..., Any]
TWO = {"a": MedusaConfig(num_heads=2), "b": MedusaConfig(num_heads=1, num_layers=2, share_lm_head=True)}


def test_rekeyed_is_the_key_s_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    with rekeyed(1, "x"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), want)
    with rekeyed(1, "x"):
        assert torch.equal(torch.rand(3), first)
    others = []
    for key in ((1, "y"), (2, "x"), (1, "x", 0)):
        with rekeyed(*key):
            others.append(torch.rand(3))
    assert not any(torch.equal(o, first) for o in others)


def test_a_head_starts_from_seed_and_name_alone(base: BaseLM) -> None:
    class Random(Medusa):
        """Keeps its random start."""

        def initialise(self, base: Any, counts_V: Any = None) -> None: ...

    def made(name: str, seed: int) -> str:
        return tensors_sha256(fit.new_head(Random, MedusaConfig(), name, base, seed).state_dict())

    assert made("a", 0) == made("a", 0)
    assert len({made("a", 0), made("b", 0), made("a", 1)}) == 3


class Watch(L.Callback):
    """Looks at the running trainer, once per step and before any weight moves."""

    def __init__(self, look: Callable[[L.Trainer, Any], None]) -> None:
        self.look, self.calls = look, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1
        self.look(trainer, pl_module)


def test_11_33_the_base_is_frozen(base: BaseLM, train: Train, tmp_path: Path) -> None:
    """§11.33: same hash, no gradient, and the optimiser and the module hold the heads' parameters only."""
    before = base.weights_sha256()
    heads: dict[str, Any] = {}

    def look(trainer: L.Trainer, module: Any) -> None:
        own = {id(p) for h in heads.values() for p in h.parameters()}
        assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} == own
        assert {id(p) for p in module.parameters()} == own
        assert all(p.grad is not None for h in heads.values() for p in h.parameters())
        assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
        assert not base.model.training

    watch = Watch(look)
    run = train(tmp_path, made=heads, heads=TWO, more=[watch])
    assert watch.calls == 5
    assert base.weights_sha256() == before
    assert run.weights != train(tmp_path / "other", heads=TWO, steps=1).weights


def test_11_37_accumulation_changes_nothing(train: Train, tmp_path: Path) -> None:
    """§11.37: 4 x 1 == 1 x 4, though the micro-batches hold different numbers of counted targets."""
    plan = {"packs": 10, "steps": 6, "heads": TWO}
    whole = train(tmp_path / "1x4", batch_size=4, accumulate=1, **plan)
    parts = train(tmp_path / "4x1", batch_size=1, accumulate=4, **plan)
    for a, b in zip(whole.lines, parts.lines, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=1e-6) for k in a), (a, b)
    for name, head in whole.heads.items():
        for key, value in head.state_dict().items():
            torch.testing.assert_close(parts.heads[name].state_dict()[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [1.0, 0.01, None])
def test_heads_together_are_heads_alone(train: Train, tmp_path: Path, clip: float | None) -> None:
    """Bit for bit, each with its own clip, learning rate and metrics."""
    optimizer = OptimizerConfig(lr=0.01, clip=clip, heads={"b": {"lr": 0.1, "weight_decay": 0.5}})
    both = train(tmp_path / "both", heads=TWO, optimizer=optimizer)
    for name in TWO:
        alone = train(tmp_path / name, heads={name: TWO[name]}, optimizer=optimizer)
        assert tensors_sha256(alone.heads[name].state_dict()) == tensors_sha256(both.heads[name].state_dict())
        for a, b in zip(alone.lines, both.lines, strict=True):
            own = {k: v for k, v in b.items() if k.startswith(f"train/{name}/")}
            assert {k: v for k, v in a.items() if k.startswith("train/")} == own


def test_the_same_run_twice_is_bit_equal(train: Train, tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = train(tmp_path / "a")
    torch.manual_seed(2)
    b = train(tmp_path / "b")
    assert (a.weights, a.lines) == (b.weights, b.lines)


def test_metrics_are_the_global_step_s(
    base: BaseLM, train: Train, stream: Callable[..., Steps], tmp_path: Path
) -> None:
    """With accumulation, the first line is the untrained head on all of the step's rows at once."""
    head = fit.new_head(Medusa, TWO["a"], "a", base, 3)
    batch = stream(packs=10, batch_size=6)[0]
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    out = head.loss(base, seen, batch)
    want = {f"train/a/{k}": (v / n).item() for k, (v, n) in out.metrics.items()}
    want["train/a/loss"] = (out.sum / out.count).item()
    line = train(tmp_path, heads={"a": TWO["a"]}, packs=10, batch_size=2, accumulate=3, steps=1).lines[0]
    assert {k: v for k, v in line.items() if k.startswith("train/")} == pytest.approx(want, rel=1e-6)


def test_learning_rate_is_the_step_s_own(train: Train, tmp_path: Path) -> None:
    schedule = SchedulerConfig(warmup=0.5)
    used: list[float] = []
    watch = Watch(lambda trainer, module: used.append(trainer.optimizers[0].param_groups[0]["lr"]))
    run = train(tmp_path, steps=6, scheduler=schedule, more=[watch], optimizer=OptimizerConfig(lr=0.02))
    want = [0.02 * schedule.factor(s, 6) for s in range(6)]
    assert used == pytest.approx(want)
    assert [line["lr"] for line in run.lines] == pytest.approx(want)


def test_each_head_has_its_own_settings(train: Train, tmp_path: Path) -> None:
    groups: list[Any] = []
    optimizer = OptimizerConfig(lr=0.01, weight_decay=0.3, heads={"b": {"lr": 0.1, "weight_decay": 0.5}})
    watch = Watch(lambda trainer, module: groups.extend(trainer.optimizers[0].param_groups))
    train(tmp_path, heads=TWO, optimizer=optimizer, steps=1, more=[watch])
    found = [(g["name"], g["initial_lr"], g["weight_decay"], g["betas"], g["eps"]) for g in groups]
    assert found == [("a", 0.01, 0.3, (0.9, 0.95), 1e-8), ("b", 0.1, 0.5, (0.9, 0.95), 1e-8)]


def test_clipping_is_by_each_head_s_own_norm(train: Train, tmp_path: Path) -> None:
    norms: list[float] = []

    def look(trainer: L.Trainer, module: Any) -> None:
        for _, head in module.each_head():
            norms.append(torch.stack([p.grad.norm() for p in head.parameters()]).norm().item())

    train(
        tmp_path,
        heads=TWO,
        optimizer=OptimizerConfig(lr=0.01, clip=0.05, heads={"b": {"clip": 0.02}}),
        steps=2,
        more=[ClippedWatch(look)],
    )
    assert norms == pytest.approx([0.05, 0.02] * 2, rel=1e-3)


class ClippedWatch(L.Callback):
    """Looks at a step's clipped gradients, once they were used."""

    def __init__(self, look: Callable[[L.Trainer, Any], None]) -> None:
        self.look = look

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.look(trainer, pl_module))


@pytest.mark.parametrize("log_every", [1, 2, 3, 10])
def test_measured_steps(train: Train, tmp_path: Path, log_every: int) -> None:
    """Every n-th and the last; measuring less changes nothing else."""
    run = train(tmp_path / "some", steps=7, log_every=log_every)
    assert [line["step"] for line in run.lines] == [s for s in range(1, 8) if s % log_every == 0 or s == 7]
    if log_every > 1:
        assert run.weights == train(tmp_path / "all", steps=7, log_every=1).weights


def test_11_38_the_loss_goes_to_its_floor(train: Train, tmp_path: Path) -> None:
    """§11.38: on one batch seen again and again, hard targets are learnt to loss 0 and every token right."""
    run = train(
        tmp_path,
        packs=2,
        steps=120,
        log_every=120,
        scheduler=SchedulerConfig("constant", 0.0),
        optimizer=OptimizerConfig(lr=0.05, clip=None),
    )
    [last] = run.lines
    assert last["train/medusa/loss"] < 0.01
    assert last["train/medusa/top1/1"] == last["train/medusa/top1/2"] == 1


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(train: Train, tmp_path: Path) -> None:
    exact, low = (train(tmp_path / p, precision=p, steps=3) for p in ("fp32", "bf16"))
    assert {p.dtype for p in low.heads["medusa"].parameters()} == {torch.float32}
    assert low.lines != exact.lines
    for a, b in zip(exact.lines, low.lines, strict=True):
        assert a["train/medusa/loss"] == pytest.approx(b["train/medusa/loss"], rel=0.02)


def test_rehearsal_leaves_the_heads_alone(base: BaseLM, stream: Callable[..., Steps]) -> None:
    heads: dict[str, Any] = {n: fit.new_head(Medusa, c, n, base, 3) for n, c in TWO.items()}
    before = {n: tensors_sha256(h.state_dict()) for n, h in heads.items()}
    fit.rehearse(base, heads, stream()[0])
    assert {n: tensors_sha256(h.state_dict()) for n, h in heads.items()} == before
    assert all(p.grad is None for h in heads.values() for p in h.parameters())


def test_rehearsal_finds_what_is_not_finite(base: BaseLM, stream: Callable[..., Steps]) -> None:
    head = fit.new_head(Medusa, TWO["a"], "a", base, 3)
    with torch.no_grad():
        head.lm_heads[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="a: the first batch's loss is nan"):
        fit.rehearse(base, {"a": head}, stream()[0])


@pytest.mark.parametrize("skip_masked", [False, True])
@pytest.mark.parametrize("impl", ["fused", "plain"])
def test_how_a_loss_is_computed_changes_no_step(train: Train, tmp_path: Path, impl: str, skip_masked: bool) -> None:
    """A bench's plain step is the same step: losses, metrics and weights, to rounding."""
    usual = train(tmp_path / "usual", steps=4)
    other = train(tmp_path / "other", steps=4, loss=LossConfig(impl, skip_masked))
    for ours, theirs in zip(usual.lines, other.lines, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    pairs = zip(usual.heads["medusa"].parameters(), other.heads["medusa"].parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_padded_rows_are_the_same_step_as_packed_ones(train: Train, tmp_path: Path) -> None:
    """All rows in one step, in sequences of their own or sharing them."""
    packed = train(tmp_path / "packed", packs=4, batch_size=4, steps=1)
    apart = train(tmp_path / "apart", packs=4, batch_size=8, steps=1, packing=False)
    assert apart.lines[0] == pytest.approx(packed.lines[0], rel=1e-5)
