"""The configuration node `data`: where rows come from, what of them is learned, how they are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from draftsmith.data.chat import ChatConfig
from draftsmith.data.generate import GenerationConfig
from draftsmith.data.prompts import PromptsConfig
from draftsmith.data.sources import SourceConfig
from draftsmith.errors import ConfigError


@dataclass(frozen=True)
class ValidationConfig:
    """Rows that are measured and never learned: a share of the rows, by the hash of what they ask; or a folder
    of rows, or any other source, which must not share a question with the training rows."""

    share: float = 0.0
    path: str | None = None
    every: int = 100  # steps between measurements; the last step is always measured

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.every < 1:
            raise ConfigError("share, every: a share is at least 0 and below 1, every at least 1 step")
        if self.share and self.path:
            raise ConfigError("share, path: give one of them")


@dataclass(frozen=True)
class RandomConfig:
    """Rows of random ids with the lengths of chats, to measure on: nothing can be learned from them."""

    rows: int = 16
    real: float = 0.53  # mean length, as a share of data.length
    learned: float = 0.66  # share of a row's tokens, its last ones, that count
    sigma: float = 0.6  # of the lognormal lengths; 0: all equal
    labels: bool = False  # a random label per token too, as an acceptance head beside a draft model wants
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 < self.real <= 1 or not 0 < self.learned <= 1 or self.sigma < 0:
            raise ConfigError("rows, real, learned, sigma: give rows >= 1, shares in (0, 1] and sigma >= 0")


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # a folder of rows; or a file, folder or glob of any shape of rows
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # or: several, by name
    prompts: PromptsConfig | None = None  # or: let the base answer these first
    random: RandomConfig | None = None  # or: made up, to measure on
    stored: bool = False  # path is a store, or refused
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    loss_on: str = "assistant"  # assistant | all
    turns: str = "all"  # all | last: of a chat's assistant turns, which are learned
    on_bad: str = "error"  # error | skip: what to do when rows do not fit; either way they are written down
    repeats: str = "keep"  # keep | drop: rows that ask and say exactly what an earlier one does
    long_rows: str = "error"  # error | truncate | drop: what to do with a row longer than `length`
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    length: int = 2048  # tokens per packed sequence
    batch_size: int = 8  # packed sequences per micro-batch and process
    packing: bool = True  # False: a row per sequence, padded to `length`, as the plain step of a bench has it
    one_batch: bool = False  # the rows of the first step in every step: a head that cannot learn them learns nothing
    num_workers: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("path", "sources", "prompts", "random") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"path, sources, prompts, random: give one of them, not {' and '.join(given) or 'none'}; rows to read"
                " are data=jsonl data.path=…, prompts to answer first data=prompts data.prompts.path=…"
            )
        for name, value, choices in (
            ("loss_on", self.loss_on, ("assistant", "all")),
            ("turns", self.turns, ("all", "last")),
            ("on_bad", self.on_bad, ("error", "skip")),
            ("repeats", self.repeats, ("keep", "drop")),
            ("long_rows", self.long_rows, ("error", "truncate", "drop")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}='{value}': choose one of {', '.join(choices)}")
        for name, least in (("length", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least {least}")

    @property
    def chosen(self) -> Mapping[str, SourceConfig]:
        """The sources by name, of rows or of prompts; none if the prompts are made up."""
        if self.prompts is not None:
            return self.prompts.chosen
        return {"path": SourceConfig(path=self.path)} if self.path else self.sources
