"""The arithmetic of a plan: sizes by hand, published anchors, what fits."""

from dataclasses import replace

import pytest

from draftsmith.errors import ConfigError
from draftsmith.reporting import plan_table, planning
from draftsmith.reporting.planning import Facts, HardwareConfig, Layout, Work

G = 1e9
# Llama-3.1-8B in bf16 and three Medusa heads with lm_heads of their own: 3 x (4096^2 + 4096 + 128256 x 4096)
OWN = 3 * (4096 * 4096 + 4096 + 128256 * 4096)
FACTS = Facts(
    base=8_030_261_248,
    blocks=6_979_584_000,
    block=218_112_000,
    weight_bytes=2,
    block_bytes=2,
    heads={"medusa": OWN},
    positions=16384,
    captured=0.13 * G,
    forward=1.5 * G,
    gradients=6.3 * G,
    activations=0.86 * G,
    logits=0.05 * G,
    company=0.0,
    vectors=1,
    width=4096,
    base_flops=14.2 * G,
    head_flops=6.2 * G,
)


def total(strategy: str, layout: Layout, **changes: object) -> float:
    return sum(planning.memory(replace(FACTS, **changes), strategy, layout).values())  # type: ignore[arg-type]


def test_the_state_of_own_lm_heads_is_sixteen_bytes_a_parameter() -> None:
    """29.3 GB at 18 bytes is what such a head is published to need; ours keeps no bf16 copy between steps."""
    found = planning.memory(FACTS, "single", Layout(1))
    state = found["head weights"] + found["Adam moments"] + 4 * OWN
    assert state == 16 * OWN
    assert abs(18 * OWN / G - 29.3) < 0.05
    assert found["base weights"] == 2 * FACTS.base


def test_every_strategy_spreads_what_it_says() -> None:
    one, eight = Layout(1), Layout(8)
    ddp, zero1, zero2, zero3, offload = (planning.memory(FACTS, s, eight) for s in planning.STRATEGIES[1:])
    assert ddp["Adam moments"] == 8 * OWN
    assert zero1["Adam moments"] == zero2["Adam moments"] == OWN
    assert zero2["ZeRO masters"] == 4 * OWN / 8
    assert zero1["gradients"] - zero2["gradients"] == pytest.approx(4 * OWN * 7 / 8)
    assert zero3["base weights"] == pytest.approx(2 * (FACTS.base - FACTS.blocks * 7 / 8 + 2 * FACTS.block))
    assert "Adam moments" not in offload
    assert offload["base weights"] == pytest.approx(2 * (FACTS.base - FACTS.blocks + 2 * FACTS.block))
    assert planning.host(FACTS, "zero3_offload", eight) == 2 * FACTS.blocks + 12 * OWN
    assert planning.host(FACTS, "zero3", eight) == 0
    assert total("single", one) < total("ddp", eight)


def test_accumulated_gradients_stand_beside_new_ones() -> None:
    assert total("single", Layout(1, accumulate=4)) - total("single", Layout(1)) == pytest.approx(4 * OWN)


def test_the_moment_that_holds_most_counts() -> None:
    found = planning.memory(replace(FACTS, forward=50 * G), "single", Layout(1))
    assert found["base forward"] == 50 * G
    assert "activations" not in found
    assert planning.rise(replace(FACTS, forward=50 * G)) == 50 * G
    assert planning.rise(FACTS) == pytest.approx(7.34 * G)
    few = replace(FACTS, gradients=0.0, activations=0.0, forward=0.0)
    assert planning.memory(few, "single", Layout(1))["gradients"] == 4 * OWN  # the optimiser's step


def test_the_first_that_fits_is_chosen() -> None:
    totals = {"single": 30.0, "ddp": 40.0, "zero1": 30.0, "zero2": 20.0, "zero3": 10.0, "zero3_offload": 5.0}
    assert planning.fitting(totals, None, 1) == "single"
    assert planning.fitting(totals, None, 8) == "ddp"
    assert planning.fitting(totals, 35, 8) == "zero1"
    assert planning.fitting(totals, 7, 1) == "zero3_offload"
    assert planning.fitting(totals, 1, 8) is None


def test_hours_are_flops_over_what_is_reached_and_never_faster_than_the_weights_are_read() -> None:
    hardware = HardwareConfig(tflops=100, memory_gb=80, bandwidth_tb=1, utilisation=0.5)
    work = Work(tokens=16384 * 10, epochs=1, steps=10, positions=16384)
    found = planning.seconds(FACTS, work, Layout(1), hardware)
    assert found is not None
    assert found["base"] == pytest.approx(10 * 16384 * 14.2e9 / 50e12)
    slow = planning.seconds(replace(FACTS, positions=1), work, Layout(1), hardware)
    assert slow is not None
    assert slow["base"] == pytest.approx(10 * 2 * FACTS.base / 1e12)
    assert planning.seconds(FACTS, work, Layout(1), HardwareConfig()) is None


def test_a_store_pays_from_its_break_even_on() -> None:
    """E > (B + W) / (B - R) with free writing: 8B Medusa with a shared head at 2 epochs."""
    assert planning.break_even(base=10.0, heads=2.0, read=0.0) == 2
    assert planning.break_even(base=10.0, heads=2.0, read=9.0) == 4
    assert planning.break_even(base=10.0, heads=2.0, read=12.0) is None
    for base, heads, read in ((3.0, 1.0, 2.5), (7.0, 0.5, 5.0), (1.0, 9.0, 0.1)):
        even = planning.break_even(base, heads, read)
        assert even is not None
        assert base + even * max(heads, read) < even * (base + heads)
        before = even - 1
        assert before == 1 or base + before * max(heads, read) >= before * (base + heads)


def test_bytes_of_a_position_are_the_published_ones() -> None:
    eagle = replace(FACTS, vectors=4)
    assert planning.position_bytes(FACTS, "bf16") == 8192
    assert planning.position_bytes(eagle, "bf16") == 32768
    assert planning.position_bytes(FACTS, "int8") == 4096 + 4
    assert planning.position_bytes(FACTS, "fp32") == 16384


def test_hardware_is_the_tables_with_what_is_given() -> None:
    known = HardwareConfig("h100", memory_gb=94).accelerator
    assert known is not None
    assert (known.flops, known.memory) == (989e12, 94e9)
    assert HardwareConfig(tflops=1).accelerator is None
    with pytest.raises(ConfigError, match=r"name='h1000': choose one of h200, h100"):
        HardwareConfig("h1000")
    with pytest.raises(ConfigError, match="utilisation"):
        HardwareConfig("h100", utilisation=0)


def test_numbers_are_told_to_people() -> None:
    assert plan_table.amount(8.03e9) == "8.03 B"
    assert plan_table.amount(459392) == "459 k"
    assert plan_table.size(2.5e12) == "2.5 TB"
    assert plan_table.size(12) == "12 B"
    assert plan_table.duration(0.05) == "3 min"
    assert plan_table.duration(2.5) == "2.5 h"
    assert plan_table.duration(0.001) == "3.6 s"
