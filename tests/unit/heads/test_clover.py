"""Clover against the paper's sums, spelled out as loops."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import BaseSpec, Batch, Capture
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError
from draftsmith.growth import TreeShape
from draftsmith.heads.clover import Clover, CloverConfig, Connection
from draftsmith.roles import State
from draftsmith.targets import future_tokens

MakeBatch = Callable[..., Batch]
# the paper's ablation, and both similarities
FORMS: list[dict[str, Any]] = [
    {"similarity": "dot"},
    {"similarity": "cosine"},
    {"attention": False},
    {"regressive": False},
    {"augment": False},
]
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, *form.items())))


def fresh(base: BaseLM, **settings: Any) -> Clover:
    """As before training."""
    torch.manual_seed(1)
    head = Clover(CloverConfig(**settings), base.spec).to(base.dtype)
    head.initialise(base)
    return head


def stirred(base: BaseLM, **settings: Any) -> Clover:
    """With random weights everywhere, so that nothing is hidden by an identity."""
    head = fresh(base, **settings)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head


def see(base: BaseLM, head: Clover, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


@torch.no_grad()
def forced(base: BaseLM, head: Clover, batch: Batch) -> Tensor:
    """logits [K, B, T, V] of every head after the row's own tokens (garbage where a document has no more)."""
    hidden_BTD = see(base, head, batch).hidden[base.spec.num_layers]
    start = hidden = head.context(base, hidden_BTD, batch.positions_BT, batch.visible())
    found = []
    for k in range(1, head.max_depth + 1):
        ahead = k if head.config.regressive else 1
        newest_BT, _ = future_tokens(batch.tokens_BT, batch.documents_BT, ahead)
        logits, hidden = head(base, k, hidden if head.config.regressive else start, newest_BT)
        found.append(logits)
    return torch.stack(found)


@torch.no_grad()
def slow_starts(base: BaseLM, head: Clover, ids: list[int]) -> Tensor:
    """h_0 [T, D] of a text that stands alone."""
    hidden = base.capture(head.needs, torch.tensor([ids])).hidden[base.spec.num_layers]
    if head.layer is not None:
        hidden = head.layer(hidden, torch.arange(len(ids))[None])
    return base.final_norm(hidden)[0]


@torch.no_grad()
def slow_logits(base: BaseLM, head: Clover, start_D: Tensor, drafted: list[int]) -> list[float]:
    """Of head len(drafted), number by number."""
    form, eps, heads = head.config, base.spec.norm_eps, base.spec.num_heads
    size = len(start_D) // heads
    h = start = start_D.tolist()
    for k, token in enumerate(drafted):
        part, row = head.connections[k], base.lm_head_weight[token if form.regressive else drafted[0]].tolist()
        before = h if form.regressive else start
        long = math.sqrt(sum(x * x for x in row))
        e = torch.tensor([x / long for x in row], dtype=torch.float64)
        v = (part.v.weight @ e).tolist()
        if form.attention:
            rms = math.sqrt(sum(x * x for x in before) / len(before) + eps)
            normed = torch.tensor([x / rms for x in before], dtype=torch.float64) * part.input_layernorm.weight
            q, key = (part.q.weight @ normed).tolist(), (part.k.weight @ e).tolist()
            for i in range(heads):
                own = range(i * size, (i + 1) * size)
                s = sum(q[d] * key[d] for d in own)
                if form.similarity == "cosine":
                    s /= math.sqrt(sum(q[d] ** 2 for d in own)) * math.sqrt(sum(key[d] ** 2 for d in own))
                else:
                    s /= math.sqrt(size)
                for d in own:
                    v[d] *= s
        h = [x + y / (1 + math.exp(-y)) for x, y in zip(before, v, strict=True)]
    return base.lm_head(head.blocks[len(drafted) - 1](torch.tensor(h, dtype=torch.float64))).tolist()


