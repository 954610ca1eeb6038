"""Shared by all tests: an environment without network and with one thread, tiny random bases, random heads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,  # a tied random base likes to repeat its last token
}
WINDOW = 11  # shorter than the texts of the tests, so that it matters
# family -> transformers' class prefix, and what differs from SHAPE (None: the family has no such key)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": None, "num_key_value_heads": None}),
}


def make_base(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    import transformers

    from draftsmith.base.lm import BaseLM

    prefix, differs = FAMILIES[family]
    shape = {k: v for k, v in {**SHAPE, **differs, **changes}.items() if k.endswith("_id") or v is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{prefix}Config")(**shape)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        with torch.no_grad():
            for p in model.parameters():
                # Fresh weights give nearly equal logits and fresh biases are zero: liven both up, the biases
                # little, or every text is drawn to one token.
                p.copy_(p * 8 if p.dim() > 1 else p + 0.05 * torch.randn_like(p))
    return BaseLM(model)


def make_micro(folder: Path, shape: dict[str, Any], rows: int, prompts: int = 6) -> Path:
    """The folder with base/ (random weights, a real tokenizer), `rows` rows of token ids in rows.jsonl, no two of which
    fit into 64 tokens, chats.jsonl and `prompts` prompts in prompts.jsonl."""
    from draftsmith.base import create
    from draftsmith.data import synthetic

    chats = list(synthetic.dialogues(40, seed=5))
    tokenizer = synthetic.train_tokenizer(chats, 400)
    (folder / "base").mkdir()
    create.save(create.llama(shape, tokenizer, seed=0), tokenizer, folder / "base")
    rng, made = random.Random(0), []
    for i in range(rows):
        ids = [rng.randrange(10, 300) for _ in range(rng.randint(40, 60))]
        made.append({"id": str(i), "ids": ids, "mask": [0] * 6 + [1] * (len(ids) - 6)})
    asked = [{"messages": c[:1]} for c in chats[:prompts]]
    for name, lines in (("rows", made), ("chats", [{"messages": c} for c in chats[:12]]), ("prompts", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Recording:
    """A drafter that passes everything on and keeps what went in and out of every step."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs, self.max_depth = drafter, drafter.needs, drafter.max_depth
        self.gated, self.runs_base = getattr(drafter, "gated", False), getattr(drafter, "runs_base", False)
        self.tokens: list[list[int]] = []  # what was emitted before each step, the prompt included
        self.shapes: list[Any] = []
        self.proposals: list[Any] = []

    def propose(self, base: Any, state: Any) -> Any:
        self.tokens.append(list(state.tokens))
        self.shapes.append(state.shape)
        self.proposals.append(self.drafter.propose(base, state))
        return self.proposals[-1]

    def accepted(self, stats: Any) -> list[int]:
        """Drafted tokens kept in each step; the last step's follow from the total."""
        lengths = [len(t) for t in self.tokens]
        known = [after - before - 1 for before, after in itertools.pairwise(lengths)]
        return [*known, stats.accepted - sum(known)]


@pytest.fixture(scope="session")
def tiny_base() -> Any:
    """tiny_base(family, seed=0, **config changes): a base with lively random weights. Leave it as it was."""
    return functools.cache(make_base)


class Made(TorchDispatchMode):
    """The number of elements of each tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, tuple | list) else [out]
        self.elements += [t.numel() for t in several if isinstance(t, torch.Tensor)]
        return out


@pytest.fixture(scope="session")
def made_tensors() -> type[Made]:
    return Made


@pytest.fixture(scope="session")
def micro_maker() -> Any:
    """make_micro(folder, shape, rows, prompts)."""
    return make_micro


@pytest.fixture(scope="session")
def noisy() -> Any:
    """noisy(head, scale, seed=0): noise on every parameter, in place; returns the head."""

    def add(head: Any, scale: float, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(scale * torch.randn(p.shape, generator=generator))
        return head

    return add


@pytest.fixture(scope="session")
def rescorer() -> Any:
    """rescorer(base): a function from token ids to the fp64 logits of the next token."""

    def of(base: Any) -> Any:
        from draftsmith.contracts import Needs

        exact = base.in_float64()
        return lambda ids: exact.capture(Needs(logits=True), torch.tensor([list(ids)])).logits[0, -1]

    return of


@pytest.fixture(scope="session")
def recording() -> type[Recording]:
    return Recording
