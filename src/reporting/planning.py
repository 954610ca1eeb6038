"""What a training needs before anything is loaded: memory by component and strategy, disk, FLOPs, hours.

Arithmetic alone, on counts that others made. Sizes are bytes, times seconds, rates per second, shares of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from draftsmith.errors import ConfigError

GB = 1e9
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")  # the cheapest in communication first
BUCKET = 5e8  # numbers that DeepSpeed reduces at a time, its default


@dataclass(frozen=True)
class Accelerator:
    """Dense bf16 FLOP/s, bytes of memory, bytes per second of it."""

    flops: float
    memory: float
    bandwidth: float


# Makers' data sheets, dense bf16 without sparsity; the H200 as SXM, H100 and A100 too.
ACCELERATORS = {
    "h200": Accelerator(989e12, 141e9, 4.8e12),
    "h100": Accelerator(989e12, 80e9, 3.35e12),
    "a100_80g": Accelerator(312e12, 80e9, 2.04e12),
    "l40s": Accelerator(362e12, 48e9, 0.864e12),
    "rtx4090": Accelerator(165e12, 24e9, 1.008e12),
}


@dataclass(frozen=True)
class HardwareConfig:
    """Of one accelerator; what is given replaces what the table says of `name`."""

    name: str | None = None  # null: nothing is known but what stands below
    tflops: float | None = None  # dense, in the precision of the base
    memory_gb: float | None = None
    bandwidth_tb: float | None = None  # per second
    utilisation: float = 0.4  # share of the FLOP/s that a training reaches
    overhead_gb: float = 1.0  # per process: the driver's context and what the allocator cannot use
    disk_gb: float = 2.0  # per second and node, reading a store

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in ACCELERATORS:
            raise ConfigError(
                f"name='{self.name}': choose one of {', '.join(ACCELERATORS)}, or null and give tflops, memory_gb and"
                " bandwidth_tb"
            )
        if not 0 < self.utilisation <= 1 or self.overhead_gb < 0 or self.disk_gb <= 0:
            raise ConfigError("utilisation, overhead_gb, disk_gb: a share in (0, 1], at least 0, and above 0")

    @property
    def accelerator(self) -> Accelerator | None:
        """None unless everything is known."""
        known = ACCELERATORS.get(self.name or "")
        told = (self.tflops, 1e12), (self.memory_gb, GB), (self.bandwidth_tb, 1e12)
        found = [value * unit if value is not None else None for value, unit in told]
        if known is not None:
            pairs = zip(found, (known.flops, known.memory, known.bandwidth), strict=True)
            found = [theirs if own is None else own for own, theirs in pairs]
        return None if None in found else Accelerator(*found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Facts:
    """What is trained on what. Bytes are of one process and one micro-batch of `positions` positions.

    base: parameters; blocks: those inside its blocks; block: of one of them; weight_bytes of one parameter of the rest,
    block_bytes of one inside. heads: name -> trained parameters. captured: what the base's forward leaves; forward:
    most that it holds; activations, logits, gradients: at the peak of the heads' losses; company: weights of whoever
    stands beside. vectors of `width` numbers per position are what a store would hold. base_flops, head_flops: per
    position.
    """

    base: int
    blocks: int
    block: int
    weight_bytes: float
    block_bytes: float
    heads: Mapping[str, int]
    positions: int
    captured: float
    forward: float
    gradients: float
    activations: float
    logits: float
    company: float
    vectors: int
    width: int
    base_flops: float
    head_flops: float

    @property
    def trained(self) -> int:
        return sum(self.heads.values())


@dataclass(frozen=True)
class Layout:
    """How the work is split. devices: processes per node."""

    devices: int
    nodes: int = 1
    accumulate: int = 1

    @property
    def world(self) -> int:
        return self.devices * self.nodes


def memory(facts: Facts, strategy: str, layout: Layout, overhead: float = 0.0) -> dict[str, float]:
    """Bytes by component of one process at its peak, what is zero left out."""
    zero = int(strategy[4]) if strategy.startswith("zero") else 0
    offload, world, p = strategy.endswith("offload"), layout.world, facts.trained
    rest = (facts.base - facts.blocks) * facts.weight_bytes
    blocks = facts.blocks * facts.block_bytes
    if zero == 3:  # two blocks are whole at a time: the one that runs and the next
        blocks = (0 if offload else blocks / world) + 2 * facts.block * facts.block_bytes
    kept = {
        "base weights": rest + blocks,
        "company weights": facts.company,
        "head weights": 4.0 * p,
        "Adam moments": 0.0 if offload else 8.0 * p / (world if zero else 1),
        "ZeRO masters": 4.0 * p / world if zero and not offload else 0.0,
        "ZeRO buckets": 4.0 * min(BUCKET, p) if zero else 0.0,
        "DDP buckets": 4.0 * p if strategy == "ddp" else 0.0,
        "gradients": (4.0 * p / (world if zero > 1 else 1)) * (layout.accumulate > 1 or zero > 0),
        "process": overhead,
    }
    # the moment of the heads' losses, unless that of the base's forward or of the optimiser holds more
    losses = {
        "gradients": facts.gradients,
        "captures": facts.captured,
        "activations": facts.activations,
        "logits": facts.logits,
    }
    update = {"gradients": 4.0 * p * (layout.accumulate == 1 and not zero)}
    most = max(losses, {"base forward": facts.forward}, update, key=lambda part: sum(part.values()))
    found = {name: kept.get(name, 0.0) + most.get(name, 0.0) for name in {**kept, **most}}
    return {name: size for name, size in found.items() if size}


def rise(facts: Facts) -> float:
    """Bytes that one step of one process takes beside weights and moments."""
    step = facts.gradients + facts.captured + facts.activations + facts.logits
    return max(step, facts.forward, 4.0 * facts.trained)


def host(facts: Facts, strategy: str, layout: Layout) -> float:
    """Bytes of one node's own memory that zero3_offload takes."""
    if not strategy.endswith("offload"):
        return 0.0
    return (facts.blocks * facts.block_bytes + 12.0 * facts.trained) * layout.devices / layout.world


