"""An OpenAI-compatible server on this machine that misbehaves as told: a small base behind http.server.

    python loopback.py --base FOLDER --port 0 --told FILE --script '{"rules": [{"fault": "500", "p": 0.1}]}'

It answers one request at a time through the project's own engine, so that no answer depends on its neighbours.
Without a base, answers are made from a hash of the prompt. --told gets the port once it listens.

A script: {"rules": [...], "seed": 0, "key": null, "model": "tiny", "ids": true}. A rule is a fault with either
"p" (a chance per request) or "at" (which requests, counted from 0) or "from" and "to"; the first that matches
counts. Faults: a status ("500", "429" with "retry_after", "400", "401", "302" …), "slow" ("seconds", or
heavy-tailed around "mean"), "drip" (a byte now and then), "reset", "empty", "length", "bad_json", "html",
"no_choices", "abort", "few_ids", "foreign_prompt", "text_plain", "die" (refuses connections for "seconds").
"only": a text that the prompt has to contain. "ids": false is a server that returns text alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class HashEngine:
    """Answers that follow from the prompt's ids alone; `lively` ids, then the eos or the limit."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos_ids = tokenizer, {tokenizer.eos_token_id}

    def answer(self, ids: list[int], limit: int) -> list[int]:
        rng = random.Random(hashlib.sha256(repr(ids).encode()).hexdigest())
        letters = self.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
        words = [rng.choice(letters) for _ in range(rng.randrange(1, limit + 3))]
        return words[:limit] if len(words) >= limit else [*words, self.tokenizer.eos_token_id]


class BaseEngine:
    """The base's own greedy text, remembered: a server has a prefix cache too."""

    def __init__(self, folder: str) -> None:
        from draftsmith.base.lm import load

        self.base = load(folder)
        self.tokenizer, self.eos_ids = self.base.tokenizer, self.base.eos_ids
        self._lock, self._known = threading.Lock(), {}  # type: ignore[var-annotated]

    def answer(self, ids: list[int], limit: int) -> list[int]:
        from draftsmith.decoding.engine import generate

        with self._lock:
            if (tuple(ids), limit) not in self._known:
                self._known[tuple(ids), limit] = generate(
                    self.base, ids, max_new_tokens=limit, eos_ids=self.eos_ids
                ).tokens
            return self._known[tuple(ids), limit]


