"""Training steps of several configurations, timed beside each other and measured each in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from draftsmith import artifacts, capture, config, prepare, stored, supply, train
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ResourceError
from draftsmith.training.settings import Settings

if TYPE_CHECKING:
    import lightning as L

    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head

WARM = 1  # micro-batches that are not counted
PEAK = "peak.json"
ANSWERED = 64  # prompts


class Steps:
    """The training step of one configuration of draftsmith bench, ready to be run again and again."""

    def __init__(self, cfg: DictConfig, bases: dict[str, BaseLM]) -> None:
        self.cfg, self.settings = cfg, Settings.of(cfg)
        self.data = config.typed(cfg.data, DataConfig, "data")
        wanted = config.typed(cfg.base, prepare.BaseConfig, "base")
        key = artifacts.fingerprint(cfg.base)
        if key not in bases:
            bases[key] = prepare.load_base(wanted, "cuda" if self.settings.trainer.accelerator == "gpu" else "cpu")
        self.base = bases[key]
        self.chosen = train.heads_of(cfg)
        self.whole = self.data.random is not None
        self.scratch: Any = None if cfg.get("capture") is None else tempfile.TemporaryDirectory()
        if self.scratch is not None:
            self.data = self._captured(Path(self.scratch.name) / "store")
        self.rows = train.rows_for(self.data, self.base)
        skip_masked = self.settings.loss.skip_masked
        self.store = stored.of(self.data, self.base, self.heads(), self.rows, skip_masked=skip_masked)
        self.batch_size = self._batch_size()

    def heads(self) -> dict[str, Head]:
        """As they start."""
        from draftsmith.training.fit import new_head

        return {n: new_head(kind, own, n, self.base, self.cfg.seed) for n, (kind, own) in self.chosen.items()}

    def _captured(self, out: Path) -> DataConfig:
        """The same rows, from a store of what these heads read."""
        rows = supply.rows_of(self.data, self.base)
        made = config.compose("capture", [f"rows={rows}", f"out={out}", *self.cfg.capture])
        made.base, made.heads, made.threads = self.cfg.base, self.cfg.heads, self.cfg.trainer.threads
        capture.run(made)
        return dataclasses.replace(self.data, path=str(out), sources={}, prompts=None, random=None)

    def _batch_size(self) -> int:
        """Sequences per step: all of random rows; of others as many tokens as data.batch_size packed ones hold."""
        from draftsmith.data.module import Steps as Stream

        def sequences(packing: bool) -> int:
            how: dict[str, Any] = {"length": self.data.length, "accumulate": 1, "horizon": 1, "seed": self.cfg.seed}
            stream = Stream(self.rows.training, batch_size=1, weights_N=self.rows.weights_N, packing=packing, **how)
            return len(stream.packs(0))

        if self.whole:
            return sequences(self.data.packing)
        if self.data.packing:
            return self.data.batch_size
        return max(1, round(self.data.batch_size * sequences(False) / sequences(True)))

    def run(self, steps: int, meter: L.Callback) -> None:
        """Trains new heads for so many steps and leaves nothing but what the meter saw."""
        from draftsmith.data.module import RowsModule
        from draftsmith.training.fit import fit

        heads, seed = self.heads(), self.cfg.seed
        layout: dict[str, Any] = {
            "length": self.data.length,
            "batch_size": self.batch_size,
            "accumulate": self.settings.trainer.accumulate,
            "horizon": max(head.horizon for head in heads.values()),
            "seed": seed,
            "weights_N": self.rows.weights_N,
            "packing": self.data.packing,
            "store": self.store,
        }

        def serve(start: int, stop: int) -> RowsModule:
            return RowsModule(self.rows.training, start=start, stop=stop, **layout)

        with tempfile.TemporaryDirectory() as scratch:
            told: dict[str, Any] = {"run_dir": Path(scratch), "seed": seed, "settings": self.settings, "ties": {}}
            fit(self.base, heads, serve, steps=steps, more=[meter], **told)

    def time(self, *, floor: bool) -> dict[str, Any]:
        """StepTimer's result over trainer.max_steps steps."""
        from draftsmith.training.timing import StepTimer

        trainer, timer = self.settings.trainer, StepTimer(WARM, alone=floor)
        self.run((trainer.max_steps or 1) + WARM + 1, timer)
        return timer.result(trainer.log_every * trainer.accumulate)

    def peak(self) -> int:
        """Bytes that a step takes beside what is held anyway."""
        from draftsmith.training.timing import PeakMeter

        meter = PeakMeter(WARM)
        self.run(WARM + 2, meter)  # the last step saves a checkpoint, which is no part of one
        return meter.extra


def timed(
    variants: Mapping[str, DictConfig], repeats: int, seed: int, floors: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
    """name -> a StepTimer's result per repeat; in each repeat every variant has its turn, in random order. floors: of
    which the base's forward alone is timed too."""
    bases: dict[str, Any] = {}
    ready = {name: Steps(cfg, bases) for name, cfg in variants.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    rng = random.Random(seed)
    for number in range(repeats):
        for name in rng.sample(list(ready), len(ready)):
            found[name].append(ready[name].time(floor=name in floors))
        prepare.say(
            f"run {number + 1} of {repeats}: " + ", ".join(f"{n} {r[-1]['step_ms']:.0f} ms" for n, r in found.items())
        )
    return found


def answering(cfg: DictConfig, repeats: int) -> list[float]:
    """How many times as many tokens per CPU-second the base writes with ANSWERED prompts at a time as with one."""
    from draftsmith.data import chat
    from draftsmith.data.prompts import PromptsConfig, make_up

    base = prepare.load_base(config.typed(cfg.base, prepare.BaseConfig, "base"))
    asked = make_up(PromptsConfig(synthetic=ANSWERED, seed=77))
    ids = [chat.prompt_ids(base.tokenizer, r.messages, r.where) for r in asked]
    base.answer(ids[:2], max_new_tokens=4)

    def rate(some: Sequence[Sequence[int]], batch_size: int) -> float:
        began = time.process_time()
        written = sum(map(len, base.answer(some, max_new_tokens=96, batch_size=batch_size)))
        return written / (time.process_time() - began)

    return [rate(ids, ANSWERED) / rate(ids[: ANSWERED // 4], 1) for _ in range(repeats)]


def peak_of(cfg: DictConfig) -> int:
    """`Steps.peak` of a configuration in a process of its own, which holds nothing else and gives large blocks back."""
    with tempfile.TemporaryDirectory() as folder:
        child = cfg.copy()
        child.measure, child.run_dir = True, folder
        with open_dict(child):
            child.pop("figures", None)
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        with config.as_job(child, "bench") as arguments:
            done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ResourceError(
                f"bench: the process that measures memory ended with {done.returncode}: {done.stderr[-500:]}"
            )
        return int(artifacts.read_json(Path(folder) / PEAK)["extra"])
