"""Gates in words and pictures."""

import copy
from pathlib import Path
from typing import Any

import pytest

from draftsmith.reporting import gates

SPEED = {"tokens_per_step": 2.0, "drafts_per_step": 3.0, "tokens_per_second": 100.0, "speedup": 1.25}
GATE: dict[str, Any] = {
    "threshold": 0.7,
    "min_depth": 1,
    "by_length": {"fixed_1": SPEED, "fixed_2": SPEED, "gate": SPEED, "oracle": SPEED},
    "best_fixed": "fixed_2",
    "over_best_fixed": 1.1,
    "oracle_over_best_fixed": 1.4,
    "recovered": 0.25,
    "regret": 0.2143,
    "calibration": {
        "drafts": 1234,
        "accepted": 0.6,
        "auc": 0.875,
        "ece": 0.031,
        "brier": 0.125,
        "curve": [
            {"count": 1000, "predicted": 0.9, "accepted": 0.8},
            {"count": 234, "predicted": 0.2, "accepted": 0.1},
        ],
    },
}


def test_the_words_hold_every_figure() -> None:
    lines = gates.text("mine", GATE)
    assert [line.split()[1] for line in lines[:4]] == ["fixed_1", "fixed_2", "gate", "oracle"]
    assert lines[2].endswith("threshold 0.70")
    for told in ("1.100 x", "(fixed_2)", "1.400 x", "25%", "regret 21.4%"):
        assert told in lines[4]
    for told in ("1,234 drafts", "60.0%", "AUC 0.875", "ECE 0.031", "Brier 0.125"):
        assert told in lines[5]


@pytest.mark.parametrize("over", [0.99, 1.016])
def test_a_gap_within_noise_has_no_share(over: float) -> None:
    told = gates.text("mine", {**GATE, "oracle_over_best_fixed": over, "recovered": None if over < 1 else -6.69})[4]
    assert "nothing to recover" in told
    assert "-669%" not in told


def test_a_sampled_text_has_no_oracle_and_one_kind_of_drafts_no_auc() -> None:
    sampled = {
        k: v for k, v in copy.deepcopy(GATE).items() if k not in ("recovered", "regret", "oracle_over_best_fixed")
    }
    del sampled["by_length"]["oracle"]
    sampled["calibration"] |= {"auc": None, "accepted": None, "brier": None}
    lines = gates.text("mine", sampled)
    assert "oracle" not in " ".join(lines)
    assert "AUC -" in lines[-1]


def test_the_picture_shows_every_gate_and_is_the_same_every_time(tmp_path: Path) -> None:
    heads = {"one": {"gate": GATE}, "plain": {}, "two": {"gate": GATE}}
    told = gates.write(tmp_path, heads)
    first = (tmp_path / "gates.svg").read_bytes()
    gates.write(tmp_path, heads)
    assert told.endswith("gates.svg")
    assert (tmp_path / "gates.svg").read_bytes() == first
    gates.write(tmp_path, {"one": {"gate": GATE}})
    assert len((tmp_path / "gates.svg").read_bytes()) < len(first)


def test_without_matplotlib_there_are_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "find_spec", lambda name: None)
    assert "draftsmith[plots]" in gates.write(tmp_path, {"one": {"gate": GATE}})
    assert list(tmp_path.iterdir()) == []