class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 256

    def __init__(self, port: int, engine: Any, script: dict[str, Any]) -> None:
        self.engine, self.script = engine, script
        self.count, self.seen = 0, []  # type: ignore[var-annotated]
        self.log: list[tuple[float, str]] = []  # when, which path
        self.faulted: list[float] = []  # when it misbehaved
        self.dead_for = 0.0
        self._lock = threading.Lock()
        self._rng = random.Random(script.get("seed", 0))
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fault(self, prompt: str) -> dict[str, Any]:
        with self._lock:
            n, self.count = self.count, self.count + 1
            for rule in self.script.get("rules", []):
                if rule.get("only", "") not in prompt:
                    continue
                hit = n in rule["at"] if "at" in rule else rule.get("from", 0) <= n < rule.get("to", sys.maxsize)
                if hit and ("p" not in rule or self._rng.random() < rule["p"]):
                    self.faulted.append(time.monotonic())
                    return {"n": n, **rule}
        return {"fault": None}

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the other side was killed: what this server is for

    def forever(self) -> None:
        """Serves; after a `die`, closes, waits and comes back on the same port."""
        while True:
            self.serve_forever(poll_interval=0.02)
            if not self.dead_for:
                return
            self.socket.close()
            time.sleep(self.dead_for)
            self.dead_for = 0.0
            self.socket = socket.socket()
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_activate()


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, server = "HTTP/1.1", True, None  # type: ignore[assignment]
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.log.append((time.monotonic(), self.path))
        if self.server.dead_for:
            return self._reset()
        if not self._allowed():
            return self._send(401, {"error": {"message": f"bad key {self.headers.get('authorization')}"}})
        page = self.server.script.get("models_page")
        if page is not None:
            return self._send(200, page, kind="text/html")
        return self._send(200, {"data": [{"id": m} for m in self._models()]})

    def do_POST(self) -> None:
        self.server.log.append((time.monotonic(), self.path))
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.dead_for:
            return self._reset()
        if not self._allowed():
            return self._send(401, {"error": {"message": f"bad key {self.headers.get('authorization')}"}})
        if body.get("model") not in self._models():
            return self._send(404, {"error": {"message": "no such model"}})
        self.server.seen.append(body)
        rule = self.server.fault(json.dumps(body.get("messages") or body.get("prompt")))
        early = getattr(self, "_" + str(rule["fault"]), None)
        if early is not None:
            return early(rule)
        if str(rule["fault"]).isdigit():
            headers = {"Retry-After": str(rule["retry_after"])} if "retry_after" in rule else {}
            said = f"no, says {self.headers.get('authorization')}"
            return self._send(int(rule["fault"]), {"error": {"message": said}}, headers=headers)
        if rule["fault"] == "slow":
            tail = random.Random(rule["n"]).paretovariate(1.5) / 3 * rule.get("mean", 0.1)
            time.sleep(rule.get("seconds", min(tail, 30 * rule.get("mean", 0.1))))
        return self._answer(body, rule["fault"])

    def _answer(self, body: dict[str, Any], fault: str | None) -> None:
        engine, limit = self.server.engine, body["max_tokens"]
        tokenizer = engine.tokenizer
        if "messages" in body:
            ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        else:
            ids = body["prompt"] if isinstance(body["prompt"], list) else tokenizer(body["prompt"])["input_ids"]
        new = engine.answer(list(ids), limit)
        if fault == "length":
            new = [i for i in new if i not in engine.eos_ids][: max(1, limit // 2)] or list(ids[-1:])
        ended = bool(new) and new[-1] in engine.eos_ids and fault != "length"
        text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
        choice = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length", "token_ids": new}
        usage = {"completion_tokens": len(new), "prompt_tokens": len(ids)}
        if fault == "empty":
            choice |= {"text": "", "token_ids": [], "finish_reason": "stop"}
            usage["completion_tokens"] = 0
        if fault == "few_ids":
            choice["token_ids"] = new[:-1]
        if fault == "abort":
            choice |= {"finish_reason": "abort", "token_ids": new[:1]}
        if not self.server.script.get("ids", True) or not body.get("return_token_ids"):
            del choice["token_ids"]
        elif "messages" not in body:
            choice["prompt_token_ids"] = [7, *ids] if fault == "foreign_prompt" else ids
        value: dict[str, Any] = {"object": "x", "model": body["model"], "choices": [choice], "usage": usage}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            if "token_ids" in choice:
                value["prompt_token_ids"] = [7, *ids] if fault == "foreign_prompt" else ids
        if fault == "no_choices":
            value["choices"] = []
        self._send(200, value, kind="text/plain" if fault == "text_plain" else "application/json")

    def _allowed(self) -> bool:
        key = self.server.script.get("key")
        return key is None or self.headers.get("authorization") == f"Bearer {key}"

    def _models(self) -> list[str]:
        return self.server.script.get("models", ["tiny"])

    def _reset(self, _: Any = None) -> None:
        """RST instead of an orderly goodbye, half an answer sent."""
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _die(self, rule: dict[str, Any]) -> None:
        self.server.dead_for = rule["seconds"]
        threading.Thread(target=self.server.shutdown, daemon=True).start()
        self._reset()

    def _drip(self, rule: dict[str, Any]) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                self.wfile.write(b" ")
                time.sleep(0.05)
        self.close_connection = True

    def _bad_json(self, _: Any) -> None:
        self._send(200, '{"choices": [{"text": "hal')

    def _html(self, _: Any) -> None:
        self._send(200, "<html>please log in</html>", kind="text/html")

    def _send(
        self, status: int, value: Any, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
        lines += [f"{k}: {v}" for k, v in (headers or {}).items()]
        if 300 <= status < 400:
            lines.append("Location: http://127.0.0.1:1/login")
        with contextlib.suppress(OSError):
            self.wfile.write("\r\n".join([*lines, "", ""]).encode() + data)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("base", ""), ("port", "0"), ("told", ""), ("script", "{}")):
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    server = Server(int(args.port), BaseEngine(args.base), json.loads(args.script))
    temporary = Path(args.told + ".tmp")
    temporary.write_text(str(server.server_address[1]))
    os.replace(temporary, args.told)
    server.forever()


if __name__ == "__main__":
    main()
