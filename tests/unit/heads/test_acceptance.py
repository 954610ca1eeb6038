"""SpecDec++'s acceptance head against its equations spelled out as loops, in fp64."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import BaseSpec, Batch, Capture, Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError, DataError
from draftsmith.growth import Level, TreeShape
from draftsmith.heads.acceptance import Acceptance, AcceptanceConfig, AcceptanceGate
from draftsmith.heads.draft_model import DraftModel
from draftsmith.heads.hydra import Hydra, HydraConfig
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.losses import acceptance_loss, bernoulli_kl
from draftsmith.roles import Partial

MakeBatch = Callable[..., Batch]
READS = ("after", "before")
W = 6.0


@pytest.fixture(scope="module")
def companion() -> BaseLM:
    """Narrower than the base, with the same ids."""
    shape = {
        "vocab_size": 40,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = create.llama(shape, None, seed=5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return BaseLM(model)


@pytest.fixture
def draft_model(companion: BaseLM) -> DraftModel:
    return DraftModel(companion, depth=5)


@pytest.fixture
def hydra(base: BaseLM, noisy: Any) -> Hydra:
    """Noisy enough to be right at times and wrong at others."""
    torch.manual_seed(1)
    head = Hydra(HydraConfig(num_heads=4), base.spec)
    head.initialise(base)
    return noisy(head, 0.05).eval()


def fresh(base: BaseLM, beside: Any, **settings: Any) -> Acceptance:
    torch.manual_seed(2)
    head = Acceptance(Acceptance.completed(AcceptanceConfig(**settings), base.spec, beside), base.spec)
    head.attach(beside)
    head.initialise(base)
    return head


@pytest.fixture
def stirred(noisy: Any) -> Callable[..., Acceptance]:
    """stirred(base, beside, **settings): random weights everywhere, so that nothing is hidden by a zero."""
    return lambda *of, **settings: noisy(fresh(*of, **settings), 0.1)


def see(base: BaseLM, head: Acceptance, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def loss_of(base: BaseLM, head: Acceptance, batch: Batch, **more: Any) -> Any:
    return head.loss(base, see(base, head, batch), batch, **more)


# The oracle: everything in loops and fp64


def said(head: Acceptance, hidden_D: Tensor) -> tuple[float, float]:
    """log(1 - s) and log s of one state."""
    weights = {name: t.detach().double() for name, t in head.state_dict().items()}
    x_D = hidden_D.double()
    for i in range(head.config.num_layers):
        inner_D = weights[f"blocks.{i}.linear.weight"] @ x_D + weights[f"blocks.{i}.linear.bias"]
        x_D = x_D + inner_D / (1 + (-inner_D).exp())
    refuse, accept = (weights["out.weight"] @ x_D + weights["out.bias"]).tolist()
    either = math.log(math.exp(refuse) + math.exp(accept))
    return refuse - either, accept - either


def final_of(model: BaseLM, ids: list[int]) -> Tensor:
    """[D] after a document read alone."""
    return model.capture(Needs(final=True), torch.tensor([ids])).final[0, -1]  # type: ignore[index]


def documents_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, first position, past the last) of each."""
    found = []
    for b, row in enumerate(batch.documents_BT.tolist()):
        for d in sorted(set(row) - {-1}):
            found.append((b, row.index(d), row.index(d) + row.count(d)))
    return found


Lesson = tuple[Tensor, float]  # the state, and the true chance


def labelled_lessons(companion: BaseLM, batch: Batch, reads: str) -> list[Lesson]:
    assert batch.labels_BT is not None
    found = []
    for b, first, stop in documents_of(batch):
        ids = batch.tokens_BT[b].tolist()
        for t in range(first, stop):
            a = float(batch.labels_BT[b, t])
            read = t + 1 if reads == "after" else t  # how far the companion has read
            if batch.mask_BT[b, t] and not math.isnan(a) and read > first:
                found.append((final_of(companion, ids[first:read]), a))
    return found


