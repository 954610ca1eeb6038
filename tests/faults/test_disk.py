"""A disk that is full, read-only, over its quota or gone, before a run and in the midst of it: one line, exit 5,
nothing half-written, what was there stays as it was, and the same command completes as if nothing had been.

The disks are tmpfs mounts, since root may write where chmod forbids it. They are filled at a place in the code, so that
every stage meets a full disk exactly there, and one is filled from outside, while another process trains.
"""

# ruff: noqa: F811 (fixtures of other modules are imported, and then are names of parameters)

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from integration.conftest import Fork, micro, training  # noqa: F401

from draftsmith import config, room
from draftsmith.errors import ResourceError

from .disks import PAGE, VERBS, Made, at, check_whole, command, content, disk, equal, error_of, made  # noqa: F401

pytestmark = pytest.mark.faults

# --- in the midst of it

STAGES = [
    ("train", "draftsmith.claims.claim", 1),
    ("train", "draftsmith.training.callbacks.Events.write", 1),
    ("train", "draftsmith.training.checkpoint.save", 1),
    ("train", "draftsmith.training.checkpoint.save", 4),
    ("train", "draftsmith.exporters.native.write", 2),  # the first is a rehearsal
    ("train", "draftsmith.train.prepare.provenance", 1),
    ("distill", "draftsmith.data.journal.publish_asked", 1),
    ("distill", "draftsmith.data.journal.Shard.settle", 3),  # the first of a journal
    ("distill", "draftsmith.data.journal.Shard.publish", 2),
    ("distill", "draftsmith.data.journal.Job.seal", 1),
    ("capture", "draftsmith.data.storing.Job.begin", 1),
    ("capture", "draftsmith.data.storing.shutil.copyfile", 2),
    ("capture", "draftsmith.data.storing.Job.write", 2),
    ("capture", "draftsmith.data.storing.Job.seal", 1),
    ("label", "draftsmith.data.labels.write_shard", 2),
    ("label", "draftsmith.artifacts.seal", 1),
    ("export", "draftsmith.artifacts.write_tensors", 1),
    ("adopt", "draftsmith.exporters.native.write", 1),
    ("evaluate", "draftsmith.judging.judged", 1),
]


NAMED = [f"{verb}-{place.partition('.')[2]}-{number}" for verb, place, number in STAGES]


@pytest.mark.parametrize(("verb", "place", "number"), STAGES, ids=NAMED)
def test_a_disk_that_fills_up(made: Made, tmp_path: Path, disk: Any, verb: str, place: str, number: int) -> None:
    small = disk("size=32m")
    out, before = small.folder / "out", {}
    given = made.overrides(verb, out)
    if verb in ("export", "adopt", "evaluate"):  # what an earlier command left is replaced, or stays
        assert command(verb, *given, cwd=tmp_path)[0] == 0

    def fill() -> None:
        small.fill()
        before.update(content(out))

    with pytest.MonkeyPatch.context() as m:
        at(m, place, number, fill)
        line = error_of(*command(verb, *given, cwd=tmp_path))
    assert "No space left on device; free space there, or choose another folder" in line
    assert str(out) in line
    after = content(out)
    assert {name: after.get(name) for name in before} == before
    check_whole(out)
    small.free()
    code, output = command(verb, *given, cwd=tmp_path)
    assert code == 0, output
    equal(verb, out, made.folder / verb)


def test_a_disk_that_is_full_for_the_metrics_alone(made: Made, tmp_path: Path, disk: Any) -> None:
    small = disk("size=32m")
    given = [*made.overrides("train", small.folder / "out"), "trainer.checkpoint_every=100"]
    with pytest.MonkeyPatch.context() as m:
        at(m, "draftsmith.training.callbacks.Metrics.on_train_batch_end", 3, small.fill)
        line = error_of(*command("train", *given, cwd=tmp_path))
    assert f"{small.folder / 'out' / 'metrics.jsonl'}: cannot write metrics: No space left on device" in line
    small.free()
    assert command("train", *given, cwd=tmp_path)[0] == 0
    equal("train", small.folder / "out", made.folder / "train")


