"""Ground <- rooms <- roof: who may import whom, what may lie where, how long things may be."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from draftsmith.cli import VERBS

ROOT = Path(__file__).parents[1]
SRC, CONF, PACKAGE = ROOT / "src", ROOT / "conf", "draftsmith"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The ground, and what of ours each part of it may import.
GROUND: dict[str, set[str]] = {
    "errors": set(),
    "contracts": set(),
    "growth": {"errors"},
    "roles": {"contracts", "growth"},
    "drafting": {"contracts", "errors", "growth", "roles"},
    "targets": {"contracts", "errors"},
    "eager_losses": set(),
    "shown": set(),
    "losses": {"contracts", "errors", "eager_losses"},
    "faults": set(),
    "signals": {"errors"},
    "room": {"artifacts", "errors"},
    "artifacts": {"contracts", "errors", "faults"},
    "grid": {"shown"},
    "guard": {"errors"},
    "typos": set(),
    "config": {"contracts", "errors", "artifacts", "grid", "guard", "room", "shown", "signals", "typos"},
}
ROOMS = {"base", "heads", "data", "decoding", "training", "exporters", "reporting"}
ROOF = {p.stem for p in SRC.glob("*.py")} - GROUND.keys() - {"__init__"} | {"serving"}

TORCH_ONLY = {"heads", "decoding"}
# Packages from outside -> the only places that may name them, TYPE_CHECKING included.
HOMES: dict[str, set[str]] = {
    "hydra": ROOF | {"config", "grid", "typos", "guard"},
    "omegaconf": ROOF | {"config", "grid", "typos"},
    "lightning": ROOF | {"training", "data"},
    "deepspeed": {"training"},
    "wandb": {"training"},
    "transformers": {"base", "data"},
    "tokenizers": {"base", "data"},
    "peft": {"base"},
    "torchao": {"base"},
    "datasets": {"data"},
    "httpx": {"data"},
    "openai": {"data"},
    "huggingface_hub": {"pushing", "base"},
    "matplotlib": {"reporting"},
    "vllm": {"serving"},
    "optuna": {"sweep"},
}
INSTALLED_AS = {"hydra-core": "hydra", "PyYAML": "yaml", "liger-kernel": "liger_kernel"}  # -> name to import
HEAVY = ("transformers", "lightning", "deepspeed", "datasets", "wandb", "peft", "tokenizers", "torchao")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

FILES = sorted(SRC.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))


def place(path: Path, src: Path = SRC) -> str:
    """The ground file, room or roof file that a path belongs to."""
    return path.relative_to(src).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere: at the top, in functions, under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def import_faults(me: str, source: str) -> list[str]:
    """What is wrong with the imports of a file of `me`, one line each."""
    allowed = {*GROUND, *ROOMS, *ROOF} if me in ROOF else {*GROUND, me} if me in ROOMS else GROUND[me]
    faults = []
    for name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        if not top:
            faults.append(f"{name}: relative; write the absolute name")
        elif top == PACKAGE and (rest or ["api"])[0] not in allowed:
            faults.append(f"{name}: {me} may import {sorted(allowed)}")
        elif me not in HOMES.get(top, {me}):
            faults.append(f"{name}: may be imported by {sorted(HOMES[top])}")
        elif me in TORCH_ONLY and top not in {PACKAGE, "torch", *sys.stdlib_module_names}:
            faults.append(f"{name}: {me} needs nothing but torch")
    return faults


@each_file
def test_imports_follow_the_floor_plan(path: Path) -> None:
    me = place(path)
    if me == "__init__":
        assert not import_faults("api", path.read_text())
        return
    assert me in GROUND.keys() | ROOMS | ROOF, f"src/{me}: a new name; give it a floor in this test first"
    assert import_faults(me, path.read_text()) == []


@pytest.mark.parametrize(
    ("me", "source"),
    [
        ("heads", "from draftsmith.base.lm import BaseLM"),
        ("heads", "from draftsmith import base"),
        ("decoding", "import draftsmith.heads.medusa"),
        ("training", "def f():\n    from draftsmith.train import run"),
        ("data", "if TYPE_CHECKING:\n    from draftsmith.base.lm import BaseLM"),
        ("contracts", "from draftsmith.errors import ConfigError"),
        ("artifacts", "from draftsmith import config"),
        ("exporters", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("base", "import omegaconf"),
        ("decoding", "import numpy as np"),
        ("heads", "from safetensors.torch import save_file"),
        ("train", "import wandb"),
        ("train", "import transformers.utils"),
        ("base", "from . import kv"),
        ("base", "from .kv import KV"),
    ],
)
def test_what_the_floor_plan_forbids_is_found(me: str, source: str) -> None:
    assert len(import_faults(me, source)) == 1


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Function-level imports count too; only names for the type checker, and the package's lazy API, do not."""
    graph = {name_of(p): runtime_imports(p) for p in FILES if p != SRC / "__init__.py"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"import cycle: {' <- '.join(e.args[1])}")
    assert graph["draftsmith.heads.medusa"] >= {"draftsmith.heads.blocks", "draftsmith.contracts"}


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join((PACKAGE, *parts)).removesuffix(".__init__")


