"""What lies in the folder in which a page's commands are run, and the cache that all pages share."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all pages and all workers of xdist. Bases that this machine has made before are taken along: their recipe
    is their name, and making the tiny one costs minutes where bfloat16 is slow."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "cache"
    (folder / "bases").mkdir(parents=True, exist_ok=True)
    for made in (Path.home() / ".cache" / "draftsmith" / "bases").glob("*/manifest.json"):
        with contextlib.suppress(FileExistsError):  # another worker was first
            (folder / "bases" / made.parent.name).symlink_to(made.parent)
    return str(folder)


@pytest.fixture
def folder(micro_maker: Any, tmp_path: Path) -> Path:
    """What pages assume a reader has: my-model, prompts.jsonl, held-out.jsonl, and chats.jsonl of whole chats."""
    made = tmp_path / "made"
    made.mkdir()
    micro_maker(made, SHAPE, rows=4)
    home = tmp_path / "page"
    home.mkdir()
    asked = (made / "prompts.jsonl").read_text().splitlines(keepends=True)
    (made / "base").rename(home / "my-model")
    (home / "prompts.jsonl").write_text("".join(asked[:4]))
    (home / "held-out.jsonl").write_text("".join(asked[4:]))
    (made / "chats.jsonl").rename(home / "chats.jsonl")
    assert json.loads(asked[0])["messages"]
    return home
