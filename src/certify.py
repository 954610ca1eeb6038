"""The certificate of a head: what `draftsmith evaluate certify=true` proves of it, and on what.

certificate.json holds every number and every difference, certificate.md is the page made from it; both travel with an
export of the same weights.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from draftsmith import artifacts, beside, judging, prepare
from draftsmith.contracts import Head, Needs
from draftsmith.decoding import certificate as proof
from draftsmith.decoding.company import BaselinesConfig
from draftsmith.decoding.gates import GateConfig
from draftsmith.decoding.lossless import NEAR_TIE, TOKENS_PER_NEAR_TIE, Compared
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.referee import HF, PLAIN, DecodingConfig, Referee
from draftsmith.errors import DataError, NumericsError
from draftsmith.growth import Shape, Warp
from draftsmith.reporting import certificate as report

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM

FILE, PAGE = "certificate.json", "certificate.md"
FORMAT, FORMAT_VERSION = "draftsmith-certificate", 1
PROVING = ("float32", "float64")  # in which two right forwards choose alike but for near ties
SURE = (
    "sampling: the base is sure of every token that was drawn, which tells nothing; raise certificate.draws or"
    " certificate.temperature"
)
KINDS = {"ByProbability": "eagle2", "DySpec": "dyspec", "Beam": "beam"}  # kind of tree -> its yaml in conf/tree


@dataclasses.dataclass(frozen=True)
class Case:
    """What is to be certified, and how it decodes."""

    base: BaseLM
    heads: Mapping[str, Head]
    prompts: Sequence[Sequence[int]]
    decoding: DecodingConfig
    gate: GateConfig | None
    settings: proof.CertificateConfig

    @property
    def dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    @property
    def warp(self) -> Warp:
        return Warp(self.settings.temperature, self.decoding.top_k, self.decoding.top_p)


def write(run_dir: Path, cfg: DictConfig, case: Case) -> dict[str, Any]:
    """Tests every head and writes certificate.json and its page; returns the former. Heads that fail are said to; see
    `check`."""
    tests = _tested(case)
    told = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "heads": {name: _described(case, name, head, tests) for name, head in case.heads.items()},
        "base": _base(case),
        "compared": {**_compared(case), "p_values": tests["p_values"]},
        **{part: tests[part] for part in (PLAIN, "prefixes")},
        "decoding": dataclasses.asdict(case.decoding),
        "gate": None if case.gate is None else dataclasses.asdict(case.gate),
        "seeds": {"prompts": cfg.prompts.seed, "decoding": case.decoding.seed, "draws": tests["seeds"]},
        **_machine(cfg, case),
    }
    artifacts.write_json(run_dir / FILE, told)
    artifacts.write_bytes(run_dir / PAGE, report.page(told).encode())
    prepare.say(report.lines(told))
    prepare.say(f"-> {run_dir / FILE}, {PAGE}")
    return told


def check(told: Mapping[str, Any], written: Path) -> None:
    """NumericsError if a head's tests failed on a base whose dtype makes them a proof."""
    failed = [name for name, head in told["heads"].items() if head["tests"] == "failed"]
    if failed and told["base"]["dtype"] in PROVING:
        raise NumericsError(
            f"{', '.join(failed)}: not certified: {told['heads'][failed[0]]['reasons'][0]}; see {written}"
        )


