"""The nouns of the project. Every room speaks through them; none of them knows a room.

Glossary
    base        the frozen causal language model
    head        any trained auxiliary module of ours
    drafter     the role of proposing tokens, played by a head or by a training-free method
    capture     what one forward of the base leaves for heads: hidden states, logits
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
from dataclasses import dataclass, field
from functools import cached_property
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


@dataclass(frozen=True)
class Needs:
    """What a head wants from one base forward. `hidden` uses the layer convention of this module.

    adapter: the head trains an adapter of the base with it, so that gradients flow through the capture.
    original: also `final` of the base without its adapter.
    """

    hidden: frozenset[int] = frozenset()
    final: bool = False
    logits: bool = False
    adapter: bool = False
    original: bool = False

    def __or__(self, other: Needs) -> Needs:
        flags = {k: v or getattr(other, k) for k, v in vars(self).items() if k != "hidden"}
        return Needs(self.hidden | other.hidden, **flags)


@dataclass
class Capture:
    """What one base forward left; exactly what the Needs asked for, nothing else.

    hidden: layer -> [B, T, D]; final: [B, T, D]; logits: [B, T, V]; original: [B, T, D].
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    logits: Tensor | None = None
    original: Tensor | None = None

    def at(self, positions_A: Tensor) -> Capture:
        """The same capture at these positions of the T axis, in their order."""
        hidden = {layer: h.index_select(1, positions_A) for layer, h in self.hidden.items()}
        rest = (self.final, self.logits, self.original)
        return Capture(hidden, *(None if t is None else t.index_select(1, positions_A) for t in rest))


class KV(Protocol):
    """Keys and values of the tokens a base has read, one row of slots per layer."""

    @property
    def length(self) -> int:
        """Slots in use."""
        ...

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, Q, head_dim] to a layer's; returns all of it, [B, H, S, head_dim]."""
        ...

    def crop(self, length: int) -> None:
        """Forget every slot from `length` on."""
        ...

    def fork(self) -> KV:
        """An independent copy."""
        ...

    def keep(self, start: int, path_A: Tensor) -> None:
        """Of the slots from `start` on keep start + path_A (ascending), moved up to `start`, no others."""
        ...


class BaseView(Protocol):
    """The frozen base as a head or the decoding engine may use it."""

    spec: BaseSpec

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Input embedding rows E(x) [B, T, D], with the family's own scaling."""
        ...

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
        ...

    def final_norm(self, hidden_BTD: Tensor) -> Tensor: ...

    def lm_head(self, final_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] as the base computes them (bias and soft-capping included)."""
        ...

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, D], frozen."""
        ...

    @property
    def lm_head_bias(self) -> Tensor | None:
        """[V] or None."""
        ...

    @property
    def lm_head_softcap(self) -> float | None:
        """c, where the base bounds its logits z to c tanh(z / c)."""
        ...

    def new_kv(self, num_layers: int | None = None) -> KV:
        """Empty K/V of the base, or of `num_layers` blocks of a head's own."""
        ...

    def block_weights(self, layer: int) -> dict[str, Tensor]:
        """The parameters of block `layer` by Llama's names; only where spec.llama_blocks."""
        ...

    def to(self, device: torch.device | str) -> BaseView: ...

    @property
    def adapter(self) -> nn.Module | None:
        """What is trained of it, if anything."""
        ...

    def capture(
        self,
        needs: Needs,
        tokens_BQ: Tensor,
        *,
        positions_BQ: Tensor | None = None,
        mask_BQS: Tensor | None = None,
        kv: KV | None = None,
        entered: tuple[int, Tensor] | None = None,
    ) -> Capture:
        """One forward, as far up as `needs` asks. Without positions they count on from the K/V's length; mask as
        in run_layers. entered (layer, hidden [B, Q, D]): blocks 0..layer-1 have run for these tokens already,
        and their K/V holds them."""
        ...


@dataclass
class Batch:
    """One micro-batch of packed rows. Documents never see each other.

    tokens_BT, positions_BT (restarting in each document), documents_BT (>= 0; -1 is padding),
    mask_BT (True = this token is one that training learns to predict).
    counts_K[k]: how many counted targets x_{t+k} lie in the same document as t, summed over the *whole
    global step* (all ranks, all micro-batches): the normaliser that makes accumulation exact.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    mask_BT: Tensor
    counts_K: Tensor

    def visible(self) -> Tensor:
        """mask_BTT: what each position may attend to: its own document, up to itself. (Padding sees padding,
        so that no row is empty.)"""
        documents_BT = self.documents_BT
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        return same_BTT.tril()

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


@dataclass
class LossOut:
    """A head's loss over one micro-batch: `sum` (scalar, with grad) is to be divided by `count`, which is
    global to the step. metrics: name -> (numerator, denominator), both scalars without grad; they add up
    over micro-batches and ranks."""

    sum: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, C of them, and who is above them; what a drafter needs that fills a tree downwards.

    nodes: their place in the tree. above_C: each one's parent, counted within the level above; of_C: counted among
    those of the level above that have children. expanded_A: which of these nodes have children themselves, counted
    within this level. ranks_C: as in TreeShape.
    """

    nodes: slice
    above_C: Tensor
    of_C: Tensor
    expanded_A: Tensor
    ranks_C: Tensor