def drafted_lessons(base: BaseLM, companion: BaseLM, batch: Batch, reads: str) -> list[Lesson]:
    """A greedy draft model on the fly."""
    found = []
    for b, first, stop in documents_of(batch):
        ids = batch.tokens_BT[b].tolist()
        for t in range(first, stop - 1):
            if batch.mask_BT[b, t + 1]:
                before = ids[first : t + 1]
                draft = int(companion.lm_head(final_of(companion, before)[None, None])[0, 0].argmax())
                own = int(base.lm_head(final_of(base, before)[None, None])[0, 0].argmax())
                state_D = final_of(companion, [*before, draft] if reads == "after" else before)
                found.append((state_D, float(draft == own)))
    return found


@torch.no_grad()
def hydra_lessons(base: BaseLM, hydra: Hydra, batch: Batch, reads: str, verify: str) -> list[Lesson]:
    """Head k reads f_t and x_{t+1..t+k} and drafts x_{t+1+k}; the state after that is the next head's."""
    found = []
    for b, first, stop in documents_of(batch):
        ids = batch.tokens_BT[b].tolist()
        for k in range(1, hydra.config.num_heads):
            for t in range(first, stop - k - 1):
                if not batch.mask_BT[b, t + k + 1]:
                    continue
                context_1D = final_of(base, ids[first : t + 1])[None]
                read_1kD = base.embed(torch.tensor([ids[t + 1 : t + k + 1]]))
                logits_1V, before_1D = hydra(base, context_1D, read_1kD)
                draft = int(logits_1V[0].argmax())
                p_V = base.lm_head(final_of(base, ids[first : t + k + 1])[None, None])[0, 0].double().softmax(-1)
                newest_11D = base.embed(torch.tensor([[draft]]))
                after_1D = hydra.hidden(context_1D, torch.cat([read_1kD, newest_11D], 1))
                chance = float(p_V[draft]) if verify == "sampling" else float(int(p_V.argmax()) == draft)
                found.append(((after_1D if reads == "after" else before_1D)[0], chance))
    return found


def least(a: float) -> float:
    """The least loss of one label over all logits, by a ternary search (the loss is convex)."""
    low, high = -60.0, 60.0

    def at(z: float) -> float:
        return W * (1 - a) * math.log1p(math.exp(z)) + a * math.log1p(math.exp(-z))

    for _ in range(200):
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, two) if at(one) < at(two) else (one, high)
    return at(low)


def check(base: BaseLM, head: Acceptance, batch: Batch, lessons: list[Lesson], count: int) -> None:
    """Loss and metrics against the lessons."""
    out = loss_of(base, head, batch)
    told_a = [(*said(head, h), a) for h, a in lessons]
    assert len(told_a) > 8
    total = sum(-W * (1 - a) * no - a * yes for no, yes, a in told_a)
    assert float(out.sum.detach()) == pytest.approx(total, rel=1e-5)
    assert int(out.count) == count
    expected = {
        "kl": sum(x * (math.log(x) - y) for no, yes, a in told_a for x, y in ((a, yes), (1 - a, no)) if x > 0),
        "accept": sum(a for *_, a in told_a),
        "predicted": sum(math.exp(yes) for _, yes, _ in told_a),
        "floor": sum(least(a) for *_, a in told_a),
    }
    assert out.metrics.keys() == expected.keys()
    for name, (told, n) in out.metrics.items():
        assert float(told) == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
        assert int(n) == (count if name == "floor" else len(told_a))  # as the loss itself
    assert float(out.metrics["floor"][0]) <= float(out.sum.detach())


# Closed forms


