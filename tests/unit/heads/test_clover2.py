"""Clover-2 against the sums of its paper and code, spelled out as loops."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import BaseSpec, Batch, Capture
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError
from draftsmith.growth import TreeShape
from draftsmith.heads.blocks import DecoderLayer
from draftsmith.heads.clover2 import AttentionDecoder, Clover2, Clover2Config
from draftsmith.losses import feature_distance
from draftsmith.roles import State
from draftsmith.targets import future_tokens

MakeBatch = Callable[..., Batch]
K = 5


def fresh(base: BaseLM, **settings: Any) -> Clover2:
    """As before training."""
    torch.manual_seed(1)
    head = Clover2(Clover2Config(**settings), base.spec).to(base.dtype)
    head.initialise(base)
    return head


def stirred(base: BaseLM, **settings: Any) -> Clover2:
    """With random weights everywhere, so that nothing is hidden by an identity."""
    head = fresh(base, **settings)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head


def see(base: BaseLM, head: Clover2, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def long_rows(make_batch: MakeBatch, seed: int = 0, rows: int = 2) -> Batch:
    """Rows of two documents, one of them long enough for every depth, and padding."""
    batch = make_batch(seed, horizon=K + 1, rows=rows, length=18)
    batch.documents_BT[:] = torch.tensor([0] * 11 + [1] * 5 + [-1] * 2)
    batch.positions_BT[:] = torch.tensor([*range(11), *range(5), 0, 0])
    batch.mask_BT[:, 16:] = False
    batch.counts_K[2] = sum(int(batch.mask_BT[:, a + 2 : b].sum()) for a, b in ((0, 11), (11, 16)))
    return batch


DOCUMENTS = ((0, 11), (11, 16))


@torch.no_grad()
def forced(base: BaseLM, head: Clover2, batch: Batch) -> Tensor:
    """logits [K, B, T, V] of every depth after the row's own tokens (garbage where a document has no more)."""
    next_BT, _ = future_tokens(batch.tokens_BT, batch.documents_BT, 1)
    hidden = see(base, head, batch).hidden[base.spec.num_layers]
    logits, state = head(base, head.read(base, hidden, next_BT, batch.positions_BT, batch.visible()))
    found = [logits]
    for i in range(1, head.max_depth):
        logits, state = head(base, state, future_tokens(batch.tokens_BT, batch.documents_BT, i + 1)[0])
        found.append(logits)
    return torch.stack(found)


def slow_norm(norm: nn.RMSNorm, x: list[float]) -> Tensor:
    rms = math.sqrt(sum(v * v for v in x) / len(x) + norm.eps)
    return torch.tensor([v / rms for v in x], dtype=torch.float64) * norm.weight


def slow_decoder(part: AttentionDecoder, x_D: Tensor, e_D: Tensor) -> Tensor:
    q = (part.q.weight @ slow_norm(part.input_layernorm, x_D.tolist()) + part.q.bias).tolist()
    k, v = ((linear.weight @ e_D + linear.bias).tolist() for linear in (part.k, part.v))
    out, size = x_D.tolist(), len(x_D) // part.heads
    for i in range(part.heads):
        own = range(i * size, (i + 1) * size)
        long = math.sqrt(sum(q[d] ** 2 for d in own)) * math.sqrt(sum(k[d] ** 2 for d in own))
        a = sum(q[d] * k[d] for d in own) / long
        for d in own:
            out[d] += a * v[d]
    return torch.tensor(out, dtype=torch.float64)


@torch.no_grad()
def slow_states(base: BaseLM, head: Clover2, ids: list[int]) -> Tensor:
    """g_0 [T - 1, D] of a text that stands alone: the last token is nobody's past."""
    hidden = base.capture(head.needs, torch.tensor([ids])).hidden[base.spec.num_layers][0]
    pairs = zip(hidden, base.lm_head_weight[torch.tensor(ids[1:])], strict=False)
    x = torch.stack([slow_decoder(head.advance, h, e) for h, e in pairs])[None]
    for layer in head.layers:
        x = layer(x, torch.arange(len(ids) - 1)[None])
    return torch.stack([slow_norm(head.norm, row) for row in x[0].tolist()])


@torch.no_grad()
def slow_out(base: BaseLM, head: Clover2, state_D: Tensor, drafted: list[int]) -> Tensor:
    """o_i after i = len(drafted) drafted tokens."""
    if not drafted:
        return slow_norm(head.head_norm, (head.first.weight @ state_D + head.first.bias).tolist())
    for token in drafted:
        e = base.lm_head_weight[token]
        state_D = slow_decoder(head.regress, state_D, e)
    mixed = head.later.weight[:, :16] @ state_D + head.later.weight[:, 16:] @ e + head.later.bias
    return slow_norm(head.head_norm, mixed.tolist())


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    lse = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - lse for z in logits]


