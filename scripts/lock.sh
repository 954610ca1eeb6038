#!/usr/bin/env bash
# scripts/lock.sh: requirements.lock anew, which says of every package of the developer's set (draftsmith[dev], and all
# that it needs) which files may be installed: the version of constraints.txt, and the sha256 of each file that pip's
# index offers for it. Run it after constraints.txt has changed, in the environment that scripts/setup.sh made.
#
#   VENV           whose draftsmith[dev] is looked at            default: .venv beside pyproject.toml
#   PIP_INDEX_URL  the package index that is asked               default: the one pip is configured with, else pip's own
#
# Nothing is written unless the index answered for every package. torch is left out: scripts/setup.sh chooses its build.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

cd -- "$root"
index=${PIP_INDEX_URL:-$("$VENV/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
"$VENV/bin/python" - "${index:-}" >requirements.lock.tmp <<'PY' || { rm -f requirements.lock.tmp; exit 1; }
import json, re, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor

from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version
from pip._internal.models.index import PyPI

sys.path.insert(0, "scripts")
from needed import needed

HEADER = """\
# What the developer's set may be installed from: draftsmith[dev] and all that it needs, by version and sha256.
# Written by scripts/lock.sh from constraints.txt; do not edit. torch is not here: scripts/setup.sh chooses its build,
# and it comes first. Nor are the packages that a build of torch brings along, or that only other extras need.
#
# LOCKED=1 scripts/setup.sh dev installs from it, and so does, where torch is already:
#   pip install --require-hashes --no-deps -r requirements.lock
"""
index = (sys.argv[1] or PyPI.simple_url).rstrip("/")
pins = dict(re.findall(r"^([\w.-]+)==(\S+)", open("constraints.txt").read(), re.M))
names = {canonicalize_name(name): name for name in pins}


def version_of(file):
    try:
        return parse_wheel_filename(file)[1] if file.endswith(".whl") else parse_sdist_filename(file)[1]
    except ValueError:  # an egg, an installer: nothing that pip takes
        return None


def hashes(name):
    asked = urllib.request.Request(f"{index}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read().decode()
    if text.lstrip().startswith("{"):
        files = [(f["filename"], f["hashes"].get("sha256")) for f in json.loads(text)["files"]]
    else:  # an index that knows the older form only: links that end in #sha256=…
        files = re.findall(r"/([^/\"]+)#sha256=([0-9a-f]{64})", text)
    wanted = Version(pins[names[name]])
    return sorted({sha for file, sha in files if sha and version_of(file) == wanted})


found = sorted(needed(["dev"], names) - {"torch"})
if bare := [name for name in found if name not in names]:
    sys.exit(f"lock: constraints.txt does not pin {', '.join(bare)}")
with ThreadPoolExecutor(8) as pool:
    told = dict(zip(found, pool.map(hashes, found)))
if none := [name for name in found if not told[name]]:
    sys.exit(f"lock: the index has no file with a sha256 for {', '.join(f'{n}=={pins[names[n]]}' for n in none)}")
print(HEADER)
for name in found:
    lines = "".join(f" \\\n    --hash=sha256:{sha}" for sha in told[name])
    print(f"{name}=={pins[names[name]]}{lines}")
PY
mv -- requirements.lock.tmp requirements.lock
printf 'lock: %s packages in requirements.lock\n' "$(grep -c '==' requirements.lock)"
