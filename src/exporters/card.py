"""The README.md of a native folder: what the head is, for which base, how it is loaded, and what was measured of it.

It begins with the metadata that the Hugging Face hub reads, as YAML. Only what is known is said there: a base that is a
folder of this machine is none of the hub's, so it is not named; results are those of an evaluation.json; the licence is
for whoever publishes it. `adapter` is the hub's word for small weights that stand on another, frozen model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.contracts import Head

FILE = "README.md"
TASK = "text-generation"
HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
SAME_BASE = ("config_sha256", "tokenizer_sha256", "adapter_sha256")
METRICS = {
    "tokens_per_step": "tokens per step of the base",
    "accepted_drafts_per_step": "drafted tokens accepted per step",
    "speedup": "speed over plain decoding",
}


def card(
    described: Mapping[str, Any], parameters: int, measured: Mapping[str, Any] | None = None, served: str = ""
) -> str:
    """described: a native config.json. measured: of `results`. served: the command that starts a server with a folder
    in that server's form, which load_head does not read."""
    front = _yaml(metadata(described, measured))
    return "\n".join(["---", *front, "---", "", _body(described, parameters, measured, served)])


def metadata(described: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the hub reads of a model card."""
    base, role = described["base"], described["role"]
    kind = described["head"]["_target_"].rpartition(".")[2]
    of_hub = HUB_ID.fullmatch(base["path"])  # a folder's path is absolute by now
    tags = ["draftsmith", re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", kind).lower()]
    tags += {"drafter": ["speculative-decoding", "draft-head"], "gate": ["speculative-decoding"]}.get(role, [])
    told: dict[str, Any] = {
        "library_name": "draftsmith",
        **({"pipeline_tag": TASK} if role == "drafter" else {}),
        **({"base_model": base["path"], "base_model_relation": "adapter"} if of_hub else {}),
        "tags": [*tags, *(["lossy"] if described["lossy"] else [])],
    }
    if measured is not None:
        figures = [{"type": m, "name": METRICS[m], "value": measured["figures"][m]} for m in METRICS]
        result = {"task": {"type": TASK}, "dataset": dict(measured["prompts"]), "metrics": figures}
        told |= {"metrics": list(METRICS), "model-index": [{"name": described["name"], "results": [result]}]}
    return told


def results(evaluation: Path, name: str, head: Head) -> dict[str, Any] | None:
    """What an evaluation.json tells of this head; None where there is none, or where it is of another head or base.
    figures; prompts (the hub's type and name of a data set); how, a sentence; text, what became of the base's text."""
    if not evaluation.is_file():
        return None
    told = artifacts.read_json(evaluation)
    found = told["heads"].get(name, {})
    if found.get("parameters") != sum(p.numel() for p in head.parameters()):
        return None
    if any(told["base"].get(tie) != getattr(head.spec, tie) for tie in SAME_BASE):
        return None
    if "weights_sha256" in found and found["weights_sha256"] != artifacts.tensors_sha256(head.state_dict()):
        return None
    decoding = told["decoding"]
    return {
        "figures": {metric: round(found[metric], 4) for metric in METRICS},
        "interval": found.get("tokens_per_step_interval"),
        "prompts": _prompts(decoding["prompts"]),
        "how": _how(told["base"], decoding),
        "text": _text(found),
    }


def add_results(folder: Path, head: Head, measured: Mapping[str, Any]) -> None:
    """Puts what was measured on the card of the head's published native folder."""
    described, manifest = (artifacts.read_json(folder / name) for name in ("config.json", artifacts.MANIFEST))
    parameters = sum(t.numel() for t in head.state_dict().values())
    facts = {k: v for k, v in manifest.items() if k != "files"}
    with artifacts.publish(folder, **facts) as temporary:
        others = shutil.ignore_patterns(artifacts.MANIFEST, FILE)
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=others, copy_function=_linked)
        (temporary / FILE).write_text(card(described, parameters, measured))


def _body(described: Mapping[str, Any], parameters: int, measured: Mapping[str, Any] | None, served: str) -> str:
    base, head = described["base"], described["head"]
    settings = "\n".join(f"| {k} | {v} |" for k, v in head.items() if k != "_target_")
    training = "\n".join(f"| {k} | {v} |" for k, v in described["training"].items())
    return f"""# {described["name"]}

A {described["role"]} ({head["_target_"].rpartition(".")[2]}, {parameters:,} parameters) for the base
`{base["path"]}`{f" at revision {base['revision']}" if base["revision"] else ""}{
        f", trained with that base's weights as {base['quantised']}" if base["quantised"] else ""
    }. {_promise(described)}

{_command(served) if served else _loading(base)}
{_measured(measured)}
| setting | value |
|---|---|
{settings}

| training | value |
|---|---|
{training or "| | |"}
"""


def _command(served: str) -> str:
    return f"```bash\n{served}\n```"


def _loading(base: Mapping[str, Any]) -> str:
    more = ', adapter="this folder/adapter"' if base["adapter_sha256"] else ""
    more += f', quantise="{base["quantised"]}"' if base["quantised"] else ""
    return f"""```python
from draftsmith import generate, load_base, load_head

base = load_base("{base["path"]}"{more})
head = load_head("this folder", base=base)
print(generate(base, input_ids, head=head, max_new_tokens=64).tokens)
```"""


def _promise(described: Mapping[str, Any]) -> str:
    whose = "the base's own"
    if described["base"]["adapter_sha256"]:
        whose = "the base's own with its adapter (folder `adapter`)"
    if described["lossy"]:
        return "**Lossy**: decoding with it may change the base's output."
    if described["role"] == "gate":
        return f"It ends drafting early and changes nothing in the output.{_whose_drafts(described)}"
    promise = f"Greedy decoding with it returns exactly the tokens of {whose}."
    return promise.replace("the tokens of the base's own.", "the base's own tokens.") + _which_tree(described["tuned"])


def _whose_drafts(described: Mapping[str, Any]) -> str:
    beside, tuned = described["beside"], described["tuned"]
    told = f" Its drafter: {beside['kind']} of `{beside['path']}`." if beside else ""
    if not tuned:
        return told + " Its threshold is not tuned; draftsmith tune finds the one for a machine."
    return told + f" Threshold {tuned['threshold']:g}, by draftsmith tune at temperature {tuned['temperature']:g}."


def _which_tree(tuned: Mapping[str, Any]) -> str:
    """Of a drafter: the tree it drafts where nobody names another, and what it brought on the machine that chose it."""
    if "tree" not in tuned:
        return ""
    kind, nodes, depth = tuned["tree"]["kind"], tuned["nodes"], tuned["depth"]
    return (
        f" Its tree: {kind}, {nodes} nodes, {depth} deep, by draftsmith tune at temperature {tuned['temperature']:g}"
        f" ({tuned['measured_speedup']:.2f}x plain decoding there, {tuned['predicted_speedup']:.2f}x predicted)."
    )


def _measured(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return ""
    rows = {METRICS[m]: f"{value:.2f}" for m, value in measured["figures"].items()}
    if measured["interval"]:
        rows[METRICS["tokens_per_step"]] += " (95 % of resamplings: {:.2f} to {:.2f})".format(*measured["interval"])
    rows |= {"measured on": measured["how"], "the base's text": measured["text"]}
    lines = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    return f"\n| by draftsmith evaluate | |\n|---|---|\n{lines}\n"


def _prompts(told: Mapping[str, Any]) -> dict[str, str]:
    """type and name, as of a data set, without this machine's folders."""
    if told.get("set"):
        return {"type": str(told["set"]), "name": str(told["set"])}
    if told.get("path"):
        return {"type": "own", "name": Path(str(told["path"])).name}
    if told.get("sources"):
        return {"type": "own", "name": ", ".join(told["sources"])}
    return {"type": "draftsmith-made-up", "name": f"draftsmith's made-up prompts, seed {told['seed']}"}


def _how(base: Mapping[str, Any], decoding: Mapping[str, Any]) -> str:
    prompts, temperature = decoding["prompts"], decoding["temperature"]
    seen = prompts.get("trained_on")
    return (
        f"{prompts['count']} prompts of {_prompts(prompts)['name']}"
        + (f" (**{seen} of them were trained on**)" if seen else "")
        + (f", temperature {temperature:g}" if temperature else ", greedy")
        + (f", accept={decoding['accept']}" if decoding.get("accept", "exact") != "exact" else "")
        + f", at most {decoding['max_new_tokens']} new tokens; the base in {base['dtype']} on {decoding['device']}"
    )


def _text(found: Mapping[str, Any]) -> str:
    proof = found.get("lossless")
    if found.get("lossy"):
        return "may be another one"
    if proof is None:
        return "drawn, so it was not compared here"
    if proof["mismatches"]:
        return f"**differs**: {proof['mismatches']} mismatches in {proof['prompts']} prompts"
    return f"kept on all {proof['prompts']} prompts, {proof['near_ties']} near ties"


def _yaml(values: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Lines of a block of keys; texts are quoted as JSON quotes them, which YAML reads alike."""
    pad = "  " * depth
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{pad}{key}:"
            yield from _yaml(value, depth + 1)
        elif isinstance(value, list):
            yield f"{pad}{key}:"
            for item in value:
                first, *rest = _yaml(item, depth + 1) if isinstance(item, dict) else [pad + "  " + _scalar(item)]
                yield from (f"{pad}- {first.lstrip()}", *rest)
        else:
            yield f"{pad}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _linked(source: str, target: str) -> str:
    """A second name for large weights, which nobody rewrites in place; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
