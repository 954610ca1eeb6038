"""The nouns of the project. Every room speaks through them; none of them knows a room.

Glossary
    base        the frozen causal language model
    head        any trained auxiliary module of ours
    drafter     the role of proposing tokens, played by a head or by a training-free method
    gate        the role of deciding how far to draft
    primer      the role of writing the prompt's K/V in the base's place
    companion   a second, smaller language model with the base's tokenizer
    capture     what one forward of the base leaves for heads: hidden states, logits
    store       captures on disk
    row         one conversation on disk: token ids, loss mask, provenance
    proposal    the drafted tree of tokens; its node 0 is the root
    root        the newest emitted token: the base has chosen it but not yet read it
    verdict     what verification kept of a proposal
    step        one verification forward of the base; the prompt's forward (prefill) is not a step
    tokens per step (tau)   tokens emitted per step, the base's own token included; the drafted tokens
                accepted per step are tau - 1

Layer convention: `hidden[l]` is the residual stream after l blocks (0 = what enters block 0, num_layers =
what leaves the last block, *before* the final norm). `final` is the final norm's output, which the
lm_head reads. (Hugging Face's `hidden_states[-1]` is `final`, not `hidden[num_layers]`.)

Shape suffixes: B rows, T positions, D hidden size, V vocabulary, K depths or offsets, N tree nodes,
C nodes of one depth, A those that are chosen (accepted, expanded), Q positions of this forward, S slots of
the K/V including this forward's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BaseSpec:
    """What a head may know of a base before any weight is loaded, and what ties the head to that base.

    Sizes are plain integers; norm_eps, the rope's, qkv_bias and qk_norm are those of its blocks. `path` and
    `revision` name the base as transformers loads it; the sha256 fingerprints are those of its configuration, its
    tokenizer, its chat template and its trained adapter ("" = has none).
    """

    family: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    lm_head_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # only told: rope_frequencies says how keys turn
    rope_frequencies: list[float] = field(default_factory=list)  # radians per position; [] = 10000^(-2i / head_dim)
    rope_scale: float = 1.0  # of rotated queries and keys
    llama_blocks: bool = False  # its blocks are Llama's, so that a head may start from a copy of one
    qkv_bias: bool = False
    qk_norm: bool = False
    path: str = ""
    revision: str | None = None
    config_sha256: str = ""
    tokenizer_sha256: str = ""
    template_sha256: str = ""
    adapter_sha256: str = ""
    quantised: str = ""  # how the weights of its blocks are kept: int8, int4; "" = as they were loaded


@dataclass(frozen=True)
class Needs:
    """What a head wants from one base forward. `hidden` uses the layer convention of this module.

    adapter: the head trains an adapter of the base with it, so that gradients flow through the capture.
    original: also `final` of the base without its adapter. teacher: the base's distribution of the next token teaches,
    by `final` through its lm_head, or by `likeliest` where a store kept only those.
    """

    hidden: frozenset[int] = frozenset()
    final: bool = False
    logits: bool = False
    adapter: bool = False
    original: bool = False
    teacher: bool = False

    def __or__(self, other: Needs) -> Needs:
        flags = {k: v or getattr(other, k) for k, v in vars(self).items() if k != "hidden"}
        return Needs(self.hidden | other.hidden, **flags)

    def beyond(self, seen: Capture) -> Needs:
        """What of it a capture does not hold."""
        held = {k: getattr(seen, k) is not None for k in ("final", "logits", "original")}
        held["teacher"] = seen.likeliest is not None or held["final"]
        flags = {k: v and not held.get(k, False) for k, v in vars(self).items() if k != "hidden"}
        return Needs(self.hidden - seen.hidden.keys(), **flags)


@dataclass
class Capture:
    """What one base forward left; exactly what the Needs asked for, nothing else, except where a store kept more.

    hidden: layer -> [B, T, D]; final: [B, T, D]; logits: [B, T, V]; original: [B, T, D]. likeliest: of a store, the k
    likeliest next tokens, best first: (ids_BTk, their logits_BTk, up to one number per position).
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    logits: Tensor | None = None
    original: Tensor | None = None
    likeliest: tuple[Tensor, Tensor] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Capture:
        """The capture with every tensor changed."""
        hidden = {layer: change(h) for layer, h in self.hidden.items()}
        rest = [None if t is None else change(t) for t in (self.final, self.logits, self.original)]
        likeliest = self.likeliest and (change(self.likeliest[0]), change(self.likeliest[1]))
        return Capture(hidden, rest[0], rest[1], rest[2], likeliest)

    def row(self, row: int) -> Capture:
        """One row's, with a B axis of 1."""
        return self.each(lambda t: t[row : row + 1])

    def at(self, positions_A: Tensor) -> Capture:
        """The same capture at these positions of the T axis, in their order."""
        return self.each(lambda t: t.index_select(1, positions_A))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Capture:
        return self.each(lambda t: t.to(device, non_blocking=non_blocking))

    def __or__(self, other: Capture) -> Capture:
        """Both; what both have is this one's."""
        flags = {k: v if v is not None else getattr(other, k) for k, v in vars(self).items() if k != "hidden"}
        return Capture({**other.hidden, **self.hidden}, **flags)


