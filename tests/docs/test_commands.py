"""Every command of README.md and docs/ is tagged, and works.

```bash run      is typed as it stands, page by page in file order, in a folder with what conftest.py puts there
                 (marker `docs`, make test-docs). Only SMALL is added, so that a page takes seconds.
```bash compose  needs what a test has not: hours, GPUs, several nodes, a hub. Its configuration is composed, every
                 part of it typed, and a training planned; a script or a make target must be there.
In the latter `…` is what only the reader knows; alone it is the rest of a command that was told before.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from integration.conftest import Fork, finish, start

from draftsmith import config, plan, schemas
from draftsmith.cli import VERBS

from .reading import ROOT, SHELLS, TAGS, Block, blocks, commands, lines, pages, words

# What a run block's command gets beside what the page says, by verb. A key that the page itself gives is overruled.
SMALL: dict[str, list[str]] = {
    "train": ["trainer.max_steps=4", "trainer.epochs=null", "trainer.threads=1"],
    "distill": ["data.generation.max_new_tokens=24", "threads=1"],
    "doctor": ["policy_tokens=200", "threads=1"],
    "label": ["threads=1"],
    "capture": ["threads=1"],
    "evaluate": ["prompts.synthetic=2", "decoding.max_new_tokens=12", "repeats=1", "baselines=few", "threads=1"],
    "sweep": ["trials=2", "selection.synthetic=2", "selection.text=0", "decoding.max_new_tokens=12"],
    "tune": ["prompts.synthetic=4", "decoding.max_new_tokens=12", "repeats=1", "sizes=[4]", "threads=1"],
}
SMALL["sweep"] = ["trials=2", "selection.synthetic=2", "selection.text=0", "decoding.max_new_tokens=12"]
# ... and where the base answers made-up prompts first
FEW = ["data.prompts.synthetic=16", "data.generation.max_new_tokens=24"]
LONGEST = 900  # seconds of one command: the first one of all may have to make the tiny base
ANSWERS = {"train", "distill"}  # the verbs that do so unless `data` says otherwise


def small(verb: str, given: list[str]) -> list[str]:
    chosen = {word.split("=")[0]: word.partition("=")[2] for word in given}
    made_up = verb in ANSWERS and "debug" not in chosen
    made_up &= {chosen.get(group, "quickstart") for group in ("data", "experiment")} == {"quickstart"}
    more = [*SMALL.get(verb, []), *(FEW if made_up else [])]
    return [word for word in more if word.split("=")[0] not in chosen or "." in word.split("=")[0]]


ALL = [block for page in pages() for block in blocks(page)]
RUNNING = sorted({b.page for b in ALL if b.tag == "run"})
COMPOSED = [b for b in ALL if b.language == "bash" and b.tag == "compose"]


def test_every_command_is_tagged() -> None:
    """An untagged one is a promise that nobody keeps; `bash` is the one name of a shell."""
    for block in ALL:
        if block.language in SHELLS:
            assert block.language == "bash", f"{block.where}: write bash, not {block.language}"
        if block.language in {"bash", "python"}:
            assert block.tag in TAGS, f"{block.where}: ```{block.language} run or ```{block.language} compose"
        else:
            assert not block.tag, f"{block.where}: a tag on {block.language or 'a plain block'}"
            found = re.search(r"^(?:\$ |draftsmith \w+ \w+=|make [a-z]|pip install)", block.text, flags=re.MULTILINE)
            assert found is None, f"{block.where}: a command in a plain block; put it into ```bash run or compose"


def test_there_are_both_kinds_and_the_first_page_is_run() -> None:
    assert ROOT / "README.md" in RUNNING
    assert len(RUNNING) >= 8
    assert len(COMPOSED) >= 20


@pytest.mark.docs
@pytest.mark.parametrize("page", RUNNING, ids=lambda p: p.stem)
def test_what_a_page_says_to_run_runs(page: Path, folder: Path, cache: str) -> None:
    for block in (b for b in blocks(page) if b.tag == "run"):
        steps = lines(block.text) if block.language == "bash" else [block.text]
        for step in steps:
            code, output = once(step, folder, cache) if block.language == "bash" else python(step, folder, cache)
            assert code == 0, f"{block.where}: {step}\n{output}"


def python(text: str, folder: Path, cache: str) -> tuple[int, str]:
    return finish(start([sys.executable, "-c", text], folder, DRAFTSMITH_CACHE=cache))


def once(line: str, folder: Path, cache: str) -> tuple[int, str]:
    """(exit code, output) of one line: a verb alone in a process of ours, anything else by bash."""
    simple = words(line)
    first = simple[0]
    if len(simple) == 1 and first[:1] == ["draftsmith"] and ">" not in line:
        verb, given = first[1], first[2:]
        return finish(Fork(verb, *given, *small(verb, given), cwd=folder, DRAFTSMITH_CACHE=cache), LONGEST)
    assert all(one[0] not in {"draftsmith", "make", "pip"} for one in simple), f"not run here: {line}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return finish(start(["bash", "-euo", "pipefail", "-c", line], folder, DRAFTSMITH_CACHE=cache, PATH=path))


def test_what_is_added_to_a_page_s_commands_are_keys_of_the_verbs() -> None:
    for name in SMALL:
        assert schemas.check(name, schemas.fill(config.compose(name, small(name, []))))


@pytest.mark.parametrize("block", COMPOSED, ids=lambda b: b.where)
def test_what_a_page_says_for_other_machines_composes(block: Block) -> None:
    for environment, one in commands(block.text):
        works(one, environment, block)


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=lambda b: b.where)
def test_the_names_that_python_blocks_import_are_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("draftsmith"):
            for alias in node.names:
                assert hasattr(import_module(node.module or ""), alias.name), f"{block.where}: {alias.name}"


def test_commands_within_sentences_compose_too() -> None:
    """`draftsmith VERB key=value` in a line of prose; with `…` or a key without its value it is no whole command."""
    found = 0
    for page in pages():
        prose = re.sub(r"^( *)(`{3,}).*?^ *\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for text in re.findall(r"`(draftsmith [^`…]+)`", prose):
            simple = words(" ".join(text.split()))[0]
            if len(simple) > 1 and simple[1].islower() and not any(word.endswith("=") for word in simple):
                works(simple, {}, Block(page, 0, "bash", "compose", text))
                found += 1
    assert found >= 10


# --- one command of a compose block -------------------------------------------------------------------------------


def works(one: list[str], environment: dict[str, str], block: Block) -> None:
    try:
        composed(one, environment, block)
    except (config.DraftsmithError, config.HydraException, config.OmegaConfBaseException) as e:
        pytest.fail(f"{block.where}: {' '.join(one)}\n{e}")


def composed(one: list[str], environment: dict[str, str], block: Block) -> None:
    name = one[0]
    check = KNOWN.get(name) or (script if name.startswith("scripts/") else None)
    assert check is not None, f"{block.where}: '{name}' is no command that this test knows; see KNOWN"
    check(one, environment, block)


def verb(one: list[str], environment: dict[str, str], block: Block) -> None:
    assert one[1] in VERBS or one[1] in {"-h", "--help"}, f"{block.where}: no verb {one[1]}"
    if one[1] in VERBS:
        fits(one[1], one[2:])


def fits(name: str, given: list[str]) -> None:
    """Everything composes and fits its dataclass; of a sweep, each of its jobs. A training has a plan."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = {"--help", "--cfg", "job", "-m", "--multirun", "--resolve", "…"}
    asked = [word.replace("…", "given") for word in given if word not in flags]
    several = "-m" in given or "--multirun" in given
    parsed = OverridesParser.create().parse_overrides(asked)
    assert several or not any(p.is_sweep_override() for p in parsed), f"{given}: values to sweep over need -m"
    jobs = itertools.product(
        *(
            [f"{p.get_key_element()}={v}" for v in p.sweep_string_iterator()] if p.is_sweep_override() else [text]
            for p, text in zip(parsed, asked, strict=True)
        )
    )
    for job in jobs:
        cfg = schemas.fill(config.compose(name, job))
        schemas.check(name, cfg)
        if name == "train" and (cfg.base.shape is not None or cfg.base.recipe is not None):  # else nobody here knows it
            asked = [word for word in job if not word.startswith("run_dir=")]
            assert plan.run(schemas.fill(config.compose("plan", asked)))["what"]


