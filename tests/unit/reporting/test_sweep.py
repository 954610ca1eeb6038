"""A sweep's table and picture: every trial is in both, and equal trials give equal pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from draftsmith.reporting import sweep


def trial(number: int, state: str, head: str, value: float | None, **params: Any) -> dict[str, Any]:
    estimates = [] if state == "failed" else [[10, 1.5], [20, 2.0 + number / 10]]
    about = {"number": number, "state": state, "head": head, "value": value, "params": params, "steps": 1020}
    return {**about, "estimates": estimates, "seconds": 61.4, "folder": f"{head}-{number}", "reason": None}


def result() -> dict[str, Any]:
    trials = [
        trial(0, "complete", "medusa", 2.5, **{"optimizer.lr": 0.0123456, "heads.medusa.num_heads": 3}),
        trial(1, "pruned", "medusa", None, **{"optimizer.lr": 0.001, "heads.medusa.num_heads": 2}),
        trial(2, "failed", "hydra", None, **{"optimizer.lr": 0.02, "scheduler": "cosine"}),
        trial(3, "complete", "hydra", 3.25, **{"optimizer.lr": 0.004, "scheduler": "constant"}),
        trial(4, "complete", "hydra", 3.25, **{"optimizer.lr": 0.005, "scheduler": "constant"}),
    ]
    return {
        "study": "s",
        "objective": "measured",
        "best": {"number": 3, "command": "draftsmith train a=b"},
        "trials": trials,
    }


def test_the_first_of_the_best() -> None:
    found = sweep.best(result()["trials"])
    assert found is not None
    assert found["number"] == 3
    assert sweep.best(result()["trials"][1:3]) is None


def test_the_table_has_every_trial_and_every_key() -> None:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in sweep.markdown(result()).splitlines()[:7]]
    assert lines[0] == ["trial", "head", "lr", "medusa.num_heads", "scheduler", "steps", "seconds", "tokens/step"]
    assert lines[2] == ["0", "medusa", "0.01235", "3", "", "1,020", "61", "2.500"]
    assert lines[3][-1] == "pruned"
    assert lines[4] == ["2", "hydra", "0.02", "", "cosine", "1,020", "61", "failed"]
    assert lines[5][-1] == "3.250 *"
    assert lines[6][-1] == "3.250"
    assert "draftsmith train a=b" in sweep.markdown(result())
    assert (
        sweep.text(result())
        .splitlines()[-1]
        .startswith("5 trials: 3 complete, 1 pruned, 1 failed; tokens/step measured")
    )


def test_a_trial_that_never_began_to_train_is_told_too() -> None:
    empty = {**trial(0, "running", "", None), "head": None, "params": None, "seconds": None, "estimates": []}
    _, row, _ = sweep.text({"objective": "estimated", "trials": [empty]}).splitlines()
    assert row.split() == ["0", "1,020", "running"]


@pytest.mark.parametrize("n", [0, 2, 3, 5])
def test_the_picture_is_always_the_same(n: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some = {**result(), "trials": result()["trials"][:n]}
    for name in ("a", "b"):
        sweep.picture(tmp_path / f"{name}.svg", some)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    titles = re.findall(r"<!-- (.*?) -->", drawn)
    assert {"Tokens per step by trial", "Estimate while training"} <= set(titles)
    assert ("scheduler" in titles, "pruned: its last estimate" in titles) == (n > 2, n > 1)
    assert ("failed" in titles, "hydra 3.25" in titles) == (n > 2, n > 3)


def test_it_says_where_it_wrote(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert sweep.write(tmp_path, result(), ("svg", "png")) == f"-> {tmp_path / 'sweep'}.{{md,svg,png}}"
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.md", "sweep.svg", "sweep.png"}
