"""From a yaml node to one of our objects, and from a command line to a run.

`typed` turns a node into its owner's frozen dataclass, `build` also makes the object; both name the key
that is wrong. `_target_`s are checked against the allowlist below before anything is imported. `command`
is every verb's main(): Hydra composes, errors become one line and an exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from draftsmith import grid, guard, room, shown, signals, typos
from draftsmith.artifacts import disk, fingerprint
from draftsmith.errors import ConfigError, DraftsmithError, Interrupted, ResourceError
from draftsmith.typos import first_line, nearest

T = TypeVar("T")
CONF = "pkg://draftsmith.conf"
ALLOWED_PACKAGES = ("draftsmith.",)
ALLOWED_TARGETS = frozenset({"torch.optim.AdamW"})

# Where and how fast a run runs; never what it computes. Not part of a run's identity. How a global step is
# split over processes and micro-batches is one of these; their product, the global batch, is not.
MACHINE_KEYS = frozenset(
    {
        "run_dir",
        "resume.allow",
        "debug",
        "base.recompute",  # the same gradients, bit for bit
        "evaluate",
        "logger",
        "strategy",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.accumulate",
        "data.batch_size",
        "trainer.threads",
        "trainer.log_every",
        "trainer.checkpoint_every",
        "trainer.keep",
        "trainer.skip_nonfinite",  # whatever it is, runs that end have equal weights
        "trainer.profile",
        "data.num_workers",
        "data.generation.server.urls",
        "data.generation.server.concurrency",
    }
)

# What comes out of Hydra for overrides that it does not foresee.
UNFORESEEN = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
LAUNCHED = "DRAFTSMITH_LAUNCHED"  # set for the processes that a command of ours started: their line is not the user's

# Came later than the first runs: part of a run's identity only where they are on.
LATER = ("base.shape", "base.fake", "companion.shape", "companion.fake", "data.one_batch", "data.random.labels")
SPLIT_KEYS = ("data.batch_size", "trainer.accumulate", "trainer.devices", "trainer.num_nodes")


def typed(node: Any, schema: type[T], key: str) -> T:
    """The node's values as `schema`, a dataclass; ConfigError names the key that does not fit."""
    given: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not isinstance(given, dict):
        raise ConfigError(f"{key}: {given!r} is not a group of keys; see conf/{key.split('.')[0]}")
    values: dict[str, Any] = {str(k): v for k, v in given.items() if k != "_target_"}
    # a Literal of strings is a string here; its owner's __post_init__ says which are allowed
    hints = {n: str if typing.get_origin(h) is typing.Literal else h for n, h in typing.get_type_hints(schema).items()}
    for name in values:
        if name not in hints:
            raise ConfigError(f"{key}.{name}: no such key{nearest(name, hints)}")
    values = {n: v for n, v in values.items() if v is not None or not _is_group(hints[n])}  # null: none by name
    inner = {name: _dataclass_in(hint) for name, hint in hints.items()}
    nested: dict[str, Any] = {
        name: _nested(values[name], kind, hints[name], f"{key}.{name}")
        for name, kind in inner.items()
        if kind is not None and values.get(name) is not None
    }
    for name, kind in inner.items():
        if kind is not None and values.get(name, "") is None and type(None) not in typing.get_args(hints[name]):
            raise ConfigError(f"{key}.{name}: null; give its keys, or leave it out for the defaults")
    leaves = {name: v for name, v in values.items() if inner[name] is None}
    fields = [(f.name, hints[f.name]) for f in dataclasses.fields(schema) if f.name in leaves]  # type: ignore[arg-type]
    try:
        plain = OmegaConf.merge(OmegaConf.structured(dataclasses.make_dataclass("Leaves", fields)), leaves)
        converted = {str(k): v for k, v in OmegaConf.to_container(plain, throw_on_missing=True).items()}  # type: ignore[union-attr]
        if (wrong := next((k for k, v in flat(converted, f"{key}.") if not _is_finite(v)), None)) is not None:
            raise ConfigError(f"{wrong}: give a number that is finite")
        return schema(**{**{n: None for n in inner if n in values}, **converted, **nested})
    except OmegaConfBaseException as e:
        at = f"{key}.{e.full_key}" if e.full_key else key
        raise ConfigError(f"{at}: {first_line(e)}") from None
    except ConfigError as e:
        raise ConfigError(str(e) if str(e).startswith(f"{key}.") else f"{key}: {e}") from None
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{key}: {e}") from None


def _is_finite(value: Any) -> bool:
    """Whether no number in a leaf is NaN or infinite."""
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _nested(value: Any, kind: type, hint: Any, key: str) -> Any:
    """One dataclass, or a group of them by name where the hint is dict[str, X]."""
    if not _is_group(hint):
        return typed(value, kind, key)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {value!r} is not a group of named entries")
    return {str(name): typed(own, kind, f"{key}.{name}") for name, own in value.items()}


def build(node: Any, key: str, **runtime: Any) -> Any:
    """The object that a node with `_target_` describes: `cls(typed config, **runtime)`."""
    cls = target(node, key)
    return cls(typed(node, cls.Config, key), **runtime)


