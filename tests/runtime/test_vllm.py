"""vLLM's real server with our exports: its text is the base's own, and its counters are those that two others foretell,
a replay in plain torch (replay.py) and our engine. All in fp32, in batches of 4 that come and go."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith import load_head
from draftsmith.base.lm import BaseLM
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode
from draftsmith.decoding.goodness import chi_square
from draftsmith.decoding.stats import Stats

from . import replay
from .conftest import Export
from .replay import Base, Counts, foretell
from .server import Server, serving

pytestmark = pytest.mark.runtime

NEW = 40
WHOLE = "--no-enable-prefix-caching"  # a head that attends reads every position
PLUGIN = "draftsmith.serving.vllm_plugin.HeadProposer"


@dataclass(frozen=True)
class Case:
    """head: of the run. computed: how replay.py reads what `exporter` wrote. everywhere: whether something must have
    been accepted at every position."""

    head: str
    exporter: str
    computed: Callable[..., Any]
    most: int
    more: list[str] = field(default_factory=list)
    method: str | None = None
    flags: list[str] = field(default_factory=list)
    everywhere: bool = True


CASES = {
    "medusa": Case("medusa", "portable", replay.PortableMedusa, 4, method="medusa"),
    "medusa bf16": Case("medusa", "portable", replay.PortableMedusa, 4, ["exporter.dtype=bfloat16"], "medusa"),
    "medusa in vLLM's names": Case("medusa", "vllm", replay.VllmMedusa, 4, method="medusa"),
    "medusa, shared lm_head, 2 layers": Case("shared", "vllm", replay.VllmMedusa, 3, method="medusa"),
    "eagle3": Case("eagle3", "vllm", replay.Eagle3, 4, method="eagle3"),
    "medusa by the plugin": Case("medusa", "native", replay.Medusa, 4),
    "hydra": Case("hydra", "vllm", replay.Hydra, 4),
    "hydra as a medusa, 3 of 4": Case("hydra", "vllm_medusa", replay.Hydra, 3, method="medusa"),
    "clover": Case("clover", "vllm", replay.Clover, 4, flags=[WHOLE]),
    "clover, prompts in chunks": Case(
        "clover", "vllm", replay.Clover, 4, flags=[WHOLE, "--max-num-batched-tokens", "48"]
    ),
    "kangaroo": Case("kangaroo", "vllm", replay.Kangaroo, 6, everywhere=False),
    "acceptance": Case("acceptance", "vllm", replay.gated, 4, flags=[WHOLE], everywhere=False),
}


def started(folder: Path, case: Case) -> tuple[dict[str, Any], list[str]]:
    """(--speculative-config, the other flags)."""
    if case.method is not None:
        return {"method": case.method, "model": str(folder), "num_speculative_tokens": case.most}, case.flags
    head = ["--additional-config", json.dumps({"draft_head": str(folder)})]
    return {"method": "custom_class", "model": PLUGIN, "num_speculative_tokens": case.most}, [*head, *case.flags]


def served(
    base: BaseLM, folder: Path, case: Case, prompts: list[list[int]], log: Path
) -> tuple[Counts, list[list[int]]]:
    drafts, flags = started(folder, case)
    with serving(Path(base.spec.path), log, drafts, *flags) as server:
        texts = server.complete_all(prompts, NEW)
        return server.counts(case.most), texts


def engine(base: BaseLM, folder: Path, case: Case, prompts: list[list[int]]) -> Counts:
    """Our own."""
    head: Any = load_head(folder, base=base)
    drafter, gate = (head.beside, head.gate()) if head.role == "gate" else (head, None)
    shape = tree.chain(case.most)
    made = decode(base, prompts, drafters=drafter, gates=gate, shape=shape, max_new_tokens=NEW)
    stats = sum((text.stats for text in made), Stats())
    by = tuple(stats.accepted_by_depth)
    return Counts(stats.offered_by_depth[0], sum(stats.offered_by_depth), sum(by), by)


@pytest.mark.parametrize("name", CASES)
def test_the_server_accepts_what_was_foretold(
    name: str, ours: BaseLM, plain: Base, export: Export, trained: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    case = CASES[name]
    folder = export(case.head, case.exporter, *case.more)
    foretold, texts = foretell(case.computed(folder, plain), plain, prompts, case.most, NEW)
    counts, told = served(ours, folder, case, prompts, tmp_path / "log")
    print(f"\n{name}: {counts}")
    assert told == texts
    assert counts == foretold
    assert all(counts.by_position) or not case.everywhere
    if "dtype" not in str(case.more):
        native = trained.parent / "gate" if case.head == "acceptance" else trained
        assert engine(ours, native / "heads" / case.head, case, prompts) == foretold


def test_a_speculators_folder_is_served_as_it_is(
    plain: Base, export: Export, prompts: list[list[int]], tmp_path: Path
) -> None:
    """It names its base and its depth."""
    folder = export("eagle3", "speculators")
    foretold, texts = foretell(replay.Speculators(folder, plain), plain, prompts, 4, NEW)
    with serving(folder, tmp_path / "log") as server:
        assert server.complete_all(prompts, NEW) == texts
        assert server.counts(4) == foretold
    assert all(foretold.by_position)


def test_prompts_that_are_cached_and_texts_that_are_sampled(
    ours: BaseLM, plain: Base, export: Export, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Hydra looks at the last state only, so vLLM may keep what it computed of a prompt. Drafts of sampled texts are
    verified by chance: where only one token is left, that is the greedy text again; else texts are of the base's
    own distribution."""
    case = CASES["hydra"]
    folder = export(case.head, case.exporter)
    foretold, texts = foretell(case.computed(folder, plain), plain, prompts, case.most, NEW)
    drafts, flags = started(folder, case)
    with serving(Path(ours.spec.path), tmp_path / "log", drafts, "--enable-prefix-caching", *flags) as server:
        for times in (1, 2):
            assert server.complete_all(prompts, NEW) == texts
            assert server.counts(case.most) == sum([foretold] * times, Counts(0, 0, 0, ()))
        assert server.cached() > 0
        for how in ({"top_k": 1}, {"top_p": 1e-9}):
            assert server.complete_all(prompts, NEW, temperature=1.0, seed=5, **how) == texts, how
        before = server.counts(case.most)
        p_value = fit(server, plain, prompts[0], wanted=1.0)
        accepted = server.counts(case.most).accepted - before.accepted
        print(f"\nsampled at temperature 1: p = {p_value:.3f}, {accepted} drafts accepted")
        assert p_value > 1e-4
        assert accepted > SAMPLES / 10
        assert fit(server, plain, prompts[0], wanted=0.6) < 1e-4  # the test sees another temperature


