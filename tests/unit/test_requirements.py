"""What may be installed: the floors of pyproject.toml, the pins of constraints.txt, the hashes of requirements.lock."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "needed.py"))
requirements, needed = SCRIPT["requirements"], SCRIPT["needed"]
EXTRAS = SCRIPT["PROJECT"]["optional-dependencies"]
PINNED = [name for name in EXTRAS if name not in ("vllm", "runtimes")]  # those have environments of their own
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+?)(?: \\)?$", re.M)

# package -> versions that must not come in, and why
REFUSED = {
    "hydra-core": (["1.3.2", "1.3.7", "1.4.0"], "1.3.8 began to refuse dangerous _target_s; 1.4 asks for a whitelist"),
    "lightning": (["2.6.2", "2.6.3", "2.6.5"], "2.6.2 and 2.6.3 were malicious; 2.6.6 mends load_from_checkpoint"),
    "torch": (["2.9.1", "2.12.0"], "weights_only could be bypassed (CVE-2026-24747)"),
    "transformers": (["4.57.1", "5.2.0"], "trust_remote_code was read from inside a config (PYSEC-2026-2290)"),
    "jinja2": (["3.0.3"], "ways out of its sandbox"),
    "pyarrow": (["14.0.0", "20.0.0"], "types that were unpickled"),
    "httpx": (["0.27.0"], "never tested"),
}


def pins(file: str) -> dict[str, str]:
    found = PIN.findall((ROOT / file).read_text())
    twice = [name for name, n in Counter(canonicalize_name(name) for name, _ in found).items() if n > 1]
    assert twice == []
    return {canonicalize_name(name): version for name, version in found}


CONSTRAINTS = pins("constraints.txt")
LOCK = pins("requirements.lock")


@pytest.mark.parametrize("package", REFUSED)
def test_versions_that_are_known_to_be_bad_are_not_admitted(package: str) -> None:
    (asked,) = (r for r in requirements() if canonicalize_name(r.name) == package)
    admitted = [version for version in REFUSED[package][0] if asked.specifier.contains(version)]
    assert admitted == [], REFUSED[package][1]


def test_every_requirement_has_a_floor() -> None:
    asked = requirements(*EXTRAS)
    bare = [str(r) for r in asked if not any(s.operator in (">=", "==", "~=") for s in r.specifier)]
    assert bare == []
    assert [str(r) for r in asked if r.url] == []


def test_the_pins_are_what_pyproject_admits() -> None:
    asked = [r for r in requirements(*PINNED) if r.marker is None or r.marker.evaluate()]
    missing = [r.name for r in asked if canonicalize_name(r.name) not in CONSTRAINTS]
    assert missing == []
    found = [(str(r), CONSTRAINTS[canonicalize_name(r.name)], r.specifier) for r in asked]
    wrong = [(name, version) for name, version, admitted in found if not admitted.contains(version)]
    assert wrong == []


def test_all_that_is_installed_for_us_is_pinned_and_nothing_else_is() -> None:
    """A pin that nothing asks for may be anybody's name."""
    everything = needed(PINNED, CONSTRAINTS)
    assert sorted(everything - CONSTRAINTS.keys()) == []
    assert sorted(CONSTRAINTS.keys() - everything) == []


def test_lock_and_constraints_agree() -> None:
    assert {name: version for name, version in LOCK.items() if CONSTRAINTS.get(name) != version} == {}
    assert sorted(needed(["dev"], CONSTRAINTS) - LOCK.keys()) == ["torch"]
    assert sorted(LOCK.keys() - needed(["dev"], CONSTRAINTS)) == []


def test_every_line_of_the_lock_has_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=\S)", text.partition("\n\n")[2].strip())
    assert len(blocks) == len(LOCK)
    for block in blocks:
        assert re.fullmatch(r"[a-z0-9-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", block), block[:200]
    assert "://" not in text
    assert "index-url" not in text
