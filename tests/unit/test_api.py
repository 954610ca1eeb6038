"""The Python API's generate: what may be given, what is made of it, and that a text is the base's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith import api, generate
from draftsmith.contracts import Needs
from draftsmith.decoding import goodness
from draftsmith.decoding.policies.beam import Beam
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.errors import ConfigError, DataError
from draftsmith.heads.medusa import Medusa, MedusaConfig

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 7, 8, 9, 10]]
PROMPT = PROMPTS[0]
NEW = 14
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> Any:
    return tiny_base()


@pytest.fixture
def head(base: Any, noisy: Any) -> Medusa:
    own = Medusa(MedusaConfig(num_heads=3), base.spec)
    own.initialise(base)
    return noisy(own, 0.05).eval()


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trees that the engine was given."""
    seen, decode = [], api.decode

    def spied(*given: Any, shape: Any, **how: Any) -> Any:
        seen.append(shape)
        return decode(*given, shape=shape, **how)

    monkeypatch.setattr(api, "decode", spied)
    return seen


# Prompts


def test_one_prompt_in_every_form_is_one_text(base: Any) -> None:
    first = generate(base, PROMPT, max_new_tokens=NEW)
    assert len(first.tokens) == NEW
    assert (first.tokens_per_step, first.accepted_drafts_per_step, first.steps) == (1.0, 0.0, NEW - 1)
    for given in (tuple(PROMPT), torch.tensor(PROMPT), torch.tensor([PROMPT]), torch.tensor(PROMPT).numpy()):
        assert generate(base, given, max_new_tokens=NEW).tokens == first.tokens


@pytest.mark.parametrize("how", [{}, SAMPLED, {**SAMPLED, "drafts": "iid"}, {"tree": "eagle2"}], ids=str)
def test_a_batch_of_prompts_is_a_list_of_texts(base: Any, head: Medusa, how: dict[str, Any]) -> None:
    how = {"max_new_tokens": NEW, **how}
    together = generate(base, PROMPTS, head=head, **how)
    first = how.get("seed", 0)
    alone = [generate(base, p, head=head, **{**how, "seed": first + b}) for b, p in enumerate(PROMPTS)]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.stats.kept for g in together] == [g.stats.kept for g in alone]


def test_a_list_of_one_prompt_stays_a_list(base: Any) -> None:
    (one,) = generate(base, [PROMPT], max_new_tokens=NEW)
    assert one.tokens == generate(base, PROMPT, max_new_tokens=NEW).tokens
    assert len(generate(base, torch.tensor([[5, 6], [7, 8]]), max_new_tokens=2)) == 2


@pytest.mark.parametrize("given", ["text", [1.5], [["a"]], [[1], [True]], torch.tensor([0.5])])
def test_what_is_no_prompt(base: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match="input_ids: give token ids"):
        generate(base, given)


@pytest.mark.parametrize("given", [[], [[]], [PROMPT, []]])
def test_empty_prompts(base: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match="prompt: 0 tokens; give 1 to 160"):
        generate(base, given)


# Text


def test_greedy_text_is_the_bases_own_with_every_tree(base: Any, head: Medusa) -> None:
    plain = generate(base, PROMPT, max_new_tokens=NEW).tokens
    told: list[dict[str, Any]] = [
        {}, {"depth": 1}, {"paths": [[0], [1], [0, 0]]}, {"tree": "eagle2"}, {"tree": "beam"}, {"tree": "dyspec"},
        {"tree": "mc_sim_7b_63"}, {"drafts": "best"},
    ]  # fmt: skip
    for how in told:
        assert generate(base, PROMPT, head=head, max_new_tokens=NEW, **how).tokens == plain, how


def test_sampled_text_is_plain_decodings_where_drafts_are_chosen(base: Any, head: Medusa) -> None:
    plain = generate(base, PROMPT, **SAMPLED).tokens
    assert plain != generate(base, PROMPT, max_new_tokens=NEW).tokens
    assert plain != generate(base, PROMPT, **{**SAMPLED, "seed": 4}).tokens
    assert generate(base, PROMPT, head=head, **SAMPLED).tokens == plain
    assert generate(base, PROMPT, head=head, tree="eagle2", drafts="best", **SAMPLED).tokens == plain


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.6}], ids=str)
def test_top_k_and_top_p_cut_the_bases_distribution(base: Any, head: Medusa, cut: dict[str, Any]) -> None:
    """Every token is among those that are left after what stands before it, with and without a head; one token left
    is greedy decoding."""
    text = list(PROMPT)
    for token in generate(base, PROMPT, **SAMPLED, **cut).tokens:
        chances_V = base.capture(Needs(logits=True), torch.tensor([text])).logits[0, -1].double().softmax(-1)
        best_V, order_V = chances_V.sort(descending=True)
        kept = order_V[: cut.get("top_k")].tolist()
        if "top_p" in cut:
            mass = best_V[: len(kept)] / best_V[: len(kept)].sum()
            kept = [
                t for t, before in zip(kept, (mass.cumsum(0) - mass).tolist(), strict=True) if before < cut["top_p"]
            ]
        assert token in kept
        text.append(token)
    assert generate(base, PROMPT, head=head, **SAMPLED, **cut).tokens == text[len(PROMPT) :]
    greedy = generate(base, PROMPT, max_new_tokens=NEW).tokens
    one = {name: 1 if name == "top_k" else 1e-9 for name in cut}
    assert generate(base, PROMPT, head=head, **SAMPLED, **one).tokens == greedy


