"""What drafters and gates owe each other. A gate that is trained on what a drafter would draft (`drafted`) sees the
same while decoding; and whatever a gate says, the text is the one it would have been.

Heads are found in conf/head/*.yaml, each with every switch of its Config turned over where that is allowed.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.contracts import Batch, Capture, Drafted, Head, Needs
from draftsmith.data.pack import collate
from draftsmith.data.rows import Row, Rows
from draftsmith.decoding import tree
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError
from draftsmith.roles import Partial, State
from draftsmith.training.fit import new_head

FOLDER = Path(__file__).parents[2] / "conf" / "head"
LENGTH = 26
ROWS = [(12, 9), (9, 5), (4, 4), (20, 17)]  # (tokens, of which the last so many are learned); two packs of up to three
PROMPTS = [[7], list(range(30, 44))]
COUNT = 20


@dataclass(frozen=True)
class Variant:
    name: str
    kind: Any
    own: Any  # the typed config

    def __str__(self) -> str:
        return self.name


def variants() -> list[Variant]:
    """Of every drafter."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        kind = config.target(node, path.stem)
        if kind.role != "drafter":
            continue
        switches = {k: not v for k, v in node.items() if isinstance(v, bool)}
        switches |= {k: 45 for k in node if k.endswith("vocab_size")}  # of the tiny bases' 60 tokens
        for switch in [None, *switches]:
            values = node if switch is None else {**node, switch: switches[switch]}
            try:
                own = config.typed(values, kind.Config, path.stem)
            except ConfigError:
                if switch is None:
                    raise
                continue
            found.append(Variant(path.stem + (f"-{switch}" if switch else ""), kind, own))
    return found


VARIANTS = variants()
every_judged = pytest.mark.parametrize("variant", [v for v in VARIANTS if hasattr(v.kind, "drafted")], ids=str)
every_gated = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.kind.gated], ids=str)
every_other = pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.kind.gated], ids=str)


def test_there_are_drafters_of_every_sort() -> None:
    judged, gated, other = ({v.kind for v in mark.args[1]} for mark in (every_judged, every_gated, every_other))
    assert judged
    assert other
    assert judged <= gated  # what is never asked needs no judge


