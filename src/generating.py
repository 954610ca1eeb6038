"""Hugging Face's `generate` with a head: what the arguments of the call mean to our engine.

A folder of exporter=custom_generate brings a file that calls `generate` here. transformers prepares the call itself,
as for any decoding loop that it is given: lengths, mask, special tokens, what changes the logits and what ends a text.
Of that the engine does greedy decoding and sampling with temperature, top_k and top_p; whatever else would change a
token is refused by its name.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from draftsmith import artifacts
from draftsmith.api import company
from draftsmith.base import attention, lora
from draftsmith.base.lm import BaseLM
from draftsmith.base.spec import tokenizer_sha256
from draftsmith.beside import Beside
from draftsmith.contracts import BaseSpec, Head
from draftsmith.decoding.engine import Generation, decode
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.judging import tuned_tree
from draftsmith.roles import Proposal, Verdict

# What is given to the call itself and what no loop that transformers prepares would hear of.
REFUSED = {
    "assistant_model": "the head drafts",
    "synced_gpus": "every process would accept another number of drafts",
    "logits_processor": "drafts are verified against the base's own logits",
    "stopping_criteria": "a text ends at eos_token_id, max_new_tokens or max_length",
    "past_key_values": "the engine keeps its own K/V; give the whole text as input_ids",
    "position_ids": "positions are counted from the first token that attention_mask shows",
    "inputs_embeds": "heads read tokens; give input_ids",
    "stop_strings": "a text ends at eos_token_id, max_new_tokens or max_length",
    "token_healing": "the prompt is taken as it is",
}
# transformers' class, or its way of generating -> the argument that asks for it, where its name does not say so.
ASKED_BY = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "WatermarkLogitsProcessor": "watermarking_config",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "TopHLogitsWarper": "top_h",
    "MinPLogitsWarper": "min_p",
    "TypicalLogitsWarper": "typical_p",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
    "MaxTimeCriteria": "max_time",
    "beam_search": "num_beams",
    "beam_sample": "num_beams",
    "group_beam_search": "num_beam_groups",
    "constrained_beam_search": "force_words_ids",
    "contrastive_search": "penalty_alpha",
    "dola_generation": "dola_layers",
    "assisted_generation": "prompt_lookup_num_tokens, use_mtp",
}
PREPARED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache"}

HEADS: WeakKeyDictionary[Any, dict[Any, tuple[Any, Head]]] = WeakKeyDictionary()  # of each model: folder -> its head
CHANGING = threading.RLock()  # held while a model is not as its owner left it


def generate(
    folder: str | Path, model: Any, *, streamer: Any = None, tokenizer: Any = None, **arguments: Any
) -> Tensor:
    """[B, T + new]: the prompts as they were given, and after each what `model.generate` would say, padded on the
    right; greedy exactly, sampled with the same distribution. tokenizer: only compared with the head's.

    ValueError for a head of another base, and for an argument that cannot be honoured.
    """
    _check(model, arguments)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        return _Call(input_ids, **{**prepared, "streamer": streamer}).answer(base, head)

    with lent(model) as base:
        head = _loaded(Path(folder), base, tokenizer)
        return type(model).generate(model, **arguments, streamer=streamer, custom_generate=loop)


def refuse(argument: str, why: str) -> ConfigError:
    return ConfigError(f"{argument}: not with a head ({why}); leave it out, or generate without custom_generate")


def _check(model: Any, arguments: dict[str, Any]) -> None:
    """What the loop would not hear of: arguments of the call, and where the model lies."""
    configs = (arguments.get("generation_config"), model.generation_config)
    for name, why in REFUSED.items():
        values = (arguments.get(name), *(getattr(config, name, None) for config in configs))
        value = next((v for v in values if v is not None), None)
        if value is not None and value is not False and not (isinstance(value, list) and not value):
            raise refuse(name, why)
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ConfigError("device_map: the model lies on several devices; load it on one, the head is beside it")


class _Call:
    """One call, as transformers prepared it."""

    def __init__(
        self,
        input_ids: Tensor,
        *,
        streamer: Any,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        **more: Any,
    ) -> None:
        way = generation_config.get_generation_mode().value
        if way not in ("greedy_search", "sample"):
            raise refuse(ASKED_BY.get(way, way), f"{way.replace('_', ' ')} is another way of decoding")
        if generation_config.return_dict_in_generate:
            raise refuse("return_dict_in_generate", "token ids are returned, and no scores or states are kept")
        if unknown := sorted(n for n in more.keys() - PREPARED if more[n] is not None and more[n] is not False):
            raise refuse(unknown[0], "the engine runs the base on input_ids and attention_mask alone")
        self.input_ids_BT = input_ids
        self.prompts = _prompts(input_ids, more.get("attention_mask"))
        self.decoding = _decoding(generation_config.do_sample, logits_processor)
        self.eos, self.limit = _ends(stopping_criteria, input_ids.shape[1])
        pad = generation_config.pad_token_id
        self.pad: int | None = self.eos[0] if pad is None and self.eos else pad
        self.streamer = streamer
        if streamer is not None and len(self.prompts) > 1:
            raise ConfigError("streamer: shows one text; give one prompt, or leave it out")

    def answer(self, base: BaseLM, head: Head) -> Tensor:
        lengths, deepest = {len(prompt) for prompt in self.prompts}, base.spec.max_positions
        if self.pad is None and len(lengths) > 1 and max(lengths) + self.limit > deepest + 1:
            raise ConfigError(f"pad_token_id: give one; texts that reach the model's {deepest} positions end early")
        found = self._decoded(base, head)
        if any(out.finish == "positions" for out in found):
            warnings.warn(f"max_new_tokens: a text ended early, at the model's {deepest} positions", stacklevel=2)
        (B, T), new = self.input_ids_BT.shape, max(len(out.tokens) for out in found)
        pad = 0 if self.pad is None else self.pad
        out_BT = torch.cat([self.input_ids_BT, self.input_ids_BT.new_full((B, new), pad)], 1)
        for b, out in enumerate(found):
            out_BT[b, T : T + len(out.tokens)] = torch.tensor(out.tokens)
        return out_BT

    def _decoded(self, base: BaseLM, head: Head) -> list[Generation]:
        """Every prompt's, all in one batch where the head can."""
        given = company(base, head)
        if given["drafters"] is not None:
            tuned = None if given["gates"] is not None else tuned_tree(head)
            given["shape"] = self.decoding.shape(given.pop("deepest"), tuned)
        rules, eos_ids = self.decoding.rules, frozenset(self.eos)
        seeds = [0] * len(self.prompts)
        if not rules.greedy:  # torch.manual_seed makes a call repeatable, as it does without a head
            seeds = torch.randint(2**62, (len(self.prompts),)).tolist()
        stream = None if self.streamer is None else _Stream(self.streamer, self.limit, eos_ids)
        how: dict[str, Any] = {"max_new_tokens": self.limit, "eos_ids": eos_ids, "rules": rules, **given}
        how["watch"] = None if stream is None else stream.watch
        size = len(self.prompts) if head.role != "primer" else 1
        found: list[Generation] = []
        for b in range(0, len(self.prompts), size):
            rows = slice(b, b + size)
            found += decode(base, self.prompts[rows], seeds=seeds[rows], **how)
        if stream is not None:
            stream.end(found[0].tokens)
        return found


