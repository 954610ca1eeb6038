"""Gates and primers as a user makes and uses them: label, train, tune, evaluate, load again in a fresh process."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith import generate, load_base, load_companion, load_head, supply
from draftsmith.base import create, lm
from draftsmith.data import synthetic
from draftsmith.data.prompts import user_turns
from draftsmith.data.rows import Row, write_rows
from draftsmith.errors import ConfigError, DataError

from .conftest import SHAPE, call

BASE = {**SHAPE, "max_position_embeddings": 1024}
SMALL = {**BASE, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4}
SHORTER = {**SMALL, "max_position_embeddings": 48}
FAST = ["trainer.threads=1", "trainer.epochs=null", "trainer.max_steps=6", "data.length=64", "data.batch_size=2"]
SHORT = ["decoding.max_new_tokens=12", "prompts.synthetic=3", "prompts.text=0", "repeats=1", "threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, draft/ with its tokenizer and half its width, other/ with another tokenizer, rows/ of the base's ids."""
    folder = tmp_path_factory.mktemp("roles")
    chats = list(synthetic.dialogues(40, seed=5))
    for name, shape, vocab in (
        ("base", BASE, 400),
        ("draft", SMALL, 400),
        ("short", SHORTER, 400),
        ("other", SMALL, 380),
    ):
        tokenizer = synthetic.train_tokenizer(chats, vocab)
        (folder / name).mkdir()
        create.save(create.llama({**shape, "initializer_range": 0.3}, tokenizer, 1), tokenizer, folder / name)
    random = np.random.default_rng(0)
    lengths = random.integers(30, 60, 12).tolist()
    rows = [Row(f"r{n}", random.integers(10, 300, k), [0] * 6 + [1] * (k - 6)) for n, k in enumerate(lengths)]
    write_rows(folder / "rows", rows, base=dataclasses.asdict(lm.load(str(folder / "base")).spec))
    return folder


def run(folder: Path, verb: str, *overrides: str, companion: str | None = "draft") -> tuple[int, str]:
    around = [] if companion is None else ["companion=hf", f"companion.path={folder / companion}"]
    return call(verb, "base=hf", f"base.path={folder / 'base'}", *around, *overrides, cwd=folder)


def made(told: tuple[int, str]) -> str:
    code, output = told
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def labels(folder: Path) -> Path:
    made(run(folder, "label", "rows=rows", "out=labels"))
    return folder / "labels"


@pytest.fixture(scope="module")
def gate(folder: Path, labels: Path) -> Path:
    """The paper's setting: labels of drawn drafts."""
    own = ["head=[acceptance]", "heads.acceptance.verify=sampling", "heads.acceptance.max_depth=4"]
    made(run(folder, "train", *own, "data=jsonl", f"data.path={labels}", *FAST, "run_dir=gate"))
    return folder / "gate" / "heads" / "acceptance"


@pytest.fixture(scope="module")
def hydra(folder: Path) -> Path:
    own = ["head=[hydra]", "heads.hydra.num_heads=3", "data=jsonl", "data.path=rows"]
    made(run(folder, "train", *own, *FAST, "run_dir=hydra", companion=None))
    return folder / "hydra" / "heads" / "hydra"


@pytest.fixture(scope="module")
def primer(folder: Path) -> Path:
    own = ["head=[kv_prediction]", "heads.kv_prediction.keep=null", "data=jsonl", "data.path=rows", "data.loss_on=all"]
    made(run(folder, "train", *own, *FAST, "run_dir=primer"))
    return folder / "primer" / "heads" / "kv_prediction"


