"""Hugging Face's own `model.generate(custom_generate=folder)` with our heads: the same tokens as without, for every
yaml of conf/head, and what a call may ask for. Nothing but transformers reads the folders here."""

import copy
import functools
import gc
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from draftsmith import api, artifacts, beside, config, generating
from draftsmith.base.lm import BaseLM
from draftsmith.base.settings import LoraConfig
from draftsmith.decoding.engine import decode
from draftsmith.decoding.goodness import chi_square
from draftsmith.errors import DataError
from draftsmith.exporters import capsule
from draftsmith.exporters.custom_generate import CustomGenerate, CustomGenerateConfig
from draftsmith.growth import Warp
from draftsmith.training.fit import new_adapter, new_head

from .conftest import call

CONF = Path(__file__).parents[2] / "conf" / "head"
NAMES = sorted(p.stem for p in CONF.glob("*.yaml"))
SPOKEN = 8  # the tokens that the bases keep to, so that a random draft is right now and then
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [5, 2], list(range(20, 35))]
POSITIONS = 160  # of the bases, as conftest.py makes them
DRAFTER_OF_GATE = "kangaroo"


def kind_of(name: str) -> tuple[Any, Any]:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    kind = config.target(node, name)
    changes = {"start_from_base": True, "keep": 0.5, "threshold": 0.9 if name == "acceptance" else None}
    values = {k: changes[k] if changes.get(k) is not None else v for k, v in node.items()}
    return kind, config.typed(values, kind.Config, name)


DRAFTERS = [name for name in NAMES if kind_of(name)[0].role == "drafter"]
EXACT = [name for name in NAMES if not kind_of(name)[0].lossy]
LOSSY = [name for name in NAMES if kind_of(name)[0].lossy]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers copies the code it runs into its cache."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as m:
        m.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def spoken(tiny_base: Any, noisy: Any) -> Callable[..., BaseLM]:
    """spoken(family, adapted): a base that keeps to few tokens, which takes a random head's drafts now and then."""

    @functools.cache
    def of(family: str = "llama", adapted: bool = False) -> BaseLM:
        base = tiny_base.__wrapped__(family)
        with torch.no_grad():
            base.lm_head_weight.mul_(6)
            base.lm_head_weight[SPOKEN:] = 0
        if adapted:
            new_adapter(base, LoraConfig(rank=3), 0)
            noisy(base.adapter, 0.1)
            base.name_adapter()
        return base

    return of


@pytest.fixture(scope="module")
def exported(
    spoken: Any, noisy: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[BaseLM, Any, Path]]:
    """exported(name, family) -> (base, head, folder), the folder moved after it was written."""

    @functools.cache
    def of(name: str, family: str = "llama") -> tuple[BaseLM, Any, Path]:
        kind, own = kind_of(name)
        base = spoken(family, kind.adapts)
        drafter = of(DRAFTER_OF_GATE, family)[1] if kind.wants == "drafter" else None
        head = noisy(new_head(kind, own, name, base, 0, beside=drafter), 0.02).eval()
        if drafter is not None:
            head.said = {"beside": beside.told(drafter, "/nowhere")}
        head.golden = capsule.record(head, base)
        folder = tmp_path_factory.mktemp("exports")
        made = CustomGenerate(CustomGenerateConfig()).save(folder / "written", head, base, name=name)
        return base, head, made.rename(folder / name)

    return of