SAMPLES = 600


def fit(server: Server, plain: Base, prompt: list[int], *, wanted: float) -> float:
    """The chance that so many texts of two tokens, sampled at temperature 1, are as far or further from the base's
    distribution at `wanted`. The first token comes from the prompt's forward, the second is drafted and verified."""
    due_VV = plain.two_tokens(prompt, wanted)
    counts_VV = torch.zeros_like(due_VV)
    for seed in range(6):
        for one, two in server.sample(prompt, 2, SAMPLES // 6, seed=1000 * seed):
            counts_VV[one, two] += 1
    return chi_square(counts_VV, due_VV)


def test_a_text_that_ends_at_the_last_position_beside_others(
    ours: BaseLM, plain: Base, export: Export, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Within four tokens of it vLLM asks for no drafts at all, for no text; then the others go on."""
    case = CASES["clover"]
    folder = export(case.head, case.exporter)
    drafts, flags = started(folder, case)
    longest, *others = sorted(prompts, key=len, reverse=True)
    last, asked = len(longest) + 20, [longest, *others[-3:]]
    with serving(Path(ours.spec.path), tmp_path / "log", drafts, *flags, "--max-model-len", str(last)) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            news = [20, NEW, NEW, NEW]
            told = list(pool.map(server.complete, asked, news))
        assert told == [plain.greedy(p, n)[len(p) :] for p, n in zip(asked, news, strict=True)]
        before = server.counts(case.most)
        assert server.complete_all(others[-3:], NEW) == told[1:]
        after = server.counts(case.most)
    foretold, _ = foretell(case.computed(folder, plain), plain, others[-3:], case.most, NEW)
    assert (after.drafts - before.drafts, after.accepted - before.accepted) == (foretold.drafts, foretold.accepted)


def test_a_head_that_reads_every_position_is_refused_beside_prefix_caching(
    ours: BaseLM, export: Export, tmp_path: Path
) -> None:
    case = CASES["clover"]
    drafts, flags = started(export(case.head, case.exporter), case)
    flags = ["--enable-prefix-caching" if f == WHOLE else f for f in flags]
    with pytest.raises(AssertionError, match="the server ended with 1"):
        with serving(Path(ours.spec.path), tmp_path / "log", drafts, *flags):
            pass
    assert "Clover attends to every position" in (tmp_path / "log").read_text()


def rotated(folder: Path) -> None:
    """Head i's tensors as head i + 1's."""
    path = folder / "medusa_lm_head.safetensors"
    tensors = load_file(path)
    heads = json.loads((folder / "config.json").read_text())["medusa_num_heads"]
    turned = {f"{(int(k.split('.')[0]) + 1) % heads}.{k.partition('.')[2]}": t for k, t in tensors.items()}
    save_file(turned, path, metadata={"format": "pt"})


def loud(folder: Path, name: str, times: float) -> None:
    """Tensors of this name, larger: so little was learned in them here that damage to them alone hardly shows."""
    (path,) = folder.glob("*.safetensors")
    tensors = {k: t * times if k.endswith(name) else t for k, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def without_bias_key(folder: Path) -> None:
    rewrite(folder, lambda told: told.pop("medusa_fc_bias"))


def one_layer_off(folder: Path) -> None:
    rewrite(folder, lambda told: told.update(eagle_aux_hidden_state_layer_ids=[i - 1 for i in told[IDS]]))


IDS = "eagle_aux_hidden_state_layer_ids"


def swapped_norms(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    one, two = "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


DAMAGES = {
    "heads rotated": ("medusa", rotated),
    "bias key missing": ("medusa", without_bias_key),
    "layer ids off by one": ("eagle3", one_layer_off),
    "norms swapped": ("eagle3", swapped_norms),
}
LOUD = {"bias key missing": {"linear.bias": 10.0}, "norms swapped": {"hidden_norm.weight": 2.0}}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_counters_see_what_the_text_does_not_show(
    name: str, ours: BaseLM, plain: Base, export: Export, prompts: list[list[int]], tmp_path: Path
) -> None:
    kind, damage = DAMAGES[name]
    case = CASES[kind]
    folder = export(case.head, case.exporter)
    for told, times in LOUD.get(name, {}).items():
        loud(folder, told, times)
    foretold, texts = foretell(case.computed(folder, plain), plain, prompts, case.most, NEW)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    damage(broken)
    counts, told = served(ours, broken, case, prompts, tmp_path / "log")
    print(f"\n{name}: {foretold.accepted} accepted -> {counts.accepted}")
    assert told == texts
    assert counts != foretold
    assert counts == foretell(case.computed(broken, plain), plain, prompts, case.most, NEW)[0]  # and is what it is
