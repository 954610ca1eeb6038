"""Every yaml of conf/ composes through the verbs that offer it, fits its dataclass and builds what it names."""

import dataclasses
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from draftsmith import config
from draftsmith.cli import VERBS
from draftsmith.contracts import BaseSpec, Head
from draftsmith.decoding.gates import KINDS, GateConfig
from draftsmith.decoding.tree import KINDS as TREES
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.schemas import SCHEMAS, TARGETED, TOP, check, choices, defaults_of, fill, parts, roots
from draftsmith.training.settings import Settings

CONF = Path(__file__).parents[1] / "conf"
SPEC = BaseSpec("llama", 32, 48, 60, 2, 4, 2, 8, 128)
ROOTS, CHOICES = roots(), choices()
OFFERED = [(verb, group, name) for verb in ROOTS for group in defaults_of(verb) for name in CHOICES[group]]
# the choices of debug that change a training are not for verbs that do not train
OFFERED = [o for o in OFFERED if o[1] != "debug" or o[2] in ("false", "true") or o[0] in ("plan", "train")]


def compose(verb: str, *overrides: str) -> DictConfig:
    """As the command line would, with a word in place of everything that only a user can know."""
    return fill(config.compose(verb, overrides))


def choose(group: str, name: str) -> str:
    return f"{group}=[{name}]" if group == "head" else f"{group}={name}"


def missing(node: Any, schema: type, key: str) -> list[str]:
    """Fields of the dataclass, and of those inside it, that the yaml does not show."""
    found = []
    for field in dataclasses.fields(schema):
        hint = typing.get_type_hints(schema)[field.name]
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if field.name not in node:
            found.append(f"{key}.{field.name}")
        elif inner and node[field.name] is not None:
            by_name = typing.get_origin(hint) is dict
            nodes = node[field.name].items() if by_name else [("", node[field.name])]
            for name, own in nodes:
                found += missing(own, inner, f"{key}.{field.name}{'.' * by_name}{name}")
    return found


def test_every_verb_has_a_root_and_a_module() -> None:
    assert sorted(VERBS) == ROOTS
    for verb in VERBS:
        module = import_module(f"draftsmith.{verb}")
        assert callable(module.run)
        assert callable(module.main)


def test_every_group_is_known_here_and_offered_by_a_verb() -> None:
    assert set(CHOICES) == {*SCHEMAS, *TARGETED, "debug", "experiment"}
    assert {group for _, group, _ in OFFERED} == set(CHOICES)


@pytest.mark.parametrize("verb", ROOTS)
def test_a_verb_composes_as_it_is(verb: str) -> None:
    cfg = compose(verb)
    chosen = [g for g, names in defaults_of(verb).items() if names and g not in ("debug", "experiment")]
    assert check(verb, cfg) >= len(chosen)
    assert cfg.debug is False


@pytest.mark.parametrize(("verb", "group", "name"), OFFERED, ids=["-".join(o) for o in OFFERED])
def test_every_choice_of_every_group_composes_and_fits(verb: str, group: str, name: str) -> None:
    cfg = compose(verb, choose(group, name))
    assert check(verb, cfg) or group == "debug"
    if group == "experiment":
        assert cfg.experiment == name  # the run directory is named after it
    if group == "debug":
        assert str(cfg.debug).lower() == name


@pytest.mark.parametrize("verb", ROOTS)
def test_the_default_yaml_shows_every_key(verb: str) -> None:
    """What cannot be seen in --cfg job cannot be changed without reading the code."""
    found = [gap for key, node, schema in parts(verb, compose(verb)) for gap in missing(node, schema, key)]
    assert found == []


@pytest.mark.parametrize(("verb", "schema"), TOP.items())
def test_a_verbs_own_keys_are_in_its_root_and_fit(verb: str, schema: Any) -> None:
    cfg = compose(verb)
    own = {field.name: cfg[field.name] for field in dataclasses.fields(schema)}
    assert isinstance(config.typed(own, schema, verb), schema)


@pytest.mark.parametrize("name", CHOICES["gate"])
def test_a_gate_is_named_after_its_kind(name: str) -> None:
    assert config.typed(compose("evaluate", f"gate={name}").gate, GateConfig, "gate").kind == name


def test_every_kind_of_gate_has_a_yaml() -> None:
    assert sorted(KINDS) == CHOICES["gate"]


