"""Typed settings of a base, apart from torch so that a mistake in them answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from draftsmith.errors import ConfigError

QUANTISED = ("int8", "int4")  # how the weights of a base's blocks may be kept


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 32
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError("rank, alpha, dropout: give a rank >= 1, a positive alpha and a dropout in [0, 1)")
        if not self.targets:
            raise ConfigError("targets: name at least one kind of linear layer, e.g. q_proj")