def documents_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, first, behind the last) of every document."""
    found = []
    for b, row in enumerate(batch.documents_BT.tolist()):
        for d in sorted({d for d in row if d >= 0}):
            found.append((b, row.index(d), len(row) - row[::-1].index(d)))
    return found


@every_form
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_metrics_equal_the_loops(base: BaseLM, make_batch: MakeBatch, seed: int, form: dict[str, Any]) -> None:
    exact = base.in_float64()
    head, batch = stirred(exact, decay=0.7, **form), make_batch(seed, rows=3)
    said = forced(exact, head, batch).argmax(-1)
    for b, first, behind in documents_of(batch):  # some of the head's own words, so that hits and runs occur
        for t in range(first, behind - 2, 2):
            batch.tokens_BT[b, t + 2] = said[0, b, t]
    total, right, n, loss = 0.0, [0] * 4, [0] * 4, [0.0] * 4
    runs = 0
    for b, first, behind in documents_of(batch):
        ids = batch.tokens_BT[b, first:behind].tolist()
        learned = batch.mask_BT[b, first:behind].tolist()
        starts = slow_starts(exact, head, ids)
        for t in range(len(ids)):
            in_a_row = True
            for k in range(1, 4):
                if t + 1 + k >= len(ids) or not learned[t + 1 + k]:
                    in_a_row = False
                    continue
                logits = slow_logits(exact, head, starts[t], ids[t + 1 : t + 1 + k])
                top = max(logits)
                own = top + math.log(sum(math.exp(z - top) for z in logits)) - logits[ids[t + 1 + k]]
                total, loss[k], n[k] = total + 0.7**k * own, loss[k] + own, n[k] + 1
                hit = logits.index(top) == ids[t + 1 + k]
                right[k] += hit
                in_a_row = in_a_row and hit
                runs += in_a_row
    out = head.loss(exact, see(exact, head, batch), batch)
    assert out.sum.item() == pytest.approx(total, rel=1e-10)
    want = {f"loss/{k}": (loss[k], n[k]) for k in range(1, 4)} | {f"top1/{k}": (right[k], n[k]) for k in range(1, 4)}
    want["tokens_per_step"] = (n[1] + runs, n[1])
    assert out.metrics.keys() == want.keys()
    for name, pair in out.metrics.items():
        assert [v.item() for v in pair] == pytest.approx(want[name], rel=1e-10), name
    assert 0 < runs < sum(n)
    assert int(out.count) == int(batch.counts_K[2])


@pytest.mark.parametrize("form", [f for f in FORMS if f.get("augment", True)], ids=str)
def test_11_4_an_idle_block_and_idle_connections_are_the_base(
    base: BaseLM, make_batch: MakeBatch, form: dict[str, Any]
) -> None:
    """§11.4: zero output projections leave f_t, V = 0 leaves h_0, zero residual blocks leave the base's logits."""
    head, batch = fresh(base, **form), make_batch()
    said = forced(base, head, batch)
    assert all(torch.equal(said[k], said[0]) for k in (1, 2))
    with torch.no_grad():
        head.layer.self_attn.o_proj.weight.zero_()
        head.layer.mlp.down_proj.weight.zero_()
    final = base.final_norm(see(base, head, batch).hidden[base.spec.num_layers])
    want = torch.nn.functional.linear(final, base.lm_head_weight)
    assert not torch.equal(said[0], want)
    assert all(torch.equal(own, want) for own in forced(base, head, batch))
    assert torch.equal(forced(base, fresh(base, augment=False), batch)[2], want)


def test_11_4_zero_values_pass_every_state_on(base: BaseLM) -> None:
    head = stirred(base)
    with torch.no_grad():
        for part in head.connections:
            part.v.weight.zero_()
    h = torch.randn(5, 1, 16)
    for k in (1, 2, 3):
        _, after = head(base, k, h, torch.arange(5)[:, None])
        assert torch.equal(after, h)


def test_it_starts_from_the_base(base: BaseLM) -> None:
    """The block is a copy of the last one; Q and K the identity and little else."""
    head = fresh(base)
    own = dict(head.layer.named_parameters())
    assert all(torch.equal(own[name], w) for name, w in base.block_weights(base.spec.num_layers - 1).items())
    for part in head.connections:
        for linear in (part.q, part.k):
            away = linear.weight.detach() - torch.eye(16)
            assert 0.005 < away.std().item() < 0.02
    other = dataclasses.replace(base.spec, llama_blocks=False)
    strange = Clover(CloverConfig(), other)
    before = [p.clone() for p in strange.layer.parameters()]
    strange.initialise(base)
    assert all(torch.equal(a, b) for a, b in zip(before, strange.layer.parameters(), strict=True))


