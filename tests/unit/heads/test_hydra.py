"""Hydra and Hydra++ against the paper's sums, spelled out as loops."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import BaseSpec, Batch, Capture
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError
from draftsmith.growth import TreeShape
from draftsmith.heads.blocks import ResBlock
from draftsmith.heads.hydra import FirstBlock, Hydra, HydraConfig
from draftsmith.losses import feature_distance
from draftsmith.roles import State
from draftsmith.targets import Lessons, lessons

MakeBatch = Callable[..., Batch]
K, D, V = 3, 16, 40


def fresh(base: BaseLM, **settings: Any) -> Hydra:
    """As before training, but as it decodes."""
    torch.manual_seed(1)
    head = Hydra(HydraConfig(**{"num_heads": K, **settings}), base.spec).to(base.dtype)
    head.initialise(base)
    return head.eval()


def stirred(base: BaseLM, **settings: Any) -> Hydra:
    """With random weights everywhere, so that nothing is hidden by a zero."""
    head = fresh(base, **settings)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return head


def see(base: BaseLM, head: Hydra, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def one_document(tokens: Tensor, mask: Tensor | None = None) -> Batch:
    """A single row without packing."""
    tokens_BT = tokens[None]
    learned = torch.ones_like(tokens_BT) if mask is None else mask[None]
    counts = torch.full((K + 3,), int(learned.sum()))
    return Batch(tokens_BT, torch.arange(len(tokens))[None], torch.zeros_like(tokens_BT), learned.bool(), counts)


def logits_at(head: Hydra, base: BaseLM, context_D: Tensor, tokens: list[int]) -> Tensor:
    """What the head says after these drafted tokens, the root first."""
    logits_AV, _ = head(base, context_D[None], base.embed(torch.tensor([tokens])))
    return logits_AV[0]


def taught(head: Hydra, batch: Batch) -> Lessons:
    return lessons(batch.tokens_BT, batch.mask_BT, batch.documents_BT, range(1, head.config.num_heads + 1))


def learned_at(head: Hydra, base: BaseLM, batch: Batch) -> list[dict[int, tuple[int, Tensor]]]:
    """Of each head: position in the flattened batch -> (target, hidden state)."""
    with torch.no_grad():
        found = head.learnings(base, see(base, head, batch).final, batch, taught(head, batch))
    return [dict(zip(x.at_M.tolist(), zip(x.target_M.tolist(), x.hidden_MD, strict=True), strict=True)) for x in found]


# Start, targets, leakage


@pytest.mark.parametrize("layers", [1, 3])
def test_11_3_identity_residual_gives_the_base_whatever_was_drafted(base: BaseLM, layers: int) -> None:
    """§11.3: R = [I|0…], W = 0, biases 0 and a copied lm_head give the base's logits, bit for bit."""
    head, final_AD = fresh(base, num_layers=layers), torch.randn(5, D)
    with torch.no_grad():
        for block in head.modules():
            if isinstance(block, FirstBlock):
                block.residual.weight.copy_(torch.eye(D, block.residual.in_features))
    want = F.linear(final_AD, base.lm_head_weight, base.lm_head_bias)
    for k in range(1, K + 1):
        for seed in (0, 1):
            drafted = base.embed(torch.randint(V, (5, k), generator=torch.Generator().manual_seed(seed)))
            assert torch.equal(head(base, final_AD, drafted)[0], want)


def test_starts_with_zero_maps_and_the_base_lm_head(base: BaseLM) -> None:
    head = fresh(base, num_layers=2, prefix_layer=True)
    zero = {n for n, p in head.named_parameters() if not p.any()}
    blocks = {f"blocks.{k}.{j}.linear.{w}" for k in range(K) for j in range(2) for w in ("weight", "bias")}
    biases = {f"blocks.{k}.0.residual.bias" for k in range(K)} | {f"lm_heads.{k}.bias" for k in range(K)}
    assert zero == blocks | biases
    assert all(torch.equal(lm_head.weight, base.lm_head_weight) for lm_head in head.lm_heads)


def test_starts_from_the_bias_of_a_base_that_has_one(base: BaseLM) -> None:
    other = BaseLM(base.in_float64().model.float())
    other._head.bias = torch.nn.Parameter(torch.randn(V), requires_grad=False)
    assert all(torch.equal(lm_head.bias, other.lm_head_bias) for lm_head in fresh(other).lm_heads)


