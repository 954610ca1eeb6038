"""Every point at which a process may die (src/faults.py), died at: what has its final name is whole, and the same
command ends with the bytes of a run left alone, with nothing left over.

An uninterrupted run of each stage tells which points it passes, and how often. DRAFTSMITH_POINTS=all dies at every
passing (make test-faults-long); without it at one of each point, in the middle.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith import artifacts, faults
from tests.integration.conftest import draftsmith, micro, training  # noqa: F401 (fixtures)

pytestmark = pytest.mark.faults

SRC = Path(__file__).parents[2] / "src"
ALL = os.environ.get("DRAFTSMITH_POINTS") == "all"
SEALS = ("manifest.json", "COMPLETE.json")
passed: dict[str, list[str]] = {}  # stage -> the points of its run, in order


@dataclasses.dataclass(frozen=True)
class Stage:
    """command: verb and overrides that write `out`. prepared: what must lie in the folder before. kept: what of a
    finished `out` must be equal, byte for byte."""

    command: list[str]
    prepared: Path | None = None
    out: str = "out"
    kept: Callable[[str], bool] = lambda name: True

    def content(self, folder: Path) -> dict[str, bytes]:
        out = folder / self.out
        files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file() and ".lock" not in p.name}
        return {name: p.read_bytes() for name, p in files.items() if self.kept(name)}


def weights_and_more(name: str) -> bool:
    """What of a run's folder does not tell of its time: events, speeds and the card's command do."""
    return name.startswith(("heads/", "checkpoints/")) or name == "COMPLETE.json"


@pytest.fixture(scope="module")
def stages(micro: Path, training: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:  # noqa: F811
    base = ["base=hf", f"base.path={micro / 'base'}"]
    asked = ["data=prompts", f"data.prompts.path={micro / 'prompts.jsonl'}", "data.generation.max_new_tokens=8"]
    asked += ["data.generation.shard_rows=3", "data.generation.batch_size=2", "threads=1"]
    few = [*training, "trainer.max_steps=6", "trainer.checkpoint_every=2", "trainer.keep=1"]
    made = tmp_path_factory.mktemp("made")
    for verb, overrides in (("distill", [*base, *asked, "out=rows"]), ("train", [*few, "run_dir=out"])):
        code, output = draftsmith(verb, *overrides, cwd=made)
        assert code == 0, output
    shutil.copytree(made / "out", made / "again" / "out")
    again = ["export", "exporter=vllm", "run_dir=out", "out=out/given"]
    code, output = draftsmith(*again, cwd=made / "again")
    assert code == 0, output
    rows, drafts = f"rows={made / 'rows'}", ["companion=hf", f"companion.path={micro / 'base'}"]
    export = ["export", "exporter=portable", "run_dir=out", "out=out/given"]
    return {
        "train": Stage(["train", *few, "run_dir=out"], kept=weights_and_more),
        "distill": Stage(["distill", *base, *asked, "out=out"]),
        "capture": Stage(["capture", *base, rows, "out=out", "store.shard_rows=3", "threads=1"]),
        "label": Stage(["label", *base, *drafts, rows, "out=out", "threads=1"]),
        "export": Stage(export, made / "out", "out/given"),
        "export over another": Stage(export, made / "again" / "out", "out/given"),
    }


def begin(stage: Stage, folder: Path) -> Path:
    folder.mkdir()
    if stage.prepared:
        shutil.copytree(stage.prepared, folder / "out")
    return folder


def whole(out: Path) -> None:
    """Whoever has its final name is whole: each sealed folder is as its manifest says, and no other one is sealed by
    half; JSON files are JSON."""
    for seal in SEALS:
        for path in out.rglob(seal):
            if "files" in json.loads(path.read_text()) and not any(p.startswith(".") for p in path.parts):
                artifacts.verify(path.parent, manifest=seal)
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    last = out / "checkpoints" / "last"
    if last.exists():
        artifacts.verify(last.parent / json.loads(last.read_text())["checkpoint"], manifest="COMPLETE.json")


def chosen(points: list[str]) -> list[str]:
    """<point>:<n>, as FAULT takes them."""
    found = []
    for name, times in Counter(points).items():
        some = range(1, times + 1) if ALL else [(times + 1) // 2]
        found += [f"{name}:{n}" for n in some]
    return found


STAGES = ["train", "distill", "capture", "label", "export", "export over another"]


@pytest.mark.parametrize("name", STAGES)
def test_dies_at_every_point(name: str, stages: dict[str, Stage], tmp_path: Path, capsys: Any) -> None:
    stage, log = stages[name], tmp_path / "points"
    alone = begin(stage, tmp_path / "alone")
    before = stage.content(alone)
    code, output = draftsmith(*stage.command, cwd=alone, FAULT_LOG=str(log))
    assert code == 0, output
    passed[name] = log.read_text().splitlines()
    after, deaths = stage.content(alone), chosen(passed[name])
    for n, fault in enumerate(deaths):
        folder = begin(stage, tmp_path / str(n))
        code, output = draftsmith(*stage.command, cwd=folder, FAULT=fault)
        assert code == faults.KILLED, f"{fault}: {output}"
        whole(folder / "out")
        if before:
            assert stage.content(folder) in (before, after), f"{fault}: a mixture of old and new"
        code, output = draftsmith(*stage.command, cwd=folder)
        assert code == 0, f"{fault}: {output}"
        assert stage.content(folder) == after, fault
        litter = [str(p) for p in folder.rglob(".*") if not p.name.endswith("lock")]
        assert not litter, f"{fault}: {litter}"
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n    {name}: {len(deaths)} deaths at {len(set(passed[name]))} points", end="")


def test_dies_where_a_file_system_cannot_exchange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There an old folder is moved aside for a moment: it goes back, or the new one stands."""
    monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    passed["no exchange"] = ["publish.aside"]
    for fault, stands in (("publish.aside", "old"), ("publish.named:2", "new")):
        target = tmp_path / fault / "folder"

        def publish(text: str, target: Path = target) -> None:
            with artifacts.publish(target, kind="test") as folder:
                (folder / "text").write_text(text)

        publish("old")
        child = os.fork()
        if not child:
            try:
                faults._passed.clear()
                os.environ["FAULT"] = fault.replace(":2", "")
                publish("new")
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == faults.KILLED
        artifacts._reclaim(target)
        artifacts.verify(target)
        assert (target / "text").read_text() == stands
        publish("newest")
        assert (target / "text").read_text() == "newest"
        assert os.listdir(target.parent) == ["folder"]


def test_every_point_is_died_at() -> None:
    """Whoever adds a point adds a stage that passes it."""
    missing = [name for name in [*STAGES, "no exchange"] if name not in passed]
    if missing:
        pytest.skip(f"needs the whole file: {', '.join(missing)} did not run")
    named = set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("faults.point"):
                assert isinstance(node.args[0], ast.Constant), f"{path}: a point's name is written out"
                named.add(node.args[0].value)
    assert named == {point for points in passed.values() for point in points}
