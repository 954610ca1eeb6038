"""What a training's configuration says of its sizes, counted without loading anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, supply
from draftsmith.base.settings import ShapeConfig
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError
from draftsmith.reporting import plan_table, planning
from draftsmith.reporting.planning import Facts, Layout, Work

if TYPE_CHECKING:
    from draftsmith.contracts import BaseSpec, Head

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes
BLOCK_BYTES = {"int8": 1.0, "int4": 0.5 + 3 / 32}  # a scale of 2 bytes and a zero point for every 32
ROWS = 60_000  # where nobody knows
FULL = 0.99  # share of packed positions that hold a token


@dataclasses.dataclass(frozen=True)
class Read:
    """A configuration's parts. heads: name -> (class, completed config, trained parameters)."""

    base: prepare.BaseConfig
    shape: ShapeConfig
    spec: BaseSpec
    data: DataConfig
    heads: Mapping[str, tuple[type[Head], Any, int]]
    company: BaseSpec | None
    company_parameters: int
    company_bytes: float
    adapter: int


def shape_of(base: prepare.BaseConfig) -> ShapeConfig:
    """The sizes of what will be loaded."""
    from draftsmith.base import shapes

    real = prepare.stand_in(base)
    return shapes.of(real.path, real.revision, real.shape, real.recipe)


def read(cfg: DictConfig, chosen: Mapping[str, tuple[type[Head], Any]]) -> Read:
    """The parts of a training's configuration, the heads built on the meta device. chosen: train.heads_of's."""
    from draftsmith.base import shapes

    base = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    shape = shape_of(base)
    spec = shapes.spec_of(shape, base.path or "")
    company, company_parameters, company_bytes, tied = None, 0, 0.0, False
    if cfg.get("companion") is not None:
        other = config.typed(cfg.companion, prepare.BaseConfig, "companion")
        own = shape_of(other)
        company, tied = shapes.spec_of(own, other.path or ""), own.tie_word_embeddings
        company_parameters = shapes.parameters(own)
        company_bytes = float(company_parameters * SIZES[other.dtype])
    heads = {name: _built(name, kind, own, spec, company, tied=tied) for name, (kind, own) in chosen.items()}
    adapter = 0 if base.lora is None else adapter_parameters(shape, base.lora)
    return Read(base, shape, spec, data, heads, company, company_parameters, company_bytes, adapter)


def _built(
    name: str, kind: type[Head], own: Any, spec: BaseSpec, company: BaseSpec | None, *, tied: bool
) -> tuple[type[Head], Any, int]:
    """(class, config with everything that follows from base and company, parameters)."""
    import torch

    from draftsmith.training.tracing import Unset

    try:
        if kind.wants == "drafter":  # a gate reads what its drafter leaves: a draft model's states, or the base's
            own = dataclasses.replace(own, hidden_size=(company or spec).hidden_size)
        else:
            beside = None
            if kind.wants == "companion" and company is not None:
                beside = SimpleNamespace(spec=company)
                own = dataclasses.replace(own, tied=tied if own.tied is None else own.tied)
            own = kind.completed(own, spec, beside)
        with torch.device("meta"), Unset():
            head = kind(own, spec)
    except ConfigError as e:
        raise ConfigError(f"heads.{name}: {e}") from None
    return kind, own, sum(p.numel() for p in head.parameters())


def adapter_parameters(shape: ShapeConfig, lora: Any) -> int:
    """Of a low-rank adapter of these linear layers in every block."""
    d, wide, narrow = shape.hidden_size, shape.num_attention_heads * shape.size, shape.num_key_value_heads * shape.size
    ends = {
        **{"q_proj": d + wide, "o_proj": wide + d, "k_proj": d + narrow, "v_proj": d + narrow},
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), d + shape.intermediate_size),
    }
    return shape.num_hidden_layers * lora.rank * sum(ends.get(name, 2 * d) for name in lora.targets)


def facts_of(cfg: DictConfig, parts: Read, learned: float, row_tokens: float) -> Facts:
    """Everything that reporting/planning.py reckons with. learned: share of positions that learn."""
    from draftsmith.base import shapes

    shape, spec, data, base = parts.shape, parts.spec, parts.data, parts.base
    size, positions = SIZES[base.dtype], data.batch_size * data.length
    vectors, top, adapting = _captured(parts)
    estimate = _estimate(cfg, parts, learned)
    block = shapes.block_parameters(shape)
    every = shapes.parameters(shape)
    held = shapes.kept_bytes(shape, positions, size, recompute=base.recompute) if adapting else 0.0
    context = min(row_tokens, data.length) / 2  # what a position attends to on average
    attention = 4 * context * shape.num_attention_heads * shape.size
    forward = top * (2 * block + attention) * (2 + base.recompute if adapting else 1)
    company_flops = (
        2.0 * parts.company_parameters if any(k.wants == "drafter" for k, _, _ in parts.heads.values()) else 0
    )
    trained = {name: count for name, (_, _, count) in parts.heads.items()}
    return Facts(
        base=every,
        blocks=shape.num_hidden_layers * block,
        block=block,
        weight_bytes=size,
        block_bytes=BLOCK_BYTES.get(base.quantise or "", size),
        heads=trained | ({"adapter": parts.adapter} if parts.adapter else {}),
        positions=positions,
        captured=float(vectors * positions * spec.hidden_size * size),
        forward=shapes.forward_bytes(shape, positions, size) + (vectors - 1) * positions * spec.hidden_size * size,
        gradients=estimate["gradients"] + 4.0 * parts.adapter,
        activations=estimate["activations"] + held,
        logits=estimate["logits"],
        company=parts.company_bytes,
        vectors=vectors,
        width=spec.hidden_size,
        base_flops=forward + company_flops,
        head_flops=estimate["flops"] / positions,
    )


