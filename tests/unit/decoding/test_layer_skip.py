"""Layer skipping against Hugging Face's own forward, in which skipped blocks return what they were given."""

import itertools

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding.drafters.layer_skip import (
    LayerSkip,
    LayerSkipConfig,
    matches,
    pieces,
    select,
    trial_sets,
)
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.gates import Fixed
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.tree import by_widths, chain, from_paths
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.roles import State

LAYERS = 5
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]  # longer than the tests' sliding window
BUSHY = from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 1, 0], [0, 1, 2]])
families = pytest.mark.parametrize("family", ["llama", "mistral", "opt"])


@torch.no_grad()
def slow_logits(base, text, read, skip):
    """[V] after `text`, by one whole forward without K/V: its first `read` positions pass all blocks, the others not
    those of `skip`."""

    def past(module, args, kwargs, out):
        given = args[0] if args else kwargs["hidden_states"]
        return torch.cat([out[:, :read], given[:, read:]], 1)

    hooks = [base._layers[layer].register_forward_hook(past, with_kwargs=True) for layer in skip]
    logits = base.model(torch.tensor([text]), use_cache=False).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits


def greedy(base, text, read, skip):
    return int(slow_logits(base, text, read, skip).argmax())


@torch.no_grad()
def reading(base, text):
    """The base's K/V after all of a text but its last token, and a state there."""
    kv = base.new_kv()
    seen = base.capture(Needs(final=True), torch.tensor([text[:-1]]), kv=kv)
    return kv, seen


@torch.no_grad()
def propose(base, text, skip, shape, gate=None):
    kv, seen = reading(base, text)
    return LayerSkip(LayerSkipConfig(depth=8), skip).propose(
        base, State(list(text), text[-1], seen, shape, kv=kv, gate=gate)
    )


@families
@pytest.mark.parametrize("skip", [(2,), (1, 3), (0, 1, 4)])
def test_a_chain_is_the_skipping_bases_greedy_continuation(tiny_base, family, skip):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    differs = False
    for length in (2, 5, len(TEXT)):
        text = TEXT[:length]
        drafted = propose(base, text, skip, chain(5)).tokens_N.tolist()
        want = list(text)
        for _ in range(5):
            want.append(greedy(base, want, length - 1, skip))
        assert drafted == want[length - 1 :]
        differs = differs or drafted[1:] != generate(base, text, max_new_tokens=5).tokens
    assert differs  # it is not the base itself that drafts


@families
def test_a_tree_holds_each_nodes_own_next_tokens(tiny_base, family):
    base, skip = tiny_base(family, num_hidden_layers=LAYERS), (1, 3)
    proposal, paths = propose(base, TEXT, skip, BUSHY), [TEXT]
    for n, (parent, rank) in enumerate(zip(BUSHY.parents_N.tolist(), BUSHY.ranks_N.tolist(), strict=True)):
        if n:
            order = slow_logits(base, paths[parent], len(TEXT) - 1, skip).argsort(descending=True)
            assert int(proposal.tokens_N[n]) == int(order[rank]), f"node {n}"
            paths.append([*paths[parent], int(order[rank])])
    assert proposal.entered is None


@families
@pytest.mark.parametrize("shape", [chain(4), by_widths([2, 2])], ids=["chain", "tree"])
def test_the_bases_kv_is_as_it_was(tiny_base, family, shape):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    kv, seen = reading(base, TEXT)
    before, untouched = list(kv._lengths), kv.fork()
    LayerSkip(LayerSkipConfig(), (1, 2)).propose(base, State(list(TEXT), TEXT[-1], seen, shape, kv=kv))
    assert kv._lengths == before == [len(TEXT) - 1] * LAYERS
    next_TV = [base.capture(Needs(logits=True), torch.tensor([TEXT[-1:]]), kv=k).logits for k in (kv, untouched)]
    assert torch.equal(*next_TV)


def test_a_gate_ends_it(tiny_base):
    base = tiny_base(num_hidden_layers=LAYERS)
    assert len(propose(base, TEXT, (2,), chain(6), Fixed(2)).tokens_N) == 3


@pytest.mark.parametrize(
    ("skip", "kept"),
    [((), [(0, 5)]), ((2,), [(0, 2), (3, 5)]), ((0, 2, 4), [(1, 2), (3, 4)]), ((1, 2, 3, 4), [(0, 1)])],
)
def test_kept_blocks_run_in_runs_of_neighbours(skip, kept):
    assert pieces(skip, 5) == kept


@pytest.mark.parametrize("skip", [(5,), (0, 1, 2, 3, 4)])
def test_a_set_that_does_not_fit_the_base_is_refused(skip):
    with pytest.raises(ConfigError, match=r"layer_skip\.skip"):
        pieces(skip, 5)


@families
def test_matchness_is_the_share_of_equal_first_drafts(tiny_base, family):
    """By hand: the base's best token after every prefix, and the first token that would be drafted there."""
    base, sets = tiny_base(family, num_hidden_layers=LAYERS), [(2,), (1, 3), (1, 2, 3), (4,)]
    counts = []
    for skip in sets:
        hits = 0
        for length in range(1, len(TEXT) + 1):
            prefix = TEXT[:length]
            hits += greedy(base, prefix, length, ()) == greedy(base, prefix, length - 1, skip)
        counts.append(hits)
    assert matches(base, TEXT, sets) == counts
    assert len(set(counts)) > 1
    assert matches(base, TEXT, [()]) == [len(TEXT)]


