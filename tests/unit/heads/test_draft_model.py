"""A companion as a drafter: what it drafts is its own text, whatever was kept and refused before."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Batch, Capture, Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.goodness import chi_square
from draftsmith.decoding.rules import Rules
from draftsmith.errors import ConfigError
from draftsmith.growth import TreeShape, Warp
from draftsmith.heads.acceptance import Acceptance, AcceptanceConfig, AcceptanceGate
from draftsmith.heads.draft_model import DraftModel
from draftsmith.roles import Partial, Proposal, State

MakeBatch = Callable[..., Batch]
V = 40
PROMPT = [3, 14, 15, 9, 2]
SHAPES = {
    "chain": tree.chain(4),
    "tree": tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 1, 0]]),
}


def near(base: BaseLM, noisy: Any, scale: float = 0.015, seed: int = 2, **changes: Any) -> BaseLM:
    """A copy of the base, disturbed: it agrees with it at times. changes: of its shape."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    model = create.llama({**{k: getattr(base.model.config, k) for k in names}, **changes}, None, seed=0)
    own = model.state_dict()
    with torch.no_grad():
        for name, t in base.model.state_dict().items():
            rows = min(len(t), len(own[name]))
            own[name][:rows] = t[:rows]
    return BaseLM(noisy(model, scale, seed) if scale else model)


@pytest.fixture
def companion(base: BaseLM, noisy: Any) -> BaseLM:
    return near(base, noisy)


def logits_of(model: BaseLM, ids: list[int], vocabulary: int = V) -> Tensor:
    """[V] after the text, read anew."""
    return model.capture(Needs(logits=True), torch.tensor([ids])).logits[0, -1, :vocabulary]  # type: ignore[index]


def slow_tree(model: BaseLM, text: list[int], shape: TreeShape) -> list[int]:
    """Every node is the best, second best, … after its own path, which is read anew each time."""
    parents, ranks = shape.parents_N.tolist(), shape.ranks_N.tolist()
    paths = [[text[-1]]]
    for node in range(1, len(parents)):
        above = paths[parents[node]]
        ranked = logits_of(model, [*text[:-1], *above]).argsort(descending=True)
        paths.append([*above, int(ranked[ranks[node]])])
    return [path[-1] for path in paths]


# Drafting


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_drafts_its_own_greedy_text_after_every_step(
    shape: TreeShape, base: BaseLM, companion: BaseLM, recording: Any
) -> None:
    drafter = recording(DraftModel(companion, 4))
    out = generate(base, PROMPT, drafter=drafter, shape=shape, max_new_tokens=40)
    assert out.tokens == base.generate([PROMPT], max_new_tokens=40)[0]
    kept = {len(after) - len(before) - 1 for before, after in itertools.pairwise(drafter.tokens)}
    assert {0, 1} < kept  # some refused at once, some kept, some further
    for text, proposal in zip(drafter.tokens, drafter.proposals, strict=True):
        assert proposal.drawn_NV is None
        assert proposal.tokens_N.tolist() == slow_tree(companion, text, shape)


def test_a_chain_is_what_its_own_generate_says(base: BaseLM, companion: BaseLM, recording: Any) -> None:
    drafter = recording(DraftModel(companion, 6))
    generate(base, PROMPT, drafter=drafter, max_new_tokens=30)
    assert len(drafter.tokens) > 5
    for text, proposal in zip(drafter.tokens, drafter.proposals, strict=True):
        assert proposal.tokens_N.tolist()[1:] == companion.generate([text], max_new_tokens=6)[0]


class Watching:
    """A gate that compares what it is shown with fresh reads."""

    def __init__(self, companion: BaseLM) -> None:
        self.companion, self.compared, self.largest = companion, 0, 0.0

    def stop(self, state: State, partial: Partial) -> bool:
        """Of a tree, along its first path."""
        assert partial.logits_AV is not None
        path = [int(tokens_C[0]) for tokens_C in partial.tokens]
        fresh = self.companion.capture(Needs(final=True, logits=True), torch.tensor([[*state.tokens, *path[:-1]]]))
        for told, expected in ((partial.logits_AV, fresh.logits), (partial.hidden[-1], fresh.final)):
            assert expected is not None
            away = (told[0] - expected[0, -1]).abs().max() / expected.abs().max()
            self.largest, self.compared = max(self.largest, float(away)), self.compared + 1
        return False


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kv_it_keeps_is_that_of_the_text(shape: TreeShape, base: BaseLM, companion: BaseLM) -> None:
    """What a fresh forward over text and drafts gives, after drafts of every fate."""
    gate = Watching(companion)
    generate(base, PROMPT, drafter=DraftModel(companion, 4), shape=shape, gate=gate, max_new_tokens=40)
    assert gate.compared > 30
    assert gate.largest < 1e-5