def target(node: Any, key: str) -> Any:
    """The class a node's `_target_` names, if the allowlist admits it; nothing else is ever imported."""
    name = node.get("_target_") if isinstance(node, (DictConfig, Mapping)) else None
    if not isinstance(name, str):
        raise ConfigError(f"{key}._target_: missing; say which class this is")
    if not name.startswith(ALLOWED_PACKAGES) and name not in ALLOWED_TARGETS:
        raise ConfigError(
            f"{key}._target_: '{name}' is not allowed; draftsmith's own classes are, and {sorted(ALLOWED_TARGETS)}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{key}._target_: cannot import '{name}' ({e})") from None
    # its own module, too: a class that one of ours only imports is somebody else's
    ours = (
        isinstance(found, type) and found.__module__ == module and dataclasses.is_dataclass(getattr(found, "Config", 0))
    )
    if name not in ALLOWED_TARGETS and not ours:
        raise ConfigError(f"{key}._target_: '{name}' is no class with a Config of its own")
    return found


def compose(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A verb's configuration as its command line would compose it, inside a running verb or outside."""
    import hydra

    overrides = [quoted(o) for o in overrides]
    try:
        if GlobalHydra.instance().is_initialized():
            return hydra.compose(verb, overrides)
        with hydra.initialize_config_module("draftsmith.conf", version_base=None):
            return hydra.compose(verb, overrides)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(_explain(e, verb)) from None
    except UNFORESEEN as e:
        raise ConfigError(typos.unread(e, overrides)) from None


def quoted(override: str) -> str:
    """debug=true and debug=false as Hydra takes them: the names of two choices, which it would read as booleans."""
    said = re.fullmatch("debug=(true|false)", override)
    return f'debug="{said[1]}"' if said else override


def changed(cfg: DictConfig, verb: str, overrides: Sequence[str]) -> DictConfig:
    """A verb's configuration with these overrides on top: key=value, ~key, or another choice of a group, in which what
    the running command said of that group is kept."""
    if HydraConfig.initialized() and HydraConfig.get().job.config_name == verb:
        return compose(verb, [*HydraConfig.get().overrides.task, *overrides])
    from hydra.core.override_parser.overrides_parser import OverridesParser

    made = cfg.copy()
    for text, one in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        key = one.key_or_group
        if one.is_delete():
            above, _, leaf = key.rpartition(".")
            with open_dict(made):
                del OmegaConf.select(made, above)[leaf]
        elif resources.files("draftsmith.conf").joinpath(key).is_dir():
            node = "heads" if key == "head" else key
            made[node] = compose(verb, [text])[node]
        else:
            OmegaConf.update(made, key, one.value(), force_add=False)
    return made


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration without the keys that say where and how fast: what a run *is*."""
    leaves = dict(flat(plain(cfg)))
    kept = {k: v for k, v in leaves.items() if not any(k == m or k.startswith(m + ".") for m in MACHINE_KEYS)}
    kept = {k: v for k, v in kept.items() if v or k not in LATER}
    if all(isinstance(leaves.get(k), int) for k in SPLIT_KEYS):
        kept["global_batch"] = math.prod(leaves[k] for k in SPLIT_KEYS)
    return kept


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as dicts and lists; a value that must still be given is '???'."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False))


def run_dir(cfg: DictConfig, verb: str) -> Path:
    """cfg.run_dir, in a grid cfg.run_dir/<8 hex of the identity>, so that a wider or reordered one finds what it has
    finished; or runs/<experiment or verb>-<8 hex>: same command, same folder."""
    if not OmegaConf.is_missing(cfg, "run_dir") and cfg.run_dir is not None:
        return Path(cfg.run_dir) / fingerprint(identity(cfg))[:8] if grid.is_job(verb) else Path(cfg.run_dir)
    return Path("runs") / f"{cfg.get('experiment') or verb}-{fingerprint(identity(cfg))[:8]}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) pairs; an empty group is a leaf."""
    for k, v in values.items():
        if isinstance(v, Mapping) and v:
            yield from flat(v, f"{prefix}{k}.")
        else:
            yield f"{prefix}{k}", v


def command(verb: str, run: Callable[[DictConfig], Any]) -> NoReturn:
    """A verb's main(): compose, run, map errors to one line and an exit code (the worst job's under -m)."""
    import hydra

    signals.listen()
    guard.hydra()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Where torchao is installed transformers imports it, and it tells of every kernel that is for another machine.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    codes: list[int] = []
    begun: list[bool] = []
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]

    def task(cfg: DictConfig) -> None:
        def known() -> None:
            _refuse_unknown(cfg, verb)
            _refuse_secrets(cfg)
            if grid.is_job(verb):
                grid.begin(cfg, run_dir(cfg, verb))
            run(cfg)

        begun.append(True)
        if Interrupted.exit_code not in codes:  # who stops a job stops the grid
            codes.append(_guarded(known, verb, debug=bool(cfg.get("debug"))))

    main = hydra.main(version_base=None, config_path=CONF, config_name=verb)(task)

    def whole() -> None:
        try:
            main()
        except UNFORESEEN as e:
            if begun or isinstance(e, DraftsmithError):
                raise
            raise ConfigError(typos.unread(e, sys.argv[1:])) from None

    outside = _guarded(whole, verb, debug='debug="true"' in sys.argv)
    _leave(max([outside, *codes]))


