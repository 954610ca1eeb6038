"""draftsmith label: labels per token for gates, from a base, a companion and the base's own rows."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import config, prepare, room
from draftsmith.data.rows import Rows, check_origin, verified
from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from draftsmith.base.lm import BaseLM


def run(cfg: DictConfig) -> Path:
    """Labels the rows of cfg.rows in cfg.out; the same command goes on where it was stopped."""
    from draftsmith.data import labels

    chosen = [config.typed(cfg[name], prepare.BaseConfig, name) for name in ("base", "companion")]
    settings = config.typed(cfg.labels, labels.LabelsConfig, "labels")
    machine = config.typed({"threads": cfg.threads, "device": cfg.device}, prepare.MachineConfig, "label")
    rows, out = Path(cfg.rows), Path(cfg.out)
    if rows.resolve() == out.resolve():
        raise ConfigError(f"out: {out} is the folder of rows itself; choose another folder")
    facts = verified(rows)
    if facts["kind"] != "rows":
        raise DataError(f"{rows}: holds {facts['kind']}; rows= wants what distill writes")
    machine.apply()
    base, companion = (prepare.load_base(b, machine.device) for b in chosen)
    check_origin(facts, base.spec, rows)
    labels.check_pair(base.spec, companion.spec)
    if settings.kind == "importance" and base.tokenizer is None:
        raise DataError(f"base: {base.spec.path} has no tokenizer; importance compares answers as text")
    pair = {"base": base, "companion": companion}
    plan = {
        "rows": {"manifest_sha256": prepare.content_sha256(rows)},
        **{name: labels.identity(b.spec, b.weights_sha256()) for name, b in pair.items()},
        "labels": settings.identity(),
    }
    specs = {name: dataclasses.asdict(b.spec) for name, b in pair.items()}
    shards = [n for n in facts["files"] if n.startswith("rows-") and not (out / n).is_file()]
    room.ready(out, "out", room.files(facts["files"][n]["bytes"] for n in shards))  # rows, and a label for each token
    began = time.perf_counter()
    with prepare.held(out):
        told = labels.label_folder(rows, out, plan, specs, lambda r: _label(base, companion, r, settings), prepare.say)
    counts, mean = told["counts"], told["mean_label"]
    seconds = time.perf_counter() - began
    told_mean = "none" if mean is None else f"{mean:.3f}"
    prepare.say(f"{counts['rows']:,} rows, {counts['labelled']:,} labels, mean {told_mean}, {seconds:.1f} s -> {out}")
    return out


def _label(base: BaseLM, companion: BaseLM, rows: Rows, settings: Any) -> pa.Table:
    from draftsmith.data import importance, labels

    if settings.kind == "acceptance":
        return labels.acceptance(base, companion, rows, settings)
    return importance.importance(
        companion,
        rows,
        settings,
        generate=lambda prompts, new: base.generate(prompts, max_new_tokens=new, batch_size=settings.batch_size),
        decode=lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True),
        eos_ids=base.eos_ids,
        spec=base.spec,
    )


def main() -> None:
    config.command("label", run)


if __name__ == "__main__":
    main()
