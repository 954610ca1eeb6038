"""What every head owes us. Heads are found in conf/head/*.yaml, and each is also tried with every switch of its
Config turned over; which tests apply is read from `role`, `lossy` and `wants` of the class, never from a name. Who
wants a drafter beside it gets a draft model, of a second tiny base."""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from draftsmith import config
from draftsmith.base import lm
from draftsmith.base.settings import LoraConfig
from draftsmith.contracts import Batch, Capture, Head, LossOut, Needs
from draftsmith.data.pack import collate
from draftsmith.data.rows import Row, Rows
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.errors import ConfigError
from draftsmith.exporters import native
from draftsmith.heads.draft_model import DraftModel
from draftsmith.roles import State
from draftsmith.targets import counted_targets
from draftsmith.training.fit import new_adapter, new_head

# role -> what a head of that role must offer beside forward and loss
ROLES = {"drafter": ("propose", "max_depth"), "gate": ("gate",), "primer": ("prime",)}
FOLDER = Path(__file__).parents[2] / "conf" / "head"


def faults(kind: Any) -> list[str]:
    """What a class lacks to be a head; [] for a good one."""
    found = [] if isinstance(kind, type) and issubclass(kind, Head) else ["is no subclass of contracts.Head"]
    role, schema = getattr(kind, "role", None), getattr(kind, "Config", None)
    if role not in ROLES:
        found.append(f"role={role!r}: give one of {sorted(ROLES)}")
    if type(getattr(kind, "lossy", None)) is not bool:
        found.append("lossy: say True or False")
    found += [f"{role} without {name}" for name in ROLES.get(role, ()) if not hasattr(kind, name)]
    if role == "gate" and not getattr(kind, "wants", ""):
        found.append("wants: say whom it judges")
    if not (dataclasses.is_dataclass(schema) and schema.__dataclass_params__.frozen):
        found.append("Config: give a frozen dataclass")
    if getattr(kind, "forward", nn.Module.forward) is nn.Module.forward:
        found.append("has no forward")
    return found + [f"{name} is missing" for name in sorted(getattr(kind, "__abstractmethods__", ()))]


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    kind: Any
    own: Any  # the typed config

    def __str__(self) -> str:
        return self.name


def variants() -> list[Variant]:
    """Every head yaml as it stands, with each of its switches turned over where its Config allows that, every other
    word where it chooses among some, and a vocabulary smaller than the base's where it has one."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        kind = config.target(node, f"heads.{path.stem}")
        switches = {k: not v for k, v in node.items() if isinstance(v, bool)}
        switches |= {k: 45 for k in node if k.endswith("vocab_size")}  # of the tiny bases' 60 tokens
        for key, hint in typing.get_type_hints(kind.Config).items():
            if typing.get_origin(hint) is typing.Literal:
                (switches[key],) = set(typing.get_args(hint)) - {node[key]}
        for switch in [None, *switches]:
            values = node if switch is None else {**node, switch: switches[switch]}
            try:
                own = config.typed(values, kind.Config, f"heads.{path.stem}")
            except ConfigError:
                if switch is None:
                    raise
                continue
            found.append(Variant(path.stem + (f"-{switch}" if switch else ""), kind, own))
    return found


VARIANTS = variants()
every_head = pytest.mark.parametrize("variant", VARIANTS, ids=str)
drafters = [v for v in VARIANTS if getattr(v.kind, "role", None) == "drafter"]
every_drafter = pytest.mark.parametrize("variant", drafters, ids=str)
gates = [v for v in VARIANTS if getattr(v.kind, "role", None) == "gate"]
every_gate = pytest.mark.parametrize("variant", gates, ids=str)
every_head_of_the_base = pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in gates], ids=str)
every_exact_drafter = pytest.mark.parametrize("variant", [v for v in drafters if not v.kind.lossy], ids=str)


@pytest.fixture
def make(tiny_base: Any, noisy: Any) -> Callable[..., tuple[Any, Head]]:
    """make(variant, scale): the tiny base and a new head; scale: noise on its weights, 0 = as training starts."""

    def of(variant: Variant, scale: float = 0.1, seed: int = 0, family: str = "llama") -> tuple[Any, Head]:
        base = tiny_base(family)
        if variant.kind.adapts:
            base = tiny_base.__wrapped__(family)
            new_adapter(base, LoraConfig(rank=3), seed)
            noisy(base.adapter, scale)
        beside = DraftModel(tiny_base("llama", seed=3, hidden_size=24), depth=4) if wants_a_drafter(variant) else None
        head = new_head(variant.kind, variant.own, variant.name, base, seed, beside=beside)
        return base, noisy(head, scale).eval()

    return of


def wants_a_drafter(variant: Variant) -> bool:
    return bool(variant.kind.wants == "drafter")


LENGTH = 26
ROWS = [  # (tokens, of which the last so many are to be learned); two packs, three documents in one of them
    (12, 9),
    (9, 5),
    (4, 4),  # so that the document before it has something to cross over to
    (20, 17),
]


@functools.cache
def answer(base: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers' generate says, once for all heads on this base."""
    return base.generate([list(prompt)], max_new_tokens=count)[0]