@every_form
def test_11_12_and_13_a_head_hears_what_is_drafted_and_no_more(base: BaseLM, form: dict[str, Any]) -> None:
    """§11.12, 13: head k at t reads x_{t+1..t+k} beside the past, never its target x_{t+1+k} nor what follows."""
    exact, t = base.in_float64(), 4
    head = stirred(exact, **form)
    tokens = torch.randint(40, (1, 14), generator=torch.Generator().manual_seed(2))
    whole = Batch(tokens, torch.arange(14)[None], torch.zeros_like(tokens), tokens >= 0, torch.zeros(1))
    before = forced(exact, head, whole)[:, 0, t]
    for ahead in range(1, 8):
        changed = tokens.clone()
        changed[0, t + ahead] = (changed[0, t + ahead] + 7) % 40
        after = forced(exact, head, dataclasses.replace(whole, tokens_BT=changed))[:, 0, t]
        heard = [not torch.equal(after[k - 1], before[k - 1]) for k in (1, 2, 3)]
        assert heard == [(ahead <= k if head.config.regressive else ahead == 1) for k in (1, 2, 3)]


def test_11_13_documents_do_not_hear_each_other(base: BaseLM, make_batch: MakeBatch) -> None:
    head, batch = stirred(base), make_batch(rows=1)
    before, documents = forced(base, head, batch), batch.documents_BT[0].tolist()
    for changed in range(20):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, changed] = (tokens_BT[0, changed] + 1) % 40
        after = forced(base, head, dataclasses.replace(batch, tokens_BT=tokens_BT))
        moved = [t for t in range(20) if not torch.equal(after[:, 0, t], before[:, 0, t])]
        assert all(documents[t] == documents[changed] for t in moved)


@pytest.mark.parametrize("what", ["all masked", "all padding", "one token each"])
def test_11_14_and_15_nothing_counted_is_zero(base: BaseLM, make_batch: MakeBatch, what: str) -> None:
    batch = make_batch()
    if what == "all masked":
        batch.mask_BT.zero_()
    else:
        batch.documents_BT[:] = -1 if what == "all padding" else torch.arange(20)
    batch.counts_K.zero_()
    head = stirred(base)
    out = head.loss(base, see(base, head, batch), batch)
    assert out.sum.item() == 0
    (out.sum / out.count.clamp(min=1)).backward()
    assert not any(p.grad.any() for p in head.parameters() if p.grad is not None)
    assert all(v.isfinite() for pair in out.metrics.values() for v in pair)


@every_form
def test_11_33_every_parameter_learns_and_the_base_does_not(
    base: BaseLM, make_batch: MakeBatch, form: dict[str, Any]
) -> None:
    head, batch, before = stirred(base, **form), make_batch(), base.weights_sha256()
    head.loss(base, see(base, head, batch), batch).sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert base.weights_sha256() == before


