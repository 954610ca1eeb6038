"""Damaged folders of ours: rows, stores, labels, heads, checkpoints, runs; and those of another base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bad_kinds import Bad, World

Harm = Callable[[Path], Any]
HTML = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"


def cut(path: Path, count: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def flip(path: Path, at: int = -50) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def swap(one: Path, other: Path) -> None:
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def sealed(folder: Path, manifest: str = "manifest.json") -> None:
    """The manifest says what the files are now: whoever damaged them meant it."""

    def again(facts: dict[str, Any]) -> None:
        for name in facts["files"]:
            content = (folder / name).read_bytes()
            facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit(folder / manifest, again)


def harmed(what: str, kind: str, harm: Harm, says: str, *changes: str, verb: str = "train") -> Bad:
    """A copy of the world's folder `kind`, harmed, as data.path; or, of heads, as the only one to export."""

    def make(own: Path, world: World) -> list[str]:
        folder = own / kind
        shutil.copytree(world.folder / kind, folder)
        harm(folder)
        return [change.replace("@", str(folder)) for change in changes]

    return Bad(what, 3, says, make, verb)


def damaged(make: Callable[[str, Harm, str], Bad], file: str, shown: str, cure: str) -> list[Bad]:
    """What may befall a shard whose manifest stays as it was. shown: what the message calls it."""
    was = "manifest.json says … bytes, sha256 …; its own is …"
    return [
        make("a shard cut by a byte", lambda f: cut(f / file), f"{shown}: … bytes, {was}; {cure}"),
        make(
            "a byte of a shard flipped",
            lambda f: flip(f / file),
            f"{shown}: content differs from the sha256 in manifest.json (…, not …; … bytes); {cure}",
        ),
        make(
            "a shard deleted",
            lambda f: (f / file).unlink(),
            f"{shown}: listed in manifest.json but missing (… bytes, sha256 …); {cure}",
        ),
    ]


# --- folders of rows

DISTIL = "delete …/rowsdir; the same draftsmith distill … out=…/rowsdir makes it again"
FIRST, SECOND = "rows-00000.parquet", "rows-00001.parquet"
SHARD = f"…/rowsdir/{FIRST}"


def rows(what: str, harm: Harm, says: str) -> Bad:
    return harmed(f"rows: {what}", "rowsdir", harm, says, "data.path=@", "data.length=256")


def manifest(change: Callable[[Any], Any]) -> Harm:
    return lambda f: edit(f / "manifest.json", change)


def resealed(harm: Harm) -> Harm:
    return lambda f: (harm(f), sealed(f))