def a_batch(head: Head, learn: Callable[[int, int], bool] | None = None, seed: int = 0, said_by: Any = None) -> Batch:
    """Two packed sequences with padding. learn(document, position) chooses the targets, by default ROWS does.
    said_by: a base whose own greedy text the rows are, where chance tokens would teach soft labels nothing. A head
    that reads labels gets one wherever something is learned."""
    generator, labelled = torch.Generator().manual_seed(seed), head.reads_labels(head.config, head.beside)
    rows = []
    for d, (n, learned) in enumerate(ROWS):
        ids = torch.randint(0, 60, (n,), generator=generator).tolist()
        if said_by is not None:
            ids = [ids[0], *answer(said_by, (ids[0],), n - 1)]
        mask = [int(learn(d, t) if learn else t >= n - learned) for t in range(n)]
        labels = [t % 3 / 2 if learned else math.nan for t, learned in zip(ids, mask, strict=True)]
        rows.append(Row(str(d), ids, mask, labels=labels if labelled else None))
    total = torch.from_numpy(Rows.of(rows).counts(head.horizon).sum(0))
    return collate([rows[:3], rows[3:]], LENGTH, total)


@torch.no_grad()
def capture(base: Any, needs: Needs, batch: Batch) -> Capture:
    """As training does it; of an adapter only the value, not the gradient."""
    return base.capture(needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def loss_of(base: Any, head: Head, batch: Batch, **more: Any) -> LossOut:
    return head.loss(base, capture(base, head.needs, batch), batch, **more)


def train(base: Any, head: Head, batch: Batch, steps: int, lr: float = 5e-3) -> list[float]:
    """The losses, above the least that they can be where the head tells it (`floor`: the entropy of soft labels)."""
    seen, optimizer, losses = capture(base, head.needs, batch), torch.optim.AdamW(head.parameters(), lr=lr), []
    floor = float(head.loss(base, seen, batch).metrics.get("floor", (torch.zeros(()), 1))[0])
    for _ in range(steps):
        out = head.loss(base, seen, batch, measure=False)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        losses.append((float(out.sum.detach()) - floor) / int(out.count))
    return losses


def overhear(head: Head, work: Callable[[], Any]) -> tuple[Any, list[list[Tensor]]]:
    """work()'s result, and what the head's own forward returned meanwhile, call by call."""
    outputs: list[list[Tensor]] = []
    hook = head.register_forward_hook(lambda module, args, out: outputs.append(tensors_in(out)))
    result = work()
    hook.remove()
    return result, outputs


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, list | tuple) else []


def assert_same(a: list[list[Tensor]], b: list[list[Tensor]], relative: float) -> None:
    """Equal up to `relative` of the largest value; 0 asks for the same bits."""
    assert len(a) == len(b) > 0, "propose must call the head's forward"
    for x, y in zip([t for call in a for t in call], [t for call in b for t in call], strict=True):
        assert x.shape == y.shape
        assert float((x - y).abs().max()) <= relative * float(y.abs().max())


def shape_for(head: Any, width: int = 3) -> Any:
    """A tree as deep as the head, `width` wide at the first depth and 2 at the second."""
    return tree.by_widths([width, 2, 1, 1, 1, 1, 1, 1][: head.max_depth])


