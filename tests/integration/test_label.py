"""draftsmith label as a user runs it: both kinds, resume, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from draftsmith.base import create, lm
from draftsmith.data import synthetic
from draftsmith.data.rows import Row, read_folder, read_table, write_rows

from .conftest import SHAPE, call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, draft/ with its tokenizer, other/ with another one, and rows/: 10 rows in shards of four."""
    folder = tmp_path_factory.mktemp("label")
    chats = list(synthetic.dialogues(40, seed=5))
    for name, seed, vocab in (("base", 0, 400), ("draft", 1, 400), ("other", 1, 380)):
        tokenizer = synthetic.train_tokenizer(chats, vocab)
        (folder / name).mkdir()
        create.save(create.llama({**SHAPE, "initializer_range": 0.3}, tokenizer, seed), tokenizer, folder / name)
    random = np.random.default_rng(0)
    rows = [
        Row(f"r{n}", random.integers(10, 300, k), [0] * 6 + [1] * (k - 6), source=f"prompts.jsonl:{n + 1}")
        for n, k in enumerate(random.integers(20, 40, 10).tolist())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("draftsmith.data.rows.SHARD_ROWS", 4)
        write_rows(folder / "rows", rows, base=dataclasses.asdict(lm.load(str(folder / "base")).spec))
    return folder


def label(folder: Path, out: str, *more: str, **chosen: str) -> tuple[int, str]:
    names = {"base": "base", "companion": "draft", **chosen}
    overrides = [f"{role}={what}" for role, name in names.items() for what in ("hf",)]
    overrides += [f"{role}.path={folder / name}" for role, name in names.items()]
    return call("label", *overrides, f"rows={folder / 'rows'}", f"out={folder / out}", *more, cwd=folder)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}


def test_acceptance_resumes_says_when_it_is_complete_and_refuses_another_plan(folder: Path) -> None:
    code, output = label(folder, "accept")
    assert code == 0, output
    assert "10 rows" in output
    out = folder / "accept"
    first = bytes_of(out)
    table, facts = read_table(out, lm.load(str(folder / "base")).spec)
    assert (facts["kind"], facts["labels"]["mixing"], facts["counts"]["rows"]) == ("labels", 0.15, 10)
    assert facts["companion"]["path"] == str(folder / "draft")
    accept = table.column("accept").combine_chunks().flatten().to_numpy()
    assert facts["mean_label"] == pytest.approx(float(np.nanmean(accept.astype(np.float64))))
    assert 0 < facts["mean_label"] < 1
    before, _ = read_folder(folder / "rows")
    assert table.column("base_ids").to_pylist() == [list(r.ids) for r in before]
    assert table.column("source").to_pylist() == before.text("source")

    (out / "manifest.json").unlink()
    (out / "rows-00001.parquet").unlink()
    code, output = label(folder, "accept")
    assert code == 0, output
    assert "rows-00001" in output
    assert "rows-00000" not in output
    assert bytes_of(out) == first

    code, output = label(folder, "accept", "labels.batch_size=3")  # how fast, not what
    assert code == 0, output
    assert "already complete" in output

    code, output = label(folder, "accept", "labels.mixing=0.3")
    assert code == 2
    assert "labels.mixing: 0.15 -> 0.3" in output
    assert "Traceback" not in output
    code, output = label(folder, "accept", companion="base")
    assert code == 2
    assert "companion.weights_sha256" in output
    assert bytes_of(out) == first


def test_importance_writes_its_lists(folder: Path) -> None:
    more = ("labels.kind=importance", "labels.max_new_tokens=12", "labels.max_mismatches=3", "labels.answer=text")
    code, output = label(folder, "important", *more)
    assert code == 0, output
    facts = json.loads((folder / "important" / "manifest.json").read_text())
    made: list[dict[str, Any]] = []
    for n in range(3):
        made += pq.read_table(folder / "important" / f"rows-{n:05d}.parquet").to_pylist()
    assert facts["counts"]["labelled"] == sum(len(m["important"]) for m in made) > 0
    assert facts["counts"]["rows_cut"] == sum(m["cut"] for m in made)
    assert facts["counts"]["answer_tokens"] == sum(sum(m["mask"]) for m in made)
    assert max(len(m["important"]) for m in made) <= 3


@pytest.mark.parametrize(
    ("more", "chosen", "code", "message"),
    [
        ((), {"companion": "other"}, 3, "another tokenizer"),
        ((), {"base": "other"}, 3, "another tokenizer"),
        (("labels.mixing=2",), {}, 2, "labels: mixing=2"),
        (("labels.kind=judge",), {}, 2, "kind='judge'"),
        (("labels.mixin=0.1",), {}, 2, "did you mean 'labels.mixing'"),
        (("out=${rows}",), {}, 2, "the folder of rows itself"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    folder: Path, more: tuple[str, ...], chosen: dict[str, str], code: int, message: str
) -> None:
    got, output = label(folder, "refused", *more, **chosen)
    assert (got, output.count("error:")) == (code, 1), output
    assert message in output
    assert not (folder / "refused").exists()


def test_labels_are_no_rows_to_label_again(folder: Path) -> None:
    code, output = label(folder, "once", "labels.mixing=0")
    assert code == 0, output
    code, output = label(folder, "twice", f"rows={folder / 'once'}")
    assert code == 3
    assert "holds labels" in output
