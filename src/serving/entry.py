"""vLLM's entry point `vllm.general_plugins`: loaded in each of its processes, so it imports nothing heavy.

It names an architecture of ours, by which vLLM <= 0.32 serves an `exporter=vllm_medusa` folder as `method: medusa`
(vllm_medusa.py). `custom_class` (vllm_plugin.py) needs no registration."""

from __future__ import annotations

ARCHITECTURE = "DraftsmithHydra"


def register() -> None:
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "draftsmith.serving.vllm_medusa:HydraModel")