class KV(Protocol):
    """Keys and values of the tokens a base has read, one row of slots per layer."""

    @property
    def length(self) -> int:
        """Slots in use."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, Q, head_dim] to a layer's; returns all of it, [B, H, S, head_dim]."""

    @property
    def windowed(self) -> bool:
        """Whether it must be told where its slots stand (`place`)."""

    def crop(self, length: int) -> None:
        """Forget every slot from `length` on."""

    def fork(self) -> KV:
        """An independent copy."""

    def place(self, positions_BQ: Tensor, layer_idx: int) -> Tensor:
        """Before an `update` from outside a forward: where the slots to come stand; returns those of all slots."""

    def keep(self, start: int, path_A: Tensor) -> None:
        """Of the slots from `start` on keep start + path_A (ascending), moved up to `start`, no others."""

    def row(self, row: int, length: int) -> KV:
        """One row's first `length` slots, as a K/V of its own in the same memory."""

    def reserve(self, slots: int) -> None:
        """Make room for so many slots, so that views of rows stay views."""

    def adopt(self, row: int, source: int, target: int, count: int) -> None:
        """Copy a row's `count` slots from `source` on to `target` on, in every layer."""

    def lengthen(self, layers: int, length: int) -> None:
        """Layers 0..layers-1 hold `length` slots, which were written through views of rows."""

    def keep_rows(self, start: int, lengths: list[int], paths: list[list[int]]) -> None:
        """`keep` for rows of different lengths: of the slots from `start` on row b keeps start + paths[b], moved to
        lengths[b] on; `length` is then the longest row's."""

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""


class BaseView(Protocol):
    """The frozen base as a head or the decoding engine may use it."""

    spec: BaseSpec

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Input embedding rows E(x) [B, T, D], with the family's own scaling."""

    def run_layers(
        self,
        hidden_BQD: Tensor,
        start: int,
        stop: int,
        *,
        positions_BQ: Tensor,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
    ) -> Tensor:
        """Blocks start..stop-1 on the residual stream. mask True = may attend; None = causal."""

    def final_norm(self, hidden_BTD: Tensor) -> Tensor: ...

    def lm_head(self, final_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] as the base computes them (bias and soft-capping included)."""

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, D], frozen."""

    @property
    def lm_head_bias(self) -> Tensor | None:
        """[V] or None."""

    @property
    def lm_head_softcap(self) -> float | None:
        """c, where the base bounds its logits z to c tanh(z / c)."""

    def new_kv(self, num_layers: int | None = None) -> KV:
        """Empty K/V of the base, or of `num_layers` blocks of a head's own."""

    def block_weights(self, layer: int) -> Mapping[str, Tensor]:
        """The parameters of block `layer` by Llama's names; only where spec.llama_blocks."""

    def to(self, device: torch.device | str) -> BaseView: ...

    @property
    def adapter(self) -> nn.Module | None:
        """What is trained of it, if anything."""

    def capture(
        self,
        needs: Needs,
        tokens_BQ: Tensor,
        *,
        positions_BQ: Tensor | None = None,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
        entered: tuple[int, Tensor] | None = None,
        documents_BQ: Tensor | None = None,
    ) -> Capture:
        """One forward, as far up as `needs` asks. Without positions they count on from the K/V's length; mask as in
        run_layers; documents_BQ, in its place and without a K/V: `Batch.documents_BT`. entered (layer, hidden
        [B, Q, D]): blocks 0..layer-1 have run for these tokens already, and their K/V holds them."""


