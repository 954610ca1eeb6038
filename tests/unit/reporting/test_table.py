"""The evaluation as a table: one line per way of decoding, the numbers in their columns."""

from typing import Any

from draftsmith.reporting import table


def result(**more: Any) -> dict[str, Any]:
    proof = {"prompts": 4, "tokens": 12345, "mismatches": 0, "near_ties": 2}
    terms = {
        "tokens_per_step": 2.5,
        "verify_cost": 1.25,
        "draft_cost": 0.5,
        "overhead": 0.25,
        "predicted_speedup": 1.875,
    }
    head = {
        "parameters": 1234567,
        "tokens_per_second": 300.0,
        "speedup": 1.5,
        "tokens_per_step": 2.456,
        "lossless": proof,
        "terms": terms,
    }
    return {
        "autoregressive": {"tokens_per_second": 200.0},
        "heads": {"medusa": head},
        "baselines": {"prompt_lookup": {"tokens_per_second": 220.0, "speedup": 1.1, "tokens_per_step": 1.2}},
        "hf_generate": {"tokens_per_second": 100.0, "lossless": {**proof, "mismatches": 3}},
        **more,
    }


def test_lines_and_columns() -> None:
    lines = table.evaluation(result()).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["parameters", "tokens/step", "tokens/s", "speedup", "mismatches"],
        ["medusa", "1,234,567", "2.46", "300", "1.50x", "0", "(+2)"],
        ["prompt_lookup", "1.20", "220", "1.10x"],
        ["no", "head", "1.00", "200", "1.00x"],
        ["hf", "generate", "1.00", "100", "0.50x", "3"],
    ]
    assert "12,345 tokens of 4 prompts" in lines[5]
    assert "0 mismatches, 2 near ties" in lines[5]
    assert "c(q)/c(1) 1.25, drafting 0.50, rest 0.25 -> predicted 1.88x, measured 1.50x" in lines[6]
    assert len(lines) == 7


def test_without_near_ties_and_without_heads() -> None:
    clean = result()
    clean["heads"]["medusa"]["lossless"]["near_ties"] = 0
    assert table.evaluation(clean).splitlines()[1].endswith(" 0")
    lines = table.evaluation(result(heads={}, baselines={})).splitlines()
    assert len(lines) == 3
