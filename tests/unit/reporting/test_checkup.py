"""The doctor's report as text."""

from typing import Any

from draftsmith.reporting.checkup import checkup

REPORT: dict[str, Any] = {
    "environment": {"python": "3.11"},
    "funnel": {"in": 12, "kept": 10, "quarantined": {"json": 2}},
    "sample": {"looked_at": 5, "refused": {"mask": 1}, "encoded": 4},
    "lengths": {"rows": {"p0": 1, "p100": 1200}, "histograms": {"rows": [[1, 4], [600, 0], [1200, 1]]}},
    "learned": 0.5,
    "context": 2048,
    "policy": {"nll": 0.5, "entropy": 0.25, "agreement": 0.9, "expected": 0.95, "tokens": 1234},
    "shown": [{"source": "f:1", "tokens": [["a", 0, 0], ["b", 1, 1], ["c", 1, 0], ["\n", 1, 1]]}],
    "findings": [
        {"name": "row_json", "severity": "error", "what": "two", "fix": "mend"},
        {"name": "few", "severity": "note", "what": "ten", "fix": "more"},
    ],
}


def test_plain() -> None:
    text = checkup(REPORT, colour=False)
    for line in ("  - json                           2", "    1,200 ██████████ 1", "  a⟦b⟧[c]⟦\\n⟧"):
        assert line in text.splitlines()
    assert "✘ error row_json: two\n    fix: mend" in text
    assert text.endswith("1 error, 1 note")
    assert "learned: 50.0% of the tokens; the base's context: 2,048" in text
    assert "\033" not in text


def test_what_was_read_and_what_was_looked_at() -> None:
    """Two tables: what is lost of all rows, and what of the sample."""
    text = checkup(REPORT, colour=False)
    told = [line.split() for line in text.partition("\nrows\n")[2].partition("\n\nlengths")[0].splitlines()]
    assert told[:3] == [["in", "12"], ["-", "json", "2"], ["kept", "10"]]
    assert told[-3:] == [["looked", "at", "5"], ["-", "mask", "1"], ["encoded", "4"]]


def test_coloured() -> None:
    text = checkup(REPORT, colour=True)
    assert "a\033[30;42mb\033[0m\033[32mc\033[0m\033[30;42m\\n\033[0m" in text
    assert "\033[31;1m✘ error\033[0m row_json" in text


def test_prompts_have_no_answers_to_tell_of() -> None:
    report = {k: v for k, v in REPORT.items() if k not in ("learned", "policy", "shown")}
    text = checkup({**report, "findings": []}, colour=False)
    assert "learned" not in text
    assert text.endswith("nothing found")
