"""A folder for Hugging Face's own `generate`: the native one, and what transformers asks of a custom decoding method.

    model.generate(**inputs, custom_generate="the folder", trust_remote_code=True, max_new_tokens=64)

transformers copies `custom_generate/generate.py` into its cache and runs the copy, whose `generate` gets the model and
the arguments of the call, but neither the folder nor the repository it came from; so it looks for that in the call. A
line of `custom_generate/requirements.txt` is one it compares with what is installed. Everything else is generating.py.

A gate's drafter lies in `drafter/`, a native folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.contracts import Head
from draftsmith.exporters import capsule, native

FOLDER = "custom_generate"

GENERATE = '''\
"""Hugging Face's `generate` with the head of this folder. Needs the package draftsmith.

    model.generate(**inputs, custom_generate="this folder, or its repository", trust_remote_code=True)
"""

import os
import sys
from pathlib import Path

from draftsmith import generating

HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def generate(model, head=None, **arguments):
    """Token ids [B, T + new], as transformers returns them. head: the folder, where it is not the one of the call."""
    hub = {name: arguments.pop(name) for name in HUB if name in arguments}
    return generating.generate(head or _folder(hub), model, **arguments)


def _folder(hub):
    """Where the call took this file from. transformers does not pass it on and runs a copy, in its cache; so it is read
    from the call itself."""
    frame = sys._getframe(2)
    while frame is not None and not isinstance(frame.f_locals.get("custom_generate"), str):
        frame = frame.f_back
    if frame is None:
        raise ValueError("head: which folder? give head=... beside the other arguments")
    told = frame.f_locals["custom_generate"]
    if os.path.isdir(told):
        return told
    from huggingface_hub import snapshot_download

    revision = Path(__file__).parents[1].name  # a repository's copy lies under its commit, so the head is of the same
    return snapshot_download(told, **{**hub, "revision": revision})
'''

CARD = """
## In Hugging Face's generate

```python
model = AutoModelForCausalLM.from_pretrained("{base}")
{adapter}model.generate(**inputs, custom_generate="this folder", trust_remote_code=True, max_new_tokens=64)
```

It decodes {promise}. It needs the package draftsmith.
"""


@dataclass(frozen=True)
class CustomGenerateConfig:
    pass


class CustomGenerate:
    """Any head as a custom decoding method of transformers."""

    Config = CustomGenerateConfig

    def __init__(self, config: CustomGenerateConfig) -> None:
        self.config = config

    def save(self, folder: Path, head: Head, base: Any, *, name: str) -> Path:
        """Publishes the folder, after it was read back and is what was meant."""
        drafter = native.drafter_of(head, base, name)
        for own in (head, drafter):
            if own is not None and own.golden is None:
                own.golden = capsule.record(own, base)  # by which another base of the same sizes is told
        with artifacts.publish(folder, kind="export custom_generate") as temporary:
            native.write(temporary, head, name=name, adapter=base.adapter, drafter=drafter)
            (temporary / FOLDER).mkdir()
            (temporary / FOLDER / "generate.py").write_text(GENERATE)
            (temporary / FOLDER / "requirements.txt").write_text(requirements(temporary))
            with open(temporary / "README.md", "a") as card:
                card.write(_card(head))
            _check(temporary, head, drafter)
        return folder

    def start(self, folder: Path, head: Head, base: Any) -> str:
        """The call that decodes with it."""
        first = "" if base.adapter is None else f'model.load_adapter("{folder}/adapter"); '
        return f'{first}model.generate(**inputs, custom_generate="{folder}", trust_remote_code=True)'


def requirements(folder: Path) -> str:
    """What generate.py needs at least: the draftsmith that wrote it. (transformers reads numbers only.)"""
    found = re.match(r"\d+(\.\d+)*", str(artifacts.read_json(folder / "config.json")["draftsmith"]))
    return f"draftsmith>={found[0]}\n" if found else "draftsmith\n"


def _card(head: Head) -> str:
    promise = "faster; greedy decoding in fp32 returns exactly the tokens that it returns without"
    if head.lossy:
        promise = "sooner and **lossily**: the text may be another than the model's own"
    adapter = 'model.load_adapter("this folder/adapter")\n' if head.spec.adapter_sha256 else ""
    return CARD.format(base=head.spec.path or "the base", adapter=adapter, promise=promise)


def _check(folder: Path, head: Head, drafter: Head | None) -> None:
    """What a head's tensors were is in its capsule."""
    compile((folder / FOLDER / "generate.py").read_text(), "generate.py", "exec")
    native.check(folder, head.spec)
    if drafter is not None:
        native.load(folder / native.DRAFTER, drafter.spec)
