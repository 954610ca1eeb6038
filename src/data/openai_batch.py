"""The same conversations without a server at hand: OpenAI Batch files, one round per turn.

    round-0000.in.jsonl    what to ask: written by us, for `vllm run-batch -i … -o …` or any runner of such files
    round-0000.out.jsonl   its answers, put there by whoever ran it
    round-0001.in.jsonl    what is still to be asked: the next turns, and what failed before

Nothing else is remembered: all rounds are replayed from the first, so the files are the state, and kill -9 at any
moment costs nothing. vLLM's runner (0.32) knows /v1/chat/completions only, so use api=chat with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.data.breaker import meaning
from draftsmith.data.generate import Conversation, Setting
from draftsmith.data.journal import Job, write_lines
from draftsmith.data.openai_api import PATHS, NonsenseError, PromptError, ServerConfig, read_answer, request_body, said
from draftsmith.errors import ConfigError, DataError, PeerError, RowError


def exchange(job: Job, setting: Setting, config: ServerConfig, folder: Path) -> Path | None:
    """Takes in the answers that lie in `folder` and returns the file of what to ask next; None when this process
    has no row left to ask for, its shards being published then.

    Rows that failed are asked again in the next round; after config.attempts failures in a row they are left in
    job.failed and the next round goes without them; where no other rows are left, all of them are asked afresh.
    config.model null leaves the name out, which vLLM's runner takes for its own. A round, once written, is never
    touched again. PeerError if a whole round was refused; DataError if the files are not of this job; ConfigError
    if other processes share the job, or it was begun with another model.
    """
    if job.world > 1:
        raise ConfigError("data.generation.engine=batch: one process writes the rounds; start it alone")
    job.bind("model", config.model or "")
    try:
        return _exchange(_Batch(job, setting, config), folder)
    finally:
        for shard in job.shards:
            shard.close()


def _exchange(batch: _Batch, folder: Path) -> Path | None:
    with artifacts.disk(folder, "batch files"):
        folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while (folder / _name(number, "out")).exists():
        if not (folder / _name(number, "in")).exists():
            raise DataError(f"{folder / _name(number, 'out')}: answers to a round that was never asked; take it away")
        batch.take(folder / _name(number, "in"), folder / _name(number, "out"))
        number += 1
    batch.settle()
    batch.job.tell_failed()
    path = folder / _name(number, "in")
    if not batch.open:
        return None
    if not path.exists():  # asked once, a round stays as it is: it may be under way
        write_lines(path, batch.requests())
    return path


def _name(number: int, side: str) -> str:
    return f"round-{number:04d}.{side}.jsonl"


class _Batch:
    """The conversations of this process as far as the rounds tell them. over: those that ended, and how. heard:
    whether any row was ever answered; before that, no refusal is believed."""

    def __init__(self, job: Job, setting: Setting, config: ServerConfig) -> None:
        self.job, self.setting, self.config = job, setting, config
        self.secret = os.environ.get(config.api_key_env or "", "").strip() or None  # the runner's, if anybody's
        self.shards = list(job.todo())
        self.open: dict[str, Conversation] = {}
        self.over: dict[str, Conversation | RowError] = {}
        self.failures: dict[str, int] = {}
        self.heard = any(s.path.exists() for s in job.shards) or any(s.rows for s in self.shards)
        for key, record in (item for shard in self.shards for item in shard.missing):
            try:
                self.open[key] = Conversation(key, record, setting)
                self._go_on(key)
            except RowError as why:
                self._end(key, why)

    def requests(self) -> Iterator[dict[str, Any]]:
        """The next round: a line per open conversation, those given up left out as long as there are others."""
        fresh = {key for key in self.open if self.failures.get(key, 0) < self.config.attempts}
        for key, c in self.open.items():
            if key in fresh or not fresh:
                body = request_body(c, c.ask() or [], self.config.model, self.config.api)
                name, url = f"{key}#{c.turn}", f"/v1{PATHS[self.config.api]}"
                yield {"custom_id": name, "method": "POST", "url": url, "body": body}

    def take(self, asked: Path, answered: Path) -> None:
        """Replays one round. What the file says of rows that are settled already is passed over."""
        wanted, found = (
            {line["custom_id"]: line for line in _lines(side) if isinstance(line.get("custom_id"), str)}
            for side in (asked, answered)
        )
        known = wanted.keys() & found.keys()
        if found and not known:
            raise DataError(
                f"{answered}: none of its custom_ids was asked in {asked.name}; it answers another file: take it away"
            )
        refusals: dict[str, RowError] = {}
        for name in sorted(known):
            key, _, turn = name.rpartition("#")
            c = self.open.get(key)
            if c is None or str(c.turn) != turn:
                continue
            try:
                self._hear(c, found[name])
            except RowError as why:
                refusals[key] = why
            except (NonsenseError, _FailedError) as why:
                self._failed(key, self._said(str(why)))
        for name in wanted.keys() - known:
            self._failed(name.rpartition("#")[0], "the batch holds no answer")
        if refusals and not self.heard:
            first = next(iter(refusals.values()))
            raise PeerError(f"{answered}: every row was refused ({first}); take the file away and run the round again")
        for key, refusal in refusals.items():
            self._refused(key, refusal)

    def settle(self) -> None:
        """What is over goes into the journals; full shards are published."""
        for shard in self.shards:
            for key, _ in shard.missing:
                end = self.over.get(key)
                if isinstance(end, RowError):
                    shard.refuse(key, end)
                elif end is not None:
                    shard.settle(key, end.rows())
            if not shard.missing:
                shard.publish()
            shard.close()
        for key in self.open:
            if self.failures.get(key, 0) >= self.config.attempts and key not in self.job.failed:
                self.job.fail(key, f"{self.failures[key]} rounds without an answer")

    def _hear(self, c: Conversation, line: dict[str, Any]) -> None:
        """Applies one line. RowError: this row will never be answered."""
        response, error = line.get("response"), line.get("error")
        status = response.get("status_code") if isinstance(response, dict) else None
        body = response.get("body") if isinstance(response, dict) else None
        if not isinstance(status, int) or (error and meaning(status) == "ok"):
            raise _FailedError(self._said(error or "no response"))
        if isinstance(error, str) and meaning(status) == "refused":  # vLLM's runner itself, not the model's server
            raise _FailedError(self._said(error))
        if meaning(status) == "refused":
            raise RowError(c.record.where, "refused", f"{status} {self._said(error or body)}")
        if meaning(status) != "ok":
            raise _FailedError(f"{status} {self._said(error or body)}")
        try:
            answer = read_answer(body, c.ask() or [], self.setting, c.record.where)
        except PromptError as e:
            if self.heard or c.turn:
                raise RowError(c.record.where, "unverified", str(e)) from None
            raise DataError(f"{c.record.where}: the runner's chat template differs from the base's: {e}") from None
        c.answer(answer.ids, cut=answer.cut)
        self.failures.pop(c.key, None)
        self.job.failed.pop(c.key, None)
        self.heard = True
        self._go_on(c.key)

    def _said(self, value: Any) -> str:
        return said(value, self.secret)

    def _failed(self, key: str, why: str) -> None:
        if key in self.open:
            self.failures[key] = self.failures.get(key, 0) + 1
            self.job.fail(key, why)

    def _refused(self, key: str, why: RowError) -> None:
        try:
            self.open[key].give_up(why)
        except RowError:
            self._end(key, why)
        else:
            self._go_on(key)

    def _go_on(self, key: str) -> None:
        """Opens the next turn, or ends the conversation."""
        if self.open[key].ask() is None:
            self._end(key, self.open[key])

    def _end(self, key: str, end: Conversation | RowError) -> None:
        self.open.pop(key, None)
        self.failures.pop(key, None)
        self.job.failed.pop(key, None)
        self.over[key] = end


class _FailedError(Exception):
    """No answer this time."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file; what is torn is passed over, so that its row is asked again."""
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
