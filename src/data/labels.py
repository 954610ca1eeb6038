"""Labels per token for gates: settings, the folder that holds them, and the first kind, acceptance.

acceptance (SpecDec++, arXiv 2405.19715): at every answer position i a companion draws y ~ q(. | X_<i); its label
is a_i = min(1, p(y | X_<i) / q(y | X_<i)), p the base's distribution, both untempered, so that
E_{y~q}[a_i] = sum_v min(p, q) = 1 - TV(p, q). The sequence Z to train on has y_i with probability 1 - mixing, X_i
with probability `mixing`; where X_i stayed there is no label. Deviation: the paper's random numbers follow from the
order of the run, ours from (seed, row id, position) alone. The other kind is importance.py's.

Shapes: B rows of a batch, T positions, N chosen positions of a batch, C of them at a time, A those of one row,
D hidden size, V base vocabulary, U the companion's, W = min(U, V).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from draftsmith import artifacts, room
from draftsmith.contracts import BaseSpec, BaseView, Needs
from draftsmith.data.rows import Row, Rows, to_table, verified, write_shard
from draftsmith.errors import ConfigError, DataError, NumericsError
from draftsmith.growth import draw

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("acceptance", "importance")
PLAN = "plan.json"
ANSWERS = ("last_number", "last_line", "text")
LOGITS = 2**23  # logits held at a time, per model; in fp64 these are 64 MiB


@dataclass(frozen=True)
class LabelsConfig:
    """kind: acceptance reads mixing, importance the last three; seed is acceptance's. batch_size rows share a
    forward; it is no part of what the labels are."""

    kind: Literal["acceptance", "importance"] = "acceptance"
    mixing: float = 0.15
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int = 256
    max_mismatches: int = 32
    answer: Literal["last_number", "last_line", "text"] = "last_number"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind='{self.kind}': choose {' or '.join(KINDS)}")
        if not 0 <= self.mixing < 1:
            raise ConfigError(f"mixing={self.mixing}: a probability, at least 0 and below 1 (1 would label nothing)")
        if self.answer not in ANSWERS:
            raise ConfigError(f"answer='{self.answer}': choose {', '.join(ANSWERS)}")
        for name in ("batch_size", "max_new_tokens", "max_mismatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")

    def identity(self) -> dict[str, Any]:
        """What decides the labels."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "batch_size"}


def where(row: Row) -> str:
    """How a message names a row."""
    return row.source or f"row {row.id}"


def identity(spec: BaseSpec, weights_sha256: str) -> dict[str, Any]:
    """What a plan says of a base: everything but where it lies."""
    told = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("path", "revision")}
    return {**told, "weights_sha256": weights_sha256}


def check_pair(base: BaseSpec, companion: BaseSpec) -> None:
    """DataError unless the companion's ids mean what the base's mean. With one tokenizer the sizes of the two
    lm heads may differ: checkpoints pad them."""
    if base.tokenizer_sha256 != companion.tokenizer_sha256:
        raise DataError(
            f"companion: {companion.path} has another tokenizer than the base {base.path}; a draft must speak the"
            f" base's ids"
        )
    if not base.tokenizer_sha256 and base.vocab_size != companion.vocab_size:
        raise DataError(
            f"companion: vocabulary of {companion.vocab_size}, the base's has {base.vocab_size}, and neither has a"
            f" tokenizer to compare"
        )


# --- acceptance


def uniforms(seed: int, row_id: str, count: int) -> np.ndarray:
    """u_T2 in [0, 1): two numbers per position, which depend on (seed, row id, position) and on nothing else.

    From Philox's raw words, which numpy promises to keep as they are from version to version.
    """
    key = int(artifacts.fingerprint(["labels", seed, row_id])[:32], 16)
    words = np.random.Philox(key=key).random_raw(2 * count)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(count, 2)


def acceptance_of(logits_p_CV: Tensor, log_q_CW: Tensor, tokens_C: Tensor) -> Tensor:
    """a_C = min(1, p(y) / q(y)) for the drawn tokens, in fp64. W <= V: what only the base has is not drawn."""
    logits_p_CV = logits_p_CV.double()
    log_p_C = logits_p_CV.gather(1, tokens_C[:, None])[:, 0] - logits_p_CV.logsumexp(1)
    return (log_p_C - log_q_CW.gather(1, tokens_C[:, None])[:, 0]).exp().clamp(max=1)


def log_draft(logits_q_CU: Tensor, vocab_size: int) -> Tensor:
    """log q_CW in fp64 over the ids that the base has too, renormalised: W = min(U, vocab_size)."""
    return logits_q_CU[:, :vocab_size].double().log_softmax(-1)


