"""A micro base and its rows as files, and the command line as a user calls it."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException

from draftsmith import config
from draftsmith.errors import DraftsmithError

ROOT = Path(__file__).parents[2]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # a tied random base repeats its last token, which says nothing
}


@pytest.fixture(scope="session")
def micro(micro_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro base, 16 rows (as many packs: 8 steps an epoch), chats and prompts."""
    return micro_maker(tmp_path_factory.mktemp("micro"), SHAPE, rows=16)


@pytest.fixture(scope="session")
def training(micro: Path) -> list[str]:
    """Overrides that train a head on the micro base: 16 packs of 64 tokens, two per step."""
    return [
        "base=hf",
        f"base.path={micro / 'base'}",
        "data=jsonl",
        f"data.path={micro / 'rows.jsonl'}",
        "data.length=64",
        "data.batch_size=2",
        "trainer.threads=1",
        "trainer.epochs=null",
        "trainer.log_every=1",
    ]


def lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def environment_of(cwd: Path, more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DRAFTSMITH_CACHE": str(cwd / "cache"), **more}


def start(command: list[str], cwd: Path, **environment: str) -> subprocess.Popen:
    """The command in its own process, with nothing but what a user has; stderr joins stdout."""
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(command, cwd=cwd, env=environment_of(cwd, environment), text=True, **how)


# Importing torch, transformers and lightning takes 9 CPU-seconds, most trainings of these tests not one. So one process
# imports them once and does nothing else; the others are forked from it.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["draftsmith.training.fit", "transformers.models.llama.modeling_llama"])


class Fork:
    """A process of its own that is `python -m draftsmith.<verb>` but for the time that importing takes. verb: or a file
    that is run in its place."""

    def __init__(self, verb: str, *overrides: str, cwd: Path, **environment: str) -> None:
        self.output = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (as long as this)
        order = {
            "module": verb if verb.endswith(".py") else f"draftsmith.{verb}",
            "arguments": overrides,
            "cwd": str(cwd),
            "environment": environment_of(cwd, environment),
            "output": self.output.name,
        }
        script = str(Path(__file__).with_name("forked.py"))
        self.process = WARM.Process(target=runpy.run_path, args=(script, {"ORDER": order}))
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]

    def poll(self) -> int | None:
        return self.process.exitcode

    def finish(self, seconds: float) -> tuple[int, str]:
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(str(self.pid), seconds, self.output.read())
        return code, self.output.read()


def draftsmith(verb: str, *overrides: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """(exit code, output) of `python -m draftsmith.<verb>`."""
    return finish(Fork(verb, *overrides, cwd=cwd, **environment))


def call(verb: str, *overrides: str, cwd: Path) -> tuple[int, str]:
    """(exit code, output) of a verb in this process, which saves the seconds of starting one."""
    told = io.StringIO()
    with contextlib.chdir(cwd), pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(told):
        m.setenv("DRAFTSMITH_CACHE", str(cwd / "cache"))
        try:
            import_module(f"draftsmith.{verb}").run(config.compose(verb, overrides))
        except DraftsmithError as e:
            return e.exit_code, f"{told.getvalue()}error: {e}"
        except HydraException as e:
            return 2, f"error: {config._explain(e, verb)}"
    return 0, told.getvalue()


def finish(process: subprocess.Popen | Fork, seconds: float = 240) -> tuple[int, str]:
    if isinstance(process, Fork):
        return process.finish(seconds)
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output
