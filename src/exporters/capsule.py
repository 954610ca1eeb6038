"""The parity capsule: what a head answers to a few golden inputs, as tensors that any runtime can replay.

A drafter is asked after three texts of twelve tokens and a root. Inputs: `tokens` [R, 13], the root last; what the base
left at the other twelve, `hidden.<layer>` and `final` [R, 12, D] (the layer convention of contracts.py). Answers along
one chain whose tokens are told, so that a tie early on changes nothing later: `drafts` [R, K]; at each depth the
logits of the likeliest columns, `logits` and `columns` [R, K, C]; `norm` [R, K], the logsumexp of all of them.
A gate: `read` [N, D] and its `logits` [N]. A primer: `tokens` and `final`; `keys` and `values` [L, R, 2, W] of the last
two positions.

The header tells how the base was kept, the head's settings and a hash of each of its tensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftsmith import artifacts
from draftsmith.contracts import BaseView, Capture, Head, Needs
from draftsmith.errors import DataError
from draftsmith.growth import Draws, Growing, Picked, Shape, TreeShape, Warp
from draftsmith.roles import Drafter, Partial, State

FILE = "capsule.safetensors"
AGAIN = "copy the whole folder again, or save the head again"
TEXTS, LENGTH = 3, 13  # the root included
DEEPEST, COLUMNS = 8, 64
STATES = ("tokens", "final", "hidden.", "read")  # what goes in; all else comes out

FULL = ("float32", "float64")
EXACT, HALF, COARSE, ELSEWHERE = 1e-4, 0.02, 0.1, 0.5
"""How far an answer may be from the recorded one, as a share of the largest number there, since kernels sum in another
order: head and base in fp32 as they were; in a half precision as they were; in another precision than then. And how far
the base's own states may be, as a share of their length: an unrelated base of the same sizes is further away than 1."""


@dataclass(frozen=True)
class Golden:
    """tensors: by the names above. told: the precision of base and head, and the hash of the weights that answered."""

    tensors: Mapping[str, Tensor]
    told: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def record(head: Head, base: BaseView) -> Golden:
    """The golden inputs, and what this head answers on this base. The base runs once; with a base in pieces every
    process has to ask."""
    given = _given(head, base)
    with _beside(head, base):
        answers = _answered(head, base, given)
    told = {**_kept(head, base), "weights_sha256": artifacts.tensors_sha256(head.state_dict())}
    return Golden({k: t.cpu().contiguous() for k, t in {**given, **answers}.items()}, told)


@torch.no_grad()
def check(head: Head, base: BaseView, golden: Golden, where: Path | str, *, whole: bool = True) -> None:
    """Replays a capsule; DataError says what differs where the head answers otherwise, or the base is another one.
    whole=False: a base of which only the first blocks are here cannot be asked for its own states."""
    with _beside(head, base):
        _check(head, base, golden, where, whole)


def _check(head: Head, base: BaseView, golden: Golden, where: Path | str, whole: bool) -> None:
    device = base.lm_head_weight.device
    recorded = {k: t.to(device) for k, t in golden.tensors.items()}
    now = _given(head, base) if whole else {k: t for k, t in recorded.items() if k.startswith(STATES)}
    for name in recorded.keys() & now.keys() - {"tokens", "read"}:
        away = _distance(now[name], recorded[name])
        if not away <= ELSEWHERE:
            raise DataError(
                f"{where}: on the recorded tokens this base leaves other states than the one the head was made for"
                f" ({name} is {away:.2f} of its length away); load the base it was trained on"
            )
    kept = _kept(head, base)
    alike = all(golden.told.get(key) == value for key, value in kept.items())
    full = kept["dtype"] in FULL and kept["head"] in FULL
    allowed = COARSE if not alike else EXACT if full else HALF
    inputs = {k: t for k, t in recorded.items() if k.startswith(STATES)}
    if inputs.keys() != now.keys():
        raise DataError(f"{where}: its capsule records {sorted(inputs)}; this head reads {sorted(now)}")
    answers = _answered(head, base, inputs, recorded)
    if answers.keys() | inputs.keys() != recorded.keys():
        raise DataError(f"{where}: its capsule records {sorted(recorded)}; this head answers {sorted(answers)}")
    for name, mine in answers.items():
        _compare(name, mine, recorded[name], allowed, where)