def replay(base: Any, head: Any, text: list[int], starts: list[int], seen: Capture, shape: Any) -> list[list[int]]:
    """Proposals of the head after text[:n] for n in starts, given the capture of the whole text."""
    proposed, before, head_kv = [], 0, None
    for n in starts:
        new = seen.at(torch.arange(before, n - 1))
        state = State(text[:n], text[n - 1], new, shape, read(base, text[: n - 1]), head_kv)
        proposed.append(head.propose(base, state).tokens_N.tolist())
        before, head_kv = n - 1, state.head_kv
    return proposed


def read(base: Any, text: list[int]) -> Any:
    """The base's K/V after this text."""
    kv = base.new_kv()
    base.capture(Needs(final=True), torch.tensor([text]), kv=kv)
    return kv


# The class


@every_head
def test_it_is_a_head_with_a_role(variant: Variant) -> None:
    assert faults(variant.kind) == []


def test_what_is_no_head_is_told_so() -> None:
    @dataclasses.dataclass(frozen=True)
    class Settings:
        pass

    class Whole(Head):
        Config = Settings
        role = "drafter"
        max_depth = 1
        needs = Needs()
        horizon = 1

        def initialise(self, base: Any, counts_V: Any = None) -> None: ...
        def loss(self, base: Any, seen: Any, batch: Any, *, measure: bool = True) -> Any: ...
        def forward(self) -> None: ...
        def propose(self, base: Any, state: Any) -> None: ...

    def without(**changes: Any) -> list[str]:
        return faults(type("Changed", (Whole,), changes))

    parts = {k: v for k, v in vars(Whole).items() if not k.startswith("__") and k != "_abc_impl"}
    assert faults(Whole) == []
    assert faults(type("Roleless", (Head,), {k: v for k, v in parts.items() if k != "role"})) == [
        "role=None: give one of ['drafter', 'gate', 'primer']"
    ]
    assert "role='gatekeeper'" in without(role="gatekeeper")[0]
    assert without(role="gate") == ["gate without gate", "wants: say whom it judges"]
    assert without(role="gate", gate=None, wants="drafter") == []
    assert without(role="primer") == ["primer without prime"]
    assert without(lossy="no") == ["lossy: say True or False"]
    assert without(Config=dataclasses.make_dataclass("Open", [])) == ["Config: give a frozen dataclass"]
    for name, told in (("propose", "drafter without propose"), ("loss", "loss is missing"), ("forward", "has no for")):
        assert faults(type("Partial", (Head,), {k: v for k, v in parts.items() if k != name}))[0].startswith(told)
    assert "is no subclass of contracts.Head" in faults(nn.Linear)


