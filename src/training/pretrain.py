"""Pretraining of the small base that is made on this machine: next-token cross-entropy over packed blocks.

    metrics = pretrain(model, blocks_NT, config=PretrainConfig(steps=100, batch_size=8, length=512), seed=0)

Muon turns the matrices of the blocks, AdamW the rest (embeddings, norms); in minutes of CPU time that beats
AdamW alone by far. For copying from its prompt, a tiny base needs both a mask (loss on answers only) and
documents that do not see each other (`bos`): without them it learns the wording of an answer and invents
the rest. The number of steps is fixed, never the time, and one thread computes, so the weights depend on
the seed and not on how many cores happen to be there.

Shape suffixes: N blocks, T positions, B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning import pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from draftsmith.errors import ConfigError, NumericsError

Precision = Literal["32-true", "bf16-mixed"]
IGNORED = -100


@dataclass(frozen=True)
class PretrainConfig:
    """length: tokens per row. warmup: steps up to the full learning rates, which then fall to zero linearly.

    lr_matrix is Muon's, lr_rest AdamW's. print_every: steps between progress lines on stderr, 0 = none.
    threads: 0 leaves torch's number as it is, but then the weights depend on it.
    """

    steps: int
    batch_size: int
    length: int
    lr_matrix: float = 0.02
    lr_rest: float = 0.01
    warmup: int = 10
    precision: Precision = "32-true"
    threads: int = 1
    print_every: int = 50

    def __post_init__(self) -> None:
        for key, least in {
            "steps": 1,
            "batch_size": 1,
            "length": 2,
            "warmup": 0,
            "threads": 0,
            "print_every": 0,
        }.items():
            if getattr(self, key) < least:
                raise ConfigError(f"training.{key}: {getattr(self, key)} is below {least}")
        for key in ("lr_matrix", "lr_rest"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"training.{key}: {getattr(self, key)} is not a positive number")
        if self.warmup >= self.steps:
            raise ConfigError(f"training.warmup: {self.warmup} leaves nothing of {self.steps} steps; lower it")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"training.precision: {self.precision!r} is not one of {get_args(Precision)}")

    def rate(self, step: int) -> float:
        """Factor on both learning rates in step 0, 1, ... steps - 1."""
        return min((step + 1) / (self.warmup + 1), (self.steps - step) / (self.steps - self.warmup))


class Pretrain(pl.LightningModule):
    """One model, two optimizers, one loss. `losses` holds each step's loss in nats per token."""

    def __init__(self, model: nn.Module, config: PretrainConfig, bos: int | None) -> None:
        super().__init__()
        self.model = model
        self.bos = bos
        self.config = config
        self.losses: list[float] = []
        self.automatic_optimization = False  # Lightning steps only one optimizer by itself

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens_BT, mask_BT = batch
        targets_BT = tokens_BT.masked_fill(~mask_BT, IGNORED).roll(-1, dims=1)
        targets_BT[:, -1] = IGNORED
        extra = {} if self.bos is None else {"position_ids": restarting_positions(tokens_BT, self.bos)}
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False, **extra).logits.float()
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise NumericsError(f"pretrain: the loss is {self.losses[-1]} in step {batch_idx}; lower training.lr_*")
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.config.rate(batch_idx)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        heads = {id(p) for name, p in self.model.named_parameters() if name.startswith("lm_head")}
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and id(p) not in embeddings | heads]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        lr_matrix, lr_rest = self.config.lr_matrix, self.config.lr_rest
        return [
            torch.optim.Muon([{"params": matrices, "initial_lr": lr_matrix}], lr=lr_matrix, weight_decay=0.0),
            torch.optim.AdamW(
                [{"params": rest, "initial_lr": lr_rest}], lr=lr_rest, betas=(0.9, 0.95), weight_decay=0.0
            ),
        ]


def restarting_positions(tokens_BT: Tensor, bos: int) -> Tensor:
    """Positions [B, T] that are 0 at the start of each row and at each bos, and count on between them."""
    at_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    return at_BT - torch.where(tokens_BT == bos, at_BT, 0).cummax(dim=1).values


class Progress(pl.Callback):
    """A plain line on stderr now and then."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = batch_idx + 1
        if self.every and (done % self.every == 0 or done == module.config.steps):
            seconds = time.perf_counter() - self.start
            line = f"pretrain: step {done}/{module.config.steps}, loss {module.losses[-1]:.3f}, {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)


def batches(count: int, config: PretrainConfig, seed: int) -> Iterator[list[int]]:
    """Indices of the blocks in each step: epochs, each shuffled anew. A function of the arguments alone."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(config.steps):
        while len(waiting) < config.batch_size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: config.batch_size]
        del waiting[: config.batch_size]


def pretrain(
    model: nn.Module,
    tokens_NT: Tensor,
    *,
    config: PretrainConfig,
    seed: int,
    mask_NT: Tensor | None = None,
    bos: int | None = None,
) -> dict[str, float]:
    """Trains `model` in place on the CPU and leaves it in eval mode, on the torch threads there were before.

    model: called as model(input_ids=[B, T], use_cache=False).logits; its initial weights are the caller's.
    tokens_NT: int64 [N, config.length]. mask_NT: bool, the same shape, True = learn to predict this token;
    None = all of them, but for the first of a block. bos: the token that opens a document; with it the model
    is also given position_ids that restart there, from which transformers' models conclude that documents do
    not see each other; None = they do.
    Returns loss (nats per learned token, mean of the last tenth of the steps), first_loss, steps, tokens and
    cpu_seconds (of this process). ConfigError if the blocks have another length, NumericsError as soon as
    the loss is not finite.
    """
    if tokens_NT.ndim != 2 or tokens_NT.shape[1] != config.length or not len(tokens_NT):
        raise ConfigError(f"training.length: {config.length} does not fit blocks of shape {list(tokens_NT.shape)}")
    mask_NT = torch.ones_like(tokens_NT, dtype=torch.bool) if mask_NT is None else mask_NT
    order = list(batches(len(tokens_NT), config, seed))
    loader = DataLoader(TensorDataset(tokens_NT, mask_NT), batch_sampler=order, generator=torch.Generator())
    module = Pretrain(model.train(), config, bos)
    threads, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(config.threads or threads)
    try:
        with _quiet():
            _trainer(config).fit(module, loader)
    finally:
        torch.set_num_threads(threads)
        model.eval()
    last = module.losses[-max(1, config.steps // 10) :]
    return {
        "loss": sum(last) / len(last),
        "first_loss": module.losses[0],
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.length,
        "cpu_seconds": time.process_time() - start,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints on workers, logging and idle accelerators: all of that is chosen here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _trainer(config: PretrainConfig) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=config.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[Progress(config.print_every)],
        plugins=[LightningEnvironment()],  # one process, whatever torchrun or Slurm says about the others
    )