def _tested(case: Case) -> dict[str, Any]:
    """Every contender's results, plain decoding's, and what they were found with."""
    contenders = {} if case.decoding.rules.lossy else _contenders(case)
    if not contenders:
        return {"heads": {}, PLAIN: None, "prefixes": [], "seeds": 0, "p_values": 0}
    exact = _exact(case.base)
    limits = case.decoding.max_new_tokens, case.base.eos_ids
    greedy = proof.Greedy(case.base, case.prompts, exact, *limits)
    plain = greedy.texts(None)
    references = {PLAIN: plain, HF: [case.base.generate([list(p)], max_new_tokens=limits[0])[0] for p in case.prompts]}
    told: dict[str, Any] = {PLAIN: {"greedy": {HF: _counted(greedy.compared(None, plain, references[HF]))}}}
    told["heads"] = {name: _greedy(case, greedy, c, references) for name, c in contenders.items()}

    places = proof.prefixes(
        case.prompts,
        plain,
        exact,
        case.warp,
        case.settings,
        max_positions=case.base.spec.max_positions,
        eos_ids=case.base.eos_ids,
    )
    sampling = proof.Sampling(case.base, places, case.warp, case.settings.draws, proof.seeds(case.decoding.seed))
    drawn = {name: sampling.of(c) for name, c in contenders.items()}
    fits = [*sampling.own, *(f for ways in drawn.values() for way in ways.values() for f in way["fits"])]
    verdicts = iter(proof.rejected(fits, case.settings.alpha))

    def judged(some: Sequence[proof.Fit]) -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(fit), "rejected": next(verdicts)} for fit in some]

    told[PLAIN]["sampling"] = judged(sampling.own)
    for name, ways in drawn.items():
        told["heads"][name]["sampling"] = {
            way: {"tree": _tree(r["shape"]), "accepted_drafts_per_step": r["accepted"], "tests": judged(r["fits"])}
            for way, r in ways.items()
        }
    told["prefixes"] = [{"prompt": p.prompt, "tokens": len(p.tokens), "likely": p.likely} for p in places]
    told["p_values"] = sum(1 if fit.two_sample is None else 2 for fit in fits)
    return {**told, "seeds": case.settings.draws * len(places) * (1 + sum(map(len, drawn.values())))}


def _contenders(case: Case) -> dict[str, Contender]:
    """The heads that keep the base's text, as evaluate lets them draft."""
    base, exact = case.base, {n: h for n, h in case.heads.items() if not h.lossy}
    outside: Any = None  # nobody is measured here: the referee only says which tree a head fills
    referee = Referee(base, case.decoding, BaselinesConfig(), base.eos_ids, outside, outside)
    return judging.contenders(referee, exact, case.gate) if exact else {}


def _greedy(
    case: Case, greedy: proof.Greedy, contender: Contender, references: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Any]:
    assert contender.shape is not None
    alone, size = greedy.texts(contender), case.settings.batch_size
    against = {who: greedy.compared(contender, alone, texts) for who, texts in references.items()}
    batch = greedy.compared(contender, greedy.texts(contender, size), alone, size)
    return {
        "tree": _tree(contender.shape),
        "greedy": {who: _counted(c) for who, c in against.items()},
        "batch": {"batch_size": size, **_counted(batch)},
    }


def _counted(compared: Compared) -> dict[str, Any]:
    counts = compared.counts
    return {**vars(counts), "ok": counts.ok, "differences": [dataclasses.asdict(d) for d in compared.differences]}


def _described(case: Case, name: str, head: Head, tests: Mapping[str, Any]) -> dict[str, Any]:
    """A head, what was found of it, and whether that certifies it."""
    found = tests["heads"].get(name)
    if found is None:
        why = f"accept={case.decoding.accept}" if case.decoding.rules.lossy else f"{type(head).__name__}, a {head.role}"
        reasons, result = [f"lossy: {why}, may change the text, so there is nothing to certify"], "not run"
    else:
        reasons = _faults(found, tests)
        result = "failed" if reasons else "passed"
        if not any(row["cells"] > 1 for way in found["sampling"].values() for row in way["tests"]):
            reasons.append(SURE)
        if case.dtype not in PROVING:
            reasons = [f"base.dtype=float32 is the proof; this base is {case.dtype}", *reasons]
    who = {k: v for k, v in beside.told(head.beside).items() if k != "path"} if head.role == "gate" else None
    return {
        "certified": not reasons,
        "reasons": reasons,
        "tests": result,
        "role": head.role,
        "kind": type(head).__name__,
        "weights_sha256": artifacts.tensors_sha256(head.state_dict()),
        "config": dataclasses.asdict(head.config),
        **({} if who is None else {"drafter": who}),
        **(found or {}),
    }


def _faults(found: Mapping[str, Any], tests: Mapping[str, Any]) -> list[str]:
    """What speaks against a head, one line each."""
    size = found["batch"]["batch_size"]
    compared = {f"greedy, against {who}": told for who, told in found["greedy"].items()}
    compared[f"greedy, in batches of {size} against one by one"] = found["batch"]
    faults = [
        f"{what}: {told['mismatches']} mismatches, {told['near_ties']} near ties in {told['tokens']} tokens"
        for what, told in compared.items()
        if not told["ok"]
    ]
    drawn = {"without drafts": tests[PLAIN]["sampling"]} | {way: r["tests"] for way, r in found["sampling"].items()}
    for way, rows in drawn.items():
        failing = [row for row in rows if row["rejected"]]
        if failing:
            least = min(p for row in failing for p in (row["two_sample"], row["exact"]) if p is not None)
            faults.append(f"sampling, {way}: {len(failing)} of {len(rows)} counts do not fit, p = {least:.1e}")
    return faults


