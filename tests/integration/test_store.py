"""draftsmith capture and a training from what it wrote, as a user runs them: equal losses, resume, refusals."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from draftsmith import artifacts, capture
from draftsmith.base import create, lm
from draftsmith.data import store, synthetic
from draftsmith.data.rows import Row, write_rows

from .conftest import SHAPE, call

STEPS, LAYERS = 6, 4
HEADS = ["medusa", "hydra", "hydra_pp", "clover", "clover2", "eagle3", "kangaroo"]  # all that stand alone
ROUNDED = 2e-5  # relative: what another packing rounds otherwise, carried through STEPS updates in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, other/ with its tokenizer and other weights, and rows/: 24 rows of 20 to 40 tokens."""
    folder = tmp_path_factory.mktemp("store")
    chats = list(synthetic.dialogues(40, seed=5))
    tokenizer = synthetic.train_tokenizer(chats, 400)
    for name, seed in (("base", 0), ("other", 1)):
        (folder / name).mkdir()
        shape = {**SHAPE, "num_hidden_layers": LAYERS, "initializer_range": 0.1}
        create.save(create.llama(shape, tokenizer, seed), tokenizer, folder / name)
    random = np.random.default_rng(0)
    rows = [
        Row(f"r{n}", random.integers(10, 300, k), [0] * 8 + [1] * (k - 8), f"prompts.jsonl:{n + 1}", asked=f"q{n}")
        for n, k in enumerate(random.integers(20, 41, 24).tolist())
    ]
    write_rows(folder / "rows", rows, base=dataclasses.asdict(lm.load(str(folder / "base")).spec))
    return folder


def captures(folder: Path, out: str, *more: str, base: str = "base") -> tuple[int, str]:
    given = ["base=hf", f"base.path={folder / base}", f"rows={folder / 'rows'}", f"out={folder / out}"]
    return call("capture", *given, "store.dtype=fp32", "store.shard_rows=8", *more, cwd=folder)


def train(folder: Path, run: str, path: str, *more: str, base: str = "base") -> tuple[int, str]:
    kind = "jsonl" if path == "rows" else "stored"
    given = ["base=hf", f"base.path={folder / base}", f"data={kind}", f"data.path={folder / path}", "data.length=64"]
    given += ["data.batch_size=2", "data.validation.share=0.2", "data.validation.every=3", "trainer.epochs=null"]
    given += ["trainer.log_every=1", f"trainer.max_steps={STEPS}", f"run_dir={folder / run}"]
    return call("train", *given, *more, cwd=folder)


def losses(folder: Path, run: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == STEPS
    return [{k: v for k, v in line.items() if k.endswith("loss")} for line in lines]


def assert_equal(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert [m.keys() for m in mine] == [t.keys() for t in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=ROUNDED)


@pytest.fixture(scope="module")
def stored(folder: Path) -> Path:
    """A store for Medusa, in three shards."""
    code, output = captures(folder, "medusa")
    assert code == 0, output
    return folder / "medusa"


# --- writing


def test_what_it_will_cost_is_told_first(folder: Path, stored: Path) -> None:
    code, output = captures(folder, "told", "store.teacher_top_k=4", "store.dtype=int8")
    assert code == 0, output
    first, *_ = output.splitlines()
    lengths = Counter(store.read_folder(stored / "rows")[0].lengths_N.tolist())
    tokens, kept = sum(n * count for n, count in lengths.items()), sum((n - 5) * c for n, c in lengths.items())
    each = 32 + 4 + 4 * 4 + 4 * 2  # final, its scale, ids, logits
    size = f"{kept * each / 1000:.1f} kB"
    assert first.startswith(f"store: {kept:,} positions of {tokens:,} x {each} bytes = {size}; capturing ~")
    assert "pays from epoch" in first or "never pays" in first
    held = sum(store.mapped(p)[0][n].nbytes for p in (folder / "told").glob("captures-*") for n in store.mapped(p)[0])
    assert held == kept * each


def test_it_resumes_says_when_it_is_complete_and_refuses_another_plan(folder: Path, stored: Path) -> None:
    def bytes_of() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in stored.iterdir() if p.is_file() and p.name != ".lock"}

    first = bytes_of()
    (stored / "manifest.json").unlink()
    (stored / "captures-00001.safetensors").unlink()
    code, output = train(folder, "early", "medusa")
    assert (code, "its captures are not complete" in output) == (3, True), output
    code, output = captures(folder, "medusa")
    assert code == 0, output
    assert "captures-00001.safetensors: 1 of 1 shards" in output
    assert bytes_of() == first
    code, output = captures(folder, "medusa", "store.batch_size=3", "store.length=100")  # how fast, not what
    assert (code, "already complete" in output) == (0, True), output
    for more, said in (
        (["store.dtype=int8"], "store.dtype: fp32 -> int8"),
        (["store.keep=all"], "store.counted: True"),
    ):
        code, output = captures(folder, "medusa", *more)
        assert (code, said in output) == (2, True), output
    code, output = captures(folder, "medusa", base="other")
    assert (code, "base.weights_sha256" in output) == (2, True), output
    assert bytes_of() == first


def test_a_full_disk_is_refused_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int
        total: int = 10**9

    monkeypatch.setattr("draftsmith.room.shutil.disk_usage", lambda path: Usage(1000))
    code, output = captures(folder, "nowhere")
    assert (code, "nowhere needs " in output, "has 1.0 kB; free space there, or" in output) == (5, True, True), output
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["head=[medusa2]"], 2, "medusa2 trains an adapter"),
        (["head=[acceptance]"], 2, "stands beside a drafter"),
        (["head=[clover2]", "store.keep=counted"], 2, "clover2 reads every position"),
        (["store.dtype=int4"], 2, "dtype='int4'"),
        (["store.dtypes=int8"], 2, "did you mean 'store.dtype'"),
        (["store.length=30"], 3, "do not fit the 30 of a forward"),
        (["rows=${out}"], 2, "the folder of rows itself"),
    ],
)
def test_what_cannot_be_stored_is_refused_in_one_line(folder: Path, more: list[str], code: int, message: str) -> None:
    got, output = captures(folder, "refused", *more)
    assert (got, message in output) == (code, True), output
    assert not (folder / "refused").exists()