def random_labels(n: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits_N = 3 * torch.randn(n, generator=g, dtype=torch.float64)
    return logits_N, torch.rand(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("w", [1.0, 6.0, 0.3])
def test_check_17_the_weighted_form_is_two_class_cross_entropy_and_weighted_bce(w: float) -> None:
    """§11.17"""
    logits_N, a_N = random_labels()
    two_N2, target_N2 = torch.stack([torch.zeros_like(logits_N), logits_N], 1), torch.stack([1 - a_N, a_N], 1)
    weight_2 = torch.tensor([w, 1], dtype=torch.float64)
    expected = F.cross_entropy(two_N2 + 0.7, target_N2, weight=weight_2, reduction="sum")  # shifts cancel
    torch.testing.assert_close(acceptance_loss(logits_N, a_N, w), expected)
    s_N = logits_N.sigmoid()
    torch.testing.assert_close(expected, (-w * (1 - a_N) * (1 - s_N).log() - a_N * s_N.log()).sum())


def test_check_17_hard_labels_of_equal_weight_are_ordinary_bce() -> None:
    """§11.17"""
    logits_N, a_N = random_labels()
    hard_N = (a_N > 0.4).double()
    mean = acceptance_loss(logits_N, hard_N, 1.0) / len(hard_N)
    torch.testing.assert_close(mean, F.binary_cross_entropy_with_logits(logits_N, hard_N))


@pytest.mark.parametrize("w", [1.0, 6.0, 0.3])
def test_check_18_the_best_constant(w: float) -> None:
    """§11.18: sum a / (sum a + w sum(1 - a)), found by Newton's method from the loss alone."""
    _, a_N = random_labels()
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        (slope,) = torch.autograd.grad(acceptance_loss(z.expand(len(a_N)), a_N, w), z, create_graph=True)
        (bend,) = torch.autograd.grad(slope, z)
        z = (z - slope / bend).detach().requires_grad_()
    best = float(a_N.sum() / (a_N.sum() + w * (1 - a_N).sum()))
    assert float(z.detach().sigmoid()) == pytest.approx(best, abs=1e-9)


def test_bernoulli_kl_is_torchs_and_nothing_where_both_agree() -> None:
    logits_N, a_N = random_labels()
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(probs=a_N), bernoulli(logits=logits_N)).sum()
    torch.testing.assert_close(bernoulli_kl(logits_N, a_N), expected)
    torch.testing.assert_close(bernoulli_kl(a_N.logit(), a_N), torch.zeros((), dtype=torch.float64))
    sure = bernoulli_kl(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0]))
    assert float(sure) == pytest.approx(2 * math.log1p(math.exp(-2)))


# The module


def test_check_35_50352130_parameters_for_a_hidden_size_of_4096() -> None:
    """§11.35"""
    spec = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)
    with torch.device("meta"):
        head = Acceptance(AcceptanceConfig(num_layers=3), spec)
    assert sum(p.numel() for p in head.parameters()) == 50_352_130


def test_check_34_the_blocks_are_distinct(base: BaseLM, draft_model: DraftModel) -> None:
    """§11.34"""
    head = fresh(base, draft_model, num_layers=3)
    assert len({p.data_ptr() for p in head.blocks.parameters()}) == 3 * 2


def test_it_starts_as_one_linear_map(base: BaseLM, draft_model: DraftModel) -> None:
    head = fresh(base, draft_model)
    hidden_ND = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    refuse_N, accept_N = F.linear(hidden_ND, head.out.weight, head.out.bias).unbind(-1)
    torch.testing.assert_close(head(hidden_ND), accept_N - refuse_N)
    assert bool(head.out.weight.any())


def test_its_width_is_that_of_what_it_reads(base: BaseLM, draft_model: DraftModel, hydra: Hydra) -> None:
    assert fresh(base, draft_model).out.in_features == 12
    assert fresh(base, hydra).out.in_features == base.spec.hidden_size == 16
    config = fresh(base, draft_model).config
    assert Acceptance(config, base.spec).out.in_features == 12  # so that it can be built with nobody beside it


# The loss


def with_labels(batch: Batch, seed: int = 0) -> Batch:
    """Some soft, some certain, some none."""
    g = torch.Generator().manual_seed(seed)
    labels_BT = torch.rand(batch.tokens_BT.shape, generator=g)
    kind_BT = torch.randint(6, batch.tokens_BT.shape, generator=g)
    labels_BT[kind_BT == 0], labels_BT[kind_BT == 1], labels_BT[kind_BT == 2] = 0.0, 1.0, math.nan
    return dataclasses.replace(batch, labels_BT=labels_BT)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("seed", range(2))
def test_the_loss_of_labelled_rows(
    reads: Any, seed: int, base: BaseLM, draft_model: DraftModel, make_batch: MakeBatch, stirred: Any
) -> None:
    batch = with_labels(make_batch(seed, rows=3), seed)
    head = stirred(base, draft_model, verify="sampling", reads=reads)
    assert head.needs == Needs()  # it runs no base
    lessons = labelled_lessons(draft_model.companion, batch, reads)  # type: ignore[arg-type]
    check(base, head, batch, lessons, int(batch.counts_K[READS.index(reads)]))