def plain(base: BaseLM, folder: Path | None = None) -> Any:
    """The base as a user has it: transformers' model, never seen by us; with the folder's adapter, as peft puts it."""
    source = copy.deepcopy(base.model)
    if base.adapter is not None:
        state = {n.replace(".base_layer.", "."): p for n, p in source.state_dict().items() if "lora_" not in n}
        source = type(source)(source.config)
        source.load_state_dict(state)
    source.config._attn_implementation = "sdpa"
    source.requires_grad_(True)
    if base.adapter is not None and folder is not None:
        source.load_adapter(str(folder / "adapter"))
    return source.eval()


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[59] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def ours(model: Any, folder: Path, **arguments: Any) -> Tensor:
    return model.generate(**arguments, custom_generate=str(folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def medusa(exported: Any) -> tuple[Any, Path]:
    base, _, folder = exported("medusa")
    return plain(base), folder


@pytest.mark.parametrize("name", EXACT)
def test_greedy_tokens_are_those_of_transformers(name: str, exported: Any) -> None:
    base, _, folder = exported(name)
    model, how = plain(base, folder), {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**padded(PROMPTS), **how)
    assert torch.equal(ours(model, folder, **padded(PROMPTS), **how), want)
    spoken_first = [5, int(want[1, 20])]  # texts now end at different times
    ends = model.generate(**padded(PROMPTS), **how, eos_token_id=spoken_first)
    assert (ends[:, -1] == 0).any()
    assert torch.equal(ours(model, folder, **padded(PROMPTS), **how, eos_token_id=spoken_first), ends)
    for prompt in PROMPTS:
        given = {"inputs": torch.tensor([prompt]), "max_length": len(prompt) + 17, "do_sample": False}
        assert torch.equal(ours(model, folder, **given), model.generate(**given))


@pytest.mark.parametrize("name", EXACT)
def test_some_drafts_were_right_and_some_wrong(name: str, exported: Any) -> None:
    """Else the tokens above would tell little."""
    base, head, _ = exported(name)
    outs = [api.generate(base, prompt, head=head, max_new_tokens=24) for prompt in PROMPTS]
    offered = sum(sum(out.stats.offered_by_depth) for out in outs)
    assert 0 < sum(out.stats.accepted for out in outs) < offered


@pytest.mark.parametrize("name", DRAFTERS)
def test_up_to_the_last_position(name: str, exported: Any) -> None:
    """There transformers would go on where positions are rotations; we end and say so."""
    base, _, folder = exported(name)
    model, prompts = plain(base, folder), [[i % 50 for i in range(n)] for n in (POSITIONS - 7, POSITIONS - 15)]
    how = {**padded(prompts), "do_sample": False, "pad_token_id": 0}
    want = model.generate(**how, max_new_tokens=20)
    assert torch.equal(ours(model, folder, **how, max_new_tokens=8), want[:, : POSITIONS - 7 + 8])
    with pytest.warns(UserWarning, match=f"ended early, at the model's {POSITIONS} positions"):
        got = ours(model, folder, **how, max_new_tokens=20)
    end = POSITIONS - 7 + 8  # the last token of a text stands behind the last position that is read
    assert torch.equal(got[0], torch.cat([want[0, :end], torch.zeros(len(got[0]) - end, dtype=torch.long)]))
    assert torch.equal(got[1], want[1, : end + 8])
    with pytest.raises(ValueError, match="pad_token_id: give one"):
        ours(model, folder, **{**how, "pad_token_id": None}, max_new_tokens=20)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "opt", "gpt_neox"])
