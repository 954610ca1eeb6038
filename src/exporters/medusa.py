"""Medusa's heads as its servers read them: names, keys and commands.

What those readers punish, silently or not, and what these forms therefore do:
  - vLLM drops the block biases unless `medusa_fc_bias` is true;
  - vLLM takes any key with both "num" and "heads" (or "num" and "layers") for its own, so no other has both;
  - TGI ignores the head when `architectures` is present, and refuses names with a `medusa_heads.` prefix;
  - nobody takes the lm_head from the base: every head writes its own, a shared one is copied (for vLLM once);
  - vLLM 0.32 cannot load a vocabulary that was cut (`token_map`), and none is written;
  - safetensors refuses shared memory: every tensor is its own and contiguous.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from draftsmith.contracts import BaseView
from draftsmith.exporters.forms import Form, drafts, vllm

CHOICES = "medusa_choices.json"


@dataclass(frozen=True)
class Medusa(Form):
    """block, end: the names of block j and of the lm_head of head i (both from 0). num_heads, num_layers: what
    config.json calls their numbers. shared_once: a shared lm_head is written for all heads together. choices: the tree
    is written too."""

    launch: Callable[[str, Any], str]  # (folder, head) -> the command
    block: str = "{i}.{j}.linear.{part}"
    end: str = "{i}.{n}.weight"
    weights: str = "medusa_lm_head.safetensors"
    num_heads: str = "medusa_num_heads"
    num_layers: str = "medusa_num_layers"
    more: dict[str, Any] = field(default_factory=dict)
    shared_once: bool = False
    choices: bool = False

    def refusal(self, head: Any, base: Any) -> str | None:
        if head.spec.lm_head_bias:
            return "the base's lm_head has a bias, and the format has no place for one"
        if head.config.share_lm_head and base.lm_head_softcap is not None:
            return "the base bounds its logits, and a copy of its lm_head does not"
        return None

    def names(self, head: Any) -> dict[str, str]:
        found = {
            f"blocks.{i}.{j}.linear.{part}": self.block.format(i=i, j=j, part=part)
            for i in range(head.config.num_heads)
            for j in range(head.config.num_layers)
            for part in ("weight", "bias")
        }
        if not head.config.share_lm_head:
            found |= {f"lm_heads.{i}.weight": self._end(head, i) for i in range(head.config.num_heads)}
        return found

    def copies(self, head: Any, base: BaseView) -> dict[str, Tensor]:
        if not head.config.share_lm_head:
            return {}
        times = 1 if self.shared_once else head.config.num_heads
        return {self._end(head, i): base.lm_head_weight for i in range(times)}

    def _end(self, head: Any, i: int) -> str:
        return self.end.format(i=i, n=head.config.num_layers)

    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        return {
            "model_type": "medusa",
            **self.more,
            self.num_heads: head.config.num_heads,
            self.num_layers: head.config.num_layers,
            "hidden_size": head.spec.hidden_size,
            "vocab_size": head.spec.vocab_size,
            "medusa_fc_bias": True,
            **({"original_lm_head": head.config.share_lm_head} if self.shared_once else {}),
            "n_predict": head.config.num_heads,
            "base_model_name_or_path": head.spec.path,
            "torch_dtype": dtype,
        }

    def others(self, folder: Path, head: Any) -> dict[str, Any]:
        return {CHOICES: paths(head)} if self.choices else {}

    def start(self, folder: Path, head: Any, base: Any) -> str:
        return self.launch(str(folder), head)


def paths(head: Any) -> list[list[int]]:
    """The tree that draftsmith tune found, where it is one of fixed paths, as deep as the head goes; else a chain."""
    tree = (head.said.get("tuned") or {}).get("tree") or {}
    if tree.get("kind") == "static":
        return [path for path in tree["paths"] if len(path) <= head.max_depth]
    return [[0] * k for k in range(1, drafts(head) + 1)]


def _vllm(folder: str, head: Any) -> str:
    command = vllm(head.spec.path, method="medusa", model=folder, num_speculative_tokens=drafts(head))
    return f"{command}  # vLLM <= 0.32; later ones have no Medusa"


def _tgi(folder: str, head: Any) -> str:
    return f"text-generation-launcher --model-id {quote(folder)} --speculate {drafts(head)}"


def _tensorrt_llm(folder: str, head: Any) -> str:
    base, tree, config = quote(head.spec.path), paths(head), head.config
    return (
        f"python examples/medusa/convert_checkpoint.py --model_dir {base} --medusa_model_dir {quote(folder)}"
        f" --output_dir checkpoint --dtype float16 --num_medusa_heads {config.num_heads}"
        f" --num_medusa_layers {config.num_layers} --max_medusa_token_len {len(tree)}"
        " && trtllm-build --checkpoint_dir checkpoint --output_dir engine --speculative_decoding_mode medusa"
        f" && python examples/run.py --engine_dir engine --tokenizer_dir {base} --max_output_len 100"
        f" --medusa_choices {quote(json.dumps(tree))}  # a TensorRT-LLM that still has its TensorRT backend"
    )


def _mlc(folder: str, head: Any) -> str:
    base, made = quote(f"{head.spec.path}-mlc"), quote(f"{folder}-mlc")
    how = f"{quote(folder)} --model-type medusa --quantization q0f16 --output {made}"
    return (
        f"mlc_llm gen_config {how} --conv-template LM && mlc_llm convert_weight {how}"
        f" && mlc_llm serve {base} --speculative-mode medusa --additional-models {made}"
        f"  # {base}: the base, converted likewise"
    )


# FasterDecoding/Medusa's own naming
PORTABLE = Medusa(_vllm)
TGI = Medusa(_tgi)
TENSORRT_LLM = Medusa(_tensorrt_llm, choices=True)
VLLM = Medusa(
    _vllm,
    block="blocks.{i}.layers.{j}.{part}",
    end="lm_heads.{i}.weight",
    weights="model.safetensors",
    num_heads="num_heads",
    num_layers="num_hidden_layers",
    more={"architectures": ["MedusaModel"]},
    shared_once=True,
)
MLC = Medusa(
    _mlc, block="medusa_head.{i}.{j}.linear.{part}", end="medusa_head.{i}.{n}.weight", weights="model.safetensors"
)
