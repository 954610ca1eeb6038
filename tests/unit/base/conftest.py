"""Tiny random bases, one per family and one per quirk, made in code."""

import copy
from typing import Any

import pytest
import torch
import transformers

from draftsmith.base.lm import BaseLM

WINDOW = 7  # shorter than every sequence in these tests
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# name -> (transformers' prefix, what differs from SIZES); None takes a size away
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3_rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_windowed": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral_unwindowed": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3_partial_rotary": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "gpt_neox_sequential": ("GPTNeoX", {"num_key_value_heads": None, "use_parallel_residual": False}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": None}),
}


def tiny_model(name: str, **more: Any) -> Any:
    prefix, differs = BASES[name]
    kwargs = {**SIZES, **differs, **more}
    removed = [key for key, value in differs.items() if value is None and key != "sliding_window"]
    for key in removed:
        del kwargs[key]
    config_class = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    torch.manual_seed(0)
    model = getattr(transformers, prefix + "ForCausalLM")(config_class(**copy.deepcopy(kwargs)))
    with torch.no_grad():
        for parameter in model.parameters():
            # A fresh model is nearly uniform in its logits and has trivial norms and biases: liven it up.
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session", params=list(BASES))
def base(request: pytest.FixtureRequest) -> BaseLM:
    """Every family and quirk in turn; tests must leave it as they found it."""
    return BaseLM(tiny_model(request.param))


@pytest.fixture(scope="session")
def llama() -> BaseLM:
    return BaseLM(tiny_model("llama"))


@pytest.fixture
def make_model() -> Any:
    """tiny_model(name of BASES, **config changes)."""
    return tiny_model


@pytest.fixture
def base_names() -> list[str]:
    return list(BASES)


@pytest.fixture
def close() -> Any:
    """assert_close for fp32 results whose operations ran in another order."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        error = float((actual - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"differs by {error:.2e}"

    return check


@pytest.fixture(scope="session")
def greedy():
    """greedy(base, prompt, count): the next tokens by one full forward each."""

    @torch.no_grad()
    def loop(base, prompt, count):
        out = list(prompt)
        for _ in range(count):
            out.append(int(base.model(torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
        return out[len(prompt) :]

    return loop
