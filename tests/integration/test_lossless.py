"""Decoding with heads returns the base's own greedy tokens, on every family of bases and whatever the weights.

Compared with the engine's plain decoding and with transformers' own `generate`, by equality and by the referee;
and the referee is shown two bad verifiers, which it must not let pass.
"""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch

from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Needs
from draftsmith.data.pack import collate
from draftsmith.data.rows import Row, Rows
from draftsmith.decoding import verify
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.engine import generate
from draftsmith.decoding.referee import BaselinesConfig, DecodingConfig, Referee
from draftsmith.heads.clover2 import Clover2
from draftsmith.heads.eagle3 import Eagle3
from draftsmith.heads.hydra import Hydra
from draftsmith.heads.kangaroo import Kangaroo
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.roles import Proposal
from draftsmith.training.fit import new_head

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gpt_neox", "opt"]
TREE = [[0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], list(range(20, 50))]
COUNT = 36


def referee(base: Any, rescore: Any, paths: list[list[int]] | None) -> Referee:
    return Referee(
        base,
        DecodingConfig(paths=paths, max_new_tokens=COUNT),
        BaselinesConfig(),
        base.eos_ids,
        lambda prompt: base.generate([list(prompt)], max_new_tokens=COUNT)[0],
        rescore,
        repeats=1,
    )


def evaluate(judge: Referee, drafters: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    return judge.evaluate({name: judge.contender(drafter) for name, drafter in drafters.items()}, prompts)


def medusa(base: Any) -> Medusa:
    """As training starts: every head says what the base would say next."""
    head = Medusa(MedusaConfig(num_heads=3), base.spec)
    head.initialise(base)
    return head


def trained(base: Any) -> Medusa:
    """Has learned the base's own answers to PROMPTS by heart, or nearly."""
    head, texts = medusa(base), [p + generate(base, p, max_new_tokens=COUNT).tokens for p in PROMPTS]
    rows = [Row("", text, [1] * len(text)) for text in texts]
    counted = torch.from_numpy(Rows.of(rows).counts(head.horizon).sum(0))
    batch = collate([[row] for row in rows], max(map(len, texts)), counted)
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(45):
        out = head.loss(base, seen, batch, measure=False)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
    return head


@pytest.fixture(scope="module")
def heads(noisy: Any) -> Any:
    """heads(base): three sets of weights. Leave them as they are."""
    return functools.cache(
        lambda base: {"initial": medusa(base), "random": noisy(medusa(base), 1.0), "trained": trained(base)}
    )


@pytest.fixture(scope="module")
def expected() -> Any:
    """expected(base): transformers' own answers to PROMPTS."""
    return functools.cache(lambda base: base.generate(PROMPTS, max_new_tokens=COUNT, batch_size=1))


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tiny_base: Any) -> BaseLM:
    return tiny_base(request.param)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])  # plain, windowed, windowed and capped
@pytest.mark.parametrize("paths", [None, TREE], ids=["chain", "tree"])
def test_the_referee_whatever_the_heads_weights(
    family: str, paths: Any, tiny_base: Any, heads: Any, rescorer: Any
) -> None:
    base = tiny_base(family)
    before = base.weights_sha256()
    found = evaluate(referee(base, rescorer(base), paths), heads(base), PROMPTS)
    nothing_else = {"prompts": 3, "tokens": 3 * COUNT, "mismatches": 0, "near_ties": 0, "ok": True}
    assert found["hf_generate"]["lossless"] == {**nothing_else, "against": ["hf_generate"]}
    for told in found["heads"].values():
        assert told["lossless"] == {**nothing_else, "against": ["autoregressive", "hf_generate"]}
        assert told["tokens_per_step"] == pytest.approx(1 + told["accepted_drafts_per_step"])
    taus = {name: told["tokens_per_step"] for name, told in found["heads"].items()}
    assert taus["trained"] > 1.9  # many drafts were right
    assert taus["random"] < 1.7  # most were not
    assert found["baselines"]["oracle"]["tokens_per_step"] > 3.9  # the text's end may cut its last draft
    assert base.weights_sha256() == before


