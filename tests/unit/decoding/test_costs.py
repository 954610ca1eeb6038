"""The yardstick reads what decoding that accepts everything would read, and times fairly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding import costs
from draftsmith.decoding.engine import generate


class Counting:
    """A base that writes down every forward: which K/V it had read before, and what it read now."""

    lm_head_weight = torch.zeros(1)

    def __init__(self) -> None:
        self.read: list[tuple[list[int], list[int]]] = []
        self.head_rows: list[int] = []

    def new_kv(self) -> list[int]:
        return []

    def capture(self, needs: Any, tokens_BQ: torch.Tensor, *, kv: list[int]) -> Capture:
        assert needs == costs.FINAL
        assert not torch.is_grad_enabled()
        (tokens,) = tokens_BQ.tolist()
        self.read.append((list(kv), tokens))
        kv += tokens
        return Capture(final=torch.zeros(1, len(tokens), 3))

    def lm_head(self, final_BQD: torch.Tensor) -> torch.Tensor:
        self.head_rows.append(final_BQD.shape[1])
        return final_BQD


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (1, [[10], [11], [12], [13], [14]]),
        (2, [[10, 11], [12, 13], [14]]),  # the last may be shorter
        (5, [[10, 11, 12, 13, 14]]),
        (9, [[10, 11, 12, 13, 14]]),
    ],
)
def test_every_prompt_then_its_text_in_pieces(size: int, pieces: list[list[int]]) -> None:
    """The text's last token is not read: nobody asks what follows it."""
    base = Counting()
    work = costs.forwards(base, [[1, 2, 3], [4]], [[10, 11, 12, 13, 14, 15], [20]], size)  # type: ignore[arg-type]
    assert not base.read  # nothing happens before it is asked
    assert work() >= 0
    assert [tokens for _, tokens in base.read] == [[1, 2, 3], *pieces, [4]]
    before: list[int] = []
    for held, tokens in base.read[:-1]:
        assert held == before
        before = held + tokens
    assert base.read[-1] == ([], [4])  # each prompt has a K/V of its own
    assert base.head_rows == [1, *map(len, pieces), 1]  # of a prompt, the last position alone
    work()
    assert base.read[len(base.read) // 2 :] == base.read[: len(base.read) // 2]  # again, from the start


def test_forwards_of_one_are_those_of_plain_decoding(toy_base: Any) -> None:
    base, prompts = toy_base(), [[1, 3, 2, 2, 3, 0], [4, 1]]
    texts = [generate(base, prompt, max_new_tokens=9).tokens for prompt in prompts]
    plain = (list(base.forwards), list(base.head_rows))
    base.forwards, base.head_rows = [], []
    costs.forwards(base, prompts, texts, 1)()
    assert (base.forwards, base.head_rows) == plain


def test_works_take_turns_after_one_warm_up_each() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def one() -> float:
            calls.append(name)
            return seconds + calls.count(name)

        return one

    told = costs.timed({name: work(name, own) for name, own in (("a", 10), ("b", 20), ("c", 30))}, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert told == {"a": [12, 13, 14, 15], "b": [22, 23, 24, 25], "c": [32, 33, 34, 35]}  # the warm-up is not told
