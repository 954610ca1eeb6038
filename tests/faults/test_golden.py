"""What earlier versions left on disk is read by this one; what a later one leaves is refused, with both numbers.

golden/<version>/ was written once by make.py and stays as it is.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from draftsmith import artifacts, beside, claims
from draftsmith.base import lm
from draftsmith.data import labels, store
from draftsmith.data.rows import read_folder
from draftsmith.errors import DataError
from draftsmith.exporters import capsule, native
from tests.integration.conftest import call

pytestmark = pytest.mark.faults

GOLDEN = Path(__file__).with_name("golden")
VERSIONS = sorted(p.name for p in GOLDEN.iterdir() if (p / "command.json").is_file())
SEALS = (artifacts.MANIFEST, "COMPLETE.json")
NEAR = 1e-5  # of weights that another version of torch has trained further
KEPT = 400_000  # bytes that a version may take for ever


@pytest.fixture(scope="module", params=[f"{v}{kind}" for v in VERSIONS for kind in ("", " without schema")])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a version's folder; and the same as if there had been no schema numbers yet."""
    version, _, bare = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("golden") / "then"
    shutil.copytree(GOLDEN / version, folder)
    if bare:
        for path in seals(folder):
            restamp(path, None)
    return folder


def seals(folder: Path) -> list[Path]:
    """The manifests that no other manifest lists."""
    found = [p for name in SEALS for p in folder.rglob(name) if p.parent.name != "rows" or p.parent.parent == folder]
    return [p for p in found if "files" in json.loads(p.read_text())]


def restamp(path: Path, schema: int | None) -> None:
    facts = json.loads(path.read_text())
    facts.pop("schema", None)
    path.write_text(json.dumps(facts if schema is None else {**facts, "schema": schema}))


def command(folder: Path) -> list[str]:
    return json.loads((folder / "command.json").read_text())


def test_there_is_a_folder_of_this_version() -> None:
    from importlib.metadata import version

    assert version("draftsmith") in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_kept_is_small_and_tells_nothing_of_its_machine(version: str) -> None:
    files = [p for p in (GOLDEN / version).rglob("*") if p.is_file()]
    assert len(files) > 20
    assert sum(p.stat().st_size for p in files) < KEPT
    for path in files:
        content = path.read_bytes()
        assert str(Path.home()).encode() + b"/" not in content, path
        assert str(GOLDEN.parents[2]).encode() not in content, path
        assert path.suffix == ".safetensors" or socket.gethostname().encode() not in content, path
    stamped = [json.loads(p.read_text()).get("schema") for p in seals(GOLDEN / version)]
    assert len(stamped) == 6
    assert set(stamped) == {1}


def test_its_killed_run_goes_on_and_ends_as_it_would_have(golden: Path) -> None:
    shutil.copytree(golden / "killed", golden / "again")
    code, output = call("train", *command(golden), "run_dir=again", cwd=golden)
    assert code == 0, output
    assert "resuming after step 3 of 8" in output
    want, got = (load_file(golden / run / "heads/medusa/model.safetensors") for run in ("finished", "again"))
    assert want.keys() == got.keys()
    assert max(float((want[k] - got[k]).abs().max()) for k in want) < NEAR
    logs = [(golden / run / "metrics.jsonl").read_text().splitlines() for run in ("finished", "again")]
    steps, losses = ([[json.loads(line)[key] for line in log] for log in logs] for key in ("step", "train/medusa/loss"))
    assert steps[0] == steps[1] == list(range(1, 9))
    assert losses[0] == pytest.approx(losses[1], rel=NEAR)


def test_its_finished_run_is_still_complete(golden: Path) -> None:
    facts = artifacts.read_json(golden / "finished" / "COMPLETE.json")
    content = {"path": artifacts.file_sha256(golden / "rows" / artifacts.MANIFEST)}  # without its schema: another file
    artifacts.write_json(golden / "finished/COMPLETE.json", {**facts, "data_sha256": artifacts.fingerprint(content)})
    before = artifacts.file_sha256(golden / "finished/heads/medusa/model.safetensors")
    code, output = call("train", *command(golden), "run_dir=finished", cwd=golden)
    assert (code, "already complete" in output) == (0, True), output
    assert artifacts.file_sha256(golden / "finished/heads/medusa/model.safetensors") == before


