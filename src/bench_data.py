"""draftsmith bench_data: how fast rows are answered, encoded, packed and stored captures checked, each beside its plain
counterpart."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, room
from draftsmith.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.data.records import Record

SIGMA = 0.6  # of the lognormal lengths of chats


@dataclasses.dataclass(frozen=True)
class BenchDataConfig(prepare.MachineConfig):
    prompts: int = 192  # chats, made up
    alone: int = 32  # of them are also answered one by one
    max_new_tokens: int = 128
    batch_size: int = 64
    repeats: int = 3
    rows: int = 20_000  # row lengths drawn and packed
    mean: int = 1139  # tokens of a row, before the cut at `length`
    length: int = 2048
    store_rows: int = 512  # of a store of random captures, `width` numbers at each of its positions
    width: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ConfigError(f"{field.name}={value}: give at least 1")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Medians over interleaved repeats, printed and written to bench_data.json. NumericsError if answering together
    gives other greedy tokens than one by one in fp32."""
    own = config.typed(cfg.bench, BenchDataConfig, "bench")
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    folder = config.run_dir(cfg, "bench_data")
    room.ready(folder, "run_dir")
    own.apply()
    from draftsmith.data.prompts import PromptsConfig, make_up

    base = prepare.load_base(base_config, own.device)
    records = make_up(PromptsConfig(synthetic=own.prompts, seed=77))
    told: dict[str, Any] = {
        "answering": _answering(base, records, own),
        "encoding": _encoding(base, records, own),
        "packing": _packing(own),
        "checking": _checking(own, folder),
    }
    a, e, p, c = told["answering"], told["encoding"], told["packing"], told["checking"]
    prepare.say(
        f"answering  together {a['together']:.1f} rows/s, one by one {a['alone']:.1f}: {a['ratio']:.1f}x,"
        f" {a['tokens']:,} tokens compared, the same"
    )
    prepare.say(f"encoding   {e['rows']:,.0f} chats/s, {e['tokens']:,.0f} tokens/s (template and mask)")
    prepare.say(
        f"packing    {p['full']:.1%} full, {p['rows']:,.0f} rows/s (mean {p['mean']:.0f} of {own.length} tokens)"
    )
    for kind in ("cold", "warm"):
        read, both, check = (c[kind][key] for key in ("read", "checked", "check"))
        prepare.say(
            f"checking   {c['bytes'] / 1e6:,.0f} MB, {kind}: {check:.2f} s alone; an epoch's read {read:.2f} s, with"
            f" the check before it {both:.2f} s: {both / read - 1:+.0%}"
        )
    artifacts.write_json(folder / "bench_data.json", {**told, "settings": dataclasses.asdict(own)})
    if base_config.dtype == "float32" and a["different"]:
        raise NumericsError(f"answering: {a['different']} of {own.alone} rows have other tokens than one by one")
    return told


def _answering(base: BaseLM, records: list[Record], own: BenchDataConfig) -> dict[str, Any]:
    from draftsmith.data import chat

    ids = [chat.prompt_ids(base.tokenizer, r.messages, r.where) for r in records]
    new = own.max_new_tokens
    base.answer(ids[:4], max_new_tokens=4)
    together: list[float] = []
    alone: list[float] = []
    answers: list[list[int]] = []
    singles: list[list[int]] = []
    for _ in range(own.repeats):
        seconds, answers = _timed(lambda: base.answer(ids, max_new_tokens=new, batch_size=own.batch_size))
        together.append(len(ids) / seconds)
        seconds, singles = _timed(lambda: [base.generate([i], max_new_tokens=new)[0] for i in ids[: own.alone]])
        alone.append(own.alone / seconds)
    return {
        "together": statistics.median(together),
        "alone": statistics.median(alone),
        "ratio": statistics.median(t / a for t, a in zip(together, alone, strict=True)),
        "tokens": sum(map(len, singles)),
        "different": sum(a != b for a, b in zip(answers, singles, strict=False)),
    }


def _encoding(base: BaseLM, records: list[Record], own: BenchDataConfig) -> dict[str, float]:
    from draftsmith.data import chat

    chats = [[*r.messages, {"role": "assistant", "content": r.messages[-1]["content"] * 3}] for r in records]
    rates = []
    for _ in range(own.repeats):
        seconds, made = _timed(lambda: [chat.encode(base.tokenizer, c, "bench", eos_ids=base.eos_ids) for c in chats])
        rates.append((len(chats) / seconds, sum(len(m.ids) for m in made) / seconds))
    return {"rows": statistics.median(r for r, _ in rates), "tokens": statistics.median(t for _, t in rates)}


def _packing(own: BenchDataConfig) -> dict[str, float]:
    import numpy as np

    from draftsmith.data.pack import epoch_packs

    rng = random.Random(0)
    drawn = [rng.lognormvariate(0, SIGMA) for _ in range(own.rows)]
    scale = own.mean * own.rows / sum(drawn)
    lengths_N = np.array([max(1, min(own.length, round(d * scale))) for d in drawn])
    seconds = []
    for epoch in range(own.repeats):
        once, packs = _timed(lambda: epoch_packs(lengths_N, np.ones(own.rows), own.length, 0, epoch))  # noqa: B023
        seconds.append(once)
    full = float(lengths_N.sum()) / (len(packs) * own.length)
    return {"full": full, "rows": own.rows / statistics.median(seconds), "mean": float(lengths_N.mean())}


def _checking(own: BenchDataConfig, folder: Path) -> dict[str, Any]:
    """Seconds for a store's first epoch without and with the check of its manifest before it, and for the check alone;
    with its pages on the disk (cold) and in memory (warm)."""
    import numpy as np
    import torch

    from draftsmith.data import store
    from draftsmith.data.module import Steps
    from draftsmith.data.rows import Row, Rows

    lengths = np.random.default_rng(0).integers(100, 257, own.store_rows).tolist()
    rows = Rows.of([Row(str(n), [1] * k, [1] * k) for n, k in enumerate(lengths)])
    kept = store.Kept([], True, None, "bf16", False, None, 64, own.width)
    with artifacts.publish(folder / "store", kind="store") as made:
        for number in range(-(-own.store_rows // kept.shard_rows)):
            first, last = number * kept.shard_rows, min((number + 1) * kept.shard_rows, own.store_rows)
            final_PD = torch.randn(sum(lengths[first:last]), own.width).bfloat16()
            artifacts.write_tensors(made / store.shard_name(number), {"final": final_PD})

    def epoch() -> None:
        opened = store.Store(folder / "store", rows, kept, torch.float32)
        steps = Steps(rows, length=256, batch_size=8, accumulate=1, horizon=1, seed=0, store=opened)
        for m in range(int(steps.total(1)) // steps.packs_per_step):
            steps[m]

    def seconds(check: bool, read: bool, cold: bool) -> float:
        for path in (folder / "store").iterdir() if cold else ():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        if check:
            store.verify(folder / "store")
        if read:
            epoch()
        return time.perf_counter() - began

    kinds = {"read": (False, True), "checked": (True, True), "check": (True, False)}
    found: dict[str, Any] = {"bytes": sum(p.stat().st_size for p in (folder / "store").iterdir())}
    for state in ("cold", "warm"):
        seconds(True, True, False)
        times = [{k: seconds(*what, state == "cold") for k, what in kinds.items()} for _ in range(own.repeats)]
        found[state] = {k: statistics.median(t[k] for t in times) for k in kinds}
    shutil.rmtree(folder / "store")
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def main() -> None:
    config.command("bench_data", run)


if __name__ == "__main__":
    main()