def test_it_forgets_its_drafts(base: BaseLM, companion: BaseLM) -> None:
    state = State(list(PROMPT), PROMPT[-1], Capture(), SHAPES["tree"])
    DraftModel(companion, 4).propose(base, state)
    assert state.head_kv is not None
    assert state.head_kv.length == len(PROMPT)


def test_rows_of_a_batch_are_drafted_for_as_if_alone(base: BaseLM, companion: BaseLM, recording: Any) -> None:
    """One draft model for all of them: what it keeps from step to step is each row's own."""
    drafter, prompts = DraftModel(companion, 4), [PROMPT, [7], [1, 2, 3, 1, 2, 3, 1, 2, 3]]
    apart, together = ([recording(drafter) for _ in prompts] for _ in range(2))
    told: dict[str, Any] = {"shape": SHAPES["tree"], "max_new_tokens": 30}
    for one, prompt in zip(apart, prompts, strict=True):
        generate(base, prompt, drafter=one, **told)
    found = decode(base, prompts, drafters=together, **told)
    assert [out.tokens for out in found] == base.generate(prompts, max_new_tokens=30, batch_size=1)
    for one, other in zip(apart, together, strict=True):
        assert [p.tokens_N.tolist() for p in one.proposals] == [p.tokens_N.tolist() for p in other.proposals]


def test_the_base_itself_is_always_right(base: BaseLM, noisy: Any) -> None:
    """§11.30; drawn, p == q accepts everything (§11.19)."""
    drafter = DraftModel(near(base, noisy, scale=0.0), 4)
    for temperature in (0.0, 1.0):
        for seed in range(3):
            asked: dict[str, Any] = {"max_new_tokens": 1 + 5 * 7, "temperature": temperature, "seed": seed}
            out = generate(base, PROMPT, drafter=drafter, **asked)
            assert (out.steps, out.tokens_per_step) == (7, 5.0)


# Where the two do not fit


def test_a_larger_vocabulary_never_drafts_an_id_that_the_base_lacks(base: BaseLM, noisy: Any) -> None:
    wide = near(base, noisy, vocab_size=V + 9)
    with torch.no_grad():
        wide.model.get_output_embeddings().weight[V:] *= 50
    beyond = [int(logits_of(wide, [*PROMPT, t], V + 9).argmax()) for t in range(V)]
    assert sum(t >= V for t in beyond) > 20, "it would like to"
    proposals: list[Proposal] = []
    for temperature in (0.0, 1.0):
        asked: dict[str, Any] = {"temperature": temperature, "watch": lambda p, verdict: proposals.append(p)}
        out = generate(base, PROMPT, drafter=DraftModel(wide, 4), max_new_tokens=40, **asked)
        assert max(int(p.tokens_N.max()) for p in proposals) < V
        assert out.stats.accepted > 0
    assert {p.drawn_NV.shape[1] for p in proposals if p.drawn_NV is not None} == {V}
    drawn_NV = torch.cat([p.drawn_NV[1:] for p in proposals if p.drawn_NV is not None])
    torch.testing.assert_close(drawn_NV.sum(1), torch.ones(len(drawn_NV), dtype=torch.float64))


def test_a_smaller_vocabulary_drafts_what_it_has(base: BaseLM, noisy: Any) -> None:
    small, narrow = V - 10, near(base, noisy, scale=0.0)
    with torch.no_grad():  # a base whose text stays among the common ids, as that of a padded lm_head does
        narrow.model.get_output_embeddings().weight[small:] = 0
    companion = near(narrow, noisy, vocab_size=small)
    reference = narrow.generate([PROMPT], max_new_tokens=40)[0]
    assert max(reference) < small
    out = generate(narrow, PROMPT, drafter=DraftModel(companion, 4), max_new_tokens=40)
    assert out.tokens == reference
    assert out.stats.accepted > 0


def test_near_its_last_position_it_drafts_nothing(base: BaseLM, noisy: Any, recording: Any) -> None:
    short = near(base, noisy, max_position_embeddings=24)
    drafter = recording(DraftModel(short, 4))
    out = generate(base, PROMPT, drafter=drafter, max_new_tokens=40)
    assert out.tokens == base.generate([PROMPT], max_new_tokens=40)[0]
    for text, proposal in zip(drafter.tokens, drafter.proposals, strict=True):
        assert len(proposal.tokens_N) == (5 if len(text) + 4 <= 24 else 1)
    assert {len(p.tokens_N) for p in drafter.proposals} == {1, 5}


