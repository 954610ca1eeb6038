"""Our side of scripts/bench_speculators.sh.

    draftsmith_step.py prepare FOLDER           base, head and rows for both sides; our loss and fp32 gradients
    draftsmith_step.py time FOLDER DTYPE FILE   writes JSON: CPU ms of our step, one thread
    draftsmith_step.py table FOLDER             what FOLDER/ours-*.json and theirs-*.json say

Shape and chats are those of conf/bench.yaml: 8B proportions, 16 packed chats. The head drafts three steps over a
quarter of the vocabulary, all steps weighing the same, as the peer's do by default. A plain loop, without Lightning
and without a loader, on both sides. What is timed here is Eagle3.loss as training calls it, clipping and AdamW.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Batch, Capture, Head
from draftsmith.data.module import Steps
from draftsmith.data.random_rows import made_up
from draftsmith.data.rows import Row
from draftsmith.data.settings import RandomConfig
from draftsmith.heads.eagle3 import Eagle3, Eagle3Config
from draftsmith.training.fit import new_head

SEED, WARM, STEPS = 0, 1, 4
LOG_EVERY = 10  # steps between metrics in conf/trainer; the peer has its own in every step
CONF = Path(__file__).parents[2] / "conf"


def head_config(vocab_size: int) -> Eagle3Config:
    return Eagle3Config(draft_vocab_size=vocab_size // 4, depth=3, decay=1.0)


def peers(name: str) -> str:
    """The peer's name of a parameter or buffer of ours."""
    return name.replace("midlayer.", "layers.0.")


def ours(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def load_base(folder: Path, dtype: torch.dtype) -> BaseLM:
    return BaseLM(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype))


def load_batch(folder: Path, name: str) -> Batch:
    return Batch(**load_file(folder / f"{name}.safetensors"))


def capture(base: BaseLM, head: Head, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, documents_BQ=batch.documents_BT)


def pack(rows: list[Row], length: int) -> Batch:
    """All rows as one step."""
    layout: dict[str, Any] = {"length": length, "accumulate": 1, "horizon": 4, "seed": SEED}
    return Steps(rows, batch_size=len(Steps(rows, batch_size=1, **layout).packs(0)), **layout)[0]


def likeliest(base: BaseLM, head: Head, batch: Batch) -> Tensor:
    """How often each token is the base's own choice for a token that counts. The draft vocabulary is chosen by this:
    on these random tokens no other choice would cover the base's, and our loss skips what is not covered."""
    logits_BTV = base.lm_head(torch.as_tensor(capture(base, head, batch).final))
    chosen_N = logits_BTV.argmax(-1)[batch.mask_BT.roll(-1, 1)]  # the position before each token that counts
    return chosen_N.bincount(minlength=base.spec.vocab_size)


@torch.no_grad()
def divergence(base: BaseLM, head: Head, batch: Batch) -> Tensor:
    """Theirs is the divergence from the base, ours the cross-entropy: the base's entropy, `floor`, lies between them.
    Both are thirty times the difference here, so they are subtracted in fp64."""
    base, head = base.in_float64(), copy.deepcopy(head).double()
    out = head.loss(base, capture(base, head, batch), batch)
    return (out.sum - out.metrics["floor"][0]) / out.count