def column(name: str, values: Any) -> Harm:
    """A column of the first shard, made anew from its values."""

    def change(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(folder / FIRST)
        made = values(table.column(name).to_pylist(), pa)
        pq.write_table(table.set_column(table.column_names.index(name), name, made), folder / FIRST)

    return resealed(change)


def int32s(change: Callable[[list[list[int]]], Any], of: str = "int32") -> Callable[..., Any]:
    return lambda values, pa: pa.array(change(values), pa.large_list(getattr(pa, of)()))


ROWS = [
    *damaged(rows, FIRST, SHARD, DISTIL),
    rows(
        "a shard emptied",
        lambda f: (f / FIRST).write_bytes(b""),
        f"{SHARD}: 0 bytes, manifest.json says … bytes, sha256 …; {DISTIL}",
    ),
    rows(
        "a shard too many",
        lambda f: shutil.copy(f / FIRST, f / "rows-00007.parquet"),
        "…/rowsdir: rows-00007.parquet is not in manifest.json; take it away or distil again",
    ),
    rows("two shards swapped", lambda f: swap(f / FIRST, f / SECOND), f"{SHARD}: … manifest.json …; {DISTIL}"),
    rows(
        "no manifest",
        lambda f: (f / "manifest.json").unlink(),
        "…/rowsdir: its rows are not complete; start that draftsmith distill again first",
    ),
    rows(
        "no manifest, and not distilled",
        lambda f: ((f / "manifest.json").unlink(), shutil.rmtree(f / "asked")),
        "…/rowsdir/manifest.json: missing, beside shards of draftsmith's; copy the whole folder, or make it again",
    ),
    rows(
        "manifest cut off",
        lambda f: (cut(f / "manifest.json", 30), shutil.rmtree(f / "asked")),
        "…/rowsdir/manifest.json: damaged, beside shards of draftsmith's; copy the whole folder, or …",
    ),
    rows(
        "manifest of another kind",
        manifest(lambda m: m.update(kind="base")),
        "…/rowsdir: … start that draftsmith distill again first",
    ),
    rows(
        "manifest whose files have no sizes",
        manifest(lambda m: m.update(files={"a": 3})),
        f"…/rowsdir/manifest.json: does not list files with sizes and sha256; it is damaged; {DISTIL}",
    ),
    rows(
        "manifest that lists a file outside",
        manifest(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "a"}})),
        "…/rowsdir/manifest.json: lists '../x', which lies outside the folder",
    ),
    rows(
        "manifest whose base is a text",
        manifest(lambda m: m.update(base="llama")),
        f"…/rowsdir/manifest.json: base is no JSON object; it is damaged; {DISTIL}",
    ),
    rows(
        "manifest whose weights are a list",
        manifest(lambda m: m.update(weights=[1])),
        f"…/rowsdir/manifest.json: weights is no JSON object; it is damaged; {DISTIL}",
    ),
    rows(
        "another tokenizer of the same size",
        manifest(lambda m: m["base"].update(tokenizer_sha256="0" * 64)),
        "…/rowsdir: its rows were written with another tokenizer (base …); distil them again with this base",
    ),
    rows(
        "another chat template",
        manifest(lambda m: m["base"].update(template_sha256="0" * 64)),
        "…/rowsdir: its rows were written with another template (base …); distil them again with this base",
    ),
    rows(
        "HTML for a shard, and sealed",
        resealed(lambda f: (f / FIRST).write_bytes(HTML)),
        f"{SHARD}: not parquet that we wrote (…); {DISTIL}",
    ),
    rows(
        "a shard cut, and sealed",
        resealed(lambda f: cut(f / FIRST, 40)),
        f"{SHARD}: not parquet that we wrote (…); {DISTIL}",
    ),
    rows(
        "ids that are texts",
        column("ids", lambda v, pa: pa.array([str(i) for i in v])),
        f"{SHARD}: column ids is string, not large_list<…; {DISTIL}",
    ),
    rows(
        "rows without ids",
        column("ids", int32s(lambda v: [None, *v[1:]])),
        f"{SHARD}: column ids has rows without a value; {DISTIL}",
    ),
    rows(
        "a mask too short",
        column("mask", int32s(lambda v: [m[:-1] for m in v], "uint8")),
        f"{SHARD}: column mask has not one value per id; {DISTIL}",
    ),
    rows(
        "a mask with a 2",
        column("mask", int32s(lambda v: [[2] * len(m) for m in v], "uint8")),
        f"{SHARD}: column mask holds other numbers than 0 and 1; {DISTIL}",
    ),
    rows(
        "an id outside the vocabulary",
        column("ids", int32s(lambda v: [[400] * len(i) for i in v])),
        f"…/rowsdir: synthetic:…: token id 400 is outside the base's vocabulary of 400; {DISTIL}",
    ),
]

# --- stores and labels

CAPTURE = "delete it and every manifest.json there; the same draftsmith capture … out=…/store makes it again"
CAPTURES, MORE = "captures-00000.safetensors", "captures-00001.safetensors"
CAP = f"…/store/{CAPTURES}"


def store(what: str, harm: Harm, says: str) -> Bad:
    return harmed(f"store: {what}", "store", harm, says, "data.path=@", "data.length=256", "data.stored=true")


def plan(change: Callable[[Any], Any]) -> Harm:
    return resealed(lambda f: edit(f / "plan.json", change))