def runtime_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    modules = {name_of(p) for p in FILES} - {PACKAGE}
    found = {re.sub(r"\.__init__$", "", name) for name in imported(tree)}
    return {n if n in modules else n.rpartition(".")[0] for n in found} & modules


def declared() -> set[str]:
    """Import names of every requirement in pyproject.toml, extras included."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = [re.split(r"[^A-Za-z0-9._-]", r)[0] for r in wanted]
    return {INSTALLED_AS.get(n, n.replace("-", "_")) for n in names}


def test_every_package_from_outside_is_declared() -> None:
    known = {PACKAGE, *declared(), *sys.stdlib_module_names}
    used = {(name.split(".")[0], place(p)) for p in FILES for name in imported(ast.parse(p.read_text()))}
    assert sorted((top, where) for top, where in used if top not in known) == []


def test_no_name_in_src_shadows_another_module() -> None:
    """`python src/train.py` puts src/ first on the path: src/types.py or src/torch/ would then be imported
    for everybody."""
    here = {p.stem for p in SRC.iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__", "__pycache__"}
    assert here & sys.stdlib_module_names == set()
    assert here & declared() == set()


def test_there_is_no_folder_for_odds_and_ends() -> None:
    assert [p for p in SRC.rglob("*") if p.stem.rstrip("s") in {"util", "helper", "misc", "common"}] == []


@each_file
def test_init_files_are_empty(path: Path) -> None:
    if path.name == "__init__.py" and path.parent != SRC:
        assert path.read_text() == ""


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_nothing_is_left_to_be_done() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    texts = [*FILES, *CONF.rglob("*.yaml")]
    assert len(texts) > 50
    assert [str(p.relative_to(ROOT)) for p in texts if marks.search(p.read_text())] == []


def test_a_wheel_holds_every_folder() -> None:
    """An editable install finds a folder that `packages` forgot; a wheel does not."""
    homes = {p.parent for p in FILES} | {p.parent for p in CONF.rglob("*.yaml")}
    assert [str(h.relative_to(ROOT)) for h in homes if not (h / "__init__.py").exists()] == []
    names = {".".join((PACKAGE, *h.relative_to(SRC).parts)) for h in homes if h.is_relative_to(SRC)}
    names |= {".".join((PACKAGE, "conf", *h.relative_to(CONF).parts)) for h in homes if h.is_relative_to(CONF)}
    told = PROJECT["tool"]["setuptools"]["packages"]
    assert len(told) == len(set(told))
    assert set(told) == names


LIGHT = ("quickstart", "distill", "train", "bakeoff")  # loaded first: what one verb loads, the next ones have too


def test_verbs_import_nothing_heavy() -> None:
    """`--help` and a mistyped key answer in a moment only while importing a verb loads no large package."""
    modules = [f"draftsmith.{name}" for name in dict.fromkeys(("cli", "config", *LIGHT, *VERBS))]
    code = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    loaded[name] = [m for m in sys.modules if '.' not in m]\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert {name: sorted(set(HEAVY) & set(found)) for name, found in loaded.items() if set(HEAVY) & set(found)} == {}
    assert not {"torch", "hydra"} & set(loaded["draftsmith.cli"])
    for name in ("config", *LIGHT):
        assert "torch" not in loaded[f"draftsmith.{name}"], name
