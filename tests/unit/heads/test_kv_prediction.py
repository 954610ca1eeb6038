"""KV prediction against a language model written out in loops of plain sums, and against the base's own engine."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from draftsmith.config import typed
from draftsmith.contracts import BaseSpec, Batch, Needs
from draftsmith.decoding.engine import generate
from draftsmith.errors import ConfigError
from draftsmith.heads.blocks import rotate
from draftsmith.heads.kv_prediction import KVPrediction, KVPredictionConfig, _Given, next_token
from draftsmith.targets import count_targets

LLAMAS = ["llama", "qwen2", "qwen3"]  # plain; with biases of q, k and v; with a head norm
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8]
OTHER = {  # a companion of other depth, width, heads and head size than the tiny bases'
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def head_of(base: Any, companion: Any = None, noise: float = 0.0, **settings: Any) -> KVPrediction:
    config = KVPrediction.completed(KVPredictionConfig(**settings), base.spec, companion)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = KVPrediction(config, base.spec)
        head.attach(companion)
        head.initialise(base)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(noise * torch.randn_like(p))
    return head.eval()


def twin_of(base: Any) -> KVPrediction:
    """The base itself as the auxiliary, and maps that change nothing."""
    head = head_of(base, keep=1.0)
    with torch.no_grad():
        for f in (*head.keys, *head.values):
            f.weight.copy_(torch.eye(len(f.weight)))
            f.bias.zero_()
    return head


def packed(documents: list[list[int]], learned: Callable[[int], bool] = lambda t: t % 3 != 1, pad: int = 0) -> Batch:
    """One row of documents and padding."""
    tokens = [t for d in documents for t in d] + [pad] * 4
    numbers = [n for n, d in enumerate(documents) for _ in d] + [-1] * 4
    positions = [t for d in documents for t in range(len(d))] + [0] * 4
    mask = torch.tensor([[learned(t) and n >= 0 for t, n in zip(positions, numbers, strict=True)]])
    documents_BT = torch.tensor([numbers])
    counts_K = count_targets(mask, documents_BT, 1)
    return Batch(torch.tensor([tokens]), torch.tensor([positions]), documents_BT, mask, counts_K)


def loss_of(base: Any, head: KVPrediction, batch: Batch) -> Any:
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    return head.loss(base, seen, batch)


# The oracle: a language model with Llama's blocks, one document, fp64, attention by loops over positions.

Weights = dict[str, Any]


def weights_of_base(base: Any) -> Weights:
    model = base.model.model
    layers = [base.block_weights(n) for n in range(base.spec.num_layers)]
    return {
        "embed": model.embed_tokens.weight,
        "layers": layers,
        "norm": model.norm.weight,
        "head": base.lm_head_weight,
    }


def weights_of_auxiliary(head: KVPrediction) -> Weights:
    embed = head.embed_tokens.weight
    layers = [dict(layer.named_parameters()) for layer in head.layers]
    lm_head = embed if head.lm_head is None else head.lm_head.weight
    return {"embed": embed, "layers": layers, "norm": head.norm.weight, "head": lm_head}


def slow(spec: BaseSpec, weights: Weights, text: list[int], given: Any = None) -> tuple[Tensor, list[Any]]:
    """(logits [T, V], per layer its bare keys and values [T, H, head_dim]); given: normed keys and values per layer,
    to attend to at the first positions (or all) instead."""
    size, half, turn = spec.head_dim, spec.head_dim // 2, torch.tensor(spec.rope_frequencies).double()

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * w

    def rotated(x: Tensor, t: int) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * (t * turn).cos() - b * (t * turn).sin(), b * (t * turn).cos() + a * (t * turn).sin()], -1)

    hidden, found = weights["embed"].detach().double()[text], []
    for n, named in enumerate(weights["layers"]):
        p = {name: w.detach().double() for name, w in named.items()}
        x = norm(hidden, p["input_layernorm.weight"])
        linear = {i: x @ p[f"self_attn.{i}_proj.weight"].T + p.get(f"self_attn.{i}_proj.bias", 0) for i in "qkv"}
        q, k, v = (linear[i].unflatten(-1, (-1, size)) for i in "qkv")
        found.append((k, v))
        if spec.qk_norm:
            q, k = norm(q, p["self_attn.q_norm.weight"]), norm(k, p["self_attn.k_norm.weight"])
        if given:
            k, v = (torch.cat([told, own[len(told) :]]) for told, own in zip(given[n], (k, v), strict=True))
        group, rows = spec.num_heads // spec.num_kv_heads, []
        for t in range(len(text)):
            heads = []
            for h in range(spec.num_heads):
                scores = torch.stack([rotated(q[t, h], t) @ rotated(k[s, h // group], s) for s in range(t + 1)])
                heads.append((scores / size**0.5).softmax(0) @ v[: t + 1, h // group])
            rows.append(p["self_attn.o_proj.weight"] @ torch.cat(heads))
        hidden = hidden + torch.stack(rows)
        x = norm(hidden, p["post_attention_layernorm.weight"])
        inner = F.silu(x @ p["mlp.gate_proj.weight"].T) * (x @ p["mlp.up_proj.weight"].T)
        hidden = hidden + inner @ p["mlp.down_proj.weight"].T
    return norm(hidden, weights["norm"].detach().double()) @ weights["head"].detach().double().T, found


def slow_predicted(head: KVPrediction, base: Any, text: list[int]) -> tuple[Tensor, list[Any], list[Any]]:
    """(the auxiliary's logits, predicted keys and values per layer, the base's own), keys after the head norm."""
    spec, auxiliary = base.spec, head.config.auxiliary
    assert auxiliary is not None
    logits, taps = slow(auxiliary, weights_of_auxiliary(head), text)
    _, own = slow(spec, weights_of_base(base), text)

    def normed(k: Tensor, layer: int) -> Tensor:
        if not spec.qk_norm:
            return k
        w = base.block_weights(layer)["self_attn.k_norm.weight"].double()
        return k / (k.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * w

    predicted = []
    for layer, at in enumerate(head.layer_map):
        k, v = (
            (f.weight.double() @ x.flatten(1).T).T.add(f.bias.double()).unflatten(-1, (-1, spec.head_dim)).detach()
            for f, x in zip((head.keys[layer], head.values[layer]), taps[at], strict=True)
        )
        predicted.append((normed(k, layer), v))
    return logits, predicted, [(normed(k, layer), v) for layer, (k, v) in enumerate(own)]


@pytest.mark.parametrize("family", LLAMAS)
def test_the_loss_is_the_papers(tiny_base: Any, family: str) -> None:
    """Every term, by loops over packed documents, with a companion unlike the base and weights unlike 1."""
    base = tiny_base(family)
    companion = tiny_base("llama", 3, **OTHER)
    head = head_of(base, companion, 0.02, base_weight=0.7, auxiliary_weight=0.4, kv_weight=0.3, z_weight=0.01)
    documents = [TEXT, [7, 7, 2], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
    batch = packed(documents)
    want = dict.fromkeys(("ce_base", "ce_auxiliary", "key", "value", "agreement", "auxiliary_agreement", "z", "n"), 0.0)
    for text in documents:
        own, predicted, truth = slow_predicted(head, base, text)
        told, _ = slow(base.spec, weights_of_base(base), text, predicted)
        undisturbed, _ = slow(base.spec, weights_of_base(base), text)
        for t in range(len(text) - 1):
            if (t + 1) % 3 == 1:
                continue
            for name, logits in (("ce_base", told), ("ce_auxiliary", own)):
                want[name] -= float(logits[t].log_softmax(-1)[text[t + 1]])
                want["z"] += (0.7 if name == "ce_base" else 0.4) * 0.01 * float(logits[t].logsumexp(-1)) ** 2
            for (k, v), (k_own, v_own) in zip(predicted, truth, strict=True):
                want["key"] += float((k[t] - k_own[t]).abs().mean())
                want["value"] += float((v[t] - v_own[t]).abs().mean())
            best = int(undisturbed[t].argmax())
            want["agreement"] += int(told[t].argmax()) == best
            want["auxiliary_agreement"] += int(own[t].argmax()) == best
            want["n"] += 1
    out = loss_of(base, head, batch)
    total = 0.7 * want["ce_base"] + 0.4 * want["ce_auxiliary"] + 0.3 * (want["key"] + want["value"]) + want["z"]
    assert int(out.count) == want["n"] == 13
    assert out.sum.item() == pytest.approx(total, rel=1e-5)
    for name, (value, n) in out.metrics.items():
        assert (float(value), int(n)) == (pytest.approx(want[name], rel=1e-4), 13), name
    assert len(out.metrics) == 6


@pytest.mark.parametrize("family", LLAMAS)
def test_11_6_the_base_as_its_own_auxiliary_predicts_itself(tiny_base: Any, family: str) -> None:
    """§11.6: identity maps, layer l reads layer l: nothing is changed, in training and in decoding."""
    base = tiny_base(family)
    head, batch = twin_of(base), packed([TEXT, [7, 8, 9]])
    assert head.layer_map == [0, 1]
    out = loss_of(base, head, batch)
    n = int(out.count)
    assert float(out.metrics["key"][0]) / n < 1e-5
    assert float(out.metrics["value"][0]) / n < 1e-5
    assert [int(out.metrics[name][0]) for name in ("agreement", "auxiliary_agreement")] == [n, n]
    logits = base.capture(Needs(logits=True), torch.tensor([TEXT])).logits
    alone = head.auxiliary_logits(torch.tensor([TEXT]), len(TEXT))
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained_logits(head, base, TEXT), logits, rtol=1e-4, atol=1e-4)
    assert int(out.count) == int(batch.counts_K[1])
    for prompt in ([7], TEXT):
        plain = generate(base, prompt, max_new_tokens=24)
        assert generate(base, prompt, primer=head, max_new_tokens=24).tokens == plain.tokens


def trained_logits(head: KVPrediction, base: Any, text: list[int]) -> Tensor:
    """[1, T, V] of the loss's way through the base."""
    tokens, positions = torch.tensor([text]), torch.arange(len(text))[None]
    bare, values, _ = head(tokens, positions)
    slots = [
        head._slots(base, positions, head._normed(base, n, k), v)
        for n, (k, v) in enumerate(zip(bare, values, strict=True))
    ]
    hidden = base.run_layers(base.embed(tokens), 0, base.spec.num_layers, positions_BQ=positions, kv=_Given(slots))
    return base.lm_head(base.final_norm(hidden)).detach()


