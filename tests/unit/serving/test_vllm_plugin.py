"""The plugin behind a stand-in for vLLM's runner, which shows it steps as vLLM 0.32 does: flat states of several
requests, prompts in chunks, drafts that were refused, preemptions. (The real one: tests/runtime.)

What is drafted must be what our engine drafts, to the count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith import config
from draftsmith.base import create
from draftsmith.base.kv import KV
from draftsmith.base.lm import BaseLM
from draftsmith.beside import told
from draftsmith.contracts import Capture, Head, Needs
from draftsmith.decoding import tree
from draftsmith.decoding.engine import decode
from draftsmith.decoding.stats import Stats
from draftsmith.errors import ConfigError, DataError, DraftsmithError
from draftsmith.exporters import capsule, native
from draftsmith.serving import vllm_plugin
from draftsmith.serving.vllm_plugin import HeadProposer, Text

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
HEADS = Path(__file__).parents[3] / "conf" / "head"
KINDS = [p.stem for p in sorted(HEADS.glob("*.yaml")) if p.stem not in ("acceptance", "kv_prediction", "medusa2")]
NEW = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseLM:
    from draftsmith import load_base

    folder = tmp_path_factory.mktemp("base")
    create.llama(SHAPE, None, seed=3).save_pretrained(folder)
    return load_base(folder)


def made(kind: str, base: BaseLM, seed: int = 1, **settings: Any) -> Head:
    """Started from the base, then shaken a little, so that some of its drafts are right."""
    node = config.compose("train", [f"head=[{kind}]"]).heads[kind]
    cls = config.target(node, kind)
    torch.manual_seed(seed)
    own: dict[str, Any] = {**node, **settings}
    if kind in ("kangaroo", "eagle3"):
        own["start_from_base"] = True
    head: Head = cls(config.typed(own, cls.Config, kind), base.spec)
    if kind != "acceptance":
        head.initialise(base)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return head.eval()


def saved(folder: Path, head: Head, base: BaseLM, **more: Any) -> Path:
    head.golden = capsule.record(head, base)
    return native.save(folder, head, name="mine", **more)


def settings(base: BaseLM, folder: Path | None, depth: int, **changed: Any) -> Any:
    """A VllmConfig as far as the plugin looks into it."""
    given: dict[str, Any] = {
        "additional": {} if folder is None else {"draft_head": str(folder)},
        "tensor": 1,
        "pipeline": 1,
        "quantization": None,
        "prefix_caching": False,
        "connector": None,
        **changed,
    }
    return SimpleNamespace(
        additional_config=given["additional"],
        parallel_config=SimpleNamespace(tensor_parallel_size=given["tensor"], pipeline_parallel_size=given["pipeline"]),
        model_config=SimpleNamespace(
            model=base.spec.path,
            revision=None,
            dtype=torch.float32,
            trust_remote_code=False,
            quantization=given["quantization"],
            hf_text_config=SimpleNamespace(num_hidden_layers=base.spec.num_layers),
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=depth),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        kv_transfer_config=given["connector"],
        cache_config=SimpleNamespace(enable_prefix_caching=given["prefix_caching"]),
    )


class Served:
    """The target model, as the plugin sees it."""

    def __init__(self, base: BaseLM) -> None:
        self.model = SimpleNamespace(embed_tokens=base.model.get_input_embeddings())
        self.lm_head = base.model.get_output_embeddings()

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        raise AssertionError("the runner calls this")


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "_look_into_steps", lambda: None)
    monkeypatch.setattr(vllm_plugin, "_mend_sampling", lambda: None)


def plugged(base: BaseLM, folder: Path, depth: int, **changed: Any) -> HeadProposer:
    proposer = HeadProposer(settings(base, folder, depth, **changed))
    proposer.load_model(Served(base))
    return proposer


def chosen(base: BaseLM, proposer: HeadProposer, ids: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    """(the layers asked for, final, the best next token) at every position of a text."""
    seen = base.capture(Needs(frozenset(proposer.layers), final=True), torch.tensor([ids]))
    final = seen.final
    assert final is not None
    return [seen.hidden[n][0] for n in proposer.layers], final[0], base.lm_head(final)[0].argmax(-1).tolist()


def run(
    base: BaseLM, proposer: HeadProposer, prompts: list[list[int]], *, chunk: int = 1000, preempted: int | None = None
) -> tuple[list[list[int]], int, int, list[int]]:
    """(texts, verifications, drafts, accepted by position). preempted: the step before which the first text's states
    are forgotten, to be read again."""
    texts = {f"r{n}": list(p) for n, p in enumerate(prompts)}
    starts, drafts = dict.fromkeys(texts, 0), {name: [] for name in texts}
    lengths = {f"r{n}": len(p) + NEW for n, p in enumerate(prompts)}
    verified, drafted, accepted, gone = 0, 0, [0] * proposer.depth, set[str]()
    for step in range(1000):
        if not texts:
            break
        if step == preempted:
            starts["r0"], drafts["r0"] = 0, []
        fed = {n: (texts[n] + drafts[n])[starts[n] : starts[n] + (chunk if not drafts[n] else 1000)] for n in texts}
        layers, finals, sampled = [], [], []
        for name, ids in fed.items():
            others, final, best = chosen(base, proposer, texts[name][: starts[name]] + ids)
            layers.append([t[starts[name] :] for t in others])
            finals.append(final[starts[name] :])
            end = starts[name] + len(ids) - len(drafts[name])
            if end < len(texts[name]):
                sampled.append([])
                continue
            right = 0
            while right < len(drafts[name]) and best[end - 1 + right] == drafts[name][right]:
                right += 1
            sampled.append([*drafts[name][:right], best[end - 1 + right]])
            if drafts[name]:
                verified, drafted = verified + 1, drafted + len(drafts[name])
                accepted = [n + (k < right) for k, n in enumerate(accepted)]
        names = list(fed)
        scheduled = SimpleNamespace(
            num_scheduled_tokens={n: len(ids) for n, ids in fed.items()},
            scheduled_spec_decode_tokens={n: d for n, d in drafts.items() if d},
        )
        batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=np.array([starts[n] for n in names]))
        hidden = [torch.cat(parts) for parts in zip(*layers, strict=True)]
        padded = torch.cat([*finals, torch.full((3, base.spec.hidden_size), float("nan"))])  # as for a CUDA graph
        computed = SimpleNamespace(scheduler_output=scheduled, hidden_states=padded, aux_hidden_states=hidden or None)
        proposer.observe(SimpleNamespace(input_batch=batch, requests=set(names)), computed)
        for name, new in zip(names, sampled, strict=True):
            texts[name] += new
            starts[name] += len(fed[name]) - len(drafts[name]) + max(len(new) - 1, 0) * bool(drafts[name])
        table = np.zeros((len(names), 200), dtype=np.int32)
        for row, name in enumerate(names):
            table[row, : len(texts[name])] = texts[name]
        counts = np.array([len(texts[n]) for n in names], dtype=np.int32)
        answer = proposer.propose(sampled, counts, table)
        drafts = dict(zip(names, answer, strict=True))
        gone = {n for n in names if len(texts[n]) >= lengths[n]}
        if gone:
            ended.update({n: texts[n] for n in gone})
        texts = {n: t for n, t in texts.items() if n not in gone}
        starts, drafts = ({n: v for n, v in d.items() if n in texts} for d in (starts, drafts))
    told_texts = [ended.pop(f"r{n}")[len(p) : len(p) + NEW] for n, p in enumerate(prompts)]
    return told_texts, verified, drafted, accepted


ended: dict[str, list[int]] = {}


def prompts_of(base: BaseLM, *lengths: int) -> list[list[int]]:
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(base.spec.vocab_size, (n,), generator=draws).tolist() for n in lengths]


def by_engine(
    base: BaseLM, head: Any, prompts: list[list[int]], depth: int, gate: Any = None
) -> tuple[list[list[int]], int, int, list[int]]:
    texts = decode(base, prompts, drafters=head, gates=gate, shape=tree.chain(depth), max_new_tokens=NEW)
    stats = sum((t.stats for t in texts), Stats())
    verified = stats.offered_by_depth[0]
    return [t.tokens for t in texts], verified, sum(stats.offered_by_depth), stats.accepted_by_depth


@pytest.mark.parametrize("chunk", [1000, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_as_the_engine_does(kind: str, chunk: int, base: BaseLM, tmp_path: Path) -> None:
    """Several texts of different lengths, prompts whole or three tokens at a time."""
    head: Any = made(kind, base)
    prompts, depth = prompts_of(base, 5, 9, 2), min(head.max_depth, 4)
    proposer = plugged(base, saved(tmp_path / "head", head, base), depth)
    texts, *counts = run(base, proposer, prompts, chunk=chunk)
    wanted, *engine = by_engine(base, head, prompts, depth)
    assert texts == wanted
    assert counts == engine
    assert counts[2][0] > 0  # some drafts are right,
    assert counts[2][0] < counts[0]  # some are not
    last = list(proposer.texts)
    texts, *_ = run(base, proposer, prompts_of(base, 4))
    assert not set(last) - {"r0"} & set(proposer.texts)  # what has ended is forgotten


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_read_again_goes_on_as_before(kind: str, base: BaseLM, tmp_path: Path) -> None:
    """A preempted request loses what vLLM computed of it, in the middle of its text; its positions come once more."""
    head: Any = made(kind, base)
    prompts, depth = prompts_of(base, 5, 9), min(head.max_depth, 4)
    folder = saved(tmp_path / "head", head, base)
    whole, again = plugged(base, folder, depth), plugged(base, folder, depth)
    texts, *_ = run(base, whole, prompts)
    told_again, *counts = run(base, again, prompts, preempted=4, chunk=4)
    assert told_again == texts
    assert counts[2][0] > 0


def test_positions_that_come_again_are_read_from_where_they_begin() -> None:
    """In the middle of what nobody has read yet, and before that; a gap is nobody's."""

    def states(start: int, stop: int) -> Capture:
        return Capture(final=torch.arange(start, stop)[None, :, None].float())

    text = Text()
    text.read(0, states(0, 4), 4, whole=True)
    text.read(4, states(4, 8), 4, whole=True)
    text.read(6, states(6, 9), 3, whole=True)
    taken = text.take().final
    assert taken is not None
    assert taken.flatten().tolist() == list(range(9))
    text.head_kv = KV(1)
    text.head_kv.update(torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2), 0)
    text.read(5, states(5, 12), 7, whole=True)
    assert text.head_kv.length == 5
    again = text.take().final
    assert again is not None
    assert again.flatten().tolist() == list(range(5, 12))
    text.read(14, states(14, 15), 1, whole=True)  # 12 and 13 were never shown
    assert not text.whole
    text.read(15, states(15, 16), 1, whole=True)
    assert not text.whole
    text.read(0, states(0, 16), 16, whole=True)
    assert text.whole
    assert text.head_kv is None
    assert len(text.pending) == 1


