"""Publishing: whole or absent, and it shows when something changed afterwards."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith import artifacts
from draftsmith.errors import DataError, ResourceError


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def publish(target: Path, text: str = "one", **facts: Any) -> None:
    with artifacts.publish(target, **facts) as temporary:
        (temporary / "a.txt").write_text(text)
        (temporary / "deep").mkdir()
        (temporary / "deep" / "b.bin").write_bytes(bytes(range(256)))


def fail_inside(target: Path, first: Callable[[], Any]) -> None:
    with artifacts.publish(target) as temporary:
        first()
        (temporary / "a.txt").write_text("new")
        raise ZeroDivisionError


def refuse(code: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def test_publishes_files_and_manifest(tmp_path: Path) -> None:
    publish(tmp_path / "deeper" / "made", kind="test", number=3)
    folder = tmp_path / "deeper" / "made"
    facts = artifacts.verify(folder)
    assert (facts["kind"], facts["number"]) == ("test", 3)
    assert set(facts["files"]) == {"a.txt", "deep/b.bin"}
    assert facts["files"]["deep/b.bin"] == {
        "bytes": 256,
        "sha256": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",  # of bytes 0..255
    }
    assert artifacts.is_complete(folder)
    assert os.listdir(tmp_path / "deeper") == ["made"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@pytest.mark.parametrize("old", [False, True])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, old: bool) -> None:
    if old:
        publish(tmp_path / "made", "old")
    before = snapshot(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "made", lambda: None)
    assert snapshot(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["made"] if old else [])


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_takes_the_old_files_away(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: one system call, and the two renames where the filesystem has no such call."""
    if not exchange:
        monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    publish(tmp_path / "made", "old")
    (tmp_path / "made" / "stray").write_text("not ours")
    with artifacts.publish(tmp_path / "made") as temporary:
        (temporary / "c.txt").write_text("new")
    assert set(snapshot(tmp_path)) == {"made/c.txt", "made/manifest.json"}
    artifacts.verify(tmp_path / "made")


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_refuses_is_one_line_and_changes_nothing(
    tmp_path: Path, call: str, code: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        publish(tmp_path / "made", "old")
    before = snapshot(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, call, refuse(code))
        m.setattr(artifacts, "_exchange", lambda a, b: False)  # so that rename is asked in both cases
        with pytest.raises(ResourceError, match=f"made.*{os.strerror(code)}") as caught:
            publish(tmp_path / "made", "new")
    assert caught.value.exit_code == 5
    assert snapshot(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["made"] if old else [])


def test_the_second_of_two_renames_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged, a failure between the two renames must not lose the old folder."""
    publish(tmp_path / "made", "old")
    monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    real, calls = os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "no")
        real(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "rename", second_fails)
        with pytest.raises(ResourceError):
            publish(tmp_path / "made", "new")
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError):  # the next writer puts it back before anything else
        fail_inside(tmp_path / "made", lambda: seen.append((tmp_path / "made" / "a.txt").read_text()))
    assert seen == ["old"]
    assert os.listdir(tmp_path) == ["made"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="file") as caught:
        publish(tmp_path / "file" / "made")
    assert caught.value.exit_code == 5
    with pytest.raises(ResourceError):
        artifacts.write_json(tmp_path / "file" / "a.json", {})


def test_a_disk_full_while_the_caller_writes(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="made"), artifacts.publish(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_litter_of_killed_writers_is_reclaimed(tmp_path: Path) -> None:
    (tmp_path / ".made.tmp-abc").mkdir()
    (tmp_path / ".made.tmp-abc" / "half").write_text("x")
    (tmp_path / ".other.tmp-abc").mkdir()
    publish(tmp_path / "made")
    assert sorted(os.listdir(tmp_path)) == [".other.tmp-abc", "made"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of every file, then rename, then fsync of the folder above: no crash leaves a name without content."""
    done: list[Any] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(fd: int) -> None:
        done.append(os.fstat(fd).st_ino)
        fsync(fd)

    def record_rename(a: Any, b: Any) -> None:
        done.append("rename")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    publish(tmp_path / "made")
    at = done.index("rename")
    files = {p.stat().st_ino for p in (tmp_path / "made").rglob("*") if p.is_file()}
    assert len(files) == 3
    assert files <= set(done[:at])
    assert tmp_path.stat().st_ino in done[at:]


def test_the_manifest_may_have_another_name(tmp_path: Path) -> None:
    with artifacts.publish(tmp_path / "made", manifest="COMPLETE.json") as temporary:
        (temporary / "a").write_text("x")
    assert artifacts.is_complete(tmp_path / "made", manifest="COMPLETE.json")
    assert not artifacts.is_complete(tmp_path / "made")
    artifacts.verify(tmp_path / "made", manifest="COMPLETE.json")


def truncate(folder: Path) -> None:
    os.truncate(folder / "deep" / "b.bin", 255)


def flip(folder: Path) -> None:
    content = bytearray((folder / "deep" / "b.bin").read_bytes())
    content[100] ^= 1
    (folder / "deep" / "b.bin").write_bytes(content)


def delete(folder: Path) -> None:
    (folder / "deep" / "b.bin").unlink()


@pytest.mark.parametrize(("damage", "says"), [(truncate, "255 bytes"), (flip, "sha256"), (delete, "missing")])
def test_verify_names_the_damaged_file(tmp_path: Path, damage: Any, says: str) -> None:
    publish(tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(DataError, match=rf"b\.bin.*{says}") as caught:
        artifacts.verify(tmp_path / "made")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "null", "3", "{}", '{"files": []}', '{"files": {"a.txt": 3}}', '{"files": {"a.txt": {}}}'],
)
def test_a_damaged_manifest_is_bad_data(tmp_path: Path, manifest: str) -> None:
    publish(tmp_path / "made")
    (tmp_path / "made" / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match=r"manifest\.json"):
        artifacts.verify(tmp_path / "made")


