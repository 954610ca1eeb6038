"""Damaged heads, checkpoints and runs, and heads of another base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bad_folders import HTML, Harm, cut, edit, flip, harmed, sealed
from .bad_kinds import Bad, World

WEIGHTS = "model.safetensors"


def head(what: str, harm: Harm, says: str) -> Bad:
    def make(own: Path, world: World) -> list[str]:
        folder = own / "medusa"
        shutil.copytree(world.head, folder)
        harm(folder)
        return [f"load=[{folder}]", f"out={own}/out"]

    return Bad(f"head: {what}", 3, says, make, "export")


def told(change: Callable[[Any], Any]) -> Harm:
    """config.json says otherwise, and the manifest is made to fit it."""
    return lambda f: (edit(f / "config.json", change), sealed(f))


def header(folder: Path) -> None:
    """A byte of the header's JSON."""
    path = folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:9] + b"\0" + content[10:])


def without(name: str) -> Harm:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        tensors.pop(next(k for k in sorted(tensors) if name in k))
        save_file(tensors, folder / WEIGHTS)
        sealed(folder)

    return change


def of_base(key: str, value: Any) -> Harm:
    return told(lambda c: c["base"].update({key: value}))


def seal(change: Harm) -> Harm:
    return lambda f: (change(f), sealed(f))


AT = "…/medusa"
AGAIN = "copy the whole folder again, or save the head again"
OWN = f"{AT}/config.json"
HEADS = [
    head(
        "a byte flipped",
        lambda f: flip(f / WEIGHTS),
        f"{AT}/{WEIGHTS}: content differs from the sha256 in manifest.json (…, not …; … bytes)",
    ),
    head(
        "cut by a byte",
        lambda f: cut(f / WEIGHTS),
        f"{AT}/{WEIGHTS}: … bytes, manifest.json says … bytes, sha256 …; its own is …",
    ),
    head("weights deleted", lambda f: (f / WEIGHTS).unlink(), f"{AT}/{WEIGHTS}: listed in manifest.json but missing"),
    head(
        "no manifest",
        lambda f: (f / "manifest.json").unlink(),
        f"{AT}: has no manifest.json; it was not published by draftsmith or is incomplete",
    ),
    head(
        "manifest cut off",
        lambda f: cut(f / "manifest.json", 30),
        f"{AT}/manifest.json: not JSON (…); it is damaged: copy it or make it again",
    ),
    head("header damaged, and sealed", seal(header), f"{AT}/{WEIGHTS}: Error while deserializing header: …; {AGAIN}"),
    head(
        "cut, and sealed",
        seal(lambda f: cut(f / WEIGHTS, 100)),
        f"{AT}/{WEIGHTS}: Error while deserializing header: …; {AGAIN}",
    ),
    head(
        "HTML saved as .safetensors, and sealed",
        seal(lambda f: (f / WEIGHTS).write_bytes(HTML)),
        f"{AT}/{WEIGHTS}: Error while deserializing header: …; {AGAIN}",
    ),
    head(
        "a byte flipped, and sealed",
        seal(lambda f: flip(f / WEIGHTS)),
        f"{AT}: not the head that was saved: tensor … is another",
    ),
    head("a tensor missing, and sealed", without("weight"), f"{AT}/{WEIGHTS}: …Missing key(s) in state_dict: …"),
    head(
        "HTML for the capsule, and sealed",
        seal(lambda f: (f / "capsule.safetensors").write_bytes(HTML)),
        f"{AT}/capsule.safetensors: Error while deserializing header: …; {AGAIN}",
    ),
    head(
        "config.json cut off, and sealed",
        seal(lambda f: cut(f / "config.json", 30)),
        f"{OWN}: not JSON (…); it is damaged: copy it or make it again",
    ),
    head(
        "config.json a list",
        seal(lambda f: (f / "config.json").write_text("[]")),
        f"{OWN}: format None None; this version reads draftsmith-head 1, …",
    ),
    head(
        "config.json of another version",
        told(lambda c: c.update(format_version=99)),
        f"{OWN}: format draftsmith-head 99; this version reads draftsmith-head 1, …",
    ),
    head(
        "config.json without a base", told(lambda c: c.pop("base")), f"{OWN}: does not describe its base and its head"
    ),
    head(
        "config.json with an unknown key",
        told(lambda c: c["head"].update(colour=1)),
        f"{OWN}: head.colour: no such key; {AGAIN}",
    ),
    head(
        "config.json with a text for a number",
        told(lambda c: c["head"].update(num_heads="many")),
        f"{OWN}: head.num_heads: Value 'many' of type 'str' could not be converted to Integer; {AGAIN}",
    ),
    head(
        "config.json with other sizes",
        told(lambda c: c["head"].update(num_heads=2)),
        f"{AT}/{WEIGHTS}: …Unexpected key(s) in state_dict: …",
    ),
    head(
        "config.json of a foreign class",
        told(lambda c: c["head"].update(_target_="os.system")),
        f"{OWN}: head._target_: 'os.system' is not allowed; …",
    ),
    head(
        "config.json of a class that is no head",
        told(lambda c: c["head"].update(_target_="draftsmith.exporters.native.Native")),
        f"{OWN}: head._target_: Native is no head",
    ),
    head(
        "of a base with another vocabulary",
        of_base("vocab_size", 401),
        f"{AT}: made for base … with vocab_size=401, this base (…) has 400; load the base it was trained on",
    ),
    head(
        "of a base with another hidden size",
        of_base("hidden_size", 64),
        f"{AT}: made for base … with hidden_size=64, this base (…) has 32; load the base it was trained on",
    ),
    head(
        "of a base with other layers",
        of_base("num_layers", 2),
        f"{AT}: made for base … with num_layers=2, this base (…) has 1; load the base it was trained on",
    ),
    head(
        "of another family",
        of_base("family", "qwen3"),
        f"{AT}: made for base … with family=qwen3, this base (…) has llama; load …",
    ),
    head(
        "of another tokenizer of the same size",
        of_base("tokenizer_sha256", "0"),
        f"{AT}: made for base … with tokenizer_sha256=0, this base (…) has …; load …",
    ),
    head(
        "of a base with an adapter",
        of_base("adapter_sha256", "0"),
        f"{AT}: made for base … with adapter_sha256=0, this base (…) has none; load …",
    ),
    head(
        "of a base with other norms",
        of_base("norm_eps", 0.1),
        f"{AT}: made for a base with norm_eps=0.1, this one (…) has …; load the base it was trained on",
    ),
]


