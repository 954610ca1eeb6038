"""Trains heads on a base, from wherever the run directory says it stopped."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from draftsmith import artifacts, room
from draftsmith.contracts import BaseView, Batch, Head
from draftsmith.errors import ConfigError, DataError, Diverged, Interrupted, NumericsError
from draftsmith.training import callbacks, checkpoint, nonfinite, processes, strategy
from draftsmith.training.clock import Clock
from draftsmith.training.module import TrainModule, captured, rekeyed
from draftsmith.training.profiling import profiled
from draftsmith.training.progress import Progress
from draftsmith.training.settings import BESIDE, TIED, Settings
from draftsmith.training.tracking import Tracker


def fit(
    base: BaseView,
    heads: Mapping[str, Head],
    data: Callable[[int, int], L.LightningDataModule],
    *,
    run_dir: Path,
    steps: int,
    seed: int,
    settings: Settings,
    ties: Mapping[str, str],
    validate_every: int | None = None,
    more: Sequence[L.Callback] = (),
    deepspeed: Mapping[str, Any] | None = None,
    watch: processes.Watch | None = None,
    tracker: Tracker | None = None,
    loose: Collection[str] = (),
    begin: Callable[[int], None] | None = None,
) -> L.Trainer:
    """Runs optimiser steps up to `steps`; the heads hold the result. data(start, stop) serves the steps.
    ties: fingerprints of base and rows; a checkpoint made with others is refused (DataError). validate_every: steps
    between measurements of the rows that are not learned; None: there are none. deepspeed: strategy.engine_config's.
    watch: told how far this process has come. tracker: given the lines of metrics.jsonl; who made it closes it.
    loose: ties that a checkpoint need not share. begin: called by the first process, with the step it goes on after.

    Raises Interrupted after a signal (a checkpoint was saved), NumericsError for a gradient that is not finite.
    """
    trainer = settings.trainer
    folder = run_dir / "checkpoints"
    resume, skipped = _resume(folder, ties, loose, {**heads, **({"base": base.adapter} if learns(base) else {})})
    before = processes.by_first(lambda: _left_out(run_dir, resume.step if resume else 0))
    watched = nonfinite.Nonfinite(run_dir, trainer.skip_nonfinite, before)
    module = TrainModule(base, heads, settings=settings, steps=steps, seed=seed, resume=resume, nonfinite=watched)
    tracker, clock = tracker if processes.is_first() else None, Clock()
    checkpoints = callbacks.Checkpoints(
        folder, trainer.checkpoint_every, trainer.keep, ties, clock, lambda: tracker.kept if tracker else {}
    )
    watching = [
        *([] if watch is None else [callbacks.Following(watch)]),
        clock,
        *([] if validate_every is None else [callbacks.Validation(validate_every, clock)]),
        callbacks.Metrics(run_dir / "metrics.jsonl", clock, tracker.line if tracker else None),
        Progress(clock),
        checkpoints,
        callbacks.Events(run_dir / "events.jsonl", clock),
        *more,
    ]
    engine = _engine(settings, deepspeed or {}, steps - module.start, [*watching, *profiled(run_dir, trainer.profile)])
    if resume:
        processes.by_first(lambda: checkpoint.rotate(folder, module.start, trainer.keep))
    processes.by_first(lambda: _prepare(run_dir, folder, module.start, steps, skipped, begin))
    if tracker:
        tracker.begin(resume.tracked if resume else {}, module.start)
    if module.start < steps:
        with checkpoints.listening(), _room(module.whereabouts, lambda: module.shape, trainer.accumulate):
            engine.fit(module, datamodule=data(module.start, steps))
    elif resume:
        checkpoint.restore(resume, module.trained(), processes.spread)
    if (at := checkpoints.stopped_at) is not None:
        raise Interrupted(f"stopped by a signal after step {at} of {steps}, checkpoint saved; the same command resumes")
    return engine


def _left_out(run_dir: Path, start: int) -> int:
    """How many steps up to `start` were left out; what later ones left in the file is cut off."""
    path = run_dir / nonfinite.FILE
    callbacks.truncate(path, start)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _prepare(
    run_dir: Path, folder: Path, start: int, steps: int, skipped: Sequence[str], begin: Callable[[int], None] | None
) -> None:
    """Tells where the run goes on, and cuts metrics.jsonl there."""
    print("".join(f"warning: {line}\n" for line in skipped), end="", flush=True)
    if start:
        print(f"resuming after step {start} of {steps}", flush=True)
    with artifacts.disk(run_dir, "the run"):
        folder.mkdir(parents=True, exist_ok=True)
        callbacks.truncate(run_dir / "metrics.jsonl", start)
    if begin is not None:
        begin(start)


def _resume(
    folder: Path, ties: Mapping[str, str], loose: Collection[str], parts: Mapping[str, Any]
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if it belongs to this base, these rows and these heads, and what was passed over:
    what the first process finds, which alone holds the tensors."""

    first = processes.from_first(dict(ties))

    def look() -> tuple[checkpoint.Checkpoint | None, list[str]]:
        apart = [name for name in first if ties.get(name) != first[name]]
        if apart:
            raise DataError(f"{' and '.join(apart)}: other than the first process has; give every node the same files")
        if not processes.is_first():
            return None, []
        resume, skipped = checkpoint.load_last(folder)
        apart = [name for name, value in ties.items() if resume and resume.ties.get(name) != value]
        if changed := [name for name in apart if name not in loose]:
            keys = sorted({key for name in changed for key in TIED.get(name, BESIDE)})
            raise DataError(
                f"{folder}: its checkpoint was trained on other {' and '.join(changed)} than there are now; bring them"
                f" back, choose another run_dir, or go on with these by resume.allow=[{','.join(keys)}]"
            )
        skipped += [f"{name}: other than the checkpoint was trained on, as resume.allow lets it" for name in apart]
        if resume:
            checkpoint.check(resume, parts)
        return resume, skipped

    resume, skipped = processes.together(look)
    told = processes.from_first(resume and (resume.step, resume.ties, resume.updates))
    if told and resume is None:
        resume = checkpoint.Checkpoint(told[0], told[1], {}, told[2])
    return resume, skipped