def _base(case: Case) -> dict[str, Any]:
    spec = case.base.spec
    hashes = ("config_sha256", "tokenizer_sha256", "template_sha256", "adapter_sha256")
    return {
        "path": spec.path,
        "revision": spec.revision,
        "dtype": case.dtype,
        "weights_sha256": case.base.weights_sha256(),
        **{name: getattr(spec, name) for name in hashes},
    }


def _compared(case: Case) -> dict[str, Any]:
    return {
        "prompts": len(case.prompts),
        "prompts_sha256": artifacts.fingerprint([list(p) for p in case.prompts]),
        "max_new_tokens": case.decoding.max_new_tokens,
        "near_tie": NEAR_TIE,
        "tokens_per_near_tie": TOKENS_PER_NEAR_TIE,
        "top_k": case.warp.top_k,
        "top_p": case.warp.top_p,
        **dataclasses.asdict(case.settings),
    }


def _machine(cfg: DictConfig, case: Case) -> dict[str, Any]:
    """Where it was found, without the names of machines and folders; and the command that finds it again."""
    told, device = prepare.provenance(cfg), case.base.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ["run_dir=…", "certify=true"]
    return {
        "versions": told["versions"],
        "git": told["git"],
        "platform": platform.platform(),
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
        "command": ["draftsmith", "evaluate", *map(_without_folders, given)],
    }


def _without_folders(override: str) -> str:
    """Absolute paths end up as their last part: whoever reads this has other folders."""
    key, equals, value = override.partition("=")
    parts = [f"…/{Path(p).name}" if p.startswith("/") else p for p in value.strip("[]").split(",")]
    return key + equals + (f"[{','.join(parts)}]" if value.startswith("[") else ",".join(parts))


def _tree(shape: Shape) -> dict[str, Any]:
    """Everything that makes the tree."""
    kind = KINDS.get(type(shape).__name__, "chain" if shape.nodes == shape.depth + 1 else "static")
    fields = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape)}  # type: ignore[arg-type]
    told = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in fields.items()}
    return {"kind": kind, "nodes": shape.nodes, "depth": shape.depth, **told}


def _exact(base: BaseLM) -> proof.Exact:
    """The base in fp64; its copy is made when first asked."""
    copies: list[BaseLM] = []

    def exact(tokens: Sequence[int], first: int) -> Tensor:
        if not copies:
            copies.append(base.in_float64())
        seen = copies[0].capture(Needs(final=True), torch.tensor([list(tokens)], device=base.device))
        assert seen.final is not None
        with torch.no_grad():
            return copies[0].lm_head(seen.final[:, first:])[0]

    return exact


def travel(run_dir: Path, folder: Path, head: Head, dtype: str | None) -> str | None:
    """Puts the run's certificate into an exported folder, under its manifest, if it is of this head's weights as they
    were exported, in `dtype` (None: as they are); returns what to tell, None where the run has no certificate."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    told = artifacts.read_json(path)
    if not isinstance(told, dict) or (told.get("format"), told.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(f"{path}: no certificate of this version; evaluate certify=true writes one, or remove it")
    tensors = head.state_dict()
    if dtype is not None:
        tensors = {k: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for k, t in tensors.items()}
    exported = artifacts.tensors_sha256(tensors)
    own = next((h for h in told["heads"].values() if h["weights_sha256"] == exported), None)
    if own is None or told["base"]["adapter_sha256"] != head.spec.adapter_sha256:
        return f"{path} is of other weights and is left out; evaluate certify=true makes one of these"
    facts = {k: v for k, v in artifacts.read_json(folder / artifacts.MANIFEST).items() if k != "files"}
    with artifacts.publish(folder, **facts) as temporary:
        # (a drafter inside keeps its own manifest)
        others = lambda where, names: [artifacts.MANIFEST] if Path(where) == folder else []  # noqa: E731
        shutil.copytree(folder, temporary, dirs_exist_ok=True, ignore=others)
        for name in (FILE, PAGE):
            shutil.copy(run_dir / name, temporary)
    return f"{FILE} travels with it: {'certified' if own['certified'] else 'NOT certified, ' + own['reasons'][0]}"
