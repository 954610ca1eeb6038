"""What somebody who means harm would put where draftsmith reads: each maker writes one such thing into a folder. If it
is ever run, a file appears: the canary. The makers that end in a payload of Python, YAML or Jinja are live: a reader
that trusts them writes the canary, which test_malicious.py shows before it shows that none of ours does.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith import artifacts

HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
Maker = Callable[[Path, Path], Any]  # (the folder to spoil, the canary)


def code(canary: Path) -> str:
    """Python that writes the canary, in one expression."""
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


class Payload:
    """An object whose pickle writes the canary when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (code(self.canary),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps({"weight": Payload(canary)})


def checkpoint(path: Path, canary: Path) -> Path:
    """A file as torch.save writes it: a zip with a pickle inside."""
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "payload": Payload(canary)}, path)
    return path


def yaml_tag(canary: Path) -> str:
    return f'!!python/object/apply:builtins.eval ["{code(canary)}"]'


def template(canary: Path) -> str:
    """A chat template that leaves its sandbox, if it is in none."""
    return (
        "{% for message in messages %}{{ message.content }}{% endfor %}"
        "{{ cycler.__init__.__globals__.os.popen('touch " + str(canary) + "').read() }}"
    )


def subclasses(canary: Path) -> str:
    """The same by way of every class that Python has."""
    return (
        "{% for c in ''.__class__.__mro__[1].__subclasses__() if c.__name__ == 'catch_warnings' %}"
        f'{{{{ c.__init__.__globals__["__builtins__"]["eval"]("{code(canary)}") }}}}'
        "{% endfor %}"
    )


def by_format(canary: Path) -> str:
    """str.format reads attributes as well."""
    return "{{ '{0.__init__.__globals__}'.format(cycler) }}" + template(canary)


# Whole folders of a base


def change(path: Path, **values: Any) -> None:
    """Keys of a JSON file; None takes one out."""
    told = json.loads(path.read_text()) if path.exists() else {}
    told = {k: v for k, v in {**told, **values}.items() if v is not None}
    path.write_text(json.dumps(told))


def code_file(folder: Path, canary: Path, name: str = "evil") -> None:
    """A module that writes the canary as it is imported, and has the classes that are asked for."""
    text = f"{code(canary)}\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    text += "class Config(LlamaConfig):\n    model_type = 'evil'\n"
    text += "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    text += "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (folder / f"{name}.py").write_text(text)


REMOTE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer"] * 2}


def pickled_weights(name: str) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        checkpoint(folder / name, canary)

    return make


def named_safetensors(folder: Path, canary: Path) -> None:
    """The pickle calls itself safetensors."""
    checkpoint(folder / "model.safetensors", canary)


def plain_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickled(canary))


def index_of_pickles(folder: Path, canary: Path) -> None:
    """An index of safetensors whose shards are none."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    checkpoint(folder / "shard.bin", canary)
    told = {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def index_elsewhere(folder: Path, canary: Path) -> None:
    """… or lie outside, where a pickle is."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    checkpoint(folder.parent / "outside.bin", canary)
    told = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def auto_map(folder: Path, canary: Path) -> None:
    """A family that transformers does not know, with its own code."""
    code_file(folder, canary)
    change(folder / "config.json", auto_map=REMOTE, model_type="evil", architectures=["Model"])


def auto_map_of_a_known_family(folder: Path, canary: Path) -> None:
    code_file(folder, canary)
    change(folder / "config.json", auto_map=REMOTE)


def auto_map_of_the_tokenizer(folder: Path, canary: Path) -> None:
    code_file(folder, canary)
    told = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    change(folder / "tokenizer_config.json", auto_map=told, tokenizer_class="EvilTokenizer")


def trusting_itself(folder: Path, canary: Path) -> None:
    """Its own config.json says that it may be trusted, at every depth that a config has."""
    auto_map(folder, canary)
    nested = {"model_type": "evil", "auto_map": REMOTE, "trust_remote_code": True}
    change(folder / "config.json", trust_remote_code=True, text_config=nested, sub_configs={"text": nested})


