"""vLLM's OpenAI-compatible server in a process of its own, on loopback, as a user starts it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from .replay import Counts

STARTS = 300.0  # seconds until a server answers; some 30 on an idle machine
NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


class Server:
    def __init__(self, port: int) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=STARTS, trust_env=False)
        self.model = ""

    def complete(self, prompt: Sequence[int], new: int, **how: Any) -> list[int]:
        """Token ids of one continuation."""
        asked = {"model": self.model, "prompt": list(prompt), "max_tokens": new, "ignore_eos": True}
        asked |= {"temperature": 0, "return_token_ids": True, **how}
        answer = self.client.post("/v1/completions", json=asked)
        answer.raise_for_status()
        return answer.json()["choices"][0]["token_ids"]

    def complete_all(self, prompts: Sequence[Sequence[int]], new: int, **how: Any) -> list[list[int]]:
        """Of several at once, as many threads as prompts."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(prompt, new, **how), prompts))

    def sample(self, prompt: Sequence[int], new: int, texts: int, seed: int) -> list[list[int]]:
        """Several continuations of one prompt at temperature 1, seeded with seed, seed + 1, …"""
        asked = {"model": self.model, "prompt": list(prompt), "max_tokens": new, "ignore_eos": True, "n": texts}
        answer = self.client.post(
            "/v1/completions", json={**asked, "temperature": 1, "seed": seed, "return_token_ids": True}
        )
        answer.raise_for_status()
        return [choice["token_ids"] for choice in answer.json()["choices"]]

    def counts(self, most: int) -> Counts:
        """From /metrics."""
        told = self.client.get("/metrics").text
        numbers = [_sum(told, rf"vllm:spec_decode_{name}_total") for name in NAMES]
        by = [_sum(told, r"vllm:spec_decode_num_accepted_tokens_per_pos_total", f'position="{k}"') for k in range(most)]
        return Counts(*numbers, tuple(by))

    def cached(self) -> int:
        """Prompt tokens that were not computed again."""
        return _sum(self.client.get("/metrics").text, "vllm:prefix_cache_hits_total")


def _sum(told: str, name: str, label: str = "") -> int:
    found = re.findall(rf"^{name}\{{([^}}]*)\}} (\S+)$", told, re.MULTILINE)
    assert found, f"{name}: not among the metrics"
    return int(sum(float(value) for labels, value in found if label in labels))


@contextlib.contextmanager
def serving(
    base: Path, log: Path, drafts: dict[str, Any] | None = None, *more: str, **settings: Any
) -> Iterator[Server]:
    """drafts: --speculative-config. AssertionError with the end of the log where the server does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "4", "--max-model-len", "512", *more]
    if drafts is not None:
        command += ["--speculative-config", json.dumps(drafts)]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(port)
    try:
        _wait(server, process, log)
        server.model = server.client.get("/v1/models").json()["data"][0]["id"]
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with {process.returncode}:\n{log.read_text()[-6000:]}")
        with contextlib.suppress(httpx.TransportError):
            if server.client.get("/health").status_code == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"the server did not answer in {STARTS} s:\n{log.read_text()[-6000:]}")