def acceptance(base: BaseView, companion: BaseView, rows: Sequence[Row], config: LabelsConfig) -> pa.Table:
    """Rows with ids = Z, mask = 1 where there is a label, `accept` (float32 per token, NaN without a label) and
    `base_ids` = X.

    A row's first token has no prefix and therefore no label. DataError for a row that the companion cannot
    read, NumericsError for logits that are not finite numbers.
    """
    import pyarrow as pa

    limit = min(base.spec.max_positions, companion.spec.max_positions)
    for row in rows:
        if len(row.ids) > limit:
            raise DataError(f"{where(row)}: {len(row.ids)} tokens; base and companion both read at most {limit}")
    made: dict[int, tuple[Row, np.ndarray]] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))  # equal lengths side by side: little padding
    for first in range(0, len(order), config.batch_size):
        some = order[first : first + config.batch_size]
        sizes = f"{len(some)} rows x {len(rows[some[0]].ids)} tokens"
        smaller = room.halved(("labels.batch_size", len(some)), "the rows' length")
        with room.memory(f"label: a batch of {sizes}", smaller):
            made.update(zip(some, _accept_batch(base, companion, [rows[i] for i in some], config), strict=True))
    out = [made[i] for i in range(len(rows))]
    extra = {
        "accept": (pa.large_list(pa.float32()), [accept_T for _, accept_T in out]),
        "base_ids": (pa.large_list(pa.int32()), [np.asarray(row.ids, np.int32) for row in rows]),
    }
    return to_table([row for row, _ in out], extra)


