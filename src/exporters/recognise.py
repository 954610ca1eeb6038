"""Of which settings of ours a published head is.

How many heads and layers there are the tensors' names and shapes tell; the config.json beside them tells the rest, and
is held against them and against the base: what contradicts either is refused by name. (FasterDecoding's first Medusa
heads are five under a config.json that says two.) What the user gives goes before what a config.json says.

After the authors' code: Medusa e2a5d20, Hydra 3f39fbd, Kangaroo 4f0949d, EAGLE cb7e084, speculators c05b95b; and the
names of vLLM 0.32 and MLC-LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.contracts import BaseSpec, Head
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters.published import Published, Weights

IDS = "eagle_aux_hidden_state_layer_ids"
LAYER_IDS = {"vllm": 0, "sglang": 1}  # whose convention -> what makes its layer ids ours (contracts.py)

LIKE_BASE = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}


@dataclass
class Reading:
    """A published head beside the base it is to stand on, on the way to `settings`."""

    published: Published
    kind: type[Head]
    spec: BaseSpec
    given: Mapping[str, Any]  # settings that the user gave
    despite: Collection[str] = ()  # keys of its config.json that may differ from the base
    layer_ids: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return self.published.config

    @property
    def weights(self) -> Weights:
        return self.published.weights

    def says(self, *keys: str) -> tuple[str, Any]:
        """The first of these keys that the config.json has, and its value."""
        return next(((key, self.config[key]) for key in keys if self.config.get(key) is not None), (keys[0], None))

    def holds(self, setting: str, value: Any, *keys: str) -> None:
        """A setting that the tensors tell: neither the user nor one of these keys of the config.json says another."""
        if setting in self.given and self.given[setting] != value:
            raise ConfigError(
                f"settings.{setting}={self.given[setting]}: {self.weights.path} holds a head of {setting}={value};"
                " leave it out"
            )
        key, told = self.says(*keys) if keys else ("", None)
        if told is not None and told != value and setting not in self.given:
            raise DataError(
                f"{self.published.file}: {key}={told}, but {self.weights.path.name} holds {value}; if the weights are"
                f" right, say settings.{setting}={value}"
            )
        self.settings[setting] = value

    def refuse(self, key: str, why: str) -> None:
        told = self.config.get(key)
        raise DataError(f"{self.published.file}: {key}={told}: {why}")

    def must_be(self, key: str, value: Any, why: str) -> None:
        """Refuses another value; a key that is not there is taken for this one."""
        if self.config.get(key, value) not in (value, None):
            self.refuse(key, why)

    def as_base(self, key: str, ours: Any, theirs: Any = None) -> None:
        """Refuses what differs from the base, unless the user knows. theirs: what the key says, where not itself."""
        theirs = self.config.get(key) if theirs is None else theirs
        same = theirs is None or theirs == ours
        if isinstance(ours, float) and isinstance(theirs, int | float):
            same = math.isclose(theirs, ours)
        if not same and key not in self.despite:
            raise DataError(
                f"{self.published.file}: {key}={theirs}, the base ({self.spec.path}) has {ours}; give the base it was"
                f" made for, or despite=[{key}] to take it all the same, as a start of training"
            )

    def like_base(self) -> None:
        """Of a head whose blocks are built after the base's."""
        for key, name in LIKE_BASE.items():
            self.as_base(key, getattr(self.spec, name))
        if self.config:
            self.as_base("rms_norm_eps", self.spec.norm_eps, self.config.get("rms_norm_eps", 1e-6))
            self._turns()
        self.must_be("hidden_act", "silu", "our MLP is SiLU's")
        self.must_be("num_hidden_layers", 1, "our head has one layer")

    def _turns(self) -> None:
        """Queries and keys of our head turn as the base's."""
        key = next((k for k in ("rope_parameters", "rope_scaling") if self.config.get(k)), "rope_theta")
        theirs, scale = _frequencies(self.config, self.spec.head_dim), float(self.config.get("rope_scale", 1.0))
        ours = self.spec.rope_frequencies or _frequencies({}, self.spec.head_dim)
        alike = theirs is not None and len(theirs) == len(ours or []) and math.isclose(scale, self.spec.rope_scale)
        if alike and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(theirs or [], ours or [], strict=True)):
            return
        if key not in self.despite:
            told = self.config.get(key, "10000 (there is no such key)")
            raise DataError(
                f"{self.published.file}: {key}={told}: it turns otherwise than its base (rope_theta"
                f" {self.spec.rope_theta:g}), after which our head turns, so that its drafts would be worse; despite="
                f"[{key}] takes it all the same, as a start of training"
            )