@pytest.mark.parametrize("where", ["finished/heads/medusa", "export"])
def test_its_head_answers_as_it_did(golden: Path, where: str) -> None:
    base = lm.load(str(golden / "base"))
    head = beside.checked(golden / where, base)
    assert head.golden is not None
    assert head.golden.tensors["drafts"].shape[0] == capsule.TEXTS
    next(head.parameters()).data.add_(1.0)
    with pytest.raises(DataError, match="does not answer as it did when it was saved"):
        capsule.check(head, base, head.golden, where)


def test_its_rows_store_and_labels_are_read(golden: Path) -> None:
    base = lm.load(str(golden / "base"))
    rows, facts = read_folder(golden / "rows", base.spec)
    assert (len(rows), facts["kind"]) == (10, "rows")
    told, _ = read_folder(golden / "labels", base.spec)
    assert told.labels is not None
    assert len(told) == len(rows)
    store.verify(golden / "store")
    kept = store.open_store(golden / "store", labels.identity(base.spec, base.weights_sha256()), base.spec, base.dtype)
    assert store.compare(kept, base) == store.CHECKED


# --- what a later version leaves


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The newest version's folder, as the next one could have written it."""
    shutil.copytree(GOLDEN / VERSIONS[-1], tmp_path / "later")
    for path in seals(tmp_path / "later"):
        restamp(path, artifacts.SCHEMA + 1)
    return tmp_path / "later"


NUMBERS = r"written by a newer draftsmith \(schema 2; this one reads up to 1\): update draftsmith"


def test_a_later_checkpoint_is_refused_and_not_passed_over_as_damaged(later: Path) -> None:
    shutil.copy(GOLDEN / VERSIONS[-1] / "rows/manifest.json", later / "rows/manifest.json")
    before = {p: p.read_bytes() for p in (later / "killed").rglob("*") if p.is_file()}
    code, output = call("train", *command(later), "run_dir=killed", cwd=later)
    assert code == 3, output
    assert "step-00000003/COMPLETE.json: written by a newer draftsmith (schema 2; this one reads up to 1)" in output
    assert "skipped" not in output
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("what", ["rows", "store", "labels", "head", "export"])
def test_later_rows_stores_labels_and_heads_are_refused(later: Path, what: str) -> None:
    base = lm.load(str(later / "base"))
    readers: dict[str, Any] = {
        "rows": lambda: read_folder(later / "rows", base.spec),
        "store": lambda: store.verify(later / "store"),
        "labels": lambda: read_folder(later / "labels", base.spec),
        "head": lambda: native.load(later / "finished/heads/medusa", base.spec),
        "export": lambda: native.load(later / "export", base.spec),
    }
    with pytest.raises(DataError, match=NUMBERS):
        readers[what]()


def test_training_on_later_rows_names_them(later: Path) -> None:
    code, output = call("train", *command(later), "run_dir=new", cwd=later)
    assert code == 3, output
    assert "rows/manifest.json: written by a newer draftsmith" in output
    assert not (later / "new" / "checkpoints").exists()


def test_a_later_form_of_a_head_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "head"
    shutil.copytree(GOLDEN / VERSIONS[-1] / "export", folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "format_version": 2}))
    facts = artifacts.read_json(folder / artifacts.MANIFEST)
    artifacts.seal(folder, facts["files"], kind=facts["kind"])
    with pytest.raises(DataError, match="format draftsmith-head 2; this version reads draftsmith-head 1"):
        native.load(folder, lm.load(str(GOLDEN / VERSIONS[-1] / "base")).spec)


@pytest.mark.parametrize("content", ["a: [1, 2", "\x00", "- 1", "3"])
def test_a_damaged_configuration_of_a_run_is_told(tmp_path: Path, content: str) -> None:
    """config.yaml is the one file of a run that has no seal: it is there for people to read."""
    folder = tmp_path / "then"
    shutil.copytree(GOLDEN / VERSIONS[-1], folder)
    (folder / "killed/config.yaml").write_text(content)
    with pytest.raises(DataError, match=r"killed/config\.yaml: damaged"):
        claims.stored(folder / "killed")
    code, output = call("train", *command(folder), "run_dir=killed", cwd=folder)
    assert code == 3, output
    assert "bring it back, or choose another run" in output
    assert (folder / "killed/checkpoints/step-00000003/COMPLETE.json").exists()