@dataclass(frozen=True)
class TreeShape:
    """The static shape of a proposal. Node 0 is the root; a parent stands before its children.

    parents_N (-1 for the root), depths_N (0 for the root), ranks_N: node n takes the ranks_N[n]-th best
    token (0 = best) of its depth; the root's rank is 0 and unused.
    """

    parents_N: Tensor
    depths_N: Tensor
    ranks_N: Tensor

    @cached_property
    def depth(self) -> int:
        return int(self.depths_N.max())

    @cached_property
    def levels(self) -> list[Level]:
        """Its depths 1, 2, … in order. Nodes of equal depth must stand together, as `decoding.tree` makes them."""
        parents, device = self.parents_N.tolist(), self.parents_N.device
        depths = self.depths_N.tolist()
        has_children = set(parents)
        above, expanded, found = [0], [0], []
        for depth in range(1, self.depth + 1):
            nodes = [n for n, d in enumerate(depths) if d == depth]
            assert nodes == list(range(nodes[0], nodes[-1] + 1)), "nodes of equal depth must stand together"
            mine = [n for n in nodes if n in has_children]
            rows = [
                [above.index(parents[n]) for n in nodes],
                [expanded.index(parents[n]) for n in nodes],
                [n - nodes[0] for n in mine],
            ]
            above_C, of_C, expanded_A = (torch.tensor(row, dtype=torch.long, device=device) for row in rows)
            span = slice(nodes[0], nodes[-1] + 1)
            found.append(Level(span, above_C, of_C, expanded_A, self.ranks_N[span]))
            above, expanded = nodes, mine
        return found

    @cached_property
    def width(self) -> int:
        """How many candidates the widest depth asks for."""
        return int(self.ranks_N.max()) + 1


@dataclass
class Proposal:
    """Drafted tokens as a tree. tokens_N[0] is the root; parents_N[0] = -1; parents stand before children.

    entered (layer, hidden [B, N, D]): the drafter has run the base's blocks 0..layer-1 for these nodes, in this
    order, on the base's own K/V; verification runs the rest.
    """

    tokens_N: Tensor
    parents_N: Tensor
    entered: tuple[int, Tensor] | None = None


@dataclass(frozen=True)
class Verdict:
    """path_A: accepted nodes in order, the root (0) first; bonus: the base's own next token after them."""

    path_A: Tensor
    bonus: int

    @property
    def accepted(self) -> int:
        """Accepted *drafted* tokens: the root is not one."""
        return len(self.path_A) - 1


@dataclass
class State:
    """What a drafter may look at before a step, for one sequence (or B equal rows of it).

    tokens: prompt and everything emitted, the root last. root: that last token.
    seen: capture of the positions accepted by the last step (or of the whole prompt), in order, [B, A, .];
    its last position is the one that predicted the root. shape: the tree to fill.
    kv: the base's, every emitted token but the root; a drafter that runs base blocks leaves their slots in it and
    says so in Proposal.entered. head_kv: the drafter's own, made and kept by it between steps; it holds emitted
    tokens only, since `seen` brings the truth about every position that was accepted.
    """

    tokens: list[int]
    root: int
    seen: Capture
    shape: TreeShape
    kv: KV | None = None
    head_kv: KV | None = None


class Drafter(Protocol):
    """Proposes tokens. `max_depth` bounds the tree it can fill; `needs` is what it reads of the base."""

    needs: Needs
    max_depth: int

    def propose(self, base: BaseView, state: State) -> Proposal: ...


class Head(nn.Module, ABC):
    """A trained auxiliary module. Subclasses set the class variables and write forward, loss and their role's
    method. `__init__(config, spec)` allocates only (safe on the meta device); `initialise(base)` sets the
    weights that depend on the base and is called once, before training, never when a head is loaded.
    progress: the share of training that is done, which a loss may schedule its terms by.
    """

    progress = 1.0

    Config: ClassVar[type]
    role: ClassVar[str]  # "drafter"
    lossy: ClassVar[bool] = False  # True: decoding with it may change the base's output
    adapts: ClassVar[bool] = False  # True: an adapter of the base is trained with it

    def __init__(self, config: Any, spec: BaseSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it reads of the base, in training and in decoding alike."""

    @property
    @abstractmethod
    def horizon(self) -> int:
        """The largest k for which the loss looks at x_{t+k}."""

    @abstractmethod
    def initialise(self, base: BaseView, counts_V: Tensor | None = None) -> None:
        """Set the weights that start from the base's, and zero those that must start at zero. counts_V: how often
        each token is learned in the training rows, all that a head may know of them beforehand; None: unknown."""

    @abstractmethod
    def loss(self, base: BaseView, seen: Capture, batch: Batch, *, measure: bool = True) -> LossOut:
        """Loss over one micro-batch; `measure=False` may leave out the metrics that cost time."""
