"""Vocabulary losses over soft-capped logits, against autograd over whole ones."""

import torch

from draftsmith.losses import linear_cross_entropy, linear_soft_cross_entropy

CAP = 1.5


def case(seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 6), (11, 6), (11,)))
    teacher = torch.randn(9, 11, generator=g, dtype=torch.float64)
    return *(t.requires_grad_() for t in (x, w, b)), torch.randint(0, 11, (9,), generator=g), teacher


def test_hard_labels() -> None:
    x, w, b, target, _ = case(0)
    logits = CAP * torch.tanh((x @ w.T + b) / CAP)
    want = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    grads = torch.autograd.grad(want, (x, w, b))
    got, best = linear_cross_entropy(x, w, target, bias_V=b, softcap=CAP, rows=4)
    torch.testing.assert_close(got, want)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(torch.autograd.grad(got, (x, w, b)), grads)


def test_soft_labels() -> None:
    x, w, b, _, teacher = case(1)
    log_q = (CAP * torch.tanh((x @ w.T + b) / CAP)).log_softmax(-1)
    kept = torch.arange(9) % 4 != 0
    want = -(teacher.softmax(-1) * log_q)[kept].sum()
    grads = torch.autograd.grad(want, (x, w, b))
    out = linear_soft_cross_entropy(
        x[None],
        [w],
        lambda start, stop: (teacher[start:stop], kept[start:stop]),
        torch.ones(1, 9, dtype=torch.bool),
        biases=[b],
        softcap=CAP,
        rows=4,
    )
    torch.testing.assert_close(out.sum, want)
    torch.testing.assert_close(torch.autograd.grad(out.sum, (x, w, b)), grads)
    assert torch.equal(out.best_KN[0], log_q.argmax(-1))
