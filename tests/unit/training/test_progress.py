"""What the one who watches a training sees: a bar on a terminal, lines elsewhere, nothing from other processes."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from draftsmith.training.clock import Clock
from draftsmith.training.progress import Progress

MEASURED = {
    "train/medusa/loss": 1.5,
    "train/medusa/top1/1": 0.625,
    "train/medusa/top1/2": 0.5,
    "train/medusa/tokens_per_step": 1.9375,
    "train/gate/loss": 0.25,
}


def module(steps: int = 20) -> Any:
    return SimpleNamespace(
        steps=steps,
        start=0,
        log_every=2,
        measured=MEASURED,
        validated={},
        done=lambda idx: idx + 1,
        each_head=lambda: [("medusa", None), ("gate", None)],
    )


def watched(console: Console, *, first: bool = True, validated: bool = False) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=first, accumulate_grad_batches=1)
    clock, own = Clock(), module()
    clock.rate, clock.share = 12345.6, 0.61
    progress = Progress(clock, console)
    progress.on_train_start(trainer, own)
    for idx in range(own.steps):
        own.measured = MEASURED if (idx + 1) % own.log_every == 0 else {}
        own.validated = {"validation/medusa/loss": 2.0, "validation/gate/loss": 1.0} if validated and idx == 19 else {}
        progress.on_train_batch_end(trainer, own, None, None, idx)
    progress.on_train_end(trainer, own)


def terminal(monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[Console, io.StringIO]:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=150, **how), file


def test_a_terminal_gets_a_bar_and_a_line_per_head(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    console, file = terminal(monkeypatch)
    watched(console)
    told = file.getvalue()
    for text in ("20/20", "top-1 by depth", "0.62/0.50", "1.94", "12,346 tok/s", "61% of it the base", "left"):
        assert text in told
    assert "\x1b[1m" in told  # bold
    assert capsys.readouterr().out == ""


def test_no_color_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = terminal(monkeypatch)
    watched(console)
    assert "20/20" in file.getvalue()
    assert not any(f"\x1b[{code}" in file.getvalue() for code in ("3", "38", "9"))  # every colour begins so


def test_elsewhere_a_line_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    watched(Console(file=io.StringIO()), validated=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if "validation" not in line] == [f"{n}/20" for n in range(2, 21, 2)]
    assert lines[0].startswith(
        "step 2/20  medusa loss 1.500  top-1 0.62/0.50  tokens/step ~1.94  gate loss 0.250  12,346 tok/s, 61% of it"
    )
    assert lines[-2] == "step 20/20  validation: medusa loss 2.000  gate loss 1.000"
    assert "\x1b" not in "".join(lines)


def test_the_other_processes_are_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console, file = terminal(monkeypatch)
    watched(console, first=False)
    assert file.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console, file = terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    watched(console)
    assert file.getvalue() == ""
    assert "step 20/20" in capsys.readouterr().out