class _Stream:
    """Passes tokens on as soon as they are certain, one by one, as transformers does."""

    def __init__(self, streamer: Any, limit: int, eos_ids: frozenset[int]) -> None:
        self.streamer, self.limit, self.eos_ids = streamer, limit, eos_ids
        self.told: list[int] = []

    def put(self, tokens: list[int]) -> None:
        for token in tokens:
            if len(self.told) < self.limit and not self.eos_ids.intersection(self.told[-1:]):
                self.told.append(token)
                self.streamer.put(torch.tensor([token]))

    def watch(self, proposal: Proposal, verdict: Verdict) -> None:
        """After a step. Its root has been told before, except that the first came from the prompt."""
        path = verdict.path_A.to(proposal.tokens_N.device)
        kept = proposal.tokens_N[path].tolist()
        self.put([*kept[1 if self.told else 0 :], verdict.bonus])

    def end(self, tokens: list[int]) -> None:
        self.put(tokens[len(self.told) :])
        assert self.told == tokens
        self.streamer.end()


def _prompts(input_ids_BT: Tensor, mask_BT: Tensor | None) -> list[list[int]]:
    """Every row without its padding."""
    if mask_BT is None:
        return input_ids_BT.tolist()
    seen_BT = mask_BT.bool()
    if (seen_BT[:, :-1] & ~seen_BT[:, 1:]).any():
        raise ConfigError("attention_mask: hides tokens behind others; pad on the left (padding_side='left')")
    return [row[seen].tolist() for row, seen in zip(input_ids_BT, seen_BT.to(input_ids_BT.device), strict=True)]