def _compare(name: str, mine: Tensor, wanted: Tensor, allowed: float, where: Path | str) -> None:
    if mine.shape != wanted.shape:
        raise DataError(f"{where}: {name} is {tuple(mine.shape)}, its capsule records {tuple(wanted.shape)}")
    if not wanted.is_floating_point():
        if name == "drafts" and not torch.equal(mine, wanted):  # the same columns, other tokens
            raise DataError(
                f"{where}: drafts {mine.tolist()}, its capsule records {wanted.tolist()}; its vocabulary map differs"
            )
        return  # told, not answered
    away = (mine - wanted).abs() / wanted.abs().max().clamp(min=1e-6)
    if bool((away <= allowed).all()):  # false for what is no number
        return
    worst = int(away.nan_to_num(nan=float("inf")).argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), away.shape)]
    depth = f" of depth {at[1] + 1}" if name in ("logits", "norm") and away.dim() > 1 else ""
    one, other = float(mine[tuple(at)]), float(wanted[tuple(at)])
    raise DataError(
        f"{where}: does not answer as it did when it was saved: {name}{depth} {tuple(at)} is {one:.6g}, recorded"
        f" {other:.6g}; its weights or settings were changed, or this is another base"
    )


def _distance(mine: Tensor, wanted: Tensor) -> float:
    return float((mine - wanted).norm() / wanted.norm().clamp(min=1e-6))


def _kept(head: Head, base: BaseView) -> dict[str, str]:
    dtype, own = (str(t.dtype).removeprefix("torch.") for t in (base.lm_head_weight, next(head.parameters())))
    return {"dtype": dtype, "head": own, "quantised": base.spec.quantised}


@contextlib.contextmanager
def _beside(head: Head, base: BaseView) -> Iterator[None]:
    """The head on the base's device: a trainer that ends leaves it on the CPU."""
    home = next(head.parameters()).device
    head.to(base.lm_head_weight.device)
    try:
        yield
    finally:
        head.to(home)