def nested_auto_map(folder: Path, canary: Path) -> None:
    code_file(folder, canary)
    nested = {"model_type": "evil", "auto_map": REMOTE, "trust_remote_code": True}
    change(folder / "config.json", trust_remote_code=True, text_config=nested, vision_config=nested)


def code_of_another_repository(folder: Path, canary: Path) -> None:
    """transformers' `repo--module.Class`, whose repository is a folder here."""
    other = folder.parent / "other"
    other.mkdir(exist_ok=True)
    code_file(other, canary)
    told = {k: f"{other}--{v if isinstance(v, str) else v[0]}" for k, v in REMOTE.items()}
    change(folder / "config.json", auto_map=told, model_type="evil")


def own_generate(folder: Path, canary: Path) -> None:
    (folder / "custom_generate").mkdir()
    text = f"{code(canary)}\ndef generate(model, *args, **kwargs):\n    return None\n"
    (folder / "custom_generate" / "generate.py").write_text(text)
    change(folder / "generation_config.json", custom_generate="custom_generate", trust_remote_code=True)


def kernels(folder: Path, canary: Path) -> None:
    """Attention by compiled code of a repository."""
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        change(folder / "config.json", **{key: "evil/kernel"})


def quantised_by(method: str) -> Maker:
    """Weights that a package of their own unpacks."""

    def make(folder: Path, canary: Path) -> None:
        pickled_weights("pytorch_model.bin")(folder, canary)
        change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 32})

    return make


def adapter_inside(folder: Path, canary: Path) -> None:
    """transformers looks for an adapter beside a model and loads it on top."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    checkpoint(folder / "adapter_model.bin", canary)


def chat_template(text: Callable[[Path], str]) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        change(folder / "tokenizer_config.json", chat_template=text(canary))

    return make


def template_file(folder: Path, canary: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text(template(canary))


def tokenizer_pickle(folder: Path, canary: Path) -> None:
    (folder / "tokenizer.json").write_bytes(pickled(canary))


# A file of weights that is none


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def overlapping(path: Path) -> None:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": one, "b": {**one, "data_offsets": [8, 24]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))


def beyond_its_end(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def web_page(path: Path) -> None:
    path.write_bytes(HTML)


def deep_header(path: Path) -> None:
    header = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


# A folder of ours


def seal(folder: Path, manifest: str = artifacts.MANIFEST, **files: Any) -> None:
    """The manifest anew, so that the hashes of what was changed are right; files: entries instead of the found ones."""
    facts = json.loads((folder / manifest).read_text())
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != manifest:
            found[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": artifacts.file_sha256(path),
            }
    (folder / manifest).write_text(json.dumps({**facts, "files": {**found, **files}}))


def entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": artifacts.file_sha256(path)}


def target(name: str, /, **arguments: Any) -> Maker:
    """A native head whose config.json says that it is something else."""

    def make(folder: Path, canary: Path) -> None:
        given = {k: v.format(canary=canary, folder=folder) if isinstance(v, str) else v for k, v in arguments.items()}
        change(folder / "config.json", head={"_target_": name, **given})
        seal(folder)

    return make


def weights_are(write: Callable[[Path, Path], Any], name: str = "model.safetensors", manifest: str = "") -> Maker:
    def make(folder: Path, canary: Path) -> None:
        write(folder / name, canary)
        seal(folder, manifest or artifacts.MANIFEST)

    return make


def as_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickled(canary))


def listing(name: str) -> Maker:
    """A manifest that lists a file elsewhere."""

    def make(folder: Path, canary: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        save_file({"a": torch.zeros(1)}, outside)
        seal(folder, **{name.format(outside=outside): entry(outside)})

    return make


def shard_elsewhere(name: str, manifest: str = "") -> Maker:
    """A file of the folder that is a link to one outside."""

    def make(folder: Path, canary: Path) -> None:
        outside = folder.parent / f"outside-{folder.name}-{name}"
        shutil.move(folder / name, outside)
        os.symlink(os.path.relpath(outside, folder), folder / name)
        seal(folder, manifest or artifacts.MANIFEST)

    return make


def folder_elsewhere(folder: Path, canary: Path) -> None:
    """A folder inside that is a link to one outside."""
    outside = folder.parent / f"outside-{folder.name}"
    outside.mkdir()
    (outside / "notes.txt").write_text("private")
    os.symlink(outside, folder / "more", target_is_directory=True)
    seal(folder, **{"more/notes.txt": entry(outside / "notes.txt")})


def deep_json(name: str) -> Maker:
    """JSON that is too deep for a stack."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
        if name != artifacts.MANIFEST and (folder / artifacts.MANIFEST).exists():
            seal(folder)

    return make


