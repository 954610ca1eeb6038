"""metrics.jsonl after a kill, and what a signal does."""

import json
import os
import signal
from pathlib import Path

import pytest

from draftsmith.training.callbacks import Checkpoints, Events, truncate
from draftsmith.training.clock import Clock


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": s, "train/a/loss": s / 2}) + "\n" for s in steps)


@pytest.mark.parametrize(
    ("content", "step", "want"),
    [
        (lines(1, 2, 3), 2, lines(1, 2)),
        (lines(1, 2, 3), 3, lines(1, 2, 3)),
        (lines(1, 2, 3), 0, ""),
        (lines(10, 20), 15, lines(10)),
        ("", 5, ""),
        (lines(1, 2) + '{"step": 3, "train/a/lo', 5, lines(1, 2)),
        (lines(1, 2) + '{"step": 3}', 5, lines(1, 2) + '{"step": 3}\n'),  # whole but for the line's end
        (lines(1) + "\x00\x00\x00\n" + lines(3), 5, lines(1)),
        (lines(1) + "3\n", 5, lines(1)),
        (lines(1) + "null\n", 5, lines(1)),
        (lines(1) + "{}\n", 5, lines(1)),
        (lines(1) + '{"step": "x"}\n', 5, lines(1)),
    ],
)
def test_truncate(tmp_path: Path, content: str, step: int, want: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    truncate(path, step)
    assert path.read_text() == want
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncate_what_is_not_utf8(tmp_path: Path) -> None:
    """A torn write may end inside a character."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1).encode() + '{"step": 2, "é'.encode()[:-1])
    truncate(path, 5)
    assert path.read_text() == lines(1)


def test_truncate_without_a_file(tmp_path: Path) -> None:
    truncate(tmp_path / "none", 3)
    assert os.listdir(tmp_path) == []


def test_a_start_after_a_torn_line_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path, Clock())
    events.write("started", 0, of=4, processes=1)
    with path.open("a") as f:
        f.write('{"time": "20')  # a kill in the middle of a write
    events.write("started", 2, of=4, processes=1)
    events.write("complete", 4, seconds={"base": 1.0})
    first, torn, *rest = path.read_text().splitlines()
    assert torn == '{"time": "20'
    assert [(e["event"], e["step"]) for e in map(json.loads, (first, *rest))] == [
        ("started", 0),
        ("started", 2),
        ("complete", 4),
    ]


def test_a_second_signal_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    callback = Checkpoints(tmp_path, 10, 2, {})
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with callback.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert (callback.asked, left) == (signal.SIGTERM, [])  # the first one only leaves a note
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [75]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert os.listdir(tmp_path) == []


def test_handlers_go_back_after_an_exception(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    callback = Checkpoints(tmp_path, 10, 2, {})
    with pytest.raises(ZeroDivisionError), callback.listening():
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
