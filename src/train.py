"""draftsmith train: rows -> heads, on the frozen base."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, claims, config, counting, prepare, room, shown, stored, supply
from draftsmith.beside import Beside, told
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError, Interrupted
from draftsmith.training import processes, strategy, tracking
from draftsmith.training.settings import STEP, LoggerConfig, ResumeConfig, Settings

if TYPE_CHECKING:
    from lightning import Callback

    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head
    from draftsmith.data.importing import Chosen
    from draftsmith.data.store import Store

FEW_STEPS = 50  # the quickstart's head is useful after about a hundred


def run(cfg: DictConfig, more: Sequence[Callback] = ()) -> Path:
    """Trains cfg.heads and returns the run directory; the same configuration resumes, or is complete. more: callbacks
    that watch this process train."""
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    data = config.typed(cfg.data, DataConfig, "data")
    processes.adopt(cfg.trainer)
    settings = Settings.of(cfg)
    logger = config.typed(cfg.logger, LoggerConfig, "logger")
    resume = config.typed(cfg.resume, ResumeConfig, "resume")
    prepare.check_seed(cfg.seed)
    chosen = heads_of(cfg)
    check_company(chosen, base_config, cfg.start_from)
    check_beside(chosen, cfg.get("companion"), cfg.drafter)
    parts = [*chosen, *(["base"] if base_config.lora else [])]
    check_groups(settings.optimizer.heads, parts)
    engine = strategy.engine_config(settings, data.batch_size, parts)
    if settings.strategy.in_pieces and (base_config.quantise or base_config.compile):
        key = "quantise" if base_config.quantise else "compile"
        raise ConfigError(f"base.{key}: {settings.strategy.name} cuts up plain blocks; leave it out, or use zero2")
    drafted = cfg.get("companion") is not None
    supply.check(data, labels=any(kind.reads_labels(own, drafted) for kind, own in chosen.values()))
    run_dir = config.run_dir(cfg, "train")
    trainer = settings.trainer
    if processes.wants_launch(trainer.devices, trainer.num_nodes):
        cfg.run_dir = str(run_dir)
        with config.as_job(cfg, "train") as arguments:
            processes.launch(arguments, trainer.devices)
        return run_dir
    with processes.joined(trainer.accelerator, settings.strategy.timeout, alone=bool(engine)) as watch:
        tracker = tracking.of(logger, run_dir, shown.of(config.plain(cfg)))
        how: dict[str, Any] = {"deepspeed": engine, "watch": watch, "more": more, "tracker": tracker}
        with contextlib.ExitStack() as held:
            claimed = processes.by_first(lambda: _claimed(cfg, run_dir, base_config, data, resume, held))
            done, source, changed = claimed
            how |= {"loose": resume, "begin": lambda step: claims.accept(cfg, run_dir, changed, step)}
            if tracker is not None:
                held.push(lambda kind, *_: tracker.close(failed=kind is not None and kind is not Interrupted))
            if not done:
                _run(cfg, run_dir, base_config, data, settings, chosen, source, how)
    return _judged(cfg, run_dir)


def _claimed(
    cfg: DictConfig,
    run_dir: Path,
    base: prepare.BaseConfig,
    data: DataConfig,
    resume: ResumeConfig,
    held: contextlib.ExitStack,
) -> tuple[bool, str | None, claims.Changes]:
    """(whether the run is complete, hash of its sources, what differs from before and may), after this process made the
    directory its own."""
    complete = artifacts.is_complete(run_dir, manifest="COMPLETE.json")
    begun = complete or any((run_dir / "checkpoints").glob(STEP))
    changed = claims.claim(cfg, run_dir, resume=resume) if begun else {}
    source = artifacts.fingerprint(supply.content(data)) if data.chosen else None
    if complete:
        if artifacts.read_json(run_dir / "COMPLETE.json")["data_sha256"] != source:
            raise DataError(f"{run_dir}: complete, but with other data than there is now; choose another run_dir")
        if any(key.startswith("base.") for key in changed):  # it lies elsewhere now: its contents tell
            claims.check_base(prepare.load_base(base), run_dir)
        artifacts.reclaim(run_dir)
        prepare.say(f"{run_dir}: already complete")
        return True, source, {}
    room.ready(run_dir, "run_dir")
    held.enter_context(prepare.held(run_dir))
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "heads"):
        artifacts.reclaim(folder)
    if not begun:
        claims.claim(cfg, run_dir, begun=False, resume=resume)
    return False, source, changed


def _judged(cfg: DictConfig, run_dir: Path) -> Path:
    """The run, after draftsmith evaluate has looked at it, if cfg.evaluate asks for that; in either case with its
    report."""
    if processes.is_first():
        from draftsmith import evaluate, report

        if cfg.evaluate is not None:
            evaluate.run(config.compose("evaluate", [f"run_dir={run_dir}", *cfg.evaluate]))
        else:
            report.write(run_dir)
    return run_dir


def _run(
    cfg: DictConfig,
    run_dir: Path,
    base_config: prepare.BaseConfig,
    data: DataConfig,
    settings: Settings,
    chosen: dict[str, tuple[type[Head], Any]],
    source: str | None,
    how: dict[str, Any],
) -> None:
    """Base, rows, heads, training, exports; nothing marks the run complete before the end. how: of fit.fit's
    arguments those that say where and beside whom it runs."""
    import torch

    from draftsmith.training.fit import completed, new_adapter, new_head, unchanged

    if settings.trainer.threads:  # before the base writes rows: two threads on one busy core are far slower
        torch.set_num_threads(settings.trainer.threads)
    if processes.is_first():
        prepare.say(counting.line(cfg, chosen))
    device = f"cuda:{processes.place().local}" if settings.trainer.accelerator == "gpu" else "cpu"
    cutter = strategy.pieces(settings, how["deepspeed"])
    base = prepare.load_base(base_config, device, cutter)
    whole = None if cutter is None else lambda: prepare.load_base(base_config, device)
    if base_config.lora is not None:
        new_adapter(base, base_config.lora, cfg.seed)
    before = base.weights_sha256()
    around = Beside.of(cfg, base)
    besides = {name: around.of_kind(kind) for name, (kind, _) in chosen.items()}
    chosen = {name: (kind, completed(name, kind, own, base, besides[name])) for name, (kind, own) in chosen.items()}
    if around.companion is not None and data.length > around.companion.spec.max_positions:
        most = around.companion.spec.max_positions
        raise ConfigError(
            f"data.length={data.length}: the companion reads at most {most} tokens; give a shorter length"
        )
    chosen_rows = rows_for(data, base, _labeller(besides, chosen), whole)
    counts = chosen_rows.training.token_counts(base.spec.vocab_size, chosen_rows.weights_N)
    counts_V = torch.from_numpy(counts)
    heads = {n: new_head(kind, own, n, base, cfg.seed, counts_V, besides[n]) for n, (kind, own) in chosen.items()}
    for name, folder in (cfg.start_from or {}).items():
        start(name, heads[name], Path(folder), base)
    if base_config.lora is not None and not cfg.start_from:
        prepare.say("note: the adapter learns beside heads that know nothing yet; start_from names trained ones")
    ties = {"base": claims.tie(before, base.spec), "rows": chosen_rows.training.sha256()}
    others = {name: told(other, cfg.drafter) for name, other in besides.items() if other is not None}
    store = stored.of(data, base, heads, chosen_rows, skip_masked=settings.loss.skip_masked)
    ties |= {} if store is None else {"store": str(prepare.content_sha256(data.path))}
    ties |= {f"beside {name}": other["sha256"] for name, other in others.items()}
    how |= {"seed": cfg.seed, "ties": ties, "loose": [name for name in ties if how["loose"].lets(name)]}
    _fit(base, heads, chosen_rows, data, run_dir, settings, store, how)
    after = base.weights_sha256()
    processes.together(lambda: unchanged(base, before, after, run_dir))
    _record(base, heads)
    if processes.is_first():
        known = {"funnel": chosen_rows.funnel, "sha256": ties, "changed": claims.changes(run_dir)}
        facts = {"rows": len(chosen_rows.training), **known}
        _finish(run_dir, heads, base, prepare.provenance(cfg, **facts), source, others)
        if how["tracker"] is not None:
            read: dict[str, str] = {kind: ties[kind] for kind in ("rows", "store") if kind in ties}
            tracking.lineage(how["tracker"], read, facts, {name: run_dir / "heads" / name for name in heads})


def _record(base: BaseLM, heads: dict[str, Head]) -> None:
    """What every head answers now. Collective where the base lies in pieces."""
    from draftsmith.exporters import capsule

    for head in heads.values():
        head.golden = capsule.record(head, base)


def rows_for(
    data: DataConfig,
    base: BaseLM,
    labeller: BaseLM | None = None,
    whole: Callable[[], BaseLM] | None = None,
) -> Chosen:
    """The rows to train on and those to measure, made first if they are not there; tells what was left out. labeller:
    the draft model whose drafts the rows are to have labels of. whole: as of supply.rows_of."""
    from draftsmith.data import importing
    from draftsmith.data.funnel import table
    from draftsmith.data.rows import read_folder

    if labeller is not None:
        supply.check_labels(data, base, labeller)
    rows, facts = read_folder(supply.rows_of(data, base, whole), base.spec)
    if facts.get("weights_sha256", base.weights_sha256()) != base.weights_sha256():
        prepare.say(
            f"warning: {data.path}: another base ({facts['base']['path']}) answered these rows; a head learns most"
            " from its own base's answers: distil them again"
        )
    measured = supply.measured_rows(data, base)
    held = read_folder(measured, base.spec)[0] if measured else None
    chosen = importing.choose(rows, data, base.spec, held, facts.get("weights"))
    if chosen.funnel["quarantined"]:
        prepare.say(f"warning: {table(chosen.funnel)} as data.long_rows, repeats and loss_on want them")
    if again := chosen.funnel.get("twins"):
        prepare.say(f"note: {again:,} rows stand there before; data.repeats=drop leaves out those of equal tokens")
    return chosen


def heads_of(cfg: DictConfig) -> dict[str, tuple[type[Head], Any]]:
    """name -> (class, typed config) of every node under `heads`."""
    if not cfg.get("heads"):
        raise ConfigError("head: nothing to train; choose at least one, e.g. head=[medusa]")
    kinds = {str(name): config.target(node, f"heads.{name}") for name, node in cfg.heads.items()}
    from draftsmith.contracts import Head

    for name, kind in kinds.items():
        if not issubclass(kind, Head):
            raise ConfigError(f"heads.{name}._target_: {kind.__name__} is no head")
    return {n: (kind, config.typed(cfg.heads[n], kind.Config, f"heads.{n}")) for n, kind in kinds.items()}


def check_company(chosen: dict[str, tuple[type[Head], Any]], base: prepare.BaseConfig, start_from: Any) -> None:
    """Heads share a base forward only while the base stands still; an adapter is trained with one head alone."""
    adapting = [name for name, (kind, _) in chosen.items() if kind.adapts]
    others = sorted(set(chosen) - set(adapting[:1]))
    if adapting and others:
        raise ConfigError(
            f"head: {adapting[0]} trains an adapter of the base, so {', '.join(others)} cannot share its forward; train"
            " them apart"
        )
    if adapting and base.lora is None:
        raise ConfigError(f"base.lora: {adapting[0]} trains an adapter of the base; give e.g. 'base.lora={{rank: 32}}'")
    if base.lora is not None and not adapting:
        raise ConfigError(
            f"base.lora: {', '.join(chosen)} trains no adapter; choose head=[medusa2], or base.adapter=… for one that"
            " is trained"
        )
    if "base" in chosen:
        raise ConfigError("heads.base: the name is the adapter's; choose another")
    if start_from is not None and not OmegaConf.is_dict(start_from):
        raise ConfigError(f"start_from={start_from}: say which head, as start_from={{medusa: folder}}")
    for name in start_from or {}:
        if name not in chosen:
            raise ConfigError(f"start_from.{name}: no such head is trained; there are {', '.join(chosen)}")


def check_beside(chosen: dict[str, tuple[type[Head], Any]], companion: Any, drafter: str | None) -> None:
    """Whoever stands beside the base is there for somebody."""
    wanted = {kind.wants for kind, _ in chosen.values()}
    if drafter is not None and "drafter" not in wanted:
        raise ConfigError(f"drafter: none of {', '.join(chosen)} judges drafts; leave it out, or train head=acceptance")
    if companion is not None and not wanted - {""}:
        raise ConfigError(f"companion: none of {', '.join(chosen)} looks at a second language model; leave it out")


def _labeller(besides: dict[str, Any], chosen: dict[str, tuple[type[Head], Any]]) -> BaseLM | None:
    """The draft model whose drafts are judged, if that is what is trained; its rows are nobody else's."""
    drafted = {name: hasattr(other, "companion") for name, other in besides.items()}
    judging = [name for name, (kind, own) in chosen.items() if kind.reads_labels(own, drafted[name])]
    others = sorted(set(chosen) - set(judging))
    if judging and others:
        raise ConfigError(
            f"head: {judging[0]} learns from rows with drawn tokens in them, so {', '.join(others)} cannot share its"
            " forward; train them apart"
        )
    return besides[judging[0]].companion if judging else None


