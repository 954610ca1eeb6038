import logging
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith.errors import ConfigError, NumericsError
from draftsmith.training.pretrain import PretrainConfig, batches, pretrain, restarting_positions

CONFIG = PretrainConfig(steps=40, batch_size=4, length=16, lr_matrix=0.02, lr_rest=0.02, warmup=4, print_every=0)
BOS = 1


def micro(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def blocks_NT():
    """Every block counts upwards from a random number."""
    start_N1 = torch.randint(0, 24, (50, 1), generator=torch.Generator().manual_seed(0))
    return (start_N1 + torch.arange(16)) % 24


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_learns_to_count_and_repeats_itself_bit_by_bit(blocks_NT):
    runs = {}
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        model = micro()
        metrics = pretrain(model, blocks_NT, config=CONFIG, seed=seed)
        assert metrics["loss"] < 0.5 < 3.0 < metrics["first_loss"]
        assert metrics["tokens"] == 40 * 4 * 16
        assert not model.training
        runs[name] = weights(model)
    assert all(torch.equal(runs["first"][k], runs["again"][k]) for k in runs["first"])
    assert any(not torch.equal(runs["first"][k], runs["other"][k]) for k in runs["first"])


def test_leaves_threads_and_random_state_as_they_were(blocks_NT):
    model, threads = micro(), torch.get_num_threads()
    state = torch.get_rng_state()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        pretrain(model, blocks_NT, config=CONFIG, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {1}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_token_outside_the_mask_is_not_learned(blocks_NT):
    mask_NT = torch.ones_like(blocks_NT, dtype=torch.bool)
    mask_NT[:, 5] = False
    model, other = micro(), micro()
    other_NT = blocks_NT.clone()
    other_NT[:, 5] = 3
    config = PretrainConfig(steps=1, batch_size=50, length=6, lr_matrix=0.02, lr_rest=0.02, warmup=0, print_every=0)
    one = pretrain(model, blocks_NT[:, :6], config=config, seed=0, mask_NT=mask_NT[:, :6])
    two = pretrain(other, other_NT[:, :6], config=config, seed=0, mask_NT=mask_NT[:, :6])
    assert one["loss"] == two["loss"]  # position 5 is last: neither a target nor anyone's context


def test_positions_restart_at_bos_and_documents_do_not_see_each_other():
    tokens_BT = torch.tensor([[5, 6, BOS, 7, 8, 9, BOS, 4]])
    assert restarting_positions(tokens_BT, BOS).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
    model = micro().eval()

    def logits(tokens_BT):
        return model(input_ids=tokens_BT, position_ids=restarting_positions(tokens_BT, BOS), use_cache=False).logits

    changed_BT = tokens_BT.clone()
    changed_BT[0, 1] = 20
    with torch.no_grad():
        packed, changed, alone = logits(tokens_BT), logits(changed_BT), logits(tokens_BT[:, 2:6])
    torch.testing.assert_close(packed[:, 2:], changed[:, 2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(packed[:, 2:6], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(packed[:, 1], changed[:, 1])


def test_order_is_whole_epochs_and_a_function_of_the_seed():
    order = list(batches(10, CONFIG, seed=3))
    assert [len(b) for b in order] == [4] * 40
    flat = [i for b in order for i in b]
    assert all(sorted(flat[e : e + 10]) == list(range(10)) for e in range(0, 160, 10))
    assert order == list(batches(10, CONFIG, seed=3)) != list(batches(10, CONFIG, seed=4))
    assert [len(b) for b in batches(1, CONFIG, seed=0)] == [4] * 40  # fewer blocks than a batch


def test_rate_rises_then_falls_to_almost_nothing():
    rates = [CONFIG.rate(step) for step in range(CONFIG.steps)]
    assert rates.index(max(rates)) == CONFIG.warmup
    assert max(rates) == 1.0
    assert 0 < rates[-1] < 0.05
    assert rates[0] == 0.2


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 24, bias=False)
        self.norm = nn.Parameter(torch.ones(4))

    def forward(self, input_ids, use_cache):
        class Out:
            logits = self.linear(self.norm * math.nan).expand(*input_ids.shape, 24)

        return Out


def test_a_loss_that_is_not_finite_stops_at_once(blocks_NT):
    with pytest.raises(NumericsError, match="step 0"):
        pretrain(Broken(), blocks_NT, config=CONFIG, seed=0)


def test_progress_is_plain_lines_and_nothing_else(blocks_NT, capfd, recwarn):
    config = PretrainConfig(steps=5, batch_size=2, length=16, warmup=1, print_every=2)
    logger, records = logging.getLogger("lightning.pytorch"), []
    handler = logging.Handler()
    handler.emit = records.append
    level = logger.level
    logger.addHandler(handler)
    try:
        pretrain(micro(), blocks_NT, config=config, seed=0)
    finally:
        logger.removeHandler(handler)
    out, err = capfd.readouterr()
    assert not records
    assert not list(recwarn)
    assert logger.level == level
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [f"pretrain: step {n}/5" for n in (2, 4, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "training.steps"),
        ({"batch_size": 0}, "training.batch_size"),
        ({"length": 1}, "training.length"),
        ({"lr_matrix": 0.0}, "training.lr_matrix"),
        ({"lr_rest": math.nan}, "training.lr_rest"),
        ({"warmup": 40}, "training.warmup"),
        ({"precision": "16"}, "training.precision"),
        ({"threads": -1}, "training.threads"),
    ],
)
def test_config_errors_name_their_key(change, message):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**{**vars(CONFIG), **change})


def test_blocks_of_another_length_are_refused(blocks_NT):
    with pytest.raises(ConfigError, match=r"training\.length"):
        pretrain(micro(), blocks_NT[:, :8], config=CONFIG, seed=0)
