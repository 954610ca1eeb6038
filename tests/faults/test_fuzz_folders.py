# ruff: noqa: F811 (fixtures are imported, then asked for)
"""Whatever lies in a folder of rows, a head, a checkpoint, a store, a plan of labels or a run: it is read, or refused
by name, in one line, with its code. Nothing else: no other exception, and nothing is written beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from draftsmith import config
from draftsmith.data import sources
from draftsmith.data.rows import Row, read_folder, write_rows
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError, DataError

from .fuzzing import as_json, base, harmed, here, micro, mutated, of, often, outside, refused, with_change  # noqa: F401

pytestmark = pytest.mark.faults


ROWS = [Row(f"{i:x}-0", [1, 2, 3 + i], [0, 1, 1], f"f:{i}", "p", "q", '{"prompt": "a"}', 3, "stop") for i in range(3)]


@pytest.fixture(scope="module")
def rows(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import dataclasses

    folder = tmp_path_factory.mktemp("rows") / "rows"
    write_rows(folder, ROWS, base=dataclasses.asdict(base.spec), weights={"p": 2.0})
    return folder


@often(200)
@given(data=st.data(), seal=st.booleans())
def test_folders_of_rows(here: Path, rows: Path, base: Any, data: st.DataObject, seal: bool) -> None:
    change = data.draw(of(rows, "manifest.json", "manifest.json", "rows-00000.parquet"))
    folder = with_change(rows, here / "copy", change, seal="manifest.json" if seal else None)

    def read() -> None:
        if sources.published_as(folder) in ("rows", "labels"):
            found = read_folder(folder, base.spec)[0]
            assert [found[i].said for i in range(len(found))]
        else:
            sources.check(SourceConfig(path=str(folder)))

    before = outside(folder)
    refused(read, "copy")
    assert outside(folder) == before


# --- heads, checkpoints, stores


@pytest.fixture(scope="module")
def head(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from draftsmith.exporters import capsule, native
    from draftsmith.heads.medusa import Medusa, MedusaConfig

    made = Medusa(MedusaConfig(num_heads=2), base.spec)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    made.golden = capsule.record(made, base)
    tree = {"kind": "static", "depth": 2, "paths": [[0], [0, 0]]}
    tuned = {"tree": tree, "depth": 2, "asked": ["a"], "nodes": 3, "name": "static", "temperature": 0.0}
    tuned |= {"measured_speedup": 1.5, "predicted_speedup": 1.4}
    made.said = {"training": {"rows": 3}, "beside": None, "tuned": tuned}
    return native.save(tmp_path_factory.mktemp("head") / "medusa", made, name="medusa")


@often(120)
@given(data=st.data())
def test_heads(here: Path, head: Path, base: Any, data: st.DataObject) -> None:
    from draftsmith import beside, evaluate, judging
    from draftsmith.exporters import forms

    names = ["config.json"] * 4 + ["capsule.safetensors", "model.safetensors", "manifest.json"]
    folder = with_change(head, here / "medusa", data.draw(of(head, *names)), seal="manifest.json")

    def read() -> None:
        found = beside.checked(folder, base)
        evaluate.tuned_on([found])
        judging.tuned_tree(found)
        assert 1 <= forms.drafts(found) <= found.max_depth

    before = outside(folder)
    refused(read, "medusa")
    assert outside(folder) == before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from draftsmith.training import checkpoint

    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    folder.mkdir()
    tensors = {"weight.a": torch.zeros(2, 2), "exp_avg.a": torch.ones(2, 2), "exp_avg_sq.a": torch.ones(2, 2)}
    for step in (1, 2):
        checkpoint.save(folder, step, {"medusa": (tensors, step)}, keep=2, ties={"base": "a", "rows": "b"})
    return folder


@often(150)
@given(data=st.data(), seal=st.booleans())
def test_checkpoints(here: Path, checkpoints: Path, data: st.DataObject, seal: bool) -> None:
    from draftsmith.training import checkpoint

    step = checkpoints / "step-00000002"
    change = data.draw(of(step, "state.json", "state.json", "COMPLETE.json", "medusa.safetensors"))
    shutil.rmtree(here / "checkpoints", ignore_errors=True)
    shutil.copytree(checkpoints, here / "checkpoints")
    with_change(step, here / "checkpoints" / "step-00000002", change, seal="COMPLETE.json" if seal else None)
    found = refused(lambda: checkpoint.load_last(here / "checkpoints"), "step-00000002")
    if found is not None:
        loaded, warnings = found
        assert loaded is not None
        assert len(warnings) == (loaded.step == 1)
        assert all("\n" not in line for line in warnings)
        part = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(2, 2))})
        refused(lambda: checkpoint.check(loaded, {"medusa": part}), "checkpoint")


@pytest.fixture(scope="module")
def store(base: Any, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from draftsmith import prepare
    from draftsmith.contracts import Needs
    from draftsmith.data import labels, store, storing

    folder = tmp_path_factory.mktemp("store") / "store"
    folder.mkdir()
    given_ = store.StoreConfig(dtype="fp32", shard_rows=2)
    kept = storing.kept_of(given_, Needs(frozenset({0}), final=True), 2, [], base.spec.hidden_size, base.dtype)
    plan = {
        "base": labels.identity(base.spec, base.weights_sha256()),
        "rows": {"manifest_sha256": prepare.content_sha256(rows)},
        "store": store.identity(kept),
    }
    job = storing.Job(folder, read_folder(rows, base.spec)[0], plan, base, given_)
    job.begin(rows)
    job.run(lambda line: None)
    assert job.seal()
    return folder


@often(200)
@given(data=st.data())
def test_stores(here: Path, store: Path, base: Any, data: st.DataObject) -> None:
    from draftsmith.data import labels
    from draftsmith.data import store as stores

    names = ["plan.json"] * 4 + ["manifest.json", "captures-00000.safetensors"]
    folder = with_change(store, here / "store", data.draw(of(store, *names)), seal="manifest.json")

    def read() -> None:
        stores.verify(folder)
        found = stores.open_store(folder, labels.identity(base.spec, base.weights_sha256()), base.spec, base.dtype)
        found.seen([[(0, 3)]], 3)

    refused(read, "store")


@often(100)
@given(data=st.data())
def test_a_plan_of_labels(here: Path, store: Path, data: st.DataObject) -> None:
    from draftsmith.data import labels

    plan = json.loads((store / "plan.json").read_text())
    (here / "out").mkdir(exist_ok=True)
    (here / "out" / "plan.json").write_bytes(data.draw(st.one_of(mutated(plan).map(as_json), harmed(as_json(plan)))))

    def claim() -> None:
        try:
            labels.claim(here / "out", plan)
        except ConfigError as e:  # another job's
            raise DataError(str(e)) from None

    refused(claim, str(here / "out"))


@pytest.fixture(scope="module")
def of_run(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    kept = OmegaConf.to_container(config.compose("train", ["base=hf", f"base.path={micro}/base"]))
    assert isinstance(kept, dict)
    (folder / "config.json").write_text(json.dumps({k: kept[k] for k in ("base", "heads", "seed")}))
    (folder / "COMPLETE.json").write_text(json.dumps({"heads": ["medusa"], "data_sha256": "a"}))
    return folder


@often(200)
@given(data=st.data())
def test_runs(here: Path, of_run: Path, data: st.DataObject) -> None:
    from omegaconf import OmegaConf

    from draftsmith import evaluate

    name, content = data.draw(of(of_run, "config.json", "config.json", "COMPLETE.json"))
    shutil.rmtree(here / "run", ignore_errors=True)
    shutil.copytree(of_run, here / "run")
    (here / "run" / "config.json").rename(here / "run" / "config.yaml")  # JSON is YAML
    (here / "run" / name.replace("config.json", "config.yaml")).write_bytes(content)
    (here / "run" / "heads" / "medusa").mkdir(parents=True)
    (here / "run" / "heads" / "medusa" / "config.json").write_text('{"base": {"path": "x"}}')

    def read() -> None:
        folders, kept = evaluate.heads_of(here / "run", [])
        evaluate.base_of(OmegaConf.create({}), folders, kept)

    refused(read, "run/")
