"""What can run somebody else's words is called nowhere in src/ but where it says here, and why that is no danger."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"

# Calls by the end of their dotted name. Methods that only sound like one (module.eval()) are told apart by `named`.
DANGEROUS = {
    "eval": "runs words",
    "exec": "runs words",
    "compile": "makes words into code",
    "__import__": "imports by name",
    "import_module": "imports by name",
    "run_module": "imports by name",
    "run_path": "runs a file",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "cloudpickle.load": "unpickles",
    "dill.load": "unpickles",
    "joblib.load": "unpickles",
    "torch.load": "unpickles",
    "torch.hub.load": "runs a repository's code",
    "hub.load": "runs a repository's code",
    "load_from_checkpoint": "unpickles, and makes classes by name",
    "np.load": "may unpickle",
    "numpy.load": "may unpickle",
    "read_pickle": "unpickles",
    "yaml.load": "makes objects by name",
    "yaml.unsafe_load": "makes objects by name",
    "yaml.full_load": "makes objects by name",
    "instantiate": "makes objects by name",
    "get_class": "imports by name",
    "get_method": "imports by name",
    "OmegaConf.load": "resolves references to the environment",
    "extractall": "writes where an archive says",
    "extract": "writes where an archive says",
    "unpack_archive": "writes where an archive says",
    "os.system": "a shell",
    "os.popen": "a shell",
    "getoutput": "a shell",
    "Environment": "templates that may call anything",
    "Template": "templates that may call anything",
    "from_string": "templates that may call anything",
    "mktemp": "a name that another may take first",
    "load_dataset": "downloads, and ran scripts once",
    "load_from_disk": "reads what a folder names",
    "urlopen": "follows redirects with whatever it was given",
    "urlretrieve": "follows redirects with whatever it was given",
    "Client": "a client of a server",
    "AsyncClient": "a client of a server",
    "snapshot_download": "fetches whole repositories",
    "rmtree": "deletes folders",
    "copytree": "copies folders",
    "symlink_to": "links",
    "symlink": "links",
    "register_new_resolver": "functions that a yaml may call",
    "setattr": "attributes by name",
}

# (file, call) -> why it may.
ALLOWED = {
    (
        "config.py",
        "import_module",
    ): "target: of our own packages and torch.optim.AdamW alone, as it checks before",
    ("exporters/custom_generate.py", "compile"): "our own constant text, as a check of its syntax; it is not run",
    ("reference.py", "OmegaConf.load"): "our own conf, for the documentation",
    ("schemas.py", "OmegaConf.load"): "our own conf",
    (
        "data/script.py",
        "Environment",
    ): "parses a chat template; rendering is transformers' sandbox",
    ("reporting/report_page.py", "Environment"): "our own two templates; HTML is escaped",
    ("data/sources.py", "load_dataset"): "of `datasets` 5, which runs no scripts; data.hub asks for it",
    ("data/server.py", "AsyncClient"): "follow_redirects=False and a timeout, see below",
    ("artifacts.py", "rmtree"): "our own temporary names and what an exchange moved aside; a link is not followed",
    ("bench_data.py", "rmtree"): "what the bench has just made itself",
    ("training/fit.py", "rmtree"): "checkpoints of the run that this process holds the lock of",
    ("data/journal.py", "rmtree"): "its own litter, by a constant tuple of names",
    ("exporters/native.py", "rmtree"): "the rehearsal's own folder",
    ("exporters/card.py", "copytree"): "our own published folder into a temporary one",
    ("certify.py", "copytree"): "our own published folder into a temporary one",
    ("base/pieces.py", "setattr"): "a table's constant attribute",
}
MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "tarfile",
    "zipfile",
    "imp",
    "xml",
    "telnetlib",
}

FILES = sorted(SRC.rglob("*.py"))
OWN = {  # they give it nothing of anybody else's
    "data/script.py": "parses templates, renders none",
    "base/shapes.py": "a model of the sizes that our own configuration names",
}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def place(path: Path) -> str:
    return str(path.relative_to(SRC))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(entry of DANGEROUS, the call). model.eval() takes no argument and base.compile() is ours: bare names only."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            for entry in DANGEROUS:
                bare = entry in ("eval", "exec", "compile", "setattr", "extract", "__import__")
                if name == entry or (not bare and name.endswith(f".{entry}")):
                    yield entry, node


def test_what_runs_somebody_elses_words_is_called_where_it_is_allowed_to_be() -> None:
    found = {(place(path), entry) for path in FILES for entry, _ in calls(path)}
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == [], "allowed, but no longer there"


def test_modules_that_unpickle_or_unpack_are_imported_nowhere() -> None:
    found = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(place(path), name): 1 for name in names if name.split(".")[0] in MODULES}
    assert sorted(found) == [("base/loading.py", "pickle")]  # for the name of the error that says no
    text = (SRC / "base" / "loading.py").read_text()
    assert text.count("pickle.") == text.count("pickle.UnpicklingError") == 1


@pytest.mark.parametrize(
    ("keyword", "values", "allowed"),
    [
        ("shell", {True}, set()),
        ("follow_redirects", {True}, set()),
        ("allow_redirects", {True}, set()),
        ("verify", {False}, set()),
        ("weights_only", {False}, set()),
        ("allow_pickle", {True}, set()),
        ("trust_remote_code", {True, None}, set()),
        ("use_safetensors", {False, None}, set()),
        ("autoescape", {False}, set()),
    ],
)
def test_a_safe_choice_is_nowhere_unmade(keyword: str, values: set[object], allowed: set[str]) -> None:
    found = {
        place(path)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword) and node.arg == keyword
        if isinstance(node.value, ast.Constant) and node.value.value in values
    }
    assert found == allowed


@pytest.mark.parametrize(
    ("call", "keyword"),
    [
        ("AutoConfig.from_pretrained", "trust_remote_code"),
        ("AutoTokenizer.from_pretrained", "trust_remote_code"),
        ("AutoModelForCausalLM.from_pretrained", "trust_remote_code"),
        ("AutoModelForCausalLM.from_pretrained", "use_safetensors"),
        ("AutoModelForCausalLM.from_config", "trust_remote_code"),
        ("AutoModelForCausalLM.from_config", "attn_implementation"),
        ("httpx.AsyncClient", "follow_redirects"),
        ("httpx.AsyncClient", "timeout"),
        ("Environment", "autoescape"),
    ],
)
def test_a_safe_choice_is_made_wherever_there_is_one(call: str, keyword: str) -> None:
    """Named at the call, or in the dict that the same function unpacks there: a default may be another tomorrow."""
    seen = 0
    for path in FILES:
        for function in (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or dotted(node.func) != call or place(path) in OWN:
                    continue
                seen += 1
                named = {k.arg for k in node.keywords}
                unpacked = any(k.arg is None for k in node.keywords)
                handed = f'"{keyword}"' in ast.unparse(function).replace("'", '"') or "source" in ast.unparse(node)
                assert keyword in named or (unpacked and handed), f"{place(path)}:{node.lineno}: {call}({keyword}=)"
    assert seen


def test_a_new_one_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torch\nx = torch.load('a')\ny = eval('1')\nm.eval()\nz = yaml.load(f, L)\n")
    assert {entry for entry, _ in calls(tmp_path / "a.py")} == {"torch.load", "eval", "yaml.load"}