@pytest.mark.parametrize(("seed", "top_k"), [(0, None), (1, None), (2, 3)])
def test_loss_and_metrics_equal_the_loops(base: BaseLM, make_batch: MakeBatch, seed: int, top_k: int | None) -> None:
    exact = base.in_float64()
    head, batch = stirred(exact, teacher_top_k=top_k, feature_weight=3.0, label_weight=2.0), long_rows(make_batch, seed)
    said = forced(exact, head, batch).argmax(-1)
    for b in range(2):  # some of the head's own words, so that hits and runs occur
        for t in (0, 2, 4, 11):
            batch.tokens_BT[b, t + 2] = said[0, b, t]
    want: dict[str, list[float]] = {}
    total = floor = runs = 0.0
    for b in range(2):
        for first, behind in DOCUMENTS:
            ids = batch.tokens_BT[b, first:behind].tolist()
            final = exact.capture(head.needs, torch.tensor([ids])).final[0]
            states = slow_states(exact, head, ids)
            for t in range(len(ids) - 1):
                in_a_row = True
                for i in range(K):
                    target = t + 2 + i
                    if target >= len(ids) or not batch.mask_BT[b, first + target]:
                        in_a_row = False
                        continue
                    out, teacher = slow_out(exact, head, states[t], ids[t + 2 : target]), final[t + 1 + i]
                    log_q = log_softmax(exact.lm_head(out).tolist())
                    p = [math.exp(z) for z in log_softmax(exact.lm_head(teacher).tolist())]
                    if top_k:
                        kept = sorted(p, reverse=True)[:top_k]
                        p = [x / sum(kept) if x in kept else 0.0 for x in p]
                    aways = [abs(x - y) for x, y in zip(out.tolist(), teacher.tolist(), strict=True)]
                    smooth = sum(0.5 * d * d if d < 1 else d - 0.5 for d in aways) / len(aways)
                    own = 3 * smooth - 2 * sum(x * z for x, z in zip(p, log_q, strict=True))
                    hit = log_q.index(max(log_q)) == ids[target]
                    in_a_row = in_a_row and hit
                    total, runs = total + 0.7**i * own, runs + in_a_row
                    floor -= 0.7**i * 2 * sum(x * math.log(x) for x in p if x)
                    overlap = sum(min(x, math.exp(z)) for x, z in zip(p, log_q, strict=True))
                    for name, value in (("loss", own), ("top1", hit), ("overlap", overlap)):
                        pair = want.setdefault(f"{name}/{i + 1}", [0.0, 0])
                        want[f"{name}/{i + 1}"] = [pair[0] + value, pair[1] + 1]
    n = want["loss/1"][1]
    want |= {"floor": [floor, n], "tokens_per_step": [n + runs, n]}
    out = head.loss(exact, see(exact, head, batch), batch)
    assert out.sum.item() == pytest.approx(total, rel=1e-10)
    assert out.metrics.keys() == want.keys()
    for name, pair in out.metrics.items():
        assert [v.item() for v in pair] == pytest.approx(want[name], rel=1e-9), name
    assert runs > 0
    assert 0 < floor < total
    assert int(out.count) == int(batch.counts_K[2]) == n


def test_11_21_weights_of_the_depths() -> None:
    """§11.21: sum over i < 5 of 0.7^i."""
    assert Clover2Config().weights == pytest.approx([1, 0.7, 0.49, 0.343, 0.2401])
    assert sum(Clover2Config().weights) == pytest.approx(2.7731)


def test_11_22_smooth_l1() -> None:
    """§11.22: 0 at the target, δ²/2 a small way off, δ - 1/2 far off; averaged over D, summed over positions."""
    final = torch.randn(3, 16, dtype=torch.float64)
    assert feature_distance(final, final).item() == 0
    assert feature_distance(final + 0.2, final).item() == pytest.approx(3 * 0.02)
    assert feature_distance(final - 4, final).item() == pytest.approx(3 * 3.5)
    assert feature_distance(final.bfloat16(), final.bfloat16()).dtype == torch.float32


