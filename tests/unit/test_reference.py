"""Where docs/reference.md takes its words from: yaml comments, the source beside a field, types and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from draftsmith import reference


@dataclass(frozen=True)
class Inner:
    deep: int = 3  # how deep


@dataclass(frozen=True)
class Parent:
    kept: str = "a"  # of the parent
    told: int = 1  # by the parent


@dataclass(frozen=True)
class Sample(Parent):
    # above it: the words for the next one
    # and a second line
    bare: float = 0.5
    told: int = 2  # by the child
    inner: Inner = field(default_factory=Inner)
    several: dict[str, Inner] = field(default_factory=dict)  # by name
    maybe: Inner | None = None
    text: str = "# no comment"


YAML = """# @package _global_
# What it is,
# in two lines.

a: 1           # of a
b:
  c: "x # y"   # of c, which goes
               # on below
  d: 2
# not of d
e: {f: 1}      # of e
g: a#b
"""


def test_a_yaml_s_comments_belong_to_the_keys_beside_them() -> None:
    assert reference.comments(YAML) == {"a": "of a", "b.c": "of c, which goes on below", "e": "of e"}
    assert reference.header(YAML) == "What it is, in two lines."


def test_a_field_s_comment_is_the_one_beside_it_or_above_it_its_own_before_the_parent_s() -> None:
    assert reference.field_comments(Sample) == {
        "kept": "of the parent",
        "told": "by the child",
        "bare": "above it: the words for the next one and a second line",
        "several": "by name",
    }


def test_rows_go_into_dataclasses_and_a_yaml_s_own_values_and_words_win() -> None:
    rows = list(reference._rows(Sample, "k.", {"bare": 0.25, "inner": {"deep": 5}}, {"k.bare": "said"}))
    assert [row[0] for row in rows] == [
        *("k.kept", "k.told", "k.bare", "k.inner.deep", "k.several", "k.several.<name>.deep"),
        *("k.maybe", "k.maybe.deep", "k.text"),
    ]
    by_key = {key: rest for key, *rest in rows}
    assert by_key["k.bare"] == ["number", "`0.25`", "said"]
    assert by_key["k.inner.deep"] == ["integer", "`5`", "how deep"]
    assert by_key["k.several"] == ["by name", "`{}`", "by name"]
    assert by_key["k.maybe"][:2] == ["group or null", "`null`"]


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        (int | None, "integer or null"),
        (list[float], "list of numbers"),
        (list[list[int]], "list"),
        (dict[str, Any], "group"),
        (Literal["a", "b"], "`a` or `b`"),
        (bool, "true or false"),
    ],
)
def test_types_are_told_in_words(hint: Any, told: str) -> None:
    assert reference._type(hint) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "`null`"),
        (1e-3, "`0.001`"),
        ("", "`''`"),
        ("???", "must be given"),
        ([1, 2], "`[1, 2]`"),
        ({"k": "v" * 99}, "`{…}`"),
    ],
)
def test_values_are_told_as_one_types_them(value: Any, told: str) -> None:
    assert reference._value(value) == told


def test_a_cell_ends_nowhere_and_is_no_html() -> None:
    assert reference._cell("a | b <c> `<d>`") == "a \\| b &lt;c> `<d>`"
