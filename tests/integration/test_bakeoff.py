"""draftsmith bakeoff on the micro base: it trains, chooses, measures and draws, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import call

SMALL = ["cpu_seconds=0.2", "lrs=[1e-3,4e-3]", "seeds=[0,1]", "batch_sizes=[1,2]", "batch_prompts=2", "repeats=1"]
ASKED = ["selection.synthetic=2", "selection.text=0", "prompts.synthetic=3", "prompts.text=0"]


def test_it_compares_and_goes_on_where_it_stopped(training: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train = f"train=[{','.join(map(repr, training))}]"
    told = [*SMALL, *ASKED, "like=quickstart", "compare=[medusa]", train, "decoding.max_new_tokens=12", "run_dir=out"]
    code, output = call("bakeoff", *told, cwd=tmp_path)
    assert code == 0, output
    out = tmp_path / "out"
    result = json.loads((out / "bakeoff.json").read_text())
    cost = json.loads((out / "calibration.json").read_text())["medusa"]
    steps = max(1, round(0.2 / cost["step_cpu_seconds"]))
    runs = result["runs"]
    assert [(r["lr"], r["seed"]) for r in runs[:2]] == [(1e-3, 0), (4e-3, 0)]
    assert len(runs) == 3
    assert runs[2]["seed"] == 1
    assert runs[2]["chosen"]
    assert {r["steps"] for r in runs} == {steps}
    assert all(r["cpu_seconds"] > 0 and r["tokens_per_step"] >= 1 for r in runs)
    head = result["heads"]["medusa"]
    assert head["lossless"]["ok"]
    assert head["by_batch"]["2"]["speedup"] > 0
    assert head["by_batch"]["2"]["predicted_speedup"] == head["by_batch"]["2"]["terms"]["predicted_speedup"] > 0
    assert (head["by_batch"]["2"]["prompts"], head["by_batch"]["2"]["same_text_as_alone"]) == (2, 2)
    assert len(result["other_seeds"]["medusa"]) == 1
    assert (out / "leaderboard.md").read_text().startswith("| head | parameters | step cost | tokens/step | seeds |")
    assert {p.name for p in out.glob("leaderboard.*")} == {"leaderboard.md", "leaderboard.svg", "leaderboard.png"}
    for r in runs:  # every run is told
        assert f"medusa-lr{r['lr']:g}-seed{r['seed']}: {steps} steps" in output

    code, output = call("bakeoff", *told, cwd=tmp_path)
    assert code == 0, output
    assert output.count("already complete") == 3
    assert "timing a training step" not in output
    again = json.loads((out / "bakeoff.json").read_text())
    assert again["runs"] == runs
    assert again["other_seeds"] == result["other_seeds"]

    code, output = call("bakeoff", *told, "cpu_seconds=2", cwd=tmp_path)  # other steps: other runs
    assert code == 2
    assert "holds another run (trainer.max_steps" in output


def test_evaluate_of_two_heads_writes_a_leaderboard(training: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    two = ["head=[medusa]", "+head@heads.medusa5=medusa", "heads.medusa5.num_heads=2", "trainer.max_steps=2"]
    assert call("train", *training, *two, "run_dir=out", cwd=tmp_path)[0] == 0
    short = ["prompts.synthetic=2", "decoding.max_new_tokens=8", "repeats=1", "batch_sizes=[1,2]", "batch_prompts=1"]
    code, output = call("evaluate", *short, "run_dir=out", cwd=tmp_path)
    assert code == 0, output
    assert "leaderboard.{md,svg}" in output
    table = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "| medusa |" in table
    assert "| medusa5 |" in table
    assert "| batch 1 | batch 2 |" in table


def test_every_way_to_decode_is_judged_beside_all_baselines(training: list[str], tmp_path: Path) -> None:
    """Sampled and lossy texts say what they are; a wide tree is no baseline's that has not so many candidates."""
    assert call("train", *training, "head=[medusa]", "trainer.max_steps=2", "run_dir=out", cwd=tmp_path)[0] == 0
    short = ["prompts.synthetic=3", "decoding.max_new_tokens=8", "repeats=1", "baselines=all", "run_dir=out"]

    def judged(*given: str) -> tuple[dict[str, Any], str]:
        code, output = call("evaluate", *short, *given, cwd=tmp_path)
        assert code == 0, output
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert {"prompt_lookup", "token_recycling", "ngram"} <= set(found["baselines"])
        return found["heads"]["medusa"], output

    head, output = judged("decoding=typical")
    assert (head["lossy"], head["lossless"]) == (True, None)
    assert "medusa: LOSSY, typical acceptance" in output
    head, output = judged("decoding=sampling", "batch_sizes=[1,3]")
    assert (head["lossy"], head["same_text_as_plain"], head["by_batch"]["3"]["same_text_as_alone"]) == (False, 3, 3)
    assert "medusa: 3 texts are those of plain decoding with the same seed" in output
    assert "medusa: 3 prompts together  tau " in output
    head, output = judged("decoding=sampling", "decoding.drafts=iid")
    assert head["lossy"] is False
    head, output = judged("tree=mc_sim_7b_63")
    assert head["lossless"]["ok"]
    assert head["tree"]["depth"] == 3
    assert "tau by context" in output


@pytest.mark.parametrize(
    ("override", "says"),
    [("batch_sizes=[0]", "batch_sizes=[0]: every size is at least 1"), ("batch_prompts=0", "batch_prompts=0: give")],
)
def test_batches_that_cannot_be(override: str, says: str, tmp_path: Path) -> None:
    for verb in ("evaluate", "bakeoff"):
        code, output = call(verb, override, "run_dir=out", cwd=tmp_path)
        assert code == 2
        assert says in output


def test_training_may_end_with_the_evaluation(training: list[str], tmp_path: Path) -> None:
    asked = "evaluate=['prompts.synthetic=2','decoding.max_new_tokens=8','repeats=1']"
    told = [*training, "head=[medusa,kangaroo]", "trainer.max_steps=2", asked, "run_dir=out"]
    for output in (call("train", *told, cwd=tmp_path), call("train", *told, cwd=tmp_path)):  # complete: judged again
        assert output[0] == 0, output[1]
        assert "kangaroo: 16 tokens of 2 prompts" in output[1]
    heads = json.loads((tmp_path / "out" / "evaluation.json").read_text())["heads"]
    assert heads.keys() == {"medusa", "kangaroo"}
    assert all(h["lossless"]["ok"] for h in heads.values())