def test_a_gate_beside_a_draft_model_is_tuned_and_judged(folder: Path, gate: Path) -> None:
    thresholds = ["thresholds=[0.2,0.9]", "prompts.seed=7"]
    told = made(run(folder, "tune", f"load=[{gate}]", "run_dir=tuned", *thresholds, *SHORT, companion=None))
    assert told.count("threshold 0.") == 2
    assert "<- chosen" in told
    said = json.loads((gate / "config.json").read_text())
    assert said["head"]["threshold"] == said["tuned"]["threshold"] in (0.2, 0.9)
    assert (said["role"], said["lossy"], said["beside"]["kind"]) == ("gate", False, "draft_model")
    assert "ends drafting early" in (gate / "README.md").read_text()

    made(run(folder, "evaluate", f"load=[{gate}]", "gate=acceptance", "run_dir=judged", *SHORT))
    found = json.loads((folder / "judged" / "evaluation.json").read_text())
    head = found["heads"]["acceptance"]
    assert head["lossless"]["mismatches"] == 0
    assert [*head["gate"]["by_length"]] == ["fixed_1", "fixed_2", "fixed_3", "fixed_4", "gate", "oracle"]
    assert head["gate"]["threshold"] == said["tuned"]["threshold"]
    assert head["gate"]["calibration"]["drafts"] > 0
    assert found["baselines"]["draft_model"]["tokens_per_step"] >= 1
    assert "<svg" in (folder / "judged" / "gates.svg").read_text()