def test_drawn_drafts_repeat_with_the_seed_and_follow_the_distribution(base: Any, head: Medusa) -> None:
    one, again = (generate(base, PROMPT, head=head, drafts="iid", **SAMPLED).tokens for _ in range(2))
    assert one == again
    how: dict[str, Any] = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 3}
    seconds = {}
    for name, more in (("plain", {}), ("iid", {"head": head, "drafts": "iid"})):
        counts = torch.zeros(base.spec.vocab_size)
        for seed in range(100):
            counts[generate(base, PROMPT, seed=seed, **how, **more).tokens[1]] += 1
        seconds[name] = counts
    assert goodness.two_sample(seconds["plain"], seconds["iid"]) > 0.01


def test_typical_acceptance_keeps_more_and_is_for_sampled_text_alone(base: Any, head: Medusa) -> None:
    exact, typical = (generate(base, PROMPT, head=head, accept=a, **SAMPLED) for a in ("exact", "typical"))
    assert len(typical.tokens) == NEW
    assert typical.tokens_per_step > exact.tokens_per_step
    with pytest.raises(ConfigError, match=r"accept=typical: .*temperature above 0"):
        generate(base, PROMPT, head=head, accept="typical")
    with pytest.raises(ConfigError, match="accept='loose': choose exact"):
        generate(base, PROMPT, head=head, accept="loose", **SAMPLED)


# Trees


def test_the_tree_is_what_was_asked_for(base: Any, head: Medusa, shapes: list[Any]) -> None:
    for how in ({}, {"depth": 2}, {"paths": [[0], [1]]}, {"tree": "eagle2"}, {"tree": "beam"}, {"tree": "chain"}):
        generate(base, PROMPT, head=head, max_new_tokens=2, **how)  # type: ignore[arg-type]
    chain, two, paths, eagle2, beam, named = shapes
    assert [s.nodes for s in (chain, two, paths, named)] == [4, 3, 3, 4]
    assert (eagle2, beam) == (ByProbability(60, 3, 10), Beam(4, 3))
    generate(base, PROMPT, max_new_tokens=2)
    assert shapes[-1] is None


def test_a_tree_that_is_none_is_named(base: Any, head: Medusa) -> None:
    with pytest.raises(ConfigError, match="tree: no such choice 'eagel2'; did you mean 'eagle2'"):
        generate(base, PROMPT, head=head, tree="eagel2")
    with pytest.raises(ConfigError, match="set only one of them"):
        generate(base, PROMPT, head=head, tree="eagle2", depth=2)
    with pytest.raises(ConfigError, match="the tree is 4 deep and the drafter goes to 3"):
        generate(base, PROMPT, head=head, depth=4)
    with pytest.raises(ConfigError, match="tree=eagle2 takes the best tokens"):
        generate(base, PROMPT, head=head, tree="eagle2", drafts="iid", **SAMPLED)


def test_a_tuned_head_drafts_what_was_found_best_unless_told_otherwise(
    base: Any, head: Medusa, shapes: list[Any]
) -> None:
    head.said = {"tuned": {"tree": {"kind": "eagle2", "nodes": 9, "top_k": 4, "depth": 2}}}
    plain = generate(base, PROMPT, max_new_tokens=NEW).tokens
    for how in ({}, {"tree": "auto"}, {"depth": 1}, {"paths": [[0]]}, {"tree": "beam"}):
        assert generate(base, PROMPT, head=head, max_new_tokens=NEW, **how).tokens == plain  # type: ignore[arg-type]
    _, default, auto, depth, paths, named = shapes
    assert default == auto == ByProbability(9, 2, 4)
    assert (depth.nodes, paths.nodes, named) == (2, 2, Beam(4, 3))
    head.said = {"tuned": {"tree": {"kind": "eagle3"}}}
    with pytest.raises(DataError, match="kind='eagle3': choose"):
        generate(base, PROMPT, head=head)


# Company


def test_one_drafter_at_a_time(base: Any, head: Medusa, tiny_base: Any) -> None:
    with pytest.raises(ConfigError, match="head, draft: give one of them"):
        generate(base, PROMPT, head=head, draft=base)
    own = generate(base, PROMPTS, draft=tiny_base("llama", 3), max_new_tokens=NEW)
    assert [g.tokens for g in own] == [g.tokens for g in generate(base, PROMPTS, max_new_tokens=NEW)]
    right = generate(base, PROMPT, draft=base, max_new_tokens=NEW)
    assert right.tokens_per_step == api.DRAFTS + 1  # every draft is right
