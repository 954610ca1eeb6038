"""Acceptance labels: the closed form, the sampling, the alignment, and the folder they are kept in."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from draftsmith import artifacts
from draftsmith.contracts import BaseSpec, Needs
from draftsmith.data import labels
from draftsmith.data.labels import LabelsConfig, acceptance, acceptance_of, log_draft, uniforms
from draftsmith.data.rows import Row, read_table, write_rows
from draftsmith.errors import ConfigError, DataError, DraftsmithError, NumericsError
from draftsmith.growth import draw

V, T, PROMPT = 16, 14, 4


def some_logits(rows: int, width: int, seed: int) -> Tensor:
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_rows(count: int, seed: int = 0, longest: int = T) -> list[Row]:
    random = np.random.default_rng(seed)
    lengths = random.integers(PROMPT + 2, longest + 1, count)
    return [Row(f"r{n}", random.integers(0, V, k), [0] * PROMPT + [1] * (k - PROMPT)) for n, k in enumerate(lengths)]


@pytest.fixture(scope="module")
def pair(tiny_base: Any) -> tuple[Any, Any]:
    """(base, companion) with other random weights and V tokens."""
    return tiny_base("llama", 0, vocab_size=V), tiny_base("llama", 7, vocab_size=V)


def exact(base: Any, prefix: Any) -> Tensor:
    """The next token's distribution [V] in fp64, from a forward of this prefix alone."""
    out = base.in_float64().capture(Needs(logits=True), torch.as_tensor(np.array(prefix, np.int64))[None]).logits
    return out[0, -1].softmax(-1)


# --- pure functions


