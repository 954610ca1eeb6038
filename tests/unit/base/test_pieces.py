"""A base read block by block and cut up: the same base, whoever cuts. (Two processes: tests/integration/
test_strategies.py.)"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from draftsmith.base import pieces
from draftsmith.base.lm import BaseLM, load
from draftsmith.contracts import Needs
from draftsmith.errors import ConfigError, DataError


class Whole:
    """A cutter that leaves blocks whole, and notes what a real one would have been asked."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.runs = 0

    def take(self, block: nn.Module, fill: Callable[[], None]) -> None:
        for p in block.parameters():
            p.data.fill_(float("nan"))
        fill()
        self.taken.append(sum(p.numel() for p in block.parameters()))

    def hold(self, blocks: Sequence[nn.Module]) -> None:
        assert len(blocks) == len(self.taken)

    def run(self, work: Callable[[], Any]) -> Any:
        self.runs += 1
        return work()

    def whole(self, parameters: Iterable[nn.Parameter]) -> Any:
        return nullcontext()


class Emptied(Whole):
    """Keeps every weight away but while a block runs, as a real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[nn.Parameter, torch.Tensor] = {}

    def hold(self, blocks: Sequence[nn.Module]) -> None:
        for block in blocks:
            for p in block.parameters():
                self.kept[p] = p.data
                p.data = torch.empty(0)
            block.register_forward_pre_hook(lambda m, _: self._give(m.parameters()))
            block.register_forward_hook(lambda m, *_: self._take(m.parameters()))

    def _give(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            p.data = self.kept.get(p, p.data)

    def _take(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            if p in self.kept:
                p.data = torch.empty(0)

    @contextmanager
    def _together(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        self._give(parameters)
        yield
        self._take(parameters)

    def whole(self, parameters: Iterable[nn.Parameter]) -> Any:
        return self._together(list(parameters))


@pytest.fixture(scope="module")
def folder(llama: BaseLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bases") / "llama"
    llama.model.save_pretrained(path)
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("several", [False, True], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_base(make_model: Any, tmp_path: Path, tied: bool, several: bool, dtype: str) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if several else "1GB")
    assert (tmp_path / pieces.INDEX).exists() == several
    want, cutter = load(str(tmp_path), dtype=dtype), Emptied()
    got = pieces.load(str(tmp_path), cutter, dtype=dtype)
    assert got.spec == want.spec
    assert got.weights_sha256() == want.weights_sha256()
    assert len(cutter.taken) == 3
    needs, ids = Needs(hidden=frozenset({0, 2, 3}), final=True, logits=True), torch.arange(20).view(2, 10)
    one, other = want.capture(needs, ids), got.capture(needs, ids)
    assert torch.equal(one.logits, other.logits)
    assert all(torch.equal(one.hidden[n], other.hidden[n]) for n in (0, 2, 3))
    theirs = got.block_weights(1)
    assert all(torch.equal(t, theirs[n]) for n, t in want.block_weights(1).items())
    assert not any(p.numel() for block in got._layers for p in block.parameters())
    assert cutter.runs == 1


def test_what_pieces_cannot(folder: Path) -> None:
    base = pieces.load(str(folder), Whole())
    for call in (base.compile, base.in_float64, lambda: base.answer([[1]], max_new_tokens=1)):
        with pytest.raises(ConfigError, match="zero3"):
            call()


def change(folder: Path, to: Path, what: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    what(tensors)
    save_file(tensors, to / "model.safetensors")
    return str(to)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks the weight model\.layers\.1\.mlp\.up_proj"),
        (lambda t: t.pop("model.norm.weight"), r"lacks the weight model\.norm\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight of shape \(3,\)"),
    ],
)
def test_a_checkpoint_with_gaps(folder: Path, tmp_path: Path, what: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        pieces.load(change(folder, tmp_path / "gaps", what), Whole())


def test_no_safetensors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(DataError, match=r"has no model\.safetensors; zero3 reads safetensors only"):
        pieces.load(str(tmp_path), Whole())
    (tmp_path / pieces.INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(DataError, match=r"has no model-1\.safetensors"):
        pieces.load(str(tmp_path), Whole())
    (tmp_path / "model-1.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not safetensors"):
        pieces.load(str(tmp_path), Whole())


def test_every_family(base: BaseLM, tmp_path: Path) -> None:
    """As a whole one captures, from what transformers saves of it; or refused, with the table that is in the way."""
    base.model.save_pretrained(tmp_path)
    if base.spec.family in REFUSED:
        with pytest.raises(DataError, match=REFUSED[base.spec.family]):
            pieces.load(str(tmp_path), Emptied())
        return
    got = pieces.load(str(tmp_path), Emptied())
    assert got.weights_sha256() == base.weights_sha256()
    needs, ids = Needs(hidden=frozenset({1}), final=True, logits=True), torch.arange(20).view(2, 10)
    one, other = base.capture(needs, ids), got.capture(needs, ids)
    assert torch.equal(one.logits, other.logits)


REFUSED = {  # what is in the way
    "gemma": "embed_scale",  # a table that is stored nowhere
    "gemma2": "embed_scale",
    "gemma3_text": "embed_scale",
    "gpt_neox": "lm_head.weight",  # stored by an older name
}