@pytest.mark.parametrize("family", LLAMAS)
def test_11_6_exactly(tiny_base: Any, family: str) -> None:
    """§11.6 in fp64, where only the base's rotation, whose angles are fp32 in transformers, rounds."""
    base = tiny_base(family).in_float64()
    head = twin_of(base).double()
    seen = base.capture(head.needs, torch.tensor([TEXT]))
    bare, values, _ = head(torch.tensor([TEXT]), torch.arange(len(TEXT))[None])
    counted = torch.ones(1, len(TEXT), dtype=torch.bool)
    first, second = (
        sum(
            float(d.detach())
            for d in head._distances(base, seen, counted, n, head._normed(base, n, bare[n]), values[n])
        )
        for n in (0, 1)
    )
    assert first < 1e-12
    assert second < 1e-4


@pytest.mark.parametrize("family", LLAMAS)
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_primed_is_what_training_attends_to(tiny_base: Any, family: str, rows: int) -> None:
    """The K/V of prime() against the slow prediction, rotated, slot by slot, for each row."""
    base = tiny_base(family)
    head = head_of(base, tiny_base("qwen3", 3, num_hidden_layers=3), 0.02)
    texts = [TEXT, TEXT[::-1]][:rows]
    kv: Any = head.prime(base, torch.tensor(texts))
    assert kv.length == len(TEXT)
    for row, text in enumerate(texts):
        for layer, (k, v) in enumerate(slow_predicted(head, base, text)[1]):
            turned = rotate(k.transpose(0, 1)[None], torch.arange(len(text))[None], base.spec.rope_frequencies)[0]
            got = kv._keys[layer][row, :, : kv.length], kv._values[layer][row, :, : kv.length]
            torch.testing.assert_close(got[0].double(), turned, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[1].double(), v.transpose(0, 1), rtol=1e-4, atol=1e-4)
    last = base.capture(Needs(final=True), torch.tensor([[5]] * rows), kv=kv).final  # the base goes on
    assert last.shape == (rows, 1, base.spec.hidden_size)
    assert kv.length == len(TEXT) + 1


