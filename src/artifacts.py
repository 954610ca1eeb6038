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
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith import faults
from draftsmith.errors import DataError, DraftsmithError, ResourceError, TooNew

if TYPE_CHECKING:  # a mistyped key must answer at once: torch is imported where tensors are hashed
    from torch import Tensor

MANIFEST = "manifest.json"
SCHEMA = 1  # of all we write, in every manifest; absent: from before there was a number, and read like 1
SEALED = {"bytes", "sha256"}  # what the manifest says of each file
RENAME_EXCHANGE = 2
READERS = 8  # files hashed at a time
SHOWN = 16  # hex digits of a sha256 in a message
# What helps where the system refuses, besides another folder.
CURES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "raise the quota or free space there",
    errno.ENOENT: "bring the folder back, which is gone",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "take away the file that stands where a folder is to be"),
}


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
    except Exception as e:
        if isinstance(e, DraftsmithError) or not (said := refusal(e)):
            raise
        raise ResourceError(f"{path}: cannot write {purpose}: {said}, or choose another folder") from e


def refusal(error: Exception) -> str:
    """What the operating system said, and what helps; nothing, where it is another error. The libraries that write
    weights and tokenizers report it as errors of their own."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number == errno.ENOMEM or not (number or isinstance(error, OSError)):
        return ""
    return f"{os.strerror(number) if number else error}; {CURES.get(number or 0, 'see to that disk')}"


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, f"{json.dumps(value, indent=2, default=str)}\n".encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file at once: a reader sees the old content or the new. Its folder must be there, so that one that
    is removed while it is written does not come back with half of what it held."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to fill, in the same folder and of the same suffix, that gets its name once it is all there and synced:
    whoever sees the name sees all of it."""
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    with disk(path, path.name):
        try:
            yield temporary
            faults.point("file.written")
            _sync(temporary)
            faults.point("file.synced")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            faults.point("file.named")
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
    """A safetensors file of contiguous, unshared tensors. told: what its header tells beside them; with more than one
    entry equal content need not be equal bytes (safetensors shuffles them)."""
    from safetensors.torch import save_file

    with disk(path, path.name):
        save_file(dict(tensors), path, metadata=dict(told or {"format": "pt"}))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:  # not UTF-8, a number of thousands of digits, nested too deeply
        raise DataError(f"{path}: not JSON ({e}); it is damaged: copy it or make it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; DataError for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: no JSON object; it is damaged: copy it or make it again")
    return value


