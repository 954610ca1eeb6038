"""A draft model: a second, smaller language model, the companion, drafts; nothing of it is trained here.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192); Chen et al.
2023 (arXiv 2302.01318). Greedy decoding drafts its best tokens; with a temperature it draws them from its own
distribution q at that temperature, and verification keeps y ~ q with probability min(1, p(y) / q(y)).

Deviation: after a step the companion reads all accepted tokens again, in one forward with the new root, which it must
read anyway.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from draftsmith.contracts import BaseView, Batch, Capture, Drafted, Needs
from draftsmith.drafting import Ancestors, fill
from draftsmith.errors import ConfigError
from draftsmith.growth import Level
from draftsmith.roles import Proposal, State
from draftsmith.targets import counted_targets


class DraftModel:
    """The companion as a drafter. It has the base's tokenizer; ids that the base lacks are never drafted.

    Greedy texts take its best tokens; with a temperature it draws them, each node on its own, unless told otherwise.
    """

    lossy = False
    gated = True
    runs_base = False
    needs = Needs()
    horizon = 1

    def __init__(self, companion: BaseView, depth: int = 4) -> None:
        if depth < 1:
            raise ConfigError(f"depth={depth}: give at least 1 drafted token")
        self.companion, self.max_depth = companion, depth

    @torch.no_grad()
    def drafted(self, base: BaseView, seen: Capture, batch: Batch) -> Drafted:
        """Its best token after every position whose next token counts, read in a slot of its own below the row's."""
        companion, kv = self.companion, self.companion.new_kv()
        visible_BTT, length = batch.visible(), batch.tokens_BT.shape[1]
        where: dict[str, Any] = {"kv": kv, "positions_BQ": batch.positions_BT, "mask_BQS": visible_BTT}
        final_BTD = cast(Tensor, companion.capture(Needs(final=True), batch.tokens_BT, **where).final)
        _, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, 1)
        best_BT, vocabulary = torch.zeros_like(batch.tokens_BT), base.spec.vocab_size
        best_BT[counted_BT] = companion.lm_head(final_BTD[counted_BT][None])[0, :, :vocabulary].argmax(-1)
        own_BTT = torch.eye(length, dtype=torch.bool, device=visible_BTT.device).expand_as(visible_BTT)
        after_BT = (batch.positions_BT + 1).clamp(max=companion.spec.max_positions - 1)
        where |= {"positions_BQ": after_BT, "mask_BQS": torch.cat([visible_BTT, own_BTT], 2)}
        read_BTD = cast(Tensor, companion.capture(Needs(final=True), best_BT, **where).final)
        at_M = counted_BT.flatten().nonzero().squeeze(1)
        before_MD, read_MD = (t.flatten(0, 1)[at_M] for t in (final_BTD, read_BTD))
        return Drafted(at_M, best_BT.flatten()[at_M], before_MD, read_MD, 1)

    def propose(self, base: BaseView, state: State) -> Proposal:
        """Reads what is new, the root last, and drafts on; its own slots of drafted tokens are forgotten."""
        companion, vocabulary = self.companion, base.spec.vocab_size
        kv = state.head_kv = companion.new_kv() if state.head_kv is None else state.head_kv
        past, device = len(state.tokens), companion.lm_head_weight.device
        new = state.tokens[kv.length :]
        if past + state.shape.depth > companion.spec.max_positions or max(new) >= companion.spec.vocab_size:
            # it cannot read so far, or a padded base has said an id that it lacks: no drafts
            return Proposal(torch.tensor([state.root]), torch.tensor([-1]))
        ancestors, depth = Ancestors(device), 0

        def read(tokens_A: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            where: dict[str, Any] = {"positions_BQ": positions, "mask_BQS": mask}
            seen = companion.capture(Needs(final=True), tokens_A[None], kv=kv, **where)
            final_BAD = cast(Tensor, seen.final)
            return companion.lm_head(final_BAD)[0, :, :vocabulary], final_BAD[0]

        def deeper(level: Level, tokens_C: Tensor) -> tuple[Tensor, Tensor] | None:
            nonlocal depth
            at_A = level.expanded_A
            if not len(at_A):
                return None
            positions = torch.full((1, len(at_A)), past + depth, device=device)
            depth += 1
            return read(tokens_C[at_A], positions, ancestors.below(level.of_C[at_A], past))

        new_A = torch.tensor(new, device=device)
        logits_AV, final_AD = read(new_A, torch.arange(kv.length, past, device=device)[None], None)
        proposal = fill(state, logits_AV[-1], final_AD[-1], deeper, draws="iid")
        kv.crop(past)
        return proposal
