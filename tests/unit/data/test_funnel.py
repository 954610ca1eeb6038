"""Counting what comes in, what stays, and why the rest does not: in = kept + quarantined."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.data.funnel import SHOWN, Funnel, intake, table
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError, ResourceError, RowError


def source(folder: Path, name: str, *rows: Any) -> SourceConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def quarantined(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    chosen = {
        "one": source(tmp_path, "one", {"prompt": "a"}, "{", {"prompt": 3}),
        "two": source(
            tmp_path, "two", {"x": "half \ud83d"}, {"messages": [{"role": "user", "content": ""}]}, {"text": "b"}
        ),
    }
    with Funnel(tmp_path / "deep" / "q.jsonl") as funnel:
        records = list(intake(chosen, funnel))
    assert [(r.where, r.source) for r in records] == [
        (f"{tmp_path}/one.jsonl:1", "one"),
        (f"{tmp_path}/two.jsonl:3", "two"),
    ]
    assert funnel.facts == {"in": 6, "kept": 2, "quarantined": {"empty": 1, "encoding": 1, "json": 1, "types": 1}}
    lines = quarantined(funnel.path)
    assert [line["where"] for line in lines] == [
        f"{tmp_path}/{at}" for at in ("one.jsonl:2", "one.jsonl:3", "two.jsonl:1", "two.jsonl:2")
    ]
    assert [line["reason"] for line in lines] == ["json", "types", "encoding", "empty"]
    assert [line.get("row") for line in lines[:2]] == [None, '{"prompt": 3}']
    assert all(line["detail"] for line in lines)
    assert funnel.first is not None
    assert funnel.first.where == lines[0]["where"]


def test_a_refused_row_is_kept_shortened_and_as_json(tmp_path: Path) -> None:
    with Funnel(tmp_path / "q.jsonl") as funnel:
        funnel.refuse(RowError("f:1", "role", "no"), {"long": "é\udc00" * SHOWN, "when": Path("x")})
    (line,) = quarantined(funnel.path)
    assert len(line["row"]) == SHOWN
    assert line["row"].startswith('{"long": "é\udc00é')


@pytest.mark.parametrize(
    ("taken", "refused", "on_bad", "says"),
    [
        (3, 0, "error", None),
        (3, 0, "skip", None),
        (3, 2, "skip", None),
        (
            3,
            2,
            "error",
            r"f:0: why0; 2 of 3 rows do not fit \(role 2\); all that do not fit: .*q\.jsonl; .*on_bad=skip",
        ),
        (3, 3, "skip", r"0 of 3 rows left; 3 of 3 rows do not fit \(role 3\); see .*q\.jsonl"),
        (0, 0, "skip", "0 of 0 rows left"),
        (0, 0, "error", "0 of 0 rows left"),
    ],
)
def test_settling(tmp_path: Path, taken: int, refused: int, on_bad: str, says: str | None) -> None:
    with Funnel(tmp_path / "q.jsonl") as funnel:
        funnel.taken = taken
        for n in range(refused):
            funnel.refuse(RowError(f"f:{n}", "role", f"why{n}"))
        if says is None:
            funnel.settle(on_bad, {"a": SourceConfig(path="a.jsonl")})
        else:
            with pytest.raises(DataError, match=says):
                funnel.settle(on_bad, {"a": SourceConfig(path="a.jsonl")})
    assert len(quarantined(funnel.path)) == refused


def test_a_quarantine_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write the quarantine"), Funnel(tmp_path):
        pass


def test_the_phrase() -> None:
    assert table({"in": 1000, "quarantined": {}}) == "all of 1,000 rows fit"
    told = table({"in": 2000, "quarantined": {"json": 1, "role": 1002}})
    assert told == "1,003 of 2,000 rows do not fit (role 1,002, json 1)"
