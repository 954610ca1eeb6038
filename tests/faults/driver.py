"""One process that answers a job, as small as can be, to be killed: folder of a base, records, where to write.

--tear N ends it with the Nth line half-written; FAULT=<point>:<n> at a point of src/faults.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from draftsmith import faults
from draftsmith.data import journal
from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import GenerationConfig, Setting, answer_shard
from draftsmith.data.journal import Job, Shard, publish_asked
from draftsmith.data.records import Record
from draftsmith.data.server import ServerConfig, answer_job
from draftsmith.errors import DraftsmithError, PeerError


def tear(number: int) -> None:
    """The number-th line of a journal is written by half, and the process dies: what a power cut leaves."""
    append, calls = Shard._append, [0]

    def torn(shard: Shard, entry: dict[str, Any]) -> None:
        calls[0] += 1
        if calls[0] < number:
            return append(shard, entry)
        line = json.dumps(entry)
        shard._file.write(line[: len(line) // 2].encode())
        os._exit(faults.KILLED)

    Shard._append = torn  # type: ignore[method-assign]


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
    if args.tear:
        tear(args.tear)
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
    for option, default in (("server", "{}"), ("generation", "{}"), ("engine", "server")):
        options.add_argument(f"--{option}", default=default)
    options.add_argument("--tear", type=int, default=0)
    return options


if __name__ == "__main__":
    try:
        run(parser().parse_args())
    except DraftsmithError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
