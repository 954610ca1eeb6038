"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDE = 17


def table(plan: Mapping[str, Any]) -> str:
    """The whole plan: what is trained, memory of every strategy, disk, work, time, the cheapest mode."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_rest(plan)])


def _head(plan: Mapping[str, Any]) -> Iterator[str]:
    counts = plan["parameters"]
    heads = ", ".join(f"{name} {amount(n)}" for name, n in counts["heads"].items())
    yield f"{'plan':<{WIDE}}{plan['what']}"
    yield f"{'parameters':<{WIDE}}base {amount(counts['base'])} frozen; trained: {heads}"


def _memory(plan: Mapping[str, Any]) -> Iterator[str]:
    every = plan["memory"]
    names = list(every)
    marked = [f"{name} *" if name == plan["strategy"] else name for name in names]
    wide = max(9, *(len(name) + 2 for name in marked))
    yield f"{'GB per process':<{WIDE}}" + "".join(f"{name:>{wide}}" for name in marked)
    parts = list(dict.fromkeys(part for found in every.values() for part in found["parts"]))
    for part in parts:
        sizes = (found["parts"].get(part, 0.0) for found in every.values())
        yield f"{part:<{WIDE}}" + "".join(f"{gigabytes(size) if size else '-':>{wide}}" for size in sizes)
    yield f"{'together':<{WIDE}}" + "".join(f"{gigabytes(found['bytes']):>{wide}}" for found in every.values())
    if any(found["host"] for found in every.values()):
        hosts = (found["host"] for found in every.values())
        yield f"{'host, per node':<{WIDE}}" + "".join(f"{gigabytes(h) if h else '-':>{wide}}" for h in hosts)
    room = plan["room"]
    if room is not None:
        fits = ("yes" if found["fits"] else "no" for found in every.values())
        yield f"{f'fits {room / 1e9:.0f} GB':<{WIDE}}" + "".join(f"{word:>{wide}}" for word in fits)
    yield f"{'':<{WIDE}}* as configured; {plan['advice']}"


def _rest(plan: Mapping[str, Any]) -> Iterator[str]:
    disk, work, hours = plan["disk"], plan["work"], plan["hours"]
    yield (
        f"{'disk':<{WIDE}}{disk['checkpoints_kept']} checkpoints of {size(disk['checkpoint'])} and one being written,"
        f" heads {size(disk['heads'])}"
    )
    stores = ", ".join(f"{kind} {size(n)}" for kind, n in disk["stores"].items())
    yield f"{'':<{WIDE}}a store of these rows: {stores}"
    yield (
        f"{'work':<{WIDE}}{work['rows']:,} rows ({work['rows_known']}), {work['tokens']:,.0f} tokens an epoch,"
        f" {work['steps']:,} steps of {work['positions_per_step']:,} positions = {work['epochs']:.3g} epochs"
    )
    yield (
        f"{'':<{WIDE}}{work['flops_per_token'] / 1e9:.3g} GFLOP per token: base {work['base_flops'] / 1e9:.3g},"
        f" heads {work['head_flops'] / 1e9:.3g}; {work['flops']:.2e} in all"
    )
    if hours is None:
        yield f"{'time':<{WIDE}}unknown: say hardware.name=, or hardware.tflops=, .memory_gb= and .bandwidth_tb="
    else:
        parts = ", ".join(f"{name} {value / hours['together']:.0%}" for name, value in hours["parts"].items())
        speed = f"{plan['utilisation']:.0%} of {plan['hardware']}"
        yield (
            f"{'time':<{WIDE}}{duration(hours['together'])} at {speed}: {parts};"
            f" {hours['tokens_per_second']:,.0f} tokens/s"
        )
    yield f"{'mode':<{WIDE}}{plan['mode']}"


def amount(n: float) -> str:
    """A number of parameters."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size / 2:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f}" if n >= 1e9 else f"{n / 1e9:.2g}" if n >= 1e7 else f"{n / 1e9:.4f}"


def size(n: float) -> str:
    """Bytes for people."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= one:
            return f"{n / one:.3g} {unit}"
    return f"{n:.0f} B"


def duration(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"