@dataclass
class Batch:
    """One micro-batch of packed rows. Documents never see each other.

    tokens_BT, positions_BT (restarting in each document), documents_BT (>= 0; -1 is padding),
    mask_BT (True = this token is one that training learns to predict). labels_BT: a number per token, NaN where it has
    none; only rows that draftsmith label wrote have them.
    counts_K[k]: how many counted targets x_{t+k} lie in the same document as t, summed over the *whole
    global step* (all ranks, all micro-batches): the normaliser that makes accumulation exact.
    seen: what a store kept of its capture; the base is asked for the rest.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    mask_BT: Tensor
    counts_K: Tensor
    labels_BT: Tensor | None = None
    seen: Capture | None = None

    def visible(self) -> Tensor:
        """mask_BTT: what each position may attend to: its own document, up to itself. (Padding sees padding,
        so that no row is empty.)"""
        return visible(self.documents_BT)

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()}
        return Batch(**moved)


def visible(documents_BT: Tensor) -> Tensor:
    """mask_BTT: the same document, up to oneself."""
    return (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()


@dataclass
class LossOut:
    """A head's loss over one micro-batch: `sum` (scalar, with grad) is to be divided by `count`, which is
    global to the step. metrics: name -> (numerator, denominator), both scalars without grad; they add up
    over micro-batches and ranks."""

    sum: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass
class Drafted:
    """What a drafter would draft in a batch where everything before is the row's own, and what it thinks once it has
    read that: M drafts, over all its depths but the last. Positions count through all rows: b * T + t.

    at_M: where the base's distribution judges the draft (that of the token after it). tokens_M: the drafts. before_MD:
    the state that each was drafted from, hidden_MD: that after reading it, as a gate sees them in decoding
    (Partial.hidden). ahead: a global step has counts_K[ahead] positions to draft from.
    """

    at_M: Tensor
    tokens_M: Tensor
    before_MD: Tensor
    hidden_MD: Tensor
    ahead: int


class Head(nn.Module, ABC):
    """A trained auxiliary module. Subclasses set the class variables and write forward, loss and their role's
    method. `__init__(config, spec)` allocates only (safe on the meta device); `initialise(base)` sets the
    weights that depend on the base and is called once, before training, never when a head is loaded.
    progress: the share of training that is done, which a loss may schedule its terms by.
    plain_loss, skip_masked: how its loss is computed, never what it is. True: whole logits at once, as a bench's plain
    step does; False: positions that count for nothing are computed like any other.

    beside: what stands beside the base and belongs to somebody else: the drafter that a gate judges, the companion
    that an auxiliary starts from. Neither trained nor saved with the head; `attach` sets it, before `initialise`.

    said: what its native folder tells beside config and weights (how it was trained, who stands beside it, how it was
    tuned); kept when it is saved again.

    golden: what it answers to a few recorded inputs (exporters/capsule.py), None where nobody has asked yet; kept too.
    """

    progress = 1.0
    plain_loss = False
    skip_masked = True
    beside: Any = None
    said: Mapping[str, Any] = {}
    golden: Any = None

    Config: ClassVar[type]
    role: ClassVar[str]  # "drafter", "gate" or "primer"
    lossy: ClassVar[bool] = False  # True: decoding with it may change the base's output
    wants: ClassVar[str] = ""  # what has to stand beside it: a "drafter", a "companion"
    gated: ClassVar[bool] = False  # True: a drafter that goes level by level and asks a gate after each
    runs_base: ClassVar[bool] = False  # True: a drafter that runs blocks of the base on the base's own K/V
    adapts: ClassVar[bool] = False  # True: an adapter of the base is trained with it

    def __init__(self, config: Any, spec: BaseSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    @classmethod
    def completed(cls, config: Any, spec: BaseSpec, beside: Any) -> Any:
        """The config with everything told that follows from the base and from what stands beside it, so that the
        head can be built again without either."""
        return config

    @classmethod
    def reads_labels(cls, config: Any, draft_model: bool) -> bool:
        """Whether its rows must be those of draftsmith label, given whether a draft model stands beside it."""
        return False

    def attach(self, beside: Any) -> None:
        object.__setattr__(self, "beside", beside)  # past nn.Module, which would take a module for a part of this one

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it reads of the base, in training and in decoding alike."""

    @property
    @abstractmethod
    def horizon(self) -> int:
        """The largest k for which the loss looks at x_{t+k}."""

    @property
    def reads_counted(self) -> bool:
        """Whether its loss looks at the capture only where it predicts a counted target: elsewhere it may be NaN."""
        return False

    @abstractmethod
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        """Set the weights that start from the base's, and zero those that must start at zero. counts_V: how often
        each token is learned in the training rows, all that a head may know of them beforehand; None: unknown."""

    @abstractmethod
    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Loss over one micro-batch; `measure=False` may leave out the metrics that cost time."""
