"""Every drafter of ours behind vLLM's `custom_class` door, from its native folder; measured with vLLM 0.32.

    vllm serve BASE --additional-config '{"draft_head": "run/heads/hydra"}' --speculative-config
      '{"method": "custom_class", "model": "draftsmith.serving.vllm_plugin.HeadProposer", "num_speculative_tokens": 4}'

vLLM runs the base and verifies; `propose` gives each request its chain of drafts, by the head's own `propose`: the same
forward as in training and in our engine. A gate's folder is served with the drafter it was trained for, and its chains
end where it says. Drafts are the head's best tokens; vLLM verifies sampled texts against them by rejection, so its
output is its own with every head.

What a head reads of the base comes with vLLM's step: `final` is what its model returns, other layers are asked for as
EAGLE-3's are (its layer convention is ours). A drafter that runs blocks of the base (Kangaroo) keeps copies of those
blocks and K/V of its own for them, since vLLM's own are paged and its blocks cannot be run alone; it reads token ids
only. A head with attention of its own needs every position of a text once, so it is refused where vLLM leaves some
out (prefix caching); texts read in chunks or read again after a preemption are gone on from wherever vLLM does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from draftsmith import artifacts, config
from draftsmith.base.foot import load_foot, share
from draftsmith.beside import DRAFT_MODEL, told
from draftsmith.contracts import KV, Capture, Head, Needs
from draftsmith.decoding import tree
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import capsule, native
from draftsmith.heads.acceptance import Acceptance
from draftsmith.heads.blocks import Attention
from draftsmith.roles import Drafter, Gate, Proposal, RowsDrafter, State

if TYPE_CHECKING:
    from torch import Tensor

KEY = "draft_head"
STEP = ("scheduler_output", "hidden_states", "aux_hidden_states")
"""What ExecuteModelState has in the versions of vLLM that this file fits."""


@dataclasses.dataclass
class Text:
    """What is known of one request: states that the head has not read yet, `start` being their first position, and
    its K/V. whole: no position that the head wants was missed."""

    pending: list[Capture] = dataclasses.field(default_factory=list)
    start: int = 0
    stop: int = 0
    whole: bool = True
    head_kv: KV | None = None
    kv: KV | None = None

    def read(self, start: int, seen: Capture, count: int, whole: bool) -> None:
        """`count` positions from `start` on; whole: the head wants each position once, in order."""
        if not whole:
            self.pending, self.start, self.stop = [_last(seen)], start + count - 1, start + count
            return
        if start > self.stop or start == 0:  # something was missed, or it begins anew
            self.pending, self.head_kv, self.start, self.stop = [], None, start, start
            self.whole = start == 0
        elif start < self.stop:  # read again: after a preemption
            if start <= self.start:
                self.pending, self.start = [], start
                if self.head_kv is not None:
                    self.head_kv.crop(start)
            else:
                kept = _joined(self.pending)
                self.pending = [kept.each(lambda t: t[:, : start - self.start])]
        if self.whole:
            self.pending.append(seen)
        self.stop = start + count

    def take(self) -> Capture:
        seen, self.pending, self.start = _joined(self.pending), [], self.stop
        return seen


@dataclasses.dataclass(frozen=True)
class Step:
    """What vLLM's step leaves: per request, in the order of its rows, its id, where its positions begin, how many were
    computed and how many of those were drafts."""

    ids: Sequence[str]
    starts: Sequence[int]
    counts: Sequence[int]
    drafted: Sequence[int]
    hidden: Mapping[int, Tensor]
    final: Tensor


class HeadProposer:
    """vLLM's interface of a custom proposer: __init__(vllm_config), load_model(target_model), propose(…)."""

    def __init__(self, vllm_config: Any) -> None:
        self.config = vllm_config
        told_of = vllm_config.additional_config or {}
        if KEY not in told_of:
            raise ConfigError(f"""--additional-config: no {KEY}; give '{{"{KEY}": "the native folder of a head"}}'""")
        self.folder = Path(told_of[KEY])
        self.drafter_folder = told_of.get("drafter")
        parallel = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ConfigError("vLLM: a head is served on one device; use tensor and pipeline parallel size 1")
        if vllm_config.model_config.quantization is not None:
            raise ConfigError(
                f"vLLM: the base is quantised ({vllm_config.model_config.quantization}); a head reads its embedding and"
                " lm_head from the checkpoint in full: serve the base in full precision"
            )
        if torch.device(vllm_config.device_config.device).type == "cpu":
            _mend_sampling()
        self.depth: int = vllm_config.speculative_config.num_speculative_tokens
        self.texts: dict[str, Text] = {}
        self.step: Step | None = None
        _look_into_steps()

    def load_model(self, target_model: Any) -> None:
        """The head, checked against this base, its vocabulary matrices shared with the model that is served."""
        model, gate = self.config.model_config, None
        folder, judge = self._folders()
        self.blocks = _blocks(folder)
        self.base = load_foot(
            model.model,
            self.blocks,
            model.hf_text_config.num_hidden_layers,
            revision=model.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            device=self.config.device_config.device,
            trust_remote_code=model.trust_remote_code,
        )
        embedding = getattr(getattr(target_model, "model", None), "embed_tokens", None)
        served = (getattr(part, "weight", None) for part in (embedding, getattr(target_model, "lm_head", None)))
        share(self.base, *served)
        self.head = head = self._loaded(folder)
        if judge is not None:
            gate = cast(Acceptance, self._loaded(judge))
            if told(head)["sha256"] != gate.said["beside"].get("sha256"):
                raise DataError(f"{judge}: made for another drafter than {folder}; give the one it was trained for")
        self.gate: Gate | None = None if gate is None else gate.gate()
        drafter = cast(Drafter, head)
        if self.depth > drafter.max_depth:
            raise ConfigError(
                f"num_speculative_tokens={self.depth}: {self.folder} drafts at most {drafter.max_depth}; give that"
            )
        self.runs_base = drafter.runs_base
        self.layers = () if self.runs_base else tuple(sorted(drafter.needs.hidden))
        self.whole = not self.runs_base and any(isinstance(m, Attention) for m in head.modules())
        if self.whole and self.config.cache_config.enable_prefix_caching:
            raise ConfigError(
                f"vLLM: {type(head).__name__} attends to every position, and prefix caching leaves out those that"
                " another text has; start with --no-enable-prefix-caching"
            )
        if self.whole and self.config.kv_transfer_config is not None:
            raise ConfigError(
                f"vLLM: {type(head).__name__} attends to every position, and a KV connector brings some that are not"
                " computed here; start without --kv-transfer-config"
            )
        if self.layers and not hasattr(target_model, "set_aux_hidden_state_layers"):
            raise ConfigError(
                f"vLLM: {type(target_model).__name__} hands out no hidden states but the last; {type(head).__name__}"
                f" reads layers {list(self.layers)}"
            )
        self.shape = tree.chain(self.depth).to(self.base.device)

    def _loaded(self, folder: Path) -> Head:
        head = native.load(folder, self.base.spec, device=self.base.device)
        if head.golden is not None:
            capsule.check(head, self.base, head.golden, folder, whole=False)
        return head

    def _folders(self) -> tuple[Path, Path | None]:
        """The drafter's and, where the folder is a gate's, the gate's."""
        described = artifacts.read_json(self.folder / "config.json")
        role = described.get("role") if isinstance(described, dict) else None
        if role == "drafter":
            return self.folder, None
        if role != "gate":
            raise ConfigError(f"{self.folder}: is {f'a {role}' if role else 'no head'}; vLLM serves drafters and gates")
        recorded = described.get("beside") or {}
        inside = self.folder / native.DRAFTER
        folder = Path(self.drafter_folder or (inside if inside.is_dir() else str(recorded.get("path"))))
        if recorded.get("kind") == DRAFT_MODEL or not folder.is_dir():
            raise ConfigError(
                f"{self.folder}: judges the drafts of {recorded.get('kind')} at {recorded.get('path')}; give a head's"
                f""" folder as '{{"{KEY}": …, "drafter": "run/heads/hydra"}}'"""
            )
        return folder, self.folder

    def observe(self, runner: Any, state: Any) -> None:
        """What vLLM's step computed, before it samples. state: its ExecuteModelState."""
        rows, scheduled = runner.input_batch, state.scheduler_output
        ids = list(rows.req_ids)
        self.step = Step(
            ids,
            rows.num_computed_tokens_cpu[: len(ids)].tolist(),
            [scheduled.num_scheduled_tokens[i] for i in ids],
            [len(scheduled.scheduled_spec_decode_tokens.get(i, ())) for i in ids],
            dict(zip(self.layers, state.aux_hidden_states or (), strict=True)),
            state.hidden_states,
        )
        self.texts = {name: text for name, text in self.texts.items() if name in runner.requests}

    def read(self, sampled_token_ids: Sequence[Sequence[int]]) -> Sequence[str]:
        """Takes the observed step's states into its texts; their names, by row."""
        assert self.step is not None, "vLLM did not show its step"
        step, self.step = self.step, None
        at = 0
        rows = zip(step.ids, step.starts, step.counts, step.drafted, sampled_token_ids, strict=True)
        for name, start, count, drafted, new in rows:
            kept = count - drafted + (max(len(new) - 1, 0) if drafted else 0)  # refused drafts are not of the text
            where, at = slice(at, at + kept), at + count
            text = self.texts.setdefault(name, Text())
            if not self.runs_base:
                hidden = {layer: t[where][None] for layer, t in step.hidden.items()}
                # a copy: what is read in a later step lies where vLLM's next one is computed
                seen = Capture(hidden, step.final[where][None]).each(torch.clone)
                text.read(start, seen, kept, self.whole)
        return step.ids

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A chain of drafts per row; none where a text is not read to its end yet, or where vLLM left out positions
        that the head wants. token_ids_cpu [rows, positions] has the new tokens in place, num_tokens_no_spec of each."""
        ids = self.read(sampled_token_ids)
        states: dict[int, State] = {}
        for row, (name, new) in enumerate(zip(ids, sampled_token_ids, strict=True)):
            text, length = self.texts[name], int(num_tokens_no_spec[row])
            seen = self.runs_base or (text.stop == length - 1 and (text.whole or not self.whole))
            if new and seen:
                states[row] = self._state(text, token_ids_cpu[row, :length])
        proposals = self._proposed(list(states.values()))
        drafts: list[list[int]] = [[] for _ in ids]
        for (row, state), proposal in zip(states.items(), proposals, strict=True):
            text = self.texts[ids[row]]
            text.head_kv = state.head_kv
            if text.kv is not None:
                text.kv.crop(int(num_tokens_no_spec[row]) - 1)
            drafts[row] = proposal.tokens_N[1:].tolist()
        return drafts

    def _state(self, text: Text, tokens: Any) -> State:
        """Where one text stands. Heads look at the end of its tokens only, so they get no more than they have not
        read, and the root."""
        root = int(tokens[-1])
        if self.runs_base:
            text.kv = self.base.new_kv() if text.kv is None else text.kv
            unread = torch.as_tensor(tokens[text.kv.length : -1], dtype=torch.long, device=self.base.device)[None]
            wanted = Needs(cast(Drafter, self.head).needs.hidden)
            seen = self.base.capture(wanted, unread, kv=text.kv)
            count = unread.shape[1]
        else:
            count, seen = text.stop - text.start, text.take()
        newest = tokens[-count - 1 :].tolist()
        return State(newest, root, seen, self.shape, kv=text.kv, head_kv=text.head_kv, gate=self.gate)

    def _proposed(self, states: list[State]) -> list[Proposal]:
        drafter: Any = self.head
        if isinstance(drafter, RowsDrafter) and self.gate is None and states:
            return drafter.propose_rows(self.base, states)
        return [drafter.propose(self.base, state) for state in states]


def _last(seen: Capture) -> Capture:
    return seen.each(lambda t: t[:, -1:])


def _joined(parts: Sequence[Capture]) -> Capture:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    hidden = {layer: torch.cat([p.hidden[layer] for p in parts], 1) for layer in parts[0].hidden}
    return Capture(hidden, torch.cat([cast("Tensor", p.final) for p in parts], 1))


def _blocks(folder: Path) -> int:
    """How many of the base's first blocks are wanted: those that the head runs itself; never none, since transformers
    makes no model without blocks."""
    described = artifacts.read_json(folder / "config.json")
    kind = config.target(described["head"], f"{folder}/config.json: head")
    return max(described["needs"]["hidden"]) if kind.runs_base else 1


def _look_into_steps() -> None:
    """vLLM shows a custom proposer token ids only, and nothing at all of a step in which some text is near the last
    position. From here on its runner shows ours what every step computed, and asks its model for the layers that a head
    reads."""
    from vllm.v1.worker import gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    if hasattr(runner, "draftsmith"):
        return
    if not set(STEP) <= set(getattr(gpu_model_runner.ExecuteModelState, "_fields", ())):
        import vllm

        raise ConfigError(f"vLLM {vllm.__version__}: its runner is not one this plugin knows; use 0.32")
    sampling, asking = runner.sample_tokens, runner._setup_eagle3_aux_hidden_state_outputs

    @functools.wraps(sampling)
    def sample(self: Any, *given: Any, **named: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, HeadProposer) or self.execute_model_state is None:
            return sampling(self, *given, **named)
        drafter.observe(self, self.execute_model_state)
        out = sampling(self, *given, **named)
        if drafter.step is not None:  # nobody was asked for drafts
            drafter.read(out.sampled_token_ids)
        return out

    @functools.wraps(asking)
    def ask(self: Any) -> None:
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, HeadProposer):
            return asking(self)
        if drafter.layers:
            self.use_aux_hidden_state_outputs = True
            self.model.set_aux_hidden_state_layers(drafter.layers)
        return None

    runner.sample_tokens, runner._setup_eagle3_aux_hidden_state_outputs = sample, ask
    runner.draftsmith = True


def _mend_sampling() -> None:
    """vLLM 0.32 on a CPU writes each draft's temperature and top_p into a copy that nobody reads, so that with every
    speculative method sampled texts are verified by whatever the memory held; and it dies of top_k in a step that
    verifies nothing. Without this, a sampled text would be of another distribution than the base's."""
    from vllm.v1.sample import rejection_sampler as sampler

    told = torch.tensor([0.5, 2.0])
    try:
        sound = sampler.expand_batch_to_tokens(told, torch.tensor([2, 3], dtype=torch.int32), 3).tolist()
    except (RuntimeError, TypeError):
        sound = []
    if sound == [0.5, 0.5, 2.0]:
        return
    constrained = sampler.apply_sampling_constraints

    def constrain(logits: Tensor, cu_num_draft_tokens: Tensor, sampling_metadata: Any) -> Tensor:
        return constrained(logits, cu_num_draft_tokens, sampling_metadata) if len(logits) else logits

    sampler.expand_batch_to_tokens, sampler.apply_sampling_constraints = expanded, constrain


def expanded(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Each text's value for each of its tokens [num_tokens], `replace_from` becoming `replace_to`; cu_num_tokens: how
    many tokens there are up to each text's end."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    each = torch.repeat_interleave(x, counts, output_size=num_tokens)
    return torch.where(each == replace_from, torch.full_like(each, replace_to), each)