def tame(tiny_base, harmless):
    """A base of its own whose blocks `harmless` add next to nothing."""
    base = tiny_base.__wrapped__("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for layer in harmless:
            for name, weight in base.block_weights(layer).items():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(1e-4)
    return base


def test_select_finds_the_blocks_that_do_nothing(tiny_base):
    for harmless in [(1, 2), (1, 3), (2, 3)]:
        base = tame(tiny_base, harmless)
        assert select(base, [TEXT, TEXT[::-1]], LayerSkipConfig(ratio=0.6)) == harmless
        out = generate(base, TEXT, drafter=LayerSkip(LayerSkipConfig(), harmless), max_new_tokens=30)
        assert out.tokens_per_step > 4


def test_of_equal_sets_that_which_skips_more_is_taken(tiny_base):
    assert select(tame(tiny_base, (1, 2, 3)), [TEXT], LayerSkipConfig(ratio=0.6)) == (1, 2, 3)
    assert select(tame(tiny_base, (1, 2, 3)), [TEXT], LayerSkipConfig(ratio=0.3)) == (1, 2)


def test_select_is_the_best_of_its_trials(tiny_base):
    base, config = tiny_base(num_hidden_layers=LAYERS), LayerSkipConfig(ratio=0.3)
    sets = trial_sets(LAYERS, config, torch.Generator().manual_seed(0))
    assert sets == [(1,), (2,), (3,), (1, 2), (1, 3), (2, 3)]
    hits = {s: sum(matches(base, text, [s])[0] for text in (TEXT, TEXT[::-1])) for s in sets}
    assert select(base, [TEXT, TEXT[::-1]], config) == max(sets, key=lambda s: (hits[s], len(s)))


def test_trials_are_different_sets_of_inner_blocks_and_a_seed_says_which():
    config = LayerSkipConfig(ratio=0.45, trials=20)

    def draw(seed):
        return trial_sets(12, config, torch.Generator().manual_seed(seed))

    sets = draw(0)
    assert len(sets) == len(set(sets)) == 20
    assert {len(s) for s in sets} == {4, 5}  # of ten inner blocks
    assert {layer for s in sets for layer in s} == set(range(1, 11))
    assert all(list(s) == sorted(s) for s in sets)
    assert draw(0) == sets != draw(1)
    every = trial_sets(12, LayerSkipConfig(ratio=0.1, trials=60), torch.Generator())
    assert sorted(every) == sorted(c for n in (1, 2) for c in itertools.combinations(range(1, 11), n))


def test_small_bases_and_given_blocks(tiny_base):
    """Of three blocks the inner one, of two the last, of one none."""
    assert select(tiny_base(num_hidden_layers=3), [TEXT], LayerSkipConfig()) == (1,)
    two = tiny_base()
    assert select(two, [TEXT], LayerSkipConfig()) == (1,)
    assert select(two, [], LayerSkipConfig(skip=[0])) == (0,)
    with pytest.raises(ConfigError, match="one block"):
        select(tiny_base(num_hidden_layers=1), [TEXT], LayerSkipConfig())
    with pytest.raises(ConfigError, match=r"layer_skip\.skip"):
        select(two, [TEXT], LayerSkipConfig(skip=[2]))
    with pytest.raises(ConfigError, match="there are none"):
        select(two, [[]], LayerSkipConfig())


@families
@pytest.mark.parametrize(
    "shape", [chain(4), by_widths([2, 2, 1]), ByProbability(6, 4, 3)], ids=["chain", "tree", "dynamic"]
)
def test_lossless_in_the_engine(tiny_base, family, shape):
    base = tiny_base(family, num_hidden_layers=LAYERS)
    drafter = LayerSkip(LayerSkipConfig(), (1, 3))
    plain = generate(base, TEXT, max_new_tokens=16).tokens
    assert generate(base, TEXT, drafter=drafter, shape=shape, max_new_tokens=16).tokens == plain
    short = generate(base, TEXT[:3], max_new_tokens=16).tokens
    out = decode(base, [TEXT, TEXT[:3]], drafters=drafter, shape=shape, max_new_tokens=16)
    assert [g.tokens for g in out] == [plain, short]


@pytest.mark.parametrize("drafts", ["best", "iid", "distinct"])
def test_a_temperature(tiny_base, drafts):
    base, told = tiny_base(num_hidden_layers=LAYERS), {"max_new_tokens": 20, "rules": Rules(Warp(0.7), drafts)}
    out = generate(base, TEXT, drafter=LayerSkip(LayerSkipConfig(), (1,)), shape=by_widths([2, 2]), **told)
    assert len(out.tokens) == 20
    if drafts == "best":
        assert out.tokens == generate(base, TEXT, **told).tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [("skip", []), ("skip", [1, 1]), ("skip", [-1]), ("ratio", 0.0), ("ratio", 1.2), ("trials", 0), ("depth", 0)],
)
def test_a_bad_config_names_its_field(field, value):
    with pytest.raises(ConfigError, match=f"layer_skip.{field}"):
        LayerSkipConfig(**{field: value})
