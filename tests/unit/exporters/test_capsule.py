"""The parity capsule: every head answers it on its own base, and nothing else does."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith import artifacts, config, save_head
from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.beside import checked
from draftsmith.contracts import Head
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import capsule, native

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
KINDS = sorted(p.stem for p in (Path(__file__).parents[3] / "conf" / "head").glob("*.yaml"))


@pytest.fixture(scope="module")
def base() -> BaseLM:
    return BaseLM(create.llama(SHAPE, None, seed=0), path="some/base")


@pytest.fixture(scope="module")
def stranger() -> BaseLM:
    """Of the same sizes and with the same name."""
    return BaseLM(create.llama(SHAPE, None, seed=1), path="some/base")


def made(kind: str, base: BaseLM) -> Head:
    """With random weights everywhere."""
    node = config.compose("train", [f"head=[{kind}]"]).heads[kind]
    cls = config.target(node, kind)
    torch.manual_seed(1)
    head: Head = cls(config.typed(node, cls.Config, kind), base.spec)
    if not head.wants or kind == "kv_prediction":
        head.initialise(base)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return head.eval()


@pytest.fixture
def saved(tmp_path: Path, base: BaseLM) -> Callable[[str], Path]:
    def save(kind: str) -> Path:
        head = made(kind, base)
        head.golden = capsule.record(head, base)
        return native.save(tmp_path / kind, head, name=kind)

    return save


def republished(folder: Path, change: Callable[[Path], Any]) -> Path:
    """As somebody else could publish it: changed, the manifest in order."""
    files = [p.name for p in folder.iterdir() if p.name != artifacts.MANIFEST]
    contents = {name: (folder / name).read_bytes() for name in files}
    with artifacts.publish(folder, kind="head") as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        change(temporary)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_answers_as_before_and_on_no_other_base(
    kind: str, saved: Any, base: BaseLM, stranger: BaseLM
) -> None:
    folder = saved(kind)
    back = checked(folder, base)
    recorded = capsule.record(made(kind, base), base)
    assert all(torch.equal(back.golden.tensors[k], t) for k, t in recorded.tensors.items())
    if back.role == "gate":
        return  # it reads its drafter's states, not the base's
    with pytest.raises(DataError, match=r"this base leaves other states .* load the base it was trained on"):
        checked(folder, stranger)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_told_from_another(kind: str, saved: Any, base: BaseLM) -> None:
    """One number of one tensor is enough: sha256 sees it, and in a manifest made anew the capsule's seal does."""
    folder = saved(kind)
    tensors = load_file(folder / native.WEIGHTS)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[0] = ~changed.view(-1)[0] if changed.dtype == torch.bool else changed.view(-1)[0] + 1
        altered = {**tensors, name: changed}
        republished(folder, lambda t, altered=altered: save_file(altered, t / native.WEIGHTS, {"format": "pt"}))
        with pytest.raises(DataError, match=re.escape(f"not the head that was saved: tensor {name} is another")):
            checked(folder, base)


def test_an_altered_file_is_refused_with_the_tensor_named(saved: Any, base: BaseLM) -> None:
    """The manifest as it was."""
    folder = saved("hydra")
    tensors = load_file(folder / native.WEIGHTS)
    tensors["blocks.2.0.linear.bias"][3] += 1
    save_file(tensors, folder / native.WEIGHTS, {"format": "pt"})
    with pytest.raises(DataError, match=r"sha256 .*\(tensor blocks\.2\.0\.linear\.bias is another\)"):
        checked(folder, base)


def test_a_setting_that_was_changed_is_named_with_both_values(saved: Any, base: BaseLM) -> None:
    folder = saved("clover")

    def other(t: Path) -> None:
        told = json.loads((t / "config.json").read_text())
        told["head"]["similarity"] = "cosine"
        (t / "config.json").write_text(json.dumps(told))

    with pytest.raises(DataError, match="similarity is cosine, recorded dot"):
        checked(republished(folder, other), base)


def test_a_head_whose_weights_changed_is_not_saved_with_its_old_answers(
    saved: Any, base: BaseLM, tmp_path: Path
) -> None:
    head = checked(saved("medusa"), base)
    with torch.no_grad():
        next(head.parameters()).add_(1)
    with pytest.raises(ConfigError, match=r"save_head\(…, base=…\) records them anew"):
        save_head(tmp_path / "new", head, name="mine")
    checked(save_head(tmp_path / "new", head, name="mine", base=base), base)


