"""The certificate as a user gets it: evaluate writes it, an export of the same weights takes it along, and what should
not be certified is not."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith import artifacts, certify, config
from draftsmith.base import create
from draftsmith.data import synthetic
from draftsmith.decoding import rules, verify
from draftsmith.decoding.certificate import CertificateConfig
from draftsmith.decoding.referee import DecodingConfig
from draftsmith.errors import NumericsError
from draftsmith.reporting import certificate as report
from draftsmith.roles import Verdict

from .conftest import SHAPE, call
from .test_lossless import PROMPTS, medusa, with_twins

FAST = ["trainer.threads=1", "trainer.epochs=null", "trainer.max_steps=6", "data.length=64", "data.batch_size=2"]
SHORT = ["decoding.max_new_tokens=12", "prompts.synthetic=3", "repeats=1", "threads=1", "baselines=few"]
SMALL = ["certify=true", "certificate.prefixes=2", "certificate.draws=120", "certificate.batch_size=2"]


@pytest.fixture(scope="module")
def folder(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with lively random weights, draft/ half as wide, run/ with a medusa trained a little."""
    folder = tmp_path_factory.mktemp("certificate")
    tokenizer = synthetic.train_tokenizer(list(synthetic.dialogues(40, seed=5)), 400)
    for name, width in (("base", 32), ("draft", 16)):
        (folder / name).mkdir()
        shape = {**SHAPE, "hidden_size": width, "max_position_embeddings": 1024, "initializer_range": 0.3}
        create.save(create.llama(shape, tokenizer, 1), tokenizer, folder / name)
    own = ["head=[medusa]", "data=jsonl", f"data.path={micro / 'rows.jsonl'}", *FAST, "run_dir=run"]
    passed(call("train", "base=hf", f"base.path={folder / 'base'}", *own, cwd=folder))
    return folder


def passed(told: tuple[int, str]) -> str:
    code, output = told
    assert code == 0, output
    return output


def evaluated(folder: Path, *overrides: str) -> tuple[int, str]:
    return call("evaluate", *SHORT, *SMALL, *overrides, cwd=folder)


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / certify.FILE).read_text())


@pytest.fixture(scope="module")
def certified(folder: Path) -> str:
    return passed(evaluated(folder, "run_dir=run"))


def test_it_says_what_was_tested_on_what(folder: Path, certified: str) -> None:
    told = read(folder / "run")
    head = told["heads"]["medusa"]
    assert (told["format"], told["format_version"]) == ("draftsmith-certificate", 1)
    assert (head["certified"], head["reasons"], head["tests"], head["role"]) == (True, [], "passed", "drafter")
    for compared in (*head["greedy"].values(), head["batch"]):
        counts = {"prompts": 3, "tokens": 36, "mismatches": 0, "near_ties": 0, "ok": True, "differences": []}
        assert compared | counts == compared
    assert list(head["greedy"]) == ["autoregressive", "hf_generate"]
    assert list(head["sampling"]) == ["best", "iid", "distinct", "spectr"]
    assert [t["prefix"] for t in head["sampling"]["iid"]["tests"] if t["token"] == 1] == [0, 1]
    assert any(t["cells"] > 1 for t in head["sampling"]["spectr"]["tests"])
    assert told["compared"] | {"prompts": 3, "max_new_tokens": 12, "draws": 120, "alpha": 0.01} == told["compared"]
    assert head["config"]["num_heads"] == 3
    assert head["tree"] | {"kind": "chain", "nodes": 4, "depth": 3} == head["tree"]
    assert told["base"]["path"] == str(folder / "base")
    assert len(told["base"]["weights_sha256"]) == len(head["weights_sha256"]) == 64
    assert told["versions"].keys() >= {"draftsmith", "torch", "transformers", "python"}
    assert told["seeds"] == {"prompts": 1000, "decoding": 0, "draws": 120 * 2 * 5}
    assert "medusa: certified; 36 tokens of 3 prompts" in certified


def test_it_names_no_folder_but_the_bases(folder: Path, certified: str) -> None:
    for name in (certify.FILE, certify.PAGE):
        text = (folder / "run" / name).read_text()
        assert str(folder) not in text.replace(str(folder / "base"), "")