def _leave(code: int) -> NoReturn:
    """Ends this process. One of several that failed or was stopped, and the one that started them, leave at once:
    torch's threads may still talk to processes that are gone, and an orderly end may hang or abort (seen: 134)."""
    distributed = sys.modules.get("torch.distributed")
    several = LAUNCHED in os.environ or (distributed is not None and distributed.is_initialized())
    if code and several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def as_job(cfg: DictConfig, verb: str) -> Iterator[list[str]]:
    """Python's arguments for another process that runs the verb with this configuration; good inside the context."""
    where = os.environ.get("TMPDIR", "the folder for temporary files")
    with contextlib.ExitStack() as held:
        with disk(where, "what the processes are to run"):
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="draftsmith-"))
            Path(folder, "job.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        quiet = [f"hydra/{log}=none" for log in ("job_logging", "hydra_logging")]
        given = ["--config-dir", folder, "--config-name", "job", "hydra.run.dir=.", "hydra.output_subdir=null", *quiet]
        yield ["-m", f"draftsmith.{verb}", *given]


def _guarded(work: Callable[[], Any], verb: str, *, debug: bool) -> int:
    try:
        work()
        return 0
    except DraftsmithError as e:
        if debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if not (e.told or (isinstance(e, Interrupted) and rank != "0")):  # the first process says it for all
            _say(e if rank == "0" else f"process {rank}: {e}", e.exit_code)
        if isinstance(e, Interrupted) and rank == "0":
            _say_how_to_resume(verb)
        return e.exit_code
    except (HydraException, OmegaConfBaseException) as e:
        if debug:
            traceback.print_exc()
        return _say(_explain(e, verb), ConfigError.exit_code)
    except YAMLError as e:  # of a --config-dir
        return _say(f"{verb}: a yaml does not read as plain data: {e}", ConfigError.exit_code)
    except KeyboardInterrupt:
        _say(f"{verb}: stopped by a signal; the same command goes on from what is complete", Interrupted.exit_code)
        _say_how_to_resume(verb)
        return Interrupted.exit_code
    except Exception as e:
        if debug:
            traceback.print_exc()
        if room.exhausted(e):
            return _say(f"{verb}: out of memory ({room.words(e)}); {room.SMALLER}", ResourceError.exit_code)
        if isinstance(e, OSError):
            return _say(f"{e.filename or verb}: {e.strerror or e}", ResourceError.exit_code)
        # ours to mend: still one line, and never exit 0
        frame = traceback.extract_tb(e.__traceback__)[-1]
        return _say(f"{verb}: {type(e).__name__}: {e} ({frame.filename}:{frame.lineno}); debug=true tells more", 1)


def _say_how_to_resume(verb: str) -> None:
    """The user's own command line; a process that another command started does not know it."""
    if LAUNCHED in os.environ and "RANK" in os.environ:
        return
    launched = "the same launcher with: " if "RANK" in os.environ else ""
    told = f"resume: {launched}{shlex.join(['draftsmith', verb, *sys.argv[1:]])}"
    print(shown.clean(told), file=sys.stderr, flush=True)


def _say(message: object, code: int) -> int:
    print(f"error: {shown.clean(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    return code


def _refuse_unknown(cfg: DictConfig, verb: str) -> None:
    """`+key=value` adds whatever is asked; below the top, each group's owner refuses what it does not know."""
    known = {*compose(verb), "base", "companion", "figures", "gate"}
    for key in map(str, cfg):
        if key not in known and isinstance(cfg.debug, str):
            raise ConfigError(f"debug={cfg.debug}: sets {key}, which {verb} has not; it is train's and plan's")
        if key not in known:
            raise ConfigError(f"{key}: no such key{nearest(key, known)}")


def _refuse_secrets(cfg: DictConfig) -> None:
    """A configuration is written into the run's folder and told to trackers: no secret may stand in it."""
    for key, value in flat(plain(cfg)):
        for text in value if isinstance(value, list) else [value]:
            if why := shown.secret_in(text) if isinstance(text, str) else "":
                raise ConfigError(f"{key}: holds {why}; leave it out, and give it by an environment variable")


def _explain(e: Exception, verb: str) -> str:
    """Hydra's message as one line that names the nearest valid spelling."""
    return typos.explain(e, lambda: [k for k, _ in flat(typing.cast(dict, OmegaConf.to_container(compose(verb))))])


def _is_group(hint: Any) -> bool:
    """dict[str, X] of dataclasses: entries by name."""
    return typing.get_origin(hint) is dict and _dataclass_in(hint) is not None


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in X, X | None or dict[str, X]."""
    several = isinstance(hint, types.UnionType) or typing.get_origin(hint) is dict
    options = typing.get_args(hint) if several else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)
