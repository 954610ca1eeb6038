"""Kangaroo against loops, and its promise that no block of the base runs twice for a token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.contracts import BaseSpec, Batch, Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError
from draftsmith.heads.kangaroo import Kangaroo, KangarooConfig
from draftsmith.roles import Partial, State
from draftsmith.training.fit import new_head

MakeBatch = Callable[..., Batch]
LLAMA_7B = BaseSpec("llama", 4096, 11008, 32000, 32, 32, 32, 128, 4096)
LLAMA_13B = BaseSpec("llama", 5120, 13824, 32000, 40, 40, 40, 128, 4096)


@pytest.fixture(scope="module")
def deep(tiny_base: Any) -> Any:
    return tiny_base(num_hidden_layers=4)


def head_of(base: Any, noise: float = 0.0, **settings: Any) -> Kangaroo:
    head: Any = new_head(Kangaroo, KangarooConfig(**settings), "kangaroo", base, 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(noise * torch.randn(p.shape, generator=g))
    return head.eval()


def slow_logits(head: Kangaroo, base: Any, text: list[int]) -> Tensor:
    """[T, V]: every position from whole forwards, attention by loops over positions."""
    hidden = base.capture(head.needs, torch.tensor([text])).hidden[head.exit_layer][0].double()
    p = {k: v.double() for k, v in head.state_dict().items()}

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + head.spec.norm_eps).sqrt() * w

    size, half = head.spec.head_dim, head.spec.head_dim // 2
    turn = torch.tensor(head.spec.rope_frequencies, dtype=torch.float64)

    def rotated(x: Tensor, t: int) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * (t * turn).cos() - b * (t * turn).sin(), b * (t * turn).cos() + a * (t * turn).sin()], -1)

    x = norm(hidden, p["input_layernorm.weight"])
    q, k, v = ((x @ p[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, size)) for n in "qkv")
    group, rows = head.spec.num_heads // head.spec.num_kv_heads, []
    for t in range(len(text)):
        heads = []
        for h in range(head.spec.num_heads):
            scores = torch.stack([rotated(q[t, h], t) @ rotated(k[s, h // group], s) for s in range(t + 1)])
            heads.append((scores / size**0.5).softmax(0) @ v[: t + 1, h // group])
        rows.append(hidden[t] + p["self_attn.o_proj.weight"] @ torch.cat(heads))
    return norm(torch.stack(rows), p["norm.weight"]) @ base.lm_head_weight.double().T


def test_the_forward_is_the_papers(deep: Any) -> None:
    head, text = head_of(deep, 0.2, exit_layer=2), list(range(5, 17))
    hidden = deep.capture(head.needs, torch.tensor([text])).hidden[2]
    got, _ = head(deep, hidden, torch.arange(len(text))[None])
    torch.testing.assert_close(got[0].double(), slow_logits(head, deep, text), rtol=1e-4, atol=1e-4)


def test_11_5_an_adapter_that_adds_nothing_at_the_last_layer_is_the_base(tiny_base: Any) -> None:
    """§11.5: exit at L, the stream before the final norm, o_proj 0, norm = the base's: the base's own logits. With
    Hugging Face's hidden_states[-1], which is after the norm, it must not be."""
    base = tiny_base()
    norm_D = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5
    head = head_of(base, exit_layer=2)
    with torch.no_grad():
        head.self_attn.o_proj.weight.zero_()
        before, _ = base._norm.weight.clone(), base._norm.weight.copy_(norm_D)
        head.norm.weight.copy_(norm_D)
        seen = base.capture(Needs(frozenset({2}), final=True, logits=True), torch.tensor([[3, 1, 4, 1, 5]]))
        base._norm.weight.copy_(before)
    positions = torch.arange(5)[None]
    torch.testing.assert_close(head(base, seen.hidden[2], positions)[0], seen.logits, rtol=1e-5, atol=1e-5)
    assert (head(base, seen.final, positions)[0] - seen.logits).abs().max() > 0.1


@pytest.mark.parametrize(("threshold", "drafted"), [(0.0, 6), (1.5, 1)])
def test_11_10_the_threshold_bounds_the_draft(deep: Any, threshold: float, drafted: int, recording: Any) -> None:
    """§11.10: eta 0 drafts gamma tokens, eta above 1 a single one."""
    engine = recording(head_of(deep, 0.1, threshold=threshold))
    out = generate(deep, [7, 8, 9], drafter=engine, max_new_tokens=30)
    assert {len(p.tokens_N) - 1 for p in engine.proposals} == {drafted}
    assert out.tokens == generate(deep, [7, 8, 9], max_new_tokens=30).tokens