def fitting(totals: Mapping[str, float], room: float | None, world: int) -> str | None:
    """The strategy that talks least among those that fit; single is of one process alone."""
    able = [name for name in STRATEGIES if (name == "single") == (world == 1) or name.startswith("zero")]
    return next((name for name in able if room is None or totals[name] <= room), None)


@dataclass(frozen=True)
class Work:
    """tokens: that an epoch reads. steps: of the whole run; positions: of a global step."""

    tokens: float
    epochs: float
    steps: int
    positions: int


def seconds(facts: Facts, work: Work, layout: Layout, hardware: HardwareConfig) -> dict[str, float] | None:
    """Of the run, by part: base, heads, optimizer. The slower of computing and of reading weights; None for an unknown
    accelerator."""
    found = hardware.accelerator
    if found is None:
        return None
    speed = found.flops * hardware.utilisation
    micro = work.steps * layout.accumulate
    weights = facts.base * facts.weight_bytes / found.bandwidth
    return {
        "base": micro * max(facts.positions * facts.base_flops / speed, weights),
        "heads": micro * max(facts.positions * facts.head_flops / speed, 4.0 * facts.trained / found.bandwidth),
        "optimizer": work.steps * 28.0 * facts.trained / found.bandwidth,
    }


def position_bytes(facts: Facts, kind: str) -> float:
    """What a store keeps of one position; int8 and fp8 have a scale per vector."""
    scale = 4 if kind in ("int8", "fp8") else 0
    return facts.vectors * (facts.width * {"fp32": 4, "bf16": 2, "int8": 1, "fp8": 1}[kind] + scale)


def break_even(base: float, heads: float, read: float) -> int | None:
    """From which epoch on a store is faster. base, heads, read: seconds per epoch of the base's forward, of the heads
    and of reading the store; the first pass writes it. None: never."""
    online, stored = base + heads, max(heads, read)
    if stored >= online:
        return None
    return max(2, math.floor(base / (online - stored)) + 1)
