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


def lines_of(**more: Any) -> list[str]:
    """What is told of a head beyond the line of its proof and that of its terms."""
    told = result()
    told["heads"]["medusa"].update(more)
    return table.evaluation(told).splitlines()[7:]


def test_the_interval_and_what_was_accepted_by_depth() -> None:
    more = {"tokens_per_step_interval": [2.314, 2.606], "acceptance_by_depth": [0.81, 0.5, 0.333]}
    assert lines_of(**more) == [
        "medusa: 95 % interval of tau over questions 2.31 to 2.61; accepted by depth 0.81 0.50 0.33"
    ]
    assert lines_of(tokens_per_step_interval=None, acceptance_by_depth=[0.5]) == []  # a single prompt has none


def test_parts_are_told_where_there_are_several() -> None:
    parts = {
        "by_source": {"maths": {"tokens_per_step": 2.5}, "code": {"tokens_per_step": 3.125}},
        "by_turn": {"1": {"tokens_per_step": 2.0}, "2": {"tokens_per_step": 2.25}},
        "by_context": {"0-63": {"tokens_per_step": 2.0}, "64-127": {"tokens_per_step": 1.5}},
    }
    assert lines_of(**parts) == [
        "medusa: tau by source  maths: 2.50, code: 3.12",
        "medusa: tau by turn  1: 2.00, 2: 2.25",
        "medusa: tau by context  0-63: 2.00, 64-127: 1.50",
    ]
    assert lines_of(by_source={"maths": {"tokens_per_step": 2.5}}, by_turn={}, by_context=None) == []


def test_a_line_per_batch_size() -> None:
    four = {"tokens_per_step": 2.4, "speedup": 1.256, "prompts": 8, "same_text_as_alone": 7}
    assert lines_of(by_batch={"4": four, "8": {**four, "speedup": 0.9, "same_text_as_alone": 8}}) == [
        "medusa: 4 prompts together  tau 2.40, 1.26x plain decoding of the same batches; 7 of 8 texts as alone",
        "medusa: 8 prompts together  tau 2.40, 0.90x plain decoding of the same batches; 8 of 8 texts as alone",
    ]
    assert lines_of(by_batch={}) == []


def test_sampled_text_has_no_proof_and_says_what_it_is() -> None:
    told = result()
    del told["hf_generate"]
    head, look_up = told["heads"]["medusa"], told["baselines"]["prompt_lookup"]
    for r in (head, look_up):
        r.update(lossless=None, same_text_as_plain=4, lossy=False)
    lines = table.evaluation(told).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["1.50x", "1.10x", "1.00x"]  # no count of mismatches
    assert lines[4] == "medusa: 4 texts are those of plain decoding with the same seed"
    assert len(lines) == 6  # and its terms
    head["same_text_as_plain"] = 0
    assert table.evaluation(told).splitlines()[4].startswith("medusa: 0 texts")
    head["lossy"] = True
    assert "medusa: LOSSY, typical acceptance: the text is not distributed as the base's" in table.evaluation(told)
    assert "texts are those" not in table.evaluation(told)


def test_a_baselines_proof_is_in_its_line() -> None:
    told = result()
    told["baselines"]["prompt_lookup"]["lossless"] = {"prompts": 4, "tokens": 99, "mismatches": 1, "near_ties": 0}
    assert table.evaluation(told).splitlines()[2].split()[-1] == "1"


def test_without_near_ties_and_without_heads() -> None:
    clean = result()
    clean["heads"]["medusa"]["lossless"]["near_ties"] = 0
    assert table.evaluation(clean).splitlines()[1].endswith(" 0")
    lines = table.evaluation(result(heads={}, baselines={})).splitlines()
    assert len(lines) == 3
