"""Medusa-2's loss spelled out, its schedules, and the adapter that leaves the base as it was."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.base.lm import BaseLM
from draftsmith.base.settings import LoraConfig
from draftsmith.contracts import Batch, Capture, Needs
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError, DataError
from draftsmith.heads.medusa import Medusa, MedusaConfig
from draftsmith.heads.medusa2 import Medusa2, Medusa2Config
from draftsmith.training.fit import new_adapter, new_head

MakeBatch = Callable[..., Batch]


@pytest.fixture
def adapted(tiny_base: Any) -> BaseLM:
    """A base of its own, with an adapter that has learned something."""
    base = tiny_base.__wrapped__()
    new_adapter(base, LoraConfig(rank=3, dropout=0.0), 0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in base.adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return base


def see(base: BaseLM, head: Medusa, batch: Batch) -> Capture:
    return base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())


def test_a_new_adapter_changes_nothing_and_the_hash_does_not_know_it(tiny_base: Any) -> None:
    base, plain = tiny_base.__wrapped__(), tiny_base()
    new_adapter(base, LoraConfig(rank=3), 0)
    tokens, wanted = torch.tensor([[3, 1, 4, 1, 5, 9]]), Needs(logits=True)
    assert torch.equal(base.capture(wanted, tokens).logits, plain.capture(wanted, tokens).logits)
    assert base.weights_sha256() == plain.weights_sha256()
    assert [n for n, p in base.model.named_parameters() if p.requires_grad and "lora_" not in n] == []
    assert {id(p) for p in base.adapter.parameters()} == {id(p) for p in base.model.parameters() if p.requires_grad}


def test_switched_off_it_is_the_original_base_bit_for_bit(adapted: BaseLM, tiny_base: Any) -> None:
    plain, tokens = tiny_base(), torch.tensor([[3, 1, 4, 1, 5, 9]])
    seen = adapted.capture(Needs(final=True, adapter=True, original=True), tokens)
    assert torch.equal(seen.original, plain.capture(Needs(final=True), tokens).final)
    assert not torch.allclose(seen.final, seen.original, atol=1e-2)
    assert seen.final.requires_grad
    assert not seen.original.requires_grad
    assert adapted.weights_sha256() == plain.weights_sha256()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_papers(adapted: BaseLM, make_batch: MakeBatch, share: float) -> None:
    """L_0 + 0.2 s sum_k 0.8^k CE_k, by loops; progress 0.25 of a linear schedule."""
    config = Medusa2Config(label_share=share, schedule="linear")
    head: Any = new_head(Medusa2, config, "medusa2", adapted, 0)
    stage1: Any = new_head(Medusa, MedusaConfig(), "medusa2", adapted, 0)
    head.progress, batch = 0.25, make_batch()
    with torch.no_grad():
        seen = see(adapted, head, batch)
        out, heads = head.loss(adapted, seen, batch), stage1.loss(adapted, seen, batch)
        log_q = adapted.lm_head(seen.final).double().log_softmax(-1)
        log_p = log_q if share == 1 else adapted.lm_head(seen.original).double().log_softmax(-1)
    first, floor, rows, length = 0.0, 0.0, *batch.tokens_BT.shape
    for b in range(rows):
        for t in range(length - 1):
            same = batch.documents_BT[b, t] == batch.documents_BT[b, t + 1] >= 0
            if not (same and batch.mask_BT[b, t + 1]):
                continue
            first -= share * float(log_q[b, t, batch.tokens_BT[b, t + 1]])
            first -= (1 - share) * float((log_p[b, t].exp() * log_q[b, t]).sum())
            floor -= (1 - share) * float((log_p[b, t].exp() * log_p[b, t]).sum())
    assert out.sum.item() == pytest.approx(first + 0.2 * 0.25 * heads.sum.item(), rel=1e-5)
    assert out.metrics["loss/0"][0].item() == pytest.approx(first, rel=1e-5)
    assert ("floor" in out.metrics) == (share < 1)
    if share < 1:
        assert out.metrics["floor"][0].item() == pytest.approx(floor, rel=1e-5)
        assert first > floor
    assert int(out.count) == int(heads.count)


def test_a_soft_capped_base_teaches_its_capped_distribution(tiny_base: Any, make_batch: MakeBatch) -> None:
    """Where the adapter is none at all yet, L_0 is at its floor, and its gradient zero."""
    base = tiny_base.__wrapped__("gemma2")
    new_adapter(base, LoraConfig(rank=3, dropout=0.0), 0)
    head: Any = new_head(Medusa2, Medusa2Config(heads_coefficient=0.0), "medusa2", base, 0)
    batch = make_batch()
    out = head.loss(base, see(base, head, batch), batch)
    out.sum.backward()
    assert out.sum.item() == pytest.approx(out.metrics["floor"][0].item(), rel=1e-5)
    assert max(float(p.grad.abs().max()) for p in base.adapter.parameters()) < 1e-3


def test_gradients_flow_through_the_base_into_its_adapter(adapted: BaseLM, make_batch: MakeBatch) -> None:
    """By the heads' part alone too: without L_0's share the adapter still learns what helps the heads."""
    head: Any = new_head(Medusa2, Medusa2Config(label_share=1.0), "medusa2", adapted, 0)
    batch = make_batch()
    seen = see(adapted, head, batch)
    Medusa.loss(head, adapted, seen, batch).sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapter.parameters())
    assert [n for n, p in adapted.model.named_parameters() if p.grad is not None and "lora_" not in n] == []


@pytest.mark.parametrize(
    ("schedule", "full_at", "want"),
    [
        ("constant", 1.0, [0.2, 0.2, 0.2]),
        ("linear", 1.0, [0.0, 0.1, 0.2]),
        ("linear", 0.5, [0.0, 0.2, 0.2]),
        ("sine", 1.0, [0.0, 0.2 * math.sin(math.pi / 4), 0.2]),
    ],
)
def test_schedules(schedule: str, full_at: float, want: list[float]) -> None:
    config = Medusa2Config(schedule=schedule, full_at=full_at)
    assert [config.coefficient(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(want)


def test_greedy_decoding_returns_the_tokens_of_base_and_adapter(adapted: BaseLM, tiny_base: Any) -> None:
    head: Any = new_head(Medusa2, Medusa2Config(), "medusa2", adapted, 0).eval()
    prompt, plain = [3, 1, 4, 1, 5], tiny_base()
    out = generate(adapted, prompt, drafter=head, max_new_tokens=40).tokens
    assert out == generate(adapted, prompt, max_new_tokens=40).tokens
    assert out == adapted.generate([prompt], max_new_tokens=40)[0]
    assert out != generate(plain, prompt, max_new_tokens=40).tokens


def test_a_saved_adapter_is_the_same_and_peft_reads_it(adapted: BaseLM, tiny_base: Any, tmp_path: Path) -> None:
    import peft

    adapted.adapter.save(tmp_path)
    back = tiny_base.__wrapped__().add_adapter(tmp_path)
    tokens, wanted = torch.tensor([[3, 1, 4, 1, 5, 9]]), Needs(logits=True)
    logits = adapted.capture(wanted, tokens).logits
    assert torch.equal(back.capture(wanted, tokens).logits, logits)
    adapted.name_adapter()
    assert back.spec.adapter_sha256 == adapted.spec.adapter_sha256 != ""
    theirs = peft.PeftModel.from_pretrained(tiny_base.__wrapped__().model, str(tmp_path))
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(adapted: BaseLM, tiny_base: Any, tmp_path: Path) -> None:
    adapted.adapter.save(tmp_path)
    with pytest.raises(DataError, match="adapter of another base"):
        tiny_base.__wrapped__(num_hidden_layers=3).add_adapter(tmp_path)
    with pytest.raises(DataError, match="not a LoRA adapter"):
        tiny_base.__wrapped__().add_adapter(tmp_path / "nowhere")
    for targets, told in ((["lm_head"], "only layers inside"), (["no_such"], r"base\.lora\.targets")):
        with pytest.raises(ConfigError, match=told):
            new_adapter(tiny_base.__wrapped__(), LoraConfig(targets=targets), 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"heads_coefficient": -1.0}, "heads_coefficient=-1"),
        ({"schedule": "cubic"}, "schedule='cubic'"),
        ({"full_at": 0.0}, "full_at"),
        ({"label_share": 1.5}, "label_share"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Medusa2Config(**settings)