def test_drafting_stops_after_the_first_uncertain_token(deep: Any) -> None:
    head, text = head_of(deep, 0.1, threshold=0.0, start_from_base=True), [3, 1, 4, 1, 5, 9, 2]
    whole = propose(head, deep, text, tree.chain(6)).tokens_N.tolist()
    chances = slow_logits(head, deep, text[:-1] + whole)[len(text) - 1 :].softmax(-1).amax(-1)[:6].tolist()
    for eta in [0.0, *(c + d for c in chances for d in (-1e-3, 1e-3))]:
        careful = head_of(deep, 0.1, threshold=eta, start_from_base=True)
        first = next((i for i, c in enumerate(chances) if c < eta), 5)
        assert propose(careful, deep, text, tree.chain(6)).tokens_N.tolist() == whole[: first + 2]


class Never:
    """A gate that lets everything pass."""

    def stop(self, state: State, partial: Partial) -> bool:
        return False


def test_another_gate_takes_the_thresholds_place(deep: Any) -> None:
    careful, text = head_of(deep, 0.1, threshold=1.5), [3, 1, 4, 1, 5, 9, 2]
    assert len(propose(careful, deep, text, tree.chain(6)).tokens_N) == 2
    assert len(propose(careful, deep, text, tree.chain(6), Never()).tokens_N) == 7


@torch.no_grad()
def propose(head: Kangaroo, base: Any, text: list[int], shape: Any, gate: Any = None) -> Any:
    kv = base.new_kv()
    seen = base.capture(head.needs, torch.tensor([text[:-1]]), kv=kv)
    return head.propose(base, State(text, text[-1], seen, shape, kv, gate=gate))


def test_a_tree_holds_each_nodes_own_next_tokens(deep: Any) -> None:
    """Every node against a whole forward of its path."""
    head, text = head_of(deep, 0.3, threshold=0.0), [3, 1, 4, 1, 5, 9, 2]
    shape = tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 1, 0], [0, 1, 2], [2, 0, 1], [0, 1, 2, 0]])
    proposal = propose(head, deep, text, shape)
    paths = [text]
    for n, (parent, rank) in enumerate(zip(shape.parents_N.tolist(), shape.ranks_N.tolist(), strict=True)):
        if n:
            best = slow_logits(head, deep, paths[parent])[-1].argsort(descending=True)
            assert int(proposal.tokens_N[n]) == int(best[rank]), f"node {n}"
            paths.append([*paths[parent], int(best[rank])])
    layer, hidden_BND = proposal.entered
    for n, path in enumerate(paths):
        want = deep.capture(Needs(frozenset({layer})), torch.tensor([path])).hidden[layer][0, -1]
        torch.testing.assert_close(hidden_BND[0, n], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["chain", "tree"])
def test_no_block_of_the_base_runs_twice_for_a_token(deep: Any, form: str, recording: Any) -> None:
    """Tokens through every block: those of the prompt, and each node of each proposal, once."""
    passed = [0] * 4
    hooks = [
        layer.register_forward_hook(lambda m, args, out, i=i: passed.__setitem__(i, passed[i] + out.shape[1]))
        for i, layer in enumerate(deep._layers)
    ]
    engine = recording(head_of(deep, 0.1, exit_layer=1, threshold=0.3, start_from_base=True))
    shape = tree.chain(6) if form == "chain" else tree.by_widths([2, 2, 1])
    out = generate(deep, [7, 8, 9, 10], drafter=engine, shape=shape, max_new_tokens=40)
    for hook in hooks:
        hook.remove()
    assert passed == [4 + sum(len(p.tokens_N) for p in engine.proposals)] * 4
    assert out.tokens == generate(deep, [7, 8, 9, 10], max_new_tokens=40).tokens


