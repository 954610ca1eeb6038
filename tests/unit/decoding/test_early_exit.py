"""Early exit against Hugging Face's own hidden states, and its promise that no block runs twice for a token."""

import functools
import itertools
import math
import random

import pytest
import torch

from draftsmith.contracts import BaseSpec, Needs
from draftsmith.decoding.drafters.early_exit import EarlyExit, EarlyExitConfig, best_exit, path_of
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.gates import Fixed
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import by_widths, chain, from_paths
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import State

LAYERS = 4
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]  # longer than the tests' sliding window
BUSHY = from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 1, 0], [0, 1, 2]])
SHAPES = {"chain": chain(6), "tree": by_widths([2, 2, 1]), "dynamic": ByProbability(4, 4, 3)}
families = pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@torch.no_grad()
def slow_logits(base, text, layer):
    """[T, V] of the exit after `layer` blocks, by one whole forward without K/V; None: after all."""
    out = base.model(torch.tensor([list(text)]), use_cache=False, output_hidden_states=True)
    return out.logits[0] if layer is None else base._head(base._norm(out.hidden_states[layer]))[0]


def drafter_of(base, **settings):
    return EarlyExit(EarlyExitConfig(**settings), base.spec)


@pytest.fixture(scope="module")
def sharp(tiny_base):
    """A base that is surer of itself, so that a dynamic tree goes deep and leaves out what it drafted."""

    @functools.cache
    def of(family):
        base = tiny_base.__wrapped__(family, num_hidden_layers=LAYERS)
        with torch.no_grad():
            base.lm_head_weight.mul_(5)
        return base

    return of


@torch.no_grad()
def propose(drafter, base, text, shape, gate=None):
    kv = base.new_kv()
    seen = base.capture(drafter.needs, torch.tensor([text[:-1]]), kv=kv)
    return drafter.propose(base, State(list(text), text[-1], seen, shape, kv=kv, gate=gate)), kv


@families
@pytest.mark.parametrize("layer", [1, 3])
def test_a_chain_is_the_exits_greedy_continuation(tiny_base, family, layer):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    for length in (2, len(TEXT)):
        drafter = drafter_of(base, layers=[layer], depth=5, min_depth=5)
        proposal, kv = propose(drafter, base, TEXT[:length], chain(5))
        want = TEXT[:length]
        for _ in range(5):
            want = [*want, int(slow_logits(base, want, layer)[-1].argmax())]
        assert proposal.tokens_N.tolist() == want[length - 1 :]
        assert kv._lengths == [length - 1 + 6] * layer + [length - 1] * (LAYERS - layer)


@families
def test_a_tree_holds_each_nodes_own_next_tokens_and_states(tiny_base, family):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    proposal, _ = propose(drafter_of(base, layers=[2], depth=3, min_depth=3), base, TEXT, BUSHY)
    paths = [TEXT]
    for n, (parent, rank) in enumerate(zip(BUSHY.parents_N.tolist(), BUSHY.ranks_N.tolist(), strict=True)):
        if n:
            order = slow_logits(base, paths[parent], 2)[-1].argsort(descending=True)
            assert int(proposal.tokens_N[n]) == int(order[rank]), f"node {n}"
            paths.append([*paths[parent], int(order[rank])])
    layer, hidden_1ND = proposal.entered
    assert layer == 2
    for n, path in enumerate(paths):
        want = base.model(torch.tensor([path]), use_cache=False, output_hidden_states=True).hidden_states[2][0, -1]
        torch.testing.assert_close(hidden_1ND[0, n], want, rtol=1e-4, atol=1e-4)


@every_shape
def test_no_block_of_the_base_runs_twice_for_a_token(sharp, shape):
    """Tokens through every block: those of the prompt, and each node of each proposal, once; a dynamic tree also drafts
    nodes that it leaves out, which the upper blocks never see."""
    base = sharp("llama")
    passed, proposals = [0] * LAYERS, []
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: passed.__setitem__(i, passed[i] + out.shape[1]))
        for i, layer in enumerate(base._layers)
    ]
    drafter = drafter_of(base, layers=[2], min_depth=2)
    generate(base, TEXT, drafter=drafter, shape=shape, max_new_tokens=20, watch=lambda p, v: proposals.append(p))
    for hook in hooks:
        hook.remove()
    once = len(TEXT) + sum(len(p.tokens_N) for p in proposals)
    assert passed[2:] == [once] * 2
    assert passed[0] == passed[1]
    assert passed[0] > once if isinstance(shape, ByProbability) else passed[0] == once


