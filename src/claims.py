"""Whose folder this is: a run directory belongs to one run, and says key by key what another command changes.

Of what makes a run (config.identity) only the keys that `resume.allow` names may change between two starts. Folders may
move: it is their contents that a checkpoint is tied to. All other keys are harmless, and always pass.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, config, prepare, shown
from draftsmith.errors import ConfigError, DataError
from draftsmith.training.settings import ResumeConfig, covers

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import BaseSpec

# Where something lies, not what it is.
MOVABLE = re.compile(r"base\.(path|adapter)|companion\.path|drafter|data\.(prompts\.)?(sources\.[^.]+\.)?path")
DONE = ("base.", "data.")  # of these a complete run can still tell whether they are the same
FEW = 6  # differences that the error line has room for
WIDE = 50  # characters of a value in the table
UNKEPT = ("run_dir", "resume")  # of a command, not of the run
BATCH = "global_batch"
Changes = dict[str, tuple[Any, Any]]  # key -> what it was, what it is now


def claim(cfg: DictConfig, folder: Path, *, begun: bool = True, resume: ResumeConfig | None = None) -> Changes:
    """Writes folder/config.yaml, or checks that what is there is the same run: another one is refused, key by key, so
    that a folder never mixes two runs. Until one has begun, a corrected command takes the folder over. resume: what
    may differ; None: nothing, and nothing may have moved.

    Returns what differs and was let through, for `accept` once it is clear that the run goes on.
    """
    theirs = stored(folder)
    allow = resume or ResumeConfig()
    _check_allowed(allow, cfg, theirs)
    if theirs is None or (not begun and "heads" in theirs and "data" in theirs):
        write(cfg, folder)
        return {}
    done = artifacts.is_complete(folder, manifest="COMPLETE.json")
    changed, harmless = _differing(config.identity(theirs), config.identity(cfg)), _harmless(theirs, cfg)
    fate = {k: _fate(k, values, resume, done) for k, values in changed.items()}
    if changed:
        rows = [(k, *values, fate[k]) for k, values in changed.items()]
        prepare.say(_table([*rows, *((k, *values, "harmless") for k, values in harmless.items())]))
    elif harmless and not done:
        prepare.say(f"harmless for a run that goes on: {_line(harmless)}")
    if refused := {k: changed[k] for k in changed if fate[k] == "refused"}:
        raise ConfigError(_refusal(folder, cfg, refused, may=resume is not None and not done))
    for key in allow.allow:
        if not any(covers(key, k) for k in changed):
            prepare.say(f"note: resume.allow: {key} is what it was")
    return changed


def accept(cfg: DictConfig, folder: Path, changed: Changes, step: int) -> None:
    """The run goes on after `step` with what was let through: config.yaml is this command's now, and events.jsonl
    tells what it was."""
    if changed:
        from draftsmith.training.callbacks import Events
        from draftsmith.training.clock import Clock

        write(cfg, folder)
        told = {k: list(values) for k, values in changed.items()}
        Events(folder / "events.jsonl", Clock()).write("changed", step, keys=told)
        prepare.say(shown.clean(f"changed after step {step}: {_line(changed)}"))


def changes(folder: Path) -> list[dict[str, Any]]:
    """What a run went on with that it had not begun with, as `accept` wrote it: step, and key -> [before, now]."""
    path = folder / "events.jsonl"
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # torn by a kill
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "changed":
                found.append({"step": event["step"], "keys": event["keys"]})
    return found


def tie(weights_sha256: str, spec: BaseSpec) -> str:
    """What the heads of a run are tied to of their base."""
    return f"{weights_sha256} {spec.adapter_sha256}".strip()


def check_base(base: BaseLM, folder: Path) -> None:
    """DataError unless the complete run in `folder` was trained on this base, wherever that lies now."""
    if artifacts.read_json(folder / "provenance.json")["sha256"]["base"] != tie(base.weights_sha256(), base.spec):
        raise DataError(f"{folder}: complete, but on another base than {base.spec.path}; choose another run_dir")


def write(cfg: DictConfig, folder: Path) -> None:
    """folder/config.yaml: the run that this command is."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    kept = OmegaConf.to_yaml(OmegaConf.create({k: v for k, v in values.items() if k not in UNKEPT}))
    with artifacts.disk(folder, "a run directory"):
        folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(folder / "config.yaml", kept.encode())


