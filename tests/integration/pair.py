"""What two processes do in tests/integration/test_strategies.py: many trainings after one start, since starting costs
more than they do. torchrun … pair.py FOLDER CASE…; writes FOLDER/<case>.json and the head's weights."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file

from draftsmith.artifacts import tensors_sha256
from draftsmith.base import create, pieces
from draftsmith.base.lm import BaseLM, load
from draftsmith.base.settings import LoraConfig
from draftsmith.data.module import RowsModule
from draftsmith.data.rows import Row
from draftsmith.errors import DraftsmithError, Interrupted, ResourceError
from draftsmith.heads.eagle3 import Eagle3, Eagle3Config
from draftsmith.heads.hydra import Hydra, HydraConfig
from draftsmith.heads.kv_prediction import KVPrediction, KVPredictionConfig
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.heads.medusa2 import Medusa2, Medusa2Config
from draftsmith.training import checkpoint, fit, processes, strategy, zero
from draftsmith.training.settings import OptimizerConfig, SchedulerConfig, Settings, StrategyConfig, TrainerConfig

LENGTH = 24
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
HEADS: dict[str, tuple[Any, Any]] = {
    "medusa": (Medusa, MedusaConfig(num_heads=2)),
    "hydra": (Hydra, HydraConfig(num_heads=2)),
    "eagle3": (Eagle3, Eagle3Config()),
    "kv": (KVPrediction, KVPredictionConfig(keep=0.34)),
    "medusa2": (Medusa2, Medusa2Config(num_heads=2)),
}
LORA = LoraConfig(rank=4, dropout=0.0, targets=["q_proj", "down_proj"])


@dataclass(frozen=True)
class Case:
    """One training; the global batch is four packs whatever the number of processes."""

    strategy: str
    head: str = "medusa"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 2
    steps: int = 20
    stop: int | None = None  # the run ends here, to go on elsewhere
    lr: float = 1e-2
    clip: float | None = 0.05
    masked: bool = False  # the rows that the second of two processes reads teach nothing
    every: int = 99  # steps between checkpoints
    fault: str = ""  # hang: the second process, in step 4 | full: the first one's disk, after step 4 | inf: a loss of
    # the second one, in step 4
    timeout: float = 60


ZERO = {1: {"stage": 1}, 2: {"stage": 2}, 3: {"stage": 3, "stage3_param_persistence_threshold": 10**12}}
CUT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # the heads' weights in pieces too
OFFLOAD = {"zero_optimization": ZERO[3] | {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}}
CASES = {
    "offload": Case("zero3_offload", deepspeed=OFFLOAD),
    "half-offload": Case("zero3_offload", deepspeed=OFFLOAD, stop=9),
    **{s: Case(s) for s in ("single", "ddp", "zero1", "zero2", "zero3")},
    "zero3-cut": Case("zero3", deepspeed=CUT),
    **{f"{h}-{s}": Case(s, h) for h in ("kv", "medusa2", "eagle3") for s in ("single", "zero2", "zero3")},
    "eagle3-ddp": Case("ddp", "eagle3"),
    **{f"hydra-{s}": Case(s, "hydra") for s in ("single", "zero3")},
    "hydra-zero3-cut": Case("zero3", "hydra", CUT),
    **{f"masked-{s}": Case(s, masked=True, accumulate=1) for s in ("single", "ddp", "zero2", "zero3")},
    **{f"long-{s}": Case(s, steps=60, every=5) for s in ("zero2", "ddp")},
    "hang": Case("zero2", fault="hang", timeout=8),
    "full": Case("ddp", fault="full", every=2),
    **{f"inf-{s}": Case(s, fault="inf", every=2) for s in ("ddp", "zero2")},
    **{f"half-{s}": Case(s, stop=9) for s in ("single", "ddp", "zero1", "zero2", "zero3")},
}


def rows() -> list[Row]:
    """Each fills a pack; packs go to processes in turn."""
    rng = random.Random(0)
    return [
        Row(str(i), [rng.randrange(40) for _ in range(20)], [int(rng.random() < 0.7) for _ in range(20)])
        for i in range(14)
    ]


class Norms(L.Callback):
    """The gradient's norm before clipping, of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not strategy.is_zero(trainer):
            grads = [p.grad for part in pl_module.trained().values() for p in part.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, out: Any, batch: Any, idx: int) -> None:
        if strategy.is_zero(trainer) and (idx + 1) % trainer.accumulate_grad_batches == 0:
            self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))  # type: ignore[attr-defined]


def settings_of(case: Case, world: int) -> Settings:
    stage = int(case.strategy[4]) if case.strategy.startswith("zero") else 0
    chosen = StrategyConfig(
        case.strategy if world > 1 or stage else "single",
        timeout=case.timeout,
        deepspeed=(case.deepspeed or {"zero_optimization": ZERO[stage]}) if stage else None,
    )
    return Settings(
        TrainerConfig(
            max_steps=case.steps,
            devices=world,
            accumulate=case.accumulate,
            log_every=1,
            checkpoint_every=case.every,
            skip_nonfinite=int(case.fault == "inf" and not stage),
        ),
        chosen,
        OptimizerConfig(lr=case.lr, weight_decay=0.01, clip=case.clip, clip_scope="global"),
        SchedulerConfig(warmup=0.2),
        torch.optim.AdamW,
    )


