"""Memory that is too small: one line with the stage, its sizes and the smallest change that helps, exit 5; nothing
half-written, and the same command goes on.

The address space of a process of its own is limited from a place in the code on (limited.py), to a little more than it
has by then, where a single tensor wants several times that: which allocation fails first is left to the system.
"""

# ruff: noqa: F811 (fixtures of other modules are imported, and then are names of parameters)

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.conftest import WARM, environment_of, micro, training  # noqa: F401

from draftsmith import config, room
from draftsmith.errors import DataError, OutOfMemory

from .disks import Made, check_whole, command, equal, error_of, made  # noqa: F401

pytestmark = pytest.mark.faults

VOCABULARY, BATCH, LENGTH = 8192, 8, 256  # the logits of a batch take 67 MB in fp32
MORE = 2**24  # bytes that a process may still have


def limited(verb: str, *overrides: str, cwd: Path, place: tuple[str, str]) -> tuple[int, str]:
    """(exit code, output) of a process that gets MORE bytes from the first call of `place` on."""
    with tempfile.NamedTemporaryFile("r") as output:
        environment = environment_of(cwd, {"MALLOC_ARENA_MAX": "1"})
        order = {"module": f"draftsmith.{verb}", "arguments": overrides, "cwd": str(cwd), "environment": environment}
        order |= {"output": output.name, "place": place, "more": MORE}
        script = str(Path(__file__).with_name("limited.py"))
        process = WARM.Process(target=runpy.run_path, args=(script, {"ORDER": order}))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, output.read()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and overrides: a base with a large vocabulary, rows of random ids, and a loss that forms all logits."""
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    more = f"num_key_value_heads: 1, max_position_embeddings: 256, vocab_size: {VOCABULARY}, tie_word_embeddings: true"
    base = ["base.path=null", "base.recipe.corpus=null", f"++base.recipe.model={{{shape}, {more}}}"]
    return tmp_path_factory.mktemp("wide"), [
        *[*base, "data=random", "data.random.rows=24", f"data.length={LENGTH}", f"data.batch_size={BATCH}"],
        *["loss.impl=plain", "heads.medusa.num_heads=1", "heads.medusa.share_lm_head=true"],
        *["trainer.max_steps=2", "trainer.epochs=null", "trainer.threads=1", "trainer.log_every=1"],
    ]


PLACES = {
    "before step 1": ("draftsmith.training.fit", "captured"),
    "step 1": ("draftsmith.training.module", "TrainModule.training_step"),
}


@pytest.mark.parametrize("where", PLACES)
def test_training_names_the_batch_and_the_same_run_in_less(wide: tuple[Path, list[str]], where: str) -> None:
    folder, given = wide
    run = folder / where.replace(" ", "-")
    code, output = limited("train", *given, f"run_dir={run}", cwd=folder, place=PLACES[where])
    line = error_of(code, output)
    print(f"\n    {line}")
    assert re.match(rf"error: train: (medusa, )?{where}, a batch of {BATCH} x {LENGTH} tokens: out of memory \(", line)
    told = "data.batch_size=4 trainer.accumulate=2"
    assert line.endswith(f"; say {told}, which is the same run, or lower data.length, now {LENGTH}")
    assert not (run / "heads").exists()
    check_whole(run)
    before, now = (config.identity(config.compose("train", [*given, *more])) for more in ([], told.split()))
    assert before == now
    code, output = command("train", *given, *told.split(), f"run_dir={run}", cwd=folder)  # the same folder goes on
    assert code == 0, output


def test_a_capture_names_its_batch(wide: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, given = wide
    assert command("train", *given, f"run_dir={folder / 'rows-made'}", cwd=folder)[0] == 0  # makes base and rows
    (rows,) = (p for p in (folder / "cache" / "rows").iterdir() if p.is_dir())
    out = tmp_path / "out"
    job = [*given[:3], f"rows={rows}", f"out={out}", "store.teacher_top_k=4", "store.batch_size=8", "threads=1"]
    place = ("draftsmith.data.storing", "Job.captured")
    code, output = limited("capture", *job, "store.length=256", cwd=folder, place=place)
    line = error_of(code, output)
    print(f"\n    {line}")
    assert re.match(r"error: capture: a batch of 8 x 256 tokens: out of memory \(", line)
    assert line.endswith("; say store.batch_size=4, or lower store.length, now 256")
    assert not list(out.glob("captures-*"))
    check_whole(out)
    code, output = command("capture", *job, "store.batch_size=4", cwd=folder)
    assert code == 0, output


def test_a_distillation_names_its_batch(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = [*made.base, "data=prompts", "data.prompts.path=null", "data.prompts.synthetic=1200", f"out={out}"]
    job += ["data.generation.max_new_tokens=4", "data.generation.shard_rows=2000", "threads=1"]
    place = ("draftsmith.data.generate", "answer_batch")
    code, output = limited("distill", *job, "data.generation.batch_size=1200", cwd=tmp_path, place=place)
    line = error_of(code, output)
    print(f"\n    {line}")
    assert re.match(r"error: distill: a batch of 1200 chats x up to \d+ tokens: out of memory \(", line)
    assert line.endswith("; say data.generation.batch_size=600, or lower data.generation.max_new_tokens")
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("rows-*"))
    check_whole(out / "asked")


# --- where a limit of the address space would take something else first, the allocator's own refusal in the same place


def refused(*_: Any, **__: Any) -> Any:
    return torch.empty(2**50)


@pytest.mark.parametrize(
    ("verb", "place", "told"),
    [
        ("evaluate", "draftsmith.judging.Referee", "evaluate: 1 x up to"),
        ("label", "draftsmith.data.labels._accept_batch", "label: a batch of 2 rows x"),
    ],
)
def test_other_verbs_name_theirs(
    made: Made,
    tmp_path: Path,
    verb: str,
    place: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = made.overrides(verb, tmp_path / "out")
    with monkeypatch.context() as m:
        m.setattr(place, refused)
        line = error_of(*command(verb, *given, cwd=tmp_path))
    print(f"\n    {line}")
    assert line.startswith(f"error: {told}")
    assert "tokens: out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate" in line
    assert re.search(r"; (say labels.batch_size=1, or )?lower ", line)
    code, output = command(verb, *given, cwd=tmp_path)
    assert code == 0, output
    equal(verb, tmp_path / "out", made.folder / verb)


ERRORS = [
    (MemoryError("Unable to allocate 1.00 TiB for an array"), "Unable to allocate 1.00 TiB for an array"),
    (MemoryError(), "MemoryError"),
    (RuntimeError("std::bad_alloc"), "std::bad_alloc"),
    (OSError(12, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
    (RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)"), "unable to mmap 8 bytes from file"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        "CUDA out of memory. Tried to allocate 20.00 GiB",
    ),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=[type(e).__name__ + str(i) for i, (e, _) in enumerate(ERRORS)])
def test_whatever_says_so_is_out_of_memory(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert config._guarded(work, "train", debug=False) == 5
    line = capsys.readouterr().err
    assert line.startswith(f"error: train: out of memory ({said}")
    assert line.count("\n") == 1
    with pytest.raises(OutOfMemory, match=r"^here: out of memory \(") as caught, room.memory("here", "say less"):
        work()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), DataError("f:1: 'out of memory' is its text"), OSError(28)]
)
def test_what_says_something_else_is_not(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, room.memory("here", "say less"):
        raise error
    assert caught.value is error


def test_numpy_and_torch_say_what_is_looked_for() -> None:
    for want in (lambda: np.empty(2**50), lambda: torch.empty(2**50)):
        with pytest.raises(OutOfMemory, match="llocate"), room.memory("here", "say less"):
            want()


@pytest.mark.parametrize(
    ("rows", "accumulate", "says"),
    [
        (8, ("a", 3), "say b=4 a=6, which is the same run, or lower l"),
        (9, ("a", 1), "say b=3 a=3, which is the same run, or lower l"),
        (7, ("a", 1), "say b=1 a=7, which is the same run, or lower l"),
        (7, None, "say b=3, or lower l"),
        (1, ("a", 1), "lower l"),
    ],
)
def test_the_smallest_change(rows: int, accumulate: tuple[str, int] | None, says: str) -> None:
    assert room.halved(("b", rows), "l", accumulate) == says