def test_other_families(family: str, exported: Any) -> None:
    """gemma2 is computed by its eager attention; mistral sees less far than the texts are long."""
    base, _, folder = exported("hydra", family)
    model, how = plain(base), {**padded(PROMPTS), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    if family == "gemma2":
        model.config._attn_implementation = "eager"
    assert torch.equal(ours(model, folder, **how), model.generate(**how))


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_head_says_so_once(name: str, exported: Any) -> None:
    base, head, folder = exported(name)
    model = plain(base)
    how = {**padded(PROMPTS), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with pytest.warns(UserWarning, match="a lossy head"):
        got = ours(model, folder, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(model, folder, **how), got)
    want = [decode(base, [prompt], primer=head, max_new_tokens=12)[0].tokens for prompt in PROMPTS]
    assert got[:, -12:].tolist() == want


def test_a_gates_drafter_is_the_one_in_its_folder(exported: Any, tmp_path: Path) -> None:
    base, _, folder = exported("acceptance")
    gate = ours_head(base, folder)
    assert type(gate.beside).__name__.lower() == DRAFTER_OF_GATE
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.rmtree(broken / "drafter")
    with pytest.raises(DataError, match="drafter/"):
        ours(plain(base), broken, input_ids=torch.tensor([[7]]), max_new_tokens=2)


def ours_head(base: BaseLM, folder: Path) -> Any:
    model = plain(base)
    ours(model, folder, input_ids=torch.tensor([[7]]), max_new_tokens=2, do_sample=False)
    return generating.HEADS[model][folder.resolve()][1]


@pytest.mark.parametrize("name", ["medusa", "eagle3", "acceptance"])
def test_sampling_is_repeatable_and_follows_the_warps(name: str, exported: Any) -> None:
    base, _, folder = exported(name)
    model = plain(base)
    how = {**padded(PROMPTS), "max_new_tokens": 16, "pad_token_id": 0}

    def drawn(seed: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        return ours(model, folder, **how, do_sample=True, **more)

    warm = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
    assert torch.equal(drawn(1, **warm), drawn(1, **warm))
    assert not torch.equal(drawn(1, **warm), drawn(2, **warm))
    greedy = model.generate(**how, do_sample=False)
    for sure in ({"top_k": 1}, {"temperature": 1e-6}, {"top_p": 1e-6}):
        assert torch.equal(drawn(3, **sure), greedy)


@pytest.mark.parametrize("name", ["medusa", "eagle3"])
def test_sampled_tokens_are_distributed_as_transformers_says(name: str, exported: Any) -> None:
    base, _, folder = exported(name)
    model, prompt = plain(base), [3, 1, 4, 1, 5]
    warm, count = {"temperature": 1.3, "top_k": 12, "top_p": 0.95}, 400
    warp = Warp(**warm)
    exact = copy.deepcopy(model).double()

    def chances(text: list[int]) -> Tensor:
        return warp.chances(exact(torch.tensor([text])).logits[:, -1].detach())[0]

    expected = torch.stack([p * chances([*prompt, token]) for token, p in enumerate(chances(prompt))])
    torch.manual_seed(0)
    how = {"input_ids": torch.tensor([prompt]), "do_sample": True, "max_new_tokens": 2, **warm}
    out = ours(model, folder, **how, num_return_sequences=count)
    assert out.shape == (count, len(prompt) + 2)
    seen = torch.zeros_like(expected)
    for a, b in out[:, -2:].tolist():
        seen[a, b] += 1
    assert chi_square(seen, expected) > 1e-3
    flat = Warp(3.0).chances(exact(torch.tensor([prompt])).logits[:, -1].detach())[0]
    assert chi_square(seen.sum(1), flat) < 1e-4  # it can tell


class Shown:
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, ids: Tensor) -> None:
        assert not self.ended
        self.parts.append(ids.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["medusa", *LOSSY])
@pytest.mark.parametrize("more", [{}, {"max_new_tokens": 1}, {"eos_token_id": list(range(4))}, {"do_sample": True}])
@pytest.mark.filterwarnings("ignore:.*a lossy head")
def test_a_streamer_gets_the_prompt_and_then_each_token(name: str, more: dict[str, Any], exported: Any) -> None:
    base, _, folder = exported(name)
    model, shown, prompt = plain(base), Shown(), PROMPTS[1]
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **more}
    out = ours(model, folder, input_ids=torch.tensor([prompt]), streamer=shown, **how)
    assert shown.parts == [prompt, *([token] for token in out[0, len(prompt) :].tolist())]
    assert shown.ended == 1


def test_tokens_are_streamed_while_the_text_goes_on(medusa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = medusa
    steps, shown = [], Shown()
    step = generating._Stream.watch

    def watch(self: Any, *seen: Any) -> None:
        steps.append(len(shown.parts))
        step(self, *seen)

    monkeypatch.setattr(generating._Stream, "watch", watch)
    ours(model, folder, input_ids=torch.tensor([[7]]), streamer=shown, max_new_tokens=20, do_sample=False)
    assert len(steps) > 3
    assert steps == sorted(set(steps))


class Fake:
    def __init__(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("argument", "more"),
    [
        ("num_beams", {"num_beams": 2}),
        ("num_beams", {"num_beams": 2, "do_sample": True}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("assistant_model", {"assistant_model": Fake()}),
        ("repetition_penalty", {"repetition_penalty": 1.2}),
        ("no_repeat_ngram_size", {"no_repeat_ngram_size": 2}),
        ("min_new_tokens", {"min_new_tokens": 3, "eos_token_id": 5}),
        ("min_length", {"min_length": 6, "eos_token_id": 5}),
        ("bad_words_ids", {"bad_words_ids": [[3]]}),
        ("suppress_tokens", {"suppress_tokens": [3]}),
        ("min_p", {"min_p": 0.1, "do_sample": True}),
        ("typical_p", {"typical_p": 0.5, "do_sample": True}),
        ("prefix_allowed_tokens_fn", {"prefix_allowed_tokens_fn": lambda b, ids: [1]}),
        ("logits_processor", {"logits_processor": [Fake()]}),
        ("stopping_criteria", {"stopping_criteria": [Fake()]}),
        ("stop_strings", {"stop_strings": ["x"], "tokenizer": Fake()}),
        ("max_time", {"max_time": 1.0}),
        ("return_dict_in_generate", {"return_dict_in_generate": True}),
        ("output_attentions", {"output_attentions": True}),
        ("synced_gpus", {"synced_gpus": True}),
        ("position_ids", {"position_ids": torch.arange(3)[None]}),
        ("inputs_embeds", {"inputs_embeds": torch.zeros(1, 3, 32)}),
        ("attention_mask", {"attention_mask": torch.tensor([[1, 1, 0]])}),
        ("attention_mask", {"attention_mask": torch.tensor([[1, 0, 1]])}),
        ("prompt: 0 tokens", {"attention_mask": torch.tensor([[0, 0, 0]])}),
        ("streamer", {"streamer": Shown(), "num_return_sequences": 2, "do_sample": True}),
        ("top_p", {"do_sample": True, "top_p": 0.0}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(argument: str, more: dict[str, Any], medusa: Any) -> None:
    model, folder = medusa
    how = {"input_ids": torch.tensor([[3, 1, 4]]), "max_new_tokens": 4, "do_sample": False, **more}
    with pytest.raises(ValueError, match=argument):
        ours(model, folder, **how)


def test_what_a_model_asks_for_by_itself_counts_too(medusa: Any) -> None:
    model, folder = medusa
    how = {"input_ids": torch.tensor([[3, 1, 4]]), "max_new_tokens": 9, "do_sample": False}
    own = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.eos_token_id = int(model.generate(**how)[0, 5])
        assert torch.equal(ours(model, folder, **how), model.generate(**how))
        model.generation_config.stop_strings = ["x"]
        with pytest.raises(ValueError, match="stop_strings"):
            ours(model, folder, **how)
        model.generation_config.stop_strings, model.generation_config.repetition_penalty = None, 1.2
        with pytest.raises(ValueError, match="repetition_penalty"):
            ours(model, folder, **how)
    finally:
        model.generation_config = own
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="device_map"):
        ours(model, folder, **how)
    del model.hf_device_map


def state(model: Any) -> tuple[Any, ...]:
    return (
        model.config._attn_implementation,
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        artifacts.tensors_sha256(model.state_dict()),
        sorted(vars(model)),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_afterwards_as_it_was(attention: str, training: bool, exported: Any) -> None:
    """Also after a refusal. In training its dropout would make it say something else, so it is off meanwhile."""
    base, _, folder = exported("kangaroo")
    model = plain(base)
    how = {**padded(PROMPTS), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**how)
    model.config._attn_implementation = attention
    model.train(training)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.eval()
    before = state(model)
    assert torch.equal(ours(model, folder, **how), want)
    assert state(model) == before
    for more in ({"num_beams": 2}, {"input_ids": torch.tensor([[99]])}):
        with pytest.raises(ValueError, match=r"num_beams|ids 99"):
            ours(model, folder, **{"max_new_tokens": 3, "input_ids": torch.tensor([[7]]), "do_sample": False, **more})
        assert state(model) == before


def test_threads_share_a_model(medusa: Any) -> None:
    model, folder = medusa
    before, found = state(model), {}
    wants = [model.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False) for p in PROMPTS]

    def run(i: int) -> None:
        for _ in range(3):
            ids = torch.tensor([PROMPTS[i]])
            found[i] = ours(model, folder, input_ids=ids, max_new_tokens=20, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[i], want) for i, want in enumerate(wants))
    assert state(model) == before


def test_a_head_is_read_once_per_folder_and_model(exported: Any, tmp_path: Path, monkeypatch: Any) -> None:
    base, head, folder = exported("medusa")
    model, read = plain(base), []
    load = beside.Beside.load
    monkeypatch.setattr(beside.Beside, "load", lambda self, path: read.append(path) or load(self, path))
    moving = Path(shutil.copytree(folder, tmp_path / "head"))
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 3, "do_sample": False}
    for _ in range(3):
        ours(model, moving, **how)
    assert len(read) == 1
    ours(plain(base), moving, **how)
    assert len(read) == 2
    time.sleep(0.01)
    CustomGenerate(CustomGenerateConfig()).save(moving, head, base, name="anew")
    ours(model, moving, **how)
    assert len(read) == 3
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_another_base_is_refused_and_a_tokenizer_is_compared(
    exported: Any, spoken: Any, tiny_base: Any, tmp_path: Path
) -> None:
    base, _, folder = exported("medusa")
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="num_layers=2"):
        ours(plain(tiny_base("llama", num_hidden_layers=3)), folder, **how)
    with pytest.raises(ValueError, match="family=llama"):
        ours(plain(spoken("qwen2")), folder, **how)
    with pytest.raises(ValueError, match="this base leaves other states"):  # of the same shape
        ours(plain(tiny_base("llama", seed=4)), folder, **how)

    own = SimpleNamespace(get_vocab=lambda: {"a": 0}, special_tokens_map={})
    other = SimpleNamespace(get_vocab=lambda: {"b": 0}, special_tokens_map={})
    named = BaseLM(copy.deepcopy(base.model), own)
    head = new_head(*kind_of("medusa"), "medusa", named, 0)
    told = CustomGenerate(CustomGenerateConfig()).save(tmp_path / "told", head, named, name="told")
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        ours(plain(base), told, **how, tokenizer=other)
    ours(plain(base), told, **how)
    ours(plain(base), told, **how, tokenizer=own)
    ours(plain(base), folder, **how, tokenizer=own)  # whose base had none: nothing to compare


def test_a_head_with_an_adapter_wants_that_adapter_in_the_model(exported: Any) -> None:
    base, _, folder = exported("medusa2")
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match=r"trained with an adapter.*model\.load_adapter\('.*/adapter'\)"):
        ours(plain(base), folder, **how)
    other = plain(base, folder)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "lora_B" in n).add_(1)
    with pytest.raises(ValueError, match="adapter_sha256"):
        ours(other, folder, **how)


