"""Where a run's rows come from: prompts that the base answers, sources that are encoded, folders of rows as they
are. What has to be made is made once, under its fingerprint, and kept.
"""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from draftsmith import artifacts, prepare, room, signals
from draftsmith.data import funnel, journal, sources
from draftsmith.data.prompts import PromptsConfig, make_up
from draftsmith.data.records import Record
from draftsmith.data.settings import DataConfig
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError, DataError, Interrupted, PeerError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.base.outlines import Outline
    from draftsmith.data.generate import Setting

START = 120.0  # seconds that a process waits for the first one to begin


def is_rows(path: str | Path | None) -> bool:
    """Whether this is a published folder of rows."""
    return bool(path) and sources.published_as(Path(str(path))) == "rows"


def is_store(path: str | Path | None) -> bool:
    """Whether this is a published store."""
    return bool(path) and sources.published_as(Path(str(path))) == "store"


def check_labels(data: DataConfig, base: BaseLM, companion: BaseLM) -> None:
    """DataError unless data.path, and data.validation.path if given, are folders of acceptance labels of this base and
    this companion, and nothing else is learned; random rows may have random labels."""
    from draftsmith.data.labels import PLAN, identity

    if data.random is not None and data.random.labels:
        return

    if data.loss_on == "all":
        raise ConfigError("data.loss_on=all: labels say themselves which tokens are learned; leave it at assistant")
    for key, path in (("data.path", data.path), ("data.validation.path", data.validation.path)):
        if path is None and key != "data.path":
            continue
        folder = Path(str(path))
        if path is None or sources.published_as(folder) != "labels":
            raise DataError(
                f"{key}: {path} holds no labels; beside a draft model a gate that learns sampling reads what draftsmith"
                " label writes"
            )
        facts, plan = artifacts.read_object(folder / artifacts.MANIFEST), artifacts.read_object(folder / PLAN)
        for name in ("labels", "base", "companion"):
            if not isinstance(facts.get(name), dict):
                raise DataError(f"{folder / artifacts.MANIFEST}: tells no {name}; it is damaged; label again")
        if facts["labels"].get("kind") != "acceptance":
            raise DataError(f"{folder}: labels of kind {facts['labels'].get('kind')}; a gate wants acceptance")
        for name, now in (("base", base), ("companion", companion)):
            if plan.get(name) != identity(now.spec, now.weights_sha256()):
                made = facts.get(name, {}).get("path")
                raise DataError(
                    f"{folder}: its labels were made with another {name} ({made}), or in another dtype; label again"
                    " with this one"
                )


def check(data: DataConfig, *, labels: bool = False) -> None:
    """DataError for local sources that are not there or are something else, before anything is loaded."""
    own = SourceConfig(path=data.validation.path) if data.validation.path else None
    for source in [*data.chosen.values(), *([own] if own else [])]:
        if source.path and (Path(source.path) / journal.ASKED).is_dir() and not is_rows(source.path):
            raise DataError(f"{source.path}: its rows are not complete; start that draftsmith distill again first")
        begun = source.path and ((Path(source.path) / "rows").is_dir() and (Path(source.path) / "plan.json").exists())
        if source.path and (begun or any(Path(source.path).glob("captures-*"))) and not is_store(source.path):
            raise DataError(f"{source.path}: its captures are not complete; start that draftsmith capture again first")
        sources.check(source, labels=labels)
    if data.stored and not is_store(data.path):
        raise DataError(f"data.path={data.path}: no store; draftsmith capture writes one, data=jsonl reads rows")


def content(data: DataConfig) -> dict[str, str | None]:
    """source -> hash of what it holds."""
    told = {name: _content(source) for name, source in data.chosen.items()}
    if data.validation.path:
        told["validation"] = _content(SourceConfig(path=data.validation.path))
    return told


def _content(source: SourceConfig) -> str | None:
    ours = is_rows(source.path) or is_store(source.path)
    return prepare.content_sha256(source.path) if ours else sources.content_sha256(source)


def collect(prompts: PromptsConfig, exclude: frozenset[str] = frozenset()) -> list[Record]:
    """The prompts of a configuration, strictly; made-up ones avoid the user turns in `exclude`."""
    if not prompts.chosen:
        return make_up(prompts, exclude)
    refused = Path(os.devnull)
    with funnel.Funnel(refused) as counted:
        found = list(funnel.intake(prompts.chosen, counted))
        if counted.first is not None:
            raise DataError(f"{counted.first}; {funnel.table(counted.facts)}")
    return found


def asked_of(data: DataConfig) -> list[Record] | None:
    """What was asked for a run's rows; None where its folder does not say."""
    if data.prompts is not None and data.prompts.made_up:
        return make_up(data.prompts)
    if data.path and (is_rows(data.path) or is_store(data.path)):
        folder = Path(data.path) / ("rows" if is_store(data.path) else "")
        return [r for _, r in journal.read_asked(folder)] if (folder / journal.ASKED).is_dir() else None
    try:
        with funnel.Funnel(Path(os.devnull)) as counted:
            return list(funnel.intake(data.chosen, counted))
    except DataError:  # the sources have moved since
        return None


