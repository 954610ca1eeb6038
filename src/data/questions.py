"""Prompt sets that are known by name: where their files are looked for, where to get them, and what their questions
are reported under.

Both are JSON lines of question_id, category, turns and sometimes reference, which shapes.py reads as `turns`:
MT-Bench (arXiv 2306.05685; 80 questions of two turns) and Spec-Bench (arXiv 2401.07851; 480 questions), which counts
the eight categories of MT-Bench as one of its six subtasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.data.sources import SourceConfig
from draftsmith.errors import DataError

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class PromptSet:
    """origin: who publishes the file. hub: the same questions as a data set, if there is one. subtasks: category ->
    what it is reported under, where that is not the category itself."""

    origin: str
    hub: str | None = None
    subtasks: Mapping[str, str] = field(default_factory=dict)

    def subtask(self, category: str) -> str:
        return self.subtasks.get(category, category)


SETS: dict[str, PromptSet] = {
    "mt_bench": PromptSet(
        "fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat",
        hub="HuggingFaceH4/mt_bench_prompts",
    ),
    "spec_bench": PromptSet(
        "data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
        subtasks=dict.fromkeys(MT_BENCH, "mt_bench"),
    ),
}


def places(name: str) -> list[Path]:
    """Where the file of a set is looked for, below the current folder."""
    return [Path("data", name, "question.jsonl"), Path(f"{name}.jsonl")]


def source(name: str, path: str | None = None, *, download: bool = False) -> SourceConfig:
    """The set's file: `path`, else the first that is there of its places; else, if a download is asked for, its data
    set on the hub. DataError says where it was looked for and how to get it."""
    known = SETS[name]
    there = path or next((str(p) for p in places(name) if p.is_file()), None)
    if there is not None:
        return SourceConfig(path=there, shape="turns")
    if download and known.hub:
        return SourceConfig(hub=known.hub, shape="turns")
    looked = " and ".join(map(str, places(name)))
    fetch = f", or prompts.download=true fetches {known.hub}" if known.hub else ""
    none = "; no data set of it is known, so prompts.download=true cannot help" if download else ""
    raise DataError(
        f"prompts.set={name}: no file at {looked}; copy {known.origin} there, or say prompts.path=…{fetch}{none}"
    )