def test_what_a_gate_was_tuned_on_is_not_what_it_is_judged_on(
    folder: Path, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []
    collect = supply.collect

    def spied(*args: Any) -> Any:
        found = collect(*args)
        asked.append(user_turns(found))
        return found

    monkeypatch.setattr(supply, "collect", spied)
    own = shutil.copytree(gate, tmp_path / "own")
    made(run(folder, "tune", f"load=[{own}]", f"run_dir={tmp_path}", "thresholds=[0.5]", "prompts.seed=8", *SHORT))
    made(run(folder, "evaluate", f"load=[{own}]", f"run_dir={tmp_path}", "prompts.seed=8", *SHORT))
    tuned, again, judged = asked
    assert tuned == again
    assert len(judged) >= 3
    assert not judged & tuned


def test_sampled_evaluation_claims_no_token_by_token_proof(folder: Path, gate: Path) -> None:
    made(run(folder, "evaluate", f"load=[{gate}]", "decoding.temperature=1.0", "run_dir=sampled", *SHORT))
    found = json.loads((folder / "sampled" / "evaluation.json").read_text())
    assert (found["heads"]["acceptance"]["lossless"], found["heads"]["acceptance"]["lossy"]) == (None, False)
    assert "oracle" not in found["heads"]["acceptance"]["gate"]["by_length"]
    assert "hf_generate" not in found


def test_a_gate_beside_a_head_learns_on_the_fly(folder: Path, hydra: Path) -> None:
    own = ["head=[acceptance]", f"drafter={hydra}", "data=jsonl", "data.path=rows", *FAST, "run_dir=ongate"]
    made(run(folder, "train", *own, companion=None))
    compared = ["companion=hf", f"companion.path={folder / 'draft'}"]  # only beside it
    made(call("evaluate", "run_dir=ongate", "gate=acceptance", "gate.threshold=0.3", *compared, *SHORT, cwd=folder))
    head = json.loads((folder / "ongate" / "evaluation.json").read_text())["heads"]["acceptance"]
    assert head["lossless"]["mismatches"] == 0
    assert (head["gate"]["threshold"], head["tree"]["depth"]) == (0.3, 3)


@pytest.mark.parametrize("kind", ["fixed", "confidence", "oracle"])
def test_gates_without_weights_go_with_any_drafter_that_asks(kind: str, folder: Path, hydra: Path) -> None:
    where = ["base=hf", f"base.path={folder / 'base'}", f"load=[{hydra}]", f"run_dir={kind}"]
    made(call("evaluate", *where, f"gate={kind}", *SHORT, cwd=folder))
    found = json.loads((folder / kind / "evaluation.json").read_text())
    assert found["heads"]["hydra"]["lossless"]["mismatches"] == 0
    assert found["gate"]["kind"] == kind


def test_a_primer_is_trained_judged_and_marked_lossy(folder: Path, primer: Path) -> None:
    made(call("evaluate", "run_dir=primer", "prompt_lengths=[16,64]", *SHORT, cwd=folder))
    found = json.loads((folder / "primer" / "evaluation.json").read_text())["primers"]
    told = found["primers"]["kv_prediction"]
    assert told["lossy"] is True
    assert 0 <= told["agreement"] <= 1
    assert set(told["by_length"]) == {"16", "64"}
    assert "| kv_prediction | yes |" in (folder / "primer" / "primers.md").read_text()
    assert "Lossy" in (primer / "README.md").read_text()


DECISIONS = """
import json, sys
from draftsmith import generate, load_base, load_head
base = load_base(sys.argv[1])
print(json.dumps([vars(generate(base, [11, 12, 13, 14], head=load_head(p, base=base), max_new_tokens=24))["tokens"]
    + [generate(base, [11, 12, 13, 14], head=load_head(p, base=base), max_new_tokens=24).stats.offered_by_depth]
    for p in sys.argv[2:]]))
"""


def test_a_fresh_process_decides_the_same(folder: Path, gate: Path, primer: Path) -> None:
    import subprocess
    import sys

    base = load_base(folder / "base")
    here: list[Any] = []
    for path in (gate, primer):
        out = generate(base, [11, 12, 13, 14], head=load_head(path, base=base), max_new_tokens=24)
        here.append([*out.tokens, out.stats.offered_by_depth])
    command = [sys.executable, "-c", DECISIONS, str(folder / "base"), str(gate), str(primer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here


def test_an_exported_gate_still_knows_its_drafter(folder: Path, gate: Path) -> None:
    made(call("export", "run_dir=gate", "exporter=native", f"out={folder / 'exported'}", cwd=folder))
    base = load_base(folder / "base")
    one, two = (load_head(p, base=base) for p in (gate, folder / "exported"))
    assert one.said == two.said
    assert type(two.beside) is type(one.beside)


def test_a_draft_model_by_the_api(folder: Path) -> None:
    base = load_base(folder / "base")
    companion = load_companion(folder / "draft", base=base)
    plain = generate(base, [11, 12, 13], max_new_tokens=20)
    assert generate(base, [11, 12, 13], draft=companion, max_new_tokens=20).tokens == plain.tokens
    sampled = generate(base, [11, 12, 13], draft=companion, max_new_tokens=20, temperature=1.0, seed=4)
    assert len(sampled.tokens) == 20
    assert generate(base, [11, 12, 13], draft=base, max_new_tokens=20).tokens_per_step > 4


REFUSED = {
    "tokenizer": (3, "another tokenizer", ["head=[acceptance]", "data.path=rows"], "other"),
    "auxiliary's tokenizer": (3, "another tokenizer", ["head=[kv_prediction]", "data.path=rows"], "other"),
    "nobody beside": (2, "give companion=", ["head=[acceptance]", "data.path=rows"], None),
    "companion for nobody": (2, "companion: none of medusa", ["head=[medusa]", "data.path=rows"], "draft"),
    "drafter for nobody": (2, "drafter: none of", ["head=[medusa]", "data.path=rows", "drafter=hydra"], None),
    "threshold": (
        2,
        "threshold=1.5",
        ["head=[acceptance]", "heads.acceptance.threshold=1.5", "data.path=rows"],
        "draft",
    ),
    "company": (
        2,
        "train them apart",
        ["head=[acceptance,medusa]", "heads.acceptance.verify=sampling", "data.path=labels"],
        "draft",
    ),
    "rows for labels": (
        3,
        "holds no labels",
        ["head=[acceptance]", "heads.acceptance.verify=sampling", "data.path=rows"],
        "draft",
    ),
    "labels for rows": (3, "holds labels, not rows", ["head=[acceptance]", "data.path=labels"], "draft"),
    "labels among sources": (
        3,
        "holds labels, not rows",
        ["head=[kv_prediction]", "heads.kv_prediction.keep=null", "+data.sources={a: {path: labels}}"],
        "draft",
    ),
    "labels to measure": (
        3,
        "holds labels, not rows",
        ["head=[acceptance]", "data.path=rows", "data.validation.path=labels"],
        "draft",
    ),
    "rows to measure labels": (
        3,
        "data.validation.path: rows holds no labels",
        ["head=[acceptance]", "heads.acceptance.verify=sampling", "data.path=labels", "data.validation.path=rows"],
        "draft",
    ),
    "every token of labels": (
        2,
        "data.loss_on=all: labels say",
        ["head=[acceptance]", "heads.acceptance.verify=sampling", "data.path=labels", "data.loss_on=all"],
        "draft",
    ),
    "too long for the companion": (2, "the companion reads at most", ["head=[acceptance]", "data.path=rows"], "short"),
    "labels for a head": (3, "holds labels, not rows", ["head=[medusa]", "data.path=labels"], None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(case: str, folder: Path, labels: Path) -> None:
    code, told, overrides, companion = REFUSED[case]
    name = case.replace(" ", "-").replace("'", "")
    got = run(folder, "train", *overrides, "data=jsonl", *FAST, f"run_dir=refused/{name}", companion=companion)
    assert got[0] == code, got[1]
    assert told in got[1]


def test_labels_of_other_models_are_refused(folder: Path, labels: Path, tmp_path: Path) -> None:
    tokenizer = lm.load(str(folder / "draft")).tokenizer
    (folder / "draft2").mkdir()
    create.save(create.llama({**SMALL, "initializer_range": 0.3}, tokenizer, 9), tokenizer, folder / "draft2")
    own = ["head=[acceptance]", "heads.acceptance.verify=sampling", "data=jsonl", "data.path=labels", *FAST]
    code, output = run(folder, "train", *own, f"run_dir={tmp_path}", companion="draft2")
    assert code == 3
    assert "labels were made with another companion" in output


def test_a_gate_beside_another_drafter_is_refused(folder: Path, gate: Path, hydra: Path, tmp_path: Path) -> None:
    where = ["base=hf", f"base.path={folder / 'base'}", f"load=[{gate}]", f"run_dir={tmp_path}", *SHORT]
    code, output = call("evaluate", *where, f"drafter={hydra}", cwd=folder)
    assert code == 3
    assert "made for the drafter draft_model" in output
    moved = shutil.copytree(gate, tmp_path / "moved")
    (folder / "draft").rename(folder / "elsewhere")
    try:
        code, output = call("evaluate", *where[:2], f"load=[{moved}]", *where[3:], cwd=folder)
    finally:
        (folder / "elsewhere").rename(folder / "draft")
    assert code == 3
    assert "give companion=hf companion.path=" in output


def test_gates_that_do_not_fit_are_refused(folder: Path, gate: Path, hydra: Path, primer: Path) -> None:
    where = ["base=hf", f"base.path={folder / 'base'}", "run_dir=nogate", *SHORT]
    for given, told in (
        ([f"load=[{hydra}]", "gate=acceptance"], "a trained one is wanted"),
        ([f"load=[{gate}]", "gate=confidence"], "is a gate itself"),
        ([f"load=[{gate}]", "gate=acceptance", "gate.threshold=1.0"], "threshold=1.0"),
        ([f"load=[{hydra}]", "gate=confidence", "gate.threshold=null"], "threshold: null"),
        ([f"load=[{hydra}]", "gate=oracle", "decoding.temperature=1"], "knows a greedy text only"),
        ([f"load=[{gate}]", "decoding.paths=[[0],[1]]"], "is judged on chains"),
        ([f"load=[{gate}]", "tree=eagle2"], "is judged on chains"),
        ([f"load=[{primer}]", "gate=fixed"], "nobody drafts here"),
        ([f"load=[{primer}]", "prompt_lengths=[2000]"], "prompt_lengths=[2000]"),
    ):
        code, output = call("evaluate", *where, *given, cwd=folder)
        assert code == 2, output
        assert told in output
    for given, told in (
        ([f"load=[{primer}]"], "nothing to tune"),
        ([f"load=[{gate}]", "decoding.paths=[[0]]"], "chains"),
        ([f"load=[{gate}]", "tree=eagle2"], "chains"),
    ):
        code, output = call("tune", *where, *given, cwd=folder)
        assert code == 2, output
        assert told in output


def test_a_gate_beside_drafters_that_have_none(folder: Path, gate: Path, hydra: Path) -> None:
    where = ["base=hf", f"base.path={folder / 'base'}", f"load=[{gate},{hydra}]", "run_dir=both"]
    made(call("evaluate", *where, "gate=acceptance", *SHORT, cwd=folder))
    found = json.loads((folder / "both" / "evaluation.json").read_text())["heads"]
    assert "gate" in found["acceptance"]
    assert "gate" not in found["hydra"]


def test_a_run_is_judged_from_any_folder_and_runs_nobodys_code(folder: Path, tmp_path: Path) -> None:
    """Paths of a run may be relative to where it was started, and its configuration is only a file."""
    own = ["head=[acceptance]", "data=jsonl", "data.path=rows", *FAST, "run_dir=rel"]
    around = ["base=hf", f"base.path={folder / 'base'}", "companion=hf", "companion.path=draft"]
    made(call("train", *around, *own, cwd=folder))
    told = folder / "rel" / "config.yaml"
    told.write_text(told.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    output = made(call("evaluate", f"run_dir={folder / 'rel'}", *SHORT, cwd=tmp_path))
    assert "trust_remote_code" not in output
    found = json.loads((folder / "rel" / "evaluation.json").read_text())
    assert "draft_model" in found["baselines"]


def test_a_companion_in_bf16_and_quantised_is_found_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'draftsmith[quant]'")
    own = ["head=[acceptance]", "data=jsonl", "data.path=rows", *FAST, f"run_dir={tmp_path / 'run'}"]
    made(run(folder, "train", "companion.dtype=bfloat16", "companion.quantise=int8", *own))
    head = load_head(tmp_path / "run" / "heads" / "acceptance", base=load_base(folder / "base"))
    assert str(head.beside.companion.dtype) == "torch.bfloat16"
    assert head.beside.companion.spec.quantised == "int8"


def test_prompts_of_a_file_that_chose_the_threshold_are_told(folder: Path, gate: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in (3, 4, 5)))
    own = shutil.copytree(gate, tmp_path / "own")
    where = [
        f"load=[{own}]",
        f"run_dir={tmp_path}",
        f"prompts.path={prompts}",
        "decoding.max_new_tokens=8",
        "repeats=1",
    ]
    made(run(folder, "tune", *where, "thresholds=[0.5]"))
    assert "warning: 3 of 3 prompts tuned a threshold or a tree" in made(run(folder, "evaluate", *where))
    prompts.unlink()
    made(run(folder, "evaluate", *where[:2], *SHORT))  # the file is not needed any more


def test_a_draft_model_of_another_tokenizer_is_refused_by_the_api(folder: Path) -> None:
    base, other = load_base(folder / "base"), load_base(folder / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        generate(base, [11, 12], draft=other)


def test_a_draft_model_draws_trees(folder: Path) -> None:
    """Siblings are draws of their own; a tree of the likeliest nodes cannot be drawn."""
    base, draft = load_base(folder / "base"), load_base(folder / "draft")
    how: dict[str, Any] = {"draft": draft, "temperature": 1.0, "max_new_tokens": 20}
    assert len(generate(base, [11, 12], paths=[[0], [1], [0, 0]], **how).tokens) == 20
    assert len(generate(base, [11, 12], tree="dyspec", drafts="distinct", **how).tokens) == 20
    with pytest.raises(ConfigError, match="tree=eagle2 takes the best tokens"):
        generate(base, [11, 12], tree="eagle2", drafts="distinct", **how)
