"""Medusa against the paper's sums, spelled out as loops."""

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
from draftsmith.errors import ConfigError
from draftsmith.growth import TreeShape
from draftsmith.heads.blocks import ResBlock
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.roles import State

MakeBatch = Callable[..., Batch]


def fresh(base: BaseLM, **settings: Any) -> Medusa:
    """As before training."""
    torch.manual_seed(1)
    head = Medusa(MedusaConfig(**settings), base.spec).to(base.dtype)
    head.initialise(base)
    return head


def stirred(base: BaseLM, **settings: Any) -> Medusa:
    """With random weights everywhere, so that nothing is hidden by an identity."""
    head = fresh(base, **settings)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head


def see(base: BaseLM, head: Medusa, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def base_logits(base: BaseLM, final: Tensor) -> Tensor:
    return F.linear(final, base.lm_head_weight, base.lm_head_bias)


@pytest.fixture(scope="session")
def biased(base: BaseLM) -> BaseLM:
    """The same base with a bias on its lm_head."""
    other = BaseLM(base.in_float64().model.float())
    other._head.bias = torch.nn.Parameter(torch.randn(base.spec.vocab_size), requires_grad=False)
    other.spec = dataclasses.replace(other.spec, lm_head_bias=True)
    return other


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_11_1_starts_as_the_base_bit_for_bit(base: BaseLM, make_batch: MakeBatch, share: bool, layers: int) -> None:
    """§11.1: zero W and b and a copied lm_head give the base's logits; with PyTorch's bias they do not."""
    head, batch = fresh(base, num_layers=layers, share_lm_head=share), make_batch()
    final_ND = see(base, head, batch).final.flatten(0, 1)
    want = base_logits(base, final_ND)[:, None].expand(-1, 3, -1)
    assert torch.equal(head(base, final_ND), want)
    for block in head.modules():
        if isinstance(block, ResBlock):
            torch.nn.init.uniform_(block.linear.bias, -1 / math.sqrt(16), 1 / math.sqrt(16))
    assert not torch.allclose(head(base, final_ND), want, atol=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_11_1_with_a_bias_on_the_base_lm_head(biased: BaseLM, share: bool) -> None:
    head = fresh(biased, share_lm_head=share)
    final_ND = torch.randn(5, 16)
    assert torch.equal(head(biased, final_ND)[:, 1], base_logits(biased, final_ND))
    assert ("lm_heads.0.bias" in head.state_dict()) == (not share)


def test_11_2_first_loss_is_the_base_cross_entropy(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.2: before any step, head k's loss is that of p_t against x_{t+1+k}, from the base's logits alone."""
    head, batch = fresh(base), make_batch()
    seen = see(base, head, batch)
    log_p = base_logits(base, seen.final).double().log_softmax(-1)
    out = head.loss(base, seen, batch)
    for k in (1, 2, 3):
        want = [
            -log_p[b, t, batch.tokens_BT[b, t + 1 + k]]
            for b in range(2)
            for t in range(20 - 1 - k)
            if batch.documents_BT[b, t] == batch.documents_BT[b, t + 1 + k] >= 0 and batch.mask_BT[b, t + 1 + k]
        ]
        total, n = out.metrics[f"loss/{k}"]
        assert int(n) == len(want)
        assert total.item() == pytest.approx(sum(want).item(), rel=1e-5)


def own_logits(head: Medusa, base: BaseLM, k: int, h: Tensor) -> Tensor:
    """Equation 1 with the parameters taken by name."""
    p = head.state_dict()
    for j in range(head.config.num_layers):
        pre = p[f"blocks.{k - 1}.{j}.linear.weight"] @ h + p[f"blocks.{k - 1}.{j}.linear.bias"]
        h = h + pre * torch.sigmoid(pre)
    if head.config.share_lm_head:
        return base.lm_head_weight @ h
    return p[f"lm_heads.{k - 1}.weight"] @ h


def slow_loss(head: Medusa, base: BaseLM, final_BTD: Tensor, batch: Batch) -> tuple[float, dict[str, float]]:
    """Loops over positions: the weighted sum, and every metric as a ratio."""
    K, weights = head.config.num_heads, head.config.weights
    loss, right, n = [0.0] * (K + 1), [0] * (K + 1), [0] * (K + 1)
    runs = 0
    rows, length = batch.tokens_BT.shape
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
                logits = own_logits(head, base, k, final_BTD[b, t]).tolist()
                target = int(batch.tokens_BT[b, then])
                top = max(logits)
                loss[k] += top + math.log(sum(math.exp(z - top) for z in logits)) - logits[target]
                n[k] += 1
                hit = logits.index(top) == target
                right[k] += hit
                in_a_row = in_a_row and hit
                runs += in_a_row
    metrics: dict[str, float] = {f"loss/{k}": loss[k] / max(1, n[k]) for k in range(1, K + 1)}
    metrics |= {f"top1/{k}": right[k] / max(1, n[k]) for k in range(1, K + 1)}
    metrics["tokens_per_step"] = 1 + runs / n[1]
    return sum(w * x for w, x in zip(weights, loss[1:], strict=True)), metrics


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [False, True])
def test_loss_and_metrics_equal_the_loops(base: BaseLM, make_batch: MakeBatch, seed: int, share: bool) -> None:
    exact = base.in_float64()
    head = stirred(exact, num_layers=2, share_lm_head=share, decay=0.7)
    batch = make_batch(seed, rows=3, length=24)
    seen = see(exact, head, batch)
    # Make half of the counted tokens what the head would say, so that hits and runs of hits occur.
    best = head(exact, seen.final.flatten(0, 1)).argmax(-1).view(3, 24, 3)
    for b in range(3):
        for t in range(0, 20, 3):
            batch.tokens_BT[b, t + 2 : t + 5] = best[b, t]
    out = head.loss(exact, seen, batch)
    want, metrics = slow_loss(head, exact, seen.final, batch)
    assert out.sum.item() == pytest.approx(want, rel=1e-10)
    assert set(out.metrics) == set(metrics)
    for name, (value, weight) in out.metrics.items():
        assert value.item() / max(1, weight.item()) == pytest.approx(metrics[name], rel=1e-10), name
    assert metrics["tokens_per_step"] > 1.1
    assert int(out.count) == int(batch.counts_K[2])


def test_measuring_changes_nothing_but_the_metrics(base: BaseLM, make_batch: MakeBatch) -> None:
    head, batch = stirred(base), make_batch()
    with_, without = (head.loss(base, see(base, head, batch), batch, measure=m) for m in (True, False))
    assert torch.equal(with_.sum, without.sum)
    assert without.metrics == {}


def gradients(head: Medusa, base: BaseLM, batch: Batch) -> dict[str, Tensor]:
    head.zero_grad(set_to_none=True)
    out = head.loss(base, see(base, head, batch), batch)
    (out.sum / out.count).backward()
    return {name: p.grad.clone() for name, p in head.named_parameters()}


def test_11_20_weights_scale_the_gradients(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.20: doubling every lambda doubles every gradient; (1, 0, 0) leaves the other heads at exactly 0."""
    batch = make_batch()
    once, twice, first = (
        gradients(stirred(base, loss_weights=w), base, batch) for w in ([0.5, 0.3, 0.2], [1.0, 0.6, 0.4], [1.0, 0, 0])
    )
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-5, atol=1e-7)
        own = name.split(".")[1] == "0"
        assert bool(first[name].any()) == own, name


def test_decay_gives_the_paper_weights() -> None:
    assert MedusaConfig(num_heads=3).weights == pytest.approx([0.8, 0.64, 0.512])
    assert MedusaConfig(num_heads=2, loss_weights=[3.0, 0.0]).weights == [3.0, 0.0]


@pytest.mark.parametrize("share", [False, True])
def test_11_33_gradients_stay_in_the_head(base: BaseLM, make_batch: MakeBatch, share: bool) -> None:
    """§11.33: the base, its lm_head included, gets no gradient; every head parameter gets one."""
    before = base.weights_sha256()
    found = gradients(stirred(base, share_lm_head=share), base, make_batch())
    assert all(g.any() for g in found.values())
    assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())
    assert base.weights_sha256() == before


def test_11_13_no_leakage(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.13: head logits at t know nothing of later tokens nor of other documents; targets nothing of the past."""
    head, batch = stirred(base), make_batch(rows=1)
    before = head(base, see(base, head, batch).final.flatten(0, 1))
    documents = batch.documents_BT[0].tolist()
    for changed in range(20):
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, changed] = (tokens_BT[0, changed] + 1) % 40
        after = head(base, see(base, head, dataclasses.replace(batch, tokens_BT=tokens_BT)).final.flatten(0, 1))
        moved = [t for t in range(20) if not torch.equal(after[t], before[t])]
        assert changed in moved
        assert all(t >= changed and documents[t] == documents[changed] for t in moved)


@pytest.mark.parametrize("what", ["all masked", "all padding", "one token each"])
def test_11_15_nothing_counted_is_zero(base: BaseLM, make_batch: MakeBatch, what: str) -> None:
    """§11.15: no assistant token is a loss of 0 and zero gradients, never NaN."""
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
    assert not any(p.grad.any() for p in head.parameters())
    assert all(v.isfinite() for pair in out.metrics.values() for v in pair)


def test_11_34_blocks_are_distinct(base: BaseLM) -> None:
    """§11.34: K heads of n layers are K * n weights in memory, with lm_heads of their own beside the base's."""
    head = fresh(base, num_heads=3, num_layers=4)
    blocks = [m.linear.weight for m in head.modules() if isinstance(m, ResBlock)]
    assert len(blocks) == len({p.data_ptr() for p in blocks}) == 12
    ends = [m.weight for m in head.lm_heads]
    assert len({p.data_ptr() for p in [*ends, base.lm_head_weight]}) == 4


SPEC_7B = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)


@pytest.mark.parametrize(("share", "each"), [(False, 147_853_312), (True, 16_781_312)])
def test_11_35_parameter_counts(share: bool, each: int) -> None:
    """§11.35, on the meta device: nothing of that size is ever allocated."""
    with torch.device("meta"):
        head = Medusa(MedusaConfig(num_heads=5, share_lm_head=share), SPEC_7B)
    assert all(p.is_meta for p in head.parameters())
    assert sum(p.numel() for p in head.parameters()) == 5 * each
    with torch.device("meta"):
        assert sum(p.numel() for p in Medusa(MedusaConfig(5, 2, share), SPEC_7B).parameters()) - 5 * each == (
            5 * (4096 * 4096 + 4096)
        )


@pytest.mark.parametrize("share", [False, True])
def test_key_names(base: BaseLM, share: bool) -> None:
    keys = set(fresh(base, num_heads=2, num_layers=2, share_lm_head=share).state_dict())
    blocks = {f"blocks.{k}.{j}.linear.{w}" for k in range(2) for j in range(2) for w in ("weight", "bias")}
    assert keys == blocks | (set() if share else {"lm_heads.0.weight", "lm_heads.1.weight"})


def test_what_it_declares(base: BaseLM) -> None:
    head = fresh(base, num_heads=4)
    assert (head.max_depth, head.horizon, head.role, head.lossy) == (4, 5, "drafter", False)
    assert head.needs.final
    assert not head.needs.logits
    assert not head.needs.hidden


CHAIN = TreeShape(torch.tensor([-1, 0, 1, 2]), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 0]))
#  root -> 1, 2 (ranks 0 and 2 of depth 1); 1 -> 3 (rank 1 of depth 2); 3 -> 4 (rank 0 of depth 3)
TREE = TreeShape(torch.tensor([-1, 0, 0, 1, 3]), torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 0, 2, 1, 0]))
ROOT_ONLY = TreeShape(torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("shape", [CHAIN, TREE, ROOT_ONLY])
@pytest.mark.parametrize("share", [False, True])
def test_propose_reads_the_forward(base: BaseLM, shape: TreeShape, share: bool) -> None:
    """Node by node: the ranks-th best token of the head of its depth, at the last position seen."""
    head = stirred(base, share_lm_head=share)
    tokens = torch.randint(40, (1, 7), generator=torch.Generator().manual_seed(3))
    seen = base.capture(head.needs, tokens)
    proposal = head.propose(base, State([*tokens[0].tolist(), 9], 9, seen, shape))
    logits_KV = head(base, seen.final[:, -1])[0]
    order = [sorted(range(40), key=lambda v: -z[v]) for z in logits_KV.tolist()]
    want = [9]
    for depth, rank in zip(shape.depths_N.tolist()[1:], shape.ranks_N.tolist()[1:], strict=True):
        want.append(order[depth - 1][rank])
    assert proposal.tokens_N.tolist() == want
    assert torch.equal(proposal.parents_N, shape.parents_N)


def test_training_logits_equal_decoding_logits(base: BaseLM, make_batch: MakeBatch) -> None:
    """One forward for both: what the packed batch gives at a document's position is what decoding of that
    document alone, with a K/V and token by token, gives there."""
    head, batch = stirred(base), make_batch(seed=5)
    packed_BTKV = head(base, see(base, head, batch).final.flatten(0, 1)).view(2, 20, 3, 40)
    for b in range(2):
        for document in range(3):
            at = (batch.documents_BT[b] == document).nonzero()[:, 0]
            kv = base.new_kv()
            for t in at.tolist():
                final = base.capture(head.needs, batch.tokens_BT[b : b + 1, t : t + 1], kv=kv).final
                torch.testing.assert_close(head(base, final[:, -1])[0], packed_BTKV[b, t], rtol=1e-4, atol=1e-5)


def test_the_loss_uses_the_same_logits(base: BaseLM, make_batch: MakeBatch) -> None:
    """The chunked loss, formed without whole logits, is the cross-entropy of forward()'s."""
    head, batch = stirred(base, loss_weights=[0.0, 1.0, 0.0]), make_batch()
    seen = see(base, head, batch)
    logits = head(base, seen.final.flatten(0, 1))[:, 1].view(2, 20, 40)
    want = sum(
        F.cross_entropy(logits[b, t], batch.tokens_BT[b, t + 3]).item()
        for b in range(2)
        for t in range(17)
        if batch.documents_BT[b, t] == batch.documents_BT[b, t + 3] >= 0 and batch.mask_BT[b, t + 3]
    )
    assert head.loss(base, seen, batch).sum.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_a_bf16_base_under_fp32_heads(base: BaseLM, make_batch: MakeBatch, share: bool) -> None:
    """Trained and decoded without autocast, fp32 weights read the base's bf16 states."""
    low = BaseLM(base.in_float64().model.bfloat16())
    head = Medusa(MedusaConfig(share_lm_head=share), low.spec)
    head.initialise(low)
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    batch = make_batch()
    seen = see(low, head, batch)
    out = head.loss(low, seen, batch)
    out.sum.backward()
    assert out.sum.isfinite()
    proposal = head.propose(low, State([1, 2], 2, seen.row(0), CHAIN))
    assert len(proposal.tokens_N) == 4


def test_11_38_overfits_one_batch(base: BaseLM, make_batch: MakeBatch) -> None:
    """§11.38 and §11.16: hard targets that the hidden state tells apart are learnt down to the floor, 0."""
    head, batch = fresh(base, num_heads=2), make_batch(horizon=3, rows=1, length=12)
    seen = see(base, head, batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.03, weight_decay=0.0)
    first = None
    for _ in range(150):
        out = head.loss(base, seen, batch, measure=False)
        loss = out.sum / out.count
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first > 1
    assert loss.item() < 5e-3
    metrics = head.loss(base, seen, batch).metrics
    assert all(metrics[f"top1/{k}"][0] == metrics[f"top1/{k}"][1] for k in (1, 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"decay": 0.0}, "decay=0"),
        ({"decay": -1.0}, "decay=-1"),
        ({"num_heads": 3, "loss_weights": [1.0, 1.0]}, "loss_weights: 2 weights for num_heads=3"),
        ({"num_heads": 3, "loss_weights": []}, "loss_weights: 0 weights"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MedusaConfig(**settings)
