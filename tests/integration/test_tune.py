"""draftsmith tune on a drafter: a tree is chosen, measured, stored with it, and used by whoever decodes with it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from draftsmith import generate, load_base, load_head, tuning
from draftsmith.asking import Asked
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError

from .conftest import call

SHORT = ["decoding.max_new_tokens=10", "prompts.synthetic=4", "prompts.text=0", "repeats=1", "threads=1"]
SMALL = ["sizes=[3,6]", *SHORT]


@pytest.fixture(scope="module")
def run_dir(micro: Path, training: list[str]) -> Path:
    """A run of a drafter that drafts all at once, and of one that goes level by level."""
    heads = ["head=[medusa,hydra]", "heads.hydra.num_heads=2", "trainer.max_steps=3"]
    code, output = call("train", *training, *heads, f"run_dir={micro / 'tuned'}", cwd=micro)
    assert code == 0, output
    return micro / "tuned"


@pytest.fixture(scope="module")
def tuned(run_dir: Path) -> tuple[Path, str]:
    code, output = call("tune", f"run_dir={run_dir}", *SMALL, cwd=run_dir.parent)
    assert code == 0, output
    return run_dir, output


def said(folder: Path, name: str) -> Any:
    return json.loads((folder / "heads" / name / "config.json").read_text())["tuned"]


def test_it_stores_a_tree_with_what_it_promises_and_what_it_brings(tuned: tuple[Path, str]) -> None:
    for name, depth in (("medusa", 3), ("hydra", 2)):
        found = said(tuned[0], name)
        spec = TreeSpec(**found["tree"])
        shape = spec.shape(depth)
        assert (shape.nodes, shape.depth) == (found["nodes"], found["depth"])
        own = next(row for row in found["table"] if row["name"] == found["name"])
        assert own["speedup"] == found["promised_speedup"]
        for one in (found, found["published"], found["chain"]):  # other prompts, but replayed exactly
            assert one["predicted_tokens_per_step"] == pytest.approx(one["measured_tokens_per_step"])
        assert own["timed_again"]
        assert found["measured_speedup"] > 0
        assert found["published"]["measured_speedup"] > 0
        assert found["chain"]["name"] == f"chain {depth}"
        assert (found["chosen_on"], found["measured_on"]) == (2, 2)
        assert len(found["asked"]) >= 4
        assert {"autoregressive", found["name"]} <= {cost["name"] for cost in found["costs"]}
        assert sum(s["share"] for s in found["shares"]) == pytest.approx(found["promised_tokens_per_step"] - 1)
        card = (tuned[0] / "heads" / name / "README.md").read_text()
        assert "by draftsmith tune at temperature 0" in card
        assert f"{found['nodes']} nodes" in card


def test_it_tells_and_draws_what_it_found(tuned: tuple[Path, str]) -> None:
    run_dir, output = tuned
    assert output.count("trees tried on 2 prompts, the best measured on 2 others") == 2
    assert "predicted" in output
    assert "%" in output
    for name in ("medusa", "hydra"):
        told = (run_dir / f"tree_{name}.md").read_text()
        assert all(f"| {row['name']}" in told for row in said(run_dir, name)["table"])
        assert "<svg" in (run_dir / f"tree_{name}.svg").read_text()
        assert (run_dir / f"tree_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_whoever_decodes_with_the_head_uses_its_tree(tuned: tuple[Path, str], micro: Path, tmp_path: Path) -> None:
    """evaluate and the API; tree=chain is the head as it was."""
    run_dir = shutil.copytree(tuned[0], tmp_path / "run")
    folder = run_dir / "heads" / "medusa"
    base = load_base(micro / "base")
    head = load_head(folder, base=base)
    head.said["tuned"]["tree"] = {"kind": "static", "paths": [[r] for r in range(9)]}  # another one than any chain
    tuning.store(folder, head, head.said["tuned"], None)
    for given, nodes in (([], 10), (["tree=chain"], 4), (["decoding.depth=2"], 3)):
        code, output = call("evaluate", f"run_dir={run_dir}", "baselines=few", *given, *SHORT, cwd=micro)
        assert code == 0, output
        found = json.loads((run_dir / "evaluation.json").read_text())
        assert found["heads"]["medusa"]["tree"]["nodes"] == nodes
        assert found["heads"]["medusa"]["lossless"]["mismatches"] == 0
    own = generate(base, [11, 12, 13], head=load_head(folder, base=base), max_new_tokens=12)
    assert len(own.stats.offered_by_depth) == 1
    assert own.tokens == generate(base, [11, 12, 13], max_new_tokens=12).tokens


def test_what_chose_the_tree_is_not_what_it_is_judged_on(
    tuned: tuple[Path, str], micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from draftsmith import supply
    from draftsmith.data.prompts import user_turns

    asked: list[frozenset[str]] = []
    collect = supply.collect

    def spied(*args: Any) -> Any:
        found = collect(*args)
        asked.append(user_turns(found))
        return found

    monkeypatch.setattr(supply, "collect", spied)
    seed = "prompts.seed=2000"  # that of conf/tune.yaml
    code, output = call("evaluate", f"run_dir={tuned[0]}", "baselines=few", seed, *SHORT, cwd=micro)
    assert code == 0, output
    assert asked
    assert not asked[-1] & set(said(tuned[0], "medusa")["asked"])


def test_a_sampled_text_a_depth_and_folders_alone(run_dir: Path, micro: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run_dir / "heads" / "hydra", tmp_path / "own")
    where = [f"load=[{own}]", "base=hf", f"base.path={micro / 'base'}", f"run_dir={tmp_path / 'out'}"]
    code, output = call("tune", *where, "decoding.temperature=0.8", "decoding.depth=1", *SMALL, cwd=micro)
    assert code == 0, output
    found = json.loads((own / "config.json").read_text())["tuned"]
    assert (found["temperature"], found["depth"]) == (0.8, 1)
    assert max(row["depth"] for row in found["table"]) == 1
    assert (tmp_path / "out" / "tree_own.md").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["decoding.paths=[[0]]"], "tune chooses the tree"),
        (["tree=eagle2"], "tune chooses the tree"),
        (["decoding.drafts=iid", "decoding.temperature=1"], "drafts=iid"),
        (["decoding.accept=typical", "decoding.temperature=1"], "accept=typical"),
        (["sizes=[1]"], "sizes=[1]"),
        (["sizes=[]"], "sizes=[]"),
        (["repeats=0"], "repeats=0"),
        (["prompts.synthetic=1"], "prompts: 1 question"),
    ],
)
def test_what_cannot_be_tuned_is_refused(given: list[str], told: str, run_dir: Path, micro: Path) -> None:
    before = (run_dir / "heads" / "medusa" / "config.json").read_bytes()
    code, output = call("tune", f"run_dir={run_dir}", *SMALL, *given, cwd=micro)
    assert code == 2, output
    assert told in output
    assert (run_dir / "heads" / "medusa" / "config.json").read_bytes() == before


def test_halves_take_from_every_source_and_leave_turns_together() -> None:
    chats = [
        Asked([1], "chats", 1, 0),
        Asked([1, 2], "chats", 2, 0),
        Asked([3], "chats", 2, 1),
        Asked([4], "chats", 1, 2),
    ]
    text = [Asked([20], "text", 1, 3), Asked([21], "text", 1, 4), Asked([22], "text", 1, 5)]
    one, other = tuning.halves([*chats, *text])
    assert [a.ids for a in one] == [[1], [1, 2], [4], [21]]
    assert [a.ids for a in other] == [[3], [20], [22]]
    with pytest.raises(ConfigError, match="1 question"):
        tuning.halves(chats[:2])


def test_the_published_trees_are_those_of_conf_tree() -> None:
    folder = Path(__file__).parents[2] / "conf" / "tree"
    static: dict[str, Any] = {p.stem: OmegaConf.to_container(OmegaConf.load(p)) for p in folder.glob("*.yaml")}
    found = tuning.published()
    assert found.keys() == {name for name, tree in static.items() if tree["kind"] == "static"}
    assert found["mc_sim_7b_63"].paths == static["mc_sim_7b_63"]["paths"]
    assert len(found) >= 5
