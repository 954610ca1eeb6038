"""Are these the base's own words? What it makes of the answers in rows, beside what it would make of its own.

Text sampled from the base at temperature 1 has, on average, a negative log-likelihood equal to the entropy of the
base's distribution, and the base's first choice in the share of places that its largest probability says; greedy
text has a lower one and agrees everywhere (but for rounding). Others' text has a higher one.

Shapes: B packs, T positions, A positions that count, V vocabulary.
"""

from __future__ import annotations

import torch

from draftsmith.contracts import BaseView, Needs
from draftsmith.data.pack import best_fit, collate
from draftsmith.data.rows import Rows
from draftsmith.targets import counted_targets

CHUNK = 512  # positions whose logits exist at a time


@torch.no_grad()
def own_words(base: BaseView, rows: Rows, length: int, device: torch.device | str = "cpu") -> dict[str, float]:
    """Means over the learned tokens of `rows`, none longer than `length`: nll and entropy (nats), agreement (share
    that is the base's first choice), expected (the agreement its own samples at temperature 1 would have), tokens.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for pack in best_fit(rows.lengths_N.tolist(), length):
        batch = collate([[rows[n] for n in pack]], length, torch.zeros(1)).to(device)
        seen = base.capture(
            Needs(final=True), batch.tokens_BT, positions_BQ=batch.positions_BT, documents_BQ=batch.documents_BT
        )
        assert seen.final is not None
        target_BT, counted_BT = counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, 1)
        final_AD, target_A = seen.final[counted_BT], target_BT[counted_BT]
        for at in range(0, len(target_A), CHUNK):
            log_AV = base.lm_head(final_AD[None, at : at + CHUNK])[0].float().log_softmax(-1)
            these_A = target_A[at : at + CHUNK]
            best_A, first_A = log_AV.max(-1)
            parts = (
                -log_AV.gather(1, these_A[:, None]).sum(),
                -(log_AV.exp() * log_AV).nan_to_num().sum(),
                (first_A == these_A).sum(),
                best_A.exp().sum(),
            )
            sums += torch.stack([p.double().cpu() for p in parts])
        tokens += len(target_A)
    nll, entropy, agreement, expected = (sums / max(1, tokens)).tolist()
    told = {"nll": nll, "entropy": entropy, "agreement": agreement, "expected": expected}
    return {**{k: round(v, 4) for k, v in told.items()}, "tokens": tokens}