def test_a_report_that_finds_no_room_fails_nothing(made: Made, tmp_path: Path, disk: Any) -> None:
    small = disk("size=32m")
    given = made.overrides("evaluate", small.folder / "out")
    with pytest.MonkeyPatch.context() as m:
        at(m, "draftsmith.reporting.report_page.write", 1, small.fill)
        code, output = command("evaluate", *given, cwd=tmp_path)
    assert code == 0, output
    assert "warning: no report (ResourceError: " in output
    assert "No space left on device" in output
    check_whole(small.folder / "out")
    equal("evaluate", small.folder / "out", made.folder / "evaluate")


def test_another_process_fills_the_disk(made: Made, tmp_path: Path, disk: Any) -> None:
    small = disk("size=16m")
    run = small.folder / "out"
    given = [*made.overrides("train", run), "trainer.max_steps=80"]
    process = Fork("train", *given, cwd=tmp_path)
    until = time.monotonic() + 60
    while not list(run.glob("checkpoints/step-*/COMPLETE.json")):
        assert process.poll() is None, process.finish(1)
        assert time.monotonic() < until
        time.sleep(0.002)
    small.fill()
    line = error_of(*process.finish(60))
    assert "No space left on device" in line
    assert not (run / "heads").exists()
    assert list(run.glob("checkpoints/step-*/COMPLETE.json"))
    check_whole(run)
    small.free()
    code, output = command("train", *given, cwd=tmp_path)
    assert code == 0, output
    assert "resuming after step" in output
    assert command("train", *given, f"run_dir={tmp_path / 'alone'}", cwd=tmp_path)[0] == 0
    equal("train", run, tmp_path / "alone")


# --- other refusals


@pytest.mark.parametrize(
    ("verb", "place", "number"),
    [
        ("train", "draftsmith.training.callbacks.Metrics.on_train_batch_end", 3),
        ("train", "draftsmith.training.checkpoint.save", 2),
        ("train", "draftsmith.train.prepare.provenance", 1),
        ("distill", "draftsmith.data.journal.Shard.settle", 3),
        ("capture", "draftsmith.data.storing.Job.write", 2),
        ("label", "draftsmith.data.labels.write_shard", 2),
    ],
)
def test_a_folder_that_is_removed_meanwhile(made: Made, tmp_path: Path, verb: str, place: str, number: int) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as m:
        at(m, place, number, lambda: os.rename(out, tmp_path / "elsewhere"))  # at once, whoever writes there
        line = error_of(*command(verb, *made.overrides(verb, out), cwd=tmp_path))
    assert str(out) in line
    assert "gone" in line
    assert not out.exists(), sorted(out.rglob("*"))  # no half of it lies there again
    code, output = command(verb, *made.overrides(verb, out), cwd=tmp_path)
    assert code == 0, output
    equal(verb, out, made.folder / verb)


REFUSED = [("fsync", errno.EDQUOT), ("replace", errno.EIO), ("replace", errno.ESTALE), ("rename", errno.ESTALE)]


