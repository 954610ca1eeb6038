"""The peer's side of scripts/bench_speculators.sh: speculators 0.9.0's EAGLE-3, in an environment of its own.

    speculators_step.py equal FOLDER             its fp32 loss and gradients beside ours
    speculators_step.py time FOLDER DTYPE FILE   writes JSON: CPU ms of its step, one thread

What is its own here: the model as its command line builds it, collate, loss, and the loop of its trainer (autocast,
clipping, its AdamW). Chosen for a CPU: sdpa attention and the eager loss, since the others are flex attention and
Triton kernels. Left out of the time: its collate, which works in a loader's processes.

Its loss is, for every step s, the mean over the masked targets of KL(base || draft), and the sum of these means. What
that needs to be ours, all by configuration:
  - A target counts where its mask selects the token *before* the one predicted (shift_batch pairs mask l_i with the
    base's output at i, which speaks of i + 1), so it is given the mask one place earlier.
  - Its mean of step s divides by that step's targets + 1e-5, ours by the first step's. They are as many where a chat
    begins with tokens that do not count, as these do.
  - It pairs a slot with targets of the next document in the row; none of those counts, for the same reason.
  - It learns from targets where the base prefers a token outside the draft vocabulary, ours does not. The vocabulary
    given covers all of the base's choices.
  - Its steps weigh the same by default, and so do ours here.
  - It counts positions from 1, which rotation does not see.
  - It freezes the draft's lm_head, a copy of the base's rows, and published EAGLE-3 and ours train it. It is let go
    here; `frozen` is the time as it comes.
What it computes in every step and ours does not: the argmax of all rows, as drafts and again for its accuracies.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import CollateFn
from speculators.train.optimizers import build_optimizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

WARM, STEPS, TTT = 1, 3, 3
Rows = dict[str, Tensor]


def draft_model(folder: Path) -> Any:
    """As from_training_args makes it, with the weights that our side drew."""
    weights = load_file(folder / "head.safetensors")
    config = AutoConfig.from_pretrained(folder / "base")
    config.num_hidden_layers = 1
    model = Eagle3DraftModel.from_training_args(
        config,
        t2d=weights["t2d"],
        d2t=weights["d2t"],
        draft_vocab_size=len(weights["d2t"]),
        norm_before_residual=False,
        ttt_steps=TTT,
        verifier_name_or_path=str(folder / "base"),
        draft_attn_impl="sdpa",
    ).float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith(("embed_tokens", "verifier_")) for name in missing), missing
    model.lm_head.requires_grad_(True)
    return model.train()


class Base:
    """transformers' own model, which leaves the hidden states that the draft model reads."""

    def __init__(self, folder: Path, dtype: torch.dtype, layers: list[int]) -> None:
        whole = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        self.model = whole.model.eval().requires_grad_(False)
        self.seen: list[Tensor] = []
        for layer in (*layers, len(self.model.layers)):  # hidden state l leaves block l - 1, before any norm
            self.model.layers[layer - 1].register_forward_hook(lambda *args: self.seen.append(args[2]))

    @torch.no_grad()
    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(three hidden states side by side [B, T, 3 D], the last one [B, T, D]) of packed rows: no padding to speak
        of, and no attention over other documents' columns than the row's."""
        self.seen.clear()
        documents = rows["documents_BT"]
        visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        self.model(rows["tokens_BT"], attention_mask=visible, position_ids=rows["positions_BT"], use_cache=False)
        *taps, last = self.seen
        return torch.cat(taps, -1), last


def collated(rows: Rows, hidden_BTE: Tensor, last_BTD: Tensor) -> dict[str, Tensor]:
    """All documents in one row, by the peer's own code, as long as they need."""
    samples = []
    for b, documents_T in enumerate(rows["documents_BT"]):
        for d in range(int(documents_T.max()) + 1):
            where = documents_T == d
            counts_T = rows["mask_BT"][b, where]
            samples.append(
                {
                    "input_ids": rows["tokens_BT"][b, where],
                    "hidden_states": hidden_BTE[b, where],
                    "verifier_last_hidden_states": last_BTD[b, where],
                    "loss_mask": torch.cat([counts_T[1:], counts_T.new_zeros(1)]),
                    "lengths": where.sum()[None],
                    "position_ids": torch.arange(len(counts_T)),
                }
            )
    length = sum(len(sample["input_ids"]) - 1 for sample in samples)
    batch = CollateFn(length, last_BTD.shape[-1], dtype=last_BTD.dtype, preprocess=shift_batch)(samples)
    return {k: v for k, v in batch.items() if isinstance(v, Tensor)}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    told, _ = model.get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation="eager", ttt_steps=TTT, ttt_step_loss_decay=1.0
    )
    _, loss, _ = model(**batch, **told)
    return loss


def equal(folder: Path) -> None:
    model = draft_model(folder)
    base = Base(folder, torch.float32, model.target_layer_ids)
    for name, what in (("one", "one chat"), ("all", "all chats")):
        rows, ours = load_file(folder / f"{name}.safetensors"), load_file(folder / f"{name}-ours.safetensors")
        model.zero_grad()
        loss = loss_of(model, collated(rows, *base(rows)))
        loss.backward()
        theirs = {k: p.grad.double().flatten() for k, p in model.named_parameters() if p.grad is not None}
        assert theirs.keys() == ours.keys() - {"loss"}, theirs.keys() ^ ours.keys()
        both = [(theirs[k], ours[k].double().flatten()) for k in theirs]
        whole = torch.cosine_similarity(*(torch.cat(side) for side in zip(*both, strict=True)), 0)
        worst = min(float(torch.cosine_similarity(a, b, 0)) for a, b in both)
        norms = float(torch.cat([a for a, _ in both]).norm() / torch.cat([b for _, b in both]).norm())
        apart = abs(loss.item() / ours["loss"].item() - 1)
        print(
            f"{what}: loss {loss.item():.6f}, relative difference from ours {apart:.1e}; gradients' cosine {whole:.8f}"
            f" (worst parameter {worst:.8f}), ratio of norms {norms:.6f}"
        )


def cpu_time(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Medians in ms: the base's forward, and the rest of the step with the lm_head trained and frozen. dtype: the
    base's, and autocast's around the fp32 model."""
    torch.set_num_threads(1)
    model, rows = draft_model(folder), load_file(folder / "all.safetensors")
    base = Base(folder, dtype, model.target_layer_ids)
    (optimizer,) = build_optimizers(model, SimpleNamespace(optimizer="adamw", lr=1e-3, weight_decay=0.01))
    spent: dict[str, list[float]] = {"base": [], "step": [], "frozen": []}
    for i in range(WARM + STEPS):
        start = time.process_time()
        seen = base(rows)
        times = {"base": time.process_time() - start}
        batch = collated(rows, *seen)
        for kind in ("step", "frozen"):
            model.lm_head.requires_grad_(kind == "step")
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times[kind] = time.process_time() - start
        for kind, seconds in times.items() if i >= WARM else ():
            spent[kind].append(1e3 * seconds)
    return {k: statistics.median(ms) for k, ms in spent.items()}


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "equal":
        equal(folder)
    elif verb == "time":
        Path(sys.argv[4]).write_text(json.dumps(cpu_time(folder, getattr(torch, sys.argv[3]))))
    else:
        sys.exit(f"{verb}: say equal or time")


if __name__ == "__main__":
    main()
