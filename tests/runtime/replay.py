"""What a server must accept, foretold from an exported folder's files: plain torch, nothing of draftsmith.

The base is transformers'; a head is its safetensors and its config.json, computed here once more, position by position,
without a cache. A greedy text is known, so a step is: the drafts after its root, and how many of them the text has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, normalize, silu
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Counts:
    """As a server counts: verifications that had drafts, drafted tokens, accepted ones, and those by position."""

    drafts: int
    drafted: int
    accepted: int
    by_position: tuple[int, ...]

    def __add__(self, other: Counts) -> Counts:
        longer, shorter = sorted((self.by_position, other.by_position), key=len, reverse=True)
        by = tuple(n + (shorter[k] if k < len(shorter) else 0) for k, n in enumerate(longer))
        return Counts(self.drafts + other.drafts, self.drafted + other.drafted, self.accepted + other.accepted, by)


class Base:
    """A Hugging Face model in fp32. states: what it leaves for a text, by the layer convention of the heads: hidden[l]
    [T, D] after l blocks, before the final norm; final [T, D] after it."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = self.model.config
        self.embedding_VD = self.model.get_input_embeddings().weight.detach()
        self.lm_head_VD = self.model.get_output_embeddings().weight.detach()
        self.norm_D = self.model.model.norm.weight.detach()

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The prompt and `count` more tokens."""
        out = self.model.generate(
            torch.tensor([list(prompt)]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return out[0].tolist()

    @torch.no_grad()
    def two_tokens(self, prompt: Sequence[int], temperature: float) -> Tensor:
        """The distribution of the next two tokens [V, V]."""
        texts_VT = torch.tensor([[*prompt, token] for token in range(self.config.vocab_size)])
        logits_V2V = torch.cat([self.model(some).logits[:, -2:] for some in texts_VT.split(64)])
        one_V, two_VV = (logits_V2V[0, 0] / temperature).softmax(-1), (logits_V2V[:, 1] / temperature).softmax(-1)
        return one_V.double()[:, None] * two_VV.double()

    @torch.no_grad()
    def states(self, ids: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        caught = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
        try:
            out = self.model.model(torch.tensor([list(ids)]), output_hidden_states=True)
        finally:
            hook.remove()
        hidden = [h[0] for h in out.hidden_states[:-1]]
        return [*hidden, caught[0]], out.last_hidden_state[0]


def rms(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight_D


def turned(x_HTd: Tensor, theta: float) -> Tensor:
    """Rotary embedding at positions 0, 1, …: the first half of a head with the second."""
    size = x_HTd.shape[-1]
    angles = torch.arange(x_HTd.shape[1])[:, None] * theta ** -(torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    one, two = x_HTd.chunk(2, -1)
    return x_HTd * cos + torch.cat([-two, one], -1) * sin


def attention(x_TW: Tensor, weights: dict[str, Tensor], heads: int, kv_heads: int, theta: float) -> Tensor:
    """Causal, of every position at once; weights: q_proj.weight … o_proj.weight."""
    q, k, v = (
        linear(x_TW, weights[f"{n}_proj.weight"]).unflatten(-1, (h, -1)).transpose(0, 1)
        for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    scores = turned(q, theta) @ turned(k, theta).transpose(1, 2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(len(x_TW), len(x_TW)).triu(1).bool(), float("-inf"))
    return linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), weights["o_proj.weight"])


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def mlp(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    gate, up = (linear(x, weights[f"{n}_proj.weight"]) for n in ("gate", "up"))
    return linear(silu(gate) * up, weights["down_proj.weight"])


def resblock(x: Tensor, weights: dict[str, Tensor], bias: bool = True) -> Tensor:
    return x + silu(linear(x, weights["weight"], weights["bias"] if bias else None))


Draft = Callable[[int, int], list[int]]
"""(root's place in the text, most drafts) -> the drafts after it."""


class Head:
    """One exported folder beside one base, for one text at a time (`read`)."""

    weights = "model.safetensors"

    def __init__(self, folder: Path, base: Base) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {k: t.float() for k, t in load_file(folder / self.weights).items()}
        self.base = base
        text = base.config
        self.eps, self.heads, self.kv_heads = text.rms_norm_eps, text.num_attention_heads, text.num_key_value_heads
        self.theta = text.rope_parameters["rope_theta"]

    def read(self, ids: list[int]) -> None:
        self.ids = ids
        self.streams, self.final = self.base.states(ids)

    def draft(self, root: int, most: int) -> list[int]:
        raise NotImplementedError


class PortableMedusa(Head):
    """Bare names; head i, 0-based, drafts depth i + 1 from the state before the root."""

    weights = "medusa_lm_head.safetensors"

    def draft(self, root: int, most: int) -> list[int]:
        found = []
        for i in range(most):
            x = self.final[root - 1]
            for j in range(self.config["medusa_num_layers"]):
                x = resblock(x, below(self.tensors, f"{i}.{j}.linear."), self.config.get("medusa_fc_bias", False))
            found.append(int(linear(x, self.tensors[f"{i}.{self.config['medusa_num_layers']}.weight"]).argmax()))
        return found


class VllmMedusa(Head):
    """vLLM's own names; with original_lm_head one matrix for all heads."""

    def draft(self, root: int, most: int) -> list[int]:
        found, shared = [], self.config.get("original_lm_head", False)
        for i in range(most):
            x = self.final[root - 1]
            for j in range(self.config["num_hidden_layers"]):
                x = resblock(
                    x, below(self.tensors, f"blocks.{i}.layers.{j}."), self.config.get("medusa_fc_bias", False)
                )
            found.append(int(linear(x, self.tensors[f"lm_heads.{0 if shared else i}.weight"]).argmax()))
        return found


class Medusa(Head):
    """The native folder's."""

    def draft(self, root: int, most: int) -> list[int]:
        found, own = [], self.config["head"]
        for i in range(most):
            x = self.final[root - 1]
            for j in range(own["num_layers"]):
                x = resblock(x, below(self.tensors, f"blocks.{i}.{j}.linear."))
            end = self.base.lm_head_VD if own["share_lm_head"] else self.tensors[f"lm_heads.{i}.weight"]
            found.append(int(linear(x, end).argmax()))
        return found


class Hydra(Head):
    """Head k reads the state before the root, E(root) and E of the k - 1 drafts before its own. states: h_1, h_2, …,
    as many as have been made, for whoever judges drafts."""

    def hidden(self, root: int, drafts: Sequence[int]) -> Tensor:
        k = len(drafts)
        read = torch.tensor([self.ids[root], *drafts])
        u = torch.cat([self.final[root - 1], self.base.embedding_VD[read].flatten()])
        first = below(self.tensors, f"blocks.{k}.0.")
        h = linear(u, first["residual.weight"], first["residual.bias"])
        h = h + silu(linear(u, first["linear.weight"], first["linear.bias"]))
        for j in range(1, self.config["head"]["num_layers"]):
            h = resblock(h, below(self.tensors, f"blocks.{k}.{j}.linear."))
        return h

    def next(self, h: Tensor, k: int) -> int:
        return int(linear(h, self.tensors[f"lm_heads.{k}.weight"], self.tensors[f"lm_heads.{k}.bias"]).argmax())

    def draft(self, root: int, most: int) -> list[int]:
        found: list[int] = []
        for k in range(most):
            found.append(self.next(self.hidden(root, found), k))
        return found


class Gated:
    """A Hydra and a SpecDec++ gate: a draft is judged once it has been read, by the chance that all so far are kept."""

    def __init__(self, gate: Path, hydra: Hydra) -> None:
        self.config = json.loads((gate / "config.json").read_text())["head"]
        self.tensors = {k: t.float() for k, t in load_file(gate / "model.safetensors").items()}
        self.hydra = hydra

    def read(self, ids: list[int]) -> None:
        self.hydra.read(ids)

    def chance(self, h: Tensor) -> float:
        for j in range(self.config["num_layers"]):
            h = resblock(h, below(self.tensors, f"blocks.{j}.linear."))
        return float(linear(h, self.tensors["out.weight"], self.tensors["out.bias"]).softmax(-1)[1])

    def draft(self, root: int, most: int) -> list[int]:
        found: list[int] = []
        kept = 1.0
        for k in range(most):
            h = self.hydra.hidden(root, found)
            found.append(self.hydra.next(h, k))
            if k:  # h has read the draft before the newest one, which is not judged yet
                kept *= self.chance(h)
                if 1 - kept > self.config["threshold"] and len(found) >= self.config["min_depth"]:
                    break
        return found


class Clover(Head):
    """h_0 from a Llama block over all states before the root; then one connection per draft."""

    def read(self, ids: list[int]) -> None:
        super().read(ids)
        x, layer = self.streams[-1], below(self.tensors, "layer.")
        normed = rms(x, layer["input_layernorm.weight"], self.eps)
        x = x + attention(normed, below(layer, "self_attn."), self.heads, self.kv_heads, self.theta)
        x = x + mlp(rms(x, layer["post_attention_layernorm.weight"], self.eps), below(layer, "mlp."))
        self.start = rms(x, self.base.norm_D, self.eps)

    def draft(self, root: int, most: int) -> list[int]:
        h, token, found = self.start[root - 1], self.ids[root], []
        for k in range(most):
            mine = below(self.tensors, f"connections.{k}.")
            e = normalize(self.base.lm_head_VD[token], dim=-1)
            q = linear(rms(h, mine["input_layernorm.weight"], self.eps), mine["q.weight"]).unflatten(
                -1, (self.heads, -1)
            )
            key, v = (linear(e, mine[f"{n}.weight"]).unflatten(-1, (self.heads, -1)) for n in "kv")
            s = (q * key).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
            h = h + silu((s * v).flatten())
            x = resblock(h, below(self.tensors, f"blocks.{k}.linear."))
            token = int(linear(x, self.base.lm_head_VD).argmax())
            found.append(token)
        return found


class Kangaroo(Head):
    """The base's first blocks over text and drafts, then the adapter; it ends after a draft that is not sure."""

    def draft(self, root: int, most: int) -> list[int]:
        found: list[int] = []
        own, ids = self.config["head"], self.ids[: root + 1]
        layer = self.config["needs"]["hidden"][0]
        while len(found) < most:
            x = self.base.states([*ids, *found])[0][layer]
            normed = rms(x, self.tensors["input_layernorm.weight"], self.eps)
            x = x + attention(normed, below(self.tensors, "self_attn."), self.heads, self.kv_heads, self.theta)
            logits = linear(rms(x[-1], self.tensors["norm.weight"], self.eps), self.base.lm_head_VD)
            found.append(int(logits.argmax()))
            if float(logits.softmax(-1).max()) < own["threshold"]:
                break
        return found


class Eagle3(Head):
    """EAGLE-3 as vLLM lays it out: aux layer id i is the state that enters layer i. `ids_are`: what is to be added to
    an id for that, 0 for vLLM, 1 for SGLang."""

    ids_are = 0

    def read(self, ids: list[int]) -> None:
        super().read(ids)
        taps = [self.streams[i + self.ids_are] for i in self.config["eagle_aux_hidden_state_layer_ids"]]
        self.features = linear(torch.cat(taps, -1), self.tensors["fc.weight"])

    def draft(self, root: int, most: int) -> list[int]:
        mid = below(self.tensors, "midlayer.")
        features = self.features[:root]
        tokens, found = self.ids[1 : root + 1], []
        for _ in range(most):
            e = rms(self.base.embedding_VD[torch.tensor(tokens)], mid["input_layernorm.weight"], self.eps)
            x = torch.cat([e, rms(features, mid["hidden_norm.weight"], self.eps)], -1)
            h = features + attention(x, below(mid, "self_attn."), self.heads, self.kv_heads, self.theta)
            h = h + mlp(rms(h, mid["post_attention_layernorm.weight"], self.eps), below(mid, "mlp."))
            column = int(
                linear(rms(h[-1], self.tensors["norm.weight"], self.eps), self.tensors["lm_head.weight"]).argmax()
            )
            token = column + int(self.tensors["d2t"][column]) if "d2t" in self.tensors else column
            features, tokens = torch.cat([features, h[-1:]]), [*tokens, token]
            found.append(token)
        return found


@torch.no_grad()
def foretell(
    head: Any, base: Base, prompts: Sequence[Sequence[int]], most: int, new: int
) -> tuple[Counts, list[list[int]]]:
    """The counts of a server that verifies chains of `most` drafts, and the texts it must return: `new` tokens each."""
    total, texts = Counts(0, 0, 0, (0,) * most), []
    for prompt in prompts:
        ids = base.greedy(prompt, new + most + 1)
        head.read(ids)
        texts.append(ids[len(prompt) : len(prompt) + new])
        root, end = len(prompt), len(prompt) + new  # the prompt's own forward gives the first root
        while root + 1 < end:
            drafts = head.draft(root, most)
            right = [d == ids[root + 1 + k] for k, d in enumerate(drafts)]
            kept = right.index(False) if False in right else len(right)
            by = tuple(int(k < kept) for k in range(most))
            total += Counts(bool(drafts), len(drafts), kept, by)
            root += kept + 1
    return total, texts


class Speculators(Eagle3):
    """The same head in a folder of the speculators library, which calls its layer another name."""

    def __init__(self, folder: Path, base: Base) -> None:
        super().__init__(folder, base)
        self.tensors = {k.replace("layers.0.", "midlayer."): t for k, t in self.tensors.items()}


def gated(gate: Path, base: Base) -> Gated:
    """A gate's folder, its drafter inside."""
    return Gated(gate, Hydra(gate / "drafter", base))
