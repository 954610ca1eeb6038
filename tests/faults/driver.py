"""One process that answers a job, as small as can be, to be killed: folder of a base, records, where to write.

--die POINT:N ends it, as kill -9 would, the Nth time it comes to that point (see POINTS).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.data import journal
from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import GenerationConfig, Setting, answer_shard
from draftsmith.data.journal import Job, Shard, publish_asked
from draftsmith.data.records import Record
from draftsmith.data.server import ServerConfig, answer_job
from draftsmith.errors import DraftsmithError, PeerError


def die(*_: Any, **__: Any) -> None:
    os._exit(137)


def half_a_line(shard: Shard, entry: dict[str, Any]) -> None:
    """A torn tail, without a newline."""
    shard._file.write(json.dumps(entry)[: len(json.dumps(entry)) // 2].encode())
    die()


def after(function: Callable[..., Any]) -> Callable[..., None]:
    def called(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        die()

    return called


# point -> (whose attribute, its name, what comes in its place)
POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "in the midst of a line": (Shard, "_append", half_a_line),
    "after a line": (Shard, "_append", after(Shard._append)),
    "before a shard": (Shard, "publish", die),
    "refused rows written": (journal, "write_shard", die),
    "shard written, not named": (artifacts, "replace", die),
    "shard named, journal there": (journal, "write_shard", after(journal.write_shard)),
    "shard published": (Shard, "publish", after(Shard.publish)),
    "before the seal": (artifacts, "seal", die),
    "sealed, litter there": (artifacts, "seal", after(artifacts.seal)),
}


def arm(point: str, number: int) -> None:
    owner, name, deadly = POINTS[point]
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return (deadly if calls[0] == number else original)(*args, **kwargs)

    setattr(owner, name, counted)


def setting_of(base: Path, generation: GenerationConfig) -> Setting:
    from transformers import AutoTokenizer

    facts = json.loads((base / "config.json").read_text())
    ends = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    ids = frozenset(ends if isinstance(ends, list) else [ends])
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Setting(tokenizer, ids, facts["max_position_embeddings"], generation, ChatConfig())


def answer_here(job: Job, base: Path, generation: GenerationConfig) -> None:
    from draftsmith.base.lm import load

    lm = load(str(base))
    setting = Setting(lm.tokenizer, lm.eos_ids, lm.spec.max_positions, generation, ChatConfig())
    for shard in job.todo():
        answer_shard(shard, setting, lm.answer, lambda n: None)


def run(args: argparse.Namespace) -> None:
    out, base = Path(args.out), Path(args.base)
    if not (out / journal.ASKED).exists():
        lines = Path(args.records).read_text().splitlines()
        publish_asked(out, [Record(**json.loads(line)) for line in lines], None)
    if args.die:
        point, _, number = args.die.rpartition(":")
        arm(point, int(number))
    server = ServerConfig(**json.loads(args.server))
    generation = GenerationConfig(**json.loads(args.generation), server=server)
    job = Job(out, generation.shard_rows)
    if args.engine == "base":
        answer_here(job, base, generation)
    else:
        answer_job(job, setting_of(base, generation), server, lambda done, failed: None)
    if job.failed:
        raise PeerError(f"{out}: {len(job.failed)} rows failed; the same command asks again")
    assert job.seal()


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser()
    for option in ("out", "base", "records"):
        options.add_argument(f"--{option}", required=True)
    for option, default in (("server", "{}"), ("generation", "{}"), ("engine", "server"), ("die", "")):
        options.add_argument(f"--{option}", default=default)
    return options


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except DraftsmithError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