def _frequencies(config: Mapping[str, Any], size: int) -> list[float] | None:
    """Radians per position of each pair, by a config.json as transformers reads it; None for a scaling that is not
    known here. rope_frequencies is our own key, where a scaling cannot be told."""
    if config.get("rope_frequencies"):
        return list(config["rope_frequencies"])
    told = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(told.get("rope_theta") or config.get("rope_theta") or 10000.0)
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    kind, factor = told.get("rope_type", told.get("type", "default")), told.get("factor", 1.0)
    low, high, old = (told.get(k) for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    if kind == "default":
        return plain
    if kind == "linear":
        return [f / factor for f in plain]
    if kind != "llama3" or not (low and high and old):
        return None
    turns = [old * f / (2 * math.pi) for f in plain]  # within the context before it was stretched
    smooth = [min(1.0, max(0.0, (t - low) / (high - low))) for t in turns]
    return [f * (s + (1 - s) / factor) for f, s in zip(plain, smooth, strict=True)]


def settings(
    published: Published,
    kind: type[Head],
    spec: BaseSpec,
    given: Mapping[str, Any],
    *,
    despite: Collection[str] = (),
    layer_ids: str | None = None,
) -> dict[str, Any]:
    """The settings that this head has, told by its tensors and its config.json; the tensors then have the names of the
    published layout (reference.py). given: settings of the user. despite: keys of the config.json that may differ from
    the base. layer_ids: whose convention its layer ids follow, vllm or sglang."""
    if layer_ids is not None and layer_ids not in LAYER_IDS:
        raise ConfigError(f"layer_ids='{layer_ids}': choose {' or '.join(LAYER_IDS)}")
    reading = Reading(published, kind, spec, given, despite, layer_ids)
    if reader := READERS.get(kind.__name__):
        reader(reading)
    return reading.settings


def _medusa(reading: Reading) -> None:
    """Residual blocks and an lm_head per head, or none (the authors' `version` 2): then the base's ends every head."""
    weights = reading.weights
    prefix = r"(?:medusa_heads?\.)?"
    blocks = (rf"{prefix}blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"\1.\2.linear.\3")
    weights.rename(blocks, (prefix + r"((?:lm_heads\.)?\d+\..*)", r"\1"))
    layers = len(weights.numbers(r"\d+\.(\d+)\.linear\."))
    ends = ((r"lm_heads\.0\.weight", "lm_head.weight"),) if reading.config.get("original_lm_head") else ()
    weights.rename(*ends, (r"lm_heads\.(\d+)\.weight", rf"\1.{layers}.weight"))
    heads = weights.numbers(r"(\d+)\.\d+\.linear\.")
    if not heads:
        raise DataError(f"{weights.path}: no residual block of a Medusa head in it (0.0.linear.weight); is it one?")
    reading.holds("num_heads", len(heads), "medusa_num_heads", "num_heads")
    reading.holds("num_layers", layers, "medusa_num_layers", "num_hidden_layers")
    shared = not any(f"{k}.{layers}.weight" in weights for k in heads)
    version = {"1": False, "2": True}.get(str(reading.config.get("version")))
    if version is not None and version != shared and "share_lm_head" not in reading.given:
        have = "have none of their own" if shared else "have their own"
        told = f"whose heads end in {'the base' if version else 'their own'} lm_head, but these {have}"
        reading.refuse("version", f"{told}; if the weights are right, say settings.share_lm_head={str(shared).lower()}")
    reading.holds("share_lm_head", shared)
    for key, ours in (("hidden_size", reading.spec.hidden_size), ("vocab_size", reading.spec.vocab_size)):
        reading.as_base(key, ours)
    reading.must_be("truncated_vocab_size", reading.spec.vocab_size, "our heads draft from the whole vocabulary")
    reading.must_be("logit_scale", 1.0, "our heads do not scale their logits")
    if not reading.config.get("medusa_fc_bias") and not any(name.endswith("linear.bias") for name in weights):
        for k in heads:
            for j in range(layers):
                weights.add(f"{k}.{j}.linear.bias", torch.zeros(reading.spec.hidden_size))


def _hydra(reading: Reading) -> None:
    """hydra_head_arch mlp and prefix-mlp. Of n blocks each, which with a prefix layer lie between dropout modules."""
    weights = reading.weights
    heads = weights.numbers(r"hydra_mlp\.(\d+)\.\d+\.linear\.")
    arch = reading.config.get("hydra_head_arch", "mlp")
    if arch not in ("mlp", "prefix-mlp"):
        reading.refuse("hydra_head_arch", "ours are mlp and prefix-mlp; this one cannot be read")
    if not heads:
        raise DataError(f"{weights.path}: no block of a Hydra head in it (hydra_mlp.0.0.linear.weight); is it one?")
    ungrounded = (
        "its heads do not hear the tokens drafted before them, as Hydra's do; with Medusa's names it is a medusa"
    )
    reading.must_be("grounded_heads", True, ungrounded)
    if not any(".res_connection." in name for name in weights):
        raise DataError(f"{weights.path}: no res_connection in it: {ungrounded}")
    reading.must_be("hidden_state_offset", 0, "ours reads the newest position's state")
    prefix = any(name.startswith("prefix_embeding_layer.") for name in weights)
    if "hydra_head_arch" in reading.config and prefix != (arch == "prefix-mlp"):
        reading.refuse(
            "hydra_head_arch", f"but there is {'a' if prefix else 'no'} prefix_embeding_layer in the weights"
        )
    reading.holds("prefix_layer", prefix)
    reading.holds("num_heads", len(heads), "hydra_num_heads")
    reading.holds("num_layers", len(weights.numbers(r"hydra_mlp\.\d+\.(\d+)\.linear\.")), "hydra_num_layers")


def _kangaroo(reading: Reading) -> None:
    """A Llama of one layer without MLP; their config.json does not say after which layer of the base it stands."""
    reading.weights.rename((r"model\.(.*)", r"\1"))
    reading.like_base()
    if "exit_layer" in reading.given:
        return
    if reading.config.get("exit_layer") is None:
        raise ConfigError(
            f"settings.exit_layer: {reading.weights.path} does not say after how many of the base's"
            f" {reading.spec.num_layers} layers the adapter stands; give it (the authors: 2 of 32, 3 of 40)"
        )
    reading.settings["exit_layer"] = int(reading.config["exit_layer"])


def _eagle3(reading: Reading) -> None:
    """The authors' names or vLLM's (layers.0 for midlayer), or a folder of the speculators library."""
    weights, spec = reading.weights, reading.spec
    config = reading.published.config
    reading.must_be("speculators_model_type", "eagle3", "this library's kinds but eagle3 are other heads")
    residual = "norm_before_residual"
    if "speculators_model_type" in config and residual not in {*config, *reading.despite}:
        reading.refuse(residual, f"vLLM takes true where the library takes false; despite=[{residual}] takes false")
    nested = config.get("eagle_config") or {}
    if IDS in nested and IDS not in config and reading.layer_ids is None:
        reading.refuse(f"eagle_config.{IDS}", "SGLang reads it there, vLLM too: say layer_ids=sglang or layer_ids=vllm")
    config = {**(config.get("transformer_layer_config") or {}), **config, **nested}
    reading.published.config = config
    weights.rename((r"(?:model\.)?layers\.0\.(.*)", r"midlayer.\1"), (r"model\.(.*)", r"\1"))
    for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "mlp_bias"):
        reading.must_be(key, False, "our EAGLE-3 is the paper's, which has no such thing")
    reading.must_be("num_aux_hidden_states", 3, "ours reads three hidden states")
    if any(".q_norm." in name for name in weights):
        reading.refuse("model_type", "its attention norms queries and keys, ours does not")
    reading.like_base()
    reading.as_base("target_hidden_size", spec.hidden_size)
    if "lm_head.weight" not in weights:
        raise DataError(f"{weights.path}: no lm_head.weight in it; an EAGLE-3 head has its own")
    _draft_vocabulary(reading, weights.shapes["lm_head.weight"][0])
    _taps(reading)


def _draft_vocabulary(reading: Reading, size: int) -> None:
    """d2t and t2d, made where they follow from each other, and held against each other and the base."""
    weights, whole = reading.weights, reading.spec.vocab_size
    reading.holds("draft_vocab_size", size, "draft_vocab_size")
    if "d2t" not in weights:
        if size != whole:
            raise DataError(f"{weights.path}: no d2t in it, which tells its {size} draft tokens' ids of the base")
        weights.add("d2t", torch.zeros(size, dtype=torch.long))
    ids = torch.arange(len(weights["d2t"])) + weights["d2t"].long()
    if not (len(ids) == len(ids.unique()) == size and int(ids.min()) >= 0 and int(ids.max()) < whole):
        raise DataError(f"{weights.path}: d2t does not map {size} draft tokens to as many of the base's {whole}")
    told = torch.zeros(whole, dtype=torch.bool).index_fill(0, ids, True)
    if "t2d" not in weights:
        weights.add("t2d", told)
    elif not torch.equal(weights["t2d"].bool(), told):
        raise DataError(
            f"{weights.path}: d2t and t2d tell of other tokens; d2t is to hold the base's id less the draft's"
        )


def _taps(reading: Reading) -> None:
    """Which of the base's hidden states it reads: vLLM's id is the state that enters a layer, and so is ours; SGLang's
    is the one that leaves it. Without ids both take 2, L/2 and L-3."""
    key, depth = IDS, reading.spec.num_layers
    if "layers" in reading.given:
        return
    with torch.device("meta"):
        plain: Any = reading.kind(reading.kind.Config(draft_vocab_size=1), reading.spec)
    usual = list(plain.layers)
    told = reading.config.get(key)
    if told and not (isinstance(told, list) and all(type(i) is int for i in told)):
        reading.refuse(key, "these are no numbers of layers")
    layers = [i + LAYER_IDS[reading.layer_ids or "vllm"] for i in told] if told else [2, depth // 2, depth - 3]
    if layers == usual:
        return
    if len(layers) != 3 or layers != sorted(layers) or not 0 <= layers[0] <= layers[-1] <= depth:
        where = f"that is {layers} of a base of {depth} layers"
        reading.refuse(key, f"{where}; give three, low to high, as settings.layers=[…]")
    reading.settings["layers"] = layers


def _numbered(pattern: str, setting: str) -> Callable[[Reading], None]:
    """A head of which the tensors tell one number."""
    return lambda reading: reading.holds(setting, len(reading.weights.numbers(pattern)))


def _clover2(reading: Reading) -> None:
    """Its depths share all tensors: the config.json alone knows how many there are."""
    _numbered(r"layers\.(\d+)\.", "num_layers")(reading)
    told = reading.config.get("clover") or {}
    names = {"num_heads": "num_heads", "decay": "decay_coefficient"}
    reading.settings |= {ours: told[theirs] for ours, theirs in names.items() if theirs in told}


def _acceptance(reading: Reading) -> None:
    """Its width is that of whoever drafts."""
    _numbered(r"model\.(\d+)\.linear\.", "num_layers")(reading)
    if shape := reading.weights.shapes.get("model.0.linear.weight"):
        reading.holds("hidden_size", shape[-1], "hidden_size")


READERS: dict[str, Callable[[Reading], None]] = {
    "Medusa": _medusa,
    "Medusa2": _medusa,
    "Hydra": _hydra,
    "Kangaroo": _kangaroo,
    "Eagle3": _eagle3,
    "Clover": _numbered(r"clover_head_mlp\.(\d+)\.", "num_heads"),
    "Clover2": _clover2,
    "Acceptance": _acceptance,
}