PUBLISHED = {
    "eagle_25": [4, 8, 8, 3, 2],
    "mc_sim_7b_63": [10, 28, 23, 2],
    "vicuna_7b_stage1": [10, 32, 20, 1],
    "vicuna_7b_stage2": [10, 23, 23, 7],
    "vicuna_13b_stage1": [10, 29, 23, 1],
    "vicuna_13b_stage2": [10, 19, 25, 9],
    "vicuna_33b_stage1": [10, 34, 19],
    "vicuna_33b_stage2": [10, 24, 24, 5],
    "zephyr_stage2": [10, 27, 23, 3],
}


@pytest.mark.parametrize("name", CHOICES["tree"])
def test_a_tree_is_named_after_its_kind_or_has_as_many_nodes_per_depth_as_published(name: str) -> None:
    spec = config.typed(compose("evaluate", f"tree={name}").decoding.tree, TreeSpec, "tree")
    assert spec.kind == (name if name in TREES else "static")
    if name in PUBLISHED:
        shape = spec.shape(9)
        assert shape.depths_N.bincount().tolist() == [1, *PUBLISHED[name]]
        assert spec.shape(2).depths_N.bincount().tolist() == [1, *PUBLISHED[name][:2]]  # cut for a shallow head


def test_every_kind_of_tree_and_every_published_one_has_a_yaml() -> None:
    assert sorted({*TREES, *PUBLISHED} - {"static"}) == CHOICES["tree"]


@pytest.mark.parametrize("name", CHOICES["head"])
def test_every_head_yaml_shows_every_key_and_builds_without_memory(name: str) -> None:
    cfg = compose("train", f"head=[{name}]")
    assert list(cfg.heads) == [name], f"conf/head/{name}.yaml: its first line must be `# @package heads.{name}`"
    with torch.device("meta"):
        head = config.build(cfg.heads[name], f"heads.{name}", spec=SPEC)
    assert isinstance(head, Head)
    assert {p.device.type for p in head.parameters()} == {"meta"}
    assert missing(cfg.heads[name], type(head).Config, f"heads.{name}") == []


@pytest.mark.parametrize("name", CHOICES["exporter"])
def test_every_exporter_builds(name: str) -> None:
    assert callable(config.build(compose("export", f"exporter={name}").exporter, "exporter").save)


@pytest.mark.parametrize("name", CHOICES["optimizer"])
def test_every_optimizer_is_one(name: str) -> None:
    settings = Settings.of(compose("train", f"optimizer={name}"))
    assert issubclass(settings.optimizer_class, torch.optim.Optimizer)


def targets_in(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (v for k, v in node.items() if k == "_target_")
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from targets_in(value)


def test_every_target_in_every_yaml_is_allowed_and_there() -> None:
    found = {t for p in CONF.rglob("*.yaml") for t in targets_in(OmegaConf.to_container(OmegaConf.load(p)))}
    assert len(found) >= 4
    for name in found:
        assert isinstance(config.target({"_target_": name}, "here"), type)


@pytest.mark.parametrize("name", ["os.system", "torch.load", "draftsmith_evil.Head", "builtins.eval", "torch.optim"])
def test_other_targets_are_refused_before_they_are_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(module: str) -> None:
        raise AssertionError(f"{module} was imported")

    monkeypatch.setattr(config, "import_module", never)
    with pytest.raises(ConfigError, match=r"heads\.medusa\._target_.*not allowed"):
        config.target({"_target_": name}, "heads.medusa")


def test_a_second_instance_of_a_head_has_its_own_name_and_values() -> None:
    cfg = compose("train", "head=[medusa]", "+head@heads.medusa5=medusa", "heads.medusa5.num_heads=5")
    built = {name: config.build(node, f"heads.{name}", spec=SPEC) for name, node in cfg.heads.items()}
    assert {name: head.max_depth for name, head in built.items()} == {"medusa": 3, "medusa5": 5}


def test_the_keys_that_do_not_make_a_run_another_run_exist() -> None:
    """A renamed key left behind in this list would quietly become part of a run's identity."""
    cfg = compose("train")
    assert [key for key in config.MACHINE_KEYS if OmegaConf.select(cfg, key, default="gone") == "gone"] == []
    before = config.identity(compose("train"))
    moved = config.identity(compose("train", "run_dir=elsewhere", "trainer.threads=2", "debug=true"))
    assert before == moved
    assert before != config.identity(compose("train", "seed=1"))


def test_what_quickstart_passes_on_composes() -> None:
    cfg = compose("quickstart")
    assert check("train", compose("train", "experiment=quickstart", f"seed={cfg.seed}", *cfg.train))
    assert compose("evaluate", *cfg.evaluate).threads == 1
    assert compose("export", "exporter=portable", "run_dir=a", "out=b").out == "b"
