"""Our own folder: what comes back is what went in, and nothing else is let in."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith import artifacts
from draftsmith.base.lm import BaseLM
from draftsmith.errors import DataError, NumericsError, ResourceError
from draftsmith.exporters import native
from draftsmith.heads.medusa import Medusa

MakeHead = Callable[..., Medusa]


@pytest.fixture
def folder(tmp_path: Path, make_head: MakeHead) -> Path:
    head = make_head()
    head.said = {"training": {"rows": 3}}
    return native.save(tmp_path / "head", head, name="mine")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The folder as someone else could have published it: config.json changed, manifest in order."""
    described = artifacts.read_json(folder / "config.json")
    changed = change(described)
    tensors = load_file(folder / "model.safetensors")
    with artifacts.publish(folder, kind="head") as temporary:
        save_file(tensors, temporary / "model.safetensors")
        artifacts.write_json(temporary / "config.json", changed if isinstance(changed, list) else described)


def swap_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    described, tensors = artifacts.read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    change(tensors)
    with artifacts.publish(folder, kind="head") as temporary:
        save_file(tensors, temporary / "model.safetensors")
        artifacts.write_json(temporary / "config.json", described)


@pytest.mark.parametrize(
    "settings", [{}, {"share_lm_head": True}, {"num_heads": 2, "num_layers": 3, "loss_weights": [1.0, 0.5]}]
)
def test_11_36_round_trip(tmp_path: Path, base: BaseLM, make_head: MakeHead, settings: dict[str, Any]) -> None:
    """§11.36: the reloaded head has the same keys, the same bytes and the same logits, and is frozen."""
    head = make_head(**settings)
    back = native.load(native.save(tmp_path / "head", head, name="mine"), base.spec)
    assert isinstance(back, Medusa)
    assert back.config == head.config
    assert artifacts.tensors_sha256(back.state_dict()) == artifacts.tensors_sha256(head.state_dict())
    final_ND = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(base, final_ND), head(base, final_ND))
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())
    assert not any(p.is_meta for p in back.parameters())


def test_same_head_same_bytes(tmp_path: Path, make_head: MakeHead) -> None:
    a, b = (native.save(tmp_path / n, make_head(), name="mine") for n in "ab")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_bf16_heads_stay_bf16(tmp_path: Path, base: BaseLM, make_head: MakeHead) -> None:
    head = make_head().bfloat16()
    back = native.load(native.save(tmp_path / "head", head, name="mine"), base.spec)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), head.parameters(), strict=True))


def test_it_explains_itself(folder: Path) -> None:
    described = artifacts.read_json(folder / "config.json")
    assert described["format"] == "draftsmith-head"
    assert described["head"]["_target_"] == "draftsmith.heads.medusa.Medusa"
    assert described["base"]["path"] == "some/base"
    assert described["training"] == {"rows": 3}
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert card.partition("\n---\n")[2].startswith("\n# mine\n")  # after the metadata, test_card.py
    for part in ("some/base", "at revision main", "exactly the base's own tokens", "| num_heads | 3 |", "| rows | 3 |"):
        assert part in card


@pytest.mark.parametrize(
    ("tie", "value"),
    [
        ("vocab_size", 41),
        ("hidden_size", 32),
        ("num_layers", 2),
        ("family", "qwen2"),
        ("tokenizer_sha256", "f" * 64),
    ],
)
def test_another_base_is_refused_with_both_values(folder: Path, base: BaseLM, tie: str, value: Any) -> None:
    ours = getattr(base.spec, tie)
    with pytest.raises(DataError, match=f"{tie}={ours}.*has {value}") as caught:
        native.load(folder, dataclasses.replace(base.spec, **{tie: value}))
    assert caught.value.exit_code == 3


