"""EAGLE-3: the training-time test is drafting, and the draft vocabulary is a window onto the base's."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.contracts import BaseSpec, Batch, Capture
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError
from draftsmith.heads.eagle3 import Eagle3, Eagle3Config, over_slots
from draftsmith.roles import State
from draftsmith.training.fit import new_head

MakeBatch = Callable[..., Batch]
LLAMA_3_8B = BaseSpec("llama", 4096, 14336, 128256, 32, 32, 8, 128, 8192)


@pytest.fixture(scope="module")
def exact(tiny_base: Any) -> Any:
    """Four layers, grouped K/V heads, fp64."""
    return tiny_base(num_hidden_layers=4).in_float64()


def head_of(base: Any, counts_V: Tensor | None = None, **settings: Any) -> Eagle3:
    """With lively weights everywhere."""
    head: Any = new_head(Eagle3, Eagle3Config(**settings), "eagle3", base, 0, counts_V)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=g))
    return head.eval().to(base.dtype)


def see(base: Any, head: Eagle3, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def one_row(tokens: list[int]) -> Batch:
    row = torch.tensor([tokens])
    shape = torch.zeros_like(row)
    return Batch(row, torch.arange(len(tokens))[None], shape, shape == 0, torch.full((9,), len(tokens)))


def test_11_25_teacher_forced_training_is_step_by_step_drafting(exact: Any) -> None:
    """§11.25: from every slot t, drafting the row's own tokens one by one with K/V gives the unrolled step's output,
    to 1e-10 in fp64; the row is the second document of its sequence."""
    head, depth = head_of(exact, depth=5), 5
    text = torch.randint(0, 60, (18,), generator=torch.Generator().manual_seed(1)).tolist()
    packed = Batch(
        torch.tensor([[9, 9, 9, 9, *text]]),
        torch.tensor([[0, 1, 2, 3, *range(18)]]),
        torch.tensor([[0] * 4 + [1] * 18]),
        torch.ones(1, 22, dtype=torch.bool),
        torch.ones(9),
    )
    with torch.no_grad():
        unrolled = [h[0, 4:] for h in head.unroll(exact, see(exact, head, packed), packed)]
        whole = exact.capture(head.needs, torch.tensor([text]))
        worst, compared = 0.0, 0
        for t in range(18 - depth - 1):
            kv = exact.new_kv(1)
            feature = head.fuse(whole.at(torch.arange(t + 1)))
            tokens, positions = torch.tensor([text[1 : t + 2]]), torch.arange(t + 1)[None]
            for s in range(depth):
                _, feature = head(exact, feature, tokens, positions, None, kv)
                worst = max(worst, float((feature[0, -1] - unrolled[s][t]).abs().max()))
                compared += 1
                feature, tokens, positions = feature[:, -1:], torch.tensor([[text[t + 2 + s]]]), positions[:, -1:] + 1
        assert compared == 60
        assert worst < 1e-10


def test_a_wrong_position_or_slot_would_show(exact: Any) -> None:
    """The check above can fail: without the own slots' keys, or one position off, the outputs differ."""
    head, batch = head_of(exact, depth=3), one_row(list(range(12)))
    with torch.no_grad():
        right = head.unroll(exact, see(exact, head, batch), batch)
        shifted = Batch(**{**vars(batch), "positions_BT": batch.positions_BT * 2})
        assert (head.unroll(exact, see(exact, head, batch), shifted)[1] - right[1]).abs().max() > 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_attention_over_slots_is_the_loop(steps: int) -> None:
    """Query t sees step 0's keys of its document up to t, and its own slot's of every later step."""
    g = torch.Generator().manual_seed(steps)
    q = torch.randn(2, 4, 7, 8, generator=g, dtype=torch.float64)
    past = [tuple(torch.randn(2, 2, 7, 8, generator=g, dtype=torch.float64) for _ in "kv") for _ in range(steps)]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [0] * 7])
    visible = (documents[:, :, None] == documents[:, None]).tril()
    got = over_slots(q, past, visible)  # type: ignore[arg-type]
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(7)).tolist():
        seen = [(past[0][0][b, h // 2, s], past[0][1][b, h // 2, s]) for s in range(t + 1) if visible[b, t, s]]
        seen += [(k[b, h // 2, t], v[b, h // 2, t]) for k, v in past[1:]]
        weights = torch.stack([q[b, h, t] @ k / math.sqrt(8) for k, _ in seen]).softmax(0)
        torch.testing.assert_close(got[b, h, t], sum(w * v for w, (_, v) in zip(weights, seen, strict=True)))


def test_11_23_the_draft_vocabulary(exact: Any) -> None:
    """§11.23: i + d2t[i] strictly ascending, t2d true there and nowhere else; the most often learned tokens."""
    counts_V = torch.zeros(60, dtype=torch.long)
    counts_V[[50, 3, 17, 8, 9]] = torch.tensor([9, 8, 7, 6, 6])
    head = head_of(exact, counts_V, draft_vocab_size=4)
    ids = (torch.arange(4) + head.d2t).tolist()
    assert ids == head.ids_V.tolist() == [3, 8, 17, 50]  # of equal counts the lower id
    assert head.t2d.nonzero().squeeze(1).tolist() == ids
    assert head.lm_head.weight.shape == (4, 32)
    whole = head_of(exact, counts_V, draft_vocab_size=32000)
    assert not whole.d2t.any()
    assert whole.t2d.all()
    assert whole.draft_vocab == 60


def test_drafted_tokens_are_the_bases_ids(exact: Any) -> None:
    counts_V = torch.arange(60).flip(0) % 7
    head, text = head_of(exact, counts_V, draft_vocab_size=9, depth=3), [3, 1, 4, 1, 5]
    state = State(text, text[-1], exact.capture(head.needs, torch.tensor([text[:-1]])), tree.by_widths([3, 2, 2]))
    proposal = head.propose(exact, state)
    assert set(proposal.tokens_N.tolist()[1:]) <= set(head.ids_V.tolist())


def slow_next(head: Eagle3, base: Any, text: list[int], path: list[int]) -> Tensor:
    """Logits after a drafted path below the root, without K/V: the layer over all slots, then one slot at a time,
    each with every key before it."""
    seen = base.capture(head.needs, torch.tensor([text[:-1]]))
    features, tokens = head.fuse(seen), text[1:]
    for token in [*path, None]:
        positions = torch.arange(len(tokens))[None]
        logits, out = head(base, features, torch.tensor([tokens]), positions)
        if token is not None:
            features, tokens = torch.cat([features, out[:, -1:]], 1), [*tokens, token]
    return logits[0, -1]


def test_a_tree_holds_each_nodes_own_next_tokens(exact: Any) -> None:
    head, text = head_of(exact, depth=4), [3, 1, 4, 1, 5, 9, 2]
    shape = tree.from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 1, 0], [0, 1, 2], [2, 0, 1], [0, 1, 2, 0]])
    with torch.no_grad():
        state = State(text, text[-1], exact.capture(head.needs, torch.tensor([text[:-1]])), shape)
        proposal, paths = head.propose(exact, state), [[]]
        for n, (parent, rank) in enumerate(zip(shape.parents_N.tolist(), shape.ranks_N.tolist(), strict=True)):
            if n:
                best = slow_next(head, exact, text, paths[parent]).argsort(descending=True)
                assert int(proposal.tokens_N[n]) == int(best[rank]), f"node {n}"
                paths.append([*paths[parent], int(best[rank])])
    assert state.head_kv is not None
    assert state.head_kv.length == len(text) - 1  # drafts are forgotten


def slow_loss(head: Eagle3, base: Any, seen: Capture, batch: Batch) -> dict[str, float]:
    """Loops over slots; the features are the module's own (tested above)."""
    unrolled, ids = head.unroll(base, seen, batch), head.ids_V
    found = dict.fromkeys(("loss", "floor", "starts", "kept", "dropped"), 0.0)
    rows, length = batch.tokens_BT.shape
    for b in range(rows):
        for t in range(length):
            in_a_row = True
            for s in range(head.config.depth):
                then = t + 2 + s
                if then >= length or not batch.documents_BT[b, t] == batch.documents_BT[b, then] >= 0:
                    break
                if not batch.mask_BT[b, then]:
                    in_a_row = False
                    continue
                found["starts"] += s == 0
                logits = base.lm_head(seen.final[b, t + 1 + s]).double()
                log_q = head.lm_head(head.norm(unrolled[s][b, t])).double().log_softmax(-1)
                in_a_row &= int(ids[log_q.argmax()]) == int(batch.tokens_BT[b, then])
                found["kept"] += in_a_row
                if int(logits.argmax()) not in ids:
                    found["dropped"] += 1
                    continue
                p = logits[ids].softmax(-1)
                found["loss"] -= 0.8**s * float((p * log_q).sum())
                found["floor"] -= 0.8**s * float((p * p.log()).sum())
    return found


def test_the_loss_is_the_papers(base: Any, make_batch: MakeBatch) -> None:
    """Packed documents, a mask with holes, and slots that the draft vocabulary drops but the count keeps."""
    head, batch = head_of(base, torch.arange(40), draft_vocab_size=25, depth=3), make_batch()
    with torch.no_grad():
        seen = see(base, head, batch)
        out, want = head.loss(base, seen, batch), slow_loss(head, base, seen, batch)
    assert want["dropped"] > 3
    assert out.sum.item() == pytest.approx(want["loss"], rel=1e-5)
    assert out.metrics["floor"][0].item() == pytest.approx(want["floor"], rel=1e-5)
    assert [int(t) for t in out.metrics["tokens_per_step"]] == [want["starts"] + want["kept"], want["starts"]]
    assert int(out.count) == int(batch.counts_K[2])


def test_11_21_the_steps_weights() -> None:
    """§11.21: sum of 0.8^s over seven steps."""
    config = Eagle3Config()
    assert sum(config.decay**s for s in range(config.depth)) == pytest.approx(3.9514, abs=5e-5)


def test_11_13_a_step_never_sees_its_own_target(exact: Any) -> None:
    """§11.12, §11.13: on x_t = t, step s at slot t has read x_{t+1+s} and aims at t + 2 + s; changing that changes
    nothing, changing what was read does."""
    head, text = head_of(exact, depth=3), list(range(20))
    with torch.no_grad():
        before = head.unroll(exact, see(exact, head, one_row(text)), one_row(text))
        for s in range(3):
            for changed, moves in ((5 + 2 + s, False), (5 + 1 + s, True)):
                other = one_row([*text[:changed], 59, *text[changed + 1 :]])
                after = head.unroll(exact, see(exact, head, other), other)
                assert (not torch.equal(after[s][0, 5], before[s][0, 5])) == moves


def test_11_38_one_batch_is_learned_down_to_the_bases_entropy(base: Any, make_batch: MakeBatch) -> None:
    """§11.16, §11.38. (Steps whose tokens a random row could not foretell are learned by heart.)"""
    batch = make_batch(rows=1)
    head: Any = new_head(Eagle3, Eagle3Config(depth=2), "eagle3", base, 0)
    seen = see(base, head, batch)
    optimizer, excess = torch.optim.AdamW(head.parameters(), lr=1e-2), []
    for _ in range(200):
        out = head.loss(base, seen, batch)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        excess.append(float((out.sum.detach() - out.metrics["floor"][0]) / out.count))
    assert min(excess) > -1e-5
    assert excess[-1] < 0.02 * excess[0]


def test_it_may_start_as_the_base(exact: Any) -> None:
    """The block above the last tap, the final norm and the lm_head's rows: the base's logits of the draft tokens."""
    config = Eagle3Config(start_from_base=True, draft_vocab_size=7)
    head: Any = new_head(Eagle3, config, "e", exact, 0, torch.arange(60)).double()
    assert head.layers == (1, 2, 3)
    text = torch.tensor([[3, 1, 4, 1, 5, 9]])
    seen = exact.capture(head.needs, text)
    logits, _ = head(exact, head.fuse(seen), text, torch.arange(6)[None])
    torch.testing.assert_close(logits, exact.lm_head(seen.final)[..., 53:], rtol=1e-5, atol=1e-5)
    published: Any = new_head(Eagle3, Eagle3Config(draft_vocab_size=7), "e", exact, 0, torch.arange(60)).double()
    assert (published(exact, published.fuse(seen), text, torch.arange(6)[None])[0] - logits).abs().max() > 0.1


def test_11_35_parameters_of_the_release() -> None:
    """Llama-3.1-8B with 32,000 draft tokens: 424,689,664."""
    with torch.device("meta"):
        head = Eagle3(Eagle3Config(), LLAMA_3_8B)
    assert sum(p.numel() for p in head.parameters()) == 424_689_664
    assert head.layers == (2, 16, 29)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"layers": [1]}, "give three"), ({"depth": 0}, "depth=0"), ({"draft_vocab_size": 0}, "draft_vocab_size=0")],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Eagle3Config(**settings)
    with pytest.raises(ConfigError, match=r"hidden states 0\.\.32"):
        Eagle3(Eagle3Config(layers=[1, 2, 33]), LLAMA_3_8B)


def test_a_single_draft_leaves_nothing_to_stop(base: Any, make_batch: MakeBatch) -> None:
    head, batch = head_of(base, depth=1), make_batch()
    with pytest.raises(ConfigError, match="depth=1: drafts one token; there is nothing to stop"):
        head.drafted(base, see(base, head, batch), batch)