def check_groups(given: Iterable[str], trained: Sequence[str]) -> None:
    for name in given:
        if name not in trained:
            raise ConfigError(f"optimizer.heads.{name}: not trained here; there are {', '.join(trained)}")


def start(name: str, head: Head, folder: Path, base: BaseLM) -> None:
    """Gives the head another's weights; ConfigError where they are of other sizes."""
    from draftsmith.exporters import native

    if (folder / "heads").is_dir():
        raise ConfigError(f"start_from.{name}: {folder} is a run; name one of its heads, as {folder}/heads/{name}")
    try:
        trained = native.load(folder, base.spec, device=base.device)
    except DataError as e:
        raise DataError(f"start_from.{name}: {e}") from None
    own, theirs = ({k: tuple(t.shape) for k, t in h.state_dict().items()} for h in (head, trained))
    if own != theirs:
        raise ConfigError(
            f"start_from.{name}: a {type(trained).__name__} with {trained.config}, this one is a {type(head).__name__}"
            f" with {head.config}; give one of the same kind and sizes"
        )
    head.load_state_dict(trained.state_dict())


def _fit(
    base: BaseLM,
    heads: dict[str, Head],
    rows: Chosen,
    data: DataConfig,
    run_dir: Path,
    settings: Settings,
    store: Store | None,
    how: dict[str, Any],
) -> None:
    """store: the rows' captures. how: the rest of fit.fit's arguments."""
    from draftsmith.data.module import RowsModule, Steps
    from draftsmith.exporters import native
    from draftsmith.training import fit

    trainer = settings.trainer
    layout: dict[str, Any] = {
        "length": data.length,
        "batch_size": data.batch_size,
        "accumulate": trainer.accumulate,
        "horizon": max(head.horizon for head in heads.values()),
        "seed": how["seed"],
        "packing": data.packing,
        "one_batch": data.one_batch,
        "store": store,
    }
    weights_N = rows.weights_N
    stream = Steps(rows.training, weights_N=weights_N, world=trainer.devices * trainer.num_nodes, **layout)
    steps = trainer.steps(stream.total(trainer.epochs or 1.0), stream.packs_per_step)
    first = stream.packs(0)
    tokens = int(rows.training.lengths_N[[n for pack in first for n in pack]].sum())
    aside = f" ({len(rows.validation)} more to measure)" if len(rows.validation) else ""
    prepare.say(
        f"{len(rows.training)} rows{aside}, {tokens:,} tokens in {len(first)} packs per epoch"
        f" ({tokens / len(first) / data.length:.0%} full), {steps} steps"
    )
    if len(set(weights_N.tolist())) > 1 or weights_N[0] != 1:
        parts = Counter(zip(rows.training.text("part"), weights_N.tolist(), strict=True))
        weighed = ", ".join(f"{part} {n:,} x {weight:g}" for (part, weight), n in sorted(parts.items()))
        prepare.say(f"rows by weight: {weighed} -> {sum(map(len, first)):,} in the first epoch")
    if steps < FEW_STEPS:
        prepare.say(f"note: {steps} steps teach a head little; more rows, epochs, or a smaller global batch make more")
    fit.rehearse(base, heads, stream[0].to(base.device), trainer.accumulate)
    _record(base, heads)
    lines = steps // trainer.log_every + 1
    learned = base.adapter if fit.learns(base) else None
    processes.by_first(lambda: native.rehearse(run_dir, heads, learned, keep=trainer.keep, lines=lines))

    def serve(start: int, stop: int) -> RowsModule:
        more: dict[str, Any] = {"weights_N": weights_N, "measured": rows.validation, "num_workers": data.num_workers}
        own = None if data.validation.path else store  # rows of another folder are not in the store
        return RowsModule(rows.training, start=start, stop=stop, measured_store=own, **more, **layout)

    every = data.validation.every if len(rows.validation) else None
    fit.fit(base, heads, serve, run_dir=run_dir, steps=steps, settings=settings, validate_every=every, **how)


def _finish(
    run_dir: Path,
    heads: dict[str, Head],
    base: BaseLM,
    facts: dict[str, Any],
    source: str | None,
    others: dict[str, dict[str, Any]],
) -> None:
    """The native exports, provenance.json and, last, the mark that the run is complete."""
    from draftsmith.exporters import native

    training = {name: facts[name] for name in ("rows", "seed", "identity")}
    if base.adapter is not None:
        base.name_adapter()
    room.still(run_dir)
    for name, head in heads.items():
        head.spec = base.spec
        head.said = {"training": training, "beside": others.get(name)}
        native.save(run_dir / "heads" / name, head, name=name, adapter=base.adapter)
    artifacts.write_json(run_dir / "provenance.json", facts)
    artifacts.write_json(run_dir / "COMPLETE.json", {"heads": sorted(heads), "data_sha256": source})
    prepare.say(f"heads -> {run_dir / 'heads'}")


def main() -> None:
    config.command("train", run)


if __name__ == "__main__":
    main()
