"""Yaml to objects: what fits, what is refused and by which name, and what makes two runs the same."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from draftsmith import config, errors
from draftsmith.errors import ConfigError
from draftsmith.heads.medusa import MedusaConfig


@dataclass(frozen=True)
class Inner:
    width: int = 2
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    size: int
    rate: float = 0.5
    label: str | None = None
    flag: bool = False
    inner: Inner | None = None
    always: Inner = field(default_factory=Inner)
    table: dict[str, Any] = field(default_factory=dict)
    paths: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"size={self.size}: give at least 0")


def node(**values: Any) -> DictConfig:
    return OmegaConf.create(values)


def test_typed_fills_and_converts() -> None:
    made = config.typed(
        node(
            _target_="draftsmith.x.Y",
            size="3",
            rate=1,
            label="a",
            flag=True,
            inner={"width": 7, "names": ["p", "q"]},
            table={"any": {"thing": [1]}},
            paths=[[0], [0, 1]],
        ),
        Outer,
        "group",
    )
    assert made == Outer(3, 1.0, "a", True, Inner(7, ["p", "q"]), Inner(), {"any": {"thing": [1]}}, [[0], [0, 1]])
    assert isinstance(made.rate, float)


def test_typed_defaults_none_and_plain_dicts() -> None:
    assert config.typed({"size": 1}, Outer, "group") == Outer(1)
    made = config.typed(node(size=1, label=None, inner=None, paths=None), Outer, "group")
    assert made == Outer(1)
    assert config.typed(node(size=1, inner={}), Outer, "group").inner == Inner()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": "three"}, r"group\.size: .*three"),
        ({"size": 1.5}, r"group\.size"),
        ({"size": None}, r"group\.size"),
        ({"size": 1, "rate": "fast"}, r"group\.rate"),
        ({"size": 1, "flag": "perhaps"}, r"group\.flag"),
        ({"size": 1, "paths": [["x"]]}, r"group\.paths"),
        ({"size": 1, "sise": 2}, r"group\.sise: no such key; did you mean 'size'"),
        ({"size": 1, "entirely_else": 2}, r"group\.entirely_else: no such key$"),
        ({"size": 1, "inner": {"witdh": 2}}, r"group\.inner\.witdh: no such key; did you mean 'width'"),
        ({"size": 1, "inner": {"width": "x"}}, r"group\.inner\.width"),
        ({"size": 1, "inner": 3}, r"group\.inner: 3 is not a group"),
        ({}, r"group: .*size"),
        ({"size": "???"}, r"group\.size: .*"),
        ({"size": -1}, r"group: size=-1: give at least 0"),
        ({"size": 1, "always": None}, r"group\.always: null"),
    ],
)
def test_typed_names_the_key(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        config.typed(node(**values), Outer, "group")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, 3, "text", [1]])
def test_typed_wants_a_group(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"group: .*not a group of keys"):
        config.typed(given, Outer, "group")


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.optim.SGD",
        "torch.optim.AdamW.step",
        "pathlib.Path.write_text",
        "draftsmith",
        "draftsmithy.heads.X",
        "xdraftsmith.heads.X",
        "canary.Anything",
        "",
    ],
)
def test_targets_outside_the_allowlist_are_refused_before_import(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "written"
    for module in ("canary", "draftsmithy", "xdraftsmith"):
        (tmp_path / f"{module}.py").write_text(f"open({str(written)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"some\.key\._target_: .*not allowed"):
        config.target({"_target_": name}, "some.key")
    with pytest.raises(ConfigError, match="not allowed"):
        config.build(node(_target_=name, text=str(written)), "some.key")
    assert not written.exists()
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("draftsmith.heads.nothing.Head", "cannot import"),
        ("draftsmith.heads.medusa.Nothing", "cannot import"),
        ("draftsmith.config.import_module", "no class with a Config"),
        ("draftsmith.artifacts.shutil", "no class with a Config"),
        ("draftsmith.prepare.subprocess.Popen", "cannot import"),
        ("draftsmith.heads.blocks.ResBlock", "no class with a Config"),
        ("draftsmith.contracts.Head", "no class with a Config"),
    ],
)
def test_of_our_own_only_configured_classes(name: str, says: str) -> None:
    """What our modules imported for themselves is not offered to a configuration."""
    with pytest.raises(ConfigError, match=says):
        config.target({"_target_": name}, "key")


@pytest.mark.parametrize("given", [None, {}, {"_target_": None}, {"_target_": 3}, [1]])
def test_a_target_must_be_said(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"key\._target_: missing"):
        config.target(given, "key")


def test_allowed_targets_build() -> None:
    portable = {"_target_": "draftsmith.exporters.runtimes.Runtime", "runtime": "portable"}
    exporter = config.build(node(**portable, dtype="bfloat16"), "exporter")
    assert exporter.config.dtype == "bfloat16"
    assert config.target({"_target_": "torch.optim.AdamW"}, "optimizer") is torch.optim.AdamW
    with pytest.raises(ConfigError, match=r"exporter\.dtipe: no such key; did you mean 'dtype'"):
        config.build(node(**portable, dtipe="x"), "exporter")


def test_every_head_file_fits_its_class() -> None:
    cfg = config.compose("train", ["heads.medusa.num_heads=4"])
    assert config.typed(cfg.heads.medusa, MedusaConfig, "heads.medusa") == MedusaConfig(num_heads=4)


def run_name(*overrides: str) -> str:
    return str(config.run_dir(config.compose("train", overrides), "train"))


def test_default_run_dir_is_a_function_of_what_the_run_is() -> None:
    first = run_name()
    assert first == run_name()
    prefix, _, digits = first.rpartition("-")
    assert prefix == "runs/train"
    assert len(digits) == 8
    assert int(digits, 16) >= 0
    changed = [
        run_name(o)
        for o in ("seed=1", "heads.medusa.num_heads=4", "optimizer.lr=0.5", "data.length=64", "trainer.accumulate=2")
    ]
    assert len({first, *changed}) == 6


@pytest.mark.parametrize("key", sorted(config.MACHINE_KEYS - {"run_dir", *config.SPLIT_KEYS}))
def test_where_and_how_fast_is_not_part_of_it(key: str) -> None:
    value = {"debug": "true", "logger": "csv", "strategy": "ddp"}.get(key, "3")
    assert run_name(f"{key}={value}") == run_name()


@pytest.mark.parametrize("key", config.SPLIT_KEYS)
def test_a_global_step_may_be_split_anew_but_not_resized(key: str) -> None:
    before = ["data.batch_size=4", "trainer.accumulate=3", "trainer.devices=1"]
    now = {"data.batch_size": 2, "trainer.accumulate": 6, "trainer.devices": 1, "trainer.num_nodes": 1}
    assert run_name(*before) == run_name(*(f"{k}={v}" for k, v in now.items()))
    assert run_name(*before) != run_name(*(f"{k}={2 * v if k == key else v}" for k, v in now.items()))


def test_a_chosen_run_dir_is_kept_and_the_experiment_names_the_rest() -> None:
    assert run_name("run_dir=some/where") == "some/where"
    assert run_name("experiment=quickstart").startswith("runs/quickstart-")


def test_a_key_that_only_begins_like_a_machine_key_counts() -> None:
    a, b = (node(trainer={"devices_shape": n, "keep": n}) for n in (1, 2))
    assert config.identity(a) == {"trainer.devices_shape": 1}
    assert config.identity(a) != config.identity(b)


def test_flat() -> None:
    assert dict(config.flat({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]})) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("debug=true", 'debug="true"'),
        ("debug=false", 'debug="false"'),
        ('debug="true"', 'debug="true"'),
        ("debug=fake", "debug=fake"),
        ("trainer.debug=true", "trainer.debug=true"),
        ("base.compile=true", "base.compile=true"),
        ("--cfg", "--cfg"),
    ],
)
def test_the_two_choices_that_hydra_would_read_as_booleans_are_quoted(said: str, taken: str) -> None:
    assert config.quoted(said) == taken


@pytest.mark.parametrize(("said", "value"), [("true", True), ("false", False), ("one_step", "one_step")])
def test_debug_names_a_choice(said: str, value: object) -> None:
    assert config.compose("train", [f"debug={said}"]).debug == value
    assert config.compose("export", ["debug=true", "run_dir=a"]).debug is True


def test_debug_overrides_the_experiment_and_is_overridden_by_the_command_line() -> None:
    cfg = config.compose("train", ["experiment=medusa1_vicuna_7b", "debug=overfit", "trainer.max_steps=5"])
    assert (cfg.trainer.max_steps, cfg.trainer.epochs, cfg.data.one_batch) == (5, None, True)
    assert cfg.data.prompts.path == "sharegpt.jsonl"


def test_a_debug_choice_of_training_is_refused_by_verbs_that_do_not_train() -> None:
    with pytest.raises(ConfigError, match=r"debug=fake: sets data, which evaluate has not; it is train's and plan's"):
        config._refuse_unknown(config.compose("evaluate", ["debug=fake", "run_dir=a"]), "evaluate")


def test_compose_takes_overrides() -> None:
    assert config.compose("train", ["seed=5"]).seed == 5


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("a: b"), 2),
        (errors.DataError("a: b"), 3),
        (errors.NumericsError("a: b"), 4),
        (errors.ResourceError("a: b"), 5),
        (errors.PeerError("a: b"), 6),
        (errors.Interrupted("a: b"), 75),
        (MemoryError("a: b"), 5),
        (OSError(28, "a: b", "file"), 5),
        (None, 0),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: Exception | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        if error:
            raise error

    assert config._guarded(work, "train", debug=False) == code
    said = capsys.readouterr()
    assert said.out == ""
    told = said.err.splitlines()
    assert len(told) == (0 if error is None else 2 if code == 75 else 1)
    assert code != 75 or told[1].startswith("resume: draftsmith train")
    if error:
        assert said.err.startswith("error: ")
        assert "a: b" in said.err


@pytest.mark.parametrize(("code", "started", "at_once"), [(0, True, False), (75, True, True), (75, False, False)])
def test_who_started_others_leaves_at_once(
    code: int, started: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If something is wrong: then torch's threads may not come to an end."""
    left: list[int] = []
    monkeypatch.setattr(config.os, "_exit", left.append)
    monkeypatch.delenv(config.LAUNCHED, raising=False)
    if started:
        monkeypatch.setenv(config.LAUNCHED, "1")
    with pytest.raises(SystemExit) as ended:
        config._leave(code)
    assert ended.value.code == code
    assert left == [code] * at_once


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise errors.DataError("a: b")

    assert config._guarded(work, "train", debug=True) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_of_ours_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With its kind and place, and no code that means something else."""
    assert config._guarded(lambda: 1 / 0, "train", debug=False) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train: ZeroDivisionError" in said
    assert "test_config.py" in said


@pytest.mark.parametrize(("base", "kind"), [(errors.ConfigError, ValueError), (errors.ResourceError, OSError)])
def test_errors_are_also_what_python_calls_them(base: type, kind: type) -> None:
    assert issubclass(base, kind)


def test_configuration_needs_no_heavy_package() -> None:
    """A mistyped key must answer at once: neither torch nor lightning nor transformers is imported for it."""
    heavy = "('torch', 'lightning', 'transformers', 'deepspeed', 'wandb')"
    code = (
        f"import sys, draftsmith.config, draftsmith.training.settings; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_changed_configuration_is_what_its_overrides_would_compose() -> None:
    before = config.compose("train", ["seed=3", "head=[medusa,hydra]"])
    made = config.changed(
        before, "train", ["head=[kangaroo]", "heads.kangaroo.depth=2", "base=small", "data.packing=false"]
    )
    want = ["seed=3", "head=[kangaroo]", "heads.kangaroo.depth=2", "base=small", "data.packing=false"]
    assert made == config.compose("train", want)
    assert list(config.changed(before, "train", ["~heads.hydra"]).heads) == ["medusa"]
    assert list(before.heads) == ["medusa", "hydra"]  # a copy