def _given(head: Head, base: BaseView) -> dict[str, Tensor]:
    """The inputs, in fp32 at least."""
    draws = torch.Generator().manual_seed(0)
    device = base.lm_head_weight.device
    if head.role == "gate":
        size = getattr(head.config, "hidden_size", None) or head.spec.hidden_size
        return {"read": torch.randn(TEXTS * LENGTH, size, generator=draws).to(device)}
    tokens_RT = torch.randint(base.spec.vocab_size, (TEXTS, LENGTH), generator=draws).to(device)
    hidden = frozenset[int]() if head.role == "primer" else head.needs.hidden
    seen = base.capture(Needs(hidden, final=True), tokens_RT[:, :-1])
    states = {f"hidden.{layer}": h for layer, h in sorted(seen.hidden.items())} | {"final": cast(Tensor, seen.final)}
    return {"tokens": tokens_RT, **{k: _wide(t) for k, t in states.items()}}


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _answered(
    head: Head, base: BaseView, given: Mapping[str, Tensor], told: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The answers. told: the capsule whose chains are followed; None: the head's own likeliest tokens."""
    training = head.training
    head.eval()
    try:
        if head.role == "gate":
            return {"logits": _wide(head(given["read"].to(next(head.parameters()).dtype)))}
        if head.role == "primer":
            tokens_RT = given["tokens"]
            positions_RT = torch.arange(tokens_RT.shape[1], device=tokens_RT.device).expand_as(tokens_RT)
            keys, values, _ = head(tokens_RT, positions_RT, whole=False)
            return {k: _wide(torch.stack(t)[:, :, -2:]) for k, t in (("keys", keys), ("values", values))}
        rows = [_drafted(head, base, given, row, told) for row in range(len(given["tokens"]))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    finally:
        head.train(training)


def _drafted(
    head: Head, base: BaseView, given: Mapping[str, Tensor], row: int, told: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """One text's chain."""
    drafter, dtype = cast(Drafter, head), base.lm_head_weight.dtype
    tokens_T = given["tokens"][row]
    states = {k: t[row : row + 1].to(dtype) for k, t in given.items() if k != "tokens"}
    hidden = {layer: states[f"hidden.{layer}"] for layer in head.needs.hidden}
    seen, kv = Capture(hidden, states["final"] if head.needs.final else None), base.new_kv()
    if drafter.runs_base:
        base.capture(Needs(head.needs.hidden, final=True), tokens_T[None, :-1], kv=kv)
    chain = _Chain(min(drafter.max_depth, DEEPEST), tokens_T.device, None if told is None else told["chosen"][row])
    state = State(tokens_T.tolist(), int(tokens_T[-1]), seen, chain, kv=kv, gate=_Never())
    proposal = drafter.propose(base, state)
    logits_KV = _wide(torch.stack(chain.logits))
    columns_KC = logits_KV.topk(min(COLUMNS, logits_KV.shape[1]), dim=-1).indices
    if told is not None:
        columns_KC = told["columns"][row]
    return {
        "drafts": proposal.tokens_N[1:],
        "chosen": torch.tensor(chain.chosen, device=tokens_T.device),
        "columns": columns_KC,
        "logits": logits_KV.gather(1, columns_KC),
        "norm": logits_KV.logsumexp(-1),
    }


class _Never:
    """roles.Gate: what a drafter's own gate would end goes on."""

    def stop(self, state: State, partial: Partial) -> bool:
        return False


class _Chain:
    """growth.Shape and growth.Growing: a chain that takes the best columns, or those that it is told, and keeps the
    logits it is shown."""

    def __init__(self, depth: int, device: torch.device, told_K: Tensor | None) -> None:
        steps = torch.arange(depth + 1, device=device)
        self._shape: Shape = TreeShape(steps - 1, steps, torch.zeros_like(steps))
        self.depth, self.nodes, self.drafted, self.drawable = depth, depth + 1, depth + 1, frozenset[str]()
        self.logits: list[Tensor] = []
        self.chosen: list[int] = []
        self._told_K = told_K

    def cut(self, depth: int) -> Shape:
        raise AssertionError("the golden texts are far from the last position")

    def grow(self, draws: Draws | None, warp: Warp, generator: torch.Generator | None) -> Growing:
        self._growing = self._shape.grow(None, warp, generator)
        return self

    def next(self, logits_AV: Tensor) -> Picked | None:
        picked = self._growing.next(logits_AV)
        if picked is None:
            return None
        self.logits.append(logits_AV[0])
        columns_C = picked.columns_C if self._told_K is None else self._told_K[len(self.chosen)][None]
        self.chosen.append(int(columns_C))
        return Picked(picked.level, columns_C)

    def parents(self, count: int) -> Tensor:
        return self._growing.parents(count)

    def kept(self, count: int) -> Tensor | None:
        return None


def write(path: Path, golden: Golden, head: Head) -> None:
    seals = {name: artifacts.tensors_sha256({name: t})[:16] for name, t in head.state_dict().items()}
    header = {"base": dict(golden.told), "head": asdict(head.config), "weights": seals}
    artifacts.write_tensors(path, golden.tensors, {"draftsmith": json.dumps(header, sort_keys=True)})


def read(path: Path) -> Golden:
    """DataError for a file that is none."""
    tensors, header = _opened(path)
    return Golden(tensors, header["base"])


def differences(path: Path, head: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """What of a head is not as its capsule tells: settings with both values, and names of tensors."""
    _, header = _opened(path)
    found = [
        f"{key} is {head.get(key)}, recorded {value}"
        for key, value in header["head"].items()
        if json.loads(json.dumps(head.get(key))) != value
    ]
    seals = header["weights"]
    found += [f"no tensor {name}" for name in sorted(seals.keys() - weights.keys())]
    return found + list(_others(seals, weights))


def _others(seals: Mapping[str, str], weights: Mapping[str, Tensor]) -> Iterable[str]:
    for name, tensor in weights.items():
        if seals.get(name) != artifacts.tensors_sha256({name: tensor})[:16]:
            yield f"tensor {name} is another" if name in seals else f"tensor {name} is unknown"


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("draftsmith", "null"))
            if not isinstance(header, dict) or not all(
                isinstance(header.get(k), dict) for k in ("base", "head", "weights")
            ):
                raise DataError(f"{path}: no capsule of ours; {AGAIN}")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except DataError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: {' '.join(str(e).split())}; {AGAIN}") from None