def test_11_16_imitation_is_the_floor(base: BaseLM, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """§11.16, 22: students that are the base's own states cost its entropy and nothing else."""
    exact = base.in_float64()
    head, batch = stirred(exact), long_rows(make_batch)
    seen = see(exact, head, batch)
    monkeypatch.setattr(
        head, "students", lambda base, seen, batch, taught: seen.final.flatten(0, 1)[taught.rows_N].expand(K, -1, -1)
    )
    out = head.loss(exact, seen, batch)
    assert out.sum.item() == pytest.approx(out.metrics["floor"][0].item(), rel=1e-12)
    for k in range(1, K + 1):
        assert out.metrics[f"overlap/{k}"][0].item() == pytest.approx(out.metrics[f"overlap/{k}"][1].item())


def test_it_starts_from_the_base(base: BaseLM) -> None:
    head, weights = fresh(base), base.block_weights(base.spec.num_layers - 1)
    for layer in head.layers:
        assert all(torch.equal(p, weights[name]) for name, p in layer.named_parameters())
    norm = base.paths.norm
    final = base.model.get_submodule(norm).weight
    assert not torch.equal(final, torch.ones_like(final))
    assert torch.equal(head.norm.weight, final)
    assert torch.equal(head.head_norm.weight, final)
    for linear, identity in (
        *((part, True) for decoder in (head.advance, head.regress) for part in (decoder.q, decoder.k)),
        *((decoder.v, False) for decoder in (head.advance, head.regress)),
        (head.first, True),
        (head.later, True),
    ):
        away = linear.weight.detach() - (torch.eye(*linear.weight.shape) if identity else 0)
        assert 0 <= away.min() < 0.002
        assert 0.008 < away.max() <= 0.0101
        assert not linear.bias.any()
    other = replace(base.spec, llama_blocks=False)
    strange = Clover2(Clover2Config(), other)
    before = [p.clone() for p in strange.layers.parameters()]
    strange.initialise(base)
    assert all(torch.equal(a, b) for a, b in zip(before, strange.layers.parameters(), strict=True))
    assert torch.equal(strange.norm.weight, torch.ones(16))


def test_11_12_and_13_a_depth_hears_what_is_drafted_and_no_more(base: BaseLM) -> None:
    """§11.12, 13: depth i at t reads x_{t+1..t+1+i} beside the past, never its target x_{t+2+i} nor what follows."""
    exact, t = base.in_float64(), 3
    head = stirred(exact)
    tokens = torch.randint(40, (1, 14), generator=torch.Generator().manual_seed(2))
    whole = Batch(tokens, torch.arange(14)[None], torch.zeros_like(tokens), tokens >= 0, torch.zeros(1))
    before = forced(exact, head, whole)[:, 0, t]
    for ahead in range(1, 10):
        changed = tokens.clone()
        changed[0, t + ahead] = (changed[0, t + ahead] + 7) % 40
        after = forced(exact, head, replace(whole, tokens_BT=changed))[:, 0, t]
        assert [not torch.equal(after[i], before[i]) for i in range(K)] == [ahead <= i + 1 for i in range(K)]


def test_11_13_documents_do_not_hear_each_other(base: BaseLM, make_batch: MakeBatch) -> None:
    head, batch = stirred(base), long_rows(make_batch, rows=1)
    before, documents = forced(base, head, batch), batch.documents_BT[0].tolist()
    for changed in range(18):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, changed] = (tokens_BT[0, changed] + 1) % 40
        after = forced(base, head, replace(batch, tokens_BT=tokens_BT))
        moved = [t for t in range(18) if not torch.equal(after[:, 0, t], before[:, 0, t])]
        assert all(documents[t] == documents[changed] for t in moved)


@pytest.mark.parametrize("what", ["all masked", "all padding", "one token each"])
def test_11_14_and_15_nothing_counted_is_zero(base: BaseLM, make_batch: MakeBatch, what: str) -> None:
    batch = make_batch(horizon=K + 1)
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


@pytest.mark.parametrize("weights", [(10.0, 1.0), (0.0, 1.0), (10.0, 0.0)])
def test_11_33_every_parameter_learns_and_the_base_does_not(
    base: BaseLM, make_batch: MakeBatch, weights: tuple[float, float]
) -> None:
    head, before = stirred(base, feature_weight=weights[0], label_weight=weights[1]), base.weights_sha256()
    batch = long_rows(make_batch)
    head.loss(base, see(base, head, batch), batch).sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert base.weights_sha256() == before


def test_11_38_falls_to_its_floor(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.38: one batch is imitated, state and distribution, until little but the base's entropy is left."""
    head, batch = fresh(base), long_rows(make_batch, rows=1)
    seen = see(base, head, batch)
    floor = head.loss(base, seen, batch).metrics["floor"][0].item()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 120)
        out = head.loss(base, seen, batch, measure=False)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        losses.append(out.sum.item())
    assert losses[0] - floor > 5 * int(batch.counts_K[2])
    assert 0 < losses[-1] - floor < 0.02 * (losses[0] - floor)


