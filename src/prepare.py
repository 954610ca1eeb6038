"""Makes what a run needs and is not there yet: the base from its recipe. Kept under its fingerprint.

The cache folder is $DRAFTSMITH_CACHE, else ~/.cache/draftsmith. Several processes may ask at once: one makes,
the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from draftsmith import artifacts, config, room, shown
from draftsmith.base.settings import QUANTISED, LoraConfig, ShapeConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.training import processes

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.base.outlines import Outline
    from draftsmith.base.pieces import Cutter


@dataclass(frozen=True)
class BaseConfig:
    path: str | None = None  # a folder or hub id that transformers loads; null: made from the recipe
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    recipe: dict[str, Any] | None = None  # without a corpus: random weights
    lora: LoraConfig | None = None  # an adapter to train with a head that trains one (medusa2)
    adapter: str | None = None  # the folder of a trained one
    compile: bool = False  # torch.compile of its blocks
    quantise: str | None = None  # int8 | int4: how the weights of its blocks are kept
    recompute: bool = False  # its blocks again in the backward pass, where gradients pass through them
    shape: ShapeConfig | None = None  # its sizes; what is loaded must have them
    fake: bool = False  # tiny random weights in the proportions of `shape`, of the recipe or of path/config.json

    def __post_init__(self) -> None:
        if self.lora is not None and self.adapter is not None:
            raise ConfigError("lora, adapter: give one of them; an adapter to train, or one that is trained")
        if self.compile and (self.lora is not None or self.adapter is not None):
            raise ConfigError("compile: not with an adapter, which changes the blocks after they were compiled")
        if self.quantise is not None:
            if self.quantise not in QUANTISED:
                raise ConfigError(f"quantise='{self.quantise}': choose {' or '.join(QUANTISED)}, or null")
            others = [key for key in ("lora", "adapter", "compile") if getattr(self, key)]
            if others:
                raise ConfigError(f"quantise, {others[0]}: give one of them; {others[0]} needs the blocks as they are")
        if (self.path is None) == (self.recipe is None):
            raise ConfigError("path, recipe: give one of them; a base to load, or how to make one")
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ConfigError(f"dtype='{self.dtype}': choose float32, bfloat16, float16 or float64")


def cache_dir() -> Path:
    return Path(os.environ.get("DRAFTSMITH_CACHE") or Path.home() / ".cache" / "draftsmith")


def once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """`folder`, after make(folder) published it if nobody had; safe against others doing the same."""
    if not artifacts.is_complete(folder):
        with _locked(folder):
            if not artifacts.is_complete(folder):
                make(folder)
    return folder


def load_base(base: BaseConfig, device: str = "cpu", cutter: Cutter | None = None) -> BaseLM:
    """The base of this configuration, made first if it has a recipe; in pieces where there is somebody to cut it up."""
    if device == "cpu":  # peft imports deepspeed where it is installed, which warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    base = stand_in(base)
    path = base.path or str(base_folder(base))
    _say_whose_code(base, path)
    how: dict[str, Any] = {
        "revision": base.revision,
        "dtype": base.dtype,
        "device": device,
        "trust_remote_code": base.trust_remote_code,
        "adapter": base.adapter,
    }
    smaller = "choose base.dtype=bfloat16, base.quantise=int8 or a smaller base"
    with room.memory(f"base: the weights of {path}", smaller):
        if cutter is not None:
            from draftsmith.base import pieces

            loaded: BaseLM = pieces.load(path, cutter, **how)
        else:
            from draftsmith.base import lm

            loaded = lm.load(path, quantise=base.quantise, **how)
    if base.shape is not None:
        from draftsmith.base import shapes

        shapes.check(base.shape, loaded.spec, loaded.model.config)
    loaded.recompute = base.recompute
    return loaded.compile() if base.compile else loaded


def path_of(base: BaseConfig) -> str:
    """Where the base lies: a folder's full path, or a hub id; made first if it has a recipe."""
    base = stand_in(base)
    path = base.path or str(base_folder(base))
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def outline(base: BaseConfig) -> Outline:
    """The base without its weights, made first if it has a recipe."""
    from draftsmith.base import outlines

    _say_whose_code(base, path_of(base))
    told = outlines.outline(path_of(base), revision=base.revision, trust_remote_code=base.trust_remote_code)
    return replace(told, spec=replace(told.spec, quantised=base.quantise or ""))


def _say_whose_code(base: BaseConfig, path: str) -> None:
    if base.trust_remote_code:
        say(f"trust_remote_code: running the code that {path} at revision {base.revision or 'newest'} brings")


def stand_in(base: BaseConfig) -> BaseConfig:
    """The base itself, or the small random one that stands for it where `fake` says so."""
    if not base.fake:
        return base
    from draftsmith.base import shapes

    model = shapes.fake(shapes.of(base.path, base.revision, base.shape, base.recipe))
    recipe = {"seed": 0, "corpus": None, "vocab_size": None, "training": None, "model": model}
    return replace(base, path=None, revision=None, trust_remote_code=False, shape=None, fake=False, recipe=recipe)


def base_folder(base: BaseConfig) -> Path:
    """Where the base of a recipe lies, under the fingerprint of the recipe and of the code that follows it."""
    makers = ("draftsmith.data.synthetic", "draftsmith.training.pretrain", "draftsmith.base.create")
    recipe: dict[str, Any] = {"recipe": base.recipe, "code": [source_sha256(name) for name in makers]}
    if ((base.recipe or {}).get("corpus") or {}).get("source_bytes"):
        recipe["python"] = platform.python_version()  # whose library the natural text is
    folder = cache_dir() / "bases" / artifacts.fingerprint(recipe)[:16]
    return once(folder, lambda target: _make_base(dict(base.recipe or {}), target))


