"""EAGLE-3's draft layer as its servers read it: a Llama of one layer with a wider input and a vocabulary of its own.

Which of the base's hidden states it reads is told in numbers that do not mean the same everywhere. Ours, l: what leaves
block l - 1 and enters block l, 0 the embedding, L what leaves the last block. vLLM, speculators and llama.cpp count
likewise; SGLang and TensorRT-LLM name the block that the state leaves, one less. The key differs too: SGLang reads
`eagle_config`, the others the top of config.json, TensorRT-LLM its own options. A reader that finds no number takes 2,
L/2 and L-3 of ours without a word, so the numbers are always written.

The residual of the layer is the feature before its norm (`norm_before_residual` false), which vLLM takes for true
where a speculators folder does not say. The maps `d2t` and `t2d` belong to a vocabulary that was cut; with a whole one
vLLM refuses them. The embedding is the base's, which only a speculators folder repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from draftsmith.contracts import BaseSpec
from draftsmith.exporters.forms import Form, drafts, vllm

OPTIONS = "llm_api_options.yaml"  # JSON is YAML
MAPS = ("d2t", "t2d")
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {  # what makes up each kind of scaling that all readers compute alike
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Eagle3(Form):
    """families: of bases whose hidden states it hands out. lowest, above: those from `lowest` to L - `above`. less: how
    much less its number of one is than ours. repeats: one state may be read twice. at: where config.json tells them."""

    title: str
    families: tuple[str, ...]
    launch: Callable[[str, Any], str]
    lowest: int = 0
    above: int = 0
    less: int = 0
    repeats: bool = False
    at: Callable[[list[int]], dict[str, Any]] = lambda ids: {"eagle_aux_hidden_state_layer_ids": ids}
    layer: str = "midlayer"

    def refusal(self, head: Any, base: Any) -> str | None:
        spec, layers = head.spec, head.layers
        top = spec.num_layers - self.above
        if spec.family not in self.families:
            return f"{self.title} hands out the hidden states of {', '.join(self.families)} bases, not of {spec.family}"
        if not self.repeats and len(set(layers)) < len(layers):
            return f"{self.title} hands out each hidden state once, and layers={list(layers)} asks for one twice"
        if min(layers) < self.lowest or max(layers) > top:
            return f"{self.title} hands out the hidden states {self.lowest}..{top}, not {list(layers)}"
        if rope(spec, base) is None:
            return f"config.json cannot say how keys of this base turn ({_declared(base)}), only {', '.join(SCALED)}"
        return None

    def names(self, head: Any) -> dict[str, str]:
        kept = [n for n in head.state_dict() if n not in MAPS or _cut(head)]
        return {n: n.replace("midlayer", self.layer, 1) for n in kept}

    def implied(self, head: Any) -> dict[str, Tensor]:
        size = head.spec.vocab_size
        whole = {"d2t": torch.zeros(size, dtype=torch.long), "t2d": torch.ones(size, dtype=torch.bool)}
        return {} if _cut(head) else whole

    def ids(self, head: Any) -> list[int]:
        return [layer - self.less for layer in head.layers]

    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            **llama(head.spec, base),
            "draft_vocab_size": head.draft_vocab,
            **self.at(self.ids(head)),
            "base_model_name_or_path": head.spec.path,
            "torch_dtype": dtype,
        }

    def start(self, folder: Path, head: Any, base: Any) -> str:
        return self.launch(str(folder), head)


class Speculators(Eagle3):
    """The folder of the speculators library, which vLLM starts by itself: it names the base. It holds a copy of the
    embedding, as the library's own folders do: without one, 0.9.0 reads whatever lies in memory."""

    def copies(self, head: Any, base: Any) -> dict[str, Tensor]:
        return {"embed_tokens.weight": base.model.get_input_embeddings().weight}

    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        proposal = {"proposal_type": "greedy", "speculative_tokens": drafts(head)}
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "transformer_layer_config": llama(head.spec, base),
            "draft_vocab_size": head.draft_vocab,
            "target_hidden_size": head.spec.hidden_size,
            **self.at(self.ids(head)),
            **dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False),
            "embed_requires_grad": False,
            "tie_word_embeddings": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": {"name_or_path": head.spec.path, "architectures": [type(base.model).__name__]},
            },
            "torch_dtype": dtype,
        }


class TensorRTLLM(Eagle3):
    """Its options name the hidden states; the folder cannot."""

    def others(self, folder: Path, head: Any) -> dict[str, Any]:
        told = {"decoding_type": "Eagle3", "max_draft_len": drafts(head), "speculative_model": str(folder.resolve())}
        return {OPTIONS: {"speculative_config": {**told, "eagle3_layers_to_capture": self.ids(head)}}}