def test_decoding_goes_on_from_the_primed_slots(tiny_base: Any) -> None:
    """The engine's text against whole slow forwards: prompt slots predicted, the rest the base's own."""
    base = tiny_base()
    head = head_of(base, noise=0.02, keep=0.5)
    emitted: list[int] = []
    predicted = slow_predicted(head, base, TEXT[:-1])[1]
    for _ in range(5):
        text = [*TEXT, *emitted]
        emitted.append(int(slow(base.spec, weights_of_base(base), text, predicted)[0][-1].argmax()))
    assert generate(base, TEXT, primer=head, max_new_tokens=5).tokens == emitted
    assert generate(base, TEXT, max_new_tokens=5).tokens != emitted


def test_11_7_keys_are_predicted_before_they_turn(tiny_base: Any) -> None:
    """§11.7: a general map of rotated keys is not the rotated map of bare keys; a map of each pair's radius is."""
    base = tiny_base()
    head = head_of(base, keep=1.0)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    at = torch.arange(6)[None]

    def turned(k: Tensor) -> Tensor:
        return (
            rotate(k.unflatten(-1, (-1, 8)).transpose(1, 2), at, base.spec.rope_frequencies).transpose(1, 2).flatten(2)
        )

    apart = turned(head.keys[0](x)) - head.keys[0](turned(x))
    assert apart.norm() > 0.2 * head.keys[0](x).norm()
    torch.testing.assert_close(turned(3 * x), 3 * turned(x))


