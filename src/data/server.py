"""Answers from OpenAI-compatible servers: whole conversations, many at once, spread over the servers that are well.

What becomes of a row:
    settled     its answer is on disk
    refused     it can never be answered: the server will not have it (400, 413, 422), or says nothing or nonsense
                to this row at every attempt while it answers others
    failed      no answer this time, the server's doing; the next run asks again
As long as no row has ever been answered, nothing the server says about rows is believed: a login page, a foreign
tokenizer or an unknown parameter would otherwise refuse them all. Such rows count as failed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from draftsmith import signals
from draftsmith.data.breaker import Breaker, backoff, meaning, retry_after
from draftsmith.data.generate import Conversation, Setting
from draftsmith.data.journal import Item, Job, Shard
from draftsmith.data.openai_api import (
    PATHS,
    Answer,
    NonsenseError,
    PromptError,
    ServerConfig,
    chosen_model,
    is_loopback,
    key_of,
    read_answer,
    request_body,
    said,
)
from draftsmith.errors import ConfigError, DataError, Interrupted, PeerError, RowError

__all__ = ["ServerConfig", "answer_job"]

CONNECT = 10.0  # seconds for a connection; a machine that is gone does not refuse, it is silent
PROBE = 10.0  # seconds for GET /models
TICK = 0.05  # seconds between looks at what may be sent
Told = Callable[[int, int], None]


def answer_job(job: Job, setting: Setting, config: ServerConfig, told: Told) -> None:
    """Asks for every row of this process that is missing, publishes the shards that get full, and writes
    job.failed where rows got no answer. told(done, failed): rows of this process's unpublished shards that are
    settled or refused, an earlier run's included once their shard is opened, and rows failed so far.

    ConfigError: key, address or model are wrong, or the model is not the one that the job's other rows come from;
    before any row. PeerError: no server is there, or one says 401,
    403, 404 or the like, at once. DataError: the server's chat template is not the base's. Interrupted: SIGTERM,
    SIGINT or SIGUSR1. Whatever happens, the rows that are settled stay.
    """
    key = key_of(config)
    asyncio.run(_Run(job, setting, config, told, key).run())


class _FailedError(Exception):
    """This row gets no answer in this run."""


class _Server:
    """One address: its HTTP client, its health, how busy it is, how it calls the model."""

    def __init__(self, url: str, config: ServerConfig, key: str | None) -> None:
        import httpx

        self.url, self.config, self.key = url.rstrip("/"), config, key
        self.breaker = Breaker(config.breaker, config.backoff, config.backoff_limit)
        self.busy, self.throttles = 0, 0
        self.model: str | None = None
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.timeout, connect=min(CONNECT, config.timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
            follow_redirects=False,
            trust_env=not is_loopback(url),  # a proxy from the environment does not reach this very machine
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def probe(self) -> bool:
        """Whether it lists its models; remembers ours. PeerError and ConfigError if it will never do."""
        status, _, body = await self._request("GET", "/models", None, min(PROBE, self.config.timeout))
        if status is None or meaning(status) == "down" or status == 429:
            return False
        if meaning(status) != "ok":
            raise self.stop(status)
        models = body.get("data") if isinstance(body, dict) else None
        if not isinstance(models, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in models
        ):
            return False
        self.model = chosen_model(self.config.model, [m["id"] for m in models], self.url)
        return True

    async def ask(self, body: dict[str, Any]) -> tuple[str, float | None, Any]:
        """(meaning, seconds to wait if it says so, the answer's JSON or what went wrong)."""
        status, wait, answer = await self._request("POST", PATHS[self.config.api], body, self.config.timeout)
        if status is None:
            return "down", None, answer
        what = meaning(status, wait)
        if what == "stop":
            raise self.stop(status)
        if what == "ok":
            return "ok", None, answer
        return what, wait, f"{status} {said(answer, self.key)}"

    def stop(self, status: int) -> PeerError:
        """What a person has to look at. Nothing that the server said: it may quote the key."""
        cures = {
            401: "check the key; api_key_env names the variable that holds it",
            403: "this key may not do that",
            404: "nothing is there; an address ends with /v1, and server.api names what it offers",
        }
        cure = "it redirects; give the final address" if 300 <= status < 400 else cures.get(status, "not understood")
        return PeerError(f"{self.url}: {status}: {cure}")

    async def _request(self, verb: str, path: str, body: Any, seconds: float) -> tuple[int | None, float | None, Any]:
        """(status or None, Retry-After in seconds, JSON; bytes where a 200 is none, or what went wrong)."""
        import httpx

        try:
            async with asyncio.timeout(seconds):  # httpx counts from byte to byte: a slow drip would never end
                response = await self._client.request(verb, self.url + path, json=body)
        except TimeoutError:
            return None, None, f"no answer within {seconds:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            return None, None, said(f"{type(e).__name__} {e}", self.key)
        try:
            value = response.json()
        except (ValueError, RecursionError):
            value = response.content
        return response.status_code, retry_after(response.headers.get("retry-after"), time.time()), value


class _Run:
    """One call of answer_job."""

    def __init__(self, job: Job, setting: Setting, config: ServerConfig, told: Told, key: str | None) -> None:
        self.job, self.setting, self.config, self.told, self.key = job, setting, config, told, key
        self.servers = [_Server(url, config, key) for url in config.urls]
        self.writer = ThreadPoolExecutor(1, "journal")  # fdatasync must not hold up the answers
        self.syncing: asyncio.Future[None] | None = None
        self.dirty: set[int] = set()  # shards that the writer has yet to sync; the writer's alone
        self.opened: list[Shard] = []
        self.unfinished: dict[int, int] = {}  # shard number -> rows of it that are still being asked
        self.done = 0
        self.model: str | None = None  # what the job is bound to
        self.believed = False  # whether any row was ever answered
        self.same_prompt = False  # whether a server ever confirmed our prompt ids
        self.doubtful: list[tuple[Shard, str, RowError]] = []  # refusals, until there is reason to believe them
        self.gave_up: str | None = None

    async def run(self) -> None:
        stopped = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []
        try:
            with signals.in_loop(stopped.set):
                waiting = asyncio.create_task(stopped.wait())
                tasks = [asyncio.create_task(self._all())]
                await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if stopped.is_set() and not tasks[0].done():
                    raise Interrupted("stopped by a signal; what is answered is kept, the same command goes on")
                await tasks[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.writer.shutdown(wait=True)
            for shard in self.opened:
                shard.close()
            await asyncio.gather(*(server.close() for server in self.servers), return_exceptions=True)
            self.job.tell_failed()

    async def _all(self) -> None:
        missing = self._missing()
        first = next(missing, None)
        self.told(self.done, 0)
        if first is None:
            return
        await self._meet()
        rows = (row for part in ([first], missing) for row in part)
        tasks = [asyncio.create_task(self._work(rows)) for _ in range(self.config.concurrency)]
        watch = [asyncio.create_task(self._watch(server)) for server in self.servers]
        try:
            todo = {*tasks, *watch}
            while not all(task.done() for task in tasks):
                done, todo = await asyncio.wait(todo, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (*tasks, *watch):
                task.cancel()
            await asyncio.gather(*tasks, *watch, return_exceptions=True)
        for shard, key, why in self.doubtful:
            await self._over(shard, key, f"nothing was ever answered; of this row the server says: {why.detail}")

    def _missing(self) -> Iterator[tuple[Shard, Item]]:
        """Rows to ask for, shard after shard, each shard opened when its first row is wanted."""
        self.believed = any(s.path.exists() for s in self.job.shards)
        for shard in self.job.todo():
            self.opened.append(shard)
            missing = shard.missing
            self.done += len(shard.items) - len(missing)
            self.believed = self.believed or bool(shard.rows)
            self.unfinished[shard.number] = len(missing)
            if not missing:
                shard.publish()
            for item in missing:
                yield shard, item

    async def _meet(self) -> None:
        """Waits until a server lists its models. The others join when they do."""
        began = time.monotonic()
        for tries in range(1, 1_000_000):
            for server, well in zip(
                self.servers, await asyncio.gather(*(s.probe() for s in self.servers)), strict=True
            ):
                if not well:
                    server.breaker.open()
            self._one_model()
            if any(server.model is not None for server in self.servers):
                return
            left = self.config.patience - (time.monotonic() - began)
            if left <= 0:
                urls = ", ".join(server.url for server in self.servers)
                raise PeerError(f"{urls}: no server answered GET /models within {self.config.patience:g} s")
            await asyncio.sleep(min(left, backoff(tries, self.config.backoff, self.config.backoff_limit)))

    def _one_model(self) -> None:
        """One name for all servers and runs; a server that was started again may have come back with another."""
        models = {s.model for s in self.servers if s.model is not None}
        if len(models) > 1:
            raise ConfigError(f"server.model: the servers serve {' and '.join(sorted(models))}; give one")
        if models and models != {self.model}:
            self.model = models.pop()
            self.job.bind("model", self.model)

    async def _watch(self, server: _Server) -> None:
        """Probes a server whose breaker is open."""
        while True:
            if server.breaker.probe_due():
                server.breaker.probed(await server.probe())
                self._one_model()
            await asyncio.sleep(TICK)

    async def _work(self, rows: Iterator[tuple[Shard, Item]]) -> None:
        for shard, (key, record) in rows:
            if self.gave_up is not None:
                await self._over(shard, key, self.gave_up)
                continue
            asked = False
            try:
                c = Conversation(key, record, self.setting)
                while (ids := c.ask()) is not None:
                    asked = True
                    try:
                        answer = await self._answer(c, ids)
                    except RowError as why:
                        c.give_up(why)
                    else:
                        c.answer(answer.ids, cut=answer.cut)
                        self.believed = True
            except _FailedError as why:
                await self._over(shard, key, str(why))
            except RowError as why:
                if asked and not self.believed:
                    self.doubtful.append((shard, key, why))
                else:
                    await self._over(shard, key, why)
            else:
                await self._over(shard, key, c)
            while self.believed and self.doubtful:
                await self._over(*self.doubtful.pop())

    async def _over(self, shard: Shard, key: str, end: Conversation | RowError | str) -> None:
        """A row's end: rows, a refusal, or why it failed. On disk when this returns."""

        def write() -> None:
            if isinstance(end, RowError):
                shard.refuse(key, end)
            elif isinstance(end, Conversation):
                shard.settle(key, end.rows())
            self.dirty.add(shard.number)
            self.unfinished[shard.number] -= 1
            if not shard.left:
                shard.publish()
            elif not self.unfinished[shard.number]:
                shard.close()

        if isinstance(end, str):
            self.job.fail(key, end)
        else:
            self.done += 1
        await asyncio.get_running_loop().run_in_executor(self.writer, write)
        await self._synced()
        self.told(self.done, len(self.job.failed))

    async def _synced(self) -> None:
        """Waits for the disk; all rows that wait at once share one call. (The writer is one thread: what was written
        before this sync was queued, or before it began, is covered by it.)"""
        if self.syncing is None:
            self.syncing = asyncio.get_running_loop().run_in_executor(self.writer, self._sync)
        await self.syncing

    def _sync(self) -> None:
        self.syncing = None
        dirty, self.dirty = self.dirty, set()
        for number in dirty:
            self.job.shards[number].sync()

    async def _answer(self, c: Conversation, ids: list[int]) -> Answer:
        """The base's next words. RowError: this row will never get any; _FailedError: not in this run."""
        kinds: list[str] = []
        while True:
            server = await self._free()
            assert server.model is not None
            server.breaker.sent()
            server.busy += 1
            try:
                what, wait, got = await server.ask(request_body(c, ids, server.model, self.config.api))
            finally:
                server.busy -= 1
            if what == "busy":
                self._pause(server, wait)
                continue
            if what == "ok":
                try:
                    return self._read(server, c, ids, got)
                except NonsenseError as e:
                    what, got = e.kind, said(str(e), self.key)
            server.breaker.failed() if what in ("down", "nonsense") else server.breaker.answered()
            if what == "refused":
                raise RowError(c.record.where, "refused", got)
            kinds.append(what)
            if len(kinds) >= self.config.attempts:
                odd = {"nonsense", "ids"} >= set(kinds) and server.breaker.state == "closed"
                raise RowError(c.record.where, what, got) if odd else _FailedError(f"{server.url}: {got}")
            await asyncio.sleep(backoff(len(kinds), self.config.backoff, self.config.backoff_limit))

    def _read(self, server: _Server, c: Conversation, ids: list[int], got: Any) -> Answer:
        try:
            answer = read_answer(got, ids, self.setting, c.record.where)
        except PromptError as e:
            server.breaker.answered()
            if self.same_prompt or c.turn:
                raise RowError(c.record.where, "unverified", str(e)) from None
            cure = "its chat template differs from the base's" if self.config.api == "chat" else "it changes prompts"
            raise DataError(f"{server.url}: {c.record.where}: {cure}: {e}; serve the base that `base` names") from None
        server.breaker.answered()
        server.throttles = 0
        self.same_prompt = True
        return answer

    def _pause(self, server: _Server, wait: float | None) -> None:
        """429: everybody waits, nobody's attempts are used up. A pause is at most `patience` long."""
        server.throttles += 1
        jitter = backoff(server.throttles, self.config.backoff, self.config.backoff_limit, random.random)
        server.breaker.throttled(min(jitter if wait is None else wait, self.config.patience))

    async def _free(self) -> _Server:
        """The least busy server that may be asked. _FailedError once all have been in trouble beyond patience."""
        while self.gave_up is None:
            if all(s.breaker.troubled() > self.config.patience for s in self.servers):
                urls = ", ".join(s.url for s in self.servers)
                self.gave_up = f"{urls}: no answer for {self.config.patience:g} s"
                break
            free = [s for s in self.servers if s.model is not None and s.breaker.admits()]
            if free:
                return min(free, key=lambda s: s.busy)
            await asyncio.sleep(TICK * (0.5 + random.random()))
        raise _FailedError(self.gave_up)
