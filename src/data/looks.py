"""What rows look like: how long they are, and token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from draftsmith.data.edges import runs
from draftsmith.data.rows import Rows


def lengths(rows: Rows) -> dict[str, Any]:
    """Quantiles of row, prompt and answer lengths, in tokens."""
    answers = [end - begin for row in rows for begin, end in runs(row.mask)]
    prompts = [runs(row.mask)[0][0] for row in rows if runs(row.mask)]
    told: dict[str, Any] = {}
    for name, values in (("rows", rows.lengths_N), ("prompts", prompts), ("answers", answers)):
        if len(values):
            told[name] = {f"p{q}": int(np.percentile(values, q)) for q in (0, 10, 50, 90, 99, 100)}
    told["histograms"] = {"rows": _histogram(rows.lengths_N), **({"answers": _histogram(answers)} if answers else {})}
    return told


def _histogram(values: Any) -> list[list[int]]:
    """[where a bin begins, how many lie in it]"""
    edges = np.unique(np.linspace(min(values), max(values) + 1, 11).astype(int))
    counts, _ = np.histogram(values, bins=edges)
    return [[int(a), int(n)] for a, n in zip(edges[:-1], counts, strict=True)]


def shown(rows: Rows, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Some rows for people to look at: (token text, learned, first or last of its turn), token by token."""
    told = []
    for row in [rows[i] for i in range(min(count, len(rows)))]:
        edges = {begin for begin, _ in runs(row.mask)} | {end - 1 for _, end in runs(row.mask)}
        pieces = [tokenizer.decode([int(i)], skip_special_tokens=False) for i in row.ids]
        told.append(
            {
                "source": row.source,
                "tokens": [[p, int(m), int(i in edges)] for i, (p, m) in enumerate(zip(pieces, row.mask, strict=True))],
            }
        )
    return told
