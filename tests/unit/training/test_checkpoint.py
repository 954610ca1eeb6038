"""Checkpoints: bit for bit, whole or not there, and the newest whole one wins."""

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.artifacts import read_json, tensors_sha256
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Head
from draftsmith.errors import DataError, ResourceError
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.training import checkpoint, strategy

TIES = {"base": "x"}


def found(heads: dict[str, Head], optimizer: torch.optim.Optimizer) -> Any:
    trainer: Any = SimpleNamespace(optimizers=[optimizer], is_global_zero=True, strategy=None)
    return {name: strategy.tensors(trainer, head) for name, head in heads.items()}


def restore(loaded: checkpoint.Checkpoint, heads: dict[str, Head], optimizer: torch.optim.Optimizer) -> None:
    checkpoint.check(loaded, heads)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], is_global_zero=True, strategy=None)
    moments = checkpoint.restore(loaded, heads, lambda t: t)
    strategy.put_moments(trainer, moments, max(loaded.updates.values()))


def setup(
    base: BaseLM, seed: int, updates: int, **heads: MedusaConfig
) -> tuple[dict[str, Head], torch.optim.Optimizer]:
    """Heads after some optimiser updates with random gradients."""
    torch.manual_seed(seed)
    made: dict[str, Head] = {n: Medusa(c, base.spec) for n, c in heads.items()}
    optimizer = torch.optim.AdamW([p for h in made.values() for p in h.parameters()], lr=0.1)
    for _ in range(updates):
        for h in made.values():
            for p in h.parameters():
                p.grad = torch.randn_like(p)
        optimizer.step()
    return made, optimizer


def state(heads: dict[str, Head], optimizer: torch.optim.Optimizer) -> str:
    """Hash of all weights, moments and update counts."""
    tensors = {}
    for name, head in heads.items():
        for key, p in head.named_parameters():
            tensors[f"{name}.{key}"] = p
            tensors |= {f"{name}.{key}.{k}": torch.as_tensor(v) for k, v in optimizer.state.get(p, {}).items()}
    return tensors_sha256(tensors)


TWO = {"a": MedusaConfig(num_heads=2), "b": MedusaConfig(num_heads=1, share_lm_head=True)}


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_restores_bit_for_bit(base: BaseLM, tmp_path: Path, updates: int) -> None:
    """Weights, moments and counts; and the next update is the same too."""
    heads, optimizer = setup(base, 0, updates, **TWO)
    path = checkpoint.save(tmp_path, 7, found(heads, optimizer), keep=2, ties=TIES)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.ties) == (7, TIES)
    others, other = setup(base, 1, 0, **TWO)
    restore(loaded, others, other)
    assert state(others, other) == state(heads, optimizer)
    for h, o in ((heads, optimizer), (others, other)):
        for head in h.values():
            for p in head.parameters():
                p.grad = torch.full_like(p, 0.3)
        o.step()
    assert state(others, other) == state(heads, optimizer)


def test_restores_in_place(base: BaseLM, tmp_path: Path) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    path = checkpoint.save(tmp_path, 1, found(heads, optimizer), keep=1, ties=TIES)
    others, other = setup(base, 1, 0, **TWO)
    before = [p.data_ptr() for p in others["a"].parameters()]
    restore(checkpoint.load(path), others, other)
    assert [p.data_ptr() for p in others["a"].parameters()] == before
    assert {id(p) for p in other.state} == {id(p) for h in others.values() for p in h.parameters()}


def test_files_and_pointer(base: BaseLM, tmp_path: Path) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    for step in (3, 6):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=2, ties=TIES)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000003", "step-00000006"]
    assert read_json(tmp_path / "last") == {"checkpoint": "step-00000006"}
    files = sorted(os.listdir(tmp_path / "step-00000006"))
    assert files == ["COMPLETE.json", "a.safetensors", "b.safetensors", "state.json"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest(base: BaseLM, tmp_path: Path, keep: int) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=keep, ties=TIES)
        kept = [s for s in (2, 4, 6, 8, 10) if s <= step][-keep:]
        assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:08d}" for s in kept]