def test_a_damaged_folder_is_refused(medusa: Any, tmp_path: Path) -> None:
    model, folder = medusa
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 3, "do_sample": False}
    cut = Path(shutil.copytree(folder, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes"):
        ours(model, cut, **how)
    (cut / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        ours(model, cut, **how)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**how, custom_generate=str(folder))


def test_the_folder_can_be_named_in_the_call(medusa: Any, tmp_path: Path) -> None:
    """For a file that is run from elsewhere; and without a call that names it there is nothing to guess from."""
    model, folder = medusa
    code = Path(shutil.copytree(folder / "custom_generate", tmp_path / "code" / "custom_generate")).parent
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(ours(model, code, **how, head=str(folder)), model.generate(**how))
    defined: dict[str, Any] = {}
    exec((folder / "custom_generate" / "generate.py").read_text(), defined)
    with pytest.raises(ValueError, match="head: which folder"):
        defined["generate"](model, **how)


def test_a_repository_is_read_at_the_commit_of_its_code(medusa: Any, tmp_path: Path) -> None:
    """From a cache of the hub, without network."""
    model, folder = medusa
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--some--head"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    how = {"input_ids": torch.tensor([[7]]), "max_new_tokens": 9, "do_sample": False}
    got = model.generate(**how, custom_generate="some/head", trust_remote_code=True, cache_dir=str(tmp_path))
    assert torch.equal(got, model.generate(**how))


def test_from_training_to_transformers(training: list[str], micro: Path, tmp_path: Path) -> None:
    """As a user does it: train, export, and only transformers from there on."""
    code, told = call("train", *training, "head=[medusa]", "trainer.max_steps=8", "run_dir=run", cwd=tmp_path)
    assert code == 0, told
    code, told = call("export", "run_dir=run", "exporter=custom_generate", "out=given", cwd=tmp_path)
    assert code == 0, told
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(micro / "base")
    tokenizer = AutoTokenizer.from_pretrained(micro / "base", padding_side="left")
    inputs = tokenizer(["Count", "Once upon a time there"], return_tensors="pt", padding=True)
    how = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "do_sample": False}
    want = model.generate(**how, max_new_tokens=40)
    for more in ({}, {"tokenizer": tokenizer}):
        assert torch.equal(ours(model, tmp_path / "given", **how, max_new_tokens=40, **more), want)