@pytest.mark.parametrize(("base_v", "draft_v"), [(16, 16), (16, 24), (24, 16)])
def test_the_expected_label_is_one_minus_the_total_variation(base_v: int, draft_v: int) -> None:
    """METHODS' identity, summed over every token; what only one of the two has is never drawn."""
    p_logits, q_logits = some_logits(50, base_v, 1), some_logits(50, draft_v, 2)
    log_q = log_draft(q_logits, base_v)
    width = min(base_v, draft_v)
    assert log_q.shape == (50, width)
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(50, dtype=torch.float64))
    expected = sum(
        log_q.exp()[:, y] * acceptance_of(p_logits, log_q, torch.full((50,), y)) for y in range(width)
    )  # fmt: skip
    p, q = p_logits.softmax(-1), torch.zeros(50, base_v, dtype=torch.float64)
    q[:, :width] = q_logits[:, :width].softmax(-1)
    torch.testing.assert_close(expected, torch.minimum(p, q).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(expected, 1 - (p - q).abs().sum(-1) / 2, rtol=0, atol=1e-12)


def test_drawn_tokens_follow_q_and_their_labels_average_to_the_closed_form() -> None:
    draws = 20_000
    p_logits, q_logits = some_logits(1, V, 3), some_logits(1, V, 4)
    log_q = log_draft(q_logits, V)
    u = torch.from_numpy(uniforms(0, "a row", draws)[:, 0])
    tokens = draw(log_q.exp().expand(draws, V), u)
    q = log_q[0].exp()
    share = tokens.bincount(minlength=V) / draws
    assert ((share - q).abs() <= 4.5 * (q * (1 - q) / draws).sqrt()).all()
    per_token = torch.minimum(torch.ones(V, dtype=torch.float64), p_logits.softmax(-1)[0] / q)
    a = acceptance_of(p_logits.expand(draws, V), log_q.expand(draws, V), tokens)
    mean = float((q * per_token).sum())
    error = math.sqrt(float((q * per_token**2).sum()) - mean**2) / math.sqrt(draws)
    assert abs(float(a.mean()) - mean) <= 4 * error


def test_inversion_never_draws_what_has_no_probability() -> None:
    log_q = torch.tensor([[-math.inf, 0.5, -math.inf, 0.5, -math.inf]], dtype=torch.float64).log_softmax(-1)
    edges = torch.tensor([0.0, 0.49, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(log_q.exp().expand(4, 5), edges).tolist() == [1, 1, 3, 3]


def test_random_numbers_follow_from_seed_row_and_position_alone() -> None:
    long, short = uniforms(5, "x", 40), uniforms(5, "x", 7)
    assert (long[:7] == short).all()
    assert ((long >= 0) & (long < 1)).all()
    assert not (uniforms(6, "x", 7) == short).any()
    assert not (uniforms(5, "y", 7) == short).any()
    assert uniforms(5, "x", 0).shape == (0, 2)
    # as first made with numpy 2: another version must continue a folder, not mix two
    np.testing.assert_array_equal(uniforms(0, "a", 1), [[0.4737799616017301, 0.7513537496165887]])


# --- whole rows


def test_labels_are_aligned_with_a_slow_oracle_in_fp64(pair: tuple[Any, Any]) -> None:
    """Token and label at i come from the prefix X_<i alone; a prefix one shorter or longer gives other numbers."""
    rows, config = some_rows(6), LabelsConfig(seed=3, batch_size=4)
    out = acceptance(*pair, rows, config).to_pylist()
    apart = {-1: 0.0, 1: 0.0}
    labelled = 0
    for row, made in zip(rows, out, strict=True):
        u = uniforms(3, row.id, len(row.ids))
        for i in range(len(row.ids)):
            if not row.mask[i] or u[i, 1] < config.mixing:
                assert (made["mask"][i], made["ids"][i]) == (0, row.ids[i])
                assert math.isnan(made["accept"][i])
                continue
            labelled += 1
            p, q = (exact(model, row.ids[:i]) for model in pair)
            y = int((q.cumsum(0) <= u[i, 0]).sum())
            assert (made["mask"][i], made["ids"][i]) == (1, y)
            assert abs(made["accept"][i] - min(1.0, float(p[y] / q[y]))) <= 1e-5
            for shift in apart:
                p, q = (exact(model, row.ids[: i + shift]) for model in pair)
                apart[shift] = max(apart[shift], abs(made["accept"][i] - min(1.0, float(p[y] / q[y]))))
        assert made["base_ids"] == list(row.ids)
    assert labelled > 20
    assert min(apart.values()) > 0.1


def test_many_rows_average_to_the_closed_form_at_each_position(pair: tuple[Any, Any]) -> None:
    """2000 rows of one text, so that every position is drawn about 1700 times, 20,000 in all."""
    ids = [2, 7, 1, 8, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    mask = [0] * PROMPT + [1] * 10
    rows = [Row(f"n{n}", ids, mask) for n in range(2000)]
    table = acceptance(*pair, rows, LabelsConfig(batch_size=500))
    accept = np.array(table.column("accept").to_pylist())
    for i in range(PROMPT, len(ids)):
        p, q = (exact(model, ids[:i]) for model in pair)
        ratio = torch.minimum(torch.ones_like(p), p / q)
        mean = float(torch.minimum(p, q).sum())
        seen = accept[:, i][~np.isnan(accept[:, i])]
        error = math.sqrt(float((q * ratio**2).sum()) - mean**2) / math.sqrt(len(seen))
        assert abs(seen.mean() - mean) <= 4 * error, i
    answers = accept[:, PROMPT:]
    assert answers.size == 20_000
    assert abs(np.isnan(answers).mean() - 0.15) <= 4 * math.sqrt(0.15 * 0.85 / answers.size)
    assert np.isnan(accept[:, :PROMPT]).all()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_decides_nothing(pair: tuple[Any, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(17, seed=2)
    whole = acceptance(*pair, rows, LabelsConfig(batch_size=8))
    monkeypatch.setattr(labels, "LOGITS", 5 * V)  # five positions at a time
    out = acceptance(*pair, list(reversed(rows)), LabelsConfig(batch_size=batch_size)).to_pylist()[::-1]
    for a, b in zip(whole.to_pylist(), out, strict=True):
        assert (a["id"], a["ids"], a["mask"]) == (b["id"], b["ids"], b["mask"])
        np.testing.assert_allclose(a["accept"], b["accept"], rtol=0, atol=1e-5)


def test_a_companion_that_is_the_base_is_always_accepted(pair: tuple[Any, Any]) -> None:
    table = acceptance(pair[0], pair[0], some_rows(5), LabelsConfig(mixing=0))
    accept = table.column("accept").combine_chunks().flatten().to_numpy()
    mask = table.column("mask").combine_chunks().flatten().to_numpy()
    assert mask.sum() == sum(sum(r.mask) for r in some_rows(5))
    np.testing.assert_allclose(accept[mask == 1], 1, atol=1e-6)


def test_a_larger_companion_vocabulary_is_cut_to_the_bases(tiny_base: Any) -> None:
    base, padded = tiny_base("llama", 0, vocab_size=V), tiny_base("llama", 7, vocab_size=V + 8)
    rows = some_rows(40, seed=4)
    made = acceptance(base, padded, rows, LabelsConfig()).to_pylist()
    assert max(max(m["ids"]) for m in made) < V
    row, out = rows[0], made[0]
    at = next(i for i, m in enumerate(out["mask"]) if m)
    p, q = exact(base, row.ids[:at]), exact(padded, row.ids[:at])[:V]
    y = out["ids"][at]
    assert abs(out["accept"][at] - min(1.0, float(p[y] / (q[y] / q.sum())))) <= 1e-5


def test_what_has_no_prefix_or_no_answer_has_no_label(pair: tuple[Any, Any]) -> None:
    rows = [Row("first", [1, 2, 3], [1, 1, 1]), Row("none", [4, 5], [0, 0]), Row("", [1], [1])]
    made = acceptance(*pair, rows, LabelsConfig(mixing=0)).to_pylist()
    assert [m["mask"] for m in made] == [[0, 1, 1], [0, 0], [0]]
    assert made[0]["ids"][0] == 1


def test_rows_that_cannot_be_read_are_named(pair: tuple[Any, Any], tiny_base: Any) -> None:
    base, companion = pair
    short = tiny_base("llama", 7, vocab_size=V, max_position_embeddings=8)
    with pytest.raises(DataError, match=r"chats\.jsonl:3: 9 tokens.*at most 8"):
        acceptance(base, short, [Row("a", [1] * 9, [0] + [1] * 8, source="chats.jsonl:3")], LabelsConfig())
    with pytest.raises(DataError, match="token id 16"):
        acceptance(base, companion, [Row("a", [1, V, 2], [0, 1, 1])], LabelsConfig(mixing=0))


@pytest.mark.parametrize("broken", [0, 1])
def test_logits_that_are_no_numbers_stop_the_job(pair: tuple[Any, Any], tiny_base: Any, broken: int) -> None:
    models = [pair[0], pair[1]]
    models[broken] = type(pair[0])(copy.deepcopy(pair[broken].model))
    with torch.no_grad():
        models[broken].lm_head_weight.fill_(math.nan)
    with pytest.raises(NumericsError, match="row a"):
        acceptance(*models, [Row("a", [1, 2, 3], [0, 1, 1])], LabelsConfig(mixing=0))


# --- settings, pairs, folders


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "judge"}, "kind='judge'"),
        ({"mixing": 1.0}, "mixing=1.0"),
        ({"mixing": -0.1}, "mixing=-0.1"),
        ({"mixing": math.nan}, "mixing=nan"),
        ({"answer": "sum"}, "answer='sum'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_mismatches": 0}, "max_mismatches=0"),
    ],
)
def test_settings_out_of_range_name_the_key(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelsConfig(**values)


def spec(vocab: int, tokenizer: str) -> BaseSpec:
    return BaseSpec("llama", 8, 8, vocab, 1, 1, 1, 8, 64, tokenizer_sha256=tokenizer)


@pytest.mark.parametrize(
    ("base", "companion", "fits"),
    [
        (spec(16, "a"), spec(16, "a"), True),
        (spec(16, "a"), spec(24, "a"), True),  # an lm head padded to a round size
        (spec(16, "a"), spec(16, "b"), False),
        (spec(16, "a"), spec(16, ""), False),
        (spec(16, ""), spec(16, ""), True),
        (spec(16, ""), spec(24, ""), False),
    ],
)
def test_a_companion_must_speak_the_bases_ids(base: BaseSpec, companion: BaseSpec, fits: bool) -> None:
    if fits:
        labels.check_pair(base, companion)
        return
    with pytest.raises(DataError, match="companion"):
        labels.check_pair(base, companion)


PLAN: dict[str, dict] = {"rows": {"manifest_sha256": "r"}, "base": {"weights_sha256": "b"}, "labels": {"mixing": 0.15}}


def job(pair: tuple[Any, Any], folder: Path, plan: dict = PLAN) -> tuple[dict, list[str]]:
    said: list[str] = []
    made = labels.label_folder(
        folder / "rows", folder / "out", plan, {}, lambda rows: acceptance(*pair, rows, LabelsConfig()), said.append
    )
    return made, said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """rows/: 10 rows in shards of four."""
    monkeypatch.setattr("draftsmith.data.rows.SHARD_ROWS", 4)
    write_rows(tmp_path / "rows", some_rows(10))
    (tmp_path / "out").mkdir()
    return tmp_path


def test_a_folder_resumes_to_the_same_bytes(pair: tuple[Any, Any], folder: Path) -> None:
    told, said = job(pair, folder)
    out = folder / "out"
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert len(said) == 3
    assert sorted(first) == ["manifest.json", "plan.json", *(f"rows-0000{n}.parquet" for n in range(3))]
    kept = (out / "rows-00000.parquet").stat().st_mtime_ns
    (out / "manifest.json").unlink()
    (out / "rows-00001.parquet").unlink()
    (out / ".rows-00001.tmp-99999999.parquet").write_text("half")
    assert len(job(pair, folder)[1]) == 1
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert (out / "rows-00000.parquet").stat().st_mtime_ns == kept
    again, said = job(pair, folder)
    assert (again["counts"], again["mean_label"]) == (told["counts"], told["mean_label"])
    assert said == [f"{out}: already complete"]


def test_the_manifest_counts_what_the_shards_hold(pair: tuple[Any, Any], folder: Path) -> None:
    told, _ = job(pair, folder)
    table, facts = read_table(folder / "out")
    accept = table.column("accept").combine_chunks().flatten().to_numpy()
    rows = some_rows(10)
    assert facts["kind"] == "labels"
    assert told["counts"] == facts["counts"] == {
        "rows": 10,
        "tokens": sum(len(r.ids) for r in rows),
        "answer_tokens": sum(sum(r.mask) for r in rows),
        "labelled": int((~np.isnan(accept)).sum()),
    }  # fmt: skip
    assert facts["mean_label"] == pytest.approx(float(np.nanmean(accept.astype(np.float64))))


def test_another_plan_is_refused_by_name(pair: tuple[Any, Any], folder: Path) -> None:
    job(pair, folder)
    with pytest.raises(ConfigError, match=r"out: .*labels\.mixing: 0\.15 -> 0\.5\)"):
        job(pair, folder, {**PLAN, "labels": {"mixing": 0.5}})
    with pytest.raises(ConfigError, match=r"base\.weights_sha256: b -> c"):
        job(pair, folder, {**PLAN, "base": {"weights_sha256": "c"}})


def test_a_folder_of_something_else_is_left_alone(pair: tuple[Any, Any], folder: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), folder / "out" / "rows-00000.parquet")
    with pytest.raises(ConfigError, match="something else"):
        job(pair, folder)
    assert not (folder / "out" / "plan.json").exists()


def test_a_damaged_complete_folder_is_said_to_be_so(pair: tuple[Any, Any], folder: Path) -> None:
    job(pair, folder)
    (folder / "out" / "rows-00002.parquet").write_bytes(b"x")
    with pytest.raises(DraftsmithError, match=r"rows-00002\.parquet"):
        job(pair, folder)
    assert artifacts.is_complete(folder / "out")