# --- training


def test_every_head_learns_the_same_from_a_store_as_online(folder: Path) -> None:
    """Seven heads on one store of the union of their needs; training and validation losses of every step."""
    head = f"head=[{','.join(HEADS)}]"
    code, output = captures(folder, "union", head)
    assert code == 0, output
    for run, path in (("online", "rows"), ("offline", "union")):
        code, output = train(folder, run, path, head)
        assert code == 0, output
    assert "rows computed again and found equal" in output
    mine, theirs = losses(folder, "offline"), losses(folder, "online")
    assert {k.split("/")[1] for line in mine for k in line} == set(HEADS)
    assert_equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_counted_positions_are_all_that_medusa_needs(folder: Path, stored: Path, workers: int) -> None:
    code, output = train(folder, "counted-online", "rows")
    assert code == 0, output
    code, output = train(folder, f"counted-{workers}", "medusa", f"data.num_workers={workers}")
    assert code == 0, output
    assert_equal(losses(folder, f"counted-{workers}"), losses(folder, "counted-online"))


def test_with_its_teacher_stored_kangaroo_runs_only_its_own_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["head=[kangaroo]", "heads.kangaroo.exit_layer=2", "heads.kangaroo.teacher_top_k=3"]
    code, output = captures(folder, "teacher", *own, "store.states=false", "store.teacher_top_k=5")
    assert code == 0, output
    code, output = train(folder, "taught-online", "rows", *own)
    assert code == 0, output
    ran: Counter[int] = Counter()
    real = lm.BaseLM._run_block
    monkeypatch.setattr(lm.BaseLM, "_run_block", lambda self, layer, *a: ran.update([layer]) or real(self, layer, *a))
    monkeypatch.setattr(store, "CHECKED", 0)
    monkeypatch.setattr("draftsmith.train._record", lambda base, heads: None)  # asks the whole base, before and after
    code, output = train(folder, "taught", "teacher", *own)
    assert code == 0, output
    assert "the base runs its first 2 layers for the rest" in output
    assert set(ran) == {0, 1}
    assert_equal(losses(folder, "taught"), losses(folder, "taught-online"))
    code, output = train(folder, "wider", "teacher", *own, "heads.kangaroo.teacher_top_k=6")
    assert (code, "heads.kangaroo.teacher_top_k=6: the store keeps the teacher's 5" in output) == (2, True), output