def unchanged(base: Any, before: str, after: str, run_dir: Path) -> None:
    """NumericsError unless the base's weights are, by their hashes, what they were before training, and nothing of them
    asks for gradients. What was trained meanwhile is put aside, so that nobody goes on from it."""
    learned = {id(p) for p in base.adapter.parameters()} if base.adapter else set[int]()
    asking = [name for name, p in base.model.named_parameters() if p.requires_grad and id(p) not in learned]
    if after == before and not asking:
        return
    aside = run_dir / "checkpoints.drifted"
    if processes.is_first():
        with artifacts.disk(aside, "what was trained"):
            shutil.rmtree(aside, ignore_errors=True)
            (run_dir / "checkpoints").rename(aside)
    why = f"{asking[0]} asks for gradients" if asking else "its weights changed during training"
    raise NumericsError(
        f"base: {why}, as nothing of a frozen base may; nothing was exported, and the checkpoints are put aside in"
        f" {aside}: mend what reaches into the base, and the same command begins anew"
    )


def learns(base: BaseView) -> bool:
    return base.adapter is not None and any(p.requires_grad for p in base.adapter.parameters())


def _engine(settings: Settings, deepspeed: Mapping[str, Any], steps: int, watching: Sequence[L.Callback]) -> L.Trainer:
    """Lightning's loop with everything of its own that we do ourselves switched off."""
    _quiet_lightning()
    engine = L.Trainer(
        **strategy.arguments(settings, deepspeed),
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        gradient_clip_val=None,
        callbacks=list(watching),
    )
    # Its own handlers end by exit 0 without a checkpoint, and take SLURM's signals; ours (Checkpoints) are there.
    engine._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return engine


def new_head(
    kind: type[Head],
    config: Any,
    name: str,
    base: BaseView,
    seed: int,
    counts_V: torch.Tensor | None = None,
    beside: Any = None,
) -> Head:
    """A head as it starts: random where it is random, from (seed, name) alone; the rest from the base, from what
    stands beside it and from how often each token is learned."""
    with rekeyed(seed, "initialisation", name):
        config = completed(name, kind, config, base, beside)
        try:
            head = kind(config, base.spec)
        except ConfigError as e:
            raise ConfigError(f"heads.{name}: {e}") from None
        head.attach(beside)
        head.initialise(base, counts_V)
    return head.to(base.lm_head_weight.device)


def completed(name: str, kind: type[Head], config: Any, base: BaseView, beside: Any) -> Any:
    """The head's config with all that follows from base and company; ConfigError names the head."""
    try:
        return kind.completed(config, base.spec, beside)
    except ConfigError as e:
        raise ConfigError(f"heads.{name}: {e}") from None


def new_adapter(base: Any, settings: Any, seed: int) -> None:
    """Gives the base an adapter that changes nothing yet, from the seed alone."""
    with rekeyed(seed, "initialisation", "base"):
        base.add_adapter(settings)


def rehearse(base: BaseView, heads: Mapping[str, Head], batch: Batch, accumulate: int = 1) -> None:
    """One micro-batch forward and backward before step 1, so that what cannot work fails now. Gradients are
    thrown away, and the heads' weights are the same afterwards. accumulate: micro-batches of a step."""
    for name, head in heads.items():
        with _room(f"{name}, before step 1", lambda: batch.tokens_BT.shape, accumulate):
            seen = captured(base, head.needs, batch)
            out = head.loss(base, seen, batch)
            if not bool(torch.isfinite(out.sum)):
                raise Diverged(f"{name}: the first batch's loss is {out.sum.item()}; check base and rows")
            out.sum.backward()
        for part in (head, base.adapter):
            if part is not None:
                part.zero_grad(set_to_none=True)


def _room(where: str | Callable[[], str], shape: Callable[[], tuple[int, ...]], accumulate: int) -> Any:
    """OutOfMemory tells which step with which batch, and what is the same run in less. Of use where an allocation
    failed, so everything is asked for only then."""

    def told() -> str:
        rows, tokens = shape()
        return f"train: {where if isinstance(where, str) else where()}, a batch of {rows} x {tokens} tokens"

    def helps() -> str:
        rows, tokens = shape()
        now = f"data.length, now {tokens}"
        return room.halved(("data.batch_size", rows), now, ("trainer.accumulate", accumulate))

    return room.memory(told, helps)


def _quiet_lightning() -> None:
    """Hints about devices, loggers and workers that a user of ours cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*DeepSpeed handles gradient clipping internally.*",
        ".*`srun` command is available.*",
        ".*Experiment logs directory.*",  # a CSV tracker is given all earlier lines again
    ):
        warnings.filterwarnings("ignore", text)