# Adapters


def adapter(folder: Path, canary: Path, **settings: Any) -> Path:
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    checkpoint(folder / "adapter_model.bin", canary)
    return folder


def importing(folder: Path, canary: Path) -> None:
    """peft imports the module that holds Megatron's layers by the name that the adapter gives; one lies beside it."""
    package = folder.parent / "megatron"
    package.mkdir()
    (package / "__init__.py").write_text(code(canary))
    adapter(folder, canary, megatron_config={"a": 1}, megatron_core="megatron.core")
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(weights, folder / "adapter_model.safetensors")


# Rows


def bomb(path: Path, megabytes: int) -> Path:
    """One JSON line of so many megabytes in a gzip of a thousandth."""
    with gzip.open(path, "wb", compresslevel=6) as f:
        f.write(b'{"text": "')
        for _ in range(megabytes):
            f.write(b"a" * (1 << 20))
        f.write(b'"}\n')
    return path


def pickled_type(path: Path, canary: Path) -> Path:
    """A column of a type of its own, whose description is a pickle, as pyarrow once wrote and read them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    described = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled(canary)}
    field = pa.field("text", pa.string(), metadata=described)
    table = pa.table([pa.array(["a", "b"])], schema=pa.schema([field], metadata={"pandas": pickled(canary)}))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    return path


# Runs


def in_config(text: Callable[[Path], str]) -> Maker:
    """A line more in the run's config.yaml."""

    def make(folder: Path, canary: Path) -> None:
        path = folder / "config.yaml"
        path.write_text(f"{path.read_text()}more: {text(canary)}\n")

    return make


def trusting_run(folder: Path, canary: Path) -> None:
    """A run whose base brings code, and whose configuration says to trust it."""
    path = folder / "config.yaml"
    kept = next(line for line in path.read_text().splitlines() if line.strip().startswith("path: ") and "base" in line)
    base = Path(kept.partition("path: ")[2])
    evil = folder.parent / "evil-base"
    shutil.copytree(base, evil)
    auto_map(evil, canary)
    text = path.read_text().replace(str(base), str(evil)).replace("trust_remote_code: false", "trust_remote_code: true")
    path.write_text(text)


def heads_elsewhere(folder: Path, canary: Path) -> None:
    shutil.copytree(folder / "heads" / "medusa", folder.parent / "elsewhere")
    change(folder / "COMPLETE.json", heads=["../../elsewhere"])


def weights_of_the_run(folder: Path, canary: Path) -> None:
    weights_are(as_pickle)(folder / "heads" / "medusa", canary)


def not_a_state(folder: Path, canary: Path) -> None:
    change(folder / "state.json", updates={"../../../outside": 1})
    checkpoint(folder.parent.parent / "outside.safetensors", canary)
    seal(folder, "COMPLETE.json")


# A job's yaml


def job(node: Callable[[Path, Path], str]) -> Callable[[Path, Path], str]:
    return lambda canary, folder: f"defaults:\n  - train\n  - _self_\n{node(canary, folder)}\n"


def callback(node: Callable[[Path, Path], dict[str, Any]]) -> Callable[[Path, Path], str]:
    """Hydra makes these by itself, before a verb begins."""
    return job(lambda canary, folder: f"hydra: {json.dumps({'callbacks': {'evil': node(canary, folder)}})}")


def loaded(canary: Path, folder: Path) -> dict[str, Any]:
    checkpoint(folder / "evil.pt", canary)
    return {"_target_": "torch.load", "f": str(folder / "evil.pt"), "weights_only": False}


def written(canary: Path, folder: Path) -> dict[str, Any]:
    return {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": [str(canary)]}, "x"],
    }


LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
LOGGING = {"version": 1, "root": {"handlers": ["evil"], "level": "INFO"}}


