"""A store beside a training: whether it is whole, this base's, and enough for these heads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from draftsmith import prepare, supply
from draftsmith.data.settings import DataConfig
from draftsmith.errors import ConfigError, DataError
from draftsmith.training import processes

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Capture, Head, Needs
    from draftsmith.data.importing import Chosen
    from draftsmith.data.rows import Rows
    from draftsmith.data.store import Kept, Store


def of(
    data: DataConfig, base: BaseLM, heads: Mapping[str, Head], chosen: Chosen, *, skip_masked: bool = True
) -> Store | None:
    """The store of data.path, if it is one, after every check. Collective; refusals come before step 1."""
    if not supply.is_store(data.path):
        return None
    from draftsmith.data import labels, store

    folder, here = Path(str(data.path)), processes.place()
    processes.together(lambda: None if here.local else store.verify(folder))
    sha256 = base.weights_sha256()

    def look() -> Store:
        found = store.open_store(folder, labels.identity(base.spec, sha256), base.spec, base.dtype)
        found.reads = reads(found.kept, heads)
        measured = [] if data.validation.path else [chosen.validation]
        for rows in [chosen.training, *measured]:
            check_positions(found, heads, rows, skip_masked=skip_masked)
        return found

    found = processes.together(look)
    checked = processes.together(lambda: store.compare(found, base))
    missing = reduce(or_, (head.needs for head in heads.values())).beyond(held(found.reads))
    runs = f"; the base runs its first {max(missing.hidden)} layers for the rest" if missing.hidden else ""
    prepare.say(f"store: {folder}, {found.kept.dtype}, {checked} rows computed again and found equal{runs}")
    return found


def held(needs: Needs) -> Capture:
    """A capture that holds these, of nothing."""
    import torch

    from draftsmith.contracts import Capture

    nothing = torch.empty(0)
    likeliest = (nothing, nothing) if needs.teacher else None
    return Capture(dict.fromkeys(needs.hidden, nothing), nothing if needs.final else None, likeliest=likeliest)


def reads(kept: Kept, heads: Mapping[str, Head]) -> Needs:
    """What of a store these heads read. ConfigError names the head for which the base would have to run whole."""
    from draftsmith.contracts import Needs

    found = Needs()
    for name, head in heads.items():
        needs, top_k = head.needs, getattr(head.config, "teacher_top_k", None)
        if needs.adapter or needs.original:
            raise ConfigError(
                f"head: {name} trains an adapter of the base, which changes its captures; train it on the rows alone,"
                " data=jsonl data.path=<store>/rows"
            )
        enough = kept.teacher_top_k is not None and top_k is not None and top_k <= kept.teacher_top_k
        if needs.teacher and not enough and not kept.final:
            cure = f"set heads.{name}.teacher_top_k={kept.teacher_top_k}, or " if kept.teacher_top_k else ""
            raise ConfigError(
                f"heads.{name}.teacher_top_k={top_k}: the store keeps the teacher's {kept.teacher_top_k or 0} likeliest"
                f" tokens; {cure}capture again for this head"
            )
        whole = [
            *(["final"] if needs.final and not kept.final else []),
            *(["logits"] if needs.logits else []),
            *(f"hidden {layer}" for layer in needs.hidden - set(kept.hidden) if layer == head.spec.num_layers),
        ]
        if whole:
            raise ConfigError(
                f"head: {name} reads {' and '.join(whole)} of the base, which the store does not keep, so that the base"
                f" would run whole; capture again with head=[{','.join(heads)}]"
            )
        found |= Needs(
            needs.hidden & set(kept.hidden),
            final=needs.final or (needs.teacher and not enough),
            teacher=needs.teacher and enough,
        )
    return found


def check_positions(store: Store, heads: Mapping[str, Head], rows: Rows, *, skip_masked: bool = True) -> None:
    """DataError names the head that would look where the store kept nothing; without skip_masked that is all."""
    from draftsmith.data.store import counted, every

    for name, head in heads.items():
        states = bool(head.needs.hidden & store.reads.hidden) or (head.needs.final and store.reads.final)
        reads_all = states and not (head.reads_counted and skip_masked)
        wanted = every(rows) if reads_all else counted(rows, head.horizon)
        lacking = int(np.count_nonzero(wanted & ~store.flags)) if states or head.needs.teacher else 0
        if lacking:
            kept = f"those that predict a counted target up to {store.kept.horizon} ahead"
            raise DataError(
                f"heads.{name}: reads {lacking:,} positions that the store did not keep ({kept}, with the rows' own"
                f" masks); capture again with store.keep=all, or with head=[{','.join(heads)}] and the data.loss_on of"
                " the rows"
            )
