"""A small base, its prompts, a server process in front of it, and a process that answers them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Fork

HERE = Path(__file__).parent
ROWS, SHARD = 400, 64
NEW = 12
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with lively random weights. Every tenth token ends its texts, so that they are of all lengths."""
    import torch

    from draftsmith.base import create
    from draftsmith.data import synthetic

    folder = tmp_path_factory.mktemp("base")
    tokenizer = synthetic.train_tokenizer(synthetic.dialogues(60, seed=5), 300)
    model = create.llama(SHAPE, tokenizer, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 8 if p.dim() > 1 else p)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, len(tokenizer), 10)]
    create.save(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROWS records: plain prompts, chats of one and of three turns, twins, and a few that fit into no context."""
    rng = random.Random(1)
    lines: list[dict[str, Any]] = []
    for i in range(ROWS - 10):
        words = " ".join(
            rng.choice(["the", "cat", "sat", "on", "a", "mat", "dog"]) for _ in range(rng.randrange(3, 12))
        )
        if i % 3 == 0:
            lines.append({"where": f"r:{i}", "prompt": words})
            continue
        turns = 3 if i % 10 == 1 else 1
        said = [(role, f"{words} {t}") for t in range(turns) for role in ("user", "assistant")]
        lines.append({"where": f"r:{i}", "messages": [{"role": r, "content": c} for r, c in said]})
    lines += [{"where": f"twin:{i}", "prompt": "the cat sat"} for i in range(5)]
    lines += [{"where": f"long:{i}", "prompt": "the cat " * (300 + i)} for i in range(5)]
    rng.shuffle(lines)
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Process:
    """loopback.py in front of a base; the same port after a restart."""

    def __init__(self, folder: Path, base: Path, **script: Any) -> None:
        self.folder, self.base, self.port = folder, base, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start(**script)

    def start(self, **script: Any) -> None:
        told = self.folder / "port"
        told.unlink(missing_ok=True)
        options = ["--base", str(self.base), "--port", str(self.port), "--told", str(told)]
        self.process = Fork(str(HERE / "loopback.py"), *options, "--script", json.dumps(script), cwd=self.folder)
        until = time.monotonic() + 60
        while not told.exists():
            assert self.process.poll() is None, "the server did not start"
            assert time.monotonic() < until
            time.sleep(0.02)
        self.port = int(told.read_text())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def kill(self) -> None:
        self.process.process.kill()
        self.process.process.join()


@pytest.fixture
def serving(tmp_path: Path, base: Path) -> Any:
    """serving(**script): a Process that ends with the test."""
    started = []

    def start(**script: Any) -> Process:
        started.append(Process(tmp_path / f"server-{len(started)}", base, **script))
        return started[-1]

    yield start
    for process in started:
        process.kill()


class Driver:
    """driver.py (or, engine=verb, `draftsmith distill`) on one folder, with one command, run as often as it takes."""

    def __init__(self, out: Path, base: Path, records: Path, engine: str = "server", **server: Any) -> None:
        self.out = out
        quick: dict[str, Any] = {
            "backoff": 0.05,
            "backoff_limit": 0.5,
            "timeout": 20.0,
            "concurrency": 16,
            "patience": 10.0,
        }
        quick |= server
        generation: dict[str, Any] = {"max_new_tokens": NEW, "shard_rows": SHARD, "batch_size": 8}
        if engine == "verb":
            self.command = ["distill", *self._overrides(base, records)]
            nodes = {"data.generation": {**generation, "engine": "server"}, "data.generation.server": quick}
            self.command += [f"{node}.{k}={json.dumps(v)}" for node, pairs in nodes.items() for k, v in pairs.items()]
        else:
            options = {"server": json.dumps(quick), "generation": json.dumps(generation), "engine": engine}
            options |= {"out": str(out), "base": str(base), "records": str(records)}
            pairs = [x for k, v in options.items() for x in (f"--{k}", v)]
            self.command = [str(HERE / "driver.py"), *pairs]
        self.told = ""

    def _overrides(self, base: Path, records: Path) -> list[str]:
        """The verb's own, with the records as a user would give them."""
        asked = self.out.parent / "prompts.jsonl"
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        asked.write_text("".join(json.dumps({k: v for k, v in x.items() if k != "where"}) + "\n" for x in lines))
        return ["base=hf", f"base.path={base}", "data=prompts", f"data.prompts.path={asked}", f"out={self.out}"]

    def start(self, *more: str) -> Fork:
        return Fork(*self.command, *more, cwd=self.out.parent)

    def run(self, *more: str) -> int:
        """The exit code; what it said is in self.told."""
        code, self.told = self.start(*more).finish(300)
        return code

    def killed_after(self, seconds: float) -> bool:
        """kill -9 after so long; False if it was over by then."""
        process = self.start()
        process.process.join(seconds)
        if process.poll() is not None:
            return False
        process.process.kill()
        process.process.join()
        return True


@pytest.fixture
def driver(tmp_path: Path, base: Path, records: Path) -> Any:
    """driver(name, **ServerConfig): a Driver that writes into tmp_path/name."""

    def make(name: str, engine: str = "server", records: Path = records, **server: Any) -> Driver:
        return Driver(tmp_path / name, base, records, engine, **server)

    return make


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every row on disk, sorted."""
    import pyarrow.parquet as pq

    rows = [row for p in sorted(out.glob("rows-*.parquet")) for row in pq.read_table(p).to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


def content(out: Path) -> dict[str, bytes]:
    """What a finished folder holds, byte for byte."""
    names = [*out.glob("rows-*.parquet"), out / "quarantine.jsonl", out / "manifest.json"]
    return {p.name: p.read_bytes() for p in names}


def torn(out: Path) -> list[str]:
    """Lines of finished files that are no JSON; journals may have one torn tail each."""
    bad = []
    for path in out.rglob("*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        for n, line in enumerate(lines[:-1] if path.parent.name == "journal" else [x for x in lines if x]):
            try:
                json.loads(line)
            except ValueError:
                bad.append(f"{path}:{n}")
    return bad


def account(out: Path) -> dict[str, int]:
    """Whether rows out and quarantine together are what was asked."""
    rows, asked = rows_of(out), [json.loads(x)["key"] for x in (out / "asked/records.jsonl").read_text().splitlines()]
    quarantined = [json.loads(line)["key"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    ids = [row["id"].partition("/")[0] for row in rows if "/" not in row["id"]]
    assert sorted([*ids, *quarantined]) == sorted(asked)
    assert len({row["id"] for row in rows}) == len(rows)
    assert not torn(out)
    return {"asked": len(asked), "out": len(ids), "quarantined": len(quarantined)}
