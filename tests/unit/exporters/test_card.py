"""The card: metadata that the hub's own library reads, nothing of this machine in it, and only what was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from draftsmith import artifacts
from draftsmith.base.lm import BaseLM
from draftsmith.exporters import card, native
from draftsmith.heads.kv_prediction import KVPrediction
from draftsmith.heads.medusa import Medusa

MakeHead = Callable[..., Medusa]


@pytest.fixture
def head(make_head: MakeHead) -> Medusa:
    return make_head()


@pytest.fixture
def evaluation(base: BaseLM, head: Medusa) -> dict[str, Any]:
    """What draftsmith evaluate writes, as far as a card looks."""
    return {
        "base": {**dataclasses.asdict(base.spec), "dtype": "float32"},
        "decoding": {
            "temperature": 0.0,
            "accept": "exact",
            "max_new_tokens": 64,
            "device": "cpu",
            "prompts": {"set": "mt_bench", "path": None, "sources": {}, "seed": 1, "count": 160, "trained_on": 0},
        },
        "heads": {
            "mine": {
                "parameters": sum(p.numel() for p in head.parameters()),
                "tokens_per_step": 2.345678,
                "tokens_per_step_interval": [2.1, 2.6],
                "accepted_drafts_per_step": 1.345678,
                "speedup": 1.75,
                "lossless": {"prompts": 160, "mismatches": 0, "near_ties": 1},
            }
        },
    }


def read(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard((folder / card.FILE).read_text())


def written(path: Path, evaluation: dict[str, Any]) -> Path:
    path.write_text(json.dumps(evaluation))
    return path


def test_the_hub_reads_what_is_known(tmp_path: Path, head: Medusa) -> None:
    told = read(native.save(tmp_path / "head", head, name="mine")).data.to_dict()
    assert told == {
        "library_name": "draftsmith",
        "pipeline_tag": "text-generation",
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "tags": ["draftsmith", "medusa", "speculative-decoding", "draft-head"],
    }


@pytest.mark.parametrize("path", ["/home/somebody/models/vicuna", "", "C:\\models", "a/b/c"])
def test_a_folder_is_no_model_of_the_hub(tmp_path: Path, head: Medusa, path: str) -> None:
    head.spec = dataclasses.replace(head.spec, path=path)
    told = read(native.save(tmp_path / "head", head, name="mine"))
    assert told.data.base_model is None
    assert "base_model_relation" not in told.data.to_dict()
    assert path not in told.data.to_yaml() or not path


def test_what_is_lossy_or_drafts_nothing_says_so(tmp_path: Path, base: BaseLM) -> None:
    primer = KVPrediction(KVPrediction.Config(keep=1.0), base.spec)
    primer.initialise(base)
    told = read(native.save(tmp_path / "head", primer, name="mine"))
    assert told.data.tags == ["draftsmith", "kv-prediction", "lossy"]
    assert told.data.pipeline_tag is None
    assert "**Lossy**" in told.text


@pytest.mark.parametrize("name", ['quo"ted', "on", "- 1: [x", "é ☃", "0x10", "line\nbreak", "---"])
def test_no_name_breaks_the_metadata(tmp_path: Path, head: Medusa, evaluation: dict[str, Any], name: str) -> None:
    head.spec = dataclasses.replace(head.spec, path="null")  # a legal id
    evaluation["heads"][name] = evaluation["heads"]["mine"]
    measured = card.results(written(tmp_path / "evaluation.json", evaluation), name, head)
    folder = native.save(tmp_path / "head", head, name=name)
    card.add_results(folder, head, measured or {})
    told = read(folder)
    assert told.data.base_model == "null"
    assert told.data.model_name == name


def test_results_are_the_evaluations(tmp_path: Path, head: Medusa, evaluation: dict[str, Any]) -> None:
    measured = card.results(written(tmp_path / "evaluation.json", evaluation), "mine", head)
    assert measured is not None
    folder = native.save(tmp_path / "head", head, name="mine")
    weights = (folder / "model.safetensors").read_bytes()
    card.add_results(folder, head, measured)
    artifacts.verify(folder)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert native.load(folder, head.spec).said["name"] == "mine"
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["head"]
    told = read(folder)
    found = {r.metric_type: (r.dataset_type, r.task_type, r.metric_value) for r in told.data.eval_results or []}
    assert found == {
        "tokens_per_step": ("mt_bench", "text-generation", 2.3457),
        "accepted_drafts_per_step": ("mt_bench", "text-generation", 1.3457),
        "speedup": ("mt_bench", "text-generation", 1.75),
    }
    assert told.data.to_dict()["metrics"] == list(found)
    for line in (
        "| tokens per step of the base | 2.35 (95 % of resamplings: 2.10 to 2.60) |",
        "| measured on | 160 prompts of mt_bench, greedy, at most 64 new tokens; the base in float32 on cpu |",
        "| the base's text | kept on all 160 prompts, 1 near ties |",
    ):
        assert line in told.text
    assert told.text.strip().startswith("# mine\n")


@pytest.mark.parametrize(
    ("prompts", "decoding", "found", "says"),
    [
        ({"set": None, "path": "/home/me/questions.jsonl", "trained_on": 3}, {}, {},
         "160 prompts of questions.jsonl (**3 of them were trained on**), greedy"),
        ({"set": None, "sources": {"a": {"path": "/home/me/a"}, "b": {}}}, {}, {}, "prompts of a, b, greedy"),
        ({"set": None}, {}, {}, "prompts of draftsmith's made-up prompts, seed 1, greedy"),
        ({}, {"temperature": 0.7}, {"lossless": None}, "temperature 0.7, at most"),
        ({}, {"temperature": 0.7}, {"lossless": None}, "| the base's text | drawn, so it was not compared here |"),
        ({}, {"accept": "typical"}, {"lossless": None, "lossy": True}, "accept=typical"),
        ({}, {}, {"lossless": None, "lossy": True}, "| the base's text | may be another one |"),
        ({}, {}, {"lossless": {"prompts": 9, "mismatches": 2, "near_ties": 0}}, "**differs**: 2 mismatches in 9"),
    ],
)  # fmt: skip
def test_how_it_was_measured(
    tmp_path: Path, head: Medusa, evaluation: dict[str, Any], prompts: Any, decoding: Any, found: Any, says: str
) -> None:
    evaluation["decoding"] |= decoding
    evaluation["decoding"]["prompts"] |= prompts
    evaluation["heads"]["mine"] |= found
    measured = card.results(written(tmp_path / "evaluation.json", evaluation), "mine", head)
    folder = native.save(tmp_path / "head", head, name="mine")
    card.add_results(folder, head, measured or {})
    text = (folder / card.FILE).read_text()
    assert says in text
    assert "/home/me" not in text


@pytest.mark.parametrize(
    "change",
    [
        lambda e, head: e["heads"].clear(),
        lambda e, head: e["heads"]["mine"].update(parameters=1),
        lambda e, head: e["heads"]["mine"].update(weights_sha256="of others"),
        lambda e, head: e["base"].update(config_sha256="another"),
        lambda e, head: e["base"].update(adapter_sha256="another"),
    ],
)
def test_results_of_another_head_or_base_are_left_out(
    tmp_path: Path, head: Medusa, evaluation: dict[str, Any], change: Any
) -> None:
    evaluation["heads"]["mine"]["weights_sha256"] = artifacts.tensors_sha256(head.state_dict())
    assert card.results(written(tmp_path / "right.json", evaluation), "mine", head) is not None
    change(evaluation, head)
    assert card.results(written(tmp_path / "wrong.json", evaluation), "mine", head) is None
    assert card.results(tmp_path / "none.json", "mine", head) is None