@pytest.mark.parametrize(
    ("key", "value"), [("norm_eps", 2e-5), ("rope_scale", 2.0), ("rope_frequencies", [0.5] * 8), ("qk_norm", True)]
)
def test_a_base_that_turns_or_norms_otherwise_is_refused_by_its_numbers(
    key: str, value: Any, saved: Any, base: BaseLM
) -> None:
    """Whatever the precision: rounding could hide it from a replay."""
    folder = saved("clover")
    with pytest.raises(DataError, match=rf"made for a base with {key}="):
        native.load(folder, dataclasses.replace(base.spec, **{key: value}))
    nearly = [f * (1 + 1e-7) for f in base.spec.rope_frequencies]
    native.load(folder, dataclasses.replace(base.spec, rope_frequencies=nearly))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"norm_eps": 0.3}, "does not answer as it did"),
        ({"rope_frequencies": [0.5] * 8}, "does not answer as it did"),
    ],
)
def test_what_shapes_its_answers_without_being_a_setting_is_replayed(
    changed: dict[str, Any], told: str, base: BaseLM
) -> None:
    """Rotation and epsilon are the base's: nothing in the head's own config tells of them."""
    head = made("clover", base)
    golden = capsule.record(head, base)
    other = type(head)(head.config, dataclasses.replace(base.spec, **changed))
    other.load_state_dict(head.state_dict())
    with pytest.raises(DataError, match=told):
        capsule.check(other.eval(), base, golden, "here")
    capsule.check(head, base, golden, "here")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "acceptance"])
def test_every_depth_is_replayed(kind: str, base: BaseLM) -> None:
    """A number of the recorded answers that differs is found, wherever it is."""
    head = made(kind, base)
    golden = capsule.record(head, base)
    answers = [k for k, t in golden.tensors.items() if not k.startswith(capsule.STATES) and t.is_floating_point()]
    assert answers
    for name in answers:
        for at in (0, -1):
            tensor = golden.tensors[name].clone()
            tensor.view(-1)[at] += 0.01 * tensor.abs().max()
            with pytest.raises(DataError, match=rf"here: does not answer as it did when it was saved: {name}"):
                capsule.check(head, base, capsule.Golden({**golden.tensors, name: tensor}, golden.told), "here")


def test_a_vocabulary_map_that_differs_is_seen(base: BaseLM) -> None:
    head = made("eagle3", base)
    golden = capsule.record(head, base)
    head.d2t.add_(1)  # type: ignore[operator]
    with pytest.raises(DataError, match="its vocabulary map differs"):
        capsule.check(head, base, golden, "here")


def test_it_can_be_replayed_by_anybody(base: BaseLM) -> None:
    """Medusa's, in plain torch from its tensors alone: the states before the root give the recorded logits."""
    head: Any = made("medusa", base)
    t = capsule.record(head, base).tensors
    for row in range(capsule.TEXTS):
        for k in range(3):
            x = t["final"][row, -1]
            linear = head.blocks[k][0].linear
            x = x + torch.nn.functional.silu(x @ linear.weight.T + linear.bias)
            logits_V = head.lm_heads[k].weight @ x
            torch.testing.assert_close(logits_V[t["columns"][row, k]], t["logits"][row, k])
            torch.testing.assert_close(logits_V.logsumexp(0), t["norm"][row, k])
            assert int(t["drafts"][row, k]) == int(logits_V.argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions_are_let_pass_and_other_weights_are_not(kind: str, base: BaseLM) -> None:
    head = made(kind, base)
    golden = capsule.record(head, base)
    half = BaseLM(create.llama(SHAPE, None, seed=0).bfloat16(), path="some/base")
    capsule.check(head, half, golden, "here")
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p))
    with pytest.raises(DataError):
        capsule.check(head, half, golden, "here")


def test_training_goes_on_as_it_was(base: BaseLM) -> None:
    head = made("hydra_pp", base).train()
    one, two = capsule.record(head, base), capsule.record(head, base)
    assert head.training
    assert all(torch.equal(one.tensors[k], t) for k, t in two.tensors.items())  # no dropout in it