@functools.cache
def answer(base: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers' generate says, once for all heads on this base."""
    return base.generate([list(prompt)], max_new_tokens=count)[0]


@functools.cache
def plain(base: Any, prompt: tuple[int, ...], temperature: float) -> list[int]:
    """What the engine says without a drafter."""
    return generate(base, prompt, max_new_tokens=COUNT, temperature=temperature, seed=3).tokens


def a_batch(base: Any, horizon: int, learn: Callable[[int, int], bool] | None = None) -> Batch:
    """Two packed sequences with padding, of the base's own words. learn(document, position) chooses the targets."""
    rows = []
    for d, (n, learned) in enumerate(ROWS):
        ids = [5 * d + 3, *answer(base, (5 * d + 3,), n - 1)]
        rows.append(Row(str(d), ids, [int(learn(d, t) if learn else t >= n - learned) for t in range(n)]))
    total = torch.from_numpy(Rows.of(rows).counts(horizon).sum(0))
    return collate([rows[:3], rows[3:]], LENGTH, total)


@torch.no_grad()
def capture(base: Any, head: Head, batch: Batch) -> Capture:
    needs = head.needs | Needs(final=True)
    return base.capture(needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def drafted(base: Any, head: Any, batch: Batch) -> Drafted:
    return head.drafted(base, capture(base, head, batch), batch)


@pytest.fixture(scope="module")
def make(tiny_base: Any, noisy: Any) -> Callable[..., tuple[Any, Any]]:
    """make(variant, family): the tiny base and a head, noisy, that has learned a little of what the base says. Leave
    its weights as they are."""

    @functools.cache
    def trained(name: str, family: str) -> tuple[Any, Any]:
        base, variant = tiny_base(family), next(v for v in VARIANTS if v.name == name)
        counts_V = torch.arange(60)  # so that the columns of a smaller vocabulary are not its ids
        head = noisy(new_head(variant.kind, variant.own, variant.name, base, 0, counts_V), 0.05).eval()
        batch = a_batch(base, head.horizon)
        seen, optimizer = capture(base, head, batch), torch.optim.AdamW(head.parameters(), lr=5e-3)
        for _ in range(15):
            out = head.loss(base, seen, batch, measure=False)
            optimizer.zero_grad()
            (out.sum / out.count).backward()
            optimizer.step()
        return base, head

    def of(variant: Variant, family: str = "llama") -> tuple[Any, Any]:
        base, head = trained(variant.name, family)
        return base, head.eval()

    return of


@dataclass
class Silent:
    """A gate that lets everything pass and keeps what it was shown."""

    partials: list[Partial] = field(default_factory=list)

    def stop(self, state: State, partial: Partial) -> bool:
        self.partials.append(partial)
        return False


class Whim:
    """A gate that stops at random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.said: set[bool] = set()

    def stop(self, state: State, partial: Partial) -> bool:
        self.said.add(stops := bool(torch.rand((), generator=self.generator) < 0.3))
        return stops


# What a drafter says that it would draft


@torch.no_grad()
def listen(base: Any, head: Any, seen: Capture, ids: list[int], n: int) -> Partial:
    """What a gate is shown of the chain below the root ids[n - 1]; seen: of the whole document."""
    kv, gate = base.new_kv(), Silent()
    base.capture(Needs(final=True), torch.tensor([ids[: n - 1]]), kv=kv)
    new = seen.at(torch.arange(n - 1))
    head.propose(base, State(ids[:n], ids[n - 1], new, tree.chain(head.max_depth), kv, gate=gate))
    assert len(gate.partials) == head.max_depth - 1  # the last level has no children
    return gate.partials[-1]  # it grew while drafting went on


@every_judged
@pytest.mark.parametrize("family", ["llama", "mistral"])  # plain and windowed
def test_what_training_judges_is_what_a_gate_sees(variant: Variant, family: str, make: Any) -> None:
    """Every draft below every root, as long as those before it are the row's own tokens."""
    base, head = make(variant, family)
    batch = a_batch(base, head.horizon)
    seen, told = capture(base, head, batch), drafted(base, head, batch)
    largest = float(torch.stack([told.hidden_MD, told.before_MD]).abs().max())
    found: set[int] = set()
    right = wrong = 0
    for b, documents in enumerate(batch.documents_BT):
        for d in range(int(documents.max()) + 1):
            where = (documents == d).nonzero().squeeze(1)
            ids, learned = batch.tokens_BT[b, where].tolist(), batch.mask_BT[b, where].tolist()
            hidden = {layer: h[b : b + 1] for layer, h in seen.hidden.items()}
            row = Capture(hidden, None if seen.final is None else seen.final[b : b + 1]).at(where)
            for n in range(2, len(ids)):
                partial = listen(base, head, row, ids, n)
                states = itertools.pairwise(partial.hidden)
                for j, tokens_1, (before_1D, hidden_1D) in zip(range(n, len(ids)), partial.tokens, states):  # noqa: B905
                    if learned[j]:
                        at = b * LENGTH + int(where[j - 1])
                        places = (told.at_M == at).nonzero().squeeze(1)
                        away = (told.hidden_MD[places] - hidden_1D).abs().amax(1)
                        away += (told.before_MD[places] - before_1D).abs().amax(1)
                        place = int(places[away.argmin()])
                        assert float(away.min()) <= 1e-5 * largest, f"document {d}, root {n - 1}, aiming at {j}"
                        assert int(told.tokens_M[place]) == int(tokens_1)
                        found.add(place)
                    if int(tokens_1) != ids[j]:
                        wrong += 1
                        break
                    right += 1
    assert min(right, wrong) > 4
    assert len(found) > 0.2 * len(told.tokens_M)


@every_judged
def test_every_counted_target_is_aimed_at(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    batch = a_batch(base, head.horizon, lambda document, t: t % 3 != 1)
    told = drafted(base, head, batch)
    targets = batch.mask_BT & (batch.positions_BT >= told.ahead)
    assert set(told.at_M.tolist()) == {b * LENGTH + t - 1 for b, t in targets.nonzero().tolist()}
    assert len(told.at_M) == len(told.tokens_M) == len(told.hidden_MD) >= int(batch.counts_K[told.ahead]) > 0
    nothing = drafted(base, head, a_batch(base, head.horizon, lambda document, t: False))
    assert [len(nothing.at_M), len(nothing.tokens_M), *nothing.hidden_MD.shape] == [0, 0, 0, told.hidden_MD.shape[1]]


@every_judged
def test_training_or_not_is_the_same_and_leaves_no_gradient(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    batch, before = a_batch(base, head.horizon), base.weights_sha256()
    one, two = drafted(base, head.train(), batch), drafted(base, head.eval(), batch)
    head.train()
    drafted(base, head, batch)
    assert all(module.training for module in head.modules())
    assert torch.equal(one.at_M, two.at_M)
    assert torch.equal(one.tokens_M, two.tokens_M)
    assert torch.equal(one.hidden_MD, two.hidden_MD)
    assert torch.equal(one.before_MD, two.before_MD)
    assert not one.hidden_MD.requires_grad
    assert base.weights_sha256() == before


# Leakage: document 1 stands at positions 12..20 of the first sequence.
DOCUMENT, FIRST, TARGET = 1, 12, 17


@every_judged
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_draft_looks_only_at_what_stands_before_its_target(variant: Variant, family: str, make: Any) -> None:
    base, head = make(variant, family)
    batch = a_batch(base, head.horizon, lambda document, t: (document, FIRST + t) == (DOCUMENT, TARGET))
    told = drafted(base, head, batch)
    assert set(told.at_M.tolist()) == {TARGET - 1}
    for t in range(LENGTH):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, t] = (tokens_BT[0, t] + 1) % 60
        other = drafted(base, head, replace(batch, tokens_BT=tokens_BT))
        same = torch.equal(told.tokens_M, other.tokens_M) and torch.equal(told.hidden_MD, other.hidden_MD)
        assert same == (not FIRST <= t < TARGET), f"position {t}"


# Gates


def shapes(head: Any) -> list[Any]:
    return [tree.chain(head.max_depth), tree.by_widths([3, 2, 1, 1, 1, 1, 1, 1][: head.max_depth])]


@every_gated
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gate_never_changes_the_text(variant: Variant, temperature: float, make: Any, recording: Any) -> None:
    """Neither the greedy one, which is the base's own, nor a sampled one, which the seed alone decides."""
    base, head = make(variant)
    for prompt in PROMPTS:
        asked = {"max_new_tokens": COUNT, "temperature": temperature, "seed": 3}
        alone = plain(base, tuple(prompt), temperature)
        assert temperature or alone == answer(base, tuple(prompt), COUNT)
        for shape in shapes(head):
            gate, whim = Silent(), Whim(0)
            free = generate(base, prompt, drafter=head, shape=shape, gate=gate, **asked)
            stopped = generate(base, prompt, drafter=head, shape=shape, gate=whim, **asked)
            assert free.tokens == stopped.tokens == alone
            assert sum(stopped.stats.offered_by_depth[1:]) / stopped.steps < shape.depth - 1
            assert sum(free.stats.offered_by_depth) == shape.depth * free.steps  # another gate's place is taken
            assert whim.said == {True, False}


def test_the_seed_decides_the_text(tiny_base: Any) -> None:
    """The test above could not fail if there were but one."""
    texts = {tuple(generate(tiny_base(), [7], max_new_tokens=8, temperature=1.0, seed=s).tokens) for s in range(4)}
    assert len(texts) == 4


@every_other
def test_a_gate_for_one_that_drafts_all_at_once_is_refused(variant: Variant, tiny_base: Any) -> None:
    base = tiny_base()
    head = variant.kind(variant.own, base.spec)
    with pytest.raises(ConfigError, match=f"gate: {variant.kind.__name__} drafts all at once"):
        generate(base, [7], drafter=head, gate=Silent(), max_new_tokens=2)


def test_a_gate_without_a_drafter_is_refused(tiny_base: Any) -> None:
    with pytest.raises(ConfigError, match="gate: there is no drafter"):
        generate(tiny_base(), [7], gate=Silent(), max_new_tokens=2)
