"""What a sweep tries: ranges and choices, per head, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from draftsmith import artifacts, config, searching, train
from draftsmith.errors import ConfigError, DataError
from draftsmith.searching import Searched, SweepConfig


def own(**changes: Any) -> SweepConfig:
    cfg = config.compose("sweep")
    values = {name: cfg[name] for name in SweepConfig.__dataclass_fields__}
    return config.typed({**values, "like": "quickstart", **changes}, SweepConfig, "sweep")


class Asking:
    """In the place of an Optuna trial: says what it was asked."""

    def suggest_int(self, *asked: Any, **how: Any) -> Any:
        return ("int", *asked, how)

    def suggest_float(self, *asked: Any, **how: Any) -> Any:
        return ("float", *asked, how)

    def suggest_categorical(self, key: str, options: list[Any]) -> Any:
        self.options = options
        return options[-1]


def typed(**values: Any) -> Searched:
    return config.typed(values, Searched, "space.key")


def test_two_whole_numbers_are_whole_numbers_between_them() -> None:
    assert typed(low=1, high=4).suggest(Asking(), "k") == ("int", "k", 1, 4, {"step": 1, "log": False})
    assert typed(low=2, high=8, step=2).suggest(Asking(), "k") == ("int", "k", 2, 8, {"step": 2, "log": False})
    assert typed(low=1, high=2.5).suggest(Asking(), "k") == ("float", "k", 1.0, 2.5, {"step": None, "log": False})
    assert typed(low=1e-4, high=1, log=True).suggest(Asking(), "k")[-1] == {"step": None, "log": True}


def test_choices_count_alone_and_may_be_lists() -> None:
    trial = Asking()
    assert typed(low=1, high=2, choices=["a", [1, 2]]).suggest(trial, "k") == [1, 2]
    assert trial.options == ["a", "[1, 2]"]  # Optuna keeps plain values alone
    assert typed(choices=[True, None]).suggest(trial, "k") is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"low": 2, "high": 1}, "low=2, high=1: give two numbers in order"),
        ({"low": 1}, "low=1, high=None"),
        ({"low": True, "high": 2}, "give two numbers"),
        ({"low": 1, "high": float("inf")}, "high: give a number that is finite"),
        ({"low": 0, "high": 1, "log": True}, "give a low above 0"),
        ({"low": 1, "high": 8, "log": True, "step": 2}, "and no step"),
        ({"low": 1, "high": 8, "step": 0.5}, "low and high are whole numbers"),
        ({"low": 1, "high": 8, "step": -1}, "step=-1: give a positive number"),
        ({"choices": []}, "give at least one"),
        ({"choices": [1, 1]}, "none twice"),
        ({"choices": [{"a": 1}]}, "or lists of them"),
        ({"lo": 1}, "space.key.lo: no such key; did you mean 'low'?"),
    ],
)
def test_what_cannot_be_searched(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(**values)
    assert str(caught.value).startswith("space.key")
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [1.8916951180674e-2, 3e-7, 4, True, None, "constant", 'a "word"', [1, 2.5], ["x"]])
def test_an_override_says_a_value_to_the_last_bit(value: Any) -> None:
    cfg = config.compose("train", [f"+optimizer.heads.medusa={searching.text(value)}"])
    assert cfg.optimizer.heads.medusa == value


def test_each_head_has_its_own_keys_and_null_takes_one_out() -> None:
    each = {"hydra": {"optimizer.lr": {"choices": [1e-3]}, "heads.hydra.num_layers": None}}
    made = own(each=each)
    assert list(made.searched("medusa")) == ["optimizer.lr"]
    assert made.searched("hydra") == {"optimizer.lr": Searched(choices=[1e-3])}
    made.check()


def test_the_defaults_can_be_tried() -> None:
    own().check()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"optimizer.lrr": {"low": 1, "high": 2}}}, "space.optimizer.lrr: medusa has no such key; did you"),
        ({"each": {"medusa": {"heads.medusa.num_head": {"choices": [1]}}}}, "did you mean 'heads.medusa.num_heads'?"),
        ({"each": {"medsa": {}}}, "each.medsa: no such head; did you mean 'medusa'?"),
        ({"space": {"trainer.threads": {"choices": [1, 2]}}}, "space.trainer.threads: is the same for all trials"),
        ({"space": {"base.path": {"choices": ["a", "b"]}}}, "space.base.path: is the same for all trials"),
        ({"each": {"medusa": {"heads.medusa.num_heads": {"low": 0, "high": 2}}}}, "num_heads=0: give at least 1"),
        ({"space": {}, "each": {}}, "space: nothing to search"),
        ({"train": ["trainer.max_stesp=3"]}, "trainer.max_stesp: no such key; did you mean 'trainer.max_steps'?"),
        ({"train": ["trainer.devices=2"]}, "one process"),
        ({"compare": ["acceptance"]}, "acceptance does not draft"),
        ({"compare": ["medusa", "medusa"]}, "none twice"),
        ({"compare": []}, "at least one head"),
        ({"like": "quikstart"}, "did you mean 'quickstart'?"),
        ({"objective": "speed"}, "choose measured or estimated"),
        ({"trials": 0}, "trials=0: give at least 1"),
        ({"sampler": {"kind": "grid"}}, "choose tpe or random"),
        ({"pruner": {"kind": "median", "warmup": 0}}, "warmup=0: give at least 1"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else None,
)
def test_mistakes_are_found_before_anything_is_trained(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own(**{"compare": ["medusa"], **changes}).check()
    assert says in str(caught.value)


def test_the_estimate_is_of_rows_that_are_not_learned_where_there_are_some() -> None:
    cfg = own().training("medusa", {})
    assert searching.watched(cfg, "medusa") == "train/medusa/tokens_per_step"
    cfg = own(train=["data.validation.share=0.1"]).training("medusa", {}, group="study")
    assert searching.watched(cfg, "medusa") == "validation/medusa/tokens_per_step"
    assert cfg.logger.group == "study"


def test_trials_on_other_data_are_no_study(tmp_path: Path) -> None:
    for name, digest in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        artifacts.write_json(tmp_path / name / "COMPLETE.json", {"data_sha256": digest})
    searching.same_data([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(DataError, match="different data"):
        searching.same_data([tmp_path / "a", tmp_path / "c"])


SWEEP_YAML = Path(__file__).parents[2] / "scripts" / "wandb_sweep.yaml"


def test_what_a_wandb_agent_would_start_composes_and_measures_the_metric() -> None:
    """With the ends of every parameter; ${args_no_hyphens} is key=value for each."""
    asked: Any = yaml.safe_load(SWEEP_YAML.read_text())
    macros = [word for word in asked["command"] if word.startswith("$")]
    assert macros == ["${env}", "${args_no_hyphens}"]
    program, verb, *fixed = [word for word in asked["command"] if word not in macros]
    assert (program, verb, asked["program"]) == ("draftsmith", "train", "draftsmith")
    assert asked["method"] in ("grid", "random", "bayes")
    assert asked["early_terminate"]["type"] == "hyperband"
    for end in ("min", "max"):
        pick = {"min": 0, "max": -1}[end]
        values = {k: p[end] if end in p else p["values"][pick] for k, p in asked["parameters"].items()}
        cfg = config.compose("train", [*fixed, *(f"{key}={value}" for key, value in values.items())])
        for key, value in values.items():
            assert OmegaConf.select(cfg, key) == value
        (head,) = cfg.heads
        assert asked["metric"] == {"name": searching.watched(cfg, head), "goal": "maximize"}
        assert cfg.logger.kind == "wandb"
        assert list(train.heads_of(cfg)) == [head]