def other_base(what: str, change: Callable[[Path], None], says: str, *, verb: str = "export") -> Bad:
    """The head is sound; the base is changed."""

    def make(own: Path, world: World) -> list[str]:
        folder = own / "base"
        shutil.copytree(world.base, folder)
        change(folder)
        mine = [f"load=[{world.head}]", f"out={own}/out"] if verb == "export" else [f"data.path={world.folder}/rowsdir"]
        return [*mine, f"base.path={folder}", *(["data.length=256"] if verb == "train" else [])]

    return Bad(f"base: {what}", 3, says, make, verb)


def permuted(folder: Path) -> None:
    """Two tokens of the vocabulary change places; its size stays."""

    def change(value: Any) -> None:
        vocab = value["model"]["vocab"]
        one, other = list(vocab)[100:102]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    edit(folder / "tokenizer.json", change)


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another one #}")


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / WEIGHTS
    save_file({k: t.flip(0).contiguous() for k, t in load_file(path).items()}, path, {"format": "pt"})


ROWSDIR = "its rows were written with another"
BASES = [
    other_base(
        "two tokens of its tokenizer swapped",
        permuted,
        "…/medusa: made for base … with tokenizer_sha256=…, this base (…) has …; load the base it was trained on",
    ),
    other_base(
        "two tokens swapped, under its rows",
        permuted,
        f"…/rowsdir: {ROWSDIR} tokenizer (base …); distil them again with this base",
        verb="train",
    ),
    other_base(
        "another chat template, under its rows",
        other_template,
        f"…/rowsdir: {ROWSDIR} template (base …); distil them again with this base",
        verb="train",
    ),
    other_base(
        "other weights of the same sizes",
        other_weights,
        "…/medusa: on the recorded tokens this base leaves other states than the one the head was made for (…); load …",
    ),
    other_base(
        "weights cut off", lambda f: cut(f / WEIGHTS, 100), "base: …/base does not load as a causal language model: …"
    ),
    other_base(
        "config.json cut off",
        lambda f: cut(f / "config.json", 100),
        "base: …/base does not load as a causal language model: …",
    ),
    other_base(
        "config.json a list",
        lambda f: (f / "config.json").write_text("[]"),
        "base: …/base does not load as a causal language model: …",
    ),
    other_base(
        "config.json with a text for a number",
        lambda f: edit(f / "config.json", lambda c: c.update(hidden_size="wide")),
        "base: …/base does not load as a causal language model: …",
    ),
    other_base(
        "tokenizer cut off", lambda f: cut(f / "tokenizer.json", 100), "base: the tokenizer in …/base does not load: …"
    ),
    other_base(
        "HTML saved as .safetensors",
        lambda f: (f / WEIGHTS).write_bytes(HTML),
        "base: …/base does not load as a causal language model: …",
    ),
]


