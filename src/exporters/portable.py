"""Medusa's portable folder: one directory that vLLM <= 0.32, text-generation-inference and the original
code read. config.json and medusa_lm_head.safetensors, bare numeric names.

What those readers punish, silently or not, and what this table therefore does:
  - vLLM drops the block biases unless `medusa_fc_bias` is true;
  - vLLM takes any key with both "num" and "heads" (or "num" and "layers") for its own, so no other has both;
  - TGI ignores the head when `architectures` is present, and refuses names with a `medusa_heads.` prefix;
  - the lm_head is never taken from the base by vLLM: every head writes its own, a shared one is copied;
  - safetensors refuses shared memory: every tensor is its own and contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from draftsmith import artifacts
from draftsmith.contracts import BaseView, Head
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.exporters.native import save_adapter

WEIGHTS = "medusa_lm_head.safetensors"


@dataclass(frozen=True)
class PortableConfig:
    dtype: str | None = None  # float32 | bfloat16 | float16; null: as trained

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype='{self.dtype}': choose float32, bfloat16, float16 or null")


class Portable:
    """Writes a Medusa head for other runtimes; refuses what the format cannot say."""

    Config = PortableConfig

    def __init__(self, config: PortableConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: BaseView, *, name: str) -> Path:
        """Publishes the folder, then reads it back and compares bit for bit with what was meant."""
        if not hasattr(head, "projection") or not hasattr(head.config, "num_layers"):
            raise ConfigError(
                f"exporter: portable is Medusa's format and cannot hold {type(head).__name__} '{name}';"
                " use exporter=native"
            )
        tensors = self.tensors(head, base)
        with artifacts.publish(folder, kind="portable medusa") as temporary:
            artifacts.write_tensors(temporary / WEIGHTS, tensors)
            artifacts.write_json(temporary / "config.json", self.describe(head, tensors))
            save_adapter(temporary, base.adapter)
            back = load_file(temporary / WEIGHTS)
            if back.keys() != tensors.keys() or any(not torch.equal(back[k], tensors[k]) for k in back):
                raise NumericsError(f"{folder}: what was written does not read back equal; check the disk")
        return folder

    def tensors(self, head: Any, base: BaseView) -> dict[str, torch.Tensor]:
        """`{i}.{j}.linear.weight|bias` per head i and block j, `{i}.{n}.weight` its lm_head [V, D]."""
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else None
        found: dict[str, torch.Tensor] = {}
        for i, blocks in enumerate(head.blocks):
            for j, block in enumerate(blocks):
                found[f"{i}.{j}.linear.weight"] = block.linear.weight
                found[f"{i}.{j}.linear.bias"] = block.linear.bias
            weight_VD, bias_V = head.projection(i + 1, base)
            if bias_V is not None:
                raise ConfigError(
                    "exporter: the base's lm_head has a bias, which the portable format cannot hold; use native"
                )
            found[f"{i}.{head.config.num_layers}.weight"] = weight_VD
        return {k: t.detach().to("cpu", dtype).clone().contiguous() for k, t in found.items()}

    def describe(self, head: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """config.json: exactly these keys."""
        return {
            "model_type": "medusa",
            "medusa_num_heads": head.config.num_heads,
            "medusa_num_layers": head.config.num_layers,
            "hidden_size": head.spec.hidden_size,
            "vocab_size": head.spec.vocab_size,
            "medusa_fc_bias": True,
            "n_predict": head.config.num_heads,
            "base_model_name_or_path": head.spec.path,
            "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        }