def factory(node: dict[str, Any]) -> dict[str, Any]:
    """The same as Python's logging spells it."""
    return {"()" if key == "_target_" else key: value for key, value in node.items()}


def words(canary: Path) -> str:
    """What a shell takes for a command inside a name."""
    return f"$(touch {canary}) `touch {canary}`; touch {canary} #"


# The tables: name -> what makes it, and what is said of it. All else are the doors of test_malicious.py.

TEMPLATES = {
    "a template that asks for os": template,
    "a template that walks the classes": subclasses,
    "a template that formats": by_format,
}
INSTANTIATED = {"torch.load as _target_": loaded, "Path.write_text as _target_": written}
NO_MODEL = "does not load as a causal language model: "
CODE = "custom code|contains custom|trust_remote_code"

# words: "" where it loads and the bad part stays unread. The last: whether its weights need not be read for that.
BASES: dict[str, tuple[Maker, str, bool]] = {
    "pickle as pytorch_model.bin": (pickled_weights("pytorch_model.bin"), NO_MODEL + ".*no file named", False),
    "pickle as model.pt": (pickled_weights("model.pt"), NO_MODEL + ".*no file named", False),
    "pickle as model.ckpt": (pickled_weights("model.ckpt"), NO_MODEL + ".*no file named", False),
    "torch.save as model.safetensors": (named_safetensors, NO_MODEL + ".*header", False),
    "pickle as model.safetensors": (plain_pickle, NO_MODEL + ".*header", False),
    "HTML as model.safetensors": (lambda f, c: web_page(f / "model.safetensors"), NO_MODEL + ".*header", False),
    "a header of 2^62 bytes": (lambda f, c: huge_header(f / "model.safetensors"), NO_MODEL + ".*header", False),
    "tensors that overlap": (lambda f, c: overlapping(f / "model.safetensors"), NO_MODEL + ".*header", False),
    "a tensor beyond its file": (lambda f, c: beyond_its_end(f / "model.safetensors"), NO_MODEL + ".*header", False),
    "a header that is too deep": (lambda f, c: deep_header(f / "model.safetensors"), NO_MODEL + ".*header", False),
    "an index of pickles": (index_of_pickles, "lists 'shard.bin' as weights", False),
    "an index of files elsewhere": (index_elsewhere, r"lists '\.\./outside\.bin' as weights", False),
    "an adapter beside the weights": (adapter_inside, "holds an adapter", False),
    "code of its own": (auto_map, CODE, True),
    "code of its own that calls itself trusted": (trusting_itself, CODE, True),
    "code in a part of its config": (nested_auto_map, NO_MODEL, True),
    "code of another repository": (code_of_another_repository, CODE, True),
    "code for a family that is known": (auto_map_of_a_known_family, "", True),
    "code of its tokenizer": (auto_map_of_the_tokenizer, CODE, True),
    "a generate of its own": (own_generate, "", True),
    "attention from a repository": (kernels, "", True),
    "weights for gptq": (quantised_by("gptq"), NO_MODEL, False),
    "weights for torchao": (quantised_by("torchao"), NO_MODEL, False),
    "pickle as tokenizer.json": (tokenizer_pickle, "the tokenizer in .* does not load", True),
    "a config.json that is too deep": (deep_json("config.json"), NO_MODEL, True),
    "a tokenizer.json that is too deep": (deep_json("tokenizer.json"), "the tokenizer in .* does not load", True),
    "a template in a file": (template_file, "", True),
}

NO_ADAPTER = "not a LoRA adapter in peft's format"
ADAPTERS: dict[str, tuple[Maker, str]] = {
    "pickle as adapter_model.bin": (adapter, NO_ADAPTER),
    "pickle as adapter_model.safetensors": (
        lambda f, c: as_pickle(adapter(f, c) / "adapter_model.safetensors", c),
        NO_ADAPTER,
    ),
    "a module to import": (importing, "megatron_config names modules to import"),
    "a class to import": (
        lambda f, c: adapter(f, c, auto_mapping={"parent_library": "evil", "base_model_class": "Model"}),
        "auto_mapping names modules to import",
    ),
    "another kind": (lambda f, c: adapter(f, c, peft_type="EVIL"), NO_ADAPTER),
}

