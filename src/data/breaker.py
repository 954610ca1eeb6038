"""When to ask a server again: what its status means, how long to wait, and when to leave it alone for a while."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable

# What a status asks of us. `down`: again later, and it counts against the server; `busy`: again later, the server
# is well; `refused`: never this row again; `stop`: never anything again, a person has to look.
REFUSED = (400, 413, 422)
AGAIN = (408, 409, 425)


def meaning(status: int, retry_after: float | None = None) -> str:
    """`ok`, `down`, `busy`, `refused` or `stop`."""
    if 200 <= status < 300:
        return "ok"
    if status == 429 or (status == 503 and retry_after is not None):
        return "busy"
    if status in AGAIN or status >= 500:
        return "down"
    return "refused" if status in REFUSED else "stop"


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; `now` in seconds since 1970."""
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.replace(".", "", 1).isdigit():
        return float(header)
    try:
        then = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, then - now)


def backoff(tries: int, first: float, limit: float, draw: Callable[[], float] = random.random) -> float:
    """Seconds before the next try after `tries` failures (1 or more): anything up to first * 2^(tries-1), at
    most `limit`. The whole range is drawn from, so that many waiters do not come back together."""
    return draw() * min(limit, first * 2.0 ** min(tries - 1, 60))


class Breaker:
    """One server's health. closed: ask away; open: nothing but probes; trial: a probe came back, one request may
    go and decides.

    since: when the trouble began that no answer has ended yet; patience is counted from there. A pause that the
    server asked for is no trouble yet: with it alone, trouble begins when it ends.
    """

    def __init__(
        self,
        failures: int,
        first: float,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._wait: Callable[[int], float] = lambda tries: backoff(tries, first, limit, draw)
        self._limit, self._clock = failures, clock
        self.state = "closed"
        self.since: float | None = None
        self._failures = self._probes = 0
        self._until = self._heard = 0.0
        self._trying = False

    def admits(self) -> bool:
        """Whether a request may be sent now."""
        if self.state == "trial":
            return not self._trying
        return self.state == "closed" and self._clock() >= self._until

    def sent(self) -> None:
        """A request goes out."""
        self._trying = self.state == "trial"

    def answered(self) -> None:
        """The server answered, be it only that it does not like this row."""
        if self.state != "closed":
            self.state, self._until = "closed", 0.0
        self.since = None
        self._failures = self._probes = 0

    def failed(self) -> None:
        """No answer, 5xx or nonsense."""
        self._failures += 1
        self._heard = self._clock()
        if self.state == "trial" or (self.state == "closed" and self._failures >= self._limit):
            self.open()

    def open(self) -> None:
        """From now on only probes; the first at once, later ones backing off."""
        self._until = self._clock() + (self._wait(self._probes) if self._probes else 0.0)
        self.state = "open"
        self.since = self._clock() if self.since is None else self.since

    def throttled(self, seconds: float) -> None:
        """The server asks for a pause. It lives, so this is no failure; but one pause after another, and never an
        answer, is trouble too."""
        self._heard = self._clock()
        self._until = max(self._until, self._heard + seconds)
        self.since = self._until if self.since is None else self.since
        if self.state == "trial":
            self.state = "closed"

    def probe_due(self) -> bool:
        return self.state == "open" and self._clock() >= self._until

    def probed(self, well: bool) -> None:
        self._probes += 1
        if well:
            self.state, self._trying = "trial", False
        else:
            self._until = self._clock() + self._wait(self._probes)

    def troubled(self) -> float:
        """Seconds since the trouble began; 0 without any. Of a server that is only throttled: as of its last word,
        so that a pause, however long, is followed by a request before anybody despairs."""
        if self.since is None:
            return 0.0
        now = self._heard if self.state == "closed" else self._clock()
        return max(0.0, now - self.since)
