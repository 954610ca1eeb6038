"""Rows of random ids, as many and as long as asked: what a step costs does not depend on what it learns."""

from __future__ import annotations

import random

from draftsmith.data.rows import Row
from draftsmith.data.settings import RandomConfig

SHORTEST = 8  # tokens


def made_up(config: RandomConfig, length: int, vocab_size: int) -> list[Row]:
    """Rows of lognormal lengths, none over `length`; the last part of each counts, as an answer would."""
    rng = random.Random(config.seed)
    drawn = [rng.lognormvariate(0, config.sigma) for _ in range(config.rows)]
    scale = config.real * length * config.rows / sum(drawn)
    rows = []
    for i, size in enumerate(drawn):
        n = min(length, max(SHORTEST, round(size * scale)))
        learned = max(1, round(n * config.learned))
        ids = [rng.randrange(vocab_size) for _ in range(n)]
        labels = [rng.random() for _ in range(n)] if config.labels else None
        rows.append(Row(str(i), ids, [0] * (n - learned) + [1] * learned, labels=labels))
    return rows
