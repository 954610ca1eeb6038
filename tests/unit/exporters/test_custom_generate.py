"""The folder for transformers' custom_generate: what lies in it, that it appears whole or not at all, and what a gate
takes along. tests/integration/test_custom_generate.py decodes with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith import artifacts
from draftsmith.base.lm import BaseLM
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import custom_generate, native
from draftsmith.exporters.custom_generate import CustomGenerate, CustomGenerateConfig
from draftsmith.heads.acceptance import Acceptance, AcceptanceConfig
from draftsmith.heads.draft_model import DraftModel
from draftsmith.heads.kangaroo import Kangaroo, KangarooConfig
from draftsmith.heads.medusa import Medusa

MakeHead = Callable[..., Medusa]
OWN = {"custom_generate/generate.py", "custom_generate/requirements.txt"}
NATIVE = {"README.md", "config.json", "model.safetensors", "capsule.safetensors"}


def export(folder: Path, head: Any, base: BaseLM) -> Path:
    return CustomGenerate(CustomGenerateConfig()).save(folder, head, base, name="mine")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def drafter(base: BaseLM) -> Kangaroo:
    torch.manual_seed(3)
    head = Kangaroo(KangarooConfig(), base.spec)
    head.initialise(base)
    return head.eval()


@pytest.fixture
def gate(base: BaseLM, drafter: Kangaroo) -> Acceptance:
    return Acceptance(Acceptance.completed(AcceptanceConfig(), base.spec, drafter), base.spec)


def of(drafter: Any, path: Path | None) -> dict[str, Any]:
    sha256 = artifacts.tensors_sha256(drafter.state_dict())
    return {"beside": {"kind": type(drafter).__name__, "path": path and str(path), "sha256": sha256}}


def test_it_is_the_native_folder_and_what_transformers_asks_for(
    tmp_path: Path, base: BaseLM, make_head: MakeHead
) -> None:
    head = make_head()
    folder = export(tmp_path / "out", head, base)
    facts = artifacts.verify(folder)
    assert facts["kind"] == "export custom_generate"
    assert facts["files"].keys() == NATIVE | OWN
    back = native.load(folder, base.spec)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in head.state_dict().items())
    defined: dict[str, Any] = {}
    exec(compile((folder / "custom_generate" / "generate.py").read_text(), "generate.py", "exec"), defined)
    assert callable(defined["generate"])
    card = (folder / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in card
    assert "custom_generate=" in card


def test_what_is_to_be_called_is_told(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    exporter, folder = CustomGenerate(CustomGenerateConfig()), Path("some/folder")
    call = 'model.generate(**inputs, custom_generate="some/folder", trust_remote_code=True)'
    assert exporter.start(folder, make_head(), base) == call
    adapted: Any = SimpleNamespace(adapter=object())
    assert exporter.start(folder, make_head(), adapted) == f'model.load_adapter("some/folder/adapter"); {call}'


def test_it_requires_the_draftsmith_that_wrote_it(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    folder = export(tmp_path / "out", make_head(), base)
    written = json.loads((folder / "config.json").read_text())["draftsmith"]
    assert (folder / "custom_generate" / "requirements.txt").read_text() == f"draftsmith>={written}\n"


@pytest.mark.parametrize(
    ("version", "line"), [("1.2", ">=1.2"), ("1.2.dev3+g12", ">=1.2"), ("0.1rc1", ">=0.1"), ("unknown", "")]
)
def test_a_version_is_written_as_transformers_reads_one(tmp_path: Path, version: str, line: str) -> None:
    """It takes the digits and dots after the comparison, and stumbles over a dot at their end."""
    from transformers.dynamic_module_utils import split_package_version

    artifacts.write_json(tmp_path / "config.json", {"draftsmith": version})
    assert custom_generate.requirements(tmp_path) == f"draftsmith{line}\n"
    if line:
        assert "".join(split_package_version(f"draftsmith{line}")) == f"draftsmith{line}"


def test_same_bytes_twice(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    head = make_head()
    first = content(export(tmp_path / "out", head, base))
    assert content(export(tmp_path / "out", head, base)) == first


def test_what_does_not_read_back_equal_never_appears(
    tmp_path: Path, base: BaseLM, make_head: MakeHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = content(export(tmp_path / "out", make_head(num_heads=2), base))
    write = artifacts.write_tensors

    def spoiled(path: Path, tensors: dict[str, torch.Tensor], *told: Any) -> None:
        write(path, {k: t + 1 for k, t in tensors.items()} if path.name == "model.safetensors" else tensors, *told)

    monkeypatch.setattr(artifacts, "write_tensors", spoiled)
    for name in ("out", "new"):
        with pytest.raises(DataError, match="not the head that was saved"):
            export(tmp_path / name, make_head(), base)
    assert content(tmp_path / "out") == old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gate_takes_its_drafter_along(tmp_path: Path, base: BaseLM, gate: Acceptance, drafter: Kangaroo) -> None:
    """Attached to it, or where its folder says; and it is found where the folder has moved to."""
    gate.attach(drafter)
    first = export(tmp_path / "out", gate, base)
    assert {"drafter/model.safetensors", "drafter/manifest.json"} < artifacts.verify(first)["files"].keys()

    trained = native.save(tmp_path / "heads" / "kangaroo", drafter, name="kangaroo")
    alone = Acceptance(gate.config, base.spec)
    alone.said = of(drafter, trained)
    second = export(tmp_path / "again", alone, base)
    shutil.rmtree(trained.parent)
    for folder in (first, second):
        back = native.load(folder.rename(tmp_path / "elsewhere") / "drafter", base.spec)
        assert all(torch.equal(t, back.state_dict()[name]) for name, t in drafter.state_dict().items())
        gone = native.load(tmp_path / "elsewhere", base.spec).said["beside"]
        assert gone["sha256"] == artifacts.tensors_sha256(drafter.state_dict())
        shutil.rmtree(tmp_path / "elsewhere")


def test_a_gate_without_its_drafter_is_refused(
    tmp_path: Path, base: BaseLM, gate: Acceptance, drafter: Kangaroo
) -> None:
    gate.said = of(drafter, tmp_path / "gone")
    with pytest.raises(DataError, match=r"mine: a gate, whose drafter was at .*gone, where nothing is now"):
        export(tmp_path / "out", gate, base)
    other = Kangaroo(KangarooConfig(), base.spec)
    other.load_state_dict({k: t + 1 for k, t in drafter.state_dict().items()})
    gate.attach(other)
    with pytest.raises(DataError, match="mine: a gate made for another drafter"):
        export(tmp_path / "out", gate, base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attached", [True, False])
def test_a_gate_for_a_draft_model_is_refused(tmp_path: Path, base: BaseLM, gate: Acceptance, attached: bool) -> None:
    gate.said = {"beside": {"kind": "draft_model", "path": str(tmp_path), "sha256": "x"}}
    gate.attach(DraftModel(base, 4) if attached else None)
    with pytest.raises(ConfigError, match=r"mine is a gate for a draft model.*use exporter=native"):
        export(tmp_path / "out", gate, base)
    assert list(tmp_path.iterdir()) == []
