"""Packed rows one document after the other: what a mask would give, through every family that can."""

from typing import Any

import torch

from draftsmith.base import attention
from draftsmith.base.attention import attend, spans_of
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Needs, visible

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, -1], [0] * 10, [0, 1, 1] + [-1] * 7])


def test_spans_are_the_documents() -> None:
    assert spans_of(DOCUMENTS) == [(0, 0, 3), (0, 3, 5), (0, 5, 9), (1, 0, 10), (2, 0, 1), (2, 1, 3)]
    assert spans_of(torch.full((2, 3), -1)) == []


def positions() -> torch.Tensor:
    found = torch.zeros_like(DOCUMENTS)
    for row, start, stop in spans_of(DOCUMENTS):
        found[row, start:stop] = torch.arange(stop - start)
    return found


def test_a_base_captures_by_document_what_it_captures_behind_a_mask(base: Any) -> None:
    """Every family of the table, in fp64; those whose blocks are not Llama's take the mask themselves."""
    base, real = base.in_float64(), DOCUMENTS >= 0
    tokens = torch.randint(0, base.spec.vocab_size, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))
    layers = frozenset(range(base.spec.num_layers + 1))
    told: dict[str, Any] = {"positions_BQ": positions()}
    masked = base.capture(Needs(layers, final=True), tokens, mask_BQS=visible(DOCUMENTS), **told)
    apart = base.capture(Needs(layers, final=True), tokens, documents_BQ=DOCUMENTS, **told)
    for layer in layers:
        torch.testing.assert_close(apart.hidden[layer][real], masked.hidden[layer][real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(apart.final[real], masked.final[real], rtol=1e-10, atol=1e-10)
    assert all(torch.isfinite(h).all() for h in apart.hidden.values())


def test_gradients_are_those_behind_the_mask() -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(3, 4, 10, 8), (3, 2, 10, 8), (3, 2, 10, 8)]
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    sides = [[t.clone().requires_grad_() for t in drawn] for _ in "ab"]
    out, _ = attend(None, *sides[0], None, spans=spans_of(DOCUMENTS), scaling=0.3)
    q, k, v = sides[1]
    mask = visible(DOCUMENTS)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    real = DOCUMENTS >= 0
    torch.testing.assert_close(out[real], want[real])
    assert not out[~real].any()
    out[real].square().sum().backward()
    want[real].square().sum().backward()
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_window_shorter_than_a_document_takes_the_mask(make_model: Any) -> None:
    base = BaseLM(make_model("mistral"))  # a window of 7
    assert base._spans(DOCUMENTS) is None
    assert base._spans(DOCUMENTS[2:]) == [(0, 0, 1), (0, 1, 3)]


def test_transformers_own_forward_and_generate_are_as_before(llama: Any, make_model: Any) -> None:
    """The attention that is found by name is plain sdpa for everybody else."""
    assert llama.model.config._attn_implementation == attention.NAME
    stock, ids = make_model("llama"), torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(2))
    assert stock.config._attn_implementation == "sdpa"
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    with torch.no_grad():
        assert torch.equal(llama.model(ids).logits, stock(ids).logits)
        how: dict[str, Any] = {"attention_mask": padded, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(llama.model.generate(ids, **how), stock.generate(ids, **how))
    assert BaseLM(stock).spec.config_sha256 == llama.spec.config_sha256
