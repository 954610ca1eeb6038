"""draftsmith distill: prompts -> rows, written by the base itself."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare
from draftsmith.data.generate import GenerationConfig, distill
from draftsmith.data.prompts import Prompt, PromptsConfig
from draftsmith.data.rows import DataConfig, Row, write_rows
from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM


def run(cfg: DictConfig) -> Path:
    """Answers cfg.data.prompts and publishes the rows in cfg.out."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    if data.prompts is None:
        raise ConfigError("data.prompts: nothing to answer; use data=prompts data.prompts.path=<JSON lines>")
    machine = config.typed({"threads": cfg.threads, "device": cfg.device}, prepare.MachineConfig, "distill")
    if data.prompts.path and not Path(data.prompts.path).is_file():
        raise DataError(f"{data.prompts.path}: no such file; data.prompts.path names JSON lines of prompts")
    out = Path(cfg.out)
    if artifacts.is_complete(out):
        _same(out, base_config, data)
        prepare.say(f"{out}: already complete")
        return out
    machine.apply()
    answer(prepare.load_base(base_config, machine.device), data.prompts, data.generation, out)
    return out


def _same(out: Path, base: prepare.BaseConfig, data: DataConfig) -> None:
    """Refuses a folder of rows that other prompts, settings or another base made."""
    facts = artifacts.read_json(out / artifacts.MANIFEST)
    assert data.prompts is not None
    asked = _facts(data.prompts, data.generation)
    changed = [k for k, v in asked.items() if facts.get(k) != v]
    if base.path and Path(base.path).exists() and facts["base"]["path"] != str(Path(base.path).resolve()):
        changed.append("base")
    if changed:
        raise ConfigError(f"out: {out} holds rows of another {' and '.join(changed)}; choose another folder")


def _facts(prompts: PromptsConfig, generation: GenerationConfig) -> dict[str, Any]:
    """What rows were asked for, as their manifest tells it. (Batch size and path may change.)"""
    return {
        "source": {**dataclasses.asdict(prompts), "path": prepare.content_sha256(prompts.path)},
        "generation": {k: v for k, v in dataclasses.asdict(generation).items() if k != "batch_size"},
    }


def answer(base: BaseLM, prompts: PromptsConfig, generation: GenerationConfig, out: Path) -> None:
    """Lets the base answer every prompt and publishes the rows, with the base's fingerprints."""
    with artifacts.disk(out, "rows"):
        out.parent.mkdir(parents=True, exist_ok=True)
    asked = collect(prompts)
    prepare.say(f"the base answers {len(asked)} prompts")
    began = time.perf_counter()
    answers = distill(asked, base.generate, base.tokenizer, generation, base.spec.max_positions)
    rows = [Row(p.id, ids, mask, p.where) for p, ids, mask in answers]
    facts = {
        "base": dataclasses.asdict(base.spec),
        **_facts(prompts, generation),
    }
    count = write_rows(out, rows, asked, **facts)
    written = sum(sum(row.mask) for row in rows)
    prepare.say(f"{count} rows, {written:,} tokens of the base's own, {time.perf_counter() - began:.0f} s -> {out}")


def collect(prompts: PromptsConfig, exclude: frozenset[str] = frozenset()) -> list[Prompt]:
    """The prompts of a configuration; made-up ones avoid the user turns in `exclude`."""
    from draftsmith.data import prompts as reading

    return list(reading.read_prompts(prompts.path)) if prompts.path else reading.make_up(prompts, exclude)


def rows_folder(data: Any, base: BaseLM) -> Path:
    """Rows answered for data.prompts, made once per base, prompts and settings, and kept."""
    source = data.prompts.path
    key: dict[str, Any] = {
        "base": {k: v for k, v in dataclasses.asdict(base.spec).items() if k != "path"},
        "weights": base.weights_sha256(),
        "prompts": dataclasses.asdict(data.prompts),
        "file": artifacts.file_sha256(Path(source)) if source and Path(source).is_file() else None,
        "generation": dataclasses.asdict(data.generation),
        "code": [prepare.source_sha256(f"draftsmith.data.{m}") for m in ("synthetic", "generate", "chat", "prompts")],
    }
    folder = prepare.cache_dir() / "rows" / artifacts.fingerprint(key)[:16]
    return prepare.once(folder, lambda target: answer(base, data.prompts, data.generation, target))


def main() -> None:
    config.command("distill", run)


if __name__ == "__main__":
    main()
