"""Blocks computed again in the backward pass: the same gradients, bit for bit, from fewer bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftsmith.base import recompute
from draftsmith.base.lm import BaseLM
from draftsmith.base.settings import LoraConfig
from draftsmith.contracts import Batch, Head, Needs
from draftsmith.data.pack import collate
from draftsmith.data.rows import Row, Rows
from draftsmith.decoding.engine import generate
from draftsmith.heads.kv_prediction import KVPrediction, KVPredictionConfig
from draftsmith.heads.medusa2 import Medusa2, Medusa2Config
from draftsmith.training.fit import new_adapter, new_head

LAYERS = 6


def batch_of(length: int = 60) -> Batch:
    """Two documents of 30 and 20 tokens, and padding."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (30, 20)]
    rows = [Row(str(n), ids, [0] * 3 + [1] * (len(ids) - 3)) for n, ids in enumerate(texts)]
    return collate([rows], length, torch.from_numpy(Rows.of(rows).counts(4).sum(0)))


def adapted(make_model: Any, dropout: float = 0.2) -> tuple[BaseLM, Head]:
    base = BaseLM(make_model("llama", num_hidden_layers=LAYERS))
    new_adapter(base, LoraConfig(rank=3, dropout=dropout), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in base.adapter.parameters():  # type: ignore[union-attr]
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return base, new_head(Medusa2, Medusa2Config(), "medusa2", base, 0)


def primed(make_model: Any) -> tuple[BaseLM, Head]:
    base = BaseLM(make_model("llama", num_hidden_layers=LAYERS))
    return base, new_head(KVPrediction, KVPredictionConfig(keep=0.5), "primer", base, 0)


def learn(base: BaseLM, head: Head, batch: Batch, between: Callable[[], Any] = lambda: None) -> dict[str, Tensor]:
    """The gradients of one training step, as training/module.py takes it; between: before the backward pass."""
    parts = {"head": head.train(), **({"base": base.adapter.train()} if base.adapter is not None else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        loss = head.loss(base, seen, batch).sum
    between()
    loss.backward()
    grads = {f"{part}.{n}": p.grad for part, module in parts.items() for n, p in module.named_parameters()}
    for module in parts.values():
        module.zero_grad(set_to_none=True)
    return grads | {"loss": loss.detach()}


def saved_per_block(base: BaseLM, head: Head, batch: Batch) -> list[int]:
    """Bytes that each block adds to what is kept for the backward pass, parameters apart."""
    counts, at = [0] * LAYERS, [-1]
    known: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        fresh = t.untyped_storage().data_ptr() not in known and not isinstance(t, nn.Parameter)
        if at[0] >= 0 and fresh:
            known.add(t.untyped_storage().data_ptr())
            counts[at[0]] += t.untyped_storage().nbytes()
        return t

    kept: list[Any] = []  # storages must live on, or their addresses are given out again

    def run(layer: int, *args: Any, run: Any = base._run_block) -> Tensor:
        at[0] = layer
        out = run(layer, *args)
        at[0] = -1
        kept.append(out)
        return out

    base._run_block = run  # type: ignore[method-assign]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            learn(base, head, batch)
    finally:
        del base._run_block
    return counts


CASES: dict[str, Callable[[Any], tuple[BaseLM, Head]]] = {"lora": adapted, "kv_prediction": primed}
each_case = pytest.mark.parametrize("case", list(CASES))


@each_case
def test_gradients_are_the_same_bit_for_bit(case: str, make_model: Any) -> None:
    """Dropout too: the masks of a block are drawn again as they were, whatever was drawn since."""
    base, head = CASES[case](make_model)
    plain = learn(base, head, batch_of())
    base.recompute = True
    again = learn(base, head, batch_of(), between=lambda: torch.rand(100))
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert grad.any(), name
        assert torch.equal(grad, again[name]), name


def test_dropout_was_at_work(make_model: Any) -> None:
    losses = [learn(*adapted(make_model, dropout), batch_of())["loss"] for dropout in (0.0, 0.2)]
    assert float((losses[0] - losses[1]).abs()) > 1e-3


@each_case
def test_a_block_keeps_little_more_than_its_input(case: str, make_model: Any) -> None:
    base, head = CASES[case](make_model)
    batch = batch_of()
    plain = saved_per_block(base, head, batch)
    base.recompute = True
    less = saved_per_block(base, head, batch)
    hidden = batch.tokens_BT.numel() * base.spec.hidden_size * 4
    assert min(plain) > 10 * hidden
    assert max(less) <= hidden, (less, hidden)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a block was checkpointed: one entry each."""
    import torch.utils.checkpoint as torchs

    calls: list[int] = []
    plain = torchs.checkpoint

    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torchs, "checkpoint", checkpoint)
    return calls


def test_only_where_a_backward_pass_may_come(make_model: Any, counted: list[int]) -> None:
    base, head = adapted(make_model)
    base.recompute = True
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    base.capture(Needs(final=True), tokens)  # no adapter asked for: no gradients
    with torch.no_grad():
        base.capture(head.needs, tokens)
    base.generate([[3, 1, 4]], max_new_tokens=4)
    generate(base, [3, 1, 4], drafter=head.eval(), max_new_tokens=6)  # type: ignore[arg-type]
    assert counted == []
    base.capture(Needs(final=True, adapter=True), tokens)
    assert len(counted) == LAYERS


def test_never_on_a_kv_that_is_appended_to(make_model: Any, counted: list[int], close: Any) -> None:
    """A block that ran again would append again: the slots would be there twice, and the gradients others."""
    base = BaseLM(make_model("llama", num_hidden_layers=LAYERS))
    grads, kvs = [], [base.new_kv(), base.new_kv()]
    for base.recompute, kv in zip((False, True), kvs, strict=True):
        base.capture(Needs(final=True), torch.tensor([[3, 1, 4]]), kv=kv)
        hidden = base.embed(torch.tensor([[1, 5, 9]])).clone().requires_grad_()
        base.run_layers(hidden, 0, LAYERS, positions_BQ=torch.arange(3, 6)[None], kv=kv).sum().backward()
        assert kv.length == 6
        grads.append(hidden.grad)
    assert counted == []
    assert torch.equal(*grads)
    base.run_layers(base.embed(torch.tensor([[1]])), 0, LAYERS, positions_BQ=torch.zeros(1, 1, dtype=torch.long))
    assert len(counted) == LAYERS
    assert recompute.run(nn.Identity(), hidden, {}, kvs[0]) is hidden


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_blocks_are_computed_again_too(kind: str, make_model: Any) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'draftsmith[quant]'")
    base = BaseLM(make_model("llama", num_hidden_layers=LAYERS, intermediate_size=64)).quantise(kind)
    head = new_head(KVPrediction, KVPredictionConfig(keep=0.5), "primer", base, 0)
    plain = learn(base, head, batch_of())
    base.recompute = True
    assert all(torch.equal(grad, plain[name]) for name, grad in learn(base, head, batch_of()).items())


@pytest.mark.slow  # compiling takes tens of seconds
def test_compiled_blocks_are_computed_again_too(make_model: Any) -> None:
    base, head = primed(make_model)
    base.compile()
    plain = learn(base, head, batch_of())
    base.recompute = True
    assert all(torch.equal(grad, plain[name]) for name, grad in learn(base, head, batch_of()).items())