def slow_rates(base, prompt, text, decay):
    """Every exit's hits at each position that was read before the newest token, the last weighing 1."""
    looked_at = math.ceil(math.log(0.01) / math.log(decay))
    best = slow_logits(base, text[:-1], None).argmax(-1).tolist()
    rates = {}
    for layer in range(1, LAYERS):
        said = slow_logits(base, text[:-1], layer).argmax(-1).tolist()
        hits = weight = 0.0
        for at in range(max(0, len(prompt) - looked_at), len(text) - 1):
            hits, weight = decay * hits + (said[at] == best[at]), decay * weight + 1
        rates[layer] = hits / weight
    return rates


@every_shape
@pytest.mark.parametrize(("family", "decay"), [("llama", 0.95), ("mistral", 0.6)])
def test_rates_are_those_of_the_whole_text_whatever_was_entered(sharp, family, shape, decay):
    base, told = sharp(family), []
    drafter = drafter_of(base, decay=decay)
    inner, choices = drafter.propose, itertools.cycle([(1, 2), (3, 1), (2, 2), (1, 0), (2, 1)])

    def propose_and_tell(base, state):
        proposal = inner(base, state)
        told.append((list(state.tokens), drafter.rates))
        return proposal

    drafter.propose, drafter.choose = propose_and_tell, lambda limit: next(choices)
    generate(base, TEXT, drafter=drafter, shape=shape, max_new_tokens=25)
    assert len(told) > 8
    for text, rates in told:
        assert rates == pytest.approx(slow_rates(base, TEXT, text, decay))


def test_of_a_long_prompt_the_last_positions_count(tiny_base):
    base, rng = tiny_base(num_hidden_layers=LAYERS), random.Random(0)
    text, drafter = [rng.randrange(60) for _ in range(60)], drafter_of(base, decay=0.8)
    propose(drafter, base, text, chain(2))
    assert drafter.rates == pytest.approx(slow_rates(base, text[:-1], text, 0.8))  # 21 positions of 59


def tame(tiny_base, layers):
    """A base of its own whose blocks `layers` add next to nothing."""
    base = tiny_base.__wrapped__("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in layers:
            for name, weight in base.block_weights(layer).items():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(1e-4)
    return base


def test_it_finds_the_exit_after_which_the_base_changes_nothing(tiny_base):
    for exit_layer in (1, 2, 3):
        base, proposals = tame(tiny_base, range(exit_layer, LAYERS)), []
        told = {"max_new_tokens": 40, "watch": lambda p, v: proposals.append(p)}  # noqa: B023
        out = generate(base, TEXT, drafter=drafter_of(base, depth=5), **told)
        assert out.tokens == generate(base, TEXT, max_new_tokens=40).tokens
        assert {(p.entered[0], len(p.tokens_N)) for p in proposals} == {(exit_layer, 6)}
        assert out.tokens_per_step > 5


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_has_the_most_tokens_per_forward(seed):
    rng = random.Random(seed)
    rates = {layer: rng.random() for layer in range(1, 8)}
    rates[3] = 1.0 if seed == 0 else rates[3]
    worth = {}
    for k in range(7):
        for layer, a in rates.items():
            tokens = k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)
            worth[layer, k] = tokens / (k * layer / 8 + 1)
    layer, k = best_exit(rates, range(7), 8)
    assert worth[layer, k] == pytest.approx(max(worth.values()))


def test_choices_worked_out_by_hand():
    assert best_exit({2: 0.5}, range(5), 4) == (2, 0)  # a draft costs half a forward and is right half the time
    assert best_exit({2: 0.6}, range(5), 4) == (2, 1)  # 1.6 / 1.5 > 1.96 / 2
    assert best_exit({1: 1.0, 2: 1.0}, range(5), 4) == (1, 4)
    assert best_exit({1: 0.3, 3: 0.9}, range(5), 4) == (3, 1)  # 1.9 / 1.75 beats 1.3 / 1.25 and 2.71 / 2.5
    assert best_exit({1: 0.0, 3: 0.0}, range(1, 5), 4) == (1, 1)  # min_depth=1


