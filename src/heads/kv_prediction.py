"""KV prediction: a small auxiliary model reads the prompt, and linear maps make the base's keys and values of its own.

Horton et al. 2024, "KV Prediction for Improved Time to First Token" (arXiv 2410.08391), after the authors' code. With
a(l) the auxiliary's layer that layer l of the base reads, keys and values with their heads side by side:

    K^_l = A_l K_aux[a(l)] + b_l,    V^_l = B_l V_aux[a(l)] + c_l

Keys are taken, mapped and compared as k_proj leaves them, before any rotation: a general linear map does not commute
with one. The base's own head norm, where it has one, and its rotation come after the map. The auxiliary is a smaller
sibling of the base, the companion (KVP-C), or the base without some of its layers (KVP-LP: `keep`); it starts from
their weights and is trained with the maps.

    L = base_weight (CE_base + z_base) + auxiliary_weight (CE_aux + z_aux)
        + kv_weight sum_l (mean |K_l - K^_l| + mean |V_l - V^_l|),    z = z_weight logsumexp(logits)^2

CE_base is the base's cross-entropy where every layer attends to K^, V^ alone, its own position included; K_l after the
head norm and V_l are those of the base undisturbed. In decoding, all but the prompt's last token are primed. Lossy:
what follows a predicted prompt need not be what the base would have said.

Deviations. All terms are means over the counted positions, those whose next token is learned: with data.loss_on=all
every position that has a next token (the published L1 is over all tokens but padding, and padding adds to its z). The
auxiliary starts from a companion or the base of any Llama-like family and turns keys as that does, without its
sliding window. Of a shortened base it has an lm_head of its own unless `tied`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.contracts import KV, BaseSpec, BaseView, Batch, Capture, Head, LossOut, Needs
from draftsmith.errors import ConfigError
from draftsmith.heads.blocks import DecoderLayer, final_norm_weight, rotate
from draftsmith.targets import counted_targets


@dataclass(frozen=True)
class KVPredictionConfig:
    keep: float | None = None  # share of the base's layers that are the auxiliary (KVP-LP); null: the companion (KVP-C)
    base_weight: float = 1.0
    auxiliary_weight: float = 1.0
    kv_weight: float = 1.0
    z_weight: float = 1e-4
    layer_map: list[int] | None = None  # per base layer the auxiliary's that it reads; null: evenly spread (KVP-C), the
    # kept layer at or before it (KVP-LP)
    auxiliary: BaseSpec | None = None  # null: told by the companion, or by the base and `keep`
    tied: bool | None = None  # the auxiliary's embedding is its lm_head; null: as in the companion, else not

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"keep={self.keep}: give a share of the base's layers, above 0 and at most 1, or null")
        for name in ("base_weight", "auxiliary_weight", "kv_weight", "z_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more")


class TappedLayer(DecoderLayer):
    """Llama's block in two halves, between which its bare keys and values can be seen; computed once for both."""

    def tap(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what attention reads, keys, values), both [B, T, heads * head_dim], without head norm and rotation."""
        read_BTD = self.input_layernorm(x_BTD)
        return read_BTD, self.self_attn.k_proj(read_BTD), self.self_attn.v_proj(read_BTD)

    def finish(
        self, x_BTD: Tensor, tapped: tuple[Tensor, Tensor, Tensor], positions_BT: Tensor, mask_BTT: Tensor | None
    ) -> Tensor:
        """The block's output; mask True = may attend, None = causal."""
        attn, (read_BTD, keys_BTW, values_BTW) = self.self_attn, tapped
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in (attn.q_proj(read_BTD), keys_BTW, values_BTW))
        if attn.q_norm is not None and attn.k_norm is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = (rotate(t.transpose(1, 2), positions_BT, attn.frequencies, attn.scale) for t in (q, k))
        mask, grouped = None if mask_BTT is None else mask_BTT[:, None], q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), mask, is_causal=mask is None, enable_gqa=grouped)
        x_BTD = x_BTD + attn.join(out)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class KVPrediction(Head):
    Config = KVPredictionConfig
    role = "primer"
    lossy = True
    wants = "companion"  # unless `keep` is given

    def __init__(self, config: KVPredictionConfig, spec: BaseSpec) -> None:
        config = _filled(config, spec, None)
        super().__init__(config, spec)
        own, self.layer_map = cast(BaseSpec, config.auxiliary), cast(list[int], config.layer_map)
        self.embed_tokens = nn.Embedding(own.vocab_size, own.hidden_size)
        self.layers = nn.ModuleList(TappedLayer(own) for _ in range(own.num_layers))
        self.norm = nn.RMSNorm(own.hidden_size, eps=own.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(own.hidden_size, own.vocab_size, bias=False)
        sizes = own.num_kv_heads * own.head_dim, spec.num_kv_heads * spec.head_dim
        self.keys = nn.ModuleList(nn.Linear(*sizes) for _ in self.layer_map)
        self.values = nn.ModuleList(nn.Linear(*sizes) for _ in self.layer_map)

    @classmethod
    def completed(cls, config: KVPredictionConfig, spec: BaseSpec, beside: Any) -> KVPredictionConfig:
        _check_readable(spec, "base")
        if beside is not None:
            _check_readable(beside.spec, "companion")
            _check_same_tokens(spec, beside.spec)
        return _filled(config, spec, beside)

    @property
    def needs(self) -> Needs:
        return Needs(frozenset(range(self.spec.num_layers)), final=True)

    @property
    def horizon(self) -> int:
        return 1

    @torch.no_grad()
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        keep = self.config.keep
        source: BaseView | None = base if keep is not None else self.beside
        if source is None:
            raise ConfigError("keep=null: no companion to start from; give companion=…, or keep=0.25")
        embedded_VD = source.embed(torch.arange(self.spec.vocab_size, device=source.lm_head_weight.device))
        if self.config.tied and not torch.equal(embedded_VD, source.lm_head_weight):
            raise ConfigError(f"tied=true: embedding and lm_head of {_name(source.spec)} differ; give false or null")
        self.embed_tokens.weight.copy_(embedded_VD)
        chosen = range(len(self.layers)) if keep is None else _kept(keep, self.spec.num_layers)
        for layer, number in zip(self.layers, chosen, strict=True):
            cast(TappedLayer, layer).start_from(source.block_weights(number))
        self.norm.weight.copy_(final_norm_weight(source))
        if self.lm_head is not None:
            self.lm_head.weight.copy_(source.lm_head_weight)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, mask_BTT: Tensor | None = None, *, whole: bool = True
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """(keys, values, final): per layer of the base its keys and values [B, T, heads * head_dim], without head norm
        and rotation, and what the auxiliary's lm_head reads. whole=False: no final, and nothing that only it needs."""
        taps, x_BTD = self._read(tokens_BT, positions_BT, mask_BTT, whole)
        keys = [f(taps[at][1]) for f, at in zip(self.keys, self.layer_map, strict=True)]
        values = [f(taps[at][2]) for f, at in zip(self.values, self.layer_map, strict=True)]
        return keys, values, self.norm(x_BTD) if whole else None

    def _read(
        self, tokens_BT: Tensor, positions_BT: Tensor, mask_BTT: Tensor | None, whole: bool
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """What the auxiliary's layers tap, and its residual stream; not whole: only as far up as the map reads."""
        x_BTD, taps = self.embed_tokens(tokens_BT), []
        top = len(self.layers) if whole else max(self.layer_map) + 1
        for number in range(top):
            layer = cast(TappedLayer, self.layers[number])
            taps.append(layer.tap(x_BTD))
            if whole or number + 1 < top:
                x_BTD = layer.finish(x_BTD, taps[-1], positions_BT, mask_BTT)
        return taps, x_BTD

    def _logits(self, final: Tensor) -> Tensor:
        return F.linear(final, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(final)

    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """The sum of this module's L over counted positions. Metrics: ce_base, ce_auxiliary, key and value (L1 summed
        over layers), agreement and auxiliary_agreement (next token as the undisturbed base's, of the base on predicted
        keys and values and of the auxiliary alone)."""
        config, spec = self.config, self.spec
        target_BT, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, 1)
        target_N, mask_BTT = target_BT[counted_BT], batch.visible()
        bare, values, own_BTD = self(batch.tokens_BT, batch.positions_BT, mask_BTT)
        own_NV = self._logits(cast(Tensor, own_BTD)[counted_BT])
        with torch.autocast(own_NV.device.type, enabled=False):  # the base as it is in decoding
            keys = [self._normed(base, layer, k) for layer, k in enumerate(bare)]
            distances = [
                self._distances(base, seen, counted_BT, n, *kv) for n, kv in enumerate(zip(keys, values, strict=True))
            ]
            given = _Given([self._slots(base, batch.positions_BT, *kv) for kv in zip(keys, values, strict=True)])
            hidden_BTD = base.run_layers(
                seen.hidden[0],
                0,
                spec.num_layers,
                positions_BQ=batch.positions_BT,
                mask_BQS=mask_BTT,
                kv=cast(KV, given),
            )
            told_NV = base.lm_head(base.final_norm(hidden_BTD[counted_BT]))
        (ce, z), (own_ce, own_z) = next_token(told_NV, target_N), next_token(own_NV, target_N)
        key, value = (torch.stack(parts).sum() for parts in zip(*distances, strict=True))
        total = config.base_weight * (ce + config.z_weight * z) + config.kv_weight * (key + value)
        total = total + config.auxiliary_weight * (own_ce + config.z_weight * own_z)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if measure:
            best_N = base.lm_head(cast(Tensor, seen.final)[counted_BT]).argmax(-1)
            found = {"ce_base": ce, "ce_auxiliary": own_ce, "key": key, "value": value}
            found["agreement"] = (told_NV.argmax(-1) == best_N).sum()
            found["auxiliary_agreement"] = (own_NV.argmax(-1) == best_N).sum()
            metrics = {name: (t.detach(), counted_BT.sum()) for name, t in found.items()}
        return LossOut(total, batch.counts_K[1], metrics)

    def _normed(self, base: BaseView, layer: int, bare: Tensor) -> Tensor:
        """[…, heads * head_dim] -> […, heads, head_dim], with the base's head norm where it has one."""
        keys = bare.unflatten(-1, (-1, self.spec.head_dim))
        if not self.spec.qk_norm:
            return keys
        weight_d = base.block_weights(layer)["self_attn.k_norm.weight"].to(bare.dtype)
        return F.rms_norm(keys, weight_d.shape, weight_d, self.spec.norm_eps)

    def _distances(
        self, base: BaseView, seen: Capture, counted_BT: Tensor, layer: int, keys_BTHd: Tensor, values_BTW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L1 from the base's own keys (after the head norm, before rotation) and values: mean over features, summed
        over counted positions."""
        weights = base.block_weights(layer)
        hidden_ND = seen.hidden[layer][counted_BT]
        norm_D = weights["input_layernorm.weight"]
        read_ND = F.rms_norm(hidden_ND, norm_D.shape, norm_D, self.spec.norm_eps)
        key_NW, value_NW = (
            F.linear(read_ND, weights[f"self_attn.{n}_proj.weight"], weights.get(f"self_attn.{n}_proj.bias"))
            for n in "kv"
        )
        wanted = (self._normed(base, layer, key_NW).flatten(1), value_NW)
        given = (keys_BTHd[counted_BT].flatten(1), values_BTW[counted_BT])
        exact = torch.promote_types(given[0].dtype, torch.float32)
        key, value = ((a.to(exact) - b.to(exact)).abs().mean(-1).sum() for a, b in zip(wanted, given, strict=True))
        return key, value

    def _slots(
        self, base: BaseView, positions_BT: Tensor, keys_BTHd: Tensor, values_BTW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as the base's K/V holds them, [B, H, T, head_dim], in the base's precision."""
        dtype = base.lm_head_weight.dtype
        values_BTHd = values_BTW.unflatten(-1, (-1, self.spec.head_dim))
        keys_BHTd, values_BHTd = (t.to(dtype).transpose(1, 2) for t in (keys_BTHd, values_BTHd))
        return rotate(keys_BHTd, positions_BT, self.spec.rope_frequencies, self.spec.rope_scale), values_BHTd

    @torch.no_grad()
    def prime(self, base: BaseView, tokens_BT: Tensor) -> KV:
        """The base's K/V after these tokens, as predicted; the base does not run."""
        rows, length = tokens_BT.shape
        most = cast(BaseSpec, self.config.auxiliary).max_positions
        if length > most:
            raise ConfigError(f"prompt: {length + 1} tokens; the auxiliary of this primer reads at most {most}")
        positions_BT = torch.arange(length, device=tokens_BT.device).expand(rows, -1)
        bare, values, _ = self(tokens_BT, positions_BT, whole=False)
        kv: Any = base.new_kv()
        for layer, (keys_BTW, values_BTW) in enumerate(zip(bare, values, strict=True)):
            if kv.windowed:
                kv.place(positions_BT, layer)
            kv.update(*self._slots(base, positions_BT, self._normed(base, layer, keys_BTW), values_BTW), layer)
        return kv

    @torch.no_grad()
    def auxiliary_logits(self, tokens_BT: Tensor, last: int = 1) -> Tensor:
        """[B, last, V]: what the auxiliary alone makes of the token after each of the `last` last ones."""
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        _, x_BTD = self._read(tokens_BT, positions_BT, None, whole=True)
        return self._logits(self.norm(x_BTD[:, -last:]))


def next_token(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, logsumexp^2), both summed over rows, fp32 at least."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N = logits_NV.logsumexp(-1)
    return (lse_N - logits_NV.gather(1, target_N[:, None])[:, 0]).sum(), lse_N.square().sum()


class _Given:
    """In a K/V's place while training: the base's blocks get what was predicted, whatever they made themselves."""

    def __init__(self, slots: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.slots = slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def place(self, positions_BQ: Tensor, layer_idx: int) -> Tensor:
        return positions_BQ

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.slots[layer_idx]


def _kept(keep: float, layers: int) -> list[int]:
    """Evenly spread, the first among them: of a quarter 0, 4, 8, …; of three quarters all but 3, 7, …"""
    share = Fraction(keep).limit_denominator(1000)
    return [n for n in range(layers) if -(-n * share // 1) < -(-(n + 1) * share // 1)]


def _filled(config: KVPredictionConfig, spec: BaseSpec, companion: BaseView | None) -> KVPredictionConfig:
    """With auxiliary, layer_map and tied told."""
    if config.keep is not None:
        if companion is not None:
            raise ConfigError(
                f"keep={config.keep}: the companion is the auxiliary already; give keep=null, or no companion"
            )
        kept = _kept(config.keep, spec.num_layers)
        auxiliary = replace(spec, num_layers=len(kept))
        default = [sum(n <= layer for n in kept) - 1 for layer in range(spec.num_layers)]
    elif companion is not None or config.auxiliary is not None:
        auxiliary = cast(BaseSpec, config.auxiliary if companion is None else companion.spec)
        default = [layer * auxiliary.num_layers // spec.num_layers for layer in range(spec.num_layers)]
    else:
        raise ConfigError(
            "keep=null: no auxiliary; give companion=… (a smaller model with the base's tokenizer),"
            " or keep=0.25 to take a quarter of the base's layers"
        )
    layer_map, tied = default if config.layer_map is None else config.layer_map, config.tied
    if len(layer_map) != spec.num_layers or not all(0 <= n < auxiliary.num_layers for n in layer_map):
        raise ConfigError(
            f"layer_map={layer_map}: give one of the auxiliary's layers 0..{auxiliary.num_layers - 1} for each of the"
            f" base's {spec.num_layers}, or null"
        )
    if tied is None:
        tied = companion is not None and _is_tied(companion)
    return replace(config, auxiliary=auxiliary, layer_map=list(layer_map), tied=tied)


@torch.no_grad()
def _is_tied(lm: BaseView) -> bool:
    head_VD = lm.lm_head_weight
    return torch.equal(lm.embed(torch.arange(len(head_VD), device=head_VD.device)), head_VD)


def _check_readable(spec: BaseSpec, which: str) -> None:
    if not spec.llama_blocks:
        raise ConfigError(
            f"{which}: {_name(spec)} is of family {spec.family}, whose keys cannot be read before their rotation;"
            " choose one with Llama's blocks: llama, qwen2, qwen3, mistral"
        )
    if spec.adapter_sha256:
        raise ConfigError(
            f"{which}.adapter: its keys are not those of {_name(spec)}'s own weights; leave the adapter out"
        )


def _check_same_tokens(spec: BaseSpec, theirs: BaseSpec) -> None:
    shas = spec.tokenizer_sha256, theirs.tokenizer_sha256
    if spec.vocab_size != theirs.vocab_size or (all(shas) and shas[0] != shas[1]):
        raise ConfigError(
            f"companion: {_name(theirs)} has {theirs.vocab_size} tokens (tokenizer {shas[1][:8] or 'unknown'}),"
            f" the base {_name(spec)} {spec.vocab_size} ({shas[0][:8] or 'unknown'}); choose one with its tokenizer"
        )


def _name(spec: BaseSpec) -> str:
    return spec.path or f"the {spec.family} model"