def test_nothing_is_deleted_before_the_new_one_is_whole(
    base: BaseLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    checkpoint.save(tmp_path, 2, found(heads, optimizer), keep=1, ties=TIES)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(ResourceError):
            checkpoint.save(tmp_path, 4, found(heads, optimizer), keep=1, ties=TIES)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000002"]
    loaded, warnings = checkpoint.load_last(tmp_path)
    assert loaded is not None
    assert (loaded.step, warnings) == (2, [])


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray((path / "a.safetensors").read_bytes())
        content[-5] ^= 1
        (path / "a.safetensors").write_bytes(content)
    elif how == "truncate":
        os.truncate(path / "b.safetensors", 100)
    elif how == "delete":
        (path / "state.json").unlink()
    elif how == "torn seal":
        os.truncate(path / "COMPLETE.json", 50)
    elif how == "empty seal":
        (path / "COMPLETE.json").write_text("{}")


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "torn seal", "empty seal"])
def test_a_damaged_newest_one_falls_back(base: BaseLM, tmp_path: Path, how: str) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    for step in (2, 4):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=2, ties=TIES)
    damage(tmp_path / "step-00000004", how)
    loaded, warnings = checkpoint.load_last(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    assert len(warnings) == 1
    assert "step-00000004" in warnings[0]
    damage(tmp_path / "step-00000002", how)
    none, warnings = checkpoint.load_last(tmp_path)
    assert none is None
    assert len(warnings) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_never_pushes_out_the_good(base: BaseLM, tmp_path: Path, keep: int) -> None:
    """After a fall-back the run saves earlier steps again; those are the ones to keep."""
    heads, optimizer = setup(base, 0, 1, **TWO)
    for step in (2, 9):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=2, ties=TIES)
    damage(tmp_path / "step-00000009", "flip")
    for step in (4, 6):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=keep, ties=TIES)
        assert (tmp_path / read_json(tmp_path / "last")["checkpoint"]).is_dir()
        loaded, _ = checkpoint.load_last(tmp_path)
        assert loaded is not None
        assert loaded.step == step


def test_an_unsealed_folder_is_none(base: BaseLM, tmp_path: Path) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    for step in (2, 4):
        checkpoint.save(tmp_path, step, found(heads, optimizer), keep=2, ties=TIES)
    (tmp_path / "step-00000004" / "COMPLETE.json").unlink()
    loaded, _ = checkpoint.load_last(tmp_path)
    assert loaded is not None
    assert loaded.step == 2


def test_moved_elsewhere_it_still_loads(base: BaseLM, tmp_path: Path) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    (tmp_path / "here").mkdir()
    checkpoint.save(tmp_path / "here", 2, found(heads, optimizer), keep=2, ties=TIES)
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded, warnings = checkpoint.load_last(tmp_path / "there")
    assert loaded is not None
    assert warnings == []
    assert not any(str(tmp_path).encode() in p.read_bytes() for p in (tmp_path / "there").rglob("*") if p.is_file())


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path / "none") == (None, [])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"a": TWO["a"]}, r"holds heads \['a', 'b'\], the run trains \['a'\]"),
        ({"a": TWO["a"], "c": TWO["b"]}, r"trains \['a', 'c'\]"),
        ({**TWO, "a": MedusaConfig(num_heads=3)}, r"a\.weight\.blocks\.2\.0\.linear\.weight is nothing"),
    ],
)
def test_other_heads_are_refused(base: BaseLM, tmp_path: Path, wrong: dict[str, MedusaConfig], says: str) -> None:
    heads, optimizer = setup(base, 0, 1, **TWO)
    path = checkpoint.save(tmp_path, 1, found(heads, optimizer), keep=1, ties=TIES)
    others, other = setup(base, 1, 0, **wrong)
    with pytest.raises(DataError, match=says):
        restore(checkpoint.load(path), others, other)


def test_another_shape_is_refused(base: BaseLM, tmp_path: Path) -> None:
    heads, optimizer = setup(base, 0, 1, a=TWO["a"])
    path = checkpoint.save(tmp_path, 1, found(heads, optimizer), keep=1, ties=TIES)
    loaded = checkpoint.load(path)
    key = "exp_avg.blocks.0.0.linear.bias"
    loaded.tensors["a"][key] = loaded.tensors["a"][key][:8]
    with pytest.raises(DataError, match=r"exp_avg\.blocks\.0\.0\.linear\.bias is \(8,\), the head needs \(16,\)"):
        restore(loaded, heads, optimizer)


def test_a_writer_writes_beside_and_says_what_failed() -> None:
    writer, may, done = checkpoint.Writer(), threading.Event(), []

    def work() -> None:
        assert may.wait(10)
        done.append(1)

    writer.finish()
    writer.start(work)
    assert not done
    may.set()
    writer.finish()
    assert done == [1]

    def full() -> None:
        raise ResourceError("no space")

    writer.start(full)
    with pytest.raises(ResourceError, match="no space"):
        writer.finish()
    writer.finish()  # said once


def test_the_tensors_are_copies(base: BaseLM) -> None:
    """What is being written does not follow the training that goes on."""
    heads, optimizer = setup(base, 0, 1, **TWO)
    copies = found(heads, optimizer)
    before = {n: tensors_sha256(t) for n, (t, _) in copies.items()}
    for h in heads.values():
        for p in h.parameters():
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert {n: tensors_sha256(t) for n, (t, _) in copies.items()} == before