@pytest.mark.parametrize("settings", [{}, {"lm_weight": 0.0, "teacher_weight": 1.0}])
def test_11_12_targets_of_a_counting_text(base: BaseLM, settings: dict[str, Any]) -> None:
    """§11.12: where x_t = t, head k learns t + 1 + k at t, from the distribution at t + k."""
    head, batch = stirred(base, **settings), one_document(torch.arange(12))
    found = head.learnings(base, see(base, head, batch).final, batch, taught(head, batch))
    for k, own in enumerate(found, start=1):
        assert own.at_M.tolist() == list(range(12 - 1 - k))
        assert own.target_M.tolist() == [t + 1 + k for t in range(12 - 1 - k)]
        assert taught(head, batch).rows_N[own.rows_M].tolist() == [t + k for t in range(12 - 1 - k)]


@pytest.mark.parametrize("prefix", [False, True])
def test_11_13_reads_what_is_drafted_and_no_further(base: BaseLM, prefix: bool) -> None:
    """§11.13: head k at t moves with x_{t+k} and not with its target x_{t+1+k}, nor with what comes after."""
    head, tokens, t = stirred(base, prefix_layer=prefix), torch.randint(V, (12,)), 4
    before = learned_at(head, base, one_document(tokens))
    for changed in range(12):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % V
        after = learned_at(head, base, one_document(other))
        for k in range(1, K + 1):
            same = torch.equal(before[k - 1][t][1], after[k - 1][t][1])
            assert same == (changed > t + k), (changed, k)


def test_11_13_other_documents_are_not_seen(base: BaseLM, make_batch: MakeBatch) -> None:
    head, batch = stirred(base, prefix_layer=True), make_batch(rows=1)
    before, documents = learned_at(head, base, batch), batch.documents_BT[0].tolist()
    for changed in range(20):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, changed] = (tokens_BT[0, changed] + 1) % V
        after = learned_at(head, base, dataclasses.replace(batch, tokens_BT=tokens_BT))
        for k in range(K):
            for t, (_, hidden_D) in before[k].items():
                seen = documents[t] == documents[changed] and changed <= t + 1 + k
                assert torch.equal(after[k][t][1], hidden_D) == (not seen)


# The loss

TERMS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "prefix_layer": True, "lm_weight": 0.0, "teacher_weight": 1.0},
    {"lm_weight": 0.0, "reconstruction_weight": 1.0},
    {"num_layers": 2, "lm_weight": 0.3, "teacher_weight": 0.7, "reconstruction_weight": 1.9, "teacher_top_k": 5},
    {"prefix_layer": True, "lm_weight": 1.3, "teacher_weight": 0.4, "reconstruction_weight": 0.2, "dropout": 0.5},
]
every_loss = pytest.mark.parametrize("settings", TERMS, ids=range(len(TERMS)))


