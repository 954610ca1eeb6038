import torch

from draftsmith.heads.blocks import ResBlock


def test_residual_block() -> None:
    torch.manual_seed(0)
    block, x = ResBlock(5), torch.randn(3, 5)
    pre = x @ block.linear.weight.T + block.linear.bias
    torch.testing.assert_close(block(x), x + pre / (1 + (-pre).exp()))


def test_reset_is_exactly_the_identity() -> None:
    torch.manual_seed(0)
    block, x = ResBlock(64), torch.randn(3, 64)
    torch.nn.init.zeros_(block.linear.weight)
    assert not torch.equal(block(x), x)  # PyTorch's own bias is not zero
    block.reset()
    assert torch.equal(block(x), x)
