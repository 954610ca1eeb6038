"""One forward for everything: against Hugging Face's own, for every family of the table."""

import pytest
import torch

from draftsmith.base.families import FAMILIES
from draftsmith.contracts import BaseView, Batch, Needs
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.drafters.token_recycling import TokenRecycling, TokenRecyclingConfig
from draftsmith.decoding.engine import decode
from draftsmith.decoding.tree import by_widths
from draftsmith.errors import ConfigError, DataError

LOGITS = Needs(logits=True)


def visible(documents_BT):
    """The training mask of packed rows."""
    return Batch(documents_BT, documents_BT, documents_BT, documents_BT >= 0, torch.zeros(1)).visible()


def ids(rows, length, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference(base, tokens_BT):
    """Logits by the Hugging Face model's own forward, without a cache."""
    return base.model(tokens_BT, use_cache=False).logits


def logits(base, tokens_BT, **how):
    return base.capture(LOGITS, tokens_BT, **how).logits


def test_every_family_of_the_table_is_here(base_names, make_model):
    assert {make_model(name).config.model_type for name in base_names} == set(FAMILIES)


def test_plain_prompt(base, close):
    tokens = ids(2, 24)
    close(logits(base, tokens), reference(base, tokens))


def test_is_a_base_view(llama):
    view: BaseView = llama  # mypy compares the signatures; here only the names
    assert all(hasattr(view, name) for name in vars(BaseView) if not name.startswith("_"))
    assert llama.lm_head_weight.shape == (61, 32)
    assert llama.lm_head_bias is None


@pytest.mark.parametrize("chunks", [(23, 1), (10, 14), (10, 5, 1, 1, 7)])
def test_prefill_and_continuation(base, close, chunks):
    tokens, kv = ids(2, 24), base.new_kv(capacity=4)
    parts = [logits(base, chunk, kv=kv) for chunk in tokens.split(chunks, 1)]
    assert kv.length == 24
    close(torch.cat(parts, 1), reference(base, tokens))


PARENTS = [-1, 0, 0, 1, 1, 2, 4, 6, 6]


def tree():
    """(depth per node, ancestor-or-self mask) of PARENTS, by walking up."""
    seen = torch.zeros(len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node in range(len(PARENTS)):
        up = node
        while up >= 0:
            seen[node, up] = True
            up = PARENTS[up]
    return seen.sum(1) - 1, seen


def test_tree_paths_equal_their_own_causal_forward(base, close):
    prompt, nodes = ids(1, 13), ids(1, len(PARENTS), seed=2)
    depths, seen = tree()
    kv = base.new_kv()
    logits(base, prompt, kv=kv)
    mask = torch.cat([torch.ones(len(PARENTS), 13, dtype=torch.bool), seen], 1)[None]
    out = logits(base, nodes, positions_BQ=13 + depths[None], mask_BQS=mask, kv=kv)
    for node in range(len(PARENTS)):
        path = seen[node].nonzero()[:, 0]
        alone = reference(base, torch.cat([prompt, nodes[:, path]], 1))
        close(out[:, node], alone[:, -1])


def test_accepted_path_continues_as_if_read_in_order(base, close):
    prompt, nodes, rest = ids(1, 13), ids(1, len(PARENTS), seed=2), ids(1, 4, seed=3)
    depths, seen = tree()
    kv = base.new_kv()
    logits(base, prompt, kv=kv)
    mask = torch.cat([torch.ones(len(PARENTS), 13, dtype=torch.bool), seen], 1)[None]
    logits(base, nodes, positions_BQ=13 + depths[None], mask_BQS=mask, kv=kv)
    path = torch.tensor([0, 1, 4, 6, 8])
    kv.keep(13, path)
    assert kv.length == 18
    full = reference(base, torch.cat([prompt, nodes[:, path], rest], 1))
    close(logits(base, rest, kv=kv), full[:, -4:])


def test_hidden_layers_are_the_residual_stream(base, close):
    tokens, top = ids(2, 24), base.spec.num_layers
    needs = Needs(frozenset(range(top + 1)), final=True, logits=True)
    seen = base.capture(needs, tokens)
    with torch.no_grad():
        states = base.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(top):
        close(seen.hidden[layer], states[layer])
    close(seen.final, states[top])
    close(base.final_norm(seen.hidden[top]), seen.final)
    close(base.lm_head(seen.final), seen.logits)
    assert float((seen.hidden[top] - seen.final).abs().max()) > 1e-3


def test_keeps_only_what_is_needed(llama, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a block above the last needed one ran")

    monkeypatch.setattr(llama._layers[2], "forward", never)
    seen = llama.capture(Needs(frozenset({0, 2})), ids(1, 5))
    assert set(seen.hidden) == {0, 2}
    assert seen.final is None
    assert seen.logits is None
    with pytest.raises(AssertionError, match="ran"):
        llama.capture(Needs(final=True), ids(1, 5))


def test_a_layer_it_lacks_is_refused(llama):
    with pytest.raises(ConfigError, match=r"\[1, 4\] asked of a base with layers 0..3"):
        llama.capture(Needs(frozenset({1, 4})), ids(1, 5))


def test_packed_documents_equal_running_alone(base, close):
    lengths = [9, 11]
    tokens = ids(2, 24)
    documents = torch.tensor([0] * 9 + [1] * 11 + [-1] * 4).expand(2, 24)
    positions = torch.cat([torch.arange(n) for n in [*lengths, 4]]).expand(2, 24)
    out = logits(base, tokens, positions_BQ=positions, mask_BQS=visible(documents))
    assert bool(out.isfinite().all())
    for part, document in zip(out.split([9, 11, 4], 1), tokens.split([9, 11, 4], 1), strict=True):
        close(part, reference(base, document))


def test_batch_visible_slow_oracle():
    documents = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [3, 5, 5, 6, -1, -1, -1]])
    mask = visible(documents)
    for b, row in enumerate(documents.tolist()):
        for q, of_query in enumerate(row):
            for k, of_key in enumerate(row):
                assert bool(mask[b, q, k]) == (k <= q and of_query == of_key)


@pytest.mark.parametrize("cached", [False, True])
def test_two_halves_equal_one_run(base, close, cached):
    tokens, top = ids(2, 24), base.spec.num_layers
    kv = base.new_kv() if cached else None
    whole = base.capture(Needs(frozenset({0, top})), tokens)
    out, size = [], 8 if cached else 24
    for first in range(0, 24, size):
        chunk, positions = tokens[:, first : first + size], torch.arange(first, first + size)[None]
        lower = base.run_layers(base.enter(chunk, positions), 0, 2, positions_BQ=positions, kv=kv)
        if kv is not None:
            assert kv.get_seq_length(0) == kv.length + 8
        out.append(base.run_layers(lower, 2, top, positions_BQ=positions, kv=kv))
    close(torch.cat(out, 1), whole.hidden[top])


def test_lower_half_may_run_ahead(base, close):
    """Drafting with the first layers token by token, then the rest for all of them at once."""
    tokens, top = ids(1, 20), base.spec.num_layers
    kv = base.new_kv()
    logits(base, tokens[:, :12], kv=kv)
    ahead = [base.capture(Needs(frozenset({1})), tokens[:, t : t + 1], kv=kv).hidden[1] for t in range(12, 20)]
    assert (kv.get_seq_length(0), kv.length) == (20, 12)
    last = base.run_layers(torch.cat(ahead, 1), 1, top, positions_BQ=torch.arange(12, 20)[None], kv=kv)
    assert kv.length == 20
    close(base.lm_head(base.final_norm(last)), reference(base, tokens)[:, 12:])


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_reach_the_hidden_states(base, close, cached):
    tokens, positions = ids(1, 24), torch.arange(24)[None]
    hidden = base.capture(Needs(frozenset({1})), tokens).hidden[1].requires_grad_()
    kv = base.new_kv() if cached else None
    out = base.run_layers(hidden, 1, 3, positions_BQ=positions, kv=kv)
    if kv is not None:  # a later write must not spoil the graph of an earlier forward
        with torch.no_grad():
            base.run_layers(hidden[:, :2], 1, 3, positions_BQ=positions[:, :2] + 24, kv=kv)
    out[:, -1].square().sum().backward()
    assert float(hidden.grad[:, -1].abs().max()) > 0
    assert float(hidden.grad[:, -3].abs().max()) > 0
    assert all(parameter.grad is None for parameter in base.model.parameters())
    # against a finite difference along a random direction
    step = 1e-3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))

    def last(at):
        with torch.no_grad():
            return float(base.run_layers(at, 1, 3, positions_BQ=positions)[:, -1].square().sum())

    difference = (last(hidden + step) - last(hidden - step)) / 2
    assert float((hidden.grad * step).sum()) == pytest.approx(difference, rel=0.05, abs=2e-3)


