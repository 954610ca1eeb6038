"""A base in small, of no weights of its own, on which heads rehearse a training step so that its memory can be told.

It is made of the blocks that heads share, whatever the family, because only the sizes of what a head makes of it count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from draftsmith import losses
from draftsmith.contracts import BaseSpec, Batch, Capture, Head
from draftsmith.heads.blocks import DecoderLayer
from draftsmith.targets import count_targets
from draftsmith.training.tracing import Estimate, Trace, estimated

FEW_ROWS = 16  # more are estimated from so many, equal ones from two
# B rows, T positions, D hidden size, F width of the MLP, H attention heads, V vocabulary, U a draft vocabulary
SMALL = {"T": 64, "D": 64, "F": 96, "H": 4, "V": 64}


class Shadow:
    """What heads may use of a base, random and small."""

    adapter = None
    lm_head_softcap = None
    lm_head_bias = None

    def __init__(self, spec: BaseSpec, dtype: torch.dtype, draft: int | None = None) -> None:
        """draft: the size of a draft vocabulary, outside of which the base then likes no token best."""
        self.spec = spec
        self._embed = nn.Embedding(spec.vocab_size, spec.hidden_size).to(dtype).requires_grad_(False)
        self._norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_eps).to(dtype).requires_grad_(False)
        self._head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False).to(dtype).requires_grad_(False)
        if draft is not None:
            self._head.weight[draft:] = 0
        self._layers = [DecoderLayer(spec).to(dtype).requires_grad_(False) for _ in range(spec.num_layers)]

    def tensors(self) -> list[Tensor]:
        return [p for part in (self._embed, self._norm, self._head, *self._layers) for p in part.parameters()]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self._embed(tokens_BT)

    def final_norm(self, hidden_BTD: Tensor) -> Tensor:
        return self._norm(hidden_BTD)

    def lm_head(self, final_BTD: Tensor) -> Tensor:
        return self._head(final_BTD)

    @property
    def lm_head_weight(self) -> Tensor:
        return self._head.weight

    def block_weights(self, layer: int) -> Mapping[str, Tensor]:
        return dict(self._layers[layer].named_parameters())

    def run_layers(
        self, hidden_BQD: Tensor, start: int, stop: int, *, positions_BQ: Tensor, mask_BQS: Any = None, kv: Any = None
    ) -> Tensor:
        for layer in range(start, stop):
            hidden_BQD = self._layers[layer](hidden_BQD, positions_BQ, mask_BQS, kv, layer)
        return hidden_BQD


@dataclass(frozen=True)
class Step:
    """A micro-batch: tokens per sequence, the share of positions that learn in each, and how it is computed."""

    length: int
    learned_B: Sequence[float]
    dtype: torch.dtype  # of the base
    bf16: bool  # whether heads compute in it
    plain: bool = False
    skip_masked: bool = True

    @property
    def learned(self) -> int:
        """Positions that a loss looks at."""
        return sum(round(share * self.length) if self.skip_masked else self.length for share in self.learned_B)


Kinds = Mapping[str, tuple[type[Head], Any]]  # name -> (class, its config, completed)


def of_step(kinds: Kinds, spec: BaseSpec, step: Step, company: BaseSpec | None = None) -> Estimate:
    """What the heads need in one micro-batch beside the base's captures: losses one after the other, then the backward
    pass. company: the companion that an auxiliary starts from."""
    equal = len(set(step.learned_B)) == 1
    learned_B = 2 * list(step.learned_B[:1]) if equal else list(step.learned_B[:FEW_ROWS])
    draft = [
        c.draft_vocab_size
        for _, c in kinds.values()
        if getattr(c, "draft_vocab_size", spec.vocab_size) < spec.vocab_size
    ]
    groups = spec.num_heads // spec.num_kv_heads
    heads = max(SMALL["H"], 2 * groups)
    wide_enough = 4 * heads * math.ceil(SMALL["D"] / (4 * heads))  # twice as many heads divide it too, evenly
    small = {**SMALL, "B": len(learned_B), "H": heads, "D": wide_enough} | ({"U": SMALL["V"] // 4} if draft else {})
    large = {
        "T": step.length,
        "D": spec.hidden_size,
        "F": spec.intermediate_size,
        "H": spec.num_heads,
        "V": spec.vocab_size,
        "B": len(step.learned_B),
        **({"U": max(draft)} if draft else {}),
    }
    wide = spec.num_heads * spec.head_dim / spec.hidden_size
    learned = step.learned
    # Of a loop over chunks two count: the last one's logits are there when the next one's are made. So a loop of three
    # stands for a longer one; of two the second is smaller.
    rows = learned if step.plain else losses.chunk_rows(large.get("U", spec.vocab_size))
    chunks = min(3, math.ceil(learned / rows))

    def work(sizes: Mapping[str, int]) -> Trace:
        own = _sized(spec, sizes, wide, groups)
        other = None if company is None else _sized(_beside(company, spec, sizes), {}, 1.0, 1)
        given = [learned_B[b % len(learned_B)] for b in range(sizes["B"])]
        in_small = replace(step, length=sizes["T"], learned_B=given)
        with losses.chunks_of(math.ceil(in_small.learned * max(1 / 3, min(1.0, rows / learned)))):
            return _rehearsed(kinds, own, other, sizes, in_small)

    return estimated(work, small, large, rows if chunks == 3 else None)


def _sized(spec: BaseSpec, sizes: Mapping[str, int], wide: float, groups: int) -> BaseSpec:
    if not sizes:
        return spec
    heads, size = sizes["H"], sizes["D"]
    return replace(
        spec,
        hidden_size=size,
        intermediate_size=sizes["F"],
        vocab_size=sizes["V"],
        num_heads=heads,
        num_kv_heads=heads // groups,
        head_dim=max(2, 2 * round(wide * size / heads / 2)),
        max_positions=2 * sizes["T"],
        rope_frequencies=[],
    )


def _beside(company: BaseSpec, spec: BaseSpec, sizes: Mapping[str, int]) -> BaseSpec:
    """The companion in the proportions that it has to the base."""
    heads = 2
    size = heads * 2 * max(1, round(sizes["D"] * company.hidden_size / spec.hidden_size / heads / 2))
    wide = max(1, round(sizes["F"] * company.intermediate_size / spec.intermediate_size))
    narrow: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": size // heads,
        "rope_frequencies": [],
    }
    return replace(company, hidden_size=size, intermediate_size=wide, vocab_size=sizes["V"], **narrow)


class _Companion(Shadow):
    """Its lm_head is its embedding where it is said to be tied."""

    def tie(self) -> None:
        self._head.weight = self._embed.weight


def _rehearsed(kinds: Kinds, spec: BaseSpec, other: BaseSpec | None, sizes: Mapping[str, int], step: Step) -> Trace:
    """One step of new heads of these sizes, traced."""
    base, beside = Shadow(spec, step.dtype, sizes.get("U")), None if other is None else _Companion(other, torch.float32)
    heads = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, config in kinds.values():
            if "U" in sizes and hasattr(config, "draft_vocab_size"):
                config = replace(config, draft_vocab_size=sizes["U"])
            config = _resized(config, spec, other)
            if beside is not None and getattr(config, "tied", False):
                beside.tie()
            head = kind(config, spec)
            head.plain_loss, head.skip_masked = step.plain, step.skip_masked
            head.attach(beside)
            head.initialise(base)  # type: ignore[arg-type]
            heads.append(head)
    batch = _batch(spec, step, max(head.horizon for head in heads))
    seen = _captured(heads, spec, step)
    known = [p for head in heads for p in (*head.parameters(), *head.buffers())]
    known += [*base.tensors(), *([] if beside is None else beside.tensors()), *seen.hidden.values()]
    known += [t for t in (seen.final, seen.original) if t is not None]
    known += [v for v in vars(batch).values() if isinstance(v, Tensor)]
    with warnings.catch_warnings(), Trace(known) as trace:
        warnings.simplefilter("ignore")  # of speed, where bf16 meets fp32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.bf16):
            out = [head.loss(base, seen, batch, measure=False) for head in heads]  # type: ignore[arg-type]
        torch.stack([o.sum / o.count.clamp(min=1) for o in out]).sum().backward()
    return trace


def _resized(config: Any, spec: BaseSpec, other: BaseSpec | None) -> Any:
    """The config whose auxiliary, if it has one, has this base's sizes."""
    auxiliary = getattr(config, "auxiliary", None)
    if auxiliary is None:
        return config
    return replace(config, auxiliary=other or replace(spec, num_layers=auxiliary.num_layers))


def _batch(spec: BaseSpec, step: Step, horizon: int) -> Batch:
    """A document per row, of which the last part learns."""
    rows, length = len(step.learned_B), step.length
    tokens_BT = torch.arange(rows * length).view(rows, length) % spec.vocab_size
    positions_BT = torch.arange(length).expand(rows, -1).contiguous()
    starts_B = torch.tensor([length - round(share * length) for share in step.learned_B])
    mask_BT = positions_BT >= starts_B[:, None]
    documents_BT = torch.zeros_like(tokens_BT)
    return Batch(tokens_BT, positions_BT, documents_BT, mask_BT, count_targets(mask_BT, documents_BT, horizon))


def _captured(heads: Sequence[Head], spec: BaseSpec, step: Step) -> Capture:
    shape = (len(step.learned_B), step.length, spec.hidden_size)
    adapter = any(head.needs.adapter for head in heads)
    made = lambda: torch.randn(shape, dtype=step.dtype).requires_grad_(adapter)  # noqa: E731
    layers = {layer for head in heads for layer in head.needs.hidden}
    original = any(head.needs.original for head in heads)
    return Capture({layer: made() for layer in layers}, made(), None, made() if original else None)