def base_in(folder: Path) -> Path:
    if not (folder / "base" / "config.json").exists() and processes.is_first():
        model = create.llama(SHAPE, None, seed=0)
        model.save_pretrained(folder / "base.tmp")
        (folder / "base.tmp").rename(folder / "base")
    if processes.place().world > 1:
        torch.distributed.barrier()
    return folder / "base"


class Masked(RowsModule):
    """The second process's packs teach nothing; one process alone finds the same ones blank."""

    def steps(self) -> Any:
        return _Blank(super().steps())


class _Blank(torch.utils.data.Dataset):
    def __init__(self, steps: Any) -> None:
        self.steps, self.store = steps, steps.store

    def __getitem__(self, m: int) -> Any:
        batch = self.steps[m]
        if self.steps.world == 1:
            batch.mask_BT[1::2] = 0
        elif self.steps.rank == 1:
            batch.mask_BT.zero_()
        return batch


def train(folder: Path, name: str, run: str | None = None, watch: processes.Watch | None = None) -> dict[str, Any]:
    """Runs the case in FOLDER/run, from where that stopped."""
    case, world = CASES[name], processes.place().world
    settings = settings_of(case, world)
    path = str(base_in(folder))
    parts = ["head", *(["base"] if case.head == "medusa2" else [])]
    engine = strategy.engine_config(settings, 4 // world // case.accumulate, parts)
    cutter = strategy.pieces(settings, engine)
    base: BaseLM = load(path) if cutter is None else pieces.load(path, cutter)
    before = base.weights_sha256()
    if case.head == "medusa2":
        fit.new_adapter(base, LORA, 3)
    kind, config = HEADS[case.head]
    head = fit.new_head(kind, config, "head", base, 3, torch.ones(40))
    run_dir = folder / (run or name)
    layout: dict[str, Any] = {
        "length": LENGTH,
        "batch_size": 4 // world // case.accumulate,
        "accumulate": case.accumulate,
        "horizon": head.horizon,
        "seed": 3,
    }

    def serve(start: int, stop: int) -> RowsModule:
        kind = Masked if case.masked else RowsModule
        return kind(rows(), start=start, stop=stop, measured=rows()[:3], **layout)

    norms = Norms()
    more: list[Any] = [norms]
    if case.stop is not None:
        more.append(Stop(case.stop))
    if case.fault == "hang":
        more.append(Hang(folder / "hanging"))
    if case.fault == "full":
        checkpoint.save = full  # type: ignore[assignment]
    if case.fault == "inf" and processes.place().rank == 1:
        head.loss = infinite(head.loss, call=4 * case.accumulate)  # type: ignore[method-assign]
    with contextlib.suppress(Interrupted):
        fit.fit(
            base,
            {"head": head},
            serve,
            run_dir=run_dir,
            steps=case.steps,
            seed=3,
            settings=settings,
            ties={"base": before},
            validate_every=7,
            more=more,
            deepspeed=engine,
            watch=watch,
        )
    weights: list[Any] = [None] * world
    if world > 1:
        torch.distributed.all_gather_object(weights, tensors_sha256(head.state_dict()))
        assert len(set(weights)) == 1, "the processes hold other weights"
    result = {"norms": norms.norms, "base": [before, base.weights_sha256()]}
    if cutter is not None:
        result["local"] = _local(base)
    if processes.is_first():
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        result["losses"] = [line["train/head/loss"] for line in lines if "train/head/loss" in line]
        result["validation"] = [v for line in lines if (v := line.get("validation/head/loss")) is not None]
        tensors = {k: v.detach().clone().contiguous() for k, v in head.state_dict().items()}
        if base.adapter is not None:
            tensors |= {f"adapter.{k}": v.clone() for k, v in base.adapter.weights.items()}
        save_file(tensors, folder / f"{run or name}.safetensors")
        (folder / f"{run or name}.json").write_text(json.dumps(result))
    return result


def _local(base: BaseLM) -> int:
    """Numbers of the base's blocks that this process holds."""
    found = [p for block in base._layers for n, p in block.named_parameters() if "lora_" not in n]
    return sum(p.ds_tensor.numel() for p in found)  # type: ignore[attr-defined]


class Stop(L.Callback):
    """A signal to the first process in the middle of a step; the others learn of it at its end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, idx: int) -> None:
        if (
            trainer.is_global_zero
            and pl_module.done(idx) == self.step - 1
            and idx % trainer.accumulate_grad_batches == 0
        ):
            os.kill(os.getpid(), signal.SIGUSR1)


class Hang(L.Callback):
    """The second process sleeps in step 4."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, idx: int) -> None:
        if trainer.global_rank == 1 and pl_module.done(idx) == 4:
            self.sign.touch()
            time.sleep(600)


def infinite(loss: Any, call: int) -> Any:
    """A head's loss with an infinite constant in one call."""
    calls = [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        out = loss(*args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            out.sum = out.sum + float("inf")
        return out

    return called


def full(folder: Path, step: int, *args: Any, **kwargs: Any) -> Path:
    if step > 4:
        raise ResourceError("No space left on the test's disk")
    return save(folder, step, *args, **kwargs)


save = checkpoint.save


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    zero.library("cpu")
    timeout = min(CASES[name.partition("@")[0]].timeout for name in names)
    try:
        for name in names:
            with processes.joined("cpu", timeout, alone=True) as watch:
                case, _, run = name.partition("@")
                train(folder, case, run or None, watch)
    except DraftsmithError as e:
        if "TRACE" in os.environ:
            traceback.print_exc()
        print(f"rank {processes.place().rank} ends by {type(e).__name__}: {e}", flush=True)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