@every_head
def test_it_says_what_it_needs(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    assert isinstance(head.needs, Needs)
    assert head.needs.hidden <= set(range(base.spec.num_layers + 1))
    assert head.horizon >= 1
    assert head.role != "drafter" or head.max_depth >= 1


class NoMemory(TorchDispatchMode):
    """Fails on any operation that makes a tensor outside the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            assert not isinstance(t, Tensor) or t.is_meta, f"{func} made a tensor on {t.device}"
        return out


@every_head
def test_on_the_meta_device_nothing_is_allocated(variant: Variant, make: Any) -> None:
    base, real = make(variant)
    with torch.device("meta"), NoMemory():  # with all that follows from base and beside told, as it is exported
        head = variant.kind(real.config, base.spec)
    shapes = {name: t.shape for name, t in head.state_dict().items()}
    assert all(t.is_meta for t in head.state_dict().values())
    assert shapes == {name: t.shape for name, t in real.state_dict().items()}


@every_head
def test_it_starts_from_seed_and_name_alone(variant: Variant, make: Any) -> None:
    before = torch.random.get_rng_state()
    (_, one), (_, two) = make(variant, 0.0), make(variant, 0.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in one.parameters())


# Training


@every_head
def test_the_loss_falls_on_one_batch(variant: Variant, make: Any) -> None:
    base, head = make(variant, 0.0)
    losses = train(base, head, a_batch(head), 40)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert 0 <= losses[-1] < 0.7 * losses[0]


@every_head
def test_gradients_reach_every_parameter_of_the_head_and_none_of_the_base(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    before = base.weights_sha256()
    adapter = [] if base.adapter is None else list(base.adapter.parameters())
    frozen = [p for p in [*base.model.parameters(), *base.model.buffers()] if not any(p is a for a in adapter)]
    others = list(head.beside.companion.model.parameters()) if wants_a_drafter(variant) else []
    frozen += others
    batch = a_batch(head)
    where = {"positions_BQ": batch.positions_BT, "mask_BQS": batch.visible()}
    head.loss(base, base.capture(head.needs, batch.tokens_BT, **where), batch).sum.backward()
    assert head.adapts == bool(adapter)
    assert all(p.grad is not None and p.grad.any() for p in adapter)
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [p.shape for p in frozen if p.grad is not None or p.requires_grad] == []
    assert {p.data_ptr() for p in head.parameters()} & {p.data_ptr() for p in frozen} == set()
    assert len({p.data_ptr() for p in head.parameters()}) == len(list(head.parameters()))
    train(base, head, a_batch(head), 3)
    assert base.weights_sha256() == before


@every_head
def test_the_normaliser_belongs_to_the_batch_and_metrics_carry_no_gradient(variant: Variant, make: Any) -> None:
    (base, one), (_, two) = make(variant, 0.1), make(variant, 1.0)
    batch = a_batch(one)
    a, b = loss_of(base, one, batch), loss_of(base, two, batch)
    assert float(a.sum.detach()) != float(b.sum.detach())
    assert a.sum.ndim == a.count.ndim == 0
    assert int(a.count) == int(b.count) > 0
    assert a.metrics.keys() == b.metrics.keys()
    assert not any(t.requires_grad or t.ndim for pair in a.metrics.values() for t in pair)
    assert torch.equal(a.sum, loss_of(base, one, batch, measure=False).sum)


@every_head
def test_the_sum_is_that_of_its_rows(variant: Variant, make: Any) -> None:
    """So that any cut into micro-batches and processes gives the same gradient."""
    base, head = make(variant)
    whole = a_batch(head)
    halves = [
        Batch(**{k: v if k == "counts_K" or v is None else v[i : i + 1] for k, v in vars(whole).items()})
        for i in range(len(whole.tokens_BT))
    ]
    sums = [loss_of(base, head, half) for half in halves]
    torch.testing.assert_close(sum(out.sum for out in sums), loss_of(base, head, whole).sum)
    assert {int(out.count) for out in sums} == {int(loss_of(base, head, whole).count)}


@every_head
def test_the_plain_way_gives_the_same_loss_metrics_and_gradients(variant: Variant, make: Any) -> None:
    """Whole logits, positions that count for nothing computed too: what a bench compares with is the same loss."""
    base, head = make(variant)
    batch, found = a_batch(head), []
    head.eval()  # without noise, whose draws would differ
    for plain in (False, True):
        head.plain_loss, head.skip_masked = plain, not plain
        out = loss_of(base, head, batch)
        head.zero_grad()
        out.sum.backward()
        found.append((out, {name: p.grad for name, p in head.named_parameters() if p.grad is not None}))
    (fused, own), (plainly, theirs) = found
    torch.testing.assert_close(plainly.sum, fused.sum, rtol=1e-5, atol=1e-6)
    assert int(plainly.count) == int(fused.count)
    for name, pair in fused.metrics.items():
        for a, b in zip(plainly.metrics[name], pair, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, grad in own.items():
        torch.testing.assert_close(theirs[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@every_head
def test_a_batch_with_nothing_to_learn_costs_nothing(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    out = loss_of(base, head, a_batch(head, lambda document, t: False))
    (out.sum / out.count.clamp(min=1)).backward()
    assert (float(out.sum.detach()), int(out.count)) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@every_head
def test_a_forward_shared_with_other_heads_changes_nothing(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    batch = a_batch(head)
    everything = head.needs | Needs(frozenset(range(base.spec.num_layers + 1)), final=True, logits=True)
    assert torch.equal(head.loss(base, capture(base, everything, batch), batch).sum, loss_of(base, head, batch).sum)


@every_head
def test_a_head_of_counted_positions_looks_at_no_other(variant: Variant, make: Any) -> None:
    """Elsewhere a store keeps nothing, and what is read there is no number."""
    base, head = make(variant)
    if not head.reads_counted:
        pytest.skip("reads every position")
    batch = a_batch(head)
    ahead = [
        counted_targets(batch.tokens_BT, batch.mask_BT, batch.documents_BT, k)[1] for k in range(1, head.horizon + 1)
    ]
    counted_BT = torch.stack(ahead).any(0)
    assert not counted_BT.all()
    seen = capture(base, head.needs, batch)
    sums, slopes = [], []
    for own in (seen, seen.each(lambda t: t.where(counted_BT[..., None], torch.nan))):
        out = head.loss(base, own, batch)
        head.zero_grad()
        if out.sum.requires_grad:
            out.sum.backward()
        sums.append(out.sum.detach())
        slopes.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    assert torch.equal(*sums)
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


# Leakage: document 0 stands at positions 0..11 of the first sequence, document 1 at 12..20.
DOCUMENT, FIRST, TARGET = 1, 12, 16


def only_target(head: Head) -> Batch:
    return a_batch(head, lambda document, t: (document, FIRST + t) == (DOCUMENT, TARGET))


@every_head_of_the_base  # gates learn from states that nobody sends a gradient to; the test below covers them
def test_the_loss_of_a_token_looks_only_at_what_stands_before_it(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    batch = only_target(head)
    seen = capture(base, head.needs, batch)
    leaves = [t for t in (seen.final, seen.logits, *seen.hidden.values()) if t is not None]
    for t in leaves:
        t.requires_grad_()
    head.loss(base, seen, batch).sum.backward()
    reached = {tuple(at) for t in leaves if t.grad is not None for at in t.grad.abs().sum(-1).nonzero().tolist()}
    assert reached, "the only target has no effect on the loss"
    assert reached <= {(0, t) for t in range(FIRST, TARGET)}


@every_head
@pytest.mark.parametrize("where", ["after", "other documents"])
def test_tokens_that_may_not_be_seen_change_nothing(variant: Variant, where: str, make: Any) -> None:
    base, head = make(variant)
    batch = only_target(head)
    changed = batch.tokens_BT.clone()
    if where == "after":
        changed[0, TARGET + 1 :] = (changed[0, TARGET + 1 :] + 7) % 60
    else:
        changed[0, :FIRST] = (changed[0, :FIRST] + 7) % 60
        changed[1] = (changed[1] + 7) % 60
    same = loss_of(base, head, dataclasses.replace(batch, tokens_BT=changed)).sum
    torch.testing.assert_close(same, loss_of(base, head, batch).sum, rtol=1e-6, atol=0)
    changed[0, TARGET - head.horizon :] = (changed[0, TARGET - head.horizon :] + 7) % 60
    other = loss_of(base, head, dataclasses.replace(batch, tokens_BT=changed)).sum
    assert abs(float(other.detach() - same.detach())) > 1e-3  # the check can tell


@every_drafter
def test_its_logits_do_not_know_later_tokens(variant: Variant, make: Any) -> None:
    base, head = make(variant)
    text = torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    heard = []
    for whole in (text, text[:20] + [(t + 7) % 60 for t in text[20:]]):
        seen = base.capture(head.needs, torch.tensor([whole]))
        drafting = lambda seen=seen: replay(base, head, text, [9, 10, 14, 20], seen, shape_for(head))  # noqa: E731
        heard.append(overhear(head, drafting)[1])
    assert_same(heard[0], heard[1], 1e-6)


# Training and decoding are the same function


@every_drafter
def test_logits_in_training_equal_those_in_decoding(variant: Variant, make: Any, recording: Any) -> None:
    """The engine's incremental captures against the capture of a packed batch that holds the same text."""
    base, head = make(variant, 0.0)
    batch = a_batch(head, said_by=base)
    train(base, head, batch, 25)
    shape, engine, prompt = shape_for(head), recording(head), batch.tokens_BT[1, :4].tolist()
    out, decoding = overhear(head, lambda: generate(base, prompt, drafter=engine, shape=shape, max_new_tokens=40))
    starts = [len(t) for t in engine.tokens]
    assert len({b - a for a, b in itertools.pairwise(starts)}) > 1  # some drafts kept, some not
    text = [*prompt, *out.tokens]
    before = 7  # the text is the second document of its sequence
    rows = [Row("a", list(range(before)), [1] * before), Row("b", text, [1] * len(text))]
    batch = collate([rows], before + len(text) + 4, torch.from_numpy(Rows.of(rows).counts(head.horizon)[1]))
    packed = capture(base, head.needs, batch).at(torch.arange(before, before + len(text)))
    again, training = overhear(head, lambda: replay(base, head, text, starts, packed, shape))
    assert again == [p.tokens_N.tolist() for p in engine.proposals]
    assert_same(training, decoding, 1e-5)


@every_drafter
def test_the_estimate_in_training_is_what_drafting_would_reach(variant: Variant, make: Any) -> None:
    """`tokens_per_step` of the loss counts, over positions, the base's token and the drafts right in a row;
    here the head drafts at every one of these positions. A shift between the two would show."""
    base, head = make(variant, 0.0)
    batch = a_batch(head, said_by=base)
    train(base, head, batch, 25)
    seen = capture(base, head.needs, batch)
    told, positions = loss_of(base, head, batch).metrics["tokens_per_step"]
    drafted_right = asked = 0
    for b, documents in enumerate(batch.documents_BT):
        for d in range(int(documents.max()) + 1):
            where = (documents == d).nonzero().squeeze(1)
            ids, learned = batch.tokens_BT[b, where].tolist(), batch.mask_BT[b, where].tolist()
            row = Capture(
                {k: v[b : b + 1] for k, v in seen.hidden.items()},
                None if seen.final is None else seen.final[b : b + 1],
                None if seen.logits is None else seen.logits[b : b + 1],
            ).at(where)
            for n in range(2, len(ids)):  # the root is ids[n - 1], the first draft aims at ids[n]
                if not learned[n]:
                    continue
                asked += 1
                new, whole = row.at(torch.arange(n - 1)), tree.chain(head.max_depth)
                state = State(ids[:n], ids[n - 1], new, whole, read(base, ids[: n - 1]))
                for k, token in enumerate(head.propose(base, state).tokens_N.tolist()[1:]):
                    if n + k >= len(ids) or not learned[n + k] or token != ids[n + k]:
                        break
                    drafted_right += 1
    assert int(positions) == asked
    assert int(told) == asked + drafted_right
    assert 0.2 * asked < drafted_right < 0.95 * asked * head.max_depth  # neither nothing nor everything


# Decoding


@every_exact_drafter
@pytest.mark.parametrize(
    ("weights", "family"),
    [  # test_lossless.py has two families more; crossed with the weights as well they are slow
        ("random", "llama"),
        ("trained", "qwen3"),
        pytest.param("random", "qwen3", marks=pytest.mark.slow),
        pytest.param("trained", "llama", marks=pytest.mark.slow),
    ],
)
def test_greedy_decoding_returns_the_bases_own_tokens(variant: Variant, weights: str, family: str, make: Any) -> None:
    """§11.27, §11.33: chains and trees, drafts right and wrong."""
    base, head = make(variant, 0.0 if weights == "trained" else 0.3, family=family)
    if weights == "trained":
        train(base, head, a_batch(head, said_by=base), 12)
    before = base.weights_sha256()
    for prompt in ([7], list(range(30, 44))):
        reference = answer(base, tuple(prompt), 28)
        for shape in (tree.chain(head.max_depth), shape_for(head)):
            out = generate(base, prompt, drafter=head, shape=shape, max_new_tokens=28)
            assert out.tokens == reference
            assert out.steps > 28 / (shape.depth + 1), "every draft was right: nothing was put to the test"
    assert base.weights_sha256() == before


@every_drafter
def test_in_a_batch_every_row_accepts_what_it_would_alone(variant: Variant, make: Any) -> None:
    """Rows of different lengths, that accept differently: not only the same tokens, the same drafts were kept."""
    base, head = make(variant, 0.0)
    batch = a_batch(head, said_by=base)
    train(base, head, batch, 20)
    prompts = [batch.tokens_BT[1, :4].tolist(), list(range(30, 44)), [3, 1, 4, 1, 5]]
    for shape in (shape_for(head), ByProbability(nodes=9, depth=head.max_depth, top_k=3)):
        limits: Any = {"shape": shape, "max_new_tokens": 16}
        together = decode(base, prompts, drafters=head, **limits)
        for prompt, row in zip(prompts, together, strict=True):
            alone = generate(base, prompt, drafter=head, **limits)
            assert (row.tokens, row.stats.kept) == (alone.tokens, alone.stats.kept)
            assert row.stats.offered_by_depth == alone.stats.offered_by_depth
        assert len({tuple(row.stats.kept) for row in together}) > 1


@every_gate
def test_a_gate_with_random_weights_changes_no_token(variant: Variant, make: Any) -> None:
    """§11.27: whatever it says, and it says both. A drafter that draws has the same distribution, not the same text."""
    base, head = make(variant)
    untold, depths = base.generate([[7, 8]], max_new_tokens=28)[0], set()
    for shape in (tree.chain(4), tree.by_widths([2, 2, 1, 1])):
        for threshold in (0.01, 0.5, 0.99):
            asked: Any = {"shape": shape, "watch": lambda p, verdict: depths.add(int(tree.depths(p.parents_N).max()))}
            gate = head.gate(threshold, 1)
            assert generate(base, [7, 8], drafter=head.beside, gate=gate, max_new_tokens=28, **asked).tokens == untold
    assert len(depths) > 1


@every_gate
def test_a_gate_is_the_same_at_work_when_it_comes_back(variant: Variant, make: Any, tmp_path: Path) -> None:
    base, head = make(variant, 0.3)
    native.save(tmp_path / "head", head, name=variant.name)
    back: Any = native.load(tmp_path / "head", base.spec)  # nobody beside it: states are all that it reads
    states = torch.randn(9, head.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(states), head(states))
    assert dataclasses.replace(back.gate(), head=head) == head.gate()


# In bf16


@every_head
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_bf16_base_teaches_it(
    variant: Variant, precision: str, make: Any, tiny_base: Any, noisy: Any, tmp_path: Path
) -> None:
    """As training runs it: the base in its own dtype, the head under autocast or in fp32 throughout. The loss is that
    beside the fp32 base, within what bf16 resolves."""
    wanted, head = make(variant, 0.0)
    batch = a_batch(head)
    exact = float(loss_of(wanted, head, batch).sum.detach())
    tiny_base().model.save_pretrained(tmp_path)
    base = lm.load(str(tmp_path), dtype="bfloat16")
    if variant.kind.adapts:
        new_adapter(base, LoraConfig(rank=3), 0)
    head = new_head(variant.kind, variant.own, variant.name, base, 0, beside=head.beside)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.autocast("cpu", enabled=False):
            seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        loss = head.loss(base, seen, batch).sum
    loss.backward()
    trained = {**dict(head.named_parameters()), **dict(base.adapter.named_parameters() if base.adapter else ())}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)