STORES = [
    *damaged(store, CAPTURES, CAP, CAPTURE),
    store(
        "a shard too many",
        lambda f: shutil.copy(f / CAPTURES, f / "captures-00007.safetensors"),
        "…/store/captures-00007.safetensors: is not in manifest.json; take it away or capture again",
    ),
    store("two shards swapped", lambda f: swap(f / CAPTURES, f / MORE), f"{CAP}: … manifest.json …; {CAPTURE}"),
    store(
        "two shards swapped, and sealed",
        resealed(lambda f: swap(f / CAPTURES, f / MORE)),
        f"{CAP}: belongs to another store, of another base or other rows; capture again",
    ),
    store(
        "its rows cut by a byte",
        lambda f: cut(f / "rows" / FIRST),
        f"…/store/rows/{FIRST}: … bytes, manifest.json says …; {CAPTURE}",
    ),
    store(
        "no manifest",
        lambda f: (f / "manifest.json").unlink(),
        "…/store: its captures are not complete; start that draftsmith capture again first",
    ),
    store(
        "manifest cut off",
        lambda f: cut(f / "manifest.json", 30),
        "…/store: its captures are not complete; start that draftsmith capture again first",
    ),
    store(
        "HTML for a shard, and sealed",
        resealed(lambda f: (f / CAPTURES).write_bytes(HTML)),
        f"{CAP}: no safetensors file that draftsmith capture wrote (…); capture again",
    ),
    store(
        "a plan that is a list",
        resealed(lambda f: (f / "plan.json").write_text("[]")),
        "…/store/plan.json: no JSON object; it is damaged: copy it or make it again",
    ),
    store(
        "a plan without a store",
        plan(lambda p: p.pop("store")),
        "…/store/plan.json: does not tell base, rows and store; it is damaged; capture again",
    ),
    store(
        "a plan with a key too many",
        plan(lambda p: p["store"].update(colour=1)),
        "…/store/plan.json: store.colour: no such key; it is damaged; capture again",
    ),
    store(
        "a plan with a text for a number",
        plan(lambda p: p["store"].update(shard_rows="many")),
        "…/store/plan.json: store.shard_rows: …; it is damaged; capture again",
    ),
    store(
        "a plan of 0 rows per shard",
        plan(lambda p: p["store"].update(shard_rows=0)),
        "…/store/plan.json: store: values that draftsmith capture never writes; it is damaged; …",
    ),
    store(
        "another base",
        plan(lambda p: p["base"].update(weights_sha256="0")),
        "…/store: its captures are those of another base, … (weights_sha256 differ); capture again with this one",
    ),
    store(
        "other rows",
        plan(lambda p: p["rows"].update(manifest_sha256="0")),
        "…/store/rows: other rows than those that were captured; capture again",
    ),
]


def stale(folder: Path) -> None:
    """All states doubled, and sealed: every hash is right."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("captures-*")):
        with safe_open(path, "pt") as f:
            told = f.metadata()
        save_file({name: 2 * t for name, t in load_file(path).items()}, path, metadata=told)
    sealed(folder)


STORES += [
    store(
        "stale states",
        stale,
        "…/store/captures-…: row … (…): final differs from what the base computes by … (relative; at most …); …again",
    )
]

LABEL = "delete it and manifest.json; the same draftsmith label … out=…/labels makes it again"


def labels(what: str, harm: Harm, says: str) -> Bad:
    return harmed(f"labels: {what}", "labels", harm, says, "data.path=@", "data.length=256", verb="train gate")


LABELS = [
    *damaged(labels, FIRST, f"…/labels/{FIRST}", LABEL),
    labels(
        "manifest cut off",
        lambda f: cut(f / "manifest.json", 30),
        "…/labels/manifest.json: damaged, beside shards of draftsmith's; copy the whole folder, or …",
    ),
    labels(
        "a manifest that tells no base",
        manifest(lambda m: m.update(base=3)),
        "…/labels/manifest.json: tells no base; it is damaged; label again",
    ),
    labels(
        "labels of another kind",
        manifest(lambda m: m["labels"].update(kind="importance")),
        "…/labels: labels of kind importance; a gate wants acceptance",
    ),
    labels(
        "another companion",
        resealed(lambda f: edit(f / "plan.json", lambda p: p["companion"].update(weights_sha256="0"))),
        "…/labels: its labels were made with another companion (…), or in another dtype; label again with this one",
    ),
    labels(
        "a plan that is a list",
        resealed(lambda f: (f / "plan.json").write_text("[]")),
        "…/labels/plan.json: no JSON object; it is damaged: copy it or make it again",
    ),
]