def test_the_page_tells_the_same(folder: Path, certified: str) -> None:
    told, page = read(folder / "run"), (folder / "run" / certify.PAGE).read_text()
    assert page == report.page(told)
    assert "| medusa | **certified** | every test passed |" in page
    assert "| against hf_generate | 3 | 36 | 0 | 0 |" in page
    assert told["heads"]["medusa"]["weights_sha256"] in page
    first = told["heads"]["medusa"]["sampling"]["best"]["tests"][0]
    assert f"{first['two_sample']:.3g} / {first['exact']:.3g}" in page


def test_the_same_command_finds_the_same(folder: Path, certified: str) -> None:
    before = read(folder / "run")
    passed(evaluated(folder, "run_dir=run"))
    after = read(folder / "run")
    assert {**before, "date": 0} == {**after, "date": 0}


@pytest.mark.parametrize("exporter", ["native", "portable", "vllm", "reference", "custom_generate"])
def test_it_travels_with_an_export_of_the_same_weights(exporter: str, folder: Path, certified: str) -> None:
    output = passed(call("export", "run_dir=run", f"exporter={exporter}", f"out={exporter}", cwd=folder))
    assert "medusa: certificate.json travels with it: certified" in output
    facts = artifacts.verify(folder / exporter)
    assert {certify.FILE, certify.PAGE} < facts["files"].keys()
    assert facts["kind"]  # what the exporter said of the folder is still said
    for name in (certify.FILE, certify.PAGE):
        assert (folder / exporter / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_it_does_not_travel_with_other_weights(folder: Path, certified: str) -> None:
    output = passed(call("export", "run_dir=run", "exporter.dtype=bfloat16", "out=rounded", cwd=folder))
    assert "certificate.json is of other weights and is left out" in output
    assert certify.FILE not in artifacts.verify(folder / "rounded")["files"]
    output = passed(call("export", "run_dir=run", "exporter.dtype=float32", "out=same", cwd=folder))
    assert certify.FILE in artifacts.verify(folder / "same")["files"]


def test_a_run_without_one_exports_as_before(folder: Path, certified: str) -> None:
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "exporter=native"]
    assert "certificate" not in passed(call("export", *load, "run_dir=elsewhere", "out=bare", cwd=folder))
    artifacts.verify(folder / "bare")


def test_a_file_that_is_no_certificate_is_refused(folder: Path, certified: str) -> None:
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "exporter=native"]
    (folder / "odd").mkdir()
    artifacts.write_json(folder / "odd" / certify.FILE, {"format": "something"})
    code, output = call("export", *load, "run_dir=odd", "out=odd/out", cwd=folder)
    assert code == 3
    assert "no certificate of this version" in output


# What is not certified


def test_a_gate_is_certified_with_its_drafter(folder: Path, micro: Path) -> None:
    where = ["base=hf", f"base.path={folder / 'base'}", "companion=hf", f"companion.path={folder / 'draft'}"]
    own = ["head=[acceptance]", "data=jsonl", f"data.path={micro / 'rows.jsonl'}", *FAST, "run_dir=gate"]
    passed(call("train", *where, *own, "heads.acceptance.max_depth=3", cwd=folder))
    passed(evaluated(folder, "run_dir=gate", *where[2:], "certificate.draws=60"))
    told = read(folder / "gate")["heads"]["acceptance"]
    assert (told["certified"], told["role"], told["drafter"]["kind"]) == (True, "gate", "draft_model")
    assert "path" not in told["drafter"]
    assert list(told["sampling"]) == ["best", "iid", "distinct", "spectr"]
    code, output = evaluated(folder, "run_dir=run", "gate=oracle")
    assert code == 2
    assert "gate=oracle: knows a greedy text only" in output


def test_lossy_rules_are_not_certified_and_nothing_fails(folder: Path) -> None:
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "run_dir=typical"]
    output = passed(evaluated(folder, *load, "decoding=typical", "decoding.max_new_tokens=12"))
    told = read(folder / "typical")["heads"]["medusa"]
    assert (told["certified"], told["tests"]) == (False, "not run")
    assert told["reasons"][0].startswith("lossy: accept=typical")
    assert "medusa: NOT certified" in output
    page = (folder / "typical" / certify.PAGE).read_text()
    assert "| medusa | **not certified** | lossy" in page
    assert "Nothing: " in page


