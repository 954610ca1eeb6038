"""What people give us to answer: sources of chats or plain prompts; or made-up ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.data import questions, synthetic
from draftsmith.data.records import Record
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError, DataError

OPENING = 300  # characters of natural text to go on from
SOURCES = 10_000_000  # bytes of library source that openings are cut from


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from: a set that is known by name, a file, folder or glob, or named sources; or so many
    made-up ones."""

    set: str | None = None  # mt_bench | spec_bench: `path`, or the file where it usually lies (questions.py)
    download: bool = False  # of a set whose file is not there
    path: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    synthetic: int = 0  # instead: this many templated chats
    seed: int = 0  # of the synthetic chats
    text: int = 0  # and this many openings of natural text (this Python's own library sources)

    def __post_init__(self) -> None:
        if self.synthetic < 0 or self.text < 0:
            raise ConfigError("synthetic, text: counts cannot be negative")
        if self.path is not None and self.sources:
            raise ConfigError("path, sources: give one of them")
        if self.set is not None and self.set not in questions.SETS:
            raise ConfigError(f"set='{self.set}': choose one of {', '.join(questions.SETS)}, or null and give path=…")
        if self.set and self.sources:
            raise ConfigError("set, sources: give one of them")
        if self.download and (self.set is None or self.path is not None):
            raise ConfigError("download: only a set without a path is fetched; give set=mt_bench, or download=false")
        if self.made_up and self.synthetic + self.text == 0:
            raise ConfigError("set, path, sources, synthetic, text: give prompts (path=…), or how many to make up")

    @property
    def made_up(self) -> bool:
        return not (self.set or self.path or self.sources)

    @property
    def chosen(self) -> Mapping[str, SourceConfig]:
        """The sources by name; none if the prompts are made up. DataError for a set whose file is nowhere."""
        if self.set:
            return {self.set: questions.source(self.set, self.path, download=self.download)}
        return {"path": SourceConfig(path=self.path)} if self.path else self.sources

    def label(self, record: Record) -> str:
        """What one of these prompts is reported under: the subtask of a set, the name of its source, what its row or
        its file is called, or what kind was made up."""
        if self.set:
            return questions.SETS[self.set].subtask(record.category) or self.set
        if self.path:
            own = Path(self.path)
            return record.category or (own.name.partition(".")[0] if own.is_file() else "") or "path"
        return record.source or ("text" if record.prompt else "chats")


def make_up(config: PromptsConfig, exclude: frozenset[str] = frozenset()) -> list[Record]:
    """config.synthetic chats, then config.text openings of natural text, all distinct.

    exclude: keys (`user_turns`) that no made-up prompt may have: this is how prompts are held out.
    """
    chats = synthetic.prompts(config.synthetic, config.seed, exclude=exclude) if config.synthetic else []
    made = [Record(f"synthetic:{config.seed}:{i}", messages=tuple(m)) for i, m in enumerate(chats)]
    texts = [t for t in _openings(config.seed) if _key(t) not in exclude] if config.text else []
    if len(texts) < config.text:
        raise DataError(f"prompts.text={config.text}: only {len(texts)} openings are left; ask for fewer")
    return made + [Record(f"text:{config.seed}:{i}", prompt=t) for i, t in enumerate(texts[: config.text])]


def user_turns(records: Iterable[Record]) -> frozenset[str]:
    """The keys of everything a user said in these, for holding others out."""
    return frozenset(_key(said) for r in records for said in _user_said(r))


def _user_said(r: Record) -> list[str]:
    told = json.loads(r.kept["said"]) if r.kept.get("said") else {}
    prompt, messages = r.prompt or told.get("prompt"), r.messages or told.get("messages", ())
    return [prompt] if prompt else [*(m["content"] for m in messages if m["role"] == "user"), *r.later]


def _key(said: str) -> str:
    return synthetic.prompt_key([{"role": "user", "content": said}])


def _openings(seed: int) -> list[str]:
    """First lines of library source chunks, about 300 characters each, in an order that the seed gives."""
    openings = [chunk[:OPENING].rpartition("\n")[0] or chunk[:OPENING] for chunk in synthetic.source_texts(SOURCES)]
    random.Random(f"openings/{seed}").shuffle(openings)
    return list(dict.fromkeys(openings))