def test_another_place_of_the_same_base_is_fine(folder: Path, base: BaseLM) -> None:
    moved = dataclasses.replace(base.spec, path="moved", revision=None, config_sha256="x")
    there, here = native.load(folder, moved), native.load(folder, base.spec)
    assert there.spec == moved
    assert all(torch.equal(there.state_dict()[k], v) for k, v in here.state_dict().items())


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("where", [10, -3])
def test_an_altered_byte_is_refused(folder: Path, base: BaseLM, file: str, where: int) -> None:
    content = bytearray((folder / file).read_bytes())
    content[where] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=file):
        native.load(folder, base.spec)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop("blocks.1.0.linear.bias"), r"blocks\.1\.0\.linear\.bias"),
        (lambda t: t.update({"lm_heads.0.weight": torch.zeros(16, 40)}), r"lm_heads\.0\.weight.*40"),
        (lambda t: t.clear(), "Missing"),
    ],
)
def test_other_tensors_are_refused(folder: Path, base: BaseLM, change: Any, says: str) -> None:
    swap_tensors(folder, change)
    with pytest.raises(DataError, match=rf"model\.safetensors.*{says}"):
        native.load(folder, base.spec)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "torch.load",
        "pathlib.Path.write_text",
        "canary.Head",
        "draftsmith.config.import_module",
        "draftsmith.exporters.native.Native",
        "draftsmith.contracts.Head",
        "draftsmith.heads.blocks.ResBlock",
        "torch.optim.AdamW",
        None,
    ],
)
def test_only_heads_of_ours_are_built(
    folder: Path, base: BaseLM, target: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "written"
    (tmp_path / "canary.py").write_text(f"open({str(written)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(folder, lambda d: d["head"].update(_target_=target))
    with pytest.raises(DataError, match=r"_target_"):
        native.load(folder, base.spec)
    assert not written.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format_version=2), "draftsmith-head 2;.*reads draftsmith-head 1"),
        (lambda d: d.update(format="other"), "format other 1"),
        (lambda d: d.pop("format"), "format None"),
        (lambda d: d.pop("base"), r"config\.json"),
        (lambda d: d.pop("head"), r"config\.json"),
        (lambda d: [d], r"config\.json"),
        (lambda d: d["head"].update(num_heads="many"), "num_heads"),
        (lambda d: d["head"].update(unknown=1), "unknown"),
        (lambda d: d["head"].update(num_heads=0), "num_heads=0"),
        (lambda d: d["head"].update(num_layers=2), r"blocks\.0\.1"),
    ],
)
def test_another_description_is_refused(folder: Path, base: BaseLM, change: Any, says: str) -> None:
    rewrite(folder, change)
    with pytest.raises(DataError, match=says):
        native.load(folder, base.spec)


def test_what_is_no_safetensors_is_refused(folder: Path, base: BaseLM) -> None:
    described = (folder / "config.json").read_text()
    for content in (b"<html></html>", b"", b"\x80\x04K\x01."):  # a web page, nothing, a pickle
        with artifacts.publish(folder, kind="head") as temporary:
            (temporary / "config.json").write_text(described)
            (temporary / "model.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"model\.safetensors"):
            native.load(folder, base.spec)


def test_a_folder_without_the_weights(folder: Path, base: BaseLM) -> None:
    described = (folder / "config.json").read_text()
    with artifacts.publish(folder, kind="head") as temporary:
        (temporary / "config.json").write_text(described)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        native.load(folder, base.spec)
    with pytest.raises(DataError, match="no such folder"):
        native.load(folder / "none", base.spec)


def test_saving_again_replaces(folder: Path, base: BaseLM, make_head: MakeHead) -> None:
    native.save(folder, make_head(num_heads=1), name="mine")
    assert native.load(folder, base.spec).config.num_heads == 1
    assert [p.name for p in folder.parent.iterdir()] == ["head"]


def test_rehearsal_leaves_nothing(tmp_path: Path, make_head: MakeHead) -> None:
    native.rehearse(tmp_path, {"a": make_head(), "b": make_head(share_lm_head=True)})
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_finds_a_head_that_does_not_read_back_equal(tmp_path: Path, make_head: MakeHead) -> None:
    head = make_head()
    with torch.no_grad():
        head.blocks[0][0].linear.bias[0] = float("nan")  # equal to nothing
    with pytest.raises(NumericsError, match=r"heads\.a: .*read back"):
        native.rehearse(tmp_path, {"a": head})
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_where_nothing_can_be_written(tmp_path: Path, make_head: MakeHead) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        native.rehearse(tmp_path / "file", {"a": make_head()})


def test_config_is_plain_json(folder: Path) -> None:
    json.loads((folder / "config.json").read_text(), parse_constant=lambda c: pytest.fail(c))


def test_what_is_said_of_a_head_is_kept_when_it_is_saved_again(
    folder: Path, make_head: MakeHead, tmp_path: Path
) -> None:
    """An export of a gate must still name its drafter."""
    head = make_head()
    head.said = {"training": {"rows": 3}, "beside": {"sha256": "ab"}, "tuned": {"threshold": 0.5, "temperature": 0.0}}
    native.save(tmp_path / "one", head, name="mine")
    back = native.load(tmp_path / "one", head.spec)
    native.save(tmp_path / "two", back, name="mine")
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert one == two
    assert two["beside"] == {"sha256": "ab"}