def test_11_24_padding_says_nothing_and_z_is_that_of_equal_logits(tiny_base: Any) -> None:
    """§11.24"""
    base = tiny_base()
    head = head_of(base, keep=0.5)
    one, two = (loss_of(base, head, packed([TEXT], pad=pad)) for pad in (0, 17))
    assert torch.equal(one.sum, two.sum)
    assert torch.equal(one.metrics["key"][0], two.metrics["key"][0])
    ce, z = next_token(torch.full((3, 60), 2.5), torch.tensor([0, 5, 9]))
    log_v = torch.tensor(60.0).log()
    torch.testing.assert_close(ce, 3 * log_v)
    torch.testing.assert_close(z, 3 * (2.5 + log_v) ** 2)


def test_packed_documents_are_separate_ones(tiny_base: Any) -> None:
    base = tiny_base()
    head = head_of(base, noise=0.02, keep=0.5)
    documents = [TEXT, [7, 7, 2, 9], [11, 12, 13]]
    apart = [loss_of(base, head, packed([d])) for d in documents]
    together = loss_of(base, head, packed(documents))
    torch.testing.assert_close(together.sum, sum(out.sum for out in apart))
    assert int(together.count) == sum(int(out.count) for out in apart)


@pytest.mark.parametrize("settings", [{"keep": 0.5}, {"keep": 1.0}, {}])
def test_every_parameter_learns_and_nothing_of_the_base(tiny_base: Any, settings: dict[str, Any]) -> None:
    base = tiny_base("qwen3")
    head = head_of(base, None if settings else tiny_base("llama", 3, **OTHER), 0.02, **settings)
    before = base.weights_sha256()
    loss_of(base, head, packed([TEXT, [7, 8, 9]])).sum.backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [n for n, p in base.model.named_parameters() if p.requires_grad or p.grad is not None] == []
    assert base.weights_sha256() == before
    assert len({p.data_ptr() for p in head.parameters()}) == len(list(head.parameters()))
    assert not {p.data_ptr() for p in head.parameters()} & {p.data_ptr() for p in base.model.parameters()}


def test_the_base_teaches_the_maps_through_its_frozen_weights(tiny_base: Any) -> None:
    base = tiny_base()
    head = head_of(base, keep=0.5, kv_weight=0.0, auxiliary_weight=0.0)
    loss_of(base, head, packed([TEXT])).sum.backward()
    assert all(f.weight.grad.any() for f in (*head.keys, *head.values))
    assert not head.lm_head.weight.grad.any()


def test_nothing_to_learn_costs_nothing(tiny_base: Any) -> None:
    base = tiny_base()
    head = head_of(base, keep=0.5)
    out = loss_of(base, head, packed([TEXT], lambda t: False))
    out.sum.backward()
    assert (float(out.sum.detach()), int(out.count)) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_one_batch_is_learned(tiny_base: Any) -> None:
    base = tiny_base()
    head, batch = head_of(base, keep=0.5), packed([TEXT], lambda t: True)
    optimizer, sums = torch.optim.AdamW(head.parameters(), lr=5e-3), []
    for _ in range(100):
        out = loss_of(base, head, batch)
        optimizer.zero_grad()
        (out.sum / out.count).backward()
        optimizer.step()
        sums.append({name: float(v) / int(n) for name, (v, n) in out.metrics.items()})
    for name in ("ce_base", "ce_auxiliary", "key", "value"):
        assert sums[-1][name] < 0.7 * sums[0][name], name


