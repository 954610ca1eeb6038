"""What may lie in a file: values and bytes that hypothesis makes, and what a reader may do with them."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from draftsmith.errors import DraftsmithError

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "draftsmith-hypothesis")  # nothing of it in the tree


LONG = "DRAFTSMITH_KILLS" in os.environ  # make test-faults-long: all examples, else a third of them


def often(examples: int) -> Any:
    """The same examples at every run, and no data base of them in the tree."""
    many = examples if LONG else -(-examples // 3)
    return settings(
        derandomize=True, deadline=None, database=None, max_examples=many, suppress_health_check=list(HealthCheck)
    )


WORDS = (
    "role",
    "content",
    "messages",
    "prompt",
    "user",
    "assistant",
    "../x",
    "/etc/passwd",
    "${oc.env:HOME}",
    "\0",
    "\ud800",
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into a JSON value; () is the whole."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """The value with one or two of its parts gone, new, or something else."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(sorted(places(value), key=repr)))
        new = draw(VALUES)
        if not at:
            if draw(st.integers(0, 5)):
                continue
            return new
        inside = functools.reduce(lambda v, key: v[key], at[:-1], value)
        how = draw(st.sampled_from(["replace", "delete", "add"]))
        if how == "replace":
            inside[at[-1]] = new
        elif how == "delete":
            del inside[at[-1]]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(WORDS))] = new
        else:
            inside.append(new)
    return value


@st.composite
def harmed(draw: Any, content: bytes) -> bytes:
    """The bytes with some changed, cut out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if how == "flip" and content:
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "insert":
            content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
        else:
            content = content[:at] + content[at + draw(st.integers(1, 6)) :]
    return content


def refused(read: Callable[[], Any], *names: str, code: int = 3) -> Any:
    """What was read; or None, refused in one line with this code, which holds one of the names."""
    try:
        return read()
    except DraftsmithError as e:
        why = e
    assert why.exit_code == code, repr(why)
    assert any(name in str(why) for name in names), str(why)
    assert "\n" not in str(why).strip(), str(why)
    return None


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def sealed(folder: Path, manifest: str = "manifest.json") -> None:
    facts = json.loads((folder / manifest).read_text())
    for name in facts["files"]:
        content = (folder / name).read_bytes()
        facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / manifest).write_text(json.dumps(facts))


def outside(folder: Path) -> dict[str, int]:
    """What lies beside a folder: nothing of it may change."""
    return {p.name: p.stat().st_mtime_ns for p in folder.parent.iterdir() if p != folder}


def of(folder: Path, *names: str) -> Any:
    """A strategy: what became of one of the folder's files, as (name, content)."""

    def changed(name: str) -> Any:
        content = (folder / name).read_bytes()
        if not name.endswith((".json", "last")):
            return harmed(content).map(lambda b: (name, b))
        return st.one_of(mutated(json.loads(content)).map(as_json), harmed(content)).map(lambda b: (name, b))

    return st.sampled_from(names).flatmap(changed)


def with_change(folder: Path, to: Path, change: tuple[str, bytes], *, seal: str | None) -> Path:
    """A copy with that file; sealed again, if it can be."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    (to / change[0]).write_bytes(change[1])
    if seal is not None and change[0] != seal:
        sealed(to, seal)
    return to


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def micro(micro_maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smallest base, base/, as tests/conftest.py makes it."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": False}
    return micro_maker(tmp_path_factory.mktemp("micro"), shape, rows=4)


@pytest.fixture(scope="module")
def base(micro: Path) -> Any:
    from draftsmith.base import lm

    return lm.load(str(micro / "base"))


SAID = {"role": "user", "content": "héllo 😀"}
LINES = [
    {"messages": [SAID, {"role": "assistant", "content": 'say "x"\n', "tool_calls": [{"function": {"name": "f"}}]}]},
    {"messages": [SAID], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "do", "input": "this", "output": "done", "system": "be"},
    {"prompt": "go on", "completion": "I do"},
    {"prompt": [SAID], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "plain"},
    {"turns": ["a", "b"], "category": "math", "question_id": 81, "reference": ["x", ""]},
    {"ids": [1, 2, 3], "mask": [0, 1, 1], "asked": "x", "said": "{}", "seed": 3},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]
