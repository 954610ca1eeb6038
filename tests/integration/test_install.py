"""What a stranger does first: the scripts, and a wheel in an empty environment far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])
VERBS = sorted(p.stem for p in ROOT.glob("conf/*.yaml") if (ROOT / "src" / p.name).with_suffix(".py").exists())


def run(*command: object, cwd: Path, ok: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | changes
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert not ok or done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build/ behind, and packs what an earlier one left there."""
    checkout = tmp_path_factory.mktemp("checkout") / "draft smith"
    litter = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=litter)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel. It sees this environment's packages, which cost a gigabyte, but not the
    checkout: Python runs no .pth file, and so no editable install, of a folder that a .pth file names."""
    home = tmp_path_factory.mktemp("far away") / "venv"
    venv.create(home, with_pip=False)
    inside = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q", "--no-deps", "--no-index",
        wheel, cwd=home)  # fmt: skip
    (inside / "outside.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))))
    return home


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = [*ROOT.glob("src/**/*.py"), *ROOT.glob("src/reporting/templates/*")]
    source = {f"draftsmith/{p.relative_to(ROOT / 'src')}" for p in kept}
    conf = {
        f"draftsmith/conf/{p.relative_to(ROOT / 'conf')}"
        for p in ROOT.glob("conf/**/*")
        if p.suffix in (".yaml", ".py")
    }
    assert sorted((source | conf | {"draftsmith/py.typed"}) - names) == []
    extra = {n for n in names - source - conf - {"draftsmith/py.typed"} if ".dist-info/" not in n}
    assert sorted(extra) == []


@pytest.mark.slow
def test_the_wheel_works_from_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    python = elsewhere / "bin" / "python"
    where = run(python, "-c", "import draftsmith; print(draftsmith.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(elsewhere)
    usage = run(elsewhere / "bin" / "draftsmith", "--help", cwd=tmp_path).stdout
    assert [verb for verb in VERBS if verb not in usage] == []
    assert "trainer" in run(elsewhere / "bin" / "draftsmith", "train", "--help", cwd=tmp_path).stdout
    assert "heads:" in run(python, "-m", "draftsmith.train", "--cfg", "job", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart(elsewhere: Path, tmp_path: Path) -> None:
    cache = {"DRAFTSMITH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    short = "train=['trainer.max_steps=20']"
    run(elsewhere / "bin" / "draftsmith", "quickstart", "run_dir=out", short, cwd=tmp_path, **cache)
    assert (tmp_path / "out" / "evaluation.json").exists()
    assert (tmp_path / "out" / "heads" / "medusa" / "model.safetensors").exists()
    assert any((tmp_path / "out" / "export" / "portable").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path, tmp_path: Path) -> None:
    run("bash", "-n", script, cwd=tmp_path)
    assert os.access(script, os.X_OK) or script.name == "common.sh"
    if shutil.which("shellcheck"):
        run("shellcheck", "-x", "-P", script.parent, script, cwd=tmp_path)


def old_python(folder: Path) -> Path:
    """A PATH with the plain tools and, under every name, a python of long ago."""
    folder.mkdir()
    for tool in ("bash", "cat", "dirname", "ls", "mkdir", "mv", "rm", "tail", "grep"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for name in ("python", "python3", "python3.11"):
        (folder / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"\nexit 1\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def setup(tmp_path: Path) -> Path:
    """scripts/setup.sh of a copied checkout, so that no environment of this one is touched."""
    checkout = tmp_path / "draft smith"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    return checkout / "scripts" / "setup.sh"


def test_setup_refuses_an_old_python_in_one_line(setup: Path, tmp_path: Path) -> None:
    path = {"PATH": str(old_python(tmp_path / "bin")), "PYTHON": "", "VENV": str(tmp_path / "venv")}
    done = run("bash", setup, cwd=tmp_path, ok=False, **path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "Python 3.11" in line
    assert done.stdout == ""
    assert not (tmp_path / "venv").exists()


def test_setup_leaves_a_folder_that_is_no_environment_alone(setup: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("three years")
    done = run("bash", setup, cwd=tmp_path, ok=False, VENV="venv", PYTHON=sys.executable)
    assert done.returncode == 1
    assert "choose another VENV" in done.stderr
    assert [p.name for p in (tmp_path / "venv").iterdir()] == ["thesis.txt"]


def test_setup_installs_once_and_again_when_something_changed(setup: Path, tmp_path: Path) -> None:
    """pip replaced by a fake that writes down what it is asked: which stages run is all that matters here."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    inside = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    (inside / "pip").mkdir()
    (inside / "pip" / "__main__.py").write_text(
        "import os, shlex, sys\n"
        "told = shlex.join(sys.argv[1:])\n"
        "if 'install' in told: open(os.environ['ASKED'], 'a').write(told + '\\n')\n"
        "if os.environ.get('FAIL') == sys.argv[-1]: sys.exit('no such thing')\n"
    )
    (inside / "torch-2.13.0+cpu.dist-info").mkdir()
    (inside / "torch-2.13.0+cpu.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0+cpu\n")
    asked = tmp_path / "asked"

    def installs(*extras: str, ok: bool = True, **changes: str) -> list[str]:
        asked.write_text("")
        run("bash", setup, *extras, cwd=tmp_path, ok=ok, **{"VENV": str(home), "ASKED": str(asked), **changes})
        ours = f"install -c {home}/constraints.txt -e "
        return [line.removeprefix(ours) for line in asked.read_text().splitlines()]

    torch = "install torch==2.13.0"
    assert installs("dev,lora") == [torch, "'.[dev,lora]'"]
    assert "torch==2.13.0+cpu" in (home / "constraints.txt").read_text().splitlines()
    assert installs("dev", "lora") == installs("dev") == installs() == []
    assert installs("wandb") == [torch, "'.[dev,lora,wandb]'"]  # what was there stays
    assert installs(ok=False, TORCH_INDEX="here", FAIL=".[dev,lora,wandb]")[:1] == ["uninstall -y torch"]
    assert installs("hub") == ["install --index-url here torch==2.13.0", "'.[hub]'"]  # a failure leaves no stamp
    assert installs(TORCH="skip") == ["'.[hub]'"]
    with (setup.parents[1] / "constraints.txt").open("a") as f:
        f.write("# renewed\n")
    assert installs() == ["'.[hub]'"]  # and still the torch that is there
    assert "no such extra: devv" in run("bash", setup, "devv", cwd=tmp_path, ok=False, VENV=str(home)).stderr
