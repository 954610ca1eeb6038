"""draftsmith bench_data: how fast rows are answered, encoded and packed, each beside its plain counterpart."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare
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
    own.apply()
    from draftsmith.data.prompts import PromptsConfig, make_up

    base = prepare.load_base(base_config, own.device)
    records = make_up(PromptsConfig(synthetic=own.prompts, seed=77))
    told: dict[str, Any] = {
        "answering": _answering(base, records, own),
        "encoding": _encoding(base, records, own),
        "packing": _packing(own),
    }
    a, e, p = told["answering"], told["encoding"], told["packing"]
    prepare.say(
        f"answering  together {a['together']:.1f} rows/s, one by one {a['alone']:.1f}: {a['ratio']:.1f}x,"
        f" {a['tokens']:,} tokens compared, the same"
    )
    prepare.say(f"encoding   {e['rows']:,.0f} chats/s, {e['tokens']:,.0f} tokens/s (template and mask)")
    prepare.say(
        f"packing    {p['full']:.1%} full, {p['rows']:,.0f} rows/s (mean {p['mean']:.0f} of {own.length} tokens)"
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


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def main() -> None:
    config.command("bench_data", run)


if __name__ == "__main__":
    main()