def checkpoint(what: str, harm: Harm, says: str) -> Bad:
    """Of a run that goes on; met as training meets it."""

    def make(own: Path, world: World) -> list[str]:
        shutil.copytree(world.folder / "run" / "checkpoints", own / "checkpoints")
        harm(own / "checkpoints" / "step-00000002")
        return [str(own / "checkpoints")]

    return Bad(f"checkpoint: {what}", 0, f"checkpoint skipped: {says}", make, "checkpoint")


SEAL = "COMPLETE.json"
STEP = "…/step-00000002"


def state(change: Callable[[Any], Any]) -> Harm:
    return lambda f: (edit(f / "state.json", change), sealed(f, SEAL))


CHECKPOINTS = [
    checkpoint(
        "a byte flipped",
        lambda f: flip(f / "medusa.safetensors"),
        f"{STEP}/medusa.safetensors: content differs from the sha256 in {SEAL} (…)",
    ),
    checkpoint(
        "cut by a byte",
        lambda f: cut(f / "medusa.safetensors"),
        f"{STEP}/medusa.safetensors: … bytes, {SEAL} says … bytes, …",
    ),
    checkpoint(
        "weights deleted",
        lambda f: (f / "medusa.safetensors").unlink(),
        f"{STEP}/medusa.safetensors: listed in {SEAL} but missing …",
    ),
    checkpoint("its seal cut off", lambda f: cut(f / SEAL, 30), f"{STEP}/{SEAL}: not JSON (…"),
    checkpoint(
        "header damaged, and sealed",
        lambda f: (cut(f / "medusa.safetensors", 99), sealed(f, SEAL)),
        f"{STEP}: not safetensors (…); 1 steps are lost: training goes on after step 1",
    ),
    checkpoint(
        "HTML saved as .safetensors, and sealed",
        lambda f: ((f / "medusa.safetensors").write_bytes(HTML), sealed(f, SEAL)),
        f"{STEP}: not safetensors (…); 1 steps are lost: training goes on after step 1",
    ),
    checkpoint(
        "state.json a list",
        lambda f: ((f / "state.json").write_text("[]"), sealed(f, SEAL)),
        f"{STEP}/state.json: no JSON object; …; 1 steps are lost: …",
    ),
    checkpoint(
        "state.json without a step",
        state(lambda s: s.pop("step")),
        f"{STEP}/state.json: tells no step, updates and ties; …; 1 steps are lost: …",
    ),
    checkpoint(
        "state.json with a text for the step",
        state(lambda s: s.update(step="two")),
        f"{STEP}/state.json: tells no step, updates and ties; …; 1 steps are lost: …",
    ),
    checkpoint(
        "state.json with a head that is not there",
        state(lambda s: s["updates"].update(hydra=1)),
        f"{STEP}: not safetensors (No such file or directory: …/hydra.safetensors); 1 steps are lost: …",
    ),
]


def run(what: str, harm: Harm, says: str, *changes: str, verb: str = "run", code: int = 3) -> Bad:
    bad = harmed(f"run: {what}", "run", harm, says, *(changes or ("run_dir=@", "out=@/../out")), verb=verb)
    return Bad(bad.what, code, says, bad.make, verb)


RUNS = [
    run(
        "not complete",
        lambda f: (f / "COMPLETE.json").unlink(),
        "…/run: no complete run of draftsmith train; run_dir=… names one, load=[…] heads",
    ),
    run(
        "its mark cut off",
        lambda f: cut(f / "COMPLETE.json", 10),
        "…/run/COMPLETE.json: not JSON (…); it is damaged: …",
    ),
    run(
        "its mark a list",
        lambda f: (f / "COMPLETE.json").write_text("[]"),
        "…/run/COMPLETE.json: no JSON object; it is damaged: …",
    ),
    run(
        "its mark without heads",
        lambda f: (f / "COMPLETE.json").write_text(json.dumps({"data_sha256": None})),
        "…/run/COMPLETE.json: names no heads; it is damaged: load=[…/run/heads/…] names one",
    ),
    run(
        "config.yaml damaged",
        lambda f: (f / "config.yaml").write_text("base: [1,\n}"),
        "…/run/config.yaml: damaged (while parsing …); bring it back, or choose another run",
    ),
    run(
        "config.yaml a list",
        lambda f: (f / "config.yaml").write_text("- 1\n"),
        "…/run/config.yaml: damaged (it holds no keys); bring it back, or choose another run",
    ),
    run(
        "config.yaml without a base",
        lambda f: (f / "config.yaml").write_text("seed: 1\n"),
        "…/run/config.yaml: base: None is not a group of keys; …; bring it back, or give base=…",
    ),
    run(
        "config.yaml of no UTF-8",
        lambda f: (f / "config.yaml").write_bytes(b"seed: \xff\n"),
        "…/run/config.yaml: damaged ('utf-8' codec can't decode byte 0xff …); bring it back, or …",
    ),
]