def test_a_lossy_head_is_not_certified(folder: Path, micro: Path) -> None:
    own = ["head=[kv_prediction]", "data=jsonl", f"data.path={micro / 'rows.jsonl'}", *FAST, "run_dir=primer"]
    passed(call("train", "base=hf", f"base.path={folder / 'base'}", *own, cwd=folder))
    passed(evaluated(folder, "run_dir=primer", "prompt_lengths=[16]"))
    told = read(folder / "primer")["heads"]["kv_prediction"]
    assert (told["certified"], told["tests"], told["reasons"][0][:5]) == (False, "not run", "lossy")
    output = passed(call("export", "run_dir=primer", "exporter=native", "out=primer/out", cwd=folder))
    assert "travels with it: NOT certified, lossy" in output


def test_bfloat16_is_no_proof(folder: Path) -> None:
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "run_dir=half"]
    passed(evaluated(folder, *load, "base.dtype=bfloat16"))
    told = read(folder / "half")["heads"]["medusa"]
    assert told["certified"] is False
    assert told["reasons"][0] == "base.dtype=float32 is the proof; this base is bfloat16"


def test_draws_that_cannot_tell_anything_certify_nothing(folder: Path) -> None:
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "run_dir=sure"]
    output = passed(evaluated(folder, *load, "certificate.temperature=0.001"))
    told = read(folder / "sure")["heads"]["medusa"]
    assert (told["certified"], told["tests"], told["reasons"]) == (False, "passed", [certify.SURE])
    assert "raise certificate.draws or certificate.temperature" in output


def test_a_biased_verifier_fails_the_sampling_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the first draft at every other refusal; greedy texts are right."""
    right, turn = verify.recursive, itertools.count()

    def biased(proposal: Any, *more: Any) -> Verdict:
        verdict = right(proposal, *more)
        return verdict if verdict.accepted or next(turn) % 2 else Verdict(torch.tensor([0, 1]), verdict.bonus)

    monkeypatch.setattr(rules.verify, "recursive", biased)
    load = [f"load=[{folder / 'run/heads/medusa'}]", "base=hf", f"base.path={folder / 'base'}", "run_dir=biased"]
    code, output = evaluated(folder, *load)
    assert code == 4, output
    assert "medusa: not certified: sampling, iid: " in output.splitlines()[-1]
    told = read(folder / "biased")["heads"]["medusa"]
    assert (told["certified"], told["tests"]) == (False, "failed")
    assert all(reason.startswith(("sampling, iid", "sampling, distinct")) for reason in told["reasons"])
    assert not any(t["rejected"] for way in ("best", "spectr") for t in told["sampling"][way]["tests"])
    page = (folder / "biased" / certify.PAGE).read_text()
    assert "**not certified**" in page
    worst = next(t for t in told["sampling"]["iid"]["tests"] if t["rejected"])
    assert f"**{worst['two_sample']:.3g} / {worst['exact']:.3g}**" in page
    assert all(g["ok"] for g in told["greedy"].values())


@pytest.mark.parametrize(("relative", "kind"), [(4e-4, "mismatch"), (5e-6, "near tie")])
def test_accepting_the_second_best_token_fails_the_greedy_part(
    relative: float, kind: str, tiny_base: Any, tmp_path: Path
) -> None:
    """At a gap of a thousandth, by a verifier that is right where it reads one token alone; or up to rounding, but far
    oftener than rounding does."""
    base = with_twins(tiny_base(), relative)
    base.slack = 5 * relative
    settings = CertificateConfig(prefixes=1, draws=50)
    decoding = DecodingConfig(max_new_tokens=20)
    case = certify.Case(base, {"medusa": medusa(base)}, PROMPTS[1:], decoding, None, settings)
    told = certify.write(tmp_path, config.compose("evaluate", ["run_dir=x"]), case)
    with pytest.raises(NumericsError, match=r"medusa: not certified: greedy, against autoregressive: "):
        certify.check(told, tmp_path / certify.FILE)
    proof = told["heads"]["medusa"]["greedy"]["autoregressive"]
    found = proof["differences"]
    assert len(found) == proof["mismatches"] + proof["near_ties"] > 1
    assert {"near tie" if d["near_tie"] else "mismatch" for d in found} == {kind}
    one = found[0]
    assert (one["gap"], one["relative"]) == (
        pytest.approx(one["expected_logit"] - one["emitted_logit"]), pytest.approx(relative, rel=0.3)
    )  # fmt: skip
    assert one["position"] >= len(PROMPTS[1 + one["prompt"]])
    page = (tmp_path / certify.PAGE).read_text()
    row = f"| {kind} | against autoregressive | {one['prompt']} | {one['position']} | {one['expected']} |"
    assert row in page
