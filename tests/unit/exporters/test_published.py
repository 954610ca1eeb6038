"""What lies in somebody's folder: which file is meant, shards, and pickles that stay unread."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draftsmith.errors import DataError
from draftsmith.exporters.published import conversion, read

ONE, TWO = {"a": torch.ones(2, 3)}, {"b": torch.arange(4)}


class Written:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def index(folder: Path, files: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(files))


def test_a_file_or_the_one_in_a_folder(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "adapter.safetensors")
    for path in (tmp_path, tmp_path / "adapter.safetensors"):
        found = read(path)
        assert found.config == {}
        assert dict(found.weights.shapes) == {"a": (2, 3)}
        assert torch.equal(found.weights["a"], ONE["a"])


def test_the_methods_own_file_goes_before_a_whole_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 2}')
    for name, tensors in (("other", TWO), ("model", TWO), ("medusa_lm_head", ONE)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    index(tmp_path, {"weight_map": {"b": "model.safetensors"}})
    found = read(tmp_path)
    assert list(found.weights) == ["a"]
    assert found.config == {"medusa_num_heads": 2}
    assert found.weights.path == tmp_path / "medusa_lm_head.safetensors"
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert list(read(tmp_path).weights) == ["b"]  # model.safetensors
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"medusa_lm_head\.pt: is a pickle"):
        read(tmp_path)
    for name in ("model.safetensors", "medusa_lm_head.pt"):
        (tmp_path / name).unlink()
    save_file(ONE, tmp_path / "third.safetensors")
    with pytest.raises(DataError, match=r"holds other\.safetensors, third\.safetensors; name the file"):
        read(tmp_path)


def test_shards_are_one(tmp_path: Path) -> None:
    for n, tensors in enumerate((ONE, TWO), 1):
        save_file(tensors, tmp_path / f"model-{n}-of-2.safetensors")
    index(tmp_path, {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
    weights = read(tmp_path).weights
    assert dict(weights.shapes) == {"a": (2, 3), "b": (4,)}
    assert all(torch.equal(weights[name], t) for name, t in (ONE | TWO).items())
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-2-of-2\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize(
    "listed", [{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../a"}}]
)
def test_an_index_of_nothing_here(tmp_path: Path, listed: Any) -> None:
    index(tmp_path, listed)
    with pytest.raises(DataError, match=r"index\.json: does not list files of this folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin", "head.pth", "head.ckpt", "head.pkl"])
def test_a_pickle_is_never_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Written(tmp_path / "written")))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=r"is a pickle.* it stays unread; if you trust it, convert it: python -c "):
            read(path)
    assert not (tmp_path / "written").exists()


def test_the_conversion_works_as_it_is_told(tmp_path: Path) -> None:
    """On a head whose blocks are one module under several names, in a folder that a shell would take apart."""
    folder = tmp_path / "it's a folder; $HOME"
    folder.mkdir()
    shared = torch.randn(3, 3)
    torch.save({"0.0.linear.weight": shared, "0.1.linear.weight": shared}, folder / "medusa_lm_head.pt")
    with pytest.raises(DataError) as caught:
        read(folder)
    told = str(caught.value).partition("convert it: ")[2]
    assert told == conversion(folder / "medusa_lm_head.pt")
    words = shlex.split(told)
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], check=True, timeout=120)
    weights = read(folder).weights
    assert sorted(weights) == ["0.0.linear.weight", "0.1.linear.weight"]
    assert all(torch.equal(t, shared) for t in weights.values())


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; .* `hf download ORGANISATION/NAME --local-dir none`"):
        read(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \*\.safetensors"):
        read(tmp_path)
    (tmp_path / "head.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match="not safetensors; give the file of the weights"):
        read(tmp_path / "head.gguf")
    (tmp_path / "head.safetensors").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"head\.safetensors: "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[1]", "does not describe a head"),
        ("{", "not JSON"),
        ('{"format": "draftsmith-head"}', "is one of our own folders already"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, config: str, says: str) -> None:
    save_file(ONE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError, match=says):
        read(tmp_path)


def test_names_change_and_the_tensors_stay(tmp_path: Path) -> None:
    save_file({"x.0.w": torch.ones(1), "x.11.w": torch.zeros(2), "y": torch.ones(3)}, tmp_path / "a.safetensors")
    weights = read(tmp_path).weights
    weights.rename((r"x\.(\d+)\.w", r"\1.weight"), (r"x\..*", "never"))
    assert sorted(weights) == ["0.weight", "11.weight", "y"]
    assert weights.numbers(r"(\d+)\.") == [0, 11]
    assert weights["11.weight"].tolist() == [0, 0]
    weights.add("z", torch.full((2, 2), 7))
    assert weights.shapes["z"] == (2, 2)
    assert len(weights) == 4
    assert "z" in weights
    with pytest.raises(DataError, match=r"0\.weight and 11\.weight are names of one tensor"):
        weights.rename((r"\d+\.weight", "weight"))
