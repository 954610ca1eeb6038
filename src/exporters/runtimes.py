"""Which server reads which head, and in which form: one table, and the exporter that follows it.

What is not in the table is refused, with what that server reads and where else the head can go. vLLM serves the heads
that it has no form of its own for through our plugin (serving/vllm_plugin.py), from the native folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from draftsmith import artifacts
from draftsmith.contracts import BaseView, Head
from draftsmith.errors import ConfigError
from draftsmith.exporters import capsule, eagle, medusa, native, vllm_medusa
from draftsmith.exporters.forms import Form, check_dtype, drafts, in_dtype, vllm
from draftsmith.exporters.reference import LAYOUTS

PLUGIN = "draftsmith.serving.vllm_plugin.HeadProposer"


class Plugin(Form):
    """vLLM with our plugin: the native folder itself."""

    def names(self, head: Any) -> dict[str, str]:
        return {name: name for name in head.state_dict()}

    def describe(self, head: Any, base: Any, dtype: str) -> dict[str, Any]:
        raise AssertionError("native.py describes its own folders")

    def refusal(self, head: Any, base: Any) -> str | None:
        if (head.said.get("beside") or {}).get("kind") == "draft_model":
            return "it judges the drafts of a second language model; our plugin serves gates of trained drafters"
        return None

    def save(self, folder: Path, head: Head, base: BaseView, dtype: str | None, *, name: str, runtime: str) -> Path:
        """With its drafter in it, where the head is a gate; that stays in the precision that the gate knows it in."""
        drafter, meant = native.drafter_of(head, base, name), in_dtype(head, dtype)
        if dtype is not None or meant.golden is None:
            meant.golden = capsule.record(meant, base)
        with artifacts.publish(folder, kind=f"export {runtime} {type(head).__name__.lower()}") as temporary:
            native.write(temporary, meant, name=name, adapter=base.adapter, drafter=drafter)
            capsule.check(native.check(temporary, head.spec), base, meant.golden, folder)
        return folder

    def start(self, folder: Path, head: Any, base: Any) -> str:
        command = vllm(head.spec.path, method="custom_class", model=PLUGIN, num_speculative_tokens=_depth(folder, head))
        command += f" --additional-config {quote(json.dumps({'draft_head': str(folder)}))}"
        # a head with attention of its own has to read every position once, and what is cached is not run again
        attends = head.role == "gate" or any(n.endswith("o_proj.weight") for n in head.state_dict())
        return command + " --no-enable-prefix-caching" * (attends and not head.runs_base)


def _depth(folder: Path, head: Any) -> int:
    """How long a chain; of a gate, as its drafter goes."""
    if head.role != "gate":
        return drafts(head)
    told = folder / native.DRAFTER / "config.json"
    drafter = artifacts.read_json(told)["head"] if told.exists() else {}
    return min([head.config.max_depth, *(drafter[key] for key in ("num_heads", "depth") if key in drafter)])


PLUGGED = Plugin()


@dataclasses.dataclass(frozen=True)
class Server:
    """title: its name in a sentence. reads: what it does, said to whoever asks for something else. forms: by the class
    of the head."""

    title: str
    reads: str
    forms: Mapping[str, Form]


def _medusa(form: Form) -> dict[str, Form]:
    return {"Medusa": form, "Medusa2": form}


SERVERS: dict[str, Server] = {
    "portable": Server("the portable folder", "is Medusa's format", _medusa(medusa.PORTABLE)),
    "vllm": Server(
        "vLLM",
        "serves drafters and gates; nothing of it can write a prompt's K/V in the base's place",
        {
            **_medusa(medusa.VLLM),
            "Eagle3": eagle.VLLM,
            **dict.fromkeys(("Hydra", "Clover", "Clover2", "Kangaroo", "Acceptance"), PLUGGED),
        },
    ),
    "vllm_medusa": Server(
        "vLLM's method medusa",
        "loads Medusa and, by our plugin, Hydra",
        {**_medusa(medusa.VLLM), "Hydra": vllm_medusa.HYDRA},
    ),
    "sglang": Server("SGLang", "loads EAGLE-3 only", {"Eagle3": eagle.SGLANG}),
    "tgi": Server("text-generation-inference", "loads Medusa only", _medusa(medusa.TGI)),
    "tensorrt_llm": Server(
        "TensorRT-LLM",
        "loads EAGLE-3, and Medusa where it still has its TensorRT backend",
        {**_medusa(medusa.TENSORRT_LLM), "Eagle3": eagle.TENSORRT_LLM},
    ),
    "mlc": Server("MLC-LLM", "loads Medusa only", _medusa(medusa.MLC)),
    "llama_cpp": Server("llama.cpp", "loads EAGLE-3 only", {"Eagle3": eagle.LLAMA_CPP}),
    "speculators": Server("the speculators folder", "has EAGLE-3 only", {"Eagle3": eagle.SPECULATORS}),
}


def form_of(runtime: str, head: Head, base: Any, *, name: str) -> Form:
    """ConfigError where the runtime does not read such a head, or its form cannot say all of this one."""
    server, form = SERVERS[runtime], SERVERS[runtime].forms.get(type(head).__name__)
    reason = f"{server.title} {server.reads}" if form is None else form.refusal(head, base)
    if form is not None and reason is None:
        return form
    kind = type(head).__name__
    raise ConfigError(f"exporter={runtime}: {reason}; for {name} ({kind}) use exporter={_instead(runtime, head, base)}")


def _instead(runtime: str, head: Head, base: Any) -> str:
    """The exporters that take this head."""
    kind = type(head).__name__
    forms = {name: server.forms.get(kind) for name, server in SERVERS.items() if name != runtime}
    taken = [n + " (our plugin)" * (f is PLUGGED) for n, f in forms.items() if f and f.refusal(head, base) is None]
    names = [*taken, *(["reference"] if kind in LAYOUTS else []), "custom_generate", "native"]
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    runtime: str
    dtype: str | None = None  # float32 | bfloat16 | float16; null: as trained

    def __post_init__(self) -> None:
        if self.runtime not in SERVERS:
            raise ConfigError(f"runtime='{self.runtime}': choose one of {', '.join(SERVERS)}")
        check_dtype(self.dtype)


class Runtime:
    """Writes a head for a server, and says how it is started."""

    Config = RuntimeConfig

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config

    def check(self, head: Head, base: BaseView, *, name: str) -> None:
        """ConfigError where the runtime cannot have this head."""
        form_of(self.config.runtime, head, base, name=name)

    def save(self, folder: Path, head: Head, base: BaseView, *, name: str) -> Path:
        form = form_of(self.config.runtime, head, base, name=name)
        return form.save(folder, head, base, self.config.dtype, name=name, runtime=self.config.runtime)

    def start(self, folder: Path, head: Head, base: BaseView) -> str:
        """A line for a shell; what the machine must have besides is told behind a #."""
        line = form_of(self.config.runtime, head, base, name=str(folder)).start(folder, head, base)
        if base.adapter is None:
            return line
        return f"{line}{', and' if '#' in line else '  #'} the base with the folder's adapter merged into it"
