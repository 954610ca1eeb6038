"""Who stands beside a head: as the config says and the base allows, with what they were told and what was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.decoding import company, tree
from draftsmith.decoding.company import COMPANY, BaselinesConfig, beside
from draftsmith.decoding.drafters.early_exit import EarlyExitConfig
from draftsmith.decoding.drafters.layer_skip import LayerSkipConfig, select
from draftsmith.decoding.drafters.ngram import NGramConfig
from draftsmith.decoding.drafters.token_recycling import TokenRecyclingConfig
from draftsmith.decoding.engine import generate
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.policies.dyspec import DySpec
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import TreeConfig, TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import State

ALL = BaselinesConfig(
    token_recycling=TokenRecyclingConfig(),
    ngram=NGramConfig(),
    layer_skip=LayerSkipConfig(),
    early_exit=EarlyExitConfig(),
)
PROMPTS = [[5, 6, 7, 8], [9, 10]]
DRAFT_MODEL: Any = object()


def around(base: Any, told: BaselinesConfig = ALL, asked: TreeConfig | None = None, **changes: Any) -> Any:
    given = {"deepest": 3, "draft_model": DRAFT_MODEL, **changes}
    return beside(base, told, (asked or TreeConfig()).shape, PROMPTS, **given)


def test_everybody_is_there_and_named(tiny_base: Any) -> None:
    found, _ = around(tiny_base())
    assert tuple(found) == COMPANY


def test_by_default_two_are(tiny_base: Any) -> None:
    assert list(around(tiny_base(), BaselinesConfig(), draft_model=None)[0]) == ["prompt_lookup", "oracle"]


@pytest.mark.parametrize("name", ["prompt_lookup", "token_recycling", "ngram", "layer_skip", "early_exit"])
def test_null_leaves_one_out(tiny_base: Any, name: str) -> None:
    found, chosen = around(tiny_base(), replace(ALL, **{name: None}))
    assert list(found) == [other for other in COMPANY if other != name]
    assert set(chosen) == {"layer_skip"} - {name}


def test_of_a_base_of_one_block_nothing_can_be_left_out(tiny_base: Any) -> None:
    found, chosen = around(tiny_base(num_hidden_layers=1))
    assert list(found) == [name for name in COMPANY if name not in ("layer_skip", "early_exit")]
    assert chosen == {}


def test_without_a_companion_and_where_the_text_is_not_known(tiny_base: Any) -> None:
    found, _ = around(tiny_base(), deepest=None, draft_model=None)
    assert "oracle" not in found
    assert "draft_model" not in found


def test_the_draft_model_drafts_a_chain_of_its_own(tiny_base: Any) -> None:
    found, _ = around(tiny_base(), replace(ALL, draft_depth=5), TreeConfig(depth=2))
    assert found["draft_model"].make([1], [2]) is DRAFT_MODEL
    assert found["draft_model"].shape.depth == 5


@pytest.mark.parametrize(("asked", "deepest", "depth"), [(None, 3, 3), (6, 3, 6), (None, 0, 1)])
def test_the_oracle_was_told_the_text(tiny_base: Any, asked: int | None, deepest: int, depth: int) -> None:
    found, _ = around(tiny_base(), replace(ALL, oracle_depth=asked), deepest=deepest)
    drafter = found["oracle"].make([5, 6], [1, 2, 3, 4, 7, 8, 9])
    state = State([5, 6, 1], 1, Capture(), tree.chain(drafter.max_depth))
    assert drafter.propose(tiny_base(), state).tokens_N.tolist() == [1, 2, 3, 4, 7, 8, 9][: depth + 1]


def test_what_learns_from_a_text_begins_anew_with_every_prompt(tiny_base: Any) -> None:
    found, _ = around(tiny_base())
    for name, contender in found.items():
        one, other = (contender.make(prompt, [1, 2]) for prompt in PROMPTS)
        learns = name in ("token_recycling", "ngram", "early_exit", "oracle")
        assert (one is other) != learns, name
        assert type(one) is type(other)


def test_what_was_left_out_of_the_base_is_told(tiny_base: Any) -> None:
    base, config = tiny_base(num_hidden_layers=5), LayerSkipConfig(trials=6)
    found, chosen = around(base, replace(ALL, layer_skip=config))
    told = chosen["layer_skip"]
    assert told["skipped_blocks"] == list(select(base, PROMPTS, config))
    assert found["layer_skip"].make([1], []).skip == tuple(told["skipped_blocks"])
    assert told["selection_seconds"] > 0
    _, chosen = around(base, replace(ALL, layer_skip=LayerSkipConfig(skip=[3, 1])))
    assert chosen["layer_skip"]["skipped_blocks"] == [1, 3]


# Their trees


def shapes(base: Any, asked: TreeConfig | None = None, told: BaselinesConfig = ALL, **changes: Any) -> list[Any]:
    found, _ = around(base, told, asked, **changes)
    return [found[name].shape for name in ("token_recycling", "ngram")]


def test_where_nobody_asks_they_have_a_small_tree_of_their_own(tiny_base: Any) -> None:
    assert shapes(tiny_base(), told=replace(ALL, nodes=12)) == [ByProbability(12, 6), ByProbability(12, 4)]


def test_the_decodings_tree_is_theirs_as_far_as_they_go(tiny_base: Any) -> None:
    base, eagle = tiny_base(), TreeConfig(tree=TreeSpec("eagle2", nodes=20))
    assert shapes(base, eagle) == [ByProbability(20, 6), ByProbability(20, 4)]
    assert [s.depth for s in shapes(base, TreeConfig(depth=2))] == [2, 2]
    assert [s.depth for s in shapes(base, TreeConfig(depth=5))] == [5, 4]
    assert [s.depth for s in shapes(base, TreeConfig(tree=TreeSpec("beam", depth=9)))] == [6, 4]
    deep = TreeConfig(paths=[[0] * k for k in range(1, 8)])
    assert [s.depth for s in shapes(base, deep)] == [6, 4]


def test_a_tree_wider_than_their_candidates_is_not_theirs(tiny_base: Any) -> None:
    wide = TreeConfig(paths=[[0], [1], [7]])
    assert [s.nodes for s in shapes(tiny_base(), wide)] == [4, 4]
    narrow = replace(ALL, ngram=NGramConfig(candidates=7))
    assert shapes(tiny_base(), wide, narrow)[1] == ByProbability(8, 4)


@pytest.mark.parametrize(("draws", "kind"), [("iid", tree.TreeShape), ("distinct", DySpec), ("best", ByProbability)])
def test_their_own_tree_can_be_drawn_as_the_text_asks(tiny_base: Any, draws: Any, kind: type) -> None:
    base = tiny_base()
    found, _ = around(base, draws=draws)
    for name in ("token_recycling", "ngram"):
        contender, rules = found[name], Rules(Warp(1.0), draws)
        assert type(contender.shape) is kind
        drafter = contender.make(PROMPTS[0], [])
        out = generate(base, PROMPTS[0], drafter=drafter, shape=contender.shape, rules=rules, max_new_tokens=8)
        assert len(out.tokens) == 8


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="draft_depth=0: give at least 1"):
        BaselinesConfig(draft_depth=0)
    with pytest.raises(ConfigError, match="nodes=1: give at least 2"):
        BaselinesConfig(nodes=1)


def test_one_for_all_prompts() -> None:
    drafter: Any = torch.nn.Identity()
    assert company.always(drafter)([1], [2]) is drafter