def test_a_gate_ends_the_chains_of_its_drafter(base: BaseLM, tmp_path: Path) -> None:
    hydra: Any = made("hydra", base)
    gate: Any = made("acceptance", base, hidden_size=base.spec.hidden_size, threshold=0.6)
    gate.attach(hydra)
    gate.said = {"beside": told(hydra, str(saved(tmp_path / "hydra", hydra, base)))}
    prompts = prompts_of(base, 5, 9, 2)
    elsewhere = saved(tmp_path / "gate", gate, base)
    inside = saved(tmp_path / "inside", gate, base, drafter=hydra)
    wanted, *engine = by_engine(base, hydra, prompts, 4, gate.gate())
    for folder in (elsewhere, inside):
        texts, *counts = run(base, plugged(base, folder, 4), prompts)
        assert texts == wanted
        assert counts == engine
        assert counts[0] < counts[1] < 4 * counts[0]  # of different lengths
    saved(tmp_path / "hydra", made("hydra", base, seed=2), base)
    with pytest.raises(DataError, match="made for another drafter"):
        plugged(base, elsewhere, 4)


def test_each_draft_gets_what_its_text_asked_for() -> None:
    """As the kernel documents it that vLLM 0.32 computes wrongly on a CPU."""
    x, ends = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    assert vllm_plugin.expanded(x, ends, 5).tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    zeros = vllm_plugin.expanded(torch.tensor([0.0, 0.7]), torch.tensor([1, 3]), 3, replace_from=0, replace_to=1)
    assert zeros.tolist() == pytest.approx([1.0, 0.7, 0.7])
    assert vllm_plugin.expanded(torch.tensor([7, 3]), torch.tensor([0, 0]), 0).tolist() == []


