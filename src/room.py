"""Whether there is room: on the disk for what a command is about to write, in the memory for what it computes.

`ready` looks before the work begins: what will be written against what is free, and a file that is written, synced,
renamed and removed where the results are to lie. `memory` says which sizes were too large where an allocation failed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from draftsmith.artifacts import refusal
from draftsmith.errors import DraftsmithError, OutOfMemory, ResourceError

LINE = 512  # bytes of metrics.jsonl for each head and measured step
REST = 2**17  # bytes of a run's report, configuration, provenance and events
PAGE = 4096  # bytes; a file takes whole ones
HEADER = 128  # bytes that a file of safetensors tells of each of its tensors
# What numpy, torch on a CPU or a GPU, the loaders of weights and the system say of memory that they cannot have.
EXHAUSTED = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread",
    re.IGNORECASE,
)
SMALLER = "give it more memory, or choose a smaller batch, length or base"


def ready(folder: Path, key: str, needs: float = 0, cure: str = "choose another folder") -> None:
    """Makes the folder, if it is not there. ResourceError unless it can be written and so many bytes more fit on its
    disk. key: the configuration key that names it; cure: what else would help."""
    there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    disk = shutil.disk_usage(there)
    free = disk.free if disk.total else needs  # some file systems tell nothing
    if needs > free:
        raise ResourceError(f"{key}: {folder} needs {size(needs)}, has {size(free)}; free space there, or {cure}")
    probe, renamed = (folder / f".probe.{os.getpid()}.{n}.tmp" for n in range(2))
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(probe, "wb") as f:
                f.write(bytes(PAGE))
                f.flush()
                os.fsync(f.fileno())
            os.replace(probe, renamed)
        finally:
            for left in (probe, renamed):
                with contextlib.suppress(OSError):  # what refused to be written is told already
                    left.unlink(missing_ok=True)
    except OSError as e:
        raise ResourceError(f"{key}: {folder} cannot be written: {refusal(e)}, or {cure}") from e


def still(folder: Path) -> None:
    """ResourceError where a folder that is being written has been removed: the rest of it would lie there alone."""
    if not folder.is_dir():
        raise ResourceError(f"{folder}: is gone, removed while it was written; the same command begins anew")


def taken(folder: Path) -> int:
    """Bytes that a folder takes on its disk; 0 where there is none."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


def tensors(*groups: Iterable[Any]) -> float:
    """Bytes on the disk of a file of safetensors for each group of tensors."""
    return files(sum(t.numel() * t.itemsize + HEADER for t in group) for group in groups)


def files(sizes: Iterable[float]) -> float:
    """Bytes on the disk of files with so many bytes in them."""
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def of_run(parts: Iterable[Any], exports: float, keep: int, lines: int) -> float:
    """The most bytes that a training holds at once: one checkpoint more than it keeps, of weights and two fp32 moments
    for each part, or those it keeps and the exports; and the lines of metrics, and the pages of a report."""
    every = [list(part.parameters()) for part in parts]
    checkpoint = files(sum(12 * p.numel() + 3 * HEADER for p in part) for part in every) + 2 * PAGE
    return max((keep + 1) * checkpoint, keep * checkpoint + exports) + LINE * lines * len(every) + REST


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


@contextlib.contextmanager
def memory(what: Callable[[], str] | str, cure: Callable[[], str] | str) -> Iterator[None]:
    """An allocation that fails inside is an OutOfMemory that tells of what, and the change that helps. Both may be
    told by what is known only then."""
    try:
        yield
    except Exception as e:
        if isinstance(e, DraftsmithError) or not exhausted(e):
            raise
        told, helps = (t if isinstance(t, str) else t() for t in (what, cure))
        raise OutOfMemory(f"{told}: out of memory ({words(e)}); {helps}") from e


def exhausted(error: BaseException) -> bool:
    """Whether the error says that there is no memory left. By its words: neither torch's own types nor the loaders'
    are ones that can be asked for without importing them."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return EXHAUSTED.search(str(error)) is not None


def words(error: BaseException) -> str:
    """What an allocator says, without the place in its source and the state of its pools."""
    said = re.sub(r"^\[enforce fail at [^\]]*\] [^.]*\. ", "", " ".join(str(error).split()))
    sentences = re.split(r"(?<=\w)\. (?=[A-Z])", said)
    return ". ".join(sentences[:2]).rstrip(".")[:160] or type(error).__name__


def halved(batch: tuple[str, int], along: str, accumulate: tuple[str, int] | None = None) -> str:
    """The smallest change after which a step takes at most half. batch: the key that says how many share a forward, and
    how many these are; along: the key of their length; accumulate: of how many such batches a step is made."""
    key, rows = batch
    if rows < 2:
        return f"lower {along}"
    if accumulate is None:
        return f"say {key}={rows // 2}, or lower {along}"
    parts = next(n for n in range(2, rows + 1) if rows % n == 0)
    return f"say {key}={rows // parts} {accumulate[0]}={accumulate[1] * parts}, which is the same run, or lower {along}"