def test_the_loss_is_the_cross_entropy_to_the_bases_own_distribution(base: Any, make_batch: MakeBatch) -> None:
    """Loops over positions of packed rows; §11.12: the label at t is x_{t+1}'s distribution, of the same document."""
    head, batch = head_of(base, 0.3, threshold=0.2, depth=3), make_batch()
    with torch.no_grad():
        agree(head, base, batch)
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    log_p = base.lm_head(seen.final).double().log_softmax(-1)
    hidden = seen.hidden[head.exit_layer]
    log_q = head(base, hidden, batch.positions_BT, batch.visible())[0].detach().double().log_softmax(-1)
    out = head.loss(base, seen, batch)
    loss = floor = overlap = positions = kept = right = count = 0.0
    rows, length = batch.tokens_BT.shape

    def counts(b: int, t: int) -> bool:
        if t + 1 >= length:
            return False
        same = batch.documents_BT[b, t] == batch.documents_BT[b, t + 1] >= 0
        return bool(same and batch.mask_BT[b, t + 1])

    for b in range(rows):
        for t in range(length - 1):
            if not counts(b, t):
                continue
            p, q = log_p[b, t].exp(), log_q[b, t].exp()
            loss -= float((p * log_q[b, t]).sum())
            floor -= float((p * log_p[b, t]).sum())
            overlap += float(torch.minimum(p, q).sum())
            right += int(log_q[b, t].argmax()) == int(batch.tokens_BT[b, t + 1])
            count += 1
            if batch.positions_BT[b, t] == 0:
                continue
            positions += 1
            for k in range(3):
                at = t + k
                if not counts(b, at) or batch.documents_BT[b, at] != batch.documents_BT[b, t]:
                    break
                if int(log_q[b, at].argmax()) != int(batch.tokens_BT[b, at + 1]):
                    break
                kept += 1
                if float(log_q[b, at].max().exp()) < 0.2:
                    break
    assert int(out.count) == int(batch.counts_K[1]) == count
    assert out.sum.item() == pytest.approx(loss, rel=1e-5)
    measured = {name: (float(a), float(n)) for name, (a, n) in out.metrics.items()}
    assert measured["floor"] == (pytest.approx(floor, rel=1e-5), count)
    assert measured["overlap/1"] == (pytest.approx(overlap, rel=1e-5), count)
    assert measured["top1/1"] == (right, count)
    assert measured["tokens_per_step"] == (positions + kept, positions)
    assert kept > 0


def agree(head: Kangaroo, base: Any, batch: Batch) -> None:
    """Two of three tokens become the one that the head expects after those before it."""
    for t in range(batch.tokens_BT.shape[1] - 1):
        seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
        logits, _ = head(base, seen.hidden[head.exit_layer], batch.positions_BT, batch.visible())
        if t % 3:
            batch.tokens_BT[:, t + 1] = logits[:, t].argmax(-1)


def test_11_38_one_batch_is_learned_down_to_the_bases_entropy(base: Any, make_batch: MakeBatch) -> None:
    """§11.16, §11.38: the floor of a soft label is the teacher's entropy."""
    head, batch = head_of(base), make_batch(rows=1)
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    optimizer, excess = torch.optim.AdamW(head.parameters(), lr=1e-2), []
    for _ in range(250):
        out = head.loss(base, seen, batch)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        excess.append(float((out.sum.detach() - out.metrics["floor"][0]) / out.count))
    assert min(excess) > -1e-5
    assert excess[-1] < 0.02 * excess[0]


def test_it_may_start_from_the_bases_attention(deep: Any) -> None:
    head = head_of(deep, exit_layer=2, start_from_base=True)
    want = deep.block_weights(1)
    assert all(torch.equal(p, want[name]) for name, p in head.named_parameters() if name != "norm.weight")
    torch.testing.assert_close(head.norm.weight, deep._norm.weight)
    plain = head_of(deep, exit_layer=2)
    assert not torch.equal(plain.self_attn.q_proj.weight, want["self_attn.q_proj.weight"])
    assert torch.equal(plain.norm.weight, torch.ones(32))


@pytest.mark.parametrize(("spec", "layer", "parameters"), [(LLAMA_7B, 2, 67_117_056), (LLAMA_13B, 3, 104_867_840)])
def test_11_35_parameters_of_the_paper(spec: BaseSpec, layer: int, parameters: int) -> None:
    with torch.device("meta"):
        head = Kangaroo(KangarooConfig(), spec)
    assert sum(p.numel() for p in head.parameters()) == parameters
    assert head.exit_layer == layer


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"exit_layer": 0}, "exit_layer=0"), ({"depth": 0}, "depth=0"), ({"threshold": -1.0}, "threshold=-1")],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        KangarooConfig(**settings)
    with pytest.raises(ConfigError, match="the base has 32 layers"):
        Kangaroo(KangarooConfig(exit_layer=33), LLAMA_7B)


def test_a_single_draft_leaves_nothing_to_stop(base: Any, make_batch: MakeBatch) -> None:
    head, batch = head_of(base, depth=1), make_batch()
    with pytest.raises(ConfigError, match="depth=1: drafts one token; there is nothing to stop"):
        head.drafted(base, base.capture(head.needs, batch.tokens_BT), batch)