def slow_logits(head: Hydra, k: int, context_D: Tensor, drafted: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(h_k, logits) with the parameters taken by name."""
    p = head.state_dict()
    u = torch.cat([context_D, *drafted])
    first = f"blocks.{k - 1}.0"
    pre = p[f"{first}.linear.weight"] @ u + p[f"{first}.linear.bias"]
    h = p[f"{first}.residual.weight"] @ u + p[f"{first}.residual.bias"] + pre * torch.sigmoid(pre)
    for j in range(1, head.config.num_layers):
        pre = p[f"blocks.{k - 1}.{j}.linear.weight"] @ h + p[f"blocks.{k - 1}.{j}.linear.bias"]
        h = h + pre * torch.sigmoid(pre)
    return h, p[f"lm_heads.{k - 1}.weight"] @ h + p[f"lm_heads.{k - 1}.bias"]


def slow_contexts(head: Hydra, final_BTD: Tensor, batch: Batch) -> Tensor:
    """f_t, or the prefix layer run over every document by itself."""
    if head.prefix is None:
        return final_BTD
    context_BTD = torch.zeros_like(final_BTD)
    for b, documents in enumerate(batch.documents_BT):
        for document in range(int(documents.max()) + 1):
            at = (documents == document).nonzero()[:, 0]
            context_BTD[b, at] = head.prefix(final_BTD[b : b + 1, at], torch.arange(len(at))[None])[0].detach()
    return context_BTD


def smooth_l1(a: list[float], b: list[float]) -> float:
    away = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in away) / len(away)


def slow_teacher(head: Hydra, base: BaseLM, final_D: Tensor) -> list[float]:
    z = base.lm_head(final_D).tolist()
    kept = sorted(range(V), key=lambda v: -z[v])[: head.config.teacher_top_k]
    total = sum(math.exp(z[v]) for v in kept)
    return [math.exp(z[v]) / total if v in kept else 0.0 for v in range(V)]


def slow_loss(head: Hydra, base: BaseLM, final_BTD: Tensor, batch: Batch) -> dict[str, tuple[float, int]]:
    """Loops over positions: every metric as (numerator, denominator), `sum` among them."""
    c, (rows, length) = head.config, batch.tokens_BT.shape
    context_BTD, embedded_BTD = slow_contexts(head, final_BTD, batch), base.embed(batch.tokens_BT)
    loss, overlap, right, n = [0.0] * K, [0.0] * K, [0] * K, [0] * K
    floor, runs = 0.0, 0
    for b in range(rows):
        for t in range(length):
            in_a_row = True
            for k in range(1, K + 1):
                then = t + 1 + k
                document = int(batch.documents_BT[b, t])
                if then >= length or document < 0 or document != batch.documents_BT[b, then]:
                    break
                if not batch.mask_BT[b, then]:
                    in_a_row = False
                    continue
                h, logits = slow_logits(head, k, context_BTD[b, t], [embedded_BTD[b, t + i] for i in range(1, k + 1)])
                z = logits.tolist()
                lse = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
                p = slow_teacher(head, base, final_BTD[b, t + k])
                target = int(batch.tokens_BT[b, then])
                loss[k - 1] += c.lm_weight * (lse - z[target])
                loss[k - 1] += c.teacher_weight * sum(x * (lse - y) for x, y in zip(p, z, strict=True))
                loss[k - 1] += c.reconstruction_weight * smooth_l1(h.tolist(), final_BTD[b, t + k].tolist())
                floor -= c.teacher_weight * sum(x * math.log(x) for x in p if x)
                overlap[k - 1] += sum(min(x, math.exp(y - lse)) for x, y in zip(p, z, strict=True))
                n[k - 1] += 1
                hit = z.index(max(z)) == target
                right[k - 1] += hit
                in_a_row = in_a_row and hit
                runs += in_a_row
    found = {"sum": (sum(loss), 1), "tokens_per_step": (n[0] + runs, n[0])}
    for k in range(K):
        found |= {f"loss/{k + 1}": (loss[k], n[k]), f"top1/{k + 1}": (right[k], n[k])}
        found |= {f"overlap/{k + 1}": (overlap[k], n[k])} if c.teacher_weight else {}
    return found | ({"floor": (floor, n[0])} if c.teacher_weight else {})


@pytest.mark.parametrize("seed", range(3))
@every_loss
def test_loss_and_metrics_equal_the_loops(
    base: BaseLM, make_batch: MakeBatch, seed: int, settings: dict[str, Any]
) -> None:
    exact = base.in_float64()
    head, batch = stirred(exact, **settings), make_batch(seed, rows=3, length=24)
    for _ in range(3):  # half of the learned tokens what the head would say, so that runs of hits occur
        for k, found in enumerate(learned_at(head, exact, batch)):
            lm_head: Any = head.lm_heads[k]
            for at, (_, hidden_D) in found.items():
                if at % 3 == 0:
                    batch.tokens_BT.view(-1)[at + 2 + k] = lm_head(hidden_D).argmax()
    seen = see(exact, head, batch)
    out, want = head.loss(exact, seen, batch), slow_loss(head, exact, seen.final, batch)
    got = {"sum": (out.sum.detach(), torch.tensor(1)), **out.metrics}
    assert got.keys() == want.keys()
    for name, (value, weight) in got.items():
        assert value.item() == pytest.approx(want[name][0], rel=1e-9), name
        assert weight.item() == want[name][1], name
    assert want["tokens_per_step"][0] > 1.1 * want["tokens_per_step"][1]
    assert int(out.count) == int(batch.counts_K[2])
    assert out.sum.item() == pytest.approx(sum(out.metrics[f"loss/{k + 1}"][0].item() for k in range(K)), rel=1e-12)


@every_loss
@pytest.mark.parametrize("training", [False, True])
def test_measuring_changes_nothing_but_the_metrics(
    base: BaseLM, make_batch: MakeBatch, settings: dict[str, Any], training: bool
) -> None:
    batch, sums, metrics = make_batch(), [], []
    head = stirred(base, noise_alpha=5.0, **settings).train(training)
    for measure in (True, False):
        torch.manual_seed(4)
        out = head.loss(base, see(base, head, batch), batch, measure=measure)
        sums.append(out.sum)
        metrics.append(out.metrics)
    assert torch.equal(*sums)
    assert metrics[1] == {}


@every_loss
@pytest.mark.parametrize("what", ["all masked", "all padding", "one token each"])
def test_11_14_and_15_nothing_counted_is_zero(
    base: BaseLM, make_batch: MakeBatch, what: str, settings: dict[str, Any]
) -> None:
    """§11.14, §11.15: without a target the loss is 0 and so are all gradients, never NaN."""
    batch = make_batch()
    if what == "all masked":
        batch.mask_BT.zero_()
    else:
        batch.documents_BT[:] = -1 if what == "all padding" else torch.arange(20)
    batch.counts_K.zero_()
    head = stirred(base, **settings)
    out = head.loss(base, see(base, head, batch), batch)
    assert out.sum.item() == 0
    (out.sum / out.count.clamp(min=1)).backward()
    assert not any(p.grad is not None and p.grad.any() for p in head.parameters())
    assert all(v.isfinite() for pair in out.metrics.values() for v in pair)


def test_11_16_a_student_that_is_the_base_pays_the_entropy(base: BaseLM) -> None:
    """§11.16: where q = p the teacher's loss is H(p), the floor, and the overlap is 1. A head that hands on E(x_{t+1})
    for head 1 and a base that reads the same state at t + 1 make them equal."""
    head = fresh(base, num_heads=1, lm_weight=0.0, teacher_weight=2.0)
    batch = one_document(torch.arange(9))
    seen = Capture(final=base.embed(batch.tokens_BT))
    with torch.no_grad():
        block: Any = head.blocks[0][0]
        block.residual.weight.copy_(torch.cat([torch.zeros(D, D), torch.eye(D)], 1))
    out = head.loss(base, seen, batch)
    p = base.lm_head(seen.final)[0, 1:8].double().softmax(-1)
    entropy = -(p * p.log()).sum().item()
    assert out.sum.item() == pytest.approx(2 * entropy, rel=1e-5)
    assert out.metrics["floor"][0].item() == pytest.approx(2 * entropy, rel=1e-5)
    assert out.metrics["overlap/1"][0].item() == pytest.approx(7, rel=1e-5)


def test_11_22_smooth_l1_around_zero() -> None:
    """§11.22: 0 where the head's state is f_{t+k}; half the square of a small difference, summed over positions."""
    f_MD = torch.randn(4, D, dtype=torch.float64)
    assert feature_distance(f_MD, f_MD).item() == 0
    assert feature_distance(f_MD + 1e-3, f_MD).item() == pytest.approx(4 * 0.5e-6, rel=1e-6)
    assert feature_distance(f_MD - 3, f_MD).item() == pytest.approx(4 * 2.5, rel=1e-12)
    assert feature_distance(f_MD.bfloat16(), f_MD.bfloat16()).dtype == torch.float32


def test_the_teacher_is_not_pulled_towards_the_head(base: BaseLM, make_batch: MakeBatch) -> None:
    """f_{t+k} as a label has no gradient; as an input of the head it has."""
    head, batch = (
        stirred(base, num_heads=1, teacher_weight=1.0, reconstruction_weight=1.0),
        one_document(torch.arange(9)),
    )
    final = see(base, head, batch).final.clone().requires_grad_()
    head.loss(base, Capture(final=final), batch).sum.backward()
    assert final.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(7))  # t, never the last t + 1