def test_a_step_is_plain_where_no_exit_pays(tiny_base):
    base = tiny_base(num_hidden_layers=LAYERS)
    drafter = drafter_of(base)
    drafter.choose = lambda limit: (1, 0)
    proposal, kv = propose(drafter, base, TEXT, chain(6))
    assert (proposal.tokens_N.tolist(), proposal.entered) == (TEXT[-1:], None)
    assert kv._lengths == [len(TEXT) - 1] * LAYERS


def test_depths_keep_to_config_shape_and_gate(tiny_base):
    base = tame(tiny_base, range(1, LAYERS))
    for shape, depth, gate, nodes in [
        (chain(6), 4, None, 5),
        (chain(3), 6, None, 4),
        (by_widths([2, 2, 2]), 2, None, 7),
        (ByProbability(9, 6, 2), 1, None, 3),
        (chain(6), 6, Fixed(2), 3),
        (chain(0), 6, None, 1),
    ]:
        proposal, _ = propose(drafter_of(base, depth=depth), base, TEXT, shape, gate)
        assert len(proposal.tokens_N) == nodes


def test_a_path_is_found_among_equal_siblings():
    tokens, parents = [7, 1, 1, 2, 5, 5, 1], [-1, 0, 0, 0, 2, 3, 5]
    assert path_of(tokens, parents, [7]) == [0]
    assert path_of(tokens, parents, [7, 1]) == [0, 1]
    assert path_of(tokens, parents, [7, 1, 5]) == [0, 2, 4]  # the second of the equal ones goes on
    assert path_of(tokens, parents, [7, 2, 5, 1]) == [0, 3, 5, 6]
    assert path_of(tokens, parents, [7, 3]) is None
    assert path_of(tokens, parents, [1]) is None


@families
@every_shape
def test_lossless_in_the_engine(tiny_base, family, shape):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    plain = [generate(base, text, max_new_tokens=16).tokens for text in (TEXT, TEXT[:3])]
    told = {"shape": shape, "max_new_tokens": 16}
    assert generate(base, TEXT, drafter=drafter_of(base, min_depth=1), **told).tokens == plain[0]
    drafters = [drafter_of(base, min_depth=1) for _ in range(2)]
    out = decode(base, [TEXT, TEXT[:3]], drafters=drafters, **told)
    assert [g.tokens for g in out] == plain


@pytest.mark.parametrize("drafts", ["best", "iid", "distinct"])
def test_a_temperature(tiny_base, drafts):
    base, told = tiny_base(num_hidden_layers=LAYERS), {"max_new_tokens": 20, "rules": Rules(Warp(0.7), drafts)}
    out = generate(base, TEXT, drafter=drafter_of(base, min_depth=1), shape=by_widths([2, 2]), **told)
    assert len(out.tokens) == 20
    if drafts == "best":
        assert out.tokens == generate(base, TEXT, **told).tokens


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("layers", {"layers": []}),
        ("layers", {"layers": [0, 1]}),
        ("depth", {"depth": 0}),
        ("min_depth", {"min_depth": 7}),
        ("decay", {"decay": 1.0}),
    ],
)
def test_a_bad_config_names_its_field(field, settings):
    with pytest.raises(ConfigError, match=f"early_exit.{field}"):
        EarlyExitConfig(**settings)


def test_a_base_that_it_does_not_fit_is_refused():
    def spec(layers):
        return BaseSpec("llama", 8, 8, 8, layers, 1, 1, 8, 64)

    with pytest.raises(ConfigError, match="one block"):
        EarlyExit(EarlyExitConfig(), spec(1))
    with pytest.raises(ConfigError, match=r"early_exit\.layers"):
        EarlyExit(EarlyExitConfig(layers=[1, 4]), spec(4))
    assert EarlyExit(EarlyExitConfig(), spec(4)).needs == Needs(frozenset({1, 2, 3}), final=True)
