"""What forwards of the base cost by themselves: the yardstick of an engine that adds its own work to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from draftsmith.contracts import BaseView, Needs

FINAL = Needs(final=True)


def forwards(
    base: BaseView, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], size: int
) -> Callable[[], float]:
    """A pass that reads every prompt, then its text in pieces of `size` tokens, each with the lm_head, as decoding that
    accepts everything would; returns its seconds. The last piece may be shorter; the text's last token is not read."""
    device = base.lm_head_weight.device
    whole = [
        (torch.tensor([list(p)], device=device), torch.tensor([list(t)], device=device))
        for p, t in zip(prompts, texts, strict=True)
    ]

    clock = clock_of(device)

    @torch.no_grad()
    def work() -> float:
        began = clock()
        for prompt_BT, text_BT in whole:
            kv = base.new_kv()
            last = _read(base, prompt_BT, kv, 1)
            for start in range(0, text_BT.shape[1] - 1, size):
                piece_BQ = text_BT[:, start : min(start + size, text_BT.shape[1] - 1)]
                last = _read(base, piece_BQ, kv, piece_BQ.shape[1])
            float(last[0, -1, 0])  # an accelerator has ended too
        return clock() - began

    return work


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU-seconds of this process where one of its threads does the work, so that another's load does not count; on an
    idle machine they are wall time, which everything else counts."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _read(base: BaseView, tokens_BQ: Tensor, kv: object, last: int) -> Tensor:
    final_BQD = base.capture(FINAL, tokens_BQ, kv=kv).final  # type: ignore[arg-type]
    assert final_BQD is not None
    return base.lm_head(final_BQD[:, -last:])


def timed(works: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat of each work, interleaved, nobody always after the same one; each warms up once."""
    names = list(works)
    for name in names:
        works[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for again in range(repeats):
        turn = again % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(works[name]())
    return times