def module(one: list[str], environment: dict[str, str], block: Block) -> None:
    """python -m draftsmith.VERB …, torchrun … -m draftsmith.VERB …"""
    place = one.index("-m")
    package, _, name = one[place + 1].partition(".")
    assert package == "draftsmith", f"{block.where}: {one}"
    if name in VERBS:
        fits(name, one[place + 2 :])
    else:
        assert (ROOT / "src" / f"{name}.py").exists(), f"{block.where}: no module {name}"


# scripts that hand their arguments to a verb, which the variable VERB may change
HANDS_ON = {"torchrun.sh": "train", "deepspeed.sh": "train", "slurm.sbatch": "train", "quickstart.sh": "quickstart"}
HANDS_ON |= {"bench.sh": "bench"}


def script(one: list[str], environment: dict[str, str], block: Block) -> None:
    file = ROOT / one[0]
    assert file.exists(), f"{block.where}: no {one[0]}"
    if file.suffix in {".sh", ".sbatch"}:
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if file.name == "two_nodes.sh" and one[1] == "on":  # what stands in front is for the command behind
        composed(one[3:], environment, block)
        return
    asked = set(re.findall(r"\$\{(\w+)", file.read_text() + (ROOT / "scripts" / "common.sh").read_text()))
    assert set(environment) <= asked, f"{block.where}: {file.name} reads {sorted(asked)}"
    if file.name in HANDS_ON:
        fits(environment.get("VERB", HANDS_ON[file.name]), one[1:])