def rows_of(data: DataConfig, base: BaseLM, whole: Callable[[], BaseLM] | None = None) -> Path:
    """The folder of rows (or labels, where `check` let them pass) that this configuration means, made first if it is
    not there. whole: loads the base that answers, where this one lies in pieces."""
    if data.path and sources.published_as(Path(data.path)) in ("rows", "labels"):
        return Path(data.path)
    if is_store(data.path):
        return Path(str(data.path)) / "rows"
    key = {
        "base": {k: v for k, v in dataclasses.asdict(base.spec).items() if k != "path"},
        "content": content(data),
        "prompts": dataclasses.asdict(data.prompts) if data.prompts else None,
        "chat": dataclasses.asdict(data.chat),
        "on_bad": data.on_bad,
        "code": [prepare.source_sha256(name) for name in _makers()],
    }
    if data.random is not None:
        from draftsmith.data import random_rows
        from draftsmith.data.rows import write_rows

        key |= {"random": {**dataclasses.asdict(data.random), "length": data.length}}
        made = random_rows.made_up(data.random, data.length, base.spec.vocab_size)

        def make(target: Path) -> None:
            write_rows(target, made, base=dataclasses.asdict(base.spec))
    elif data.prompts is not None:
        key |= {"weights": base.weights_sha256(), "generation": facts_of(data)["generation"]}

        def make(target: Path) -> None:
            answer(data, whole() if whole else base, target)
    else:
        key |= {"loss_on": data.loss_on}

        def make(target: Path) -> None:
            _import(data, base, target)

    return prepare.once(prepare.cache_dir() / "rows" / artifacts.fingerprint(key)[:16], make)


def _makers() -> list[str]:
    """The modules whose code decides what rows hold."""
    import draftsmith.data

    found = pkgutil.iter_modules(draftsmith.data.__path__, "draftsmith.data.")
    return ["draftsmith.base.answering", *sorted(module.name for module in found)]


def measured_rows(data: DataConfig, base: BaseLM) -> Path | None:
    """The folder of rows of data.validation.path, made first if it is another source."""
    if data.validation.path is None:
        return None
    return rows_of(dataclasses.replace(data, path=data.validation.path, sources={}, prompts=None, random=None), base)


def _import(data: DataConfig, base: BaseLM, target: Path) -> None:
    from draftsmith.data import importing

    facts = {"base": dataclasses.asdict(base.spec), "source": content(data), "chat": dataclasses.asdict(data.chat)}
    told = importing.import_rows(target, data.chosen, data, base, facts)
    where = f"; see {target / journal.QUARANTINE}" if told["quarantined"] else ""
    prepare.say(f"read {told['in']:,} rows: {funnel.table(told)}{where}")


