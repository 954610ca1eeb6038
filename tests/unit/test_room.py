"""Bytes that files take, the most that a training holds, and the probe that leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from draftsmith import room
from draftsmith.errors import ResourceError


def test_files_take_whole_pages() -> None:
    assert room.files([]) == 0
    assert room.files([1, room.PAGE, room.PAGE + 1]) == 4 * room.PAGE


def test_what_a_file_of_tensors_takes_is_what_it_took(tmp_path: Path) -> None:
    tensors = {f"blocks.{n}.weight": torch.zeros(100 * n, 33, dtype=torch.bfloat16) for n in range(1, 9)}
    save_file(tensors, tmp_path / "a.safetensors")
    told = room.tensors(tensors.values())
    assert room.taken(tmp_path) <= told <= room.taken(tmp_path) + room.PAGE
    assert room.taken(tmp_path / "none") == 0


def test_the_most_that_a_run_holds() -> None:
    """One checkpoint more than it keeps; or those it keeps, and larger exports."""
    part = torch.nn.Linear(1000, 1000, bias=False)
    few, more = (room.of_run([part], 0.0, keep, 0) for keep in (1, 2))
    assert 12e6 < more - few < 12.1e6
    assert room.of_run([part], 50e6, 1, 0) - few == pytest.approx(38e6, rel=0.01)
    assert room.of_run([part], 0.0, 1, 100) - few == 100 * room.LINE


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2e16, "20000.0 TB")]
)
def test_sizes_for_people(count: float, said: str) -> None:
    assert room.size(count) == said


def test_a_ready_folder_is_empty_and_a_small_disk_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 999
        total: int = 10**9

    room.ready(tmp_path / "a" / "b", "out", 1)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage())
    room.ready(tmp_path / "a" / "b", "out", 999)
    with pytest.raises(ResourceError) as caught:
        room.ready(tmp_path / "c" / "d", "out", 1000, "say less")
    told = f"out: {tmp_path / 'c' / 'd'} needs 1.0 kB, has 999 bytes; free space there, or say less"
    assert (str(caught.value), caught.value.exit_code) == (told, 5)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(free=0, total=0))
    room.ready(tmp_path / "c" / "d", "out", 1000)  # a file system that tells nothing


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_probe_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ResourceError, match=r"^out: .* cannot be written: Input/output error; see to that disk, or"):
        room.ready(tmp_path, "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    room.still(tmp_path)
    with pytest.raises(
        ResourceError, match="none: is gone, removed while it was written; the same command begins anew"
    ):
        room.still(tmp_path / "none")