def random_tree(rng: random.Random, depth: int) -> TreeShape:
    paths: list[tuple[int, ...]] = []
    for _ in range(rng.randrange(1, 20)):
        above = rng.choice([(), *paths])
        ranks = [rank for rank in range(4) if (*above, rank) not in paths]
        if ranks and len(above) < depth:
            paths.append((*above, rng.choice(ranks)))
    return tree.from_paths(paths)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_propose_equals_the_walk_over_nodes(base: BaseLM, seed: int, layers: int) -> None:
    """Several steps of one text, each a tree of its own: the blocks' K/V of new positions alone against a run over
    the whole text, and every node against the tokens above it."""
    exact, rng = base.in_float64(), random.Random(seed)
    head = stirred(exact, num_layers=layers)
    text = [rng.randrange(40) for _ in range(16)]
    seen = exact.capture(head.needs, torch.tensor([text]))
    before, head_kv = 0, None
    for n in (5, 6, 9, 13):
        shape = random_tree(rng, K)
        state = State(text[:n], text[n - 1], seen.at(torch.arange(before, n - 1)), shape, None, head_kv)
        proposal = head.propose(exact, state)
        before, head_kv = n - 1, state.head_kv
        assert head_kv.length == n - 1
        state_D = slow_states(exact, head, text[:n])[-1]
        paths: list[list[int]] = [[]]
        for parent, rank in zip(shape.parents_N.tolist()[1:], shape.ranks_N.tolist()[1:], strict=True):
            logits = exact.lm_head(slow_out(exact, head, state_D, paths[parent])).tolist()
            paths.append([*paths[parent], sorted(range(40), key=lambda v: -logits[v])[rank]])
        assert proposal.tokens_N.tolist() == [text[n - 1], *(path[-1] for path in paths[1:])]
        assert torch.equal(proposal.parents_N, shape.parents_N)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of autocast: only slower
def test_a_bf16_base_under_fp32_heads(base: BaseLM, make_batch: MakeBatch) -> None:
    """Trained and decoded without autocast, fp32 weights read the base's bf16 states."""
    low = BaseLM(base.in_float64().model.bfloat16())
    head = Clover2(Clover2Config(), low.spec)
    head.initialise(low)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    batch = long_rows(make_batch)
    out = head.loss(low, see(low, head, batch), batch)
    out.sum.backward()
    assert out.sum.isfinite()
    seen = low.capture(head.needs, torch.tensor([[1, 5]]))
    assert len(head.propose(low, State([1, 5, 2], 2, seen, tree.chain(K))).tokens_N) == K + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.loss(low, see(low, head, batch), batch).sum.isfinite()


def test_11_35_parameter_count() -> None:
    """§11.35: the published 555,810,816 of the 7B, on the meta device: one norm for all depths, biases in Q, K, V, M_1
    and M_2."""
    spec = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)
    with torch.device("meta"):
        head = Clover2(Clover2Config(), spec)
    assert sum(p.numel() for p in head.parameters()) == 555_810_816


def test_11_34_blocks_are_distinct(base: BaseLM) -> None:
    blocks = [m for m in fresh(base, num_layers=3).modules() if isinstance(m, DecoderLayer)]
    assert len(blocks) == 3
    assert len({p.data_ptr() for m in blocks for p in m.parameters()}) == 3 * len(list(blocks[0].parameters()))


def test_what_it_declares(base: BaseLM) -> None:
    head = fresh(base, num_heads=4)
    assert (head.max_depth, head.horizon, head.role, head.lossy) == (4, 5, "drafter", False)
    assert head.needs.hidden == {base.spec.num_layers}
    assert head.needs.final
    assert not head.needs.logits


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_heads": 1}, "num_heads=1"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"decay": 0.0}, "decay=0"),
        ({"feature_weight": -1.0}, "feature_weight=-1"),
        ({"label_weight": -1.0}, "label_weight=-1"),
        ({"feature_weight": 0.0, "label_weight": 0.0}, "both are 0"),
        ({"teacher_top_k": 0}, "teacher_top_k=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Clover2Config(**settings)


def test_a_base_whose_heads_do_not_divide_its_size_is_refused(base: BaseLM) -> None:
    with pytest.raises(ConfigError, match="hidden size 16 does not divide into 3 attention heads"):
        Clover2(Clover2Config(), replace(base.spec, num_heads=3))