@pytest.mark.parametrize("reads", READS)
def test_the_loss_of_a_greedy_draft_model_on_the_fly(
    reads: Any, base: BaseLM, make_batch: MakeBatch, stirred: Any, noisy: Any
) -> None:
    near = noisy_copy(base, noisy)
    batch = make_batch(1, rows=4)
    head = stirred(base, DraftModel(near), reads=reads)
    lessons = drafted_lessons(base, near, batch, reads)
    assert 0 < sum(a for _, a in lessons) < len(lessons)
    check(base, head, batch, lessons, len(lessons))
    assert len(lessons) == int(batch.counts_K[1])


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("verify", ["greedy", "sampling"])
def test_the_loss_beside_a_head(
    reads: Any, verify: Any, base: BaseLM, hydra: Hydra, make_batch: MakeBatch, stirred: Any
) -> None:
    batch = make_batch(2, rows=4)
    head = stirred(base, hydra, reads=reads, verify=verify)
    lessons = hydra_lessons(base, hydra, batch, reads, verify)
    assert 0 < sum(a for _, a in lessons) < len(lessons)
    check(base, head, batch, lessons, int(batch.counts_K[2]))


@pytest.mark.parametrize("verify", ["greedy", "sampling"])
def test_mixed_precision_does_not_reach_what_the_drafter_says(
    verify: Any, base: BaseLM, draft_model: DraftModel, make_batch: MakeBatch, stirred: Any
) -> None:
    batch, head = with_labels(make_batch(0, rows=3)), stirred(base, draft_model, verify=verify)
    seen = see(base, head, batch)
    plain, _, _ = head._learned(base, seen, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _, _ = head._learned(base, seen, batch)
    assert torch.equal(plain, mixed)


def noisy_copy(base: BaseLM, noisy: Any) -> BaseLM:
    """A companion that agrees with the base at times."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    model = create.llama({k: getattr(base.model.config, k) for k in names}, None, seed=0)
    model.load_state_dict(base.model.state_dict())
    return BaseLM(noisy(model, 0.015))


def test_the_gradient_is_the_heads_alone(
    base: BaseLM, draft_model: DraftModel, hydra: Hydra, make_batch: MakeBatch, stirred: Any
) -> None:
    batch = with_labels(make_batch(0, rows=3))
    for beside, settings in ((draft_model, {"verify": "sampling"}), (draft_model, {}), (hydra, {})):
        head = stirred(base, beside, **settings)
        loss_of(base, head, batch).sum.backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        assert all(p.grad is None for p in hydra.parameters())
        for model in (base.model, draft_model.companion.model):  # type: ignore[attr-defined]
            assert all(p.grad is None for p in model.parameters())


def test_nothing_to_learn_costs_nothing(
    base: BaseLM, draft_model: DraftModel, hydra: Hydra, make_batch: MakeBatch, stirred: Any
) -> None:
    batch = with_labels(make_batch())
    nothing = dataclasses.replace(batch, mask_BT=torch.zeros_like(batch.mask_BT))
    for beside, settings in ((draft_model, {"verify": "sampling"}), (draft_model, {}), (hydra, {})):
        for reads in READS:
            head = stirred(base, beside, reads=reads, **settings)
            out = loss_of(base, head, nothing)
            out.sum.backward()
            assert float(out.sum.detach()) == 0.0
            assert all((float(told), int(n)) == (0, 0) for told, n in out.metrics.values())
            assert all(p.grad is None or not p.grad.any() for p in head.parameters())  # NaN would be something


# What the user can get wrong


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 0),
        ("min_depth", 0),
        ("max_depth", 0),
        ("reject_weight", 0.0),
        ("reject_weight", -1.0),
        ("verify", "typical"),
        ("reads", "both"),
        ("threshold", 0.0),
        ("threshold", 1.0),
        ("threshold", -0.1),
    ],
)
def test_a_setting_that_cannot_be_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{key}="):
        AcceptanceConfig(**{key: value})


def test_it_wants_somebody_to_judge(base: BaseLM) -> None:
    with pytest.raises(ConfigError, match=r"nothing stands beside it; give companion=.* or drafter="):
        Acceptance.completed(AcceptanceConfig(), base.spec, None)
    medusa = Medusa(MedusaConfig(), base.spec)  # drafts all at once
    with pytest.raises(ConfigError, match="Medusa stands beside it"):
        Acceptance.completed(AcceptanceConfig(), base.spec, medusa)


def test_rows_without_labels_are_refused_where_labels_teach(
    base: BaseLM, draft_model: DraftModel, hydra: Hydra, make_batch: MakeBatch
) -> None:
    with pytest.raises(DataError, match="rows without labels"):
        loss_of(base, fresh(base, draft_model, verify="sampling"), make_batch())
    for verify, drafted, wanted in (("greedy", True, False), ("sampling", True, True), ("sampling", False, False)):
        assert Acceptance.reads_labels(AcceptanceConfig(verify=verify), drafted) == wanted  # type: ignore[arg-type]
    assert not fresh(base, hydra, verify="sampling").labelled


# The gate


def ruler(reads: Any) -> Acceptance:
    """Its logit is the one number that it reads."""
    head = Acceptance(AcceptanceConfig(num_layers=1, reads=reads, hidden_size=1), None)  # type: ignore[arg-type]
    head.initialise(None)  # type: ignore[arg-type]
    with torch.no_grad():
        head.out.weight.copy_(torch.tensor([[0.0], [1.0]]))
        head.out.bias.zero_()
    return head


def play(gate: AcceptanceGate, shape: TreeShape, chances: list[float]) -> tuple[list[bool], Partial]:
    """What the gate says after each level, drafting going on whatever it says. chances: per node, what the head makes
    of the state after reading it."""
    logits_N1 = torch.tensor(chances, dtype=torch.float64).logit().float()[:, None]
    partial, decisions = Partial(hidden=[logits_N1[:1]]), []
    for level in shape.levels:
        if not len(level.expanded_A):
            break
        partial.levels.append(level)
        partial.tokens.append(torch.zeros(len(level.of_C), dtype=torch.long))
        decisions.append(gate.stop(None, partial))  # type: ignore[arg-type]
        partial.hidden.append(logits_N1[level.nodes][level.expanded_A])
    return decisions, partial


def test_a_chain_by_hand() -> None:
    """Nodes 1, 2, 3 are judged 0.8, 0.5, 0.9 once they are read, so 0.8, 0.4, 0.36 are the products; the newest is not
    judged yet. Judged from where they came, the root's 0.9 is the first draft's."""
    shape, chances = tree.chain(5), [0.9, 0.8, 0.5, 0.9, 0.1, 0.1]
    for threshold, expected in ((0.1, [0, 1, 1, 1]), (0.5, [0, 0, 1, 1]), (0.62, [0, 0, 0, 1]), (0.65, [0, 0, 0, 0])):
        decisions, partial = play(AcceptanceGate(ruler("after"), threshold), shape, chances)
        assert decisions == [bool(x) for x in expected], threshold
        assert [float(t) for t in partial.notes] == pytest.approx([0.8, 0.4, 0.36])
    decisions, partial = play(AcceptanceGate(ruler("before"), 0.5), shape, chances)
    assert [float(t) for t in partial.notes] == pytest.approx([0.9, 0.72, 0.36, 0.324])
    assert decisions == [False, False, True, True]
    assert play(AcceptanceGate(ruler("before"), 0.5, min_depth=4), shape, chances)[0] == [False, False, False, True]


def test_a_tree_by_hand() -> None:
    """Nodes: 1 [0], 2 [1], 3 [0,0], 4 [0,1], 5 [1,0], 6 [0,0,0], 7 [1,0,0] and one more below 6 and 7. Expanded: 1 and
    2, 3 and 5, 6 and 7."""
    paths = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    chances = [0.5, 0.6, 0.9, 0.9, 0.99, 0.5, 0.7, 0.8, 0.5, 0.5]
    decisions, partial = play(AcceptanceGate(ruler("after"), 0.4), tree.from_paths(paths), chances)
    judged = [t.tolist() for t in partial.notes]
    assert judged[0] == pytest.approx([0.6, 0.9])
    assert judged[1] == pytest.approx([0.54, 0.45])  # 0.6 0.9, 0.9 0.5: node 4 has no children and counts for nothing
    assert decisions == [False, False, True]  # 1 - 0.9, then 1 - 0.54, the likelier of the two


def random_tree(seed: int) -> TreeShape:
    g = torch.Generator().manual_seed(seed)
    paths: list[list[int]] = []
    level: list[list[int]] = [[]]
    for _ in range(5):
        level = [[*path, r] for path in level for r in range(int(torch.randint(0, 4, (), generator=g)))][:6]
        paths += level
    return tree.from_paths(paths or [[0], [0, 0]])


@pytest.mark.parametrize("reads", READS)
def test_in_any_tree_the_likeliest_path_that_may_go_on_counts(reads: Any) -> None:
    """Walked from each node up to the root, anew at every level."""
    stops = asked = 0
    for seed in range(60):
        shape, g = random_tree(seed), torch.Generator().manual_seed(seed)
        parents, depths = shape.parents_N.tolist(), shape.depths_N.tolist()
        chances = (0.5 + 0.49 * torch.rand(len(parents), generator=g, dtype=torch.float64)).tolist()
        threshold, min_depth = float(torch.rand((), generator=g)), seed % 3 + 1
        decisions, _ = play(AcceptanceGate(ruler(reads), threshold, min_depth), shape, chances)
        for depth, told in enumerate(decisions, start=1):
            best = 0.0
            for node in (n for n in range(len(parents)) if depths[n] == depth and n in parents):
                walk, product = node, 1.0
                while walk > 0:
                    if reads == "before":
                        product *= chances[parents[walk]]
                    elif walk != node:
                        product *= chances[walk]
                    walk = parents[walk]
                best = max(best, product)
            assert abs(1 - best - threshold) > 1e-5, "too near to say"
            assert told == (depth >= min_depth and 1 - best > threshold), (seed, depth)
            stops, asked = stops + told, asked + 1
    assert 0.15 * asked < stops < 0.85 * asked


def test_levels_judged_before_are_not_judged_again() -> None:
    head, asked = ruler("after"), []
    judge = head.chance

    def chance(partial: Partial, depth: int) -> Tensor:
        asked.append(depth)
        return judge(partial, depth)

    head.chance = chance  # type: ignore[method-assign]
    play(AcceptanceGate(head, 0.5), tree.chain(6), [0.9] * 7)
    assert asked == [1, 2, 3, 4]


def test_chances_are_those_of_the_first_path() -> None:
    levels: list[Level] = tree.chain(4).levels
    _, partial = play(AcceptanceGate(ruler("before"), 2.0), tree.chain(4), [0.9, 0.8, 0.7, 0.6, 0.5])
    assert len(levels) == 4
    assert [float(t[0]) for t in ruler("before").chances(partial)] == pytest.approx([0.9, 0.8, 0.7])
    assert [float(t[0]) for t in ruler("after").chances(partial)] == pytest.approx([0.8, 0.7, 0.6])


@pytest.mark.parametrize("reads", READS)
def test_check_10_below_zero_it_always_stops_from_one_on_never(
    reads: Any, base: BaseLM, draft_model: DraftModel, hydra: Hydra, stirred: Any
) -> None:
    """§11.10, with random weights in real drafting."""
    depths: list[int] = []

    def watch(proposal: Any, verdict: Any) -> None:
        depths.append(int(tree.depths(proposal.parents_N).max()))

    plain = generate(base, [3, 1], max_new_tokens=25).tokens
    for drafter, most in ((draft_model, 5), (hydra, 4)):
        head = stirred(base, drafter, reads=reads)
        for shape in (tree.chain(most), tree.by_widths([2, 2, 1, 1, 1][:most])):
            for threshold, least_deep in ((-0.01, 1), (-0.01, 3), (1.0, 1), (1.5, 2)):
                depths.clear()
                gate = AcceptanceGate(head, threshold, least_deep)
                out = generate(base, [3, 1], drafter=drafter, shape=shape, gate=gate, max_new_tokens=25, watch=watch)
                assert out.tokens == plain
                assert set(depths) == {least_deep if threshold < 0 else most}


def test_by_default_the_gate_is_as_it_was_exported(base: BaseLM, draft_model: DraftModel) -> None:
    head = fresh(base, draft_model, threshold=0.3, min_depth=2)
    assert (head.gate().threshold, head.gate().min_depth) == (0.3, 2)
    assert (head.gate(0.7, 4).threshold, head.gate(0.7, 4).min_depth) == (0.7, 4)
    assert head.gate().head is head