def test_a_stopped_training_from_a_store_goes_on_bit_for_bit(folder: Path, stored: Path) -> None:
    code, output = train(folder, "straight", "medusa", "trainer.checkpoint_every=2", "trainer.keep=9")
    assert code == 0, output
    shutil.copytree(folder / "straight", folder / "broken")
    for part in ("heads", "checkpoints/step-00000006"):
        shutil.rmtree(folder / "broken" / part)
    for name in ("COMPLETE.json", "provenance.json"):
        (folder / "broken" / name).unlink()
    code, output = train(folder, "broken", "medusa", "trainer.checkpoint_every=2", "trainer.keep=9")
    assert (code, "resuming after step 4" in output) == (0, True), output
    files = [artifacts.file_sha256(folder / run / "heads/medusa/model.safetensors") for run in ("straight", "broken")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["head=[clover2]"], 2, "clover2 reads hidden 4 of the base, which the store does not keep"),
        (["heads.medusa.num_heads=5"], 3, "heads.medusa: reads"),
        (["data.loss_on=all"], 3, "heads.medusa: reads"),
        (["head=[medusa2]", "+base.lora.rank=2"], 2, "medusa2 trains an adapter"),
    ],
)
def test_a_store_that_is_not_enough_is_refused(
    folder: Path, stored: Path, more: list[str], code: int, message: str
) -> None:
    name = f"short-{abs(hash(tuple(more)))}"
    got, output = train(folder, name, "medusa", *more)
    assert (got, message in output) == (code, True), output
    assert not (folder / name / "metrics.jsonl").exists()


# --- damage


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def missing(path: Path) -> None:
    path.unlink()


def extra(path: Path) -> None:
    shutil.copyfile(path, path.with_name("captures-00001.safetensors.bak"))


def shifted(path: Path) -> None:
    """One position off, and sealed again."""
    tensors, told = store.mapped(path)
    save_file({name: t.roll(1, 0) for name, t in tensors.items()}, path, told)
    reseal(path.parent)


def foreign(path: Path) -> None:
    """Another base's, of the same rows, sealed again."""
    shutil.copyfile(path.parent.parent / "foreign" / path.name, path)
    reseal(path.parent)


def reseal(folder: Path) -> None:
    facts = artifacts.read_json(folder / "manifest.json")
    names = list(facts.pop("files"))
    artifacts.seal(folder, names, **facts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "bytes, manifest.json says"),
        (flipped, "content differs from the sha256"),
        (missing, "listed in manifest.json but missing"),
        (extra, "is not in manifest.json"),
        (shifted, "the store is stale or shifted"),
        (foreign, "belongs to another store"),
    ],
)
def test_damage_is_refused_before_step_1_and_the_shard_named(
    folder: Path, stored: Path, damage: Any, message: str
) -> None:
    if damage is foreign and not (folder / "foreign").exists():
        code, output = captures(folder, "foreign", base="other")
        assert code == 0, output
    name = f"damaged-{damage.__name__}"
    shutil.copytree(stored, folder / name)
    damage(folder / name / "captures-00001.safetensors")
    code, output = train(folder, f"run-{name}", name)
    assert (code, output.count("error:")) == (3, 1), output
    assert f"{name}/captures-00001.safetensors" in output
    assert message in output
    assert not (folder / f"run-{name}" / "metrics.jsonl").exists()


def test_what_is_no_store_is_refused_where_one_is_meant(folder: Path, stored: Path) -> None:
    """Rows would do, and a capture that ended before its first shard holds some: the base would run for nothing."""
    shutil.copytree(folder / "rows", folder / "plain-rows")
    (folder / "begun").mkdir()
    shutil.copyfile(stored / "plan.json", folder / "begun" / "plan.json")
    shutil.copytree(folder / "rows", folder / "begun" / "rows")
    for name, message in (("plain-rows", "no store"), ("begun", "its captures are not complete")):
        code, output = train(folder, f"run-{name}", name)
        assert (code, message in output) == (3, True), output


def test_another_base_is_refused(folder: Path, stored: Path) -> None:
    code, output = train(folder, "run-other", "medusa", base="other")
    assert (code, "another base" in output, "weights_sha256" in output) == (3, True, True), output


def test_a_capture_that_is_no_number_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lm.BaseLM.capture

    def broken(self: Any, *given: Any, **more: Any) -> Any:
        return real(self, *given, **more).each(lambda t: torch.full_like(t, math.nan))

    monkeypatch.setattr(lm.BaseLM, "capture", broken)
    code, output = captures(folder, "nan")
    assert (code, "not finite" in output) == (4, True), output
    assert not list((folder / "nan").glob("captures-*"))


def test_the_verb_is_its_module() -> None:
    assert callable(capture.main)
