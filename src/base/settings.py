"""Typed settings of a base, apart from torch so that a mistake in them answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from draftsmith.errors import ConfigError

QUANTISED = ("int8", "int4")  # how the weights of a base's blocks may be kept


@dataclass(frozen=True)
class ShapeConfig:
    """The sizes of a base by the names of its config.json: what can be known of it before it is loaded."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    model_type: str = "llama"
    head_dim: int | None = None  # null: hidden_size / num_attention_heads
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ConfigError(f"{name}={value}: give at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads}: no multiple of num_key_value_heads="
                f"{self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"head_dim: say it; {self.hidden_size} does not divide by {self.num_attention_heads} heads"
            )

    @property
    def size(self) -> int:
        """Of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


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
