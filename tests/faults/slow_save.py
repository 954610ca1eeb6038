"""`draftsmith train`, whose checkpoints after the first take a minute to write: `saving` appears beside the run when
one of them has begun. Run as a module, with the command line of the verb."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from draftsmith import artifacts, config, train

MINUTE = 60.0
write = artifacts.write_tensors


def slowly(path: Path, *rest: Any, **more: Any) -> None:
    if path.parent.name.startswith(".step-") and not path.parent.name.startswith(".step-00000005."):
        Path("saving").touch()
        time.sleep(MINUTE)
    write(path, *rest, **more)


if __name__ == "__main__":
    artifacts.write_tensors = slowly
    config.command("train", train.run)