@pytest.mark.parametrize(
    "sibling", [OTHER, {"num_key_value_heads": 4, "num_hidden_layers": 1}, {"tie_word_embeddings": True}]
)
def test_a_companion_is_copied_whatever_its_shape(tiny_base: Any, sibling: dict[str, Any]) -> None:
    base, companion = tiny_base(), tiny_base("llama", 3, **sibling)
    head = head_of(base, companion)
    logits = companion.capture(Needs(logits=True), torch.tensor([TEXT])).logits
    alone = head.auxiliary_logits(torch.tensor([TEXT]), 4)
    torch.testing.assert_close(alone, logits[:, -4:], rtol=1e-4, atol=1e-4)
    assert head.config.auxiliary == companion.spec
    assert head.config.tied == (head.lm_head is None) == ("tie_word_embeddings" in sibling)
    assert loss_of(base, head, packed([TEXT])).sum.isfinite()
    assert len(generate(base, TEXT, primer=head, max_new_tokens=5).tokens) == 5


@pytest.mark.parametrize(
    ("keep", "layers", "kept", "reads"),
    [
        (0.25, 12, [0, 4, 8], [0] * 4 + [1] * 4 + [2] * 4),
        (0.5, 6, [0, 2, 4], [0, 0, 1, 1, 2, 2]),
        (0.75, 8, [0, 1, 2, 4, 5, 6], [0, 1, 2, 2, 3, 4, 5, 5]),
        (1.0, 3, [0, 1, 2], [0, 1, 2]),
        (0.1, 30, [0, 10, 20], [0] * 10 + [1] * 10 + [2] * 10),
        (0.25, 2, [0], [0, 0]),
    ],
)
def test_layers_kept_and_who_reads_them(tiny_base: Any, keep: float, layers: int, kept: list[int], reads: Any) -> None:
    base = tiny_base(num_hidden_layers=layers)
    head = head_of(base, keep=keep)
    assert head.layer_map == reads
    assert len(head.layers) == len(kept)
    for own, number in zip(head.layers, kept, strict=True):
        assert all(torch.equal(p, base.block_weights(number)[name]) for name, p in own.named_parameters())


def test_a_companions_layers_are_spread_evenly(tiny_base: Any) -> None:
    base = tiny_base(num_hidden_layers=7)
    head = head_of(base, tiny_base("llama", 3, **OTHER))
    assert head.layer_map == [0, 0, 0, 1, 1, 2, 2]


def test_layers_that_nobody_reads_do_not_run_for_the_prompt(tiny_base: Any) -> None:
    """Nor do the MLP of the topmost that is read, the final norm and the lm_head."""
    base = tiny_base()
    head = head_of(base, tiny_base("llama", 3, **OTHER), layer_map=[1, 0])
    ran: list[str] = []
    hooks = [m.register_forward_hook(lambda m, a, o, n=n: ran.append(n)) for n, m in head.named_modules() if n]
    head.prime(base, torch.tensor([TEXT]))
    for hook in hooks:
        hook.remove()
    assert {"layers.0.mlp", "layers.1.self_attn.k_proj", "keys.1", "values.0"} <= set(ran)
    assert not {"layers.1.mlp", "layers.1.self_attn.q_proj", "layers.2.self_attn.k_proj", "norm", "lm_head"} & set(ran)
    assert len(ran) == len(set(ran))  # nothing twice


def test_a_finished_config_rebuilds_it_without_base_or_companion(tiny_base: Any) -> None:
    base, companion = tiny_base("qwen2"), tiny_base("llama", 3, **OTHER)
    for head in (head_of(base, companion), head_of(base, keep=0.5)):
        plain = dataclasses.asdict(head.config)
        with torch.device("meta"):
            back = KVPrediction(typed(plain, KVPredictionConfig, "head"), base.spec)
        assert back.config == head.config
        own = {name: t.shape for name, t in head.state_dict().items()}
        assert {name: t.shape for name, t in back.state_dict().items()} == own