@pytest.mark.parametrize("paths", [None, TREE], ids=["chain", "tree"])
def test_every_family_by_plain_equality(base: BaseLM, paths: Any, heads: Any, expected: Any) -> None:
    decoding = DecodingConfig(paths=paths)
    answers = expected(base)
    assert len({token for answer in answers for token in answer}) >= 15  # the bases have something to say
    if paths is None:
        assert [generate(base, p, max_new_tokens=COUNT).tokens for p in PROMPTS] == answers
    for head in heads(base).values():
        shape = decoding.shape(head.max_depth)
        assert [generate(base, p, drafter=head, shape=shape, max_new_tokens=COUNT).tokens for p in PROMPTS] == answers


@pytest.mark.parametrize("kind", [Kangaroo, Eagle3, Clover2, Hydra])
def test_every_family_with_heads_that_keep_keys_of_their_own(base: BaseLM, kind: Any, expected: Any) -> None:
    config = kind.Config(**({"prefix_layer": True} if kind is Hydra else {}))
    head: Any = new_head(kind, config, "head", base, 0).eval()
    shape = DecodingConfig(paths=TREE[:9]).shape(head.max_depth)
    out = generate(base, PROMPTS[1], drafter=head, shape=shape, max_new_tokens=COUNT)
    assert out.tokens == expected(base)[1]


@pytest.mark.parametrize("kind", [Kangaroo, Eagle3, Clover2, Hydra])
def test_a_text_that_outgrows_the_first_slots(kind: Any, tiny_base: Any) -> None:
    """K/V are made for 256 tokens and double; here within a step, with a tree, before the base's last position."""
    base = tiny_base(max_position_embeddings=290)
    config = kind.Config(**({"prefix_layer": True} if kind is Hydra else {}))
    head: Any = new_head(kind, config, "head", base, 0).eval()
    prompt = torch.randint(0, 60, (246,), generator=torch.Generator().manual_seed(0)).tolist()
    out = generate(base, prompt, drafter=head, shape=DecodingConfig(paths=TREE[:9]).shape(3), max_new_tokens=60)
    assert out.finish == "positions"
    assert out.tokens == generate(base, prompt, max_new_tokens=60).tokens


def test_the_first_end_of_text_ends_all_of_them_alike(base: BaseLM, heads: Any, expected: Any) -> None:
    for prompt, tokens in zip(PROMPTS, expected(base), strict=True):
        eos = frozenset({tokens[10]})
        cut = tokens[: tokens.index(tokens[10]) + 1]
        for head in (None, *heads(base).values()):
            shape = DecodingConfig(paths=TREE).shape(3) if head else None
            out = generate(base, prompt, drafter=head, shape=shape, max_new_tokens=COUNT, eos_ids=eos)
            assert (out.tokens, out.finish) == (cut, "eos")


class RightInTheLastBranch:
    """Three first drafts, two of them wrong, and the true text below the last: its nodes stand in slots far from
    their positions."""

    needs, max_depth = Needs(), 3

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def propose(self, base: Any, state: Any) -> Proposal:
        n = len(state.tokens)
        first, *below = [*self.text[n : n + 3], 0, 0, 0][:3]
        wrong = [(first + 1) % 60, (first + 2) % 60]
        return Proposal(torch.tensor([state.root, *wrong, first, *below]), torch.tensor([-1, 0, 0, 0, 3, 4]))


@pytest.mark.parametrize("window", [2, 3, 11])
def test_a_sliding_window_goes_by_positions_and_not_by_slots(window: int, tiny_base: Any, expected: Any) -> None:
    base = tiny_base("mistral", sliding_window=window)
    for prompt, answer in zip(PROMPTS, expected(base), strict=True):
        out = generate(base, prompt, drafter=RightInTheLastBranch(prompt + answer), max_new_tokens=COUNT - 3)
        assert out.tokens == answer[:-3]
        assert out.tokens_per_step == 4


# Bad verifiers


class Lenient(BaseLM):
    """Takes the second-best token where it is within `slack` of the best, but only when verifying drafts: plain
    decoding reads one position at a time and stays exact."""

    slack = 0.0
    swapped = 0

    def lm_head(self, final_BTD: torch.Tensor) -> torch.Tensor:
        logits = super().lm_head(final_BTD)
        if final_BTD.shape[1] == 1:
            return logits
        best = logits.topk(2, dim=-1)
        close = best.values[..., 0] - best.values[..., 1] <= self.slack
        self.swapped += int(close.sum())
        raised = best.values[..., 1] + close * 2 * self.slack
        return logits.scatter(-1, best.indices[..., 1:], raised[..., None])