def test_11_38_overfits_one_batch(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.38: to the floor of hard targets, 0, through an lm_head whose rows are long enough for certain logits."""
    loud = BaseLM(base.in_float64().model.float())
    loud.lm_head_weight.mul_(8)
    head, batch = fresh(loud), make_batch(rows=1, length=16)
    seen = see(loud, head, batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(100):
        out = head.loss(loud, seen, batch, measure=False)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        losses.append(out.sum.item() / int(out.count))
    assert losses[0] > 1
    assert losses[-1] < 5e-3
    metrics = head.loss(loud, seen, batch).metrics
    assert all(metrics[f"top1/{k}"][0] == metrics[f"top1/{k}"][1] > 0 for k in (1, 2, 3))


def random_tree(rng: random.Random, depth: int) -> TreeShape:
    paths: list[tuple[int, ...]] = []
    for _ in range(rng.randrange(1, 16)):
        above = rng.choice([(), *paths])
        ranks = [rank for rank in range(4) if (*above, rank) not in paths]
        if ranks and len(above) < depth:
            paths.append((*above, rng.choice(ranks)))
    return tree.from_paths(paths)


@every_form
@pytest.mark.parametrize("seed", range(4))
def test_propose_equals_the_walk_over_nodes(base: BaseLM, form: dict[str, Any], seed: int) -> None:
    """Several steps of one text, each a tree of its own: the block's K/V of new positions alone against a run over
    the whole text, and every node against the tokens above it."""
    exact, rng = base.in_float64(), random.Random(seed)
    head = stirred(exact, **form)
    text = [rng.randrange(40) for _ in range(16)]
    seen = exact.capture(head.needs, torch.tensor([text]).expand(2, -1))
    before, head_kv = 0, None
    for n in (5, 6, 9, 13):
        shape = random_tree(rng, 3)
        state = State(text[:n], text[n - 1], seen.at(torch.arange(before, n - 1)), shape, None, head_kv)
        proposal = head.propose(exact, state)
        before, head_kv = n - 1, state.head_kv
        assert head_kv is None if not head.config.augment else head_kv.length == n - 1
        start_D = slow_starts(exact, head, text[: n - 1])[-1]
        paths = [[text[n - 1]]]
        for parent, rank in zip(shape.parents_N.tolist()[1:], shape.ranks_N.tolist()[1:], strict=True):
            logits = slow_logits(exact, head, start_D, paths[parent])
            paths.append([*paths[parent], sorted(range(40), key=lambda v: -logits[v])[rank]])
        assert proposal.tokens_N.tolist() == [path[-1] for path in paths]
        assert torch.equal(proposal.parents_N, shape.parents_N)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of autocast: only slower
def test_a_bf16_base_under_fp32_heads(base: BaseLM, make_batch: MakeBatch) -> None:
    """Trained and decoded without autocast, fp32 weights read the base's bf16 states."""
    low = BaseLM(base.in_float64().model.bfloat16())
    head = Clover(CloverConfig(), low.spec)
    head.initialise(low)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    batch = make_batch()
    out = head.loss(low, see(low, head, batch), batch)
    out.sum.backward()
    assert out.sum.isfinite()
    seen = low.capture(head.needs, torch.tensor([[1, 5]]))
    assert len(head.propose(low, State([1, 5, 2], 2, seen, tree.chain(3))).tokens_N) == 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.loss(low, see(low, head, batch), batch).sum.isfinite()


SPEC_7B = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)
BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096


def test_11_35_parameter_counts() -> None:
    """§11.35, on the meta device. The paper's 0.2 B is the augmenting block; three heads of their own are as much."""
    each = 4 * 4096**2 + 2 * 4096  # Q, K, V, the residual block; its bias, the norm
    for settings, want in (
        ({}, 403_734_528),
        ({"augment": False}, 403_734_528 - BLOCK),
        ({"attention": False}, 403_734_528 - 3 * (2 * 4096**2 + 4096)),
        ({"num_heads": 5}, 403_734_528 + 2 * each),
    ):
        with torch.device("meta"):
            head = Clover(CloverConfig(**settings), SPEC_7B)
        assert sum(p.numel() for p in head.parameters()) == want
    assert (BLOCK, BLOCK + 3 * each) == (202_383_360, 403_734_528)


def test_11_34_heads_are_distinct(base: BaseLM) -> None:
    parts = [m for m in fresh(base).modules() if isinstance(m, Connection)]
    assert len({p.data_ptr() for m in parts for p in m.parameters()}) == 3 * 4


def test_what_it_declares(base: BaseLM) -> None:
    head = fresh(base, num_heads=4)
    assert (head.max_depth, head.horizon, head.role, head.lossy) == (4, 5, "drafter", False)
    assert head.needs.hidden == {base.spec.num_layers}
    assert not head.needs.final
    assert not head.needs.logits


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"num_heads": 0}, "num_heads=0"), ({"decay": 0.0}, "decay=0"), ({"similarity": "sine"}, "similarity='sine'")],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CloverConfig(**settings)


def test_a_base_whose_heads_do_not_divide_its_size_is_refused(base: BaseLM) -> None:
    with pytest.raises(ConfigError, match="hidden size 16 does not divide into 3 heads"):
        Clover(CloverConfig(), dataclasses.replace(base.spec, num_heads=3))
