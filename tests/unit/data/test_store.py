"""Captures on disk: what comes back is what went in, whatever the packing, and nothing else passes for it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith import artifacts
from draftsmith.contracts import Batch, Capture, Needs
from draftsmith.data import store, storing
from draftsmith.data.journal import publish_asked, read_asked
from draftsmith.data.labels import identity
from draftsmith.data.module import Ahead, Steps
from draftsmith.data.pack import collate
from draftsmith.data.records import Record
from draftsmith.data.rows import Row, Rows, read_folder, write_rows
from draftsmith.data.store import Kept, Store, StoreConfig, compress, expand
from draftsmith.errors import ConfigError, DataError, Diverged
from draftsmith.heads.kangaroo import Kangaroo, KangarooConfig
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.training import fit

HORIZON, LENGTH = 3, 24
NEEDS = Needs(frozenset({1}), final=True)
KEPT = Kept([1], True, 4, "fp32", True, HORIZON, 4, 32)


def make_rows(count: int = 10) -> list[Row]:
    random = np.random.default_rng(0)
    sizes = random.integers(5, 14, count).tolist()
    return [
        Row(f"r{i}", random.integers(0, 60, n), random.integers(0, 2, n), f"a:{i + 1}") for i, n in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> Any:
    return tiny_base("llama")


def job(out: Path, base: Any, kept: Kept = KEPT, **more: Any) -> storing.Job:
    if not (source := out.with_name("source")).exists():
        write_rows(source, make_rows(), base={})
        publish_asked(source, [Record("a:1", messages=({"role": "user", "content": "hello"},))], None)
    told = {"manifest_sha256": artifacts.file_sha256(source / "manifest.json")}
    plan = {"base": identity(base.spec, "w"), "rows": told, "store": store.identity(kept)}
    out.mkdir(exist_ok=True)
    made = storing.Job(out, read_folder(source)[0], plan, base, StoreConfig(batch_size=2, length=LENGTH), **more)
    made.begin(source)
    return made


def written(out: Path, base: Any, kept: Kept = KEPT) -> Path:
    made = job(out, base, kept)
    made.run(lambda text: None)
    assert made.seal()
    return out


def opened(folder: Path, base: Any) -> Store:
    store.verify(folder)
    return store.open_store(folder, identity(base.spec, "w"), base.spec, base.dtype)


def reseal(folder: Path) -> None:
    """As somebody would who has the right to, and the wrong file."""
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    artifacts.seal(folder, [n for n in names if not n.startswith(".") and n != "manifest.json"], kind="store")


@pytest.fixture(scope="module")
def whole(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store") / "whole", base)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def packed(rows: Rows, packs: list[list[int]]) -> Batch:
    return collate([[rows[n] for n in pack] for pack in packs], LENGTH, torch.zeros(HORIZON + 1))


def online(base: Any, batch: Batch, needs: Needs = NEEDS) -> Capture:
    return base.capture(needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def test_it_holds_its_rows_and_what_was_asked_for_them(whole: Path) -> None:
    """A head that was trained from it is evaluated on prompts that its rows did not ask."""
    mine, theirs = (read_folder(folder)[0] for folder in (whole / "rows", whole.with_name("source")))
    assert mine.sha256() == theirs.sha256()
    assert [record.where for _, record in read_asked(whole / "rows")] == ["a:1"]


# --- formats


@pytest.mark.parametrize("dtype", list(store.FORMATS))
def test_what_a_format_loses_is_bounded(dtype: str) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    x[:, 5] *= 40  # a dimension that stands out
    x[3] = 0  # a position with nothing at all
    kept = compress("x", x, store.FORMATS[dtype])
    back = expand(kept["x"], kept.get("x.scale"), torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    bound = {
        "fp32": torch.zeros_like(x),
        "bf16": x.abs() * 2**-8,
        "int8": (largest / 254).expand_as(x) * 1.001,
        "fp8": torch.maximum(x.abs() * 2**-4 * 1.001, largest / 448 * 2**-10 * 1.001),  # half a step; half the least
    }[dtype]
    assert bool(((x - back).abs() <= bound).all())
    assert not back[3].any()
    assert back.isfinite().all()


def test_a_position_costs_what_its_tensors_hold() -> None:
    sizes = {d: dataclasses.replace(KEPT, dtype=d).position_bytes for d in store.FORMATS}
    assert sizes == {"fp32": 2 * 128 + 32, "bf16": 2 * 64 + 24, "int8": 2 * 36 + 24, "fp8": 2 * 36 + 24}


# --- which positions


def test_counted_positions_are_those_of_the_slow_definition() -> None:
    rows = Rows.of(make_rows(30)).select(np.array([4, 2, 25, 7, 11])).truncated(9)
    for horizon in (1, 2, 5):
        flags = np.zeros(len(rows.mask), dtype=bool)
        for begin, row in zip(rows.begins_N, rows, strict=True):
            for t in range(len(row.ids)):
                flags[begin + t] = any(row.mask[t + 1 : t + 1 + horizon])
        assert (store.counted(rows, horizon) == flags).all()
    assert store.every(rows).sum() == rows.lengths_N.sum()


@pytest.mark.parametrize(
    ("chosen", "reads_all", "keeps_counted"),
    [
        ({}, [], True),
        ({}, ["h"], False),
        ({"keep": "all"}, [], False),
        ({"states": False, "teacher_top_k": 2}, ["h"], True),
    ],
)
def test_auto_keeps_counted_positions_where_every_head_can(
    chosen: dict[str, Any], reads_all: list[str], keeps_counted: bool
) -> None:
    kept = storing.kept_of(StoreConfig(**chosen), NEEDS, HORIZON, reads_all, 32, torch.float32)
    assert kept.counted == keeps_counted
    assert kept.states == (["hidden.1", "final"] if chosen.get("states", True) else [])


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="h reads every position"):
        storing.kept_of(StoreConfig(keep="counted"), NEEDS, HORIZON, ["h"], 32, torch.float32)
    with pytest.raises(ConfigError, match="nothing to keep"):
        storing.kept_of(StoreConfig(), Needs(), HORIZON, [], 32, torch.float32)
    for wrong, said in (({"dtype": "fp4"}, "choose one of"), ({"states": False}, "nothing would be kept")):
        with pytest.raises(ConfigError, match=said):
            StoreConfig(**wrong)


def test_the_first_epoch_that_pays_is_the_first_that_is_over_sooner() -> None:
    for forward, write, read in ((3.0, 1.0, 0.5), (1.0, 9.0, 0.1), (2.0, 2.0, 0.0)):
        epoch = next(e for e in range(1, 99) if e * forward > forward + write + e * read)
        assert storing.break_even(forward, write, read) == epoch
    assert storing.break_even(1.0, 0.1, 1.0) is None


# --- writing and reading


@pytest.mark.parametrize("packs", [[[0, 1], [2]], [[2], [5, 0]], [[9], []]])
def test_it_gives_what_the_base_would_whatever_the_packing(base: Any, whole: Path, packs: list[list[int]]) -> None:
    kept = opened(whole, base)
    batch = packed(kept.rows, packs)
    seen, want = kept.seen_of(kept.rows, packs, LENGTH), online(base, batch)
    counted_BT = torch.zeros_like(batch.mask_BT)
    for k in range(1, HORIZON + 1):
        same = batch.documents_BT[:, :-k] == batch.documents_BT[:, k:]
        counted_BT[:, :-k] |= batch.mask_BT[:, k:] & same & (batch.documents_BT[:, k:] >= 0)
    assert seen.final is not None
    assert want.final is not None
    for mine, theirs in ((seen.final, want.final), (seen.hidden[1], want.hidden[1])):
        torch.testing.assert_close(mine[counted_BT], theirs[counted_BT], rtol=1e-4, atol=1e-4)
        assert mine[~counted_BT].isnan().all()
    assert seen.likeliest is not None
    ids_BTk, logits_BTk = seen.likeliest
    top = base.lm_head(want.final).topk(4, -1)
    assert torch.equal(ids_BTk[counted_BT], top.indices[counted_BT])
    below = top.values - top.values[..., :1]
    torch.testing.assert_close(logits_BTk[counted_BT], below[counted_BT], rtol=1e-3, atol=1e-3)


def test_of_a_truncated_row_the_prefix_is_read_and_padding_is_zero(base: Any, tmp_path: Path) -> None:
    kept = opened(written(tmp_path / "all", base, dataclasses.replace(KEPT, counted=False, horizon=None)), base)
    short = kept.rows.select(np.array([3, 6])).truncated(4)
    seen, want = kept.seen_of(short, [[0, 1]], LENGTH), online(base, packed(short, [[0, 1]]))
    assert seen.final is not None
    assert want.final is not None
    torch.testing.assert_close(seen.final[:, :8], want.final[:, :8], rtol=1e-4, atol=1e-4)
    assert not seen.final[:, 8:].any()


def test_a_file_is_read_as_safetensors_reads_it(whole: Path) -> None:
    path = whole / store.shard_name(1)
    mine, told = store.mapped(path)
    theirs = load_file(path)
    assert {k: (v.dtype, v.tolist()) for k, v in mine.items()} == {k: (v.dtype, v.tolist()) for k, v in theirs.items()}
    assert told["store"].endswith(" 1")


def test_a_killed_capture_goes_on_and_leaves_the_same_bytes(base: Any, whole: Path, tmp_path: Path) -> None:
    first = job(tmp_path / "again", base)
    first.write(1)
    (first.out / ".captures-00000.tmp-99999999.safetensors").write_bytes(b"torn")
    assert not first.seal()
    said: list[str] = []
    second = job(tmp_path / "again", base)
    second.run(said.append)
    assert [line.split(":")[0] for line in said] == [store.shard_name(0), store.shard_name(2)]
    assert second.seal()
    assert not list(first.out.glob(".captures*"))
    files = artifacts.read_json(whole / "manifest.json")["files"]
    assert artifacts.verify(first.out)["files"] == files
    with pytest.raises(ConfigError, match="captures of another job"):
        job(first.out, base, dataclasses.replace(KEPT, dtype="bf16"))


def test_of_several_processes_each_writes_its_shards_and_the_last_seals(base: Any, whole: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / "both", base, rank=r, world=2) for r in range(2)]
    sealed = []
    for one in jobs:
        one.run(lambda text: None)
        sealed.append(one.seal())
    assert sealed == [False, True]
    assert artifacts.verify(tmp_path / "both")["files"] == artifacts.verify(whole)["files"]


# --- training from it


def batch_of(kept: Store, packs: list[list[int]]) -> Batch:
    batch = packed(kept.rows, packs)
    batch.counts_K = torch.from_numpy(kept.rows.counts(HORIZON)[[n for pack in packs for n in pack]].sum(0))
    batch.seen = kept.seen_of(kept.rows, packs, LENGTH)
    return batch


def test_who_looks_where_nothing_was_kept_is_found_out_before_step_1(base: Any, whole: Path) -> None:
    batch = batch_of(opened(whole, base), [[0, 1], [2, 3]])
    medusa = fit.new_head(Medusa, MedusaConfig(num_heads=2), "medusa", base, 0)
    kangaroo = fit.new_head(Kangaroo, KangarooConfig(exit_layer=1), "kangaroo", base, 0)
    assert medusa.reads_counted
    assert not kangaroo.reads_counted
    fit.rehearse(base, {"medusa": medusa}, batch)
    with pytest.raises(Diverged, match="kangaroo: the first batch's loss is nan"):
        fit.rehearse(base, {"kangaroo": kangaroo}, batch)


def test_the_base_is_not_asked_for_what_was_kept(base: Any, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from draftsmith.training.module import captured

    batch = batch_of(opened(whole, base), [[0, 1]])
    asked: list[Needs] = []
    real = base.capture
    monkeypatch.setattr(base, "capture", lambda needs, *args, **more: asked.append(needs) or real(needs, *args, **more))
    assert captured(base, NEEDS, batch) is batch.seen
    assert captured(base, NEEDS | Needs(teacher=True), batch) is batch.seen
    assert asked == []
    seen = captured(base, NEEDS | Needs(frozenset({0})), batch)
    assert (asked, sorted(seen.hidden)) == ([Needs(frozenset({0}))], [0, 1])


def test_reading_ahead_changes_nothing(base: Any, whole: Path) -> None:
    kept = opened(whole, base)
    steps = Steps(kept.rows, length=LENGTH, batch_size=2, accumulate=1, horizon=HORIZON, seed=1, store=kept)
    ahead = Ahead(steps, 9)
    for m in (3, 4, 5, 8, 2):  # in order, and not: a resumed run begins anywhere
        mine, theirs = ahead[m], steps[m]
        assert torch.equal(mine.tokens_BT, theirs.tokens_BT)
        assert mine.seen is not None
        assert theirs.seen is not None
        torch.testing.assert_close(mine.seen.final, theirs.seen.final, rtol=0, atol=0, equal_nan=True)


# --- what may not pass


def test_a_store_of_now_passes_the_comparison(base: Any, whole: Path) -> None:
    assert store.compare(opened(whole, base), base) == 8


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8"])
def test_so_does_a_compressed_one(base: Any, tmp_path: Path, dtype: str) -> None:
    kept = opened(written(tmp_path / dtype, base, dataclasses.replace(KEPT, dtype=dtype)), base)
    assert store.compare(kept, base) == 8


@pytest.mark.parametrize("name", ["final", "hidden.1", store.LOGITS])
def test_a_shard_that_is_off_by_one_position_does_not(base: Any, folder: Path, name: str) -> None:
    path = folder / store.shard_name(1)
    tensors, told = {k: v.clone() for k, v in store.mapped(path)[0].items()}, store.mapped(path)[1]
    save_file({**tensors, name: tensors[name].roll(1, 0)}, path, told)
    reseal(folder)
    with pytest.raises(DataError, match=r"captures-00001\.safetensors: row [4567] \(a:\d\): .* stale or shifted"):
        store.compare(opened(folder, base), base)


def refused(folder: Path, base: Any, first: str, resealed: str) -> None:
    """What is said of shard 2, and what when somebody has sealed the folder again."""
    for message in (first, resealed):
        with pytest.raises(DataError, match=rf"captures-00002\.safetensors: {message}"):
            opened(folder, base)
        reseal(folder)


def test_a_shard_of_another_base_is_named(base: Any, tiny_base: Any, folder: Path, tmp_path: Path) -> None:
    other = tiny_base("llama", seed=1)
    plan = {"base": identity(base.spec, "other"), "rows": {"sha": 1}, "store": store.identity(KEPT)}
    made = job(tmp_path / "theirs", other)
    made.plan = plan
    made.write(2)
    shutil.copyfile(made.out / store.shard_name(2), folder / store.shard_name(2))
    refused(folder, base, "content differs", "belongs to another store")


def test_a_shard_that_the_manifest_forgets_is_missed(base: Any, folder: Path) -> None:
    (folder / store.shard_name(2)).unlink()
    refused(folder, base, r"listed in manifest\.json but missing", r"is not in manifest\.json")


def test_another_base_is_told_by_what_differs(base: Any, whole: Path) -> None:
    with pytest.raises(DataError, match=r"another base.*\(weights_sha256 differ\)"):
        store.open_store(whole, identity(base.spec, "other"), base.spec, base.dtype)


def test_other_rows_than_those_captured_are_missed(base: Any, folder: Path) -> None:
    """Of the same lengths and masks, and sealed again: nothing else would tell."""
    rows = make_rows()
    other = [dataclasses.replace(row, ids=np.asarray(row.ids) // 2) for row in rows]
    shutil.rmtree(folder / store.ROWS)
    write_rows(folder / store.ROWS, other, base={})
    reseal(folder)
    with pytest.raises(DataError, match="other rows than those that were captured"):
        opened(folder, base)


def test_one_huge_position_does_not_hide_the_others(base: Any, folder: Path) -> None:
    """As the first one of a middle layer often is: a norm over the row would see nothing else."""
    path = folder / store.shard_name(1)
    tensors, told = store.mapped(path)
    new = {name: t.clone() for name, t in tensors.items()}
    new["hidden.1"] = new["hidden.1"].roll(1, 0)
    save_file(new, path, told)
    reseal(folder)
    capture = base.capture

    def huge(*args: Any, **how: Any) -> Capture:
        seen = capture(*args, **how)
        seen.hidden[1][:, 0] *= 1e4
        return seen

    kept = opened(folder, base)
    plain, base.capture = kept.seen, huge

    def seen(*args: Any) -> Capture:
        found = plain(*args)
        found.hidden[1][:, 0] *= 1e4
        return found

    kept.seen = seen  # type: ignore[method-assign]
    try:
        with pytest.raises(DataError, match="stale or shifted"):
            store.compare(kept, base)
    finally:
        base.capture = capture


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        *(
            len(text).to_bytes(8, "little") + text + bytes(64)
            for text in (
                b"[]",
                b"{",
                b'{"a": 1}',
                b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
                b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}',
                b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
                b'{"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}',
            )
        ),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_with_its_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "captures-00000.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"captures-00000\.safetensors: .*draftsmith capture wrote"):
        store.mapped(path)


def test_mapped_files_stay_closed(whole: Path) -> None:
    """A store of more shards than a process may hold files open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [store.mapped(whole / store.shard_name(0)) for _ in range(50)]
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 5
    assert len(held) == 50