def sbatch(one: list[str], environment: dict[str, str], block: Block) -> None:
    place = next(i for i, word in enumerate(one) if word.endswith(".sbatch"))
    assert all(word.startswith("--") for word in one[1:place]), f"{block.where}: {one}"
    script(one[place:], environment, block)


def make(one: list[str], environment: dict[str, str], block: Block) -> None:
    target = one[1]
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.where}: {done.stderr}"
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    for word in one[2:]:
        assert word.startswith("ARGS="), f"{block.where}: {word}"
        if target == "quickstart":
            fits("quickstart", word.removeprefix("ARGS=").split())


def pinned(words: list[str], block: Block) -> list[str]:
    """The words but for -r and its file, which has to be there."""
    if "-r" in words:
        at = words.index("-r")
        assert (ROOT / words[at + 1]).is_file(), f"{block.where}: {words[at + 1]}"
        words = words[:at] + words[at + 2 :]
    return words


def audit(one: list[str], environment: dict[str, str], block: Block) -> None:
    assert all(word.startswith("--") for word in pinned(one[1:], block)), f"{block.where}: {one}"


def pip(one: list[str], environment: dict[str, str], block: Block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert one[1] == "install"
    named = [word for word in pinned(one[2:], block) if not word.startswith("-")]
    for word in named:
        found = re.fullmatch(r"(?:draftsmith|\.)(?:\[([\w,]+)\])?", word)
        assert found, f"{block.where}: pip install of {word}"
        assert set((found[1] or "").split(",")) - {""} <= set(extras), f"{block.where}: {word}"


def serve(one: list[str], environment: dict[str, str], block: Block) -> None:
    """A server's own command: on a page that exported before, with JSON where it wants JSON."""
    before = "".join(b.text for b in blocks(block.page) if b.line <= block.line)
    assert "draftsmith export" in before, f"{block.where}: {one[0]} of something that was not exported"
    for flag, value in itertools.pairwise(one):
        if flag.endswith("-config"):
            json.loads(value)


def setup(one: list[str], environment: dict[str, str], block: Block) -> None:
    assert one[1:] == [".venv/bin/activate"], f"{block.where}: {one}"


def wandb(one: list[str], environment: dict[str, str], block: Block) -> None:
    """W&B's own command line: a file of ours that it is given is there."""
    assert one[1] in {"sweep", "agent", "sync", "login"}, f"{block.where}: {one}"
    for word in one[2:]:
        if word.endswith(".yaml"):
            assert (ROOT / word).exists(), f"{block.where}: no {word}"


def plain(one: list[str], environment: dict[str, str], block: Block) -> None:
    """A command of the system whose words say nothing about us."""
    assert not any(word.startswith("draftsmith") for word in one[1:]), f"{block.where}: {one}"


KNOWN: dict[str, Callable[[list[str], dict[str, str], Block], None]] = {
    "draftsmith": verb,
    "python": module,
    "torchrun": module,
    "sbatch": sbatch,
    "make": make,
    "pip-audit": audit,
    "pip": pip,
    ".": setup,
    "vllm": serve,
    "wandb": wandb,
    "printf": plain,
    "hf": plain,
    "cd": plain,
    "export": plain,
    "ls": plain,
    "cat": plain,
    "kill": plain,
}


def test_a_command_that_does_not_fit_is_found() -> None:
    """The check itself, on what pages must not say."""

    def block(text: str) -> Block:
        return Block(ROOT / "README.md", 1, "bash", "compose", text)

    wrong = [
        "draftsmith trian",
        "draftsmith train head=[medusas]",
        "draftsmith train trainer.max_step=3",
        "draftsmith train seed=1,2",
        "draftsmith evaluate run_dir=a gate.threshold=0.5 gate=sure",
        "NPROCS=2 scripts/torchrun.sh strategy=ddp",
        "scripts/torchrun.sh strategy=zero9",
        "scripts/torch_run.sh strategy=ddp",
        "VERB=distil scripts/torchrun.sh out=rows",
        "make tests",
        "pip install 'draftsmith[vlm]'",
        "sl",
    ]
    for text in wrong:
        ((environment, one),) = commands(text)
        with pytest.raises((AssertionError, config.DraftsmithError, config.HydraException, KeyError)):
            composed(one, environment, block(text))
    for text in (
        "draftsmith train -m seed=1,2",
        "A='seed=1 head=[medusa]'\ndraftsmith train $A",
        "make test ARGS='-k a'",
    ):
        for environment, one in commands(text):
            composed(one, environment, block(text))


def test_lines_are_read_as_a_shell_reads_them() -> None:
    text = "a b  # c\n\n# d\ne \\\n  f 'g\n h' &\nN=1 M='x y' i $j\nk > l && m | n\n"
    assert list(commands(text)) == [
        ({}, ["a", "b"]),
        ({}, ["e", "f", "g\n h"]),
        ({"N": "1", "M": "x y"}, ["i", "$j"]),
        ({}, ["k"]),
        ({}, ["m"]),
        ({}, ["n"]),
    ]