@pytest.mark.parametrize(("call", "number"), REFUSED, ids=[f"{c}-{errno.errorcode[n]}" for c, n in REFUSED])
def test_a_system_that_refuses_a_call(made: Made, tmp_path: Path, call: str, number: int) -> None:
    """os.<call> answers so (patched): at the first checkpoint but one; and from the start, where the probe meets it."""
    out = tmp_path / "out"
    given = made.overrides("train", out)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    with pytest.MonkeyPatch.context() as m:
        at(m, "draftsmith.training.checkpoint.save", 2, partial(m.setattr, os, call, refuse))
        line = error_of(*command("train", *given, cwd=tmp_path))
    assert os.strerror(number) in line
    assert [p.name for p in out.glob("checkpoints/step-*")] == ["step-00000002"]
    assert json.loads((out / "checkpoints" / "last").read_text()) == {"checkpoint": "step-00000002"}
    check_whole(out)
    code, output = command("train", *given, cwd=tmp_path)
    assert (code, "resuming after step 2" in output) == (0, True), output
    equal("train", out, made.folder / "train")
    if call == "rename":  # which moves folders: the probe moves a file
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, call, refuse)
        line = error_of(*command("train", *made.overrides("train", tmp_path / "new"), cwd=tmp_path))
    assert line.startswith(f"error: run_dir: {tmp_path / 'new'} cannot be written: {os.strerror(number)}; ")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_a_read_only_disk_is_known_at_once(made: Made, tmp_path: Path, disk: Any, verb: str) -> None:
    place = disk("ro").folder / "out"
    line = error_of(*command(verb, *made.overrides(verb, place), cwd=tmp_path))
    key = "run_dir" if verb in ("train", "evaluate") else "out"
    assert line.startswith(f"error: {key}: ")
    assert " cannot be written: Read-only file system; make it writable, or choose another folder" in line


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "evaluate"])  # which writes a page or two
def test_a_disk_that_is_too_small_is_known_at_once(
    made: Made, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(What shutil.disk_usage says is patched.)"""

    class Usage(NamedTuple):
        total: int = 10**9
        free: int = 10

    place = tmp_path / "new" / "out"
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage())
    cache = str(made.folder / "cache")  # its rows are there
    line = error_of(*command(verb, *made.overrides(verb, place), cwd=tmp_path, DRAFTSMITH_CACHE=cache))
    assert line.startswith(f"error: {'run_dir' if verb == 'train' else 'out'}: ")
    assert " needs " in line
    assert ", has 10 bytes; free space there, or " in line
    left = {p.name for p in place.rglob("*") if p.is_file()}
    asked = {"records.jsonl", "quarantine.jsonl", "manifest.json"}
    assert left == {"train": {"config.yaml", ".lock"}, "distill": {".lock", *asked}}.get(verb, set())


def test_a_file_where_a_folder_is_to_be(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        line = error_of(*command("train", *made.overrides("train", place), cwd=tmp_path))
        assert line.startswith(f"error: run_dir: {place} cannot be written: ")
        assert "take away the file that stands where a folder is to be" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_whose_parents_are_missing_is_made(tmp_path: Path) -> None:
    room.ready(tmp_path / "a" / "b" / "c", "out", 1)
    assert list((tmp_path / "a" / "b" / "c").iterdir()) == []


# --- what will be written


@pytest.mark.parametrize(
    "more",
    [["trainer.keep=1"], ["head=[medusa,hydra]", "trainer.keep=3"], ["head=[medusa2]", "base.lora={rank: 16}"]],
    ids=["one", "two heads", "an adapter"],
)
def test_the_estimate_is_what_a_run_takes_at_its_peak(made: Made, tmp_path: Path, disk: Any, more: list[str]) -> None:
    small = disk("size=64m")
    peaks, told = [0], [0.0]
    given = [*made.overrides("train", small.folder / "out"), *more]

    def looking(m: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def looked(*a: Any, **k: Any) -> Any:
            peaks.append(small.used())
            return real(*a, **k)

        m.setattr(owner, name, looked)

    with pytest.MonkeyPatch.context() as m:
        for owner, name in ((os, "replace"), (os, "rename"), (shutil, "rmtree"), (os, "unlink")):
            looking(m, owner, name)
        ready = room.ready
        m.setattr(room, "ready", lambda folder, key, needs=0, *r: [told.append(needs), ready(folder, key, needs, *r)])
        code, output = command("train", *given, cwd=tmp_path)
    assert code == 0, output
    needs, peak = max(told), max(*peaks, small.used())
    print(f"\n    estimated {needs:,.0f} bytes, {peak:,} at the peak: {needs / peak:.2f}")
    assert peak <= needs <= 1.5 * peak


def test_a_disk_of_exactly_the_estimate_is_enough_and_a_smaller_one_refused(
    made: Made, tmp_path: Path, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    ready = room.ready
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, "ready", lambda folder, key, needs=0, *r: [found.append(needs), ready(folder, key, needs, *r)])
        assert command("train", *made.overrides("train", tmp_path / "elsewhere"), cwd=tmp_path)[0] == 0
    needs = int(max(found)) // PAGE * PAGE + PAGE
    begun = 2 * PAGE  # .lock and config.yaml are there by then
    small = disk(f"size={needs}")
    line = error_of(*command("train", *made.overrides("train", small.folder / "out"), cwd=tmp_path))
    assert line.startswith(f"error: run_dir: {small.folder / 'out'} needs ")
    assert "; free space there, or trainer.keep=1 or another run_dir" in line
    assert not (small.folder / "out" / "checkpoints").exists()
    check_whole(small.folder / "out")
    subprocess.run(["mount", "-o", f"remount,size={needs + begun}", str(small.folder)], check=True)
    code, output = command("train", *made.overrides("train", small.folder / "out"), cwd=tmp_path)
    assert code == 0, output
    equal("train", small.folder / "out", made.folder / "train")


# --- the cache, and the folder for temporary files


@pytest.fixture
def random_base() -> list[str]:
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    more = "num_key_value_heads: 1, max_position_embeddings: 256, vocab_size: 400, tie_word_embeddings: false"
    return [
        "base.path=null",
        "base.recipe.corpus=null",
        f"++base.recipe.model={{{shape}, {more}}}",
        *["data=random", "data.length=64", "data.batch_size=2", "trainer.max_steps=1", "trainer.epochs=null"],
        "trainer.threads=1",
    ]


def test_a_read_only_cache(random_base: list[str], tmp_path: Path, disk: Any) -> None:
    cache = disk("ro").folder
    line = error_of(*command("train", *random_base, "run_dir=run", cwd=tmp_path, DRAFTSMITH_CACHE=str(cache)))
    assert line.startswith(f"error: DRAFTSMITH_CACHE: {cache / 'bases'} cannot be written: Read-only file system; ")


@pytest.mark.parametrize("place", ["draftsmith.base.create.save", "draftsmith.data.rows.write_shard"])
def test_a_cache_that_fills_up(random_base: list[str], tmp_path: Path, disk: Any, place: str) -> None:
    small = disk("size=8m")
    how = {"cwd": tmp_path, "DRAFTSMITH_CACHE": str(small.folder)}
    with pytest.MonkeyPatch.context() as m:
        at(m, place, 1, small.fill)
        line = error_of(*command("train", *random_base, "run_dir=run", **how))
    assert line.startswith(f"error: {small.folder}/")
    assert "No space left on device" in line
    check_whole(small.folder)
    small.free()
    code, output = command("train", *random_base, "run_dir=run", **how)
    assert code == 0, output


def test_a_full_folder_for_temporary_files_is_not_needed(
    made: Made, tmp_path: Path, disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But by a command that starts several processes, which says so."""
    small = disk("size=1m")
    small.fill()
    monkeypatch.setenv("TMPDIR", str(small.folder))
    monkeypatch.setattr(tempfile, "tempdir", str(small.folder))
    code, output = command("train", *made.overrides("train", tmp_path / "out"), cwd=tmp_path)
    assert code == 0, output
    equal("train", tmp_path / "out", made.folder / "train")
    assert [p.name for p in small.folder.iterdir()] == ["filler"]
    cfg = config.compose("train", made.overrides("train", tmp_path / "out"))
    told = f"^{small.folder}: cannot write what the processes are to run: No space left"
    with pytest.raises(ResourceError, match=told):
        with config.as_job(cfg, "train"):
            pytest.fail("it was written")
    assert [p.name for p in small.folder.iterdir()] == ["filler"]
