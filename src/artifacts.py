"""What we leave on disk: whole or absent, and able to say what it is.

A folder is written under a temporary name beside its target, every file synced, a manifest with sizes and
sha256 added, then renamed into place. Whoever sees the final name sees a complete folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.errors import DataError, ResourceError

if TYPE_CHECKING:  # a mistyped key must answer at once: torch is imported where tensors are hashed
    from torch import Tensor

MANIFEST = "manifest.json"
SEALED = {"bytes", "sha256"}  # what the manifest says of each file
RENAME_EXCHANGE = 2
READERS = 8  # files hashed at a time


def fingerprint(value: Any) -> str:
    """sha256 of the value's canonical JSON: equal for equal content, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Any] = contextlib.nullcontext) -> str:
    """Hash of names, dtypes, shapes and bytes; the order of the mapping does not matter. whole: a context in which a
    tensor that lies in pieces is put together; entered once for each, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        with whole(tensors[name]):
            t = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def disk(path: Path | str, purpose: str) -> Iterator[None]:
    """Turns an operating-system refusal under `path` into one line with exit code 5."""
    try:
        yield
    except OSError as e:
        if isinstance(e, ResourceError):
            raise
        raise ResourceError(
            f"{path}: cannot write {purpose}: {e.strerror or e}; free space there or choose another folder"
        ) from e


def write_json(path: Path, value: Any) -> None:
    """Replaces the file at once: a reader sees the old content or the new."""
    with disk(path, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w") as f:
                json.dump(value, f, indent=2, sort_keys=False, default=str)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync(path.parent)


def replace(temporary: Path, target: Path) -> None:
    """Moves a finished file to its final name in the same folder, synced: whoever sees the name sees all of it."""
    _sync(temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
    _sync(target.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
    """A safetensors file of contiguous, unshared tensors. told: what its header tells beside them; with more than one
    entry equal content need not be equal bytes (safetensors shuffles them). A full disk is a ResourceError here too:
    safetensors reports the operating system's refusal as an error of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with disk(path, path.name):
        try:
            save_file(dict(tensors), path, metadata=dict(told or {"format": "pt"}))
        except SafetensorError as e:
            if "os error" not in str(e):
                raise
            raise ResourceError(f"{path}: cannot write {path.name}: {e}; free space there") from e


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not JSON ({e})") from None


@contextlib.contextmanager
def publish(target: Path | str, *, manifest: str = MANIFEST, **facts: Any) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving, it becomes `target`, replacing what was there, at once.

    `facts` are stored in the manifest beside the sizes and hashes. On any error nothing appears.
    """
    target = Path(target)
    with disk(target, "a folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _reclaim(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        yield temporary
        with disk(target, "a folder"):
            os.chmod(temporary, 0o755)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            listed = {str(p.relative_to(temporary)): _sealed(p) for p in files}
            write_json(temporary / manifest, {**facts, "files": listed})
            _replace(temporary, target)
            _sync(target.parent)
    except OSError as e:
        with disk(target, "a folder"):
            raise e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path, names: Iterable[str], *, manifest: str = MANIFEST, **facts: Any) -> None:
    """Writes the manifest of a folder that was filled file by file: from now on it is complete. `names` are the
    files that belong to it."""
    with disk(folder, manifest):
        write_json(folder / manifest, {**facts, "files": {name: _sealed(folder / name) for name in sorted(names)}})


def verify(folder: Path | str, *, manifest: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a published folder, after checking every file's size and sha256 against it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not (folder / manifest).is_file():
        raise DataError(f"{folder}: has no {manifest}; it was not published by draftsmith or is incomplete")
    facts = read_json(folder / manifest)
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or any(not isinstance(w, dict) or w.keys() != SEALED for w in files.values()):
        raise DataError(f"{folder / manifest}: does not list files with sizes and sha256; it is damaged")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{folder / manifest}: lists {name}, which lies outside the folder")
    for name, want in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: listed in {manifest} but missing")
        size = path.stat().st_size
        if size != want["bytes"]:
            raise DataError(f"{path}: {size} bytes, {manifest} says {want['bytes']}")
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        for name, found in zip(files, pool.map(lambda name: file_sha256(folder / name), files), strict=True):
            if found != files[name]["sha256"]:
                raise DataError(f"{folder / name}: content differs from the sha256 in {manifest}")
    return facts


def is_complete(folder: Path, *, manifest: str = MANIFEST) -> bool:
    """Whether the folder was published (its files are not re-hashed)."""
    return (folder / manifest).is_file()


def _sealed(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(temporary: Path, target: Path) -> None:
    """rename() for folders that may exist: exchange both names in one system call, so that `target` is
    never absent. (Linux; elsewhere the old folder is moved aside first, for a moment.)"""
    if not target.exists():
        return os.rename(temporary, target)
    if _exchange(temporary, target):
        return shutil.rmtree(temporary, ignore_errors=True)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    os.rename(temporary, target)
    return shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the filesystem cannot
        return False
    raise OSError(code, os.strerror(code), str(b))


def _reclaim(target: Path) -> None:
    """Removes what killed writers left: folders under our temporary names whose process is gone are ours
    alone (one writer per target), so any older one is litter; an old folder moved aside goes back."""
    aside = target.with_name(f".{target.name}.old")
    if aside.exists() and not target.exists():
        os.rename(aside, target)
    for litter in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        shutil.rmtree(litter, ignore_errors=True)