def test_the_bases_logits_never_exist_at_once(
    base: BaseLM, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked for in chunks, and only where some head has a target."""
    asked: list[int] = []
    monkeypatch.setattr("draftsmith.losses.chunk_rows", lambda vocabulary: 4)
    monkeypatch.setattr(base, "lm_head", lambda x: asked.append(len(x)) or BaseLM.lm_head(base, x))
    batch = one_document(torch.arange(20), (torch.arange(20) >= 11).long())
    head = stirred(base, lm_weight=0.0, teacher_weight=1.0)
    head.loss(base, see(base, head, batch), batch)
    assert asked == [4, 4, 1]  # targets 11..19 of head 1, and none of the others' elsewhere


def test_11_33_gradients_stay_in_the_head(base: BaseLM, make_batch: MakeBatch) -> None:
    before = base.weights_sha256()
    for settings in TERMS:
        head, batch = stirred(base, **settings), make_batch(rows=3, length=24)
        head.loss(base, see(base, head, batch), batch).sum.backward()
        missing = [n for n, p in head.named_parameters() if p.grad is None]
        assert missing == []  # zero at worst: processes that train together wait for every one
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert base.weights_sha256() == before


# Dropout and noise


def test_dropout_is_for_training_alone(base: BaseLM) -> None:
    head, context_AD = stirred(base, dropout=0.5, num_layers=2), torch.randn(3, D)
    drafted = base.embed(torch.randint(V, (3, 2)))
    plain, _ = stirred(base, num_layers=2)(base, context_AD, drafted)
    assert torch.equal(head(base, context_AD, drafted)[0], plain)
    head.train()
    one, two = (head(base, context_AD, drafted)[0] for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("prefix", [False, True])
def test_noise_is_neftunes_and_spares_the_prefix(base: BaseLM, make_batch: MakeBatch, prefix: bool) -> None:
    batch = make_batch()
    head = stirred(base, noise_alpha=5.0, prefix_layer=prefix)
    final = see(base, head, batch).final
    calm = head.inputs(base, final, batch)
    assert torch.equal(calm[1], base.embed(batch.tokens_BT))  # decoding: none
    head.train()
    noisy = head.inputs(base, final, batch)
    assert torch.equal(noisy[0], calm[0]) == prefix
    noise = noisy[1] - calm[1]
    if not prefix:
        torch.testing.assert_close(noisy[0] - calm[0], noise, rtol=0, atol=1e-5)
    for b in range(2):
        for document in range(3):
            at = batch.documents_BT[b] == document
            bound = 5 / math.sqrt(int(at.sum()) * D)
            assert 0.8 * bound < float(noise[b, at].abs().max()) <= bound + 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_what_it_drafts_is_free_of_dropout_and_noise(base: BaseLM, make_batch: MakeBatch, training: bool) -> None:
    settings = {"prefix_layer": True, "num_layers": 2}
    batch, calm = make_batch(), stirred(base, **settings)
    head = stirred(base, dropout=0.5, noise_alpha=5.0, **settings).train(training)
    told, want = (h.drafted(base, see(base, h, batch), batch) for h in (head, calm))
    assert all(m.training == training for m in head.modules())
    assert torch.equal(told.tokens_M, want.tokens_M)
    assert torch.equal(told.hidden_MD, want.hidden_MD)


def test_a_single_draft_leaves_nothing_to_stop(base: BaseLM, make_batch: MakeBatch) -> None:
    head, batch = fresh(base, num_heads=1), make_batch()
    with pytest.raises(ConfigError, match="num_heads=1: drafts one token; there is nothing to stop"):
        head.drafted(base, see(base, head, batch), batch)


# Size and parts


def test_11_34_blocks_are_distinct(base: BaseLM) -> None:
    """§11.34: K heads of n layers are K first blocks and K (n - 1) others in memory."""
    head = fresh(base, num_layers=4)
    kinds = [m for m in head.modules() if isinstance(m, FirstBlock | ResBlock)]
    assert len(kinds) == len({m.linear.weight.data_ptr() for m in kinds}) == K * 4
    assert len({m.weight.data_ptr() for m in head.lm_heads} | {base.lm_head_weight.data_ptr()}) == K + 1


SPEC_7B = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)
BLOCK = 4096 * 4096 + 4096
PREFIX = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 3 * 4096


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 994_210_816),  # as published: every map with its bias, lm_head too
        # As published 1,263,723,520 (without the unused embedding, 131,072,000): there each head repeats one block,
        # so that two of its three further blocks are not counted.
        ({"num_layers": 4, "prefix_layer": True}, 1_263_723_520 + 4 * 2 * BLOCK),
    ],
)
def test_11_35_parameter_counts(settings: dict[str, Any], count: int) -> None:
    """§11.35, on the meta device: nothing of that size is ever allocated."""
    with torch.device("meta"):
        head = Hydra(HydraConfig(**settings), SPEC_7B)
    parts = dict.fromkeys(("prefix", "blocks", "lm_heads"), 0)
    for name, p in head.named_parameters():
        assert p.is_meta
        parts[name.partition(".")[0]] += p.numel()
    layers = settings.get("num_layers", 1)
    assert parts["prefix"] == (PREFIX if "prefix_layer" in settings else 0)
    assert parts["blocks"] == sum(2 * ((k + 1) * 4096**2 + 4096) + (layers - 1) * BLOCK for k in (1, 2, 3, 4))
    assert parts["lm_heads"] == 4 * (4096 + 1) * 32000
    assert sum(parts.values()) == count


def test_what_it_declares(base: BaseLM) -> None:
    head = fresh(base, num_heads=4)
    assert (head.max_depth, head.horizon, head.role, head.lossy) == (4, 5, "drafter", False)
    assert head.needs.final
    assert not head.needs.logits
    assert not head.needs.hidden


# Drafting


def random_shape(seed: int) -> TreeShape:
    """Up to three nodes under each of a few parents, K deep at most."""
    g = torch.Generator().manual_seed(seed)
    parents, depths, ranks, above = [-1], [0], [0], [0]
    for depth in range(1, K + 1):
        mine = []
        for parent in above:
            for rank in torch.randperm(5, generator=g)[: int(torch.randint(0, 4, (), generator=g))].tolist():
                mine.append(len(parents))
                parents.append(parent)
                depths.append(depth)
                ranks.append(rank)
        above = mine
    return TreeShape(*(torch.tensor(x) for x in (parents, depths, ranks)))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_propose_equals_node_by_node(base: BaseLM, prefix: bool, seed: int) -> None:
    """Every node by itself: the token of its rank after the path from the root to its parent."""
    exact = base.in_float64()
    head, shape = stirred(exact, prefix_layer=prefix, num_layers=2), random_shape(seed)
    tokens = torch.randint(V, (1, 7), generator=torch.Generator().manual_seed(seed))
    seen = exact.capture(head.needs, tokens)
    proposal = head.propose(exact, State([*tokens[0].tolist(), 9], 9, Capture(final=seen.final), shape))
    context_D = seen.final[0, -1] if head.prefix is None else head.prefix(seen.final, torch.arange(7)[None])[0, -1]
    want, parents = [9], shape.parents_N.tolist()
    for parent, rank in zip(parents[1:], shape.ranks_N.tolist()[1:], strict=True):
        path = [parent]
        while path[0]:
            path.insert(0, parents[path[0]])
        drafted = [exact.embed(torch.tensor([[want[n]]]))[0, 0] for n in path]
        z = slow_logits(head, len(path), context_D, drafted)[1].tolist()
        want.append(sorted(range(V), key=lambda v: -z[v])[rank])
    assert proposal.tokens_N.tolist() == want
    assert torch.equal(proposal.parents_N, shape.parents_N)


def test_the_forward_is_asked_once_per_level(base: BaseLM) -> None:
    head, calls = stirred(base), []
    head.register_forward_hook(lambda module, args, out: calls.append(tuple(out[0].shape)))
    seen = base.capture(head.needs, torch.arange(5)[None])
    head.propose(base, State([0, 1, 2, 3, 4, 9], 9, seen, tree.by_widths([3, 2, 2])))
    assert len(calls) == 3
    assert calls[0] == (1, V)
    assert all(shape[1] == V for shape in calls)


def test_the_prefix_layer_remembers_accepted_positions_only(base: BaseLM) -> None:
    """Fed step by step, with drafts in between, its state is that of the whole text at once."""
    exact = base.in_float64()
    head, shape = stirred(exact, prefix_layer=True), tree.by_widths([3, 2, 1])
    text = torch.randint(V, (1, 15), generator=torch.Generator().manual_seed(2))
    seen = exact.capture(head.needs, text)
    whole_TD = head.prefix(seen.final, torch.arange(15)[None])[0]
    contexts, head_kv, before = [], None, 0
    head.register_forward_hook(lambda module, args, out: contexts.append(args[1][0]))
    for stop in (6, 7, 11, 14):
        state = State(text[0, : stop + 1].tolist(), int(text[0, stop]), seen.at(torch.arange(before, stop)), shape)
        state.head_kv = head_kv
        contexts.clear()
        head.propose(exact, state)
        before, head_kv = stop, state.head_kv
        assert head_kv.length == stop
        assert len(contexts) == 3
        for context_D in contexts:
            torch.testing.assert_close(context_D, whole_TD[stop - 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prefix", [False, True])
def test_the_loss_and_drafting_use_the_same_logits(base: BaseLM, make_batch: MakeBatch, prefix: bool) -> None:
    """What the loss projects at t is what forward() says there after the text's own tokens."""
    exact = base.in_float64()
    head, batch = stirred(exact, prefix_layer=prefix, num_layers=2), make_batch()
    context_BTD = slow_contexts(head, see(exact, head, batch).final, batch)
    for k, found in enumerate(learned_at(head, exact, batch), start=1):
        assert found
        for at, (_, hidden_D) in found.items():
            b, t = divmod(at, 20)
            drafted = batch.tokens_BT[b, t + 1 : t + 1 + k].tolist()
            lm_head: Any = head.lm_heads[k - 1]
            torch.testing.assert_close(lm_head(hidden_D), logits_at(head, exact, context_BTD[b, t], drafted))


@pytest.mark.parametrize("settings", TERMS[:2], ids=["hydra", "hydra_pp"])
def test_a_bf16_base_under_fp32_heads(base: BaseLM, make_batch: MakeBatch, settings: dict[str, Any]) -> None:
    """Trained and decoded without autocast, fp32 weights read the base's bf16 states."""
    low = BaseLM(base.in_float64().model.bfloat16())
    head = Hydra(HydraConfig(num_heads=K, **settings), low.spec)
    head.initialise(low)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    batch = make_batch()
    seen = see(low, head, batch)
    out = head.loss(low, seen, batch)
    out.sum.backward()
    assert out.sum.isfinite()
    assert out.sum.dtype == torch.float32
    proposal = head.propose(low, State([1, 2], 2, seen.row(0), tree.chain(K)))
    assert len(proposal.tokens_N) == K + 1


@pytest.mark.parametrize("settings", TERMS[:2], ids=["hydra", "hydra_pp"])
def test_under_autocast(base: BaseLM, make_batch: MakeBatch, settings: dict[str, Any]) -> None:
    """bf16 arithmetic on fp32 weights moves the loss by bf16's roundings, no more."""
    head, batch = stirred(base, **settings), make_batch()
    seen = see(base, head, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = head.loss(base, seen, batch)
    out.sum.backward()
    assert out.sum.item() == pytest.approx(head.loss(base, seen, batch).sum.item(), rel=0.02)


@pytest.mark.parametrize("settings", TERMS[:2], ids=["hard", "soft"])
def test_11_38_overfits_one_batch(base: BaseLM, make_batch: MakeBatch, settings: dict[str, Any]) -> None:
    """§11.38: hard targets are learnt down to 0, the base's distributions down to their entropy."""
    head, batch = fresh(base, **{**settings, "num_heads": 2}), make_batch(horizon=3, rows=1, length=12)
    seen = see(base, head, batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.0)
    floor = head.loss(base, seen, batch).metrics.get("floor", (torch.zeros(()), 1))[0].item()
    losses = []
    for _ in range(150):
        out = head.loss(base, seen, batch, measure=False)
        losses.append((out.sum.item() - floor) / int(out.count))
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
    assert losses[0] > 0.3
    assert -1e-5 < losses[-1] < 5e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"lm_weight": -1.0}, "lm_weight=-1"),
        ({"teacher_weight": -1.0}, "teacher_weight=-1"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight=-1"),
        ({"noise_alpha": -1.0}, "noise_alpha=-1"),
        ({"lm_weight": 0.0}, "all are 0; give one above 0"),
        ({"teacher_top_k": 0}, "teacher_top_k=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        HydraConfig(**settings)
