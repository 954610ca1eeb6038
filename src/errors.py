"""The failures a user can meet, each with its exit code. One line says what, where, why and what to do.

Exit codes: 0 complete, 2 configuration, 3 bad data or artifact, 4 numerics, 5 disk or memory,
6 peer process, server or timeout, 75 interrupted and resumable.
"""


class DraftsmithError(Exception):
    """A failure whose message is one line for the user; `exit_code` is the process's answer."""

    exit_code = 1
    told = False  # another process of this run has said it


class ConfigError(DraftsmithError, ValueError):
    """A user can fix this by editing the configuration key that the message starts with."""

    exit_code = 2


class DataError(DraftsmithError, ValueError):
    """A row, file or artifact is missing, malformed or does not fit; the message names file:row."""

    exit_code = 3


class TooNew(DataError):
    """Whole, but written by a later version than this one: nothing to pass over as damaged."""


class NumericsError(DraftsmithError, ArithmeticError):
    """A loss, gradient or comparison is not finite or not equal where it must be."""

    exit_code = 4


class Diverged(NumericsError):
    """Training left the finite numbers: too high a learning rate, or rows that no head can learn."""


class ResourceError(DraftsmithError, OSError):
    """The disk or the memory refused; what had been published before is untouched."""

    exit_code = 5


class OutOfMemory(ResourceError):
    """The memory is too small for the sizes that the message names."""


class PeerError(DraftsmithError, RuntimeError):
    """Another process or a server died, hung or answered nonsense."""

    exit_code = 6


class Interrupted(DraftsmithError):
    """A signal stopped the run at a step's edge; the same command resumes it."""

    exit_code = 75


class RowError(DataError):
    """One row does not fit. `where` is file:row, `reason` a slug that rows are counted by, `detail` the rest."""

    def __init__(self, where: str, reason: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.where, self.reason, self.detail = where, reason, detail