# On disk


@every_head
def test_it_comes_back_from_its_native_folder_bit_for_bit(variant: Variant, make: Any, tmp_path: Path) -> None:
    base, head = make(variant)
    native.save(tmp_path / "head", head, name=variant.name)
    back = native.load(tmp_path / "head", base.spec)
    back.attach(head.beside)  # whoever stands beside a head is not saved with it
    assert type(back) is type(head)
    assert back.config == head.config
    assert back.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in head.state_dict().items())
    assert load_file(tmp_path / "head" / native.WEIGHTS).keys() == dict(head.named_parameters()).keys() | {
        name for name, _ in head.named_buffers() if name in head.state_dict()
    }
    batch = a_batch(head)
    assert torch.equal(loss_of(base, back, batch).sum, loss_of(base, head, batch).sum)


@every_drafter
def test_what_comes_back_drafts_the_same(variant: Variant, make: Any, tmp_path: Path) -> None:
    base, head = make(variant)
    native.save(tmp_path / "head", head, name=variant.name)
    back: Any = native.load(tmp_path / "head", base.spec)
    text = list(range(20, 45))
    seen = base.capture(head.needs, torch.tensor([text]))
    drafted, logits = overhear(head, lambda: replay(base, head, text, [5, 6, 11], seen, shape_for(head)))
    again, its_logits = overhear(back, lambda: replay(base, back, text, [5, 6, 11], seen, shape_for(back)))
    assert again == drafted
    assert_same(its_logits, logits, 0)


def test_every_head_yaml_is_tried() -> None:
    assert {v.name.partition("-")[0] for v in VARIANTS} == {p.stem for p in FOLDER.glob("*.yaml")}
    assert {v.kind.role for v in VARIANTS} == ROLES.keys()
