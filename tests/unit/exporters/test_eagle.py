"""EAGLE-3's folders, read as inference servers read them: plain torch from the files alone, nothing of ours."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from draftsmith import artifacts
from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import BaseSpec
from draftsmith.decoding.tree import chain
from draftsmith.errors import ConfigError, NumericsError
from draftsmith.exporters import eagle
from draftsmith.exporters.runtimes import Runtime, RuntimeConfig
from draftsmith.heads.eagle3 import Eagle3, Eagle3Config
from draftsmith.roles import State

RUNTIMES = ("vllm", "sglang", "speculators", "tensorrt_llm", "llama_cpp")
D, FF, V, CUT, L = 16, 24, 40, 26, 5
SHAPE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden / heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 777.0},
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5},
    "llama3": LLAMA3,
}
MakeBase = Callable[..., BaseLM]


def base_of(rope: dict[str, Any] | None = None, **shape: Any) -> BaseLM:
    made = create.llama({**SHAPE, **({"rope_parameters": rope} if rope else {}), **shape}, None, seed=0)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(8)  # states far from each other
    return BaseLM(made, path="some/base")


def head_of(base: BaseLM, **settings: Any) -> Eagle3:
    """Random everywhere, norms too."""
    torch.manual_seed(1)
    head = Eagle3(Eagle3Config(**{"draft_vocab_size": CUT, "depth": 3, "layers": [1, 2, 4], **settings}), base.spec)
    counts_V = torch.rand(V)
    head.initialise(base, counts_V)
    with torch.no_grad():
        for name, p in head.named_parameters():
            size = 0.02 if name == "fc.weight" else 0.4  # of the feature beside what the layer adds to it
            p.copy_(torch.rand_like(p) + 0.5 if "norm" in name else size * torch.randn_like(p))
    return head.eval()


@pytest.fixture(scope="module")
def base() -> BaseLM:
    return base_of(LLAMA3)


@pytest.fixture(scope="module")
def head(base: BaseLM) -> Eagle3:
    return head_of(base)


def export(folder: Path, head: Any, base: Any, runtime: str = "vllm", dtype: str | None = None) -> Path:
    return Runtime(RuntimeConfig(runtime, dtype)).save(folder, head, base, name="mine")


# -------------------------------------------------------------------------------------------------- an EAGLE-3 server


def spun(x_HTd: Tensor, positions_T: Tensor, rope: dict[str, Any]) -> Tensor:
    """Keys or queries turned as the config's rope says (default, linear and llama3 as transformers computes them)."""
    size = x_HTd.shape[-1]
    turns = [rope["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
    if rope["rope_type"] == "linear":
        turns = [t / rope["factor"] for t in turns]
    if rope["rope_type"] == "llama3":
        length, low, high = (
            rope[f"{k}"] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        scaled = []
        for t in turns:
            wave = 2 * math.pi / t
            if wave < length / high:
                scaled.append(t)
            elif wave > length / low:
                scaled.append(t / rope["factor"])
            else:
                smooth = (length / wave - low) / (high - low)
                scaled.append((1 - smooth) * t / rope["factor"] + smooth * t)
        turns = scaled
    angles = positions_T[:, None].double() * torch.tensor(turns, dtype=torch.float64)
    cos, sin = (f(angles).float() for f in (torch.cos, torch.sin))
    one, two = x_HTd[..., : size // 2], x_HTd[..., size // 2 :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def legacy(config: dict[str, Any]) -> dict[str, Any]:
    """The rope of readers that know no `rope_parameters`."""
    return {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}


class Server:
    """One chain of drafts as a server computes it: sizes from config.json, names and sizes strict, the layer ids by the
    server's own rule, the embedding and the hidden states the target's."""

    def __init__(self, runtime: str, folder: Path, old_rope: bool = False) -> None:
        told = json.loads((folder / "config.json").read_text())
        self.t = {k.replace("layers.0.", "midlayer."): t for k, t in load_file(folder / "model.safetensors").items()}
        if runtime == "speculators":
            assert "model_type" not in told  # vLLM then infers "speculators"
            assert told["speculators_model_type"] == "eagle3"
            config = {**told["transformer_layer_config"], "draft_vocab_size": told["draft_vocab_size"]}
            # vLLM's default is true where the key is missing (configs/speculators/algos.py)
            self.norm_first = told.get("norm_before_residual", True)
        else:
            config, self.norm_first = told, told.get("norm_before_residual", False)
            assert config["architectures"] == ["LlamaForCausalLMEagle3"]
            assert config["model_type"] == "llama"
        self.config, self.rope = config, legacy(config) if old_rope else config["rope_parameters"]
        self.taps = self.layer_ids(runtime, folder, told)
        assert config["num_hidden_layers"] == 1
        assert (config["attention_bias"], config["tie_word_embeddings"], config["hidden_act"]) == (False, False, "silu")
        self.embed = self.t.pop("embed_tokens.weight", None)
        assert (self.embed is not None) == (runtime == "speculators")
        self.check_shapes()

    def layer_ids(self, runtime: str, folder: Path, told: dict[str, Any]) -> list[int]:
        """Hugging Face's hidden_states[i] that the server hands out; the default where it finds nothing."""
        default = [2, L // 2, L - 3]
        if runtime in ("vllm", "speculators"):  # gpu_model_runner.py, then interfaces.py: tuple(sorted(set(layers)))
            return sorted(set(told.get("eagle_aux_hidden_state_layer_ids") or default))
        if runtime == "llama_cpp":  # conversion/llama.py, then common/speculative.cpp: the layer's input
            return told.get("eagle_aux_hidden_state_layer_ids") or default
        if runtime == "sglang":  # spec_aux_hidden_state.py reads eagle_config only; models/llama.py adds 1
            ids = told.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
            return default if ids is None else [i + 1 for i in ids]
        options = json.loads((folder / "llm_api_options.yaml").read_text())["speculative_config"]
        assert (options["decoding_type"], options["speculative_model"]) == ("Eagle3", str(folder.resolve()))
        return [i + 1 for i in sorted(set(options["eagle3_layers_to_capture"]))]  # eagle3.py: what leaves layer i

    def check_shapes(self) -> None:
        c = self.config
        size, wide = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
        narrow, inner = c["num_key_value_heads"] * c["head_dim"], c["intermediate_size"]
        want = {
            "fc.weight": (size, 3 * size),
            "midlayer.self_attn.q_proj.weight": (wide, 2 * size),
            "midlayer.self_attn.k_proj.weight": (narrow, 2 * size),
            "midlayer.self_attn.v_proj.weight": (narrow, 2 * size),
            "midlayer.self_attn.o_proj.weight": (size, wide),
            "midlayer.mlp.gate_proj.weight": (inner, size),
            "midlayer.mlp.up_proj.weight": (inner, size),
            "midlayer.mlp.down_proj.weight": (size, inner),
            "lm_head.weight": (c["draft_vocab_size"], size),
            "norm.weight": (size,),
        }
        norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        want |= {f"midlayer.{name}.weight": (size,) for name in norms}
        if (
            c["draft_vocab_size"] != c["vocab_size"]
        ):  # with a whole vocabulary vLLM refuses a d2t that it has no use for
            want |= {"d2t": (c["draft_vocab_size"],), "t2d": (c["vocab_size"],)}
            assert (self.t["d2t"].dtype, self.t["t2d"].dtype) == (torch.int64, torch.bool)
        assert {k: tuple(t.shape) for k, t in self.t.items()} == want

    def normed(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.config["rms_norm_eps"])

    def drafts(
        self, hidden: dict[int, Tensor], embed: Tensor, tokens: list[int], depth: int
    ) -> tuple[list[int], Tensor]:
        """(tokens, logits_KV) drafted after `tokens`, the last of which the target has not read; hidden: [T - 1, D]."""
        taps = [hidden[i] for i in self.taps]
        assert len(taps) * self.config["hidden_size"] == self.t["fc.weight"].shape[1]
        feature_TD = F.linear(torch.cat(taps, -1), self.t["fc.weight"])
        embed = embed if self.embed is None else self.embed
        ids, positions = torch.tensor(tokens[1:]), torch.arange(len(tokens) - 1)
        keys, values, drafted, logits = [], [], [], []
        for _ in range(depth):
            out_TD = self.layer(embed[ids], feature_TD, positions, keys, values)
            logits.append(F.linear(self.normed(out_TD[-1:], "norm"), self.t["lm_head.weight"])[0])
            best = int(logits[-1].argmax())
            drafted.append(best + int(self.t["d2t"][best]) if "d2t" in self.t else best)
            ids, feature_TD, positions = torch.tensor(drafted[-1:]), out_TD[-1:], positions[-1:] + 1
        return drafted, torch.stack(logits)

    def layer(self, embedded: Tensor, feature: Tensor, positions: Tensor, keys: list[Any], values: list[Any]) -> Tensor:
        """The hidden state before the final norm [T, D], which is the next step's feature too."""
        c, one = self.config, "midlayer."
        normed = self.normed(feature, f"{one}hidden_norm")
        residual = normed if self.norm_first else feature
        x_TE = torch.cat([self.normed(embedded, f"{one}input_layernorm"), normed], -1)
        q, k, v = (
            F.linear(x_TE, self.t[f"{one}self_attn.{n}_proj.weight"]).unflatten(-1, (-1, c["head_dim"])).transpose(0, 1)
            for n in "qkv"
        )
        keys.append(spun(k, positions, self.rope))
        values.append(v)
        times = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = (torch.cat(x, 1).repeat_interleave(times, 0) for x in (keys, values))
        scores = spun(q, positions, self.rope) @ k.transpose(1, 2) / c["head_dim"] ** 0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1 + k.shape[1] - q.shape[1])
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        hidden = residual + F.linear(mixed, self.t[f"{one}self_attn.o_proj.weight"])
        inner = self.normed(hidden, f"{one}post_attention_layernorm")
        gate, up = (F.linear(inner, self.t[f"{one}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        return hidden + F.linear(F.silu(gate) * up, self.t[f"{one}mlp.down_proj.weight"])


TEXT = torch.randint(V, (19,), generator=torch.Generator().manual_seed(3)).tolist()


def target_states(base: BaseLM) -> dict[int, Tensor]:
    """Hugging Face's hidden_states by their index, of all tokens but the last."""
    with torch.no_grad():
        seen = base.model(torch.tensor([TEXT[:-1]]), output_hidden_states=True).hidden_states
    return {i: h[0] for i, h in enumerate(seen[:-1])}  # the last of them is normed already


def of_server(runtime: str, folder: Path, base: BaseLM, old_rope: bool = False) -> tuple[list[int], Tensor]:
    embed = base.model.get_input_embeddings().weight
    return Server(runtime, folder, old_rope).drafts(target_states(base), embed, TEXT, 3)


def of_head(head: Eagle3, base: BaseLM) -> tuple[list[int], Tensor]:
    """Head.propose's drafts, and the logits that it shows."""
    shown: list[Tensor] = []
    shape: Any = chain(3)

    class Watched:
        depth = nodes = 4
        drawable = frozenset[str]()

        def grow(self, *args: Any) -> Any:
            growing = shape.grow(*args)
            inner = growing.next

            class Growing:
                def __getattr__(self, name: str) -> Any:
                    return getattr(growing, name)

                def next(self, logits_AV: Tensor) -> Any:
                    shown.append(logits_AV[0])
                    return inner(logits_AV)

            return Growing()

        def __getattr__(self, name: str) -> Any:
            return getattr(shape, name)

    watched: Any = Watched()
    seen = base.capture(head.needs, torch.tensor([TEXT[:-1]]))
    with torch.no_grad():
        proposal = head.propose(base, State(TEXT, TEXT[-1], seen, watched))
    return proposal.tokens_N[1:].tolist(), torch.stack(shown[:3])


def agrees(found: tuple[list[int], Tensor], head: Eagle3, base: BaseLM) -> bool:
    drafts, logits = of_head(head, base)
    return found[0] == drafts and torch.allclose(found[1], logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ROPES)
def test_a_server_drafts_as_the_head_does(tmp_path: Path, runtime: str, kind: str) -> None:
    """§11.36: three steps of one chain, its tokens and its logits; by today's rope keys and by the older ones."""
    base = base_of(ROPES[kind])
    head = head_of(base)
    folder = export(tmp_path / "out", head, base, runtime)
    for old_rope in (False, True):
        assert agrees(of_server(runtime, folder, base, old_rope), head, base)


def test_the_chain_is_not_one_token_over_and_over(base: BaseLM, head: Eagle3) -> None:
    assert len(set(of_head(head, base)[0])) > 1


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("layers", [[1, 2, 3], [2, 3, 4]])
def test_the_layers_are_the_heads_own(tmp_path: Path, base: BaseLM, runtime: str, layers: list[int]) -> None:
    head = head_of(base, layers=layers)
    assert agrees(of_server(runtime, export(tmp_path / "out", head, base, runtime), base), head, base)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_whole_vocabulary_has_no_map(tmp_path: Path, base: BaseLM, runtime: str) -> None:
    head = head_of(base, draft_vocab_size=1000)
    folder = export(tmp_path / "out", head, base, runtime)
    assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
    assert agrees(of_server(runtime, folder, base), head, base)


@pytest.mark.parametrize(
    ("runtime", "layers"),
    [("vllm", [0, 2, 5]), ("speculators", [0, 2, 5]), ("llama_cpp", [0, 2, 4]), ("llama_cpp", [2, 2, 2])],
)
def test_the_outermost_states_that_a_server_has(tmp_path: Path, base: BaseLM, runtime: str, layers: list[int]) -> None:
    head = head_of(base, layers=layers)
    folder = export(tmp_path / "out", head, base, runtime)
    states = {i: base.capture(head.needs, torch.tensor([TEXT[:-1]])).hidden[i][0] for i in layers}
    embed = base.model.get_input_embeddings().weight
    assert agrees(Server(runtime, folder).drafts(states, embed, TEXT, 3), head, base)


# ------------------------------------------------------------------------------------------------- negative controls

Edit = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def other_ids(by: int) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        place = config.get("eagle_config", config)
        place["eagle_aux_hidden_state_layer_ids"] = [i + by for i in place["eagle_aux_hidden_state_layer_ids"]]

    return edit


def exchange(one: str, two: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        one_key, two_key = (next(k for k in tensors if k.endswith(f"{n}.weight")) for n in (one, two))
        tensors[one_key], tensors[two_key] = tensors[two_key].clone(), tensors[one_key].clone()

    return edit


def halves(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """[feature, token] where [token, feature] is meant."""
    for name in [k for k in tensors if k.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        tensors[name] = torch.cat(tensors[name].chunk(2, 1)[::-1], 1)


def absolute(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Ids where offsets are meant."""
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


def told(*keys: str, **values: Any) -> Edit:
    """config.json without these keys, or with other values; of the layer's where it has one."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for place in (config, config.get("transformer_layer_config", {})):
            for key in keys:
                place.pop(key, None)
            place.update({k: v for k, v in values.items() if k in place})

    return edit


WRONG: dict[str, Edit] = {
    "layer ids one too low": other_ids(-1),
    "norms of token and feature exchanged": exchange("input_layernorm", "hidden_norm"),
    "final norm and the layer's exchanged": exchange("midlayer.post_attention_layernorm", "norm"),
    "gate and up exchanged": exchange("gate_proj", "up_proj"),
    "token and feature exchanged": halves,
    "absolute ids in d2t": absolute,
    "another theta": told(rope_parameters={**LLAMA3, "rope_theta": 10000.0}),
    "scaling left out": told(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "another epsilon": told(rms_norm_eps=1e-6),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_the_reader_notices_what_is_wrong(tmp_path: Path, base: BaseLM, head: Eagle3, runtime: str, wrong: str) -> None:
    folder = export(tmp_path / "out", head, base, runtime)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    WRONG[wrong](config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    assert not agrees(of_server(runtime, folder, base), head, base)


def test_a_speculators_folder_that_does_not_say_is_read_otherwise(tmp_path: Path, base: BaseLM, head: Eagle3) -> None:
    """The control of `norm_before_residual`, whose absence is false for the library and true for vLLM."""
    folder = export(tmp_path / "out", head, base, "speculators")
    config = json.loads((folder / "config.json").read_text())
    del config["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(config))
    assert not agrees(of_server("speculators", folder, base), head, base)


@pytest.mark.parametrize(("written", "reader"), [("vllm", "sglang"), ("sglang", "vllm"), ("sglang", "llama_cpp")])
def test_one_servers_folder_is_not_anothers(
    tmp_path: Path, base: BaseLM, head: Eagle3, written: str, reader: str
) -> None:
    """SGLang finds no numbers at vLLM's place, and takes the default ones; vLLM reads SGLang's as its own."""
    folder = export(tmp_path / "out", head, base, written)
    if reader == "vllm":  # gpu_model_runner.py looks in eagle_config second
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **config["eagle_config"]}))
    assert Server(reader, folder).taps != list(head.layers)


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "tensorrt_llm", "llama_cpp"])
def test_config_has_exactly_these_keys(tmp_path: Path, base: BaseLM, head: Eagle3, runtime: str) -> None:
    config = json.loads((export(tmp_path / "out", head, base, runtime) / "config.json").read_text())
    ids = {
        "vllm": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
        "sglang": {"eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 3]}},
        "tensorrt_llm": {},
        "llama_cpp": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
    }
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-3,
        "vocab_size": V,
        "draft_vocab_size": CUT,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3,
        "rope_theta": 500.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        **ids[runtime],
        "base_model_name_or_path": "some/base",
        "torch_dtype": "float32",
    }
    assert artifacts.verify(tmp_path / "out")["kind"] == f"export {runtime} eagle3"


def test_a_speculators_folder_has_exactly_these_keys(tmp_path: Path, base: BaseLM, head: Eagle3) -> None:
    folder = export(tmp_path / "out", head, base, "speculators")
    config = json.loads((folder / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    assert layer["model_type"] == "llama"
    assert (layer["vocab_size"], layer["head_dim"], layer["rope_parameters"]) == (V, 8, LLAMA3)
    assert config == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": CUT,
        "target_hidden_size": D,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
        "norm_before_residual": False,  # vLLM takes it for true where it is missing
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "some/base", "architectures": ["LlamaForCausalLM"]},
        },
        "torch_dtype": "float32",
    }
    assert {k for k in load_file(folder / "model.safetensors") if "layers.0." in k}


@pytest.mark.parametrize("kind", ROPES)
def test_transformers_turns_by_what_is_written(tmp_path: Path, kind: str) -> None:
    """As the installed transformers reads the folder, and as it reads one with the older keys alone."""
    base = base_of(ROPES[kind])
    folder = export(tmp_path / "out", head_of(base), base)
    wanted = torch.tensor(base.spec.rope_frequencies)
    config = json.loads((folder / "config.json").read_text())
    assert torch.allclose(LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq, wanted)
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.allclose(LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq, wanted)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(tmp_path: Path, base: BaseLM, head: Eagle3, runtime: str, dtype: str) -> None:
    """Token ids stay integers."""
    folder = export(tmp_path / "out", head, base, runtime, dtype)
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for k, t in tensors.items() if k not in ("d2t", "t2d")} == {getattr(torch, dtype)}
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


# -------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize(
    ("runtime", "layers", "why"),
    [
        ("vllm", [1, 1, 3], "once"),
        ("speculators", [2, 3, 3], "once"),
        ("sglang", [1, 1, 3], "once"),
        ("sglang", [0, 2, 3], r"SGLang hands out the hidden states 1\.\.4"),
        ("sglang", [1, 2, 5], r"1\.\.4"),
        ("tensorrt_llm", [0, 2, 3], r"1\.\.4"),
        ("llama_cpp", [1, 2, 5], r"0\.\.4"),
    ],
)
def test_layers_that_a_server_has_not_are_refused(
    tmp_path: Path, base: BaseLM, runtime: str, layers: list[int], why: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^exporter={runtime}: .*{why}.*; for mine \(Eagle3\) use exporter="):
        export(tmp_path / "out", head_of(base, layers=layers), base, runtime)
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_exporter_is_one_that_takes_the_head(tmp_path: Path, base: BaseLM) -> None:
    with pytest.raises(ConfigError, match=r"use exporter=llama_cpp, reference, custom_generate or native$"):
        export(tmp_path / "out", head_of(base, layers=[2, 2, 2]), base)


@pytest.mark.parametrize(("family", "runtimes"), [("gemma2", RUNTIMES), ("qwen2", ("llama_cpp", "tensorrt_llm"))])
def test_bases_that_hand_out_no_states_are_refused(
    tmp_path: Path, base: BaseLM, head: Eagle3, family: str, runtimes: tuple[str, ...]
) -> None:
    other = head_of(base)
    other.spec = BaseSpec(**{**vars(base.spec), "family": family})
    for runtime in RUNTIMES:
        if runtime in runtimes:
            with pytest.raises(ConfigError, match=f"not of {family}"):
                export(tmp_path / "out", other, base, runtime)
        else:
            export(tmp_path / "out", other, base, runtime)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_turning_that_servers_compute_each_their_way_is_refused(tmp_path: Path, runtime: str) -> None:
    base = base_of(YARN)
    with pytest.raises(ConfigError, match=r"cannot say how keys of this base turn \(.*yarn"):
        export(tmp_path / "out", head_of(base), base, runtime)


def test_keys_that_turn_otherwise_than_the_base_says_are_refused(tmp_path: Path, base: BaseLM) -> None:
    """The configuration is believed only where it gives the frequencies that the head was trained with."""
    other = head_of(base)
    other.spec = BaseSpec(**{**vars(base.spec), "rope_frequencies": [2 * f for f in base.spec.rope_frequencies]})
    with pytest.raises(ConfigError, match="cannot say how keys"):
        export(tmp_path / "out", other, base)


def test_a_head_on_a_base_without_rotation_turns_plainly() -> None:
    """The head's own attention turns by 10000^(-2i/d) where the base's blocks are not Llama's."""
    spec = BaseSpec("phi3", D, FF, V, L, 4, 2, 8, 64, rope_theta=123.0)
    longrope: Any = type("Base", (), {"model": type("M", (), {"config": type("C", (), {"rope_parameters": YARN})})})
    assert eagle.rope(spec, longrope) == {"rope_type": "default", "rope_theta": 10000.0}


def test_dynamic_scaling_stands_still_in_a_head() -> None:
    """It begins as no scaling at all, and the head keeps that."""
    base = base_of({"rope_type": "dynamic", "rope_theta": 400.0, "factor": 2.0})
    assert eagle.rope(base.spec, base) == {"rope_type": "default", "rope_theta": 400.0}


def test_a_form_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, base: BaseLM, head: Eagle3, mixed_up: Callable[..., None]
) -> None:
    """A table that takes one norm for the other on the way back."""
    mixed_up(eagle.Eagle3, "midlayer.hidden_norm.weight", "norm.weight")
    with pytest.raises(NumericsError, match="does not read back equal"):
        export(tmp_path / "out", head, base)
    assert list(tmp_path.iterdir()) == []
