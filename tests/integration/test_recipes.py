"""Every experiment composes, is planned as it stands, and runs one step under debug=fake; what debug's other choices
do."""

import json
from pathlib import Path

import pytest

from draftsmith import config, plan
from tests.integration.conftest import call, draftsmith

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan.run(config.compose("plan", [f"experiment={name}"]))
    assert found["memory"][found["strategy"]]["bytes"] > 0
    assert found["work"]["flops"] > 0
    assert capsys.readouterr().out.startswith("plan ")
    if "vicuna" in name or "llama" in name or "qwen" in name:
        assert any(m["fits"] for m in found["memory"].values()), name


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs share their stand-ins."""
    return tmp_path_factory.mktemp("fake")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_one_step_in_small(name: str, faked: Path) -> None:
    code, told = call("train", f"experiment={name}", "debug=fake", f"run_dir={name}", cwd=faked)
    assert code == 0, told
    (line,) = (faked / name / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert (faked / name / "COMPLETE.json").exists()
    assert "plan: base" in told


def test_debug_true_tells_where_and_false_does_not(tmp_path: Path) -> None:
    for said, traced in (("debug=true", True), ("debug=false", False)):
        code, told = draftsmith("train", "head=[]", said, cwd=tmp_path)
        assert code == 2
        assert ("Traceback" in told) == traced
        assert "error: head: nothing to train" in told


def test_one_batch_is_learned_and_the_profile_written(micro: Path, training: list[str], tmp_path: Path) -> None:
    given = [*training, "trainer.epochs=null", "optimizer.lr=1e-2", "trainer.checkpoint_every=100"]
    code, told = call("train", *given, "debug=overfit", "trainer.max_steps=40", "run_dir=over", cwd=tmp_path)
    assert code == 0, told
    first, *_, last = map(json.loads, (tmp_path / "over" / "metrics.jsonl").read_text().splitlines())
    assert last["train/medusa/loss"] < 0.5 * first["train/medusa/loss"]
    code, told = call("train", *given, "debug=profile", "run_dir=profiled", cwd=tmp_path)
    assert code == 0, told
    assert "aten::" in (tmp_path / "profiled" / "profile.txt").read_text()
    assert json.loads((tmp_path / "profiled" / "profile.json").read_text())["traceEvents"]
    code, told = call("train", *given, "debug=one_step", "run_dir=one", cwd=tmp_path)
    assert code == 0, told
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 1
