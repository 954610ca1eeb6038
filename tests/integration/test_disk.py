"""A disk that is full or read-only: one line, exit 5, nothing half-written, and the rerun completes exactly."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from draftsmith import artifacts
from draftsmith.artifacts import file_sha256

from .conftest import draftsmith

pytestmark = pytest.mark.faults

HEAD = "heads/medusa/model.safetensors"


@pytest.fixture
def disk(tmp_path: Path):
    """mount(options) puts a small file system of its own at disk/."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("size", ["300k", "900k"], ids=["before the first checkpoint", "at a later one"])
def test_full_disk(training: list[str], tmp_path: Path, disk, size: str) -> None:
    folder = disk(f"size={size}")
    command = [*training, "trainer.max_steps=12", "trainer.checkpoint_every=2", "run_dir=disk/run"]
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert code == 5, output
    (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in output
    run = folder / "run"
    assert not (run / "heads").exists()
    assert not [p for p in run.rglob("*") if p.name.startswith(".") and p.is_dir()]  # no temporary folder is left
    for sealed in run.glob("checkpoints/step-*"):
        artifacts.verify(sealed, manifest="COMPLETE.json")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    code, output = draftsmith("train", *command, cwd=tmp_path)
    assert code == 0, output
    code, output = draftsmith("train", *command[:-1], "run_dir=elsewhere", cwd=tmp_path)
    assert code == 0, output
    assert file_sha256(run / HEAD) == file_sha256(tmp_path / "elsewhere" / HEAD)


def test_read_only_disk(training: list[str], tmp_path: Path, disk) -> None:
    disk("ro")
    code, output = draftsmith("train", *training, "trainer.max_steps=2", "run_dir=disk/run", cwd=tmp_path)
    assert code == 5, output
    assert "Read-only file system" in output
