"""Where a process may die at the worst moment, by name, so that a test can make it die exactly there.

FAULT=<point> ends the process as kill -9 would, at once, when it comes to that point; FAULT=<point>:<n> when it comes
there for the n-th time. FAULT_LOG=<file> appends the name of every point that is passed, which tells what there is to
die at. Without either a point costs one look at the environment.
"""

from __future__ import annotations

import os

KILLED = 137  # what a shell says of a process that kill -9 ended
_passed: dict[str, int] = {}


def point(name: str) -> None:
    """This process may die here."""
    asked, log = os.environ.get("FAULT"), os.environ.get("FAULT_LOG")
    if not asked and not log:
        return
    if log:
        with open(log, "a") as f:
            f.write(f"{name}\n")
    _passed[name] = _passed.get(name, 0) + 1
    if asked in (f"{name}:{_passed[name]}", name):
        os._exit(KILLED)
