"""The whole loop, as `make quickstart` runs it: the tiny base is made, trained on, proven, exported."""

from __future__ import annotations

import json
import os
import re
from html import escape
from pathlib import Path

import pytest

from draftsmith import generate, load_base, load_head
from draftsmith.data import synthetic
from draftsmith.decoding.stats import Stats
from draftsmith.prepare import cache_dir

from .conftest import Fork, draftsmith, finish

HEADS = 3


FEWER = "evaluate=['threads=1','repeats=1','baselines=few','prompts.synthetic=36']"


@pytest.fixture(
    scope="module",
    params=[[FEWER], pytest.param([], marks=pytest.mark.slow)],  # twelve more prompts, twice: half a minute more
    ids=["timed once", "in full"],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its run directory and what it printed. The made base stays in the user's cache: made once, reused."""
    folder = tmp_path_factory.mktemp("quickstart")
    process = Fork("quickstart", *request.param, cwd=folder, DRAFTSMITH_CACHE=str(cache_dir()))
    code, output = finish(process, seconds=900)
    assert code == 0, output
    (found,) = (folder / "runs").iterdir()
    return found, output


def test_it_ends_with_the_table(run: tuple[Path, str]) -> None:
    lines = run[1].splitlines()
    head, columns = next((i, line) for i, line in enumerate(lines) if "tokens/step" in line and "mismatches" in line)
    assert columns.split() == ["parameters", "tokens/step", "tokens/s", "speedup", "mismatches"]
    assert [line.split()[0] for line in lines[head + 1 : head + 6]] == [
        "medusa", "prompt_lookup", "oracle", "no", "hf"
    ]  # fmt: skip
    for verb in ("train", "evaluate", "export"):
        assert f"$ draftsmith {verb}" in run[1]


def test_evaluation_json(run: tuple[Path, str]) -> None:
    result = json.loads((run[0] / "evaluation.json").read_text())
    head = result["heads"]["medusa"]
    proof = head["lossless"]
    assert proof["mismatches"] == 0
    assert proof["ok"]
    assert proof["prompts"] >= 32
    assert result["decoding"]["prompts"]["trained_on"] == 0
    assert proof["tokens"] >= 32 * 64
    assert set(proof["against"]) == {"autoregressive", "hf_generate"}
    assert head["tokens_per_step"] >= 2.7
    assert head["accepted_drafts_per_step"] == pytest.approx(head["tokens_per_step"] - 1)
    low, high = head["tokens_per_step_interval"]
    assert low < head["tokens_per_step"] < high
    assert sum(head["time"].values()) == pytest.approx(1)
    for kind in ("by_source", "by_turn", "by_context"):
        assert sum(part["steps"] for part in head[kind].values()) == head["steps"]
    product, tau = 1.0, 1.0
    for a in head["acceptance_by_depth"]:
        product *= a
        tau += product
    assert head["tokens_per_step"] == pytest.approx(tau)
    assert len(head["acceptance_by_depth"]) == HEADS
    plain = result["autoregressive"]["tokens_per_second"]
    assert head["speedup"] == pytest.approx(head["tokens_per_second"] / plain)
    assert result["baselines"]["prompt_lookup"]["tokens_per_step"] < head["tokens_per_step"]
    assert result["baselines"]["oracle"]["tokens_per_step"] == HEADS + 1  # every draft right
    assert result["autoregressive"]["distinct_4"] > 0.5  # not the looping text on which any look-up wins
    assert f"{head['tokens_per_step']:.2f}" in run[1]  # printed as written
    assert f"{head['speedup']:.2f}x" in run[1]


def test_the_report_tells_of_the_run_and_its_sample_is_the_text(run: tuple[Path, str]) -> None:
    result = json.loads((run[0] / "evaluation.json").read_text())
    head = result["heads"]["medusa"]
    html, markdown = (run[0] / "report.html").read_text(), (run[0] / "report.md").read_text()
    assert "report.html" in run[1]
    for text in (html, markdown):
        for figure in (f"{head['tokens_per_step']:.2f}", f"{head['speedup']:.2f}×", "lossless", "quickstart"):
            assert figure in text
    for part in ("By depth", "By context", "Loss", "top-1 by depth", "Training, seconds", "From rows to training"):
        assert part in html
    assert not set(re.findall(r"<(script|link|img|iframe)", html))
    base = load_base(result["base"]["path"])
    trained = load_head(run[0] / "heads" / "medusa", base=base)
    for one in head["samples"]:
        ids = base.tokenizer.encode(one["prompt"], add_special_tokens=False)
        assert base.tokenizer.decode(ids) == one["prompt"]  # control tokens are shown as themselves
        out = generate(base, ids, head=trained, max_new_tokens=128)
        steps = one["steps"]
        assert "".join("".join([*s["accepted"], s["own"]]) for s in steps) == base.tokenizer.decode(out.tokens)
        assert (len(steps) - 1, len(steps[0]["accepted"])) == (out.steps, 0)
        assert [len(s["accepted"]) for s in steps[1:-1]] == out.stats.kept[:-1]
        assert html.count(f">{escape(one['prompt'])}<") == (one is head["samples"][0])
    assert len(head["samples"]) == 3


def test_the_head_loads_and_changes_nothing(run: tuple[Path, str]) -> None:
    result = json.loads((run[0] / "evaluation.json").read_text())
    base = load_base(result["base"]["path"])
    head = load_head(run[0] / "heads" / "medusa", base=base)
    asked = [
        base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in synthetic.prompts(8, seed=4321)
    ]
    fast, plain = (generate(base, asked, head=h, max_new_tokens=64) for h in (head, None))
    assert [g.tokens for g in fast] == [g.tokens for g in plain]
    assert all(one.steps < other.steps for one, other in zip(fast, plain, strict=True))
    sums = [sum((g.stats for g in texts), Stats()) for texts in (fast, plain)]
    assert sums[0].tokens_per_step > 2 > sums[1].tokens_per_step == 1  # a single text may be one the base is lost in
    alone = generate(base, asked[0], head=head, max_new_tokens=64)
    assert (alone.tokens, alone.steps) == (fast[0].tokens, fast[0].steps)


def test_train_alone_is_self_sufficient_and_finds_base_and_rows(run: tuple[Path, str], tmp_path: Path) -> None:
    """The base and its rows are there by now, so nothing is made again; fewer steps are another run."""
    own = {"DRAFTSMITH_CACHE": str(cache_dir())}
    code, output = draftsmith("train", "experiment=quickstart", "trainer.max_steps=2", cwd=tmp_path, **own)
    assert code == 0, output
    assert "making the base" not in output
    assert "the base answers" not in output
    (other,) = os.listdir(tmp_path / "runs")
    assert other.startswith("quickstart-")
    assert other != run[0].name