def facts_of(data: DataConfig, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
    """What rows were asked for, as their manifest tells it. (Batch size, urls and paths may change.) recorded: of a
    job that has begun; if its sources are gone, they are taken to be what they were."""
    assert data.prompts is not None
    made_up = {k: getattr(data.prompts, k) for k in ("synthetic", "seed", "text")}
    generation = dataclasses.asdict(data.generation)
    server = generation.pop("server")
    generation.pop("batch_size")
    if data.generation.engine != "base":
        generation |= {"model": server["model"], "api": server["api"]}
    try:
        held: dict[str, Any] = content(data)
    except DataError:
        if recorded is None:
            raise
        held = recorded["source"]["content"]
    return {
        "source": {**made_up, "content": held},
        "generation": generation,
        "chat": dataclasses.asdict(data.chat),
    }


def answer(
    data: DataConfig,
    base: BaseLM | Outline,
    out: Path,
    *,
    rank: int = 0,
    world: int = 1,
) -> bool:
    """Lets the base answer every prompt, this process its part of them, and publishes the rows in `out` once all
    are there; a second call goes on where the first one stopped. True once the folder is complete.

    PeerError if rows failed, Interrupted after a signal or while batch files wait for their answers.
    """
    from draftsmith.data.generate import Setting

    facts = _ask(data, base, out, rank)
    if not rank:  # whatever they are answered, the rows say again what was asked
        room.ready(out, "out", (out / journal.ASKED / journal.RECORDS).stat().st_size)
    setting = Setting(base.tokenizer, base.eos_ids, base.spec.max_positions, data.generation, data.chat)
    job = journal.Job(out, data.generation.shard_rows, rank=rank, world=world)
    _engine(job, setting, base, out)
    listed = job.tell_failed()
    if job.failed:
        raise PeerError(f"{len(job.failed)} rows failed, see {listed}; the same command asks for them again")
    if not job.seal(**facts):
        prepare.say(f"{out}: this process's rows are done; others are at work")
        return False
    made = artifacts.read_json(out / artifacts.MANIFEST)
    told = made["funnel"]
    prepare.say(f"{made['rows']:,} rows, {made['learned']:,} tokens of the base's own; {funnel.table(told)} -> {out}")
    return True


def _ask(data: DataConfig, base: BaseLM | Outline, out: Path, rank: int) -> dict[str, Any]:
    """What the job is: out/asked, written by the first process from the sources, which are not looked at again; the
    others wait for it. ConfigError if it was begun with another base."""
    asked = out / journal.ASKED
    _wait(out, rank)
    if not artifacts.is_complete(asked):
        facts = {"base": dataclasses.asdict(base.spec), **_weights(data, base), **facts_of(data)}
        _publish_asked(data, out, facts)
    told = artifacts.read_json(asked / artifacts.MANIFEST)
    recorded = {k: v for k, v in told.items() if k not in ("kind", "schema", "files")}
    check_base(recorded, base, out)
    return recorded


def check_base(recorded: dict[str, Any], base: BaseLM | Outline, out: Path) -> None:
    """ConfigError if another base than this one answers, or answered, the rows of `out`, wherever it lies."""
    now = dataclasses.asdict(base.spec)
    changed = [k for k, v in recorded["base"].items() if k not in ("path", "revision") and now.get(k) != v]
    if "weights_sha256" in recorded and recorded["weights_sha256"] != cast("BaseLM", base).weights_sha256():
        changed.append("weights_sha256")
    if changed:
        raise ConfigError(f"out: {out} holds rows of another base ({', '.join(changed)} differ); choose another folder")


def _weights(data: DataConfig, base: BaseLM | Outline) -> dict[str, str]:
    """The hash of the weights that answer; nobody knows those of a server."""
    return {"weights_sha256": cast("BaseLM", base).weights_sha256()} if data.generation.engine == "base" else {}


def _wait(out: Path, rank: int) -> None:
    """Until the first process has written out/asked; PeerError if it is not there, or ends without."""
    began, seen = time.monotonic(), False
    while rank and not artifacts.is_complete(out / journal.ASKED):
        held = prepare.is_held(out)
        if not held and (seen or time.monotonic() - began > START):
            if artifacts.is_complete(out / journal.ASKED):
                return
            raise PeerError(f"{out}: the first process {'ended' if seen else 'did not start'}; see what it said")
        seen = seen or held
        time.sleep(0.2)


def _publish_asked(data: DataConfig, out: Path, facts: dict[str, Any]) -> None:
    assert data.prompts is not None
    if not data.prompts.chosen:
        return journal.publish_asked(out, make_up(data.prompts), None, **facts)
    weights = {name: source.weight for name, source in data.prompts.chosen.items()}
    with funnel.Funnel(out.with_name(f"{out.name}.quarantine.jsonl")) as counted:
        records = list(funnel.intake(data.prompts.chosen, counted))
        counted.settle(data.on_bad, data.prompts.chosen)
        counted.flush()
        journal.publish_asked(out, records, counted.path, weights=weights, **facts)
    return counted.path.unlink()


def _engine(job: journal.Job, setting: Setting, base: Any, out: Path) -> None:
    engine, config = setting.generation.engine, setting.generation.server
    open_items = sum(len(s.items) for s in job.shards[job.rank :: job.world] if not s.path.exists())
    if open_items:
        prepare.say(f"the base answers {open_items:,} prompts")
    if engine == "base":
        from draftsmith.data.generate import answer_shard

        with _progress(open_items) as told:
            for shard in job.todo():
                answer_shard(shard, setting, base.answer, told)
    elif engine == "server":
        from draftsmith.data.server import answer_job

        answer_job(job, setting, config, _tell_every(open_items))
    else:
        from draftsmith.data.openai_batch import exchange

        waiting = exchange(job, setting, config, out / "batches")
        if waiting is not None:
            done = waiting.with_name(waiting.name.replace(".in.", ".out."))
            raise Interrupted(
                f"{waiting} waits for its answers: vllm run-batch -i {waiting} -o {done} --model"
                f" {config.model or base.spec.path}; then the same command goes on"
            )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Tells at every tenth; a signal stops the work at the next batch's edge, journaled."""
    done, tell = 0, _tell_every(total)
    with signals.noted() as asked:

        def told(n: int) -> None:
            nonlocal done
            done += n
            tell(done, 0)
            if asked:
                raise Interrupted(f"stopped by a signal after {done} of {total} prompts; the same command resumes")

        yield told


def _tell_every(total: int) -> Callable[[int, int], None]:
    """A line at every tenth of the work."""
    last, began = [0], time.perf_counter()

    def tell(done: int, failed: int) -> None:
        tenth = 10 * (done + failed) // max(1, total)
        if tenth > last[0] and done + failed < total:
            last[0] = tenth
            rate = (done + failed) / max(1e-9, time.perf_counter() - began)
            left = (total - done - failed) / max(1e-9, rate)
            lost = f", {failed} failed" if failed else ""
            prepare.say(f"{done:,} of {total:,} prompts answered{lost}  {rate:.1f}/s  {left:.0f} s left")

    return tell
