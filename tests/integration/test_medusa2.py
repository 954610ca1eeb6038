"""Medusa-2 as a user runs it: stage 1, stage 2 with an adapter, proof against base and adapter, kill and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith import api, artifacts
from draftsmith.errors import DataError

from .conftest import call

LORA = "base.lora={rank: 2, dropout: 0.1}"
SHORT = ["prompts.synthetic=2", "decoding.max_new_tokens=8", "repeats=1"]


@pytest.fixture(scope="module")
def stages(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/: the runs of both stages, the second with a checkpoint after its third of six steps."""
    folder = tmp_path_factory.mktemp("medusa2")
    code, told = call("train", *training, "head=[medusa]", "trainer.max_steps=4", "run_dir=one", cwd=folder)
    assert code == 0, told
    code, told = call("train", *second(training), "run_dir=two", cwd=folder)
    assert code == 0, told
    return folder


def second(training: list[str]) -> list[str]:
    own = ["head=[medusa2]", LORA, "start_from={medusa2: one/heads/medusa}", "optimizer.lr=0.02"]
    return [*training, *own, "+optimizer.heads.base.lr=0.01", "trainer.max_steps=6", "trainer.checkpoint_every=3"]


def test_it_exports_head_and_adapter_and_keeps_base_and_adapters_tokens(stages: Path, micro: Path) -> None:
    head = stages / "two" / "heads" / "medusa2"
    assert {p.name for p in (head / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert any(t.any() for n, t in load_file(head / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n)
    artifacts.verify(head)
    code, told = call("evaluate", "run_dir=two", *SHORT, cwd=stages)
    assert code == 0, told
    proof = json.loads((stages / "two" / "evaluation.json").read_text())["heads"]["medusa2"]["lossless"]
    assert proof["ok"]
    assert proof["tokens"] > 0
    base = api.load_base(micro / "base", adapter=head / "adapter")
    assert api.generate(base, [20, 21, 22], head=api.load_head(head, base=base), max_new_tokens=8).tokens
    with pytest.raises(DataError, match=r"adapter_sha256.*has none.*base\.adapter="):
        api.load_head(head, base=api.load_base(micro / "base"))


@pytest.mark.parametrize("exporter", ["native", "portable", "vllm", "reference", "custom_generate"])
def test_every_export_takes_the_adapter_along(stages: Path, micro: Path, exporter: str) -> None:
    code, told = call("export", "run_dir=two", f"exporter={exporter}", f"out={exporter}", cwd=stages)
    assert code == 0, told
    adapter = stages / exporter / "adapter"
    want = stages / "two" / "heads" / "medusa2" / "adapter"
    weights = "adapter_model.safetensors"
    assert artifacts.file_sha256(adapter / weights) == artifacts.file_sha256(want / weights)
    if exporter == "native":
        api.load_head(stages / exporter, base=api.load_base(micro / "base", adapter=adapter))


def test_stage_two_starts_from_stage_one(stages: Path, training: list[str]) -> None:
    """At a learning rate of next to nothing it ends with stage 1's heads, and the adapter is still none at all."""
    still = ["optimizer.lr=1e-12", "+optimizer.heads.base.lr=1e-12", "trainer.max_steps=1", "run_dir=still"]
    own = ["head=[medusa2]", LORA, "start_from={medusa2: one/heads/medusa}"]
    code, told = call("train", *training, *own, *still, cwd=stages)
    assert code == 0, told
    first = load_file(stages / "one" / "heads" / "medusa" / "model.safetensors")
    second = load_file(stages / "still" / "heads" / "medusa2" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.allclose(t, second[name], rtol=0, atol=1e-9) for name, t in first.items())
    begun = json.loads((stages / "still" / "metrics.jsonl").read_text())
    assert begun["train/medusa2/agreement/0"] > 0.999


def test_a_head_of_other_sizes_is_no_start(stages: Path, training: list[str]) -> None:
    start = ["start_from={medusa: one/heads/medusa}", "heads.medusa.num_heads=5", "trainer.max_steps=1"]
    code, told = call("train", *training, *start, "run_dir=sizes", cwd=stages)
    assert code == 2
    assert "start_from.medusa: a Medusa with MedusaConfig(num_heads=3" in told
    code, told = call(
        "train", *training, "start_from={medusa: one}", "run_dir=sizes", "trainer.max_steps=1", cwd=stages
    )
    assert (code, "one is a run; name one of its heads, as one/heads/medusa" in told) == (2, True)


def test_a_trained_adapter_stays_as_it_is_while_a_head_learns_on_it(stages: Path, training: list[str]) -> None:
    adapter = stages / "two" / "heads" / "medusa2" / "adapter"
    own = ["head=[medusa]", "base.adapter=two/heads/medusa2/adapter", "trainer.max_steps=2", "run_dir=on"]
    code, told = call("train", *training, *own, cwd=stages)
    assert code == 0, told
    copy = stages / "on" / "heads" / "medusa" / "adapter" / "adapter_model.safetensors"
    assert artifacts.file_sha256(copy) == artifacts.file_sha256(adapter / "adapter_model.safetensors")
    assert not list((stages / "on" / "checkpoints").glob("*/base.safetensors"))
    code, told = call("evaluate", f"run_dir={stages / 'on'}", *SHORT, cwd=stages.parent)  # from elsewhere
    assert code == 0, told


def test_resumed_it_ends_with_the_same_bytes(stages: Path, training: list[str]) -> None:
    """The adapter's weights and moments are in the checkpoint, its dropout is keyed by the step."""
    again = stages / "again"
    (again / "one").parent.mkdir(exist_ok=True)
    (again / "one").symlink_to(stages / "one")
    code, told = call("train", *second(training), "run_dir=two", cwd=again)
    assert code == 0, told
    weights = ("heads/medusa2/model.safetensors", "heads/medusa2/adapter/adapter_model.safetensors")
    want = [artifacts.file_sha256(stages / "two" / name) for name in weights]
    assert [artifacts.file_sha256(again / "two" / name) for name in weights] == want
    for name in ("COMPLETE.json", "heads", "checkpoints/step-00000006", "checkpoints/last"):
        remove(again / "two" / name)
    artifacts.write_json(again / "two" / "checkpoints" / "last", {"checkpoint": "step-00000003"})
    code, told = call("train", *second(training), "run_dir=two", cwd=again)
    assert code == 0, told
    assert "resuming after step 3 of 6" in told
    assert [artifacts.file_sha256(again / "two" / name) for name in weights] == want


def remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["head=[medusa2]"], "base.lora: medusa2 trains an adapter"),
        (["head=[medusa]", LORA], "base.lora: medusa trains no adapter"),
        (["head=[medusa2,hydra]", LORA], "medusa2 trains an adapter of the base, so hydra cannot share"),
        (["+head@heads.base=medusa"], "heads.base: the name is the adapter's"),
        (["start_from={hydra: x}"], "start_from.hydra: no such head"),
        (["start_from=one"], "start_from=one: say which head"),
        (["head=[medusaa]"], "head: no such choice 'medusaa'; did you mean 'medusa'?"),
        (["optimizer.lr=-1"], "optimizer: lr=-1.0: give a positive number"),
        (["+optimizer.heads.base.lr=1"], "optimizer.heads.base: not trained here"),
        (["head=[kangaroo]", "heads.kangaroo.exit_layer=9"], "heads.kangaroo: exit_layer=9: the base has 1"),
    ],
)
def test_what_cannot_be_trained_together_ends_with_exit_2(
    training: list[str], tmp_path: Path, overrides: list[str], told: str
) -> None:
    code, output = call("train", *training, "trainer.max_steps=1", *overrides, cwd=tmp_path)
    assert code == 2
    assert told in output