def source_sha256(module: str) -> str:
    """Hash of a module's source, found without importing it."""
    found = find_spec(module)
    assert found is not None, f"no module {module}"
    assert found.origin is not None, f"no source of {module}"
    return artifacts.file_sha256(Path(found.origin))


def _make_base(recipe: dict[str, Any], target: Path) -> None:
    from draftsmith.base import create, shapes

    if recipe.get("corpus") is None:  # a shape to measure on: random weights, no tokenizer
        with artifacts.publish(target, kind="base", recipe=recipe) as temporary:
            made = shapes.model if "model_type" in recipe["model"] else functools.partial(create.llama, tokenizer=None)
            create.save(made(recipe["model"], seed=recipe["seed"]), None, temporary)
        return
    from draftsmith.data import synthetic
    from draftsmith.training.pretrain import PretrainConfig, pretrain

    seed, corpus = recipe["seed"], recipe["corpus"]
    settings = config.typed(recipe["training"], PretrainConfig, "base.recipe.training")
    say(f"making the base: {recipe['model']['hidden_size']} wide, {recipe['model']['num_hidden_layers']} layers")
    documents = list(synthetic.corpus(corpus["dialogues"], corpus["source_bytes"], seed))
    tokenizer = synthetic.train_tokenizer(documents, recipe["vocab_size"])
    blocks_NT = synthetic.token_blocks(tokenizer, documents, settings.length)
    model = create.llama(recipe["model"], tokenizer, seed)
    learned_NT = synthetic.learned_mask(tokenizer, blocks_NT)
    bos = tokenizer.bos_token_id
    result = pretrain(model, blocks_NT, config=settings, seed=seed, mask_NT=learned_NT, bos=bos)
    with artifacts.publish(target, kind="base", recipe=recipe, training=result) as temporary:
        create.save(model, tokenizer, temporary)


def content_sha256(path: str | Path | None) -> str | None:
    """Hash of a file, or of a published folder's manifest, which holds the hashes of its files; None for
    nothing there."""
    found = Path(path) if path else None
    if found and found.is_dir():
        found = found / artifacts.MANIFEST
    return artifacts.file_sha256(found) if found and found.is_file() else None


@contextlib.contextmanager
def held(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """No other process `rank` writes this folder meanwhile; a lock whose process died is free again. DataError where a
    file of it is a link to elsewhere: a run adds to its own files, never to what they lead to."""
    for path in [*run_dir.glob("*.jsonl"), *run_dir.glob(".lock*")]:
        if elsewhere := artifacts.outside(run_dir, path):
            raise DataError(f"{path}: is a link to {elsewhere}, outside its folder; put the file itself there")
    with artifacts.disk(run_dir, "a lock"):
        lock = open(run_dir / (f".lock-{rank}" if rank else ".lock"), "a+")  # noqa: SIM115 (held for the whole block)
    with lock:
        if not _taken(lock, fcntl.LOCK_EX, tries=20):  # who only looks whether it is held lets go at once
            lock.seek(0)
            raise ConfigError(f"{run_dir}: is being written by {lock.read().strip()}")
        with artifacts.disk(run_dir, "a lock"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}")
            lock.flush()
        os.register_at_fork(after_in_child=lock.close)  # a worker that outlives a killed process would hold it on
        yield


def is_held(run_dir: Path) -> bool:
    """Whether process 0 of somebody is writing this folder now."""
    path = run_dir / ".lock"
    if not path.exists():
        return False
    with open(path) as lock:
        return not _taken(lock, fcntl.LOCK_SH)


def _taken(lock: IO[str], kind: int, tries: int = 1) -> bool:
    """Whether the lock could be had, at one of so many tries."""
    for n in range(tries):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        if n + 1 < tries:
            time.sleep(0.05)
    return False


@dataclass(frozen=True)
class MachineConfig:
    """Where a verb other than training computes."""

    threads: int | None = None
    device: str = "cpu"

    def apply(self) -> None:
        """Sets torch's threads; ConfigError for a device that is not there."""
        import torch

        if self.threads is not None:
            if self.threads < 1:
                raise ConfigError(f"threads={self.threads}: give at least 1, or null for torch's choice")
            torch.set_num_threads(self.threads)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ConfigError(f"device={self.device}: {str(e).splitlines()[0]}") from None


def check_seed(seed: Any) -> None:
    if type(seed) is not int:
        raise ConfigError(f"seed={seed!r}: give an integer")


def say(text: str) -> None:
    """Progress for people, from one process of a distributed run."""
    if processes.is_first():
        print(text, flush=True)


def provenance(cfg: Any, **facts: Any) -> dict[str, Any]:
    """What a run was made from: versions, git commit, command, seed and the given fingerprints."""
    return {
        "command": [Path(sys.argv[0]).name, *map(shown.clean, sys.argv[1:])],
        "seed": cfg.get("seed"),
        "identity": artifacts.fingerprint(config.identity(cfg)),
        "git": _git(),
        "versions": {
            "python": sys.version.split()[0],
            **{name: _version(name) for name in ("draftsmith", "torch", "transformers", "lightning", "hydra-core")},
        },
        **facts,
    }


def _git() -> str | None:
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():  # installed from a wheel: any repository around it is not ours
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    room.ready(folder.parent, "DRAFTSMITH_CACHE")
    with artifacts.disk(folder, "the cache"):
        lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # noqa: SIM115 (held for the whole block)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