def test_capture_needs_no_gradient_and_leaves_weights_alone(base):
    before = base.weights_sha256()
    assert not logits(base, ids(1, 9)).requires_grad
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.weights_sha256() == before


def test_weights_hash_sees_one_changed_number(make_model):
    from draftsmith.base.lm import BaseLM

    base = BaseLM(make_model("llama"))
    before = base.weights_sha256()
    base.model.model.norm.weight[3] += 1e-3
    assert base.weights_sha256() != before


def test_a_wrong_mask_is_refused(llama):
    square = torch.ones(1, 5, 5)
    for mask in (square, square.bool()[:, :, :4]):
        with pytest.raises(AssertionError, match="mask"):
            llama.capture(LOGITS, ids(1, 5), mask_BQS=mask)


def test_learned_positions_run_out_with_a_message(make_model):
    from draftsmith.base.lm import BaseLM

    with pytest.raises(DataError, match="97 tokens, but it has only 96 positions"):
        logits(BaseLM(make_model("opt")), ids(1, 97))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt"])
def test_a_forward_may_begin_between_blocks(tiny_base, family):
    """Block 0 first, the rest later from its residual stream: the same K/V and the same capture, no block twice."""
    base = tiny_base(family)
    prompt, new = ids(1, 9), ids(1, 4, seed=1)
    needs = Needs(frozenset({1, 2}), final=True)
    whole, parts = base.new_kv(), base.new_kv()
    for kv in (whole, parts):
        base.capture(needs, prompt, kv=kv)
    want = base.capture(needs, new, kv=whole)
    positions = torch.arange(9, 13)[None]
    early = base.capture(Needs(frozenset({1})), new, positions_BQ=positions, kv=parts).hidden[1]
    assert (parts.get_seq_length(0), parts.get_seq_length(1), parts.length) == (13, 9, 9)
    got = base.capture(needs, new, positions_BQ=positions, kv=parts, entered=(1, early))
    assert parts.length == 13
    for a, b in ((got.hidden[1], want.hidden[1]), (got.hidden[2], want.hidden[2]), (got.final, want.final)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # compiling takes tens of seconds
def test_compiled_blocks_give_the_same_tokens_for_chains_trees_and_batches(tiny_base):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7, 7, 7], list(range(20))]
    ways = [
        {},
        {"drafters": PromptLookup(PromptLookupConfig())},
        {"drafters": [TokenRecycling(TokenRecyclingConfig()) for _ in prompts], "shape": by_widths([2, 2, 1])},
    ]
    eager, compiled = tiny_base("llama"), tiny_base.__wrapped__("llama").compile()
    for way in ways:
        told = [[g.tokens for g in decode(base, prompts, max_new_tokens=24, **way)] for base in (eager, compiled)]
        assert told[0] == told[1]
    assert compiled.weights_sha256() == eager.weights_sha256()
    assert compiled.in_float64().dtype == torch.float64