def llama(spec: BaseSpec, base: Any) -> dict[str, Any]:
    """The layer as transformers describes it, with the rotation in today's key and in those of older readers."""
    turning = rope(spec, base)
    assert turning is not None
    scaling = {k: v for k, v in turning.items() if k != "rope_theta"}
    return {
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": spec.norm_eps,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": False,
        "rope_parameters": turning,
        "rope_theta": turning["rope_theta"],
        "rope_scaling": None if turning["rope_type"] == "default" else scaling,
    }


def rope(spec: BaseSpec, base: Any) -> dict[str, Any] | None:
    """How the head's keys turn, in transformers' words: plainly, or as the base's configuration says, where that is
    what they do; None where neither is."""
    wanted = torch.tensor(spec.rope_frequencies) if spec.rope_frequencies else turns(PLAIN, spec.head_dim)
    plain = {**PLAIN, "rope_theta": spec.rope_theta} if spec.rope_frequencies else PLAIN
    for told in (plain, _declared(base)):
        keys = ("rope_type", "rope_theta", *SCALED.get(told.get("rope_type", ""), ("unknown",)))
        sayable = spec.rope_scale == 1 and all(key in told for key in keys)
        if sayable and torch.allclose(turns(told, spec.head_dim), wanted, rtol=1e-5, atol=0):
            return {key: told[key] for key in keys}
    return None


def turns(told: dict[str, Any], size: int) -> Tensor:
    """Radians per position of each pair of a head of this size, as readers compute them from these parameters."""
    plain = told["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    if told["rope_type"] == "default":
        return plain
    if told["rope_type"] == "linear":
        return plain / told["factor"]
    low, high, trained = (told[k] for k in SCALED["llama3"][1:])
    # the share of a turn kept as it is: all of what turns often within the trained length, nothing of what hardly does
    kept = (((trained * plain / (2 * math.pi)) - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / told["factor"])


def _declared(base: Any) -> dict[str, Any]:
    return getattr(base.model.config, "rope_parameters", None) or {}


def _cut(head: Any) -> bool:
    """Whether its vocabulary is a part of the base's."""
    return head.draft_vocab < head.spec.vocab_size


def _vllm(folder: str, head: Any) -> str:
    return vllm(head.spec.path, method="eagle3", model=folder, num_speculative_tokens=drafts(head))


def _sglang(folder: str, head: Any) -> str:
    depth = drafts(head)
    return (
        f"python -m sglang.launch_server --model-path {quote(head.spec.path)} --speculative-algorithm EAGLE3"
        f" --speculative-draft-model-path {quote(folder)} --speculative-num-steps {depth} --speculative-eagle-topk 1"
        f" --speculative-num-draft-tokens {depth + 1}"
    )


def _tensorrt_llm(folder: str, head: Any) -> str:
    options = quote(f"{folder}/{OPTIONS}")
    return f"trtllm-serve {quote(head.spec.path)} --backend pytorch --extra_llm_api_options {options}"


def _llama_cpp(folder: str, head: Any) -> str:
    base = head.spec.path
    gguf = {path: quote(f"{path.rstrip('/')}.gguf") for path in (base, folder)}
    return (
        f"python convert_hf_to_gguf.py {quote(base)} --outfile {gguf[base]}"
        f" && python convert_hf_to_gguf.py {quote(folder)} --target-model-dir {quote(base)} --outfile {gguf[folder]}"
        f" && llama-server -m {gguf[base]} -md {gguf[folder]} --spec-type draft-eagle3"
        f" --spec-draft-n-max {drafts(head)} --spec-draft-p-min 0.0"
    )


def _nested(ids: list[int]) -> dict[str, Any]:
    return {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": ids}}


# Families: those of ours whose classes hand out hidden states, vLLM 0.32, SGLang 0.5.23, llama.cpp 0c1e5709
VLLM = Eagle3("vLLM", ("llama", "mistral", "phi3", "qwen2", "qwen3"), _vllm)
SPECULATORS = Speculators("vLLM", VLLM.families, lambda folder, head: f"vllm serve {quote(folder)}", layer="layers.0")
SGLANG = Eagle3(
    "SGLang", ("llama", "mistral", "phi3", "qwen2", "qwen3"), _sglang, lowest=1, above=1, less=1, at=_nested
)
LLAMA_CPP = Eagle3("llama.cpp", ("llama", "mistral", "qwen3"), _llama_cpp, above=1, repeats=True)
TENSORRT_LLM = TensorRTLLM(
    "TensorRT-LLM", ("llama", "qwen3"), _tensorrt_llm, lowest=1, above=1, less=1, at=lambda ids: {}
)