def _captured(parts: Read) -> tuple[int, int, bool]:
    """(vectors that a forward leaves per position, blocks that it runs, whether an adapter learns)."""
    import torch

    from draftsmith.contracts import Needs
    from draftsmith.training.tracing import Unset

    with torch.device("meta"), Unset():
        built = [kind(own, parts.spec) for kind, own, _ in parts.heads.values()]
    needs = reduce(or_, (head.needs for head in built), Needs())
    drafted = parts.company is not None
    gates = [(kind, own) for kind, own, _ in parts.heads.values() if kind.wants == "drafter"]
    judged = any(not kind.reads_labels(own, drafted) for kind, own in gates)
    final = needs.final or needs.teacher or judged
    vectors = len(needs.hidden) + final + needs.original
    top = parts.spec.num_layers if final else max(needs.hidden, default=0)
    return max(1, vectors), top, needs.adapter


def _estimate(cfg: DictConfig, parts: Read, learned: float) -> dict[str, float]:
    """Of the heads' losses: shadow.of_step for all that read the base, by hand for a gate, which is small."""
    from draftsmith import shadow
    from draftsmith.base.loading import DTYPES

    data = parts.data
    kinds = {name: (kind, own) for name, (kind, own, _) in parts.heads.items() if kind.wants != "drafter"}
    plain, skip = cfg.loss.impl == "plain", bool(cfg.loss.skip_masked)
    found = dict.fromkeys(("gradients", "activations", "logits", "flops"), 0.0)
    if kinds:
        bf16 = cfg.trainer.precision == "bf16"
        step = shadow.Step(data.length, [learned] * data.batch_size, DTYPES[parts.base.dtype], bf16, plain, skip)
        found = vars(shadow.of_step(kinds, parts.spec, step, parts.company)).copy()
    for kind, own, count in parts.heads.values():
        if kind.wants == "drafter":
            positions = data.length * data.batch_size * learned
            found["gradients"] += 4.0 * count
            found["activations"] += 4.0 * positions * own.hidden_size * (2 * own.num_layers + 1)
            found["flops"] += 6.0 * count * positions
    return found


def rows_of(cfg: DictConfig, data: DataConfig) -> tuple[int, str]:
    """(rows of an epoch, how that is known)."""
    if cfg.get("rows") is not None:
        return int(cfg.rows), "given"
    if data.random is not None:
        return data.random.rows, "made up"
    if data.prompts is not None and data.prompts.made_up:
        return data.prompts.synthetic + data.prompts.text, "made up"
    if supply.is_rows(data.path) or supply.is_store(data.path):
        folder = Path(str(data.path)) / ("rows" if supply.is_store(data.path) else "")
        return int(artifacts.read_json(folder / artifacts.MANIFEST)["rows"]), "counted"
    return ROWS, "assumed; say rows="


def work_of(cfg: DictConfig, data: DataConfig, layout: Layout, row_tokens: float) -> tuple[Work, str]:
    """The run's steps and tokens, and how the number of rows is known."""
    rows, known = rows_of(cfg, data)
    if data.random is not None:
        row_tokens = data.random.real * data.length
    tokens = rows * min(row_tokens, data.length)
    positions = data.length * data.batch_size * layout.accumulate * layout.world
    packs = tokens / FULL if data.packing else rows * data.length
    trainer = cfg.trainer
    steps = trainer.max_steps or max(1, math.ceil(packs * (trainer.epochs or 1) / positions))
    return Work(tokens, steps * positions * FULL / max(1.0, tokens), int(steps), positions), known


def strategy_of(cfg: DictConfig) -> str:
    world = cfg.trainer.devices * cfg.trainer.num_nodes
    return str(cfg.strategy.name) if cfg.strategy.name != "auto" else "ddp" if world > 1 else "single"


def line(cfg: DictConfig, chosen: Mapping[str, tuple[type[Head], Any]]) -> str:
    """What a run says of itself before it begins: parameters, what they and checkpoints take. Never fails one."""
    try:
        parts = read(cfg, chosen)
        trainer, name = cfg.trainer, strategy_of(cfg)
        layout = Layout(trainer.devices, trainer.num_nodes, trainer.accumulate)
        facts = _weights(parts)
        held = planning.memory(facts, name, layout)
    except Exception as e:
        return f"plan: unknown ({' '.join(str(e).split())[:200]})"
    checkpoint = 12.0 * facts.trained * (trainer.keep + 1)
    return (
        f"plan: base {plan_table.amount(facts.base)}, heads {plan_table.amount(facts.trained)} trained, {name};"
        f" weights, gradients and moments {plan_table.size(sum(held.values()))} per process, checkpoints"
        f" {plan_table.size(checkpoint)}; draftsmith plan tells more"
    )


def _weights(parts: Read) -> Facts:
    """The facts without any that a rehearsal would have to tell."""
    from draftsmith.base import shapes

    shape, size = parts.shape, SIZES[parts.base.dtype]
    block = shapes.block_parameters(shape)
    trained = {name: count for name, (_, _, count) in parts.heads.items()}
    trained |= {"adapter": parts.adapter} if parts.adapter else {}
    nothing = dict.fromkeys(("captured", "forward", "activations", "logits", "base_flops", "head_flops"), 0.0)
    return Facts(
        base=shapes.parameters(shape),
        blocks=shape.num_hidden_layers * block,
        block=block,
        weight_bytes=size,
        block_bytes=BLOCK_BYTES.get(parts.base.quantise or "", size),
        heads=trained,
        positions=0,
        gradients=4.0 * sum(trained.values()),
        company=parts.company_bytes,
        vectors=0,
        width=0,
        **nothing,
    )
