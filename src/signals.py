"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 stop a command so that the same command goes on: exit 75.

Work that has edges to stop at takes the first one as a note; everything else is interrupted at once. A second signal
waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from draftsmith.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def leave() -> NoReturn:
    """Ends the process now, whatever it is in the midst of; all that is complete on the disk stays so."""
    os._exit(Interrupted.exit_code)


def listen() -> None:
    """From now on, and until the process ends, a signal is a KeyboardInterrupt."""
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if asked:
            leave()
        asked.append(number)
        raise KeyboardInterrupt

    for number in _heard():
        signal.signal(number, stop)


@contextlib.contextmanager
def handled(ask: Callable[[int, Any], Any]) -> Iterator[None]:
    """ask(number, frame) for every signal that comes while inside; what handled them before does so again afterwards.
    (None comes to another thread than the first.)"""
    before = {number: signal.signal(number, ask) for number in _heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The signals that came while inside, to be looked at, at the next edge; a second one leaves."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            leave()
        asked.append(number)

    with handled(note):
        yield asked


@contextlib.contextmanager
def in_loop(ask: Callable[[], Any]) -> Iterator[None]:
    """Calls `ask` in the event loop that runs now for the first signal that comes while inside; a second one leaves."""
    loop, asked = asyncio.get_running_loop(), [0]

    def note(number: int, frame: Any) -> None:
        if asked[0]:
            leave()
        asked[0] = number
        loop.call_soon_threadsafe(ask)  # which wakes it

    with handled(note):
        yield


def _heard() -> list[signal.Signals]:
    """The signals that may be handled here. One that is ignored, as SIGINT is in a script's background, stays so."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
