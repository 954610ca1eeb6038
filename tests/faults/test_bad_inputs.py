"""Every bad input ends in its documented code, with one line that names the place and the cure, and changes nothing."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from draftsmith import config
from tests.integration.conftest import SHAPE

from .bad_inputs import PAGE, TABLE, page
from .bad_kinds import Bad, World

pytestmark = pytest.mark.faults

QUICK = ["data.length=64", "data.batch_size=2", "trainer.threads=1", "trainer.epochs=null", "trainer.max_steps=1"]


def given(verb: str, world: World) -> list[str]:
    """What a verb is called with where nothing is wrong."""
    base = ["base=hf", f"base.path={world.base}"]
    rows = ["data=jsonl", f"data.path={world.folder / 'rows.jsonl'}"]
    return {
        "train": [*base, *rows, *QUICK],
        "train gate": [
            *base,
            "companion=hf",
            f"companion.path={world.base}",
            "head=[acceptance]",
            "heads.acceptance.verify=sampling",
            *rows,
            *QUICK,
        ],
        "distill": [*base, "data.prompts.synthetic=4", "data.generation.max_new_tokens=4"],
        "capture": base,
        "evaluate": ["baselines=few", "repeats=1", "decoding.max_new_tokens=4", "prompts.synthetic=2"],
        "export": [*base, "run_dir=none", "exporter=native"],
        "run": ["exporter=native"],
    }[verb]


Met = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(micro_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = micro_maker(tmp_path_factory.mktemp("world"), SHAPE, rows=16)
    made = World(folder)
    base = ["base=hf", f"base.path={made.base}"]
    for verb, *overrides in (
        (
            "distill",
            *given("distill", made),
            "data.prompts.synthetic=12",
            "data.generation.shard_rows=6",
            "out=rowsdir",
        ),
        ("capture", *base, "rows=rowsdir", "out=store", "store.shard_rows=6", "store.dtype=fp32"),
        ("label", *base, "companion=hf", f"companion.path={made.base}", "rows=rowsdir", "out=labels"),
        ("train", *given("train", made), "trainer.max_steps=2", "trainer.checkpoint_every=1", "run_dir=run"),
    ):
        code, told = typed(verb, overrides, folder)
        assert code == 0, told
    return made


def typed(verb: str, overrides: list[str], cwd: Path) -> tuple[int, str]:
    """(exit code, output) of the command as its main() runs it, in this process."""
    with _quietly(cwd) as told, pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["draftsmith", *overrides])
        with pytest.raises(SystemExit) as ended:
            config.command(verb, import_module(f"draftsmith.{verb}").run)
    return int(ended.value.code or 0), told.getvalue()


@pytest.fixture(scope="module")
def changed(world: World) -> Met:
    """(exit code, output) of a verb whose usual configuration, composed once, is changed."""

    @functools.cache
    def composed(verb: str) -> Any:
        return config.compose(_verb(verb), given(verb, world))

    def met(verb: str, changes: list[str], cwd: Path) -> tuple[int, str]:
        name = _verb(verb)
        with _quietly(cwd) as told:
            cfg = config.changed(composed(verb), name, changes)
            code = config._guarded(lambda: import_module(f"draftsmith.{name}").run(cfg), name, debug=False)
        return code, told.getvalue()

    return met


def _verb(name: str) -> str:
    return "export" if name == "run" else name.split()[0]


@contextlib.contextmanager
def _quietly(cwd: Path) -> Iterator[io.StringIO]:
    told = io.StringIO()
    with (
        contextlib.chdir(cwd),
        pytest.MonkeyPatch.context() as m,
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        m.setenv("DRAFTSMITH_CACHE", str(cwd / "cache"))
        yield told


def checkpoint(folder: str) -> tuple[int, str]:
    from draftsmith.training.checkpoint import load_last

    found, warnings = load_last(Path(folder))
    assert found is not None
    assert found.step == 1
    return 0, "".join(f"{line}\n" for line in warnings)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what)
def test_it_ends_as_documented(bad: Bad, world: World, changed: Met, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    changes = bad.make(own, world)
    before = content(own) | content(world.folder)
    if bad.verb == "checkpoint":
        code, told = checkpoint(*changes)
    elif bad.command:
        code, told = typed(bad.verb, [*given(bad.verb, world), *changes], tmp_path)
    else:
        code, told = changed(bad.verb, changes, tmp_path)
    assert code == bad.code, told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if code else 0), told
    assert "Traceback" not in told
    assert bad.matches(errors[0].removeprefix("error: ") if code else told), f"{bad.says}\n{told}"
    after = content(own) | content(world.folder)
    assert {name: after.get(name) for name in before} == before
    if code:
        assert not [p for p in tmp_path.rglob("COMPLETE.json") if p not in before], "a run says that it is complete"
        assert not (own / "out").exists()


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")}


def test_the_page_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/errors.md says what was met here; `cd tests && python -m faults.bad_inputs` writes it anew."""
    assert page(PAGE.read_text()) == PAGE.read_text()
    assert len({bad.what for bad in TABLE}) == len(TABLE)
    assert all(len(bad.says.strip("… ")) >= 8 for bad in TABLE), "a line that says nothing"
    with capsys.disabled():
        print(f"\n    {len(TABLE)} bad inputs: each ends in its documented code with its place")


def test_the_cure_of_a_damaged_store_and_of_damaged_labels_works(world: World, tmp_path: Path) -> None:
    """What the line says is done: the shard is deleted, the manifests too, and the same command makes it again."""
    base = ["base=hf", f"base.path={world.base}"]
    for verb, shard, *overrides in (
        ("capture", "captures-00000.safetensors", "store.shard_rows=6", "store.dtype=fp32"),
        ("label", "rows-00000.parquet", "companion=hf", f"companion.path={world.base}"),
    ):
        kind = {"capture": "store", "label": "labels"}[verb]
        out = tmp_path / kind
        shutil.copytree(world.folder / kind, out)
        (out / shard).unlink()
        command = [*base, *overrides, f"rows={world.folder / 'rowsdir'}", f"out={out}"]
        code, told = typed(verb, command, world.folder)
        assert (code, "makes it again" in told) == (3, True), told
        for manifest in out.rglob("manifest.json"):
            manifest.unlink()
        code, told = typed(verb, command, world.folder)
        assert code == 0, told
        assert (out / shard).read_bytes() == (world.folder / kind / shard).read_bytes()
