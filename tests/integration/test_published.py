"""Published weights become a head that evaluate and load_head take; an export in the published layout comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith import generate, load_base, load_head, load_published, save_head
from draftsmith.errors import ConfigError

from .conftest import call


def test_from_our_run_to_the_published_layout_and_back(training: list[str], micro: Path, tmp_path: Path) -> None:
    code, told = call("train", *training, "head=[kangaroo]", "trainer.max_steps=2", "run_dir=run", cwd=tmp_path)
    assert code == 0, told
    code, told = call("export", "run_dir=run", "exporter=reference", "out=published", cwd=tmp_path)
    assert code == 0, told
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "published" / "model.safetensors")
    base = load_base(micro / "base")
    head = load_published(tmp_path / "published", "kangaroo", base=base, depth=3)
    assert head.max_depth == 3
    ours = load_head(tmp_path / "run" / "heads" / "kangaroo", base=base)
    assert all(torch.equal(t, head.state_dict()[name]) for name, t in ours.state_dict().items())
    save_head(tmp_path / "native", head, name="kangaroo")
    back = load_head(tmp_path / "native", base=base)
    prompt = [20, 21, 22, 23]
    plain = generate(base, prompt, max_new_tokens=12).tokens
    assert generate(base, prompt, head=back, max_new_tokens=12).tokens == plain


def test_a_setting_that_is_none_is_named(micro: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kangaroo\.dept: no such key; did you mean 'depth'"):
        load_published(tmp_path, "kangaroo", base=load_base(micro / "base"), dept=3)
