"""A peak that was rehearsed in small is that of the large work."""

import random
from collections.abc import Mapping

import pytest
import torch

from draftsmith.training.tracing import Trace, Unset, _at_peak, estimated


def work(sizes: Mapping[str, int]) -> Trace:
    """A linear layer with its gradient, whose input is kept and whose output is squared."""
    weight = torch.randn(sizes["V"], sizes["D"], requires_grad=True)
    x = torch.randn(sizes["B"], sizes["T"], sizes["D"])
    with Trace([weight, x]) as trace:
        (x @ weight.t()).square().sum().backward()
    return trace


def peak(trace: Trace) -> int:
    now = most = 0
    for event in trace.events:
        now += trace.nbytes[abs(event) - 1] * (1 if event > 0 else -1)
        most = max(most, now)
    return most


SMALL = {"B": 2, "T": 8, "D": 4, "V": 6}


@pytest.mark.parametrize("large", [{"B": 2, "T": 64, "D": 40, "V": 7}, {"B": 3, "T": 16, "D": 8, "V": 600}])
def test_the_large_peak_and_its_products_follow_from_the_small_runs(large: dict[str, int]) -> None:
    told, really = estimated(work, SMALL, large, None), work(large)
    assert told.peak == pytest.approx(peak(really), rel=0.001)
    assert told.flops == pytest.approx(sum(really.flops), rel=0.001)
    assert told.flops == 2 * 2 * large["B"] * large["T"] * large["D"] * large["V"]
    assert told.logits == 0


def test_a_size_that_grows_by_a_line_is_followed() -> None:
    def one_more(sizes: Mapping[str, int]) -> Trace:
        with Trace() as trace:
            torch.zeros(sizes["B"], sizes["T"] + 1)
        return trace

    assert estimated(one_more, {"B": 2, "T": 8}, {"B": 2, "T": 800}, None).peak == pytest.approx(4 * 2 * 801)


def test_other_steps_at_another_size_are_an_error() -> None:
    def ragged(sizes: Mapping[str, int]) -> Trace:
        with Trace() as trace:
            for _ in range(sizes["T"]):
                torch.zeros(4)
        return trace

    with pytest.raises(AssertionError, match="other steps at twice T"):
        estimated(ragged, {"B": 1, "T": 2}, {"B": 1, "T": 4}, None)


def test_the_peak_is_where_most_is_held_at_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 9) for _ in range(6)]
        parts = [rng.choice(["gradients", "activations", "logits"]) for _ in sizes]
        events, alive = [], []
        for n in range(len(sizes)):
            events.append(n + 1)
            alive.append(n)
            while alive and rng.random() < 0.4:
                events.append(-alive.pop(rng.randrange(len(alive))) - 1)
        held, most = 0, 0
        for event in events:
            held += sizes[abs(event) - 1] * (1 if event > 0 else -1)
            most = max(most, held)
        assert sum(_at_peak(events, [float(s) for s in sizes], parts).values()) == most


def test_modules_made_unset_draw_nothing() -> None:
    with torch.device("meta"), Unset():
        made = torch.nn.Embedding(3, 4)
    assert made.weight.shape == (3, 4)
    state = torch.get_rng_state()
    with Unset():
        torch.nn.Linear(3, 4)
    assert torch.get_rng_state().equal(state)