def _accept_batch(
    base: BaseView, companion: BaseView, rows: Sequence[Row], config: LabelsConfig
) -> Iterator[tuple[Row, np.ndarray]]:
    random = [uniforms(config.seed, row.id, len(row.ids)) for row in rows]
    drawn = [_drawn(row, u_T2, config.mixing) for row, u_T2 in zip(rows, random, strict=True)]
    ends = np.cumsum([0, *map(len, drawn)])
    tokens_N, accept_N = np.zeros(ends[-1], np.int32), np.zeros(ends[-1], np.float32)
    if ends[-1]:
        ids = [row.ids for row in rows]
        uniform_N = np.concatenate([u_T2[at_A, 0] for u_T2, at_A in zip(random, drawn, strict=True)])
        chunk = max(1, LOGITS // max(base.spec.vocab_size, companion.spec.vocab_size))
        told = logits(base, ids, drawn, chunk), logits(companion, ids, drawn, chunk)
        for first, logits_p_CV, logits_q_CU in zip(range(0, ends[-1], chunk), *told, strict=True):
            log_q_CW = log_draft(logits_q_CU.to(logits_p_CV.device), base.spec.vocab_size)
            stop = first + len(log_q_CW)
            tokens_C = draw(log_q_CW.exp(), torch.from_numpy(uniform_N[first:stop]).to(log_q_CW.device))
            accept_N[first:stop] = acceptance_of(logits_p_CV, log_q_CW, tokens_C).cpu().numpy()
            tokens_N[first:stop] = tokens_C.cpu().numpy()
    for n, (row, at_A) in enumerate(zip(rows, drawn, strict=True)):
        span = slice(ends[n], ends[n + 1])
        ids_T, accept_T = np.array(row.ids, np.int32), np.full(len(row.ids), np.nan, np.float32)
        ids_T[at_A], accept_T[at_A] = tokens_N[span], accept_N[span]
        if np.isnan(accept_N[span]).any():
            raise NumericsError(f"{where(row)}: base or companion gives logits that are no numbers; try dtype=float32")
        labelled_T = (~np.isnan(accept_T)).astype(np.uint8)
        yield replace(row, ids=ids_T, mask=labelled_T), accept_T  # type: ignore[arg-type]


def _drawn(row: Row, u_T2: np.ndarray, mixing: float) -> np.ndarray:
    """The positions at which the companion's token replaces the row's."""
    at_A = np.flatnonzero(np.asarray(row.mask, bool) & (u_T2[:, 1] >= mixing))
    return at_A[at_A > 0]


# --- one forward of a batch, shared by both kinds


@torch.no_grad()
def logits(
    model: BaseView, ids: Sequence[Sequence[int]], positions: Sequence[np.ndarray], chunk: int
) -> Iterator[Tensor]:
    """The logits that predict row b's tokens at positions[b] (all >= 1), rows in order, C positions at a time.

    One forward of the padded batch; the lm head runs chunk by chunk, so no [B, T, V] ever exists.
    """
    device = model.lm_head_weight.device
    ids_BT = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for b, row in enumerate(ids):  # padded on the right, where causal attention does not look
        ids_BT[b, : len(row)] = torch.as_tensor(np.asarray(row, np.int64))
    if ids_BT.max() >= model.spec.vocab_size:
        raise DataError(f"rows: token id {ids_BT.max()} is outside the vocabulary of {model.spec.path or 'a model'}")
    final_BTD = model.capture(Needs(final=True), ids_BT.to(device)).final
    assert final_BTD is not None
    rows_N = torch.cat([torch.full((len(at),), b) for b, at in enumerate(positions)]).to(device)
    at_N = torch.cat([torch.as_tensor(np.asarray(at, np.int64)) for at in positions]).to(device)
    for rows_C, at_C in zip(rows_N.split(chunk), at_N.split(chunk), strict=True):
        yield model.lm_head(final_BTD[rows_C, at_C - 1][None])[0]  # x_i is what position i-1 predicts


# --- a folder of labels, shard by shard


def claim(out: Path, plan: Mapping[str, Mapping[str, Any]], what: str = "labels") -> None:
    """Writes out/plan.json, or checks that the one there is the same job; another one is refused, key by key."""
    path = out / PLAN
    if not path.is_file():
        if artifacts.is_complete(out) or any(out.glob("rows-*")) or any(out.glob("captures-*")):
            raise ConfigError(f"out: {out} holds something else than {what}; choose another folder")
        artifacts.write_json(path, plan)
        return
    theirs = artifacts.read_object(path)
    if not all(isinstance(part, dict) for part in theirs.values()):
        raise DataError(f"{path}: tells no plan of ours; it is damaged: delete {out} and start again")
    both = [
        (f"{part}.{key}", theirs.get(part, {}).get(key), value) for part in plan for key, value in plan[part].items()
    ]
    changed = [f"{key}: {str(old)[:12]} -> {str(new)[:12]}" for key, old, new in both if old != new]
    if changed:
        raise ConfigError(f"out: {out} holds {what} of another job ({', '.join(changed)}); choose another folder")


def label_folder(
    rows: Path,
    out: Path,
    plan: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
    make: Callable[[Rows], pa.Table],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """make(rows of a shard) -> a shard of the same name in `out`, then the manifest with `facts` and the plan's
    labels and rows; returns the manifest.

    What is there already stays; each shard appears whole, so that whoever is killed loses no more than the one at
    hand. A complete folder is only verified. ConfigError if `out` belongs to another plan.
    """
    import pyarrow.parquet as pq

    claim(out, plan)
    if artifacts.is_complete(out):
        say(f"{out}: already complete")
        return verified(out)
    names = sorted(name for name in verified(rows)["files"] if name.startswith("rows-"))
    artifacts.reclaim(out)
    for n, name in enumerate(names):
        if not (out / name).is_file():
            write_shard(out / name, make(Rows(pq.read_table(rows / name))))
            say(f"{name}: {n + 1} of {len(names)} shards")
    told = {"rows": plan["rows"], "labels": plan["labels"], **facts, **_summary(rows, names, out)}
    artifacts.seal(out, [*names, PLAN], kind="labels", **told)
    return told


def _summary(rows: Path, names: Sequence[str], out: Path) -> dict[str, Any]:
    """counts and the mean label of complete shards. `answer_tokens` are those of the rows that were labelled."""
    import pyarrow.parquet as pq

    counts = dict.fromkeys(("rows", "tokens", "answer_tokens", "labelled"), 0)
    total = 0.0
    for name in names:
        table = pq.read_table(out / name)
        column = "accept" if "accept" in table.column_names else "important"
        labels_N = table.column(column).combine_chunks().flatten().to_numpy().astype(np.float64)
        labels_N = labels_N[~np.isnan(labels_N)]
        mask = pq.read_table(rows / name, columns=["mask"]) if column == "accept" else table
        counts["rows"] += len(table)
        counts["tokens"] += len(table.column("ids").combine_chunks().flatten())
        counts["answer_tokens"] += int(mask.column("mask").combine_chunks().flatten().to_numpy().sum(dtype=np.int64))
        counts["labelled"] += len(labels_N)
        if "cut" in table.column_names:
            counts["rows_cut"] = counts.get("rows_cut", 0) + sum(table.column("cut").to_pylist())
        total += float(labels_N.sum())
    return {"counts": counts, "mean_label": total / counts["labelled"] if counts["labelled"] else None}