OURS = "draftsmith.heads.medusa.Medusa"
HEADS: dict[str, tuple[Maker, str]] = {
    "_target_: os.system": (target("os.system", command="touch {canary}"), r"_target_: 'os\.system' is not allowed"),
    "_target_: torch.load": (target("torch.load", f="{folder}/model.safetensors"), "'torch.load' is not allowed"),
    "_target_: builtins.exec": (target("builtins.exec", source="open('{canary}', 'w')"), "is not allowed"),
    "_target_: subprocess.Popen": (target("subprocess.Popen", args="touch {canary}"), "is not allowed"),
    "_target_: hydra.utils.call": (target("hydra.utils.call", config="os.system"), "is not allowed"),
    "_target_: a module of ours, then os": (target("draftsmith.config.os.system"), "cannot import"),
    "_target_: what ours imports": (target("draftsmith.artifacts.shutil.rmtree", path="{folder}"), "cannot import"),
    "_target_: a function of ours": (target("draftsmith.config.import_module", name="evil"), "is no class with"),
    "_target_: what is like a package of ours": (target("draftsmith_evil.Head"), "is not allowed"),
    "_target_: another class of ours": (target("draftsmith.exporters.native.Native"), "Native is no head"),
    "_target_: the optimizer": (target("torch.optim.AdamW"), "AdamW is no head"),
    "_target_: no words": (target("draftsmith..\x00"), "cannot import"),
    "_target_ in a setting": (target(OURS, num_heads={"_target_": "os.system", "command": "touch"}), "num_heads"),
    "a setting that asks for the environment": (target(OURS, num_heads="${{oc.env:HOME}}"), "head"),
    "pickle as model.safetensors": (weights_are(as_pickle), r"model\.safetensors: .*header"),
    "torch.save as model.safetensors": (weights_are(checkpoint), r"model\.safetensors: .*header"),
    "pickle as capsule.safetensors": (weights_are(as_pickle, "capsule.safetensors"), r"capsule\.safetensors: .*header"),
    "HTML as model.safetensors": (weights_are(lambda p, c: web_page(p)), r"model\.safetensors: .*header"),
    "a header of 2^62 bytes": (weights_are(lambda p, c: huge_header(p)), r"model\.safetensors: .*header"),
    "tensors that overlap": (weights_are(lambda p, c: overlapping(p)), r"model\.safetensors: .*header"),
    "a manifest that lists ../x": (listing("../outside.safetensors"), "lies outside the folder"),
    "a manifest that lists a/../../x": (listing("a/../../outside.safetensors"), "lies outside the folder"),
    "a manifest that lists /x": (listing("{outside}"), "lies outside the folder"),
    "a manifest of unprintable names": (listing("a\nb\x1b[2J"), "lies outside the folder"),
    "a link out of the folder": (shard_elsewhere("model.safetensors"), r"model\.safetensors: is a link to"),
    "its config.json a link": (shard_elsewhere("config.json"), r"config\.json: is a link to"),
    "a folder that is a link": (folder_elsewhere, "notes.txt: is a link to"),
    "a config.json that is too deep": (deep_json("config.json"), r"config\.json: not JSON"),
    "a manifest that is too deep": (deep_json(artifacts.MANIFEST), r"manifest\.json: not JSON"),
}


def file(name: str, write: Callable[[Path, Path], Any]) -> Maker:
    return lambda folder, canary: write(folder / name, canary)


def published_index(shard: str) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        checkpoint(folder / "shard.pt", canary)
        checkpoint(folder.parent / "outside.pt", canary)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.0.linear.weight": shard}}))

    return make


def published_link(folder: Path, canary: Path) -> None:
    checkpoint(folder.parent / "outside.pt", canary)
    (folder / "model.safetensors").symlink_to("../outside.pt")


