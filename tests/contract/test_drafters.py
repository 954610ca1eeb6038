"""What every drafter without training owes us. Drafters are found in src/decoding/drafters (conftest.py)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from draftsmith.contracts import Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.gates import Fixed
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.rules import Rules
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp

PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13, 11, 12, 13, 11, 12]]
COUNT = 40
SHAPES = {"static": tree.by_widths([2, 2]), "dynamic": ByProbability(6, 2, 3)}


@pytest.fixture(scope="module")
def base(tiny_base: Any) -> Any:
    return tiny_base()


@pytest.fixture(scope="module")
def answers(base: Any) -> dict[int, list[int]]:
    return {i: generate(base, prompt, max_new_tokens=COUNT).tokens for i, prompt in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def make(base: Any, answers: dict[int, list[int]], untrained: Any) -> Callable[[Any, int], Any]:
    """make(kind, prompt number): the drafter that is told the prompt and its answer."""
    texts = [*PROMPTS, *answers.values()]
    return lambda kind, i: untrained(kind, base, [*PROMPTS[i], *answers[i]], texts)


def test_every_module_holds_a_drafter(kinds: dict[str, list[Any]]) -> None:
    assert kinds
    assert [module for module, found in kinds.items() if not found] == []


def test_it_declares_itself(kind: Any, make: Any) -> None:
    assert dataclasses.is_dataclass(kind.Config)
    assert kind.Config.__dataclass_params__.frozen
    assert {type(kind.lossy), type(kind.gated), type(kind.runs_base)} == {bool}
    drafter = make(kind, 0)
    assert isinstance(drafter.needs, Needs)
    assert drafter.max_depth >= 1


@pytest.mark.parametrize("shape", [tree.chain(1), *SHAPES.values(), None], ids=["chain1", *SHAPES, "own"])
def test_what_it_proposes_is_a_tree_that_fits(kind: Any, shape: Any, base: Any, make: Any, recording: Any) -> None:
    drafted = 0
    for i, prompt in enumerate(PROMPTS):
        drafter = recording(make(kind, i))
        form = tree.chain(drafter.max_depth) if shape is None else shape
        generate(base, prompt, drafter=drafter, shape=form, max_new_tokens=COUNT)
        for tokens, proposal in zip(drafter.tokens, drafter.proposals, strict=True):
            ids, parents = proposal.tokens_N.tolist(), proposal.parents_N.tolist()
            assert len(ids) == len(parents)
            assert (ids[0], parents[0]) == (tokens[-1], -1)  # the root is the newest token
            assert all(0 <= parent < node for node, parent in enumerate(parents[1:], start=1))
            assert all(0 <= token < base.spec.vocab_size for token in ids)
            assert int(tree.depths(proposal.parents_N).max()) <= form.depth
            assert len(ids) <= form.nodes
            drafted += len(ids) - 1
    assert drafted > 20


def test_it_keeps_to_a_tree_cut_short_by_the_bases_last_positions(
    kind: Any, make: Any, base: Any, tiny_base: Any, recording: Any
) -> None:
    short = tiny_base(max_position_embeddings=24)  # the same weights: positions are rotations here
    for i, prompt in enumerate(PROMPTS):
        drafter = recording(make(kind, i))
        out = generate(short, prompt, drafter=drafter, max_new_tokens=COUNT)
        assert out.finish == "positions"
        assert out.tokens == generate(base, prompt, max_new_tokens=24 - len(prompt) + 1).tokens
        assert all(
            len(tokens) - 1 + int(tree.depths(p.parents_N).max()) < 24
            for tokens, p in zip(drafter.tokens, drafter.proposals, strict=True)
        )


@pytest.mark.parametrize("shape", [None, *SHAPES.values()], ids=["own", *SHAPES])
@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_greedy_decoding_returns_the_bases_own_tokens(
    exact_kind: Any, i: int, shape: Any, base: Any, make: Any, answers: Any
) -> None:
    out = generate(base, PROMPTS[i], drafter=make(exact_kind, i), shape=shape, max_new_tokens=COUNT)
    assert out.tokens == answers[i]


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_and_those_are_hugging_faces(i: int, base: Any, answers: Any) -> None:
    assert answers[i] == base.generate([PROMPTS[i]], max_new_tokens=COUNT)[0]


def test_rows_decoded_together_return_the_bases_own_tokens(exact_kind: Any, base: Any, make: Any, answers: Any) -> None:
    drafters = [make(exact_kind, i) for i in range(len(PROMPTS))]
    out = decode(base, PROMPTS, drafters=drafters, max_new_tokens=COUNT)
    assert [g.tokens for g in out] == list(answers.values())


def test_a_text_with_a_temperature_is_that_without_a_drafter(exact_kind: Any, base: Any, make: Any) -> None:
    """What is chosen, not drawn, has no part in chance."""
    for prompt, i in zip(PROMPTS, range(len(PROMPTS)), strict=True):
        plain, drafted = (
            generate(base, prompt, drafter=d, max_new_tokens=20, rules=Rules(Warp(0.8), "best"), seed=i)
            for d in (None, make(exact_kind, i))
        )
        assert drafted.tokens == plain.tokens


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bases_kv_holds_the_text_and_what_was_entered_of_the_proposal(
    kind: Any, shape: Any, base: Any, make: Any
) -> None:
    drafter, inner, asked = make(kind, 2), make(kind, 2).propose, []

    def propose(base: Any, state: Any) -> Any:
        start = len(state.tokens) - 1
        assert state.kv.length == start
        proposal = inner(base, state)
        layer = 0 if proposal.entered is None else proposal.entered[0]
        lengths = [state.kv.get_seq_length(i) for i in range(base.spec.num_layers)]
        nodes = len(proposal.tokens_N)
        assert lengths == [start + nodes if i < layer else start for i in range(base.spec.num_layers)]
        assert drafter.runs_base or layer == 0
        asked.append(proposal)
        return proposal

    drafter.propose = propose
    generate(base, PROMPTS[2], drafter=drafter, shape=shape, max_new_tokens=COUNT)
    assert asked


def test_a_gate_ends_its_drafts_if_it_is_gated(kind: Any, base: Any, make: Any) -> None:
    depths: set[int] = set()
    told = {"drafter": make(kind, 2), "gate": Fixed(1), "max_new_tokens": COUNT}
    if not kind.gated:
        with pytest.raises(ConfigError, match="gate"):
            generate(base, PROMPTS[2], **told)
        return
    generate(base, PROMPTS[2], **told, watch=lambda p, v: depths.add(int(tree.depths(p.parents_N).max())))
    assert depths <= {0, 1}


def test_the_same_again_is_the_same(kind: Any, base: Any, make: Any, recording: Any) -> None:
    runs = [recording(make(kind, 2)) for _ in range(2)]
    for drafter in runs:
        generate(base, PROMPTS[2], drafter=drafter, max_new_tokens=COUNT)
    first, second = ([p.tokens_N.tolist() for p in run.proposals] for run in runs)
    assert first == second
