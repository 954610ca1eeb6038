from typing import Any

import pytest
import torch

from draftsmith.contracts import Capture
from draftsmith.heads.blocks import Attention, DecoderLayer, ResBlock, rotate, teacher


def test_a_reset_block_is_the_identity_bit_for_bit() -> None:
    torch.manual_seed(0)
    x, block = torch.randn(5, 8), ResBlock(8)
    assert not torch.equal(block(x), x)  # PyTorch's own init, bias included
    block.reset()
    assert torch.equal(block(x), x)


def test_it_adds_silu_of_a_linear_map() -> None:
    torch.manual_seed(0)
    block, x = ResBlock(4), torch.randn(3, 4)
    pre = x @ block.linear.weight.t() + block.linear.bias
    torch.testing.assert_close(block(x), x + pre * torch.sigmoid(pre))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_copied_block_is_the_bases_own(tiny_base, family: str) -> None:
    """The same residual stream comes out, whole and in pieces with K/V of its own."""
    base = tiny_base(family, max_position_embeddings=160)
    assert base.spec.llama_blocks
    layer = DecoderLayer(base.spec)
    layer.start_from(base.block_weights(1))
    x_BTD = torch.randn(2, 20, base.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3, 23)[None]
    want = base.run_layers(x_BTD, 1, 2, positions_BQ=positions)
    torch.testing.assert_close(layer(x_BTD, positions), want, rtol=1e-5, atol=1e-5)
    kv, parts = base.new_kv(1), []
    with torch.no_grad():
        for span in (slice(0, 7), slice(7, 8), slice(8, 20)):
            parts.append(layer(x_BTD[:, span], positions[:, span], None, kv))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-5, atol=1e-5)
    assert kv.length == 20


@pytest.mark.parametrize("family", ["gemma", "gpt_neox", "opt", "phi3"])
def test_other_families_say_that_their_blocks_are_not_llamas(tiny_base, family: str) -> None:
    base = tiny_base(family)
    assert not base.spec.llama_blocks
    with pytest.raises(AssertionError, match=family):
        base.block_weights(0)
    with torch.device("meta"):
        DecoderLayer(base.spec)  # a head has a block of its own there all the same


def test_a_mask_says_who_sees_whom(tiny_base) -> None:
    """Two documents in one sequence are two sequences; None is the causal mask."""
    torch.manual_seed(0)
    spec = tiny_base().spec
    attention, x = Attention(spec).double(), torch.randn(1, 9, spec.hidden_size, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    documents = torch.tensor([0] * 4 + [1] * 5)
    mask = (documents[:, None] == documents[None]).tril()[None]
    apart = torch.cat([attention(x[:, s], positions[:, s]) for s in (slice(0, 4), slice(4, 9))], 1)
    torch.testing.assert_close(attention(x, positions, mask), apart)


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_scaled_rope_is_the_bases_too(tiny_base, kind: str) -> None:
    """Llama 3.1 and others stretch their rotations; a copied block must turn as they do."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    base = tiny_base.__wrapped__(rope_parameters=rope)
    layer = DecoderLayer(base.spec)
    layer.start_from(base.block_weights(1))
    x_BTD = torch.randn(1, 60, base.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60)[None]
    want = base.run_layers(x_BTD, 1, 2, positions_BQ=positions)
    torch.testing.assert_close(layer(x_BTD, positions), want, rtol=1e-5, atol=1e-5)
    plain = DecoderLayer(tiny_base().spec)
    plain.start_from(base.block_weights(1))
    assert (plain(x_BTD, positions) - want).abs().max() > 1e-3


def test_rotation_is_relative_and_keeps_lengths() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = torch.tensor([[5]])
    score = (rotate(q, at + 3) * rotate(k, at)).sum()
    torch.testing.assert_close((rotate(q, at + 90) * rotate(k, at + 87)).sum(), score)
    assert abs(float((rotate(q, at + 91) * rotate(k, at + 87)).sum() - score)) > 1e-3
    torch.testing.assert_close(rotate(q, at).norm(), q.norm())


def test_a_block_runs_under_autocast_and_in_bf16(tiny_base) -> None:
    layer = DecoderLayer(tiny_base().spec)
    x = torch.randn(1, 5, 32)
    positions = torch.arange(5)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(x, positions)).all()
    assert layer.bfloat16()(x.bfloat16(), positions).dtype == torch.bfloat16


def test_a_store_teaches_where_it_kept_enough_and_the_base_elsewhere(tiny_base: Any) -> None:
    base = tiny_base("llama")
    final = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    ids, logits = torch.arange(24).view(2, 3, 4), torch.randn(2, 3, 4)
    rows, seen = torch.tensor([1, 4, 5]), Capture(final=final, likeliest=(ids, logits))
    for top_k in (3, 4):
        found = teacher(base, seen, rows, top_k)(1, 3)
        assert torch.equal(found[0], logits.view(6, 4)[[4, 5]])
        assert torch.equal(found[2], ids.view(6, 4)[[4, 5]])
    for top_k in (5, None):
        found = teacher(base, seen, rows, top_k)(1, 3)
        assert torch.equal(found[0], base.lm_head(final.view(6, 32)[[4, 5]]))
        assert found[1:] == (None,)
