"""The Hugging Face hub on this machine, as far as an upload asks it: repositories, what they hold, who may write."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class Hub(ThreadingHTTPServer):
    """token: whose bearer may write. fails: part of a path -> the status it is answered with."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.fails: dict[str, int] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[Hub]:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version, server = "HTTP/1.1", None  # type: ignore[assignment]
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._served():
            name = self.path.removeprefix("/api/models/")
            found = self.server.repositories.get(name)
            if found is None:
                return self._send(404, {"error": "Repository not found"})
            self._send(200, {"id": name, "private": found.private, "siblings": [{"rfilename": f} for f in found.files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self._served():
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        name, _, what = path.removeprefix("/api/models/").rpartition("/")
        name, what = name.rpartition("/")[0], name.rpartition("/")[2]
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if what == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        self._send(404, {"error": f"no such place: {path}"})

    def _served(self) -> bool:
        """Whether nothing stands against an answer; else it was given."""
        self.server.asked.append(f"{self.command} {self.path}")
        bearer = self.headers.get("authorization")
        failing = next((status for part, status in self.server.fails.items() if part in self.path), None)
        if failing is None and bearer == f"Bearer {self.server.token}":
            return True
        self._send(failing or 401, {"error": f"not with {bearer}"})  # a server that repeats what it must not
        return False

    def _create(self, told: dict[str, Any]) -> None:
        name = f"{told['organization'] or 'somebody'}/{told['name']}"
        if name in self.server.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.repositories[name] = Repository(told.get("visibility") == "private" or bool(told.get("private")))
        self._send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository, oid = self.server.repositories[name], "0" * 40
        for line in lines:
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        repository.commits += 1
        self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