def stored(folder: Path) -> DictConfig | None:
    """folder/config.yaml: what its run is; None where none has begun. DataError where it is damaged."""
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        found = OmegaConf.create(path.read_bytes().decode())
    except Exception as e:  # of the yaml package, which is omegaconf's to know
        raise DataError(f"{path}: damaged ({' '.join(str(e).split())}); bring it back, or choose another run") from None
    if not OmegaConf.is_dict(found):
        raise DataError(f"{path}: damaged (it holds no keys); bring it back, or choose another run")
    for key, value in config.flat(cast(dict, OmegaConf.to_container(found))):  # written resolved: not ours, and not run
        if "${" in str(value):
            raise DataError(
                f"{path}: damaged ({key} is a reference to be resolved); bring it back, or choose another run"
            )
    return cast(DictConfig, found)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    keys = sorted({*before, *now})
    return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def _harmless(theirs: DictConfig, cfg: DictConfig) -> Changes:
    """Differences in what says only where and how fast; a key that the run is older than is none."""
    before, now = (dict(config.flat(config.plain(c))) for c in (theirs, cfg))
    machine = {k for k in before.keys() & now.keys() if any(covers(m, k) for m in config.MACHINE_KEYS)}
    return _differing(*({k: v for k, v in c.items() if k in machine} for c in (before, now)))


def _fate(key: str, values: tuple[Any, Any], resume: ResumeConfig | None, done: bool) -> str:
    if resume is None:
        return "refused"
    if not done and any(covers(a, key) for a in resume.allow):
        return "allowed"
    moved = MOVABLE.fullmatch(key) and all(isinstance(v, str) for v in values)
    return "moved" if moved and (not done or key.startswith(DONE)) else "refused"


def _check_allowed(resume: ResumeConfig, cfg: DictConfig, theirs: DictConfig | None) -> None:
    """ConfigError for what no run has, and for what no leave can make good."""
    known = {k for c in (cfg, theirs) if c is not None for k, _ in config.flat(config.plain(c))}
    for key in resume.allow:
        if key == BATCH:
            raise ConfigError(
                f"resume.allow: {BATCH} stays what it was: what a run has read is counted in global steps, and others"
                " would repeat some rows and leave out others; choose another run_dir"
            )
        if not any(covers(key, k) for k in known):
            raise ConfigError(f"resume.allow: {key}: no such key{config.nearest(key, known)}")


def _refusal(folder: Path, cfg: DictConfig, refused: Changes, *, may: bool) -> str:
    cure = ""
    if list(refused) == [BATCH]:
        cure = _splits(cfg, refused[BATCH][0])
    elif may and BATCH not in refused:
        cure = f"to go on with {'it' if len(refused) == 1 else 'them'}, say resume.allow=[{','.join(refused)}], or "
    few = dict(list(refused.items())[:FEW])
    more = f", and {len(refused) - FEW} more" if len(refused) > FEW else ""
    return f"run_dir: {folder} holds another run ({_line(few)}{more}); {cure}choose another run_dir"


def _splits(cfg: DictConfig, batch: int) -> str:
    """How these processes can share the global batch that a run began with; else how many could."""
    batch_size, _, devices, nodes = (OmegaConf.select(cfg, k) for k in config.SPLIT_KEYS)
    share, rest = divmod(batch, devices * nodes)
    if rest:
        divisors = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        return f"{batch} packs divide by {divisors} processes, not by {devices * nodes}; start so many, or "
    size = math.gcd(share, batch_size)
    return f"to go on, say data.batch_size={size} trainer.accumulate={share // size}, or "


def _line(changes: Changes) -> str:
    return ", ".join(f"{k}: {before} -> {now}" for k, (before, now) in changes.items())


def _table(rows: list[tuple[str, Any, Any, str]]) -> str:
    """Keys, values and what becomes of them, in columns."""
    cells = [("key", "before", "now", ""), *(tuple(_cell(value) for value in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _cell(value: Any) -> str:
    text = shown.clean(" ".join(str(value).split()))
    return text if len(text) <= WIDE else f"{text[: WIDE - 1]}…"