def prepare(folder: Path) -> None:
    shape: Any = OmegaConf.to_container(OmegaConf.load(CONF / "base" / "like_llama31_8b.yaml").recipe.model)
    length = OmegaConf.load(CONF / "data" / "random.yaml").length
    create.llama(shape, None, SEED).save_pretrained(folder / "base")
    rows = made_up(RandomConfig(seed=SEED), length, shape["vocab_size"])
    longest = max(rows, key=lambda row: len(row.ids))
    batches = {"one": pack([longest], len(longest.ids)), "all": pack(rows, length)}
    for name, batch in batches.items():
        save_file({k: t for k, t in vars(batch).items() if t is not None}, folder / f"{name}.safetensors")

    base, config = load_base(folder, torch.float32), head_config(shape["vocab_size"])
    sketch = Eagle3(config, base.spec)
    rounded = load_base(folder, torch.bfloat16)
    counts_V = likeliest(base, sketch, batches["all"]) + likeliest(rounded, sketch, batches["all"])
    head = new_head(Eagle3, config, "eagle3", base, SEED, counts_V)
    save_file({peers(k): t.contiguous() for k, t in head.state_dict().items()}, folder / "head.safetensors")
    for name, batch in batches.items():
        head.zero_grad()
        out = head.loss(base, capture(base, head, batch), batch)
        (out.sum / out.count).backward()
        gradients = {peers(k): p.grad for k, p in head.named_parameters() if p.grad is not None}
        save_file({**gradients, "loss": divergence(base, head, batch)}, folder / f"{name}-ours.safetensors")


def cpu_time(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Medians in ms: the base's forward, and the rest of the step without and with metrics. dtype: the base's, and
    autocast's around the fp32 head."""
    torch.set_num_threads(1)
    base, batch = load_base(folder, dtype), load_batch(folder, "all")
    head = Eagle3(head_config(base.spec.vocab_size), base.spec)
    head.load_state_dict({ours(k): t for k, t in load_file(folder / "head.safetensors").items()})
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    spent: dict[str, list[float]] = {"base": [], "plain": [], "measured": []}
    for i in range(WARM + STEPS):
        start = time.process_time()
        seen = capture(base, head, batch)
        times = {"base": time.process_time() - start}
        for kind, measure in (("plain", False), ("measured", True)):
            start = time.process_time()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = head.loss(base, seen, batch, measure=measure)
            (out.sum / out.count).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            times[kind] = time.process_time() - start
        for kind, seconds in times.items() if i >= WARM else ():
            spent[kind].append(1e3 * seconds)
    found = {k: statistics.median(ms) for k, ms in spent.items()}
    return {**found, "step": found["plain"] + (found["measured"] - found["plain"]) / LOG_EVERY}


def table(folder: Path) -> None:
    """Every run, and the median of each column."""
    mine, theirs = (
        [json.loads(path.read_text()) for path in sorted(folder.glob(f"{side}-*.json"))] for side in ("ours", "theirs")
    )
    columns: dict[str, list[float]] = {
        "our base": [r["base"] for r in mine],
        "their base": [r["base"] for r in theirs],
    }
    for where, with_base in (("online", 1), ("stored", 0)):
        own = columns[f"{where}: ours"] = [with_base * r["base"] + r["step"] for r in mine]
        every = [with_base * r["base"] + r["measured"] for r in mine]
        full, frozen = ([with_base * r["base"] + r[kind] for r in theirs] for kind in ("step", "frozen"))
        columns[f"{where}: theirs"] = full
        columns[f"{where}: ratio"] = [a / b for a, b in zip(full, own, strict=True)]
        columns[f"{where}: ratio, ours with metrics in every step"] = [a / b for a, b in zip(full, every, strict=True)]
        columns[f"{where}: ratio, their lm_head frozen"] = [a / b for a, b in zip(frozen, own, strict=True)]
    width = max(map(len, columns))
    print(f"{'CPU ms per step, one thread':{width}}{'each run'.rjust(8 * len(mine))}    median")
    for name, values in columns.items():
        shown = [f"{v:8.2f}" if "ratio" in name else f"{v:8.0f}" for v in (*values, statistics.median(values))]
        print(f"{name:{width}}{''.join(shown[:-1])}  {shown[-1]}")


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "prepare":
        prepare(folder)
    elif verb == "time":
        Path(sys.argv[4]).write_text(json.dumps(cpu_time(folder, getattr(torch, sys.argv[3]))))
    elif verb == "table":
        table(folder)
    else:
        sys.exit(f"{verb}: say prepare, time or table")


if __name__ == "__main__":
    main()