def test_a_window_of_the_bases_goes_on_over_primed_slots(tiny_base: Any) -> None:
    """Slots know their positions: with predictions that are the base's own, so is the text."""
    base = tiny_base("mistral", sliding_window=40)  # beyond the prompt, which the auxiliary reads without a window
    text = list(range(2, 38))
    head = twin_of(base)
    plain = generate(base, text, max_new_tokens=30).tokens
    assert generate(base, text, primer=head, max_new_tokens=30).tokens == plain
    wide = generate(tiny_base("mistral", sliding_window=None), text, max_new_tokens=30).tokens
    assert plain != wide  # the window matters here


@pytest.mark.parametrize("rope", [{"rope_theta": 500.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_primed_keys_turn_as_the_bases(tiny_base: Any, rope: dict[str, Any]) -> None:
    base = tiny_base.__wrapped__(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope})
    primed: Any = twin_of(base).prime(base, torch.tensor([TEXT]))
    own: Any = base.new_kv()
    base.capture(Needs(final=True), torch.tensor([TEXT]), kv=own)
    for layer in (0, 1):
        torch.testing.assert_close(primed._keys[layer][:, :, :11], own._keys[layer][:, :, :11], rtol=1e-4, atol=1e-4)


def test_autocast_is_the_heads_alone(tiny_base: Any) -> None:
    """The base computes as it is in decoding; the auxiliary may go lower."""
    base = tiny_base("qwen3")
    head, batch = head_of(base, keep=0.5), packed([TEXT])
    seen = base.capture(head.needs, batch.tokens_BT, positions_BQ=batch.positions_BT, mask_BQS=batch.visible())
    kinds = set()
    hook = base._norm.register_forward_hook(lambda m, args, out: kinds.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = head.loss(base, seen, batch)
    hook.remove()
    out.sum.backward()
    assert kinds == {torch.float32}
    torch.testing.assert_close(out.sum, loss_of(base, head, batch).sum, rtol=0.05, atol=0)


def test_a_head_in_full_precision_on_a_base_in_half(tiny_base: Any) -> None:
    base = tiny_base.__wrapped__("qwen3")
    base.model.to(torch.bfloat16)
    head = head_of(base, keep=0.5)
    out = loss_of(base, head, packed([TEXT]))
    out.sum.backward()
    assert out.sum.isfinite()
    assert {p.grad.dtype for p in head.parameters()} == {torch.float32}
    kv: Any = head.prime(base, torch.tensor([TEXT]))
    assert kv._keys[0].dtype == torch.bfloat16
    assert len(generate(base, TEXT, primer=head, max_new_tokens=5).tokens) == 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"z_weight": -1.0}, "z_weight=-1"),
        ({}, "keep=null: no auxiliary; give companion="),
        ({"keep": 0.5, "layer_map": [0]}, "layer_map"),
        ({"keep": 0.5, "layer_map": [0, 1]}, "layers 0..0"),
        ({"keep": 0.5, "tied": True}, "tied=true"),
    ],
)
def test_settings_that_cannot_be_are_named(tiny_base: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        head_of(tiny_base(), **settings)


def test_companions_that_do_not_fit_are_named(tiny_base: Any) -> None:
    base, sibling = tiny_base(), tiny_base("llama", 3, **OTHER)
    with pytest.raises(ConfigError, match=r"keep=0.5: the companion"):
        head_of(base, sibling, keep=0.5)
    with pytest.raises(ConfigError, match=r"companion: .* has 61 tokens .* 60 "):
        head_of(base, tiny_base("llama", 3, vocab_size=61))
    with pytest.raises(ConfigError, match=r"companion: .* of family gpt_neox"):
        head_of(base, tiny_base("gpt_neox"))
    with pytest.raises(ConfigError, match=r"base: .* of family gemma,.* llama, qwen2"):
        head_of(tiny_base("gemma"), keep=0.5)
    mine, theirs = (dataclasses.replace(base.spec, tokenizer_sha256=c * 64) for c in "ab")

    class Beside:
        spec = theirs

    with pytest.raises(ConfigError, match=r"tokenizer bbbbbbbb.*aaaaaaaa"):
        KVPrediction.completed(KVPredictionConfig(), mine, Beside())
    with pytest.raises(ConfigError, match=r"base\.adapter"):
        KVPrediction.completed(KVPredictionConfig(keep=0.5), dataclasses.replace(mine, adapter_sha256="c"), None)
    head = KVPrediction(KVPrediction.completed(KVPredictionConfig(), base.spec, sibling), base.spec)
    with pytest.raises(ConfigError, match="no companion to start from"):
        head.initialise(base)