def _decoding(do_sample: bool, processors: Sequence[Any]) -> DecodingConfig:
    """Greedy or sampled, by what transformers would do to the logits."""
    told: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    others: list[str] = []
    for processor in processors:
        kind = type(processor).__name__
        if kind == "TemperatureLogitsWarper":
            told["temperature"] = float(processor.temperature)
        elif kind == "TopKLogitsWarper":
            told["top_k"] = int(processor.top_k)
        elif kind == "TopPLogitsWarper":
            told["top_p"] = float(processor.top_p)
        elif kind != "LogitNormalization":  # which changes no distribution
            others.append(ASKED_BY.get(kind, kind))
    if others:  # min_new_tokens makes one of min_length as well
        raise refuse(", ".join(others), REFUSED["logits_processor"])
    return DecodingConfig(**told)


def _ends(criteria: Sequence[Any], length: int) -> tuple[list[int], int]:
    """The ids that end a text, and how many tokens may be new."""
    eos: list[int] = []
    limit = 0
    for criterion in criteria:
        kind = type(criterion).__name__
        if kind == "MaxLengthCriteria":
            limit = criterion.max_length - length
        elif kind == "EosTokenCriteria":
            eos = criterion.eos_token_id.tolist()
        else:
            raise refuse(ASKED_BY.get(kind, kind), REFUSED["stopping_criteria"])
    return eos, limit


def _loaded(folder: Path, base: BaseLM, tokenizer: Any) -> Head:
    """The folder's head for this model, read once; anew when the folder is another one, or the model has moved."""
    kept = HEADS.setdefault(base.model, {})
    manifest = folder / artifacts.MANIFEST
    told = manifest.stat() if manifest.is_file() else None
    state = told and (told.st_mtime_ns, told.st_ino, base.device)
    path = folder.resolve()
    if told is None or path not in kept or kept[path][0] != state:
        kept.pop(path, None)
        base.spec = _spec(folder, base, tokenizer)
        head = Beside(base, None, None).load(folder)
        if head.lossy:
            warnings.warn(f"{folder}: a lossy head; the text may be another than the model's own", stacklevel=3)
        kept[path] = (state, head)
    return kept[path][1]


def _spec(folder: Path, base: BaseLM, tokenizer: Any) -> BaseSpec:
    """What the model is, to compare with what the head was made for. A tokenizer is compared where the call brings
    one. An adapter that peft has put into the model counts as the base's."""
    described = artifacts.read_json(folder / "config.json")
    told = described.get("base") if isinstance(described, dict) else None
    recorded: dict[str, Any] = told if isinstance(told, dict) else {}
    sha256 = recorded.get("tokenizer_sha256", "")
    if tokenizer is not None and sha256:
        sha256 = tokenizer_sha256(tokenizer)
    spec = dataclasses.replace(base.spec, tokenizer_sha256=sha256)
    adapted = any(lora.own_name(name) is None for name, _ in base.model.named_parameters())
    if recorded.get("adapter_sha256") and not adapted:
        raise DataError(
            f"{folder}: trained with an adapter, which this model does not have;"
            f" first model.load_adapter('{folder / 'adapter'}')"
        )
    if not adapted:
        return spec
    blocks = {name: recorded[name] for name in ("llama_blocks", "qkv_bias") if name in recorded}  # peft renames biases
    return dataclasses.replace(spec, adapter_sha256=lora.Adapter(base.model, None).sha256(), **blocks)


@contextmanager
def lent(model: Any) -> Iterator[BaseLM]:
    """The caller's model as a base of ours, sharing its weights. A BaseLM sets a model to work for it; here that is
    undone at once, but for what decoding cannot do without, which is undone afterwards."""
    with CHANGING, _given_back(model):
        base = BaseLM(model)
    own, needed = model.config._attn_implementation, base.paths.attention
    fits = own in ("eager", needed, attention.NAME)
    if fits and not any(module.training for module in model.modules()):
        yield base
        return
    with CHANGING, _given_back(model):
        model.eval()
        if not fits:
            model.set_attn_implementation(needed)
        yield base


@contextmanager
def _given_back(model: Any) -> Iterator[None]:
    """Its attention, its training mode and its parameters' gradients are afterwards as they are now."""
    own = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        model.config._attn_implementation = own
        for module in training:
            module.training = True
        for p in trained:
            p.requires_grad_(True)
