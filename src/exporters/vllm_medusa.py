"""Hydra for vLLM <= 0.32's method `medusa`: the native folder, with vLLM's keys and the base's vocabulary.

Its reader is serving/vllm_medusa.py, which vLLM finds by the architecture's name (serving/entry.py). A Medusa model of
vLLM's gets the base's last state only, so embedding and lm_head are copied into the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from draftsmith import artifacts
from draftsmith.contracts import BaseView, Head
from draftsmith.exporters import capsule, native
from draftsmith.exporters.forms import Form, drafts, in_dtype, reopened, vllm

ARCHITECTURE = "DraftsmithHydra"
FILE = "vocabulary.safetensors"
VOCABULARY = ("vocabulary.embedding", "vocabulary.lm_head")


class Hydra(Form):
    """Without a prefix layer: what that reads is not shown to a Medusa model."""

    def names(self, head: Any) -> dict[str, str]:
        return {name: name for name in head.state_dict()}

    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        """Beside the native keys. (vLLM takes any other with both "num" and "heads", or "layers", for these.)"""
        return {
            "model_type": "medusa",
            "architectures": [ARCHITECTURE],
            "num_heads": head.config.num_heads,
            "num_hidden_layers": head.config.num_layers,
            "hidden_size": head.spec.hidden_size,
            "vocab_size": head.spec.vocab_size,
            "n_predict": head.config.num_heads,
        }

    def refusal(self, head: Any, base: Any) -> str | None:
        if head.config.prefix_layer:
            return "vLLM shows a Medusa model the last state only, and the prefix layer reads all of them"
        if base.lm_head_bias is not None:
            return "the base's lm_head has a bias, which this form has no place for"
        return None

    def save(self, folder: Path, head: Head, base: BaseView, dtype: str | None, *, name: str, runtime: str) -> Path:
        meant = in_dtype(head, dtype)
        meant.golden = capsule.record(meant, base)
        kept = base.lm_head_weight.dtype
        embedding_VD = base.embed(torch.arange(base.spec.vocab_size, device=base.lm_head_weight.device))
        copies = (embedding_VD, base.lm_head_weight)
        tensors = {k: t.detach().to("cpu", kept).clone().contiguous() for k, t in zip(VOCABULARY, copies, strict=True)}
        with artifacts.publish(folder, kind=f"export {runtime} hydra") as temporary:
            native.write(temporary, meant, name=name, adapter=base.adapter)
            told = artifacts.read_json(temporary / "config.json") | self.describe(meant, base, "")
            artifacts.write_json(temporary / "config.json", told)
            artifacts.write_tensors(temporary / FILE, tensors)
            reopened(temporary / FILE, tensors)
            native.check(temporary, meant.spec)
        return folder

    def start(self, folder: Path, head: Any, base: Any) -> str:
        return vllm(head.spec.path, method="medusa", model=str(folder), num_speculative_tokens=drafts(head))


HYDRA = Hydra()
