"""One text on its way: what its drafter may look at, what was emitted, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.contracts import BaseView, Capture, Needs
from draftsmith.decoding.rules import Chance
from draftsmith.decoding.stats import Stats
from draftsmith.growth import Shape
from draftsmith.roles import Drafter, Gate, State, Verdict


@dataclass
class Row:
    """prompt: ids, up to and with the root where that was emitted before (`rooted`). length: how many slots of the K/V
    are its own, all of the text but the root. tokens: the new ids. finish: why it ended, None while it goes on."""

    number: int
    prompt: list[int]
    drafter: Drafter
    gate: Gate | None
    shape: Shape
    chance: Chance
    eos_ids: frozenset[int]
    max_new_tokens: int
    stats: Stats = field(default_factory=Stats)
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    length: int = 0

    def begin(self, root: int, length: int, seen: Capture) -> None:
        """After the prompt was read: `length` tokens of it, and the root is chosen."""
        self.length = length
        text = [*self.prompt[:length], root]
        rules, generator = self.chance.rules, self.chance.generator
        self.state = State(
            text, root, seen, self.shape, gate=self.gate, warp=rules.warp, draws=rules.drafts, generator=generator
        )

    def room(self, base: BaseView) -> int:
        """How many positions the base has below the root; negative if it has none for the root itself."""
        return base.spec.max_positions - 1 - self.length

    def ready(self, base: BaseView) -> State:
        """The state to draft from, its tree cut to the positions left."""
        room = self.room(base)
        if self.state.shape.depth > room:
            self.state.shape = self.shape.cut(room)
        return self.state

    def advance(self, path: Sequence[int], drafted: Sequence[int], verdict: Verdict, offered: int) -> list[int]:
        """Takes what was kept, drafted[n] being node n's token; returns the emitted tokens, at least one."""
        emitted = [*(drafted[n] for n in path[1:]), verdict.bonus]
        self.state.tokens += emitted
        self.state.root = verdict.bonus
        self.length += len(path)
        self.stats.record(offered, verdict.accepted)
        return emitted

    def emit(self, new: Sequence[int]) -> None:
        """The new tokens up to the first end of text or the limit, and whether that ends it."""
        for token in new:
            self.tokens.append(token)
            if token in self.eos_ids:
                self.finish = "eos"
            elif len(self.tokens) == self.max_new_tokens:
                self.finish = "length"
            if self.finish is not None:
                return


def only(capture: Capture, needs: Needs) -> Capture:
    """The drafter sees what it asked for; the rest was captured for other rows, or for us."""
    hidden = {layer: h for layer, h in capture.hidden.items() if layer in needs.hidden}
    return Capture(hidden, capture.final if needs.final else None, capture.logits if needs.logits else None)
