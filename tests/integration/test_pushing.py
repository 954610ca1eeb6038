"""export push=…: what reaches the hub is the exported folder, to the byte; what fails is told; the token never is."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from draftsmith import artifacts
from draftsmith.exporters import card

from .conftest import call, finish, lines, start
from .hub import Hub, Repository

TOKEN = "hf_nobodyMayReadThis"


@pytest.fixture(scope="module")
def run(training: list[str], micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two heads, evaluated."""
    folder = tmp_path_factory.mktemp("pushed")
    told = [*training, "head=[medusa,kangaroo]", "heads.medusa.num_heads=2", "trainer.max_steps=2", "run_dir=run"]
    for verb, given in (
        ("train", told),
        ("evaluate", ["run_dir=run", f"prompts.path={micro / 'prompts.jsonl'}", "decoding.max_new_tokens=8",
                      "repeats=1", "threads=1", "baselines=few"]),
    ):  # fmt: skip
        code, output = call(verb, *given, cwd=folder)
        assert code == 0, output
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process takes for the real one, logged in."""
    own = Hub(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", own.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    with own.serving():
        yield own


def export(run: Path, cwd: Path, *more: str) -> tuple[int, str]:
    return call("export", f"run_dir={run}", "exporter=native", "out=out", *more, cwd=cwd)


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one(run: Path, micro: Path) -> list[str]:
    return [f"load=[{run / 'heads' / 'medusa'}]", "base=hf", f"base.path={micro / 'base'}"]


def test_the_repository_is_the_folder(run: Path, micro: Path, tmp_path: Path, hub: Hub) -> None:
    code, output = export(run, tmp_path, *one(run, micro), "push=me/medusa-micro")
    assert code == 0, output
    (name,) = hub.repositories
    assert name == "me/medusa-micro"
    assert hub.repositories[name].private
    files = hub.repositories[name].files
    assert files == held(tmp_path / "out")
    assert {"README.md", "config.json", "manifest.json", "model.safetensors"} <= set(files)
    assert f"medusa -> {hub.url}/me/medusa-micro" in output
    assert f"note: it names the base {micro / 'base'}; base=hf base.path=<its hub id> names it for others" in output
    assert TOKEN not in output
    assert not any(TOKEN.encode() in content for content in files.values())
    code, output = export(run, tmp_path, *one(run, micro), "push=me/medusa-micro")
    assert (code, hub.repositories[name].files) == (0, files), output


def test_several_heads_each_have_a_repository_with_their_figures(run: Path, tmp_path: Path, hub: Hub) -> None:
    code, output = export(run, tmp_path, "push=me/micro", "push_private=false")
    assert code == 0, output
    assert sorted(hub.repositories) == ["me/micro-kangaroo", "me/micro-medusa"]
    evaluated = artifacts.read_json(run / "evaluation.json")["heads"]
    for name in ("kangaroo", "medusa"):
        own = hub.repositories[f"me/micro-{name}"]
        assert not own.private
        assert own.files == held(tmp_path / "out" / name)
        artifacts.verify(tmp_path / "out" / name)
        told = huggingface_hub.ModelCard(own.files[card.FILE].decode()).data
        found = {r.metric_type: r.metric_value for r in told.eval_results or []}
        assert found == {m: round(evaluated[name][m], 4) for m in card.METRICS}
        assert told.base_model is None
        assert str(tmp_path) not in told.to_yaml()


def test_one_process_from_the_command_line(run: Path, micro: Path, tmp_path: Path) -> None:
    """As a user calls it, with the hub's own environment: stdout and stderr hold the address, not the token."""
    with Hub(TOKEN).serving() as own:
        given = [f"run_dir={run}", "exporter=native", *one(run, micro), "out=out", "push=me/other", "debug=true"]
        environment = {"HF_ENDPOINT": own.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        process = start([sys.executable, "-m", "draftsmith.export", *given], tmp_path, **environment)
        code, output = finish(process)
    assert code == 0, output
    assert own.repositories["me/other"].files == held(tmp_path / "out")
    assert f"{own.url}/me/other" in output
    assert TOKEN not in output


@pytest.mark.parametrize(
    ("change", "push", "says"),
    [
        ({"HF_TOKEN": None}, "me/medusa", "nobody is logged in on this machine; log in with `hf auth login`"),
        ({"HF_HUB_OFFLINE": True}, "me/medusa", "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"),
        ({}, "a/b/c", "push=a/b/c: no name of a repository"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_made(
    run: Path,
    micro: Path,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    push: str,
    says: str,
) -> None:
    if "HF_TOKEN" in change:
        monkeypatch.delenv("HF_TOKEN")
    else:
        for name, value in change.items():
            monkeypatch.setattr(constants, name, value)
    code, output = export(run, tmp_path, *one(run, micro), f"push={push}")
    assert code == 2, output
    assert says in output
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        ({"repos/create": 401}, 2, "the hub refused (401)"),
        ({"repos/create": 403}, 2, "log in with `hf auth login`"),
        ({"commit": 413}, 2, "the hub refused (413)"),
        ({"repos/create": 500}, 6, "the hub did not answer as it should"),
        ({"validate-yaml": 418}, 2, "the hub refused (418)"),
    ],
)
def test_the_export_stays_where_the_hub_fails(
    run: Path, micro: Path, tmp_path: Path, hub: Hub, fails: dict[str, int], code: int, says: str
) -> None:
    hub.fails = fails
    found, output = export(run, tmp_path, *one(run, micro), "push=me/medusa")
    assert found == code, output
    assert says in output
    assert "the export is complete in out, and `hf upload me/medusa out` uploads it too" in output
    assert "not with Bearer <token>" in output
    assert TOKEN not in output
    artifacts.verify(tmp_path / "out")


def test_nobody_at_the_hubs_address(
    run: Path, micro: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        code, output = export(run, tmp_path, *one(run, micro), "push=me/medusa")
    assert code == 6, output
    assert "push=me/medusa: the hub did not answer as it should" in output
    artifacts.verify(tmp_path / "out")


def test_a_wrong_token(run: Path, micro: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anothersToken")
    code, output = export(run, tmp_path, *one(run, micro), "push=me/medusa")
    assert code == 2, output
    assert "the hub refused (401)" in output
    assert "hf_anothersToken" not in output


def test_what_everybody_sees_is_meant_so(run: Path, micro: Path, tmp_path: Path, hub: Hub) -> None:
    hub.repositories["me/public"] = Repository(private=False, files={"theirs.txt": b"1"})
    code, output = export(run, tmp_path, *one(run, micro), "push=me/public")
    assert code == 2, output
    assert "push=me/public: everybody can see this repository; name another, or say push_private=false" in output
    assert hub.repositories["me/public"].files == {"theirs.txt": b"1"}
    code, output = export(run, tmp_path, *one(run, micro), "push=me/public", "push_private=false")
    assert code == 0, output
    assert hub.repositories["me/public"].files == {"theirs.txt": b"1", **held(tmp_path / "out")}


def test_another_evaluation_is_on_no_card(run: Path, tmp_path: Path) -> None:
    """Its figures are of other heads: only the run directory they were measured in and the head's own size count."""
    shutil.copytree(run, tmp_path / "run")
    told = artifacts.read_json(tmp_path / "run" / "evaluation.json")
    told["heads"]["medusa"]["parameters"] += 1
    lines(tmp_path / "run" / "evaluation.json", [told])
    code, output = export(tmp_path / "run", tmp_path)
    assert code == 0, output
    assert "medusa: its card tells" not in output
    assert "kangaroo: its card tells what evaluation.json measured" in output
    assert "by draftsmith evaluate" not in (tmp_path / "out" / "medusa" / card.FILE).read_text()
