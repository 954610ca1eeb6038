"""The frozen base: load it, look inside it, run it. One forward serves training and decoding alike.

`capture` embeds, runs the Hugging Face decoder blocks one by one, and keeps only what a head asked for; it
calls no `model.forward`, which rebuilds masks and caches at every step and cannot stop half way.

Shapes: B rows, T or Q positions of this forward, S slots of the K/V including this forward's, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from draftsmith import contracts
from draftsmith.base import attention, lora, masks, recompute
from draftsmith.base.answering import Sampling, answer
from draftsmith.base.compiling import compile_blocks
from draftsmith.base.families import layer_types, part, paths_of, windows
from draftsmith.base.generation import bare_loop, generate
from draftsmith.base.kv import KV
from draftsmith.base.loading import read
from draftsmith.base.quantise import BlockWeights, made_dense, quantise
from draftsmith.base.settings import LoraConfig
from draftsmith.base.spec import eos_ids_of, spec_of, weights_sha256
from draftsmith.contracts import Capture, Needs
from draftsmith.errors import ConfigError, DataError


class BaseLM:
    """`contracts.BaseView` over any causal language model of the table in families.py.

    Deliberately no nn.Module: a LightningModule that holds one does not register, checkpoint, move or call
    train() on the base. Every parameter is frozen and the model stays in eval mode.

    eos_ids: the tokens that end a text. model: the Hugging Face model itself. recompute: blocks that gradients pass
    through keep their input alone; see recompute.py.
    """

    def __init__(self, model: Any, tokenizer: Any = None, path: str = "", revision: str | None = None) -> None:
        paths = paths_of(model.config)
        if model.config._attn_implementation not in ("eager", paths.attention):
            model.set_attn_implementation(paths.attention)
        if paths.llama_blocks and model.config._attn_implementation == "sdpa":
            attention.install(model)
        model.eval().requires_grad_(False)
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec_of(model, paths, tokenizer, path, revision)
        self.eos_ids = eos_ids_of(model, tokenizer)
        self.paths = paths
        self._embed = part(model, paths.embed)
        self._learned_positions = part(model, paths.learned_positions) if paths.learned_positions else None
        self._layers = list(part(model, paths.layers))
        self._norm = part(model, paths.norm)
        self._rotary = part(model, paths.rotary) if paths.rotary else None
        self._head = part(model, paths.head)
        self._softcap = getattr(model.config, paths.softcap) if paths.softcap else None
        # A block's kind says which mask and which rotation it takes; a base has one kind or two.
        types = layer_types(model.config, paths, len(self._layers))
        spans = windows(model.config, paths, len(self._layers))
        self._kinds = list(zip(types, spans, strict=True))
        self._windowed = any(window is not None for window in spans)
        self.adapter: lora.Adapter | None = None
        self.recompute = self._compiled = False

    def add_adapter(self, source: LoraConfig | Path) -> BaseLM:
        """Gives the base a new adapter to train, or a saved one; returns itself. spec.adapter_sha256 then names the
        saved one; a new one has no name before `name_adapter`."""
        assert self.adapter is None, "the base has an adapter already"
        self.adapter = (lora.load if isinstance(source, Path) else lora.inject)(self.model, cast(Any, source))
        inside = sum(len([m for m in layer.modules() if hasattr(m, "lora_A")]) for layer in self._layers)
        if inside != len(self.adapter.dropouts):
            raise ConfigError(
                "base.lora.targets: only layers inside the base's blocks; heads read its lm_head as it is"
            )
        if isinstance(source, Path):
            self.name_adapter()
        return self

    def name_adapter(self) -> None:
        """From here on the base is told from others by its adapter too."""
        assert self.adapter is not None
        self.spec = dataclasses.replace(self.spec, adapter_sha256=self.adapter.sha256())

    @property
    def device(self) -> torch.device:
        return self._embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.weight.dtype

    def to(self, device: torch.device | str) -> BaseLM:
        """Move the base in place; returns itself."""
        self.model.to(device)
        return self

    def compile(self) -> BaseLM:
        """Every block through torch.compile (compiling.py); returns itself. Needs a C++ compiler."""
        compile_blocks(self._layers)
        self._compiled = True
        return self

    def quantise(self, kind: str) -> BaseLM:
        """Keeps the linear layers of its blocks as int8 or int4 (quantise.py); returns itself. spec.quantised tells."""
        quantise(self._layers, kind)
        self.spec = dataclasses.replace(self.spec, quantised=kind)
        return self

    def in_float64(self) -> BaseLM:
        """A copy that computes in fp64: the judge where two fp32 forwards round differently."""
        return BaseLM(
            made_dense(copy.deepcopy(self.model)).double(), self.tokenizer, self.spec.path, self.spec.revision
        )

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self._embed(tokens_BT)

    def enter(self, tokens_BQ: Tensor, positions_BQ: Tensor) -> Tensor:
        """hidden[0], what enters block 0 [B, Q, D]: the embedding, plus learned positions where a family has
        them (opt); for all others `embed` itself."""
        hidden_BQD = self._embed(tokens_BQ)
        if self._learned_positions is not None:
            hidden_BQD = hidden_BQD + self._learned_positions(None, position_ids=positions_BQ)
        return hidden_BQD

    def final_norm(self, hidden_BTD: Tensor) -> Tensor:
        return self._norm(hidden_BTD)

    def lm_head(self, final_BTD: Tensor) -> Tensor:
        logits_BTV = self._head(final_BTD)
        if self._softcap is not None:
            logits_BTV = torch.tanh(logits_BTV / self._softcap) * self._softcap
        return logits_BTV

    @property
    def lm_head_weight(self) -> Tensor:
        return self._head.weight

    @property
    def lm_head_bias(self) -> Tensor | None:
        return self._head.bias

    @property
    def lm_head_softcap(self) -> float | None:
        return self._softcap

    def new_kv(self, num_layers: int | None = None, *, capacity: int = 256) -> KV:
        """Empty K/V with this many slots made ahead; they double as needed."""
        if num_layers is not None:
            return KV(num_layers, capacity)
        return KV(len(self._layers), capacity, windowed=self._windowed)

    def block_weights(self, layer: int) -> Mapping[str, Tensor]:
        assert self.spec.llama_blocks, f"the blocks of {self.spec.family} are not Llama's"
        return BlockWeights(self._layers[layer])

    def run_layers(
        self,
        hidden_BQD: Tensor,
        start: int,
        stop: int,
        *,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: contracts.KV | None = None,
    ) -> Tensor:
        """Blocks start..stop-1 [B, Q, D] -> [B, Q, D], differentiable with respect to hidden_BQD.

        mask_BQS: bool, True = may attend; None = causal over all slots of layer `start` and this forward's.
        With a K/V, gradients flow through this forward's own slots only. A sliding window is added to the
        mask by the block's own rule.
        """
        inputs = self._block_inputs(hidden_BQD, start, positions_BQ, mask_BQS, kv)
        for layer in range(start, stop):
            hidden_BQD = self._run_block(layer, hidden_BQD, inputs)
        return hidden_BQD

    def capture(
        self,
        needs: Needs,
        tokens_BQ: Tensor,
        *,
        positions_BQ: Tensor | None = None,
        mask_BQS: Tensor | None = None,
        kv: contracts.KV | None = None,
        entered: tuple[int, Tensor] | None = None,
        documents_BQ: Tensor | None = None,
    ) -> Capture:
        """One forward, without gradients unless an adapter is trained; keeps what `needs` names and nothing else.

        Stops after the last block that is needed: with a K/V, the blocks above keep their older length. `entered`
        begins with that forward's residual stream instead of the embedding, at the block above it.
        """
        if needs.teacher:  # the base itself teaches by what its lm_head reads
            needs = dataclasses.replace(needs, final=True, teacher=False)
        how = (tokens_BQ, positions_BQ, mask_BQS, documents_BQ)
        if needs.original:
            with lora.switched_off(self.model), torch.no_grad():
                original = self._capture(Needs(final=True), *how, None, None).final
            needs = dataclasses.replace(needs, original=False)
            with torch.set_grad_enabled(needs.adapter and torch.is_grad_enabled()):
                return dataclasses.replace(self._capture(needs, *how, kv, entered), original=original)
        with torch.set_grad_enabled(needs.adapter and torch.is_grad_enabled()):
            return self._capture(needs, *how, kv, entered)

    def _capture(
        self,
        needs: Needs,
        tokens_BQ: Tensor,
        positions_BQ: Tensor | None,
        mask_BQS: Tensor | None,
        documents_BQ: Tensor | None,
        kv: contracts.KV | None,
        entered: tuple[int, Tensor] | None,
    ) -> Capture:
        top = self._last_needed(needs)
        counted = positions_BQ is None
        if positions_BQ is None:
            past = 0 if kv is None else cast(KV, kv).get_seq_length(0)
            stop = past + tokens_BQ.shape[1]
            if self._learned_positions is not None and stop > self.spec.max_positions:
                raise DataError(f"base: {stop} tokens, but it has only {self.spec.max_positions} positions")
            positions_BQ = torch.arange(past, stop, device=tokens_BQ.device).unsqueeze(0)
        begin, hidden_BQD = (0, self.enter(tokens_BQ, positions_BQ)) if entered is None else entered
        wanted = needs.hidden
        assert begin <= min(wanted, default=begin), (
            f"hidden {sorted(wanted)} of a forward that begins above block {begin}"
        )
        spans = None if documents_BQ is None else self._spans(documents_BQ)
        if documents_BQ is not None and spans is None:
            mask_BQS = contracts.visible(documents_BQ)
        inputs = self._block_inputs(hidden_BQD, begin, positions_BQ, mask_BQS, kv, counted) if top > begin else {}
        for given in inputs.values() if spans is not None else ():
            given |= {"spans": spans, "attention_mask": None}
        seen = {begin: hidden_BQD} if begin in wanted else {}
        for layer in range(begin, top):
            hidden_BQD = self._run_block(layer, hidden_BQD, inputs)
            if layer + 1 in wanted:
                seen[layer + 1] = hidden_BQD
        if not (needs.final or needs.logits):
            return Capture(seen)
        final_BQD = self._norm(hidden_BQD)
        return Capture(seen, final_BQD if needs.final else None, self.lm_head(final_BQD) if needs.logits else None)

    def _spans(self, documents_BQ: Tensor) -> attention.Spans | None:
        """The documents, where its blocks can take one after the other; None: a mask has to tell them apart."""
        if self.model.config._attn_implementation != attention.NAME or documents_BQ.is_cuda or self._compiled:
            return None
        spans, shortest = attention.spans_of(documents_BQ), min((w for _, w in self._kinds if w), default=None)
        return None if shortest and any(stop - start > shortest for _, start, stop in spans) else spans

    def _run_block(self, layer: int, hidden_BQD: Tensor, inputs: dict[Any, dict[str, Any]]) -> Tensor:
        block, given = self._layers[layer], inputs[self._kinds[layer]]
        if self.recompute:
            return recompute.run(block, hidden_BQD, given, given.get(self.paths.kv_argument))
        return block(hidden_BQD, **given)

    def weights_sha256(self) -> str:
        """Hash of every parameter and buffer: the same before and after whatever we do to a base. An adapter's are
        not the base's."""
        return weights_sha256(self.model, self.paths.rotary)

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        eos: bool = True,
    ) -> list[list[int]]:
        """New token ids per prompt, by Hugging Face's own `generate`; see generation.py."""
        return generate(
            self.model,
            prompts,
            eos_ids=self.eos_ids if eos else frozenset(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
        )

    def bare_loop(self, prompt: Sequence[int], *, max_new_tokens: int) -> list[int]:
        """New greedy ids of one prompt by the plainest loop over the model; see generation.py."""
        return bare_loop(self.model, prompt, max_new_tokens)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (),
        batch_size: int = 64,
    ) -> list[list[int]]:
        """New token ids per prompt, many prompts per forward; see answering.py. The same greedy tokens as
        `generate`, several times as fast."""
        return answer(self, prompts, Sampling(max_new_tokens, temperature, top_p), seeds, batch_size)

    def _last_needed(self, needs: Needs) -> int:
        layers = len(self._layers)
        top = layers if needs.final or needs.logits else max(needs.hidden, default=0)
        if needs.hidden and not 0 <= min(needs.hidden) <= max(needs.hidden) <= layers:
            raise ConfigError(
                f"needs.hidden: {sorted(needs.hidden)} asked of a base with layers 0..{layers}; "
                "0 is the embedding, the last is before the final norm"
            )
        return top

    def _block_inputs(
        self,
        hidden_BQD: Tensor,
        start: int,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None,
        kv: contracts.KV | None,
        counted: bool = False,
    ) -> dict[tuple[str, int | None], dict[str, Any]]:
        """Keyword arguments of a block, by its kind: built once per forward, shared by all blocks.

        counted: the positions are 0, 1, 2, … of one text, so that a window longer than it hides nothing.
        """
        slots = cast("KV | None", kv)
        past = 0 if slots is None else slots.get_seq_length(start)
        queries = hidden_BQD.shape[1]
        assert mask_BQS is None or (
            mask_BQS.dtype == torch.bool and mask_BQS.shape[-2:] == (queries, past + queries)
        ), f"mask {mask_BQS.dtype} {tuple(mask_BQS.shape)}, not bool [B, {queries}, {past + queries}]"
        # A lone query sees every slot, so it needs no mask. Nor does a first forward under sdpa, whose own
        # causal rule is exact there; but with older slots it would align the mask to the wrong corner.
        eager = self.model.config._attn_implementation == "eager"
        if mask_BQS is None and queries > 1 and (past or eager):
            mask_BQS = masks.causal_mask(queries, past + queries, hidden_BQD.device)
        positions_BS = positions_BQ
        if slots is not None and self._windowed:
            positions_BQ = positions_BQ.expand(hidden_BQD.shape[0], queries)
            positions_BS = slots.place(positions_BQ, start)

        inputs = {}
        shared: dict[str, Any] = {} if slots is None else {self.paths.kv_argument: slots}
        if self._rotary is not None and not self.paths.rotary_by_type:
            shared["position_embeddings"] = self._rotary(hidden_BQD, positions_BQ)
        for kind, window in dict.fromkeys(self._kinds[start:]):
            seen_BQS = mask_BQS
            if window is not None and not (counted and past == 0 and queries <= window):
                seen_BQS = masks.within_window(positions_BQ, positions_BS, window)
                if mask_BQS is not None:
                    seen_BQS = seen_BQS & mask_BQS
                elif queries > 1:
                    seen_BQS = seen_BQS & masks.causal_mask(queries, past + queries, hidden_BQD.device)
            mask = None if seen_BQS is None else masks.additive(seen_BQS, hidden_BQD.dtype)
            inputs[kind, window] = {**shared, "attention_mask": mask}
            if self._rotary is not None and self.paths.rotary_by_type:
                inputs[kind, window]["position_embeddings"] = self._rotary(hidden_BQD, positions_BQ, kind)
        return inputs


def load(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    adapter: str | None = None,
    quantise: str | None = None,
) -> BaseLM:
    """A frozen base from a folder or hub id that transformers loads; its tokenizer too where it has one.

    dtype: float32, bfloat16, float16 or float64. Only safetensors are read. ConfigError for an unknown
    dtype or family; DataError where there is no model, or where a weight is missing or has another shape
    (transformers would only warn, and leave the weight random). adapter: the folder of one in peft's format.
    quantise: int8 or int4, not with an adapter.
    """
    if adapter and quantise:
        raise ConfigError("base.adapter, base.quantise: an adapter sits on dense layers; leave one of them out")
    model, tokenizer = read(path, revision, dtype, trust_remote_code)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # an artifact that names this base is read from other folders
    base = BaseLM(model, tokenizer, path, revision)
    if quantise:
        base.quantise(quantise)  # before it moves: the dense weights never lie on the device
    return (base.add_adapter(Path(adapter)) if adapter else base).to(device)