UNREAD = "is a pickle, which can run any program when it is read, so it stays unread"
PUBLISHED: dict[str, tuple[Maker, str]] = {
    "medusa_lm_head.pt": (file("medusa_lm_head.pt", checkpoint), UNREAD),
    "pytorch_model.bin": (file("pytorch_model.bin", checkpoint), UNREAD),
    "model.ckpt": (file("model.ckpt", checkpoint), UNREAD),
    "model.pth": (file("model.pth", as_pickle), UNREAD),
    "model.pkl": (file("model.pkl", as_pickle), UNREAD),
    "torch.save as model.safetensors": (file("model.safetensors", checkpoint), "header"),
    "HTML as model.safetensors": (file("model.safetensors", lambda p, c: web_page(p)), "header"),
    "a header of 2^62 bytes": (file("model.safetensors", lambda p, c: huge_header(p)), "header"),
    "an index of pickles": (published_index("shard.pt"), UNREAD),
    "an index of ../x": (published_index("../outside.pt"), "does not list files of this folder"),
    "a link out of the folder": (published_link, "is a link to"),
}

ALL = ("evaluate", "export", "tune", "report", "train")
REFERENCE = "is a reference to be resolved"
RUNS: dict[str, tuple[Maker, str, tuple[str, ...]]] = {
    "a YAML tag": (in_config(yaml_tag), r"config\.yaml: damaged", ALL),
    "a YAML tag of a module": (in_config(lambda c: "!!python/module:antigravity"), r"config\.yaml: damaged", ALL),
    "oc.env": (in_config(lambda c: "${oc.env:EVIL_SECRET}"), REFERENCE, ALL),
    "oc.decode": (in_config(lambda c: "${oc.decode:${oc.env:EVIL_SECRET}}"), REFERENCE, ALL),
    "oc.create": (in_config(lambda c: "{deep: ['${oc.create:{a: 1}}']}"), REFERENCE, ALL),
    "a base with code, which it trusts": (trusting_run, CODE, ("evaluate", "export", "tune")),
    "heads elsewhere": (heads_elsewhere, "COMPLETE.json: names no heads", ("evaluate", "export", "tune")),
    "pickle as a head": (weights_of_the_run, r"model\.safetensors: .*header", ("evaluate", "export", "tune")),
}

CHECKPOINTS: dict[str, tuple[Maker, str]] = {
    "pickle as medusa.safetensors": (weights_are(as_pickle, "medusa.safetensors", "COMPLETE.json"), "not safetensors"),
    "torch.save as medusa.safetensors": (
        weights_are(checkpoint, "medusa.safetensors", "COMPLETE.json"),
        "not safetensors",
    ),
    "a link out of the checkpoint": (shard_elsewhere("medusa.safetensors", "COMPLETE.json"), "is a link to"),
    "its state.json a link": (shard_elsewhere("state.json", "COMPLETE.json"), "is a link to"),
    "a state that names files elsewhere": (not_a_state, "skipped"),
}

TARGETS = (
    "os.system",
    "torch.load",
    "torch.hub.load",
    "pathlib.Path.write_text",
    "builtins.exec",
    "subprocess.Popen",
    "hydra.utils.instantiate",
    "draftsmith.config.os.system",
    "draftsmith.artifacts.shutil.rmtree",
    "draftsmith.config.DictConfig",
)

JOBS: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "a YAML tag": (job(lambda c, f: f"seed: {yaml_tag(c)}"), r"a yaml does not read .*job\.yaml.*line 4"),
    "hydra makes torch.load": (callback(loaded), r"hydra: 'torch\.load' is not allowed"),
    "hydra makes Path.write_text": (callback(written), r"hydra: 'pathlib\.Path\.write_text' is not allowed"),
    "hydra makes os.system": (
        callback(lambda c, f: {"_target_": "os.system", "command": f"touch {c}"}),
        r"hydra: 'os\.system' is not allowed",
    ),
    "Hydra's launcher with a part of its own": (
        job(lambda c, f: f"hydra: {json.dumps({'launcher': {'_target_': LAUNCHER, 'more': loaded(c, f)}})}"),
        "ConfigKeyError",
    ),
    "a log handler of its own": (
        job(
            lambda c, f: (
                f"hydra: {json.dumps({'job_logging': LOGGING | {'handlers': {'evil': factory(loaded(c, f))}}})}"
            )
        ),
        "Unable to configure handler 'evil'",
    ),
}