def test_it_drafts_at_least_one_token(companion: BaseLM) -> None:
    with pytest.raises(ConfigError, match="depth=0"):
        DraftModel(companion, 0)


# What training sees


def test_drafted_is_every_position_read_anew(base: BaseLM, companion: BaseLM, make_batch: MakeBatch) -> None:
    batch = make_batch(3, rows=4)
    told = DraftModel(companion).drafted(base, Capture(), batch)
    expected = []
    for b, documents in enumerate(batch.documents_BT.tolist()):
        for d in sorted(set(documents) - {-1}):
            first, size = documents.index(d), documents.count(d)
            ids = batch.tokens_BT[b, first : first + size].tolist()
            for t in range(size - 1):
                if batch.mask_BT[b, first + t + 1]:
                    fresh = [companion.capture(Needs(final=True, logits=True), torch.tensor([ids[: t + 1]]))]
                    draft = int(fresh[0].logits[0, -1].argmax())  # type: ignore[index]
                    fresh.append(companion.capture(Needs(final=True), torch.tensor([[*ids[: t + 1], draft]])))
                    before_D, after_D = (seen.final[0, -1] for seen in fresh)  # type: ignore[index]
                    expected.append((b * len(documents) + first + t, draft, before_D, after_D))
    assert len(expected) > 15
    assert told.ahead == 1
    assert len(expected) == int(batch.counts_K[told.ahead])
    assert told.at_M.tolist() == [at for at, *_ in expected]
    assert told.tokens_M.tolist() == [draft for _, draft, *_ in expected]
    torch.testing.assert_close(told.before_MD, torch.stack([h for *_, h, _ in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told.hidden_MD, torch.stack([h for *_, h in expected]), rtol=1e-5, atol=1e-5)


def test_drafted_knows_only_ids_of_the_base(base: BaseLM, noisy: Any, make_batch: MakeBatch) -> None:
    wide = near(base, noisy, vocab_size=V + 9)
    with torch.no_grad():
        wide.model.get_output_embeddings().weight[V:] *= 50
    told = DraftModel(wide).drafted(base, Capture(), make_batch())
    assert int(told.tokens_M.max()) < V


SMALL = {
    "vocab_size": 6,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.35,
}


@pytest.mark.parametrize("reads", [None, "after", "before"], ids=["no gate", "after", "before"])
def test_check_29_drawn_text_is_distributed_as_the_bases(reads: Any) -> None:
    """§11.29 with real models, a vocabulary of six: the joint distribution of the first three sampled tokens, with and
    without an acceptance gate that stops at many different depths."""
    base = BaseLM(create.llama({**SMALL, "num_hidden_layers": 2}, None, 1))
    companion = BaseLM(create.llama({**SMALL, "num_hidden_layers": 1}, None, 2))
    drafter, gate, runs, temperature = DraftModel(companion), None, 600, 0.8
    if reads is not None:
        torch.manual_seed(3)
        head = Acceptance(Acceptance.completed(AcceptanceConfig(reads=reads), base.spec, drafter), base.spec).eval()
        gate = AcceptanceGate(head, 0.55)
    prompt, joint_VVV = [1, 4], torch.zeros(6, 6, 6, dtype=torch.float64)
    for a, b in itertools.product(range(6), repeat=2):
        texts = [prompt, [*prompt, a], [*prompt, a, b]]
        p = [(logits_of(base, t, 6).double() / temperature).softmax(-1) for t in texts]
        joint_VVV[a, b] = p[0][a] * p[1][b] * p[2]
    seen_VVV, depths = torch.zeros(6, 6, 6, dtype=torch.float64), set()
    how: dict[str, Any] = {"rules": Rules(Warp(temperature)), "max_new_tokens": 3, "shape": tree.chain(3)}
    for first in range(0, runs, 50):
        seeds = list(range(first, first + 50))
        for out in decode(base, [prompt] * 50, drafters=drafter, gates=gate, seeds=seeds, **how):
            seen_VVV[tuple(out.tokens)] += 1
            depths.add(sum(out.stats.offered_by_depth) / out.steps)
    assert (len(depths) > 2) == (reads is not None)
    assert int((runs * joint_VVV > 5).sum()) > 20
    assert chi_square(seen_VVV, joint_VVV) > 1e-3