def test_what_was_never_published(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        artifacts.verify(tmp_path / "none")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        artifacts.verify(tmp_path)


def test_write_json_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ResourceError, match="bring the folder back, which is gone"):
        artifacts.write_json(tmp_path / "sub" / "a.json", 1)
    assert not (tmp_path / "sub").exists()
    artifacts.write_json(path, {"b": 1, "a": Path("x")})
    assert json.loads(path.read_text()) == {"b": 1, "a": "x"}
    assert artifacts.read_json(path) == {"b": 1, "a": "x"}
    before = snapshot(tmp_path)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, call, refuse(errno.ENOSPC))
            with pytest.raises(ResourceError, match=r"a\.json.*No space"):
                artifacts.write_json(path, {"b": 2})
        assert snapshot(tmp_path) == before
    with pytest.raises(TypeError):
        artifacts.write_json(path, {("no", "key"): 1})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_read_json_says_what_is_wrong(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        artifacts.read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        artifacts.read_json(tmp_path / "b.json")


def test_fingerprint() -> None:
    assert artifacts.fingerprint({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == artifacts.fingerprint(
        {"b": [2, {"d": 4, "c": 3}], "a": 1}
    )
    values = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1.5}, {"a": None}, [1, 2], [2, 1]]
    assert len({artifacts.fingerprint(v) for v in values}) == len(values)


def test_tensors_sha256() -> None:
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5)}
    first = artifacts.tensors_sha256(base)
    assert artifacts.tensors_sha256(dict(reversed(base.items()))) == first
    assert artifacts.tensors_sha256({**base, "a": base["a"].t().contiguous().t()}) == first  # same values
    changed = base["a"].clone()
    changed.view(torch.uint8)[1, 2] ^= 1
    others = [
        {**base, "a": changed},
        {**base, "a": base["a"].view(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
        {**base, "a": base["a"].bfloat16()},
        {**base, "a": base["a"].half()},
    ]
    assert len({first, *map(artifacts.tensors_sha256, others)}) == 1 + len(others)


@pytest.mark.parametrize("name", ["../payload", "/etc/hostname", "a/../../payload"])
def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Whoever copies what a manifest lists would write there."""
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    (tmp_path / "deep" / "payload").write_text("x")
    sealed = {"bytes": 1, "sha256": artifacts.file_sha256(tmp_path / "deep" / "payload")}
    artifacts.write_json(folder / "manifest.json", {"files": {name: sealed}})
    with pytest.raises(DataError, match="outside the folder"):
        artifacts.verify(folder)