@contextlib.contextmanager
def publish(target: Path | str, *, manifest: str = MANIFEST, **facts: Any) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving, it becomes `target`, replacing what was there, at once.

    `facts` are stored in the manifest beside the sizes and hashes. On any error nothing appears.
    """
    target = Path(target)
    with disk(target, "a folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _reclaim(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{os.getpid()}-", dir=target.parent))
    faults.point("publish.made")
    try:
        yield temporary
        faults.point("publish.filled")
        with disk(target, "a folder"):
            os.chmod(temporary, 0o755)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            listed = {str(p.relative_to(temporary)): _sealed(p) for p in files}
            write_json(temporary / manifest, {**facts, "schema": SCHEMA, "files": listed})
            faults.point("publish.sealed")
            _replace(temporary, target)
            faults.point("publish.named")
            _sync(target.parent)
    except Exception as e:
        with disk(target, "a folder"):
            if isinstance(e, ResourceError):  # of a file in here, whose place is no place that a user knows
                raise type(e)(str(e).replace(str(temporary), str(target))) from e
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path, names: Iterable[str], *, manifest: str = MANIFEST, **facts: Any) -> None:
    """Writes the manifest of a folder that was filled file by file: from now on it is complete. `names` are the
    files that belong to it."""
    faults.point("seal.begun")
    with disk(folder, manifest):
        listed = {name: _sealed(folder / name) for name in sorted(names)}
        write_json(folder / manifest, {**facts, "schema": SCHEMA, "files": listed})


def verify(folder: Path | str, *, manifest: str = MANIFEST, cure: str = "") -> dict[str, Any]:
    """The manifest of a published folder, after checking every file's size and sha256 against it. DataError names the
    file, what it is and what it was; cure: what to do about damage, put behind it."""
    folder, again = Path(folder), cure and f"; {cure}"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if not (folder / manifest).is_file():
        raise DataError(f"{folder}: has no {manifest}; it was not published by draftsmith or is incomplete")
    facts = read_json(folder / manifest)
    schema = facts.get("schema", 0) if isinstance(facts, dict) else 0
    if isinstance(schema, int) and schema > SCHEMA:
        raise TooNew(
            f"{folder / manifest}: written by a newer draftsmith (schema {schema}; this one reads up to {SCHEMA}):"
            " update draftsmith"
        )
    files = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(files, dict) or not all(map(_is_seal, files.values())):
        raise DataError(f"{folder / manifest}: does not list files with sizes and sha256; it is damaged{again}")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            raise DataError(f"{folder / manifest}: lists {name!r}, which lies outside the folder")
    for name, want in files.items():
        path, told = folder / name, f"{want['bytes']} bytes, sha256 {want['sha256'][:SHOWN]}"
        if not os.path.isfile(path):
            raise DataError(f"{path}: listed in {manifest} but missing ({told}){again}")
        if elsewhere := outside(folder, path):
            raise DataError(f"{path}: is a link to {elsewhere}, outside its folder; put the file itself there")
        if (size := path.stat().st_size) != want["bytes"]:
            found = file_sha256(path)[:SHOWN]
            raise DataError(f"{path}: {size} bytes, {manifest} says {told}; its own is {found}{again}")
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        for name, found in zip(files, pool.map(lambda name: file_sha256(folder / name), files), strict=True):
            if found != (want := files[name])["sha256"]:
                differs = f"({found[:SHOWN]}, not {want['sha256'][:SHOWN]}; {want['bytes']} bytes)"
                raise DataError(f"{folder / name}: content differs from the sha256 in {manifest} {differs}{again}")
    return facts


def outside(folder: Path, path: Path) -> Path | None:
    """Where a file of the folder really lies, if a link leads out of it; None where it is its own. (A snapshot in the
    hub's cache holds links to the `blobs` beside all snapshots: those are its own.)"""
    real, home = path.resolve(), folder.resolve()
    blobs = [p.parent / "blobs" for p in home.parents if p.name == "snapshots"]
    return None if any(real.is_relative_to(p) for p in (home, *blobs)) else real


def _is_seal(value: Any) -> bool:
    """Whether a manifest says of a file what `_sealed` writes."""
    return (
        isinstance(value, dict)
        and value.keys() == SEALED
        and type(value["bytes"]) is int
        and isinstance(value["sha256"], str)
    )


def is_complete(folder: Path, *, manifest: str = MANIFEST) -> bool:
    """Whether the folder was published (its files are not re-hashed)."""
    return (folder / manifest).is_file()


def remove(folder: Path) -> None:
    """Takes a published folder away: its name first, at once, so that no half of it can be taken for the whole."""
    with disk(folder, "its removal"):
        gone = folder.with_name(f".{folder.name}.tmp-gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        faults.point("remove.renamed")
        shutil.rmtree(gone)
        faults.point("remove.done")


def reclaim(folder: Path) -> None:
    """Takes away what killed writers left half-written in a folder. What a living process of this machine writes stays:
    its number is in the name."""
    for litter in [*folder.glob(".*.tmp"), *folder.glob(".*.tmp-*")]:
        writer = re.search(r"\.tmp-(\d+)|\.(\d+)(?:\.\d+)?\.tmp$", litter.name)
        if writer and _lives(int(writer[1] or writer[2])):
            continue
        if litter.is_dir() and not litter.is_symlink():
            shutil.rmtree(litter, ignore_errors=True)
        else:
            litter.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether another process has this number now."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
        faults.point("publish.exchanged")
        return shutil.rmtree(temporary, ignore_errors=True)
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    faults.point("publish.aside")
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