@pytest.mark.parametrize(
    ("kind", "changed", "says"),
    [
        ("clover", {"prefix_caching": True}, "--no-enable-prefix-caching"),
        ("clover2", {"connector": "some"}, "without --kv-transfer-config"),
        ("hydra", {"tensor": 2}, "parallel size 1"),
        ("hydra", {"pipeline": 2}, "parallel size 1"),
        ("hydra", {"quantization": "awq"}, r"quantised \(awq\)"),
        ("hydra", {"additional": None}, "no draft_head"),
        ("kv_prediction", {}, "is a primer; vLLM serves drafters and gates"),
    ],
)
def test_what_it_cannot_serve_is_refused_at_the_start(
    kind: str, changed: dict[str, Any], says: str, base: BaseLM, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "head", made(kind, base), base)
    with pytest.raises(ConfigError, match=says):
        plugged(base, folder, 2, **changed)


@pytest.mark.parametrize("kind", ["medusa", "hydra", "kangaroo"])
def test_prefix_caching_is_fine_where_no_position_is_missed(kind: str, base: BaseLM, tmp_path: Path) -> None:
    plugged(base, saved(tmp_path / "head", made(kind, base), base), 2, prefix_caching=True)


def test_more_drafts_than_the_head_has_are_refused(base: BaseLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_speculative_tokens=4: .* drafts at most 3"):
        plugged(base, saved(tmp_path / "head", made("medusa", base), base), 4)


def test_a_head_of_another_base_is_refused(base: BaseLM, tmp_path: Path) -> None:
    from draftsmith import load_base

    create.llama(SHAPE, None, seed=4).save_pretrained(tmp_path / "base")
    other = load_base(tmp_path / "base")  # the same sizes: a shared lm_head shows it
    head = made("medusa", other, share_lm_head=True)
    with pytest.raises(DraftsmithError, match="does not answer as it did"):
        plugged(base, saved(tmp_path / "head", head, other), 2)
    create.llama({**SHAPE, "num_hidden_layers": 2}, None, seed=4).save_pretrained(tmp_path / "short")
    short = load_base(tmp_path / "short")
    with pytest.raises(DataError, match=r"num_layers=2, this base .* has 4"):
        plugged(base, saved(tmp_path / "head2", made("medusa", short), short), 2)


def test_the_vocabulary_is_not_in_memory_twice(base: BaseLM, tmp_path: Path) -> None:
    proposer = plugged(base, saved(tmp_path / "head", made("medusa", base), base), 2)
    assert proposer.base.lm_head_weight.data_ptr() == base.lm_head_weight.data_ptr()
    assert len(list(proposer.base.model.model.layers)) == 1
