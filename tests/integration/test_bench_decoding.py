"""draftsmith bench_decoding on the micro base: every figure is there, adds up, and other tokens are no success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.base import lm
from draftsmith.decoding import costs

from .conftest import call

TINY = ["bench.prompts=2", "bench.max_new_tokens=9", "bench.depth=2", "bench.sizes=[2,4]", "bench.repeats=2"]


def bench(micro: Path, folder: Path, *more: str) -> tuple[int, str]:
    return call("bench_decoding", "base=hf", f"base.path={micro / 'base'}", *TINY, "run_dir=out", *more, cwd=folder)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "bench_decoding.json").read_text())


def test_files_and_figures(micro: Path, tmp_path: Path) -> None:
    code, output = bench(micro, tmp_path)
    assert code == 0, output
    found = told(tmp_path)
    assert set(found) == {
        "tokens_per_second", "plain_over", "oracle", "plain_share", "oracle_share", "forward_cost", "tokens", "settings"
    }  # fmt: skip
    assert set(found["tokens_per_second"]) == {"plain", "hf_generate", "bare_loop", "oracle"}
    assert min(found["tokens_per_second"].values()) > 0
    assert set(found["plain_over"]) == {"hf_generate", "bare_loop"}
    oracle = found["oracle"]
    assert oracle["depth"] == 2
    assert 0.5 * oracle["share"] < oracle["speedup"] / oracle["allowed"] < 2 * oracle["share"]  # medians of ratios
    assert oracle["speedup"] > 0
    assert list(found["forward_cost"]) == ["1", "2", "3", "4"]  # one token, and as many as the oracle has, always
    assert found["forward_cost"]["1"] == 1
    assert found["plain_share"] > 0
    assert found["tokens"] == {"compared": 18, "different": {"hf_generate": 0, "bare_loop": 0, "oracle": 0}}
    assert found["settings"]["sizes"] == [2, 4]
    assert (found["settings"]["max_new_tokens"], found["settings"]["threads"]) == (9, 1)
    for line in ("tokens/s   plain ", "plain decoding is ", "oracle of depth 2: ", "c(q)/c(1)  1: 1.00, 2: "):
        assert line in output
    assert "-> out/bench_decoding.json" in output


def test_the_cost_of_so_many_tokens_is_of_whole_pieces(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards of q tokens that take q + 1 seconds. Of the 8 tokens of a text that are read, 3 go in twice and 5 once;
    what the oracle is allowed has a shorter last piece."""

    def forwards(base: Any, prompts: Any, texts: Any, size: int) -> Any:
        read = [t[:-1] for t in texts]
        pieces = [len(t[i : i + size]) for t in read for i in range(0, len(t), size)]
        return lambda: sum(len(p) + 1.0 for p in prompts) + sum(n + 1.0 for n in pieces)

    monkeypatch.setattr(costs, "forwards", forwards)
    code, output = bench(micro, tmp_path, "bench.sizes=[5,8]")
    assert code == 0, output
    found = told(tmp_path)
    assert found["forward_cost"] == pytest.approx({"1": 1, "3": 4 / 2, "5": 6 / 2, "8": 9 / 2})
    assert found["oracle"]["allowed"] > 1


def test_other_tokens_end_it_after_they_are_told(micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32; in bf16 rounding decides, and the count is told."""

    def others(model: Any, prompt: Any, max_new_tokens: int) -> list[int]:
        return [7] * max_new_tokens

    monkeypatch.setattr(lm, "bare_loop", others)
    code, output = bench(micro, tmp_path)
    assert code == 4
    assert "'bare_loop': 2" in output
    assert "of 2 texts are others than plain ones" in output
    assert told(tmp_path)["tokens"]["different"] == {"hf_generate": 0, "bare_loop": 2, "oracle": 0}
    code, output = bench(micro, tmp_path, "base.dtype=bfloat16", "bench.repeats=1")
    assert code == 0, output
    assert told(tmp_path)["tokens"]["different"]["bare_loop"] == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("bench.prompts=0", "bench.prompts=0: give at least 1"),
        ("bench.max_new_tokens=1", "bench.max_new_tokens=1: give at least 2"),
        ("bench.depth=0", "bench.depth=0: give at least 1"),
        ("bench.sizes=[]", "bench.sizes=[]: give numbers of tokens"),
        ("bench.sizes=[0]", "bench.sizes=[0]: give numbers of tokens"),
        ("bench.sizes=[9]", "bench.sizes=[9]: give numbers of tokens from 1 to 8, all that is read"),
        ("bench.depth=8", "bench.depth=8: give less than bench.max_new_tokens=9 - 1"),
        ("bench.max_new_tokens=999", "max_new_tokens: prompt 0 has"),
    ],
)
def test_settings_that_cannot_be(micro: Path, tmp_path: Path, override: str, says: str) -> None:
    code, output = bench(micro, tmp_path, override)
    assert code == 2, output
    assert says in output
    assert not (tmp_path / "out" / "bench_decoding.json").exists()