def with_twins(base: BaseLM, relative: float) -> Lenient:
    """Every token v of the lower half has a twin v + 30 whose logit is lower by `relative` of itself."""
    twin = Lenient(copy.deepcopy(base.model))
    twin.lm_head_weight[30:] = twin.lm_head_weight[:30] * (1 - relative)
    return twin


def verdict_on(base: BaseLM, drafters: dict[str, Any], rescore: Any) -> Any:
    return evaluate(referee(base, rescore, None), drafters, PROMPTS[1:2])


def test_accepting_the_second_best_at_a_gap_of_a_thousandth_is_a_mismatch(tiny_base: Any, rescorer: Any) -> None:
    base = with_twins(tiny_base(), 4e-4)
    rescore = rescorer(base)
    two = rescore(PROMPTS[2]).topk(2).values
    assert float(two[0] - two[1]) == pytest.approx(1e-3, rel=0.3)
    honest = verdict_on(base, {"medusa": medusa(base)}, rescore)["heads"]["medusa"]["lossless"]
    assert (honest["ok"], honest["mismatches"], base.swapped) == (True, 0, 0)

    base.slack = 2e-3
    found = verdict_on(base, {"medusa": medusa(base)}, rescore)
    proof = found["heads"]["medusa"]["lossless"]
    assert base.swapped > 0
    assert proof["mismatches"] > 0
    assert not proof["ok"]
    assert found["hf_generate"]["lossless"]["ok"]  # plain decoding is still right: the verifier is to blame


def test_a_difference_within_rounding_is_a_near_tie_and_no_mismatch(tiny_base: Any, rescorer: Any) -> None:
    base = with_twins(tiny_base(), 5e-6)
    rescore = rescorer(base)
    base.slack = 1e-4
    proof = verdict_on(base, {"medusa": medusa(base)}, rescore)["heads"]["medusa"]["lossless"]
    assert base.swapped > 0
    assert proof["near_ties"] > 0
    assert proof["mismatches"] == 0
    assert not proof["ok"]  # that many in so few tokens are no rounding


def test_a_verifier_that_keeps_what_it_should_not_is_a_mismatch(
    tiny_base: Any, rescorer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, right = tiny_base(), verify.greedy

    def keeps_the_first_draft(proposal: Any, best_N: Any) -> Any:
        verdict = right(proposal, best_N)
        if verdict.accepted or len(proposal.tokens_N) < 2:
            return verdict
        return type(verdict)(torch.tensor([0, 1]), int(best_N[1]))

    rescore = rescorer(base)
    lookup = {"lookup": PromptLookup(PromptLookupConfig(depth=3))}
    assert verdict_on(base, lookup, rescore)["heads"]["lookup"]["lossless"]["ok"]
    monkeypatch.setattr(verify, "greedy", keeps_the_first_draft)
    proof = verdict_on(base, lookup, rescore)["heads"]["lookup"]["lossless"]
    assert proof["mismatches"] > 0
    assert not proof["ok"]


# Bookkeeping


@pytest.mark.parametrize("paths", [None, TREE], ids=["chain", "tree"])
def test_tokens_per_step_is_one_plus_the_products_of_acceptance(
    paths: Any, tiny_base: Any, heads: Any, recording: Any
) -> None:
    """By what the drafter saw happen from step to step, not by the engine's own counters."""
    base = tiny_base()
    for name, head in heads(base).items():
        drafter = recording(head)
        shape = DecodingConfig(paths=paths).shape(head.max_depth)
        out = generate(base, PROMPTS[1], drafter=drafter, shape=shape, max_new_tokens=120)
        accepted = drafter.accepted(out.stats)
        assert len(accepted) == out.steps
        reached = [sum(a >= depth for a in accepted) for depth in range(head.max_depth + 1)]
        rates = [now / before if before else 0.0 for before, now in itertools.pairwise(reached)]
        assert out.stats.acceptance_by_depth == rates
        product = tau = 1.0
        for rate in rates:
            product *= rate
            tau += product
        assert out.tokens_per_step == pytest.approx(tau)
        assert out.tokens_per_step == pytest.approx(1 + sum(accepted) / len(accepted))
        before_the_cut = 1 + sum(accepted) + len(accepted)
        assert out.stats.emitted == len(out.tokens) == 120 <= before_the_cut < 120 + head.max_depth + 1
        assert name != "trained" or set(accepted) == {0, 1, 2, 3}
