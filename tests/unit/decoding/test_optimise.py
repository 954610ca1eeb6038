"""The tree optimiser: what is replayed is what decoding does; counts grow trees; costs survive a busy machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from draftsmith import config
from draftsmith.decoding import optimise, tree
from draftsmith.decoding.engine import decode, generate
from draftsmith.decoding.optimise import Candidate, Cost, Optimiser, costs_of, grown, smallest_of_the_best
from draftsmith.decoding.probing import Counts, Position, Probing, TrueRanks, kept_by, probed, replayed
from draftsmith.decoding.rules import Rules
from draftsmith.decoding.stats import Stats
from draftsmith.decoding.tree import TreeSpec
from draftsmith.errors import ConfigError
from draftsmith.growth import Warp
from draftsmith.heads.kangaroo import Kangaroo, KangarooConfig
from draftsmith.training.fit import new_head

PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12, 13, 11, 12, 13, 11, 12]]
VOCAB = 20  # so few that even an untrained head's ten best tokens often hold the true one
DEPTH = 3
HOW: dict[str, Any] = {"max_new_tokens": 20, "eos_ids": frozenset(), "rules": Rules(), "seed": 5}
SAMPLED: dict[str, Any] = {**HOW, "rules": Rules(Warp(0.7))}
SPECS = {
    "chain 1": TreeSpec("chain", 1),
    "chain 3": TreeSpec("chain", 3),
    "bushy": TreeSpec("static", paths=[[0], [1], [3], [0, 0], [0, 2], [1, 0], [3, 5], [0, 0, 0], [1, 0, 4], [3, 5, 1]]),
    "flat": TreeSpec("static", paths=[[r] for r in range(10)]),
    "eagle2 5": TreeSpec("eagle2", 3, nodes=5),
    "eagle2 14": TreeSpec("eagle2", 3, nodes=14),
    "eagle2 40": TreeSpec("eagle2", 3, nodes=40),
    "eagle2 14, 2 deep": TreeSpec("eagle2", 2, nodes=14),
    "eagle2 40, 1 deep": TreeSpec("eagle2", 1, nodes=40),
}


def drafters() -> dict[str, tuple[Any, Any]]:
    """Of conf/head, three deep or more, in the settings there but for what a small base has not."""
    found = {}
    for path in sorted((Path(__file__).parents[3] / "conf" / "head").glob("*.yaml")):
        node: Any = OmegaConf.to_container(OmegaConf.load(path))
        kind = config.target(node, path.stem)
        if kind.role == "drafter":
            own = {k: VOCAB - 4 if k.endswith("vocab_size") else v for k, v in node.items()}
            found[path.stem] = (kind, config.typed(own, kind.Config, path.stem))
    return found


DRAFTERS = drafters()


@pytest.fixture(scope="module")
def head(tiny_base: Any, noisy: Any) -> Callable[..., tuple[Any, Any]]:
    """(base, head) by the name of a yaml; keys change the base."""

    def of(name: str, **changes: Any) -> tuple[Any, Any]:
        base = tiny_base(vocab_size=VOCAB, **changes)
        kind, own = DRAFTERS[name]
        return base, noisy(new_head(kind, own, name, base, 0), 0.1).eval().requires_grad_(False)

    return of


def decoded(base: Any, head: Any, spec: TreeSpec, how: dict[str, Any]) -> Stats:
    limits = {"shape": spec.shape(DEPTH), **{key: how[key] for key in ("max_new_tokens", "eos_ids", "rules")}}
    found = decode(base, PROMPTS, drafters=head, seeds=[how["seed"]] * len(PROMPTS), **limits)
    return sum((out.stats for out in found), Stats())


def same(counts: Counts, stats: Stats) -> bool:
    by_depth = [*stats.accepted_by_depth, *[0] * DEPTH][:DEPTH]
    return (counts.steps, counts.tokens, counts.by_depth) == (stats.steps, stats.emitted, by_depth)


REPLAYED = [name for name, (kind, _) in DRAFTERS.items() if not hasattr(kind, "stop")]


@pytest.mark.parametrize(
    ("name", "how"), [*((name, HOW) for name in REPLAYED), ("medusa", SAMPLED), ("hydra", SAMPLED)]
)
def test_replaying_is_decoding(name: str, how: dict[str, Any], head: Any) -> None:
    """Every head but Kangaroo, every kind of tree: the same counts, from one look at every position."""
    base, drafter = head(name)
    texts = [probed(base, drafter, p, DEPTH, how, 10, 40) for p in PROMPTS]
    assert [len(text) for text in texts] == [19] * 3
    kept = 0
    for spec in SPECS.values():
        counts, stats = replayed(texts, kept_by(spec, DEPTH), DEPTH), decoded(base, drafter, spec, how)
        assert same(counts, stats), spec
        kept += counts.accepted
    assert kept > 10


def test_an_end_of_text_and_the_last_position_cut_as_in_decoding(head: Any) -> None:
    base, drafter = head("hydra", max_position_embeddings=26)
    plain = generate(base, PROMPTS[1], **HOW)
    assert plain.finish == "positions"
    for how in (HOW, {**HOW, "eos_ids": frozenset(plain.tokens[7:8])}, {**HOW, "max_new_tokens": 1}):
        texts = [probed(base, drafter, p, DEPTH, how, 10, 40) for p in PROMPTS]
        for spec in SPECS.values():
            assert same(replayed(texts, kept_by(spec, DEPTH), DEPTH), decoded(base, drafter, spec, how)), spec


def test_a_drafter_that_is_its_own_gate_is_decoded_since_replaying_would_be_wrong(tiny_base: Any, noisy: Any) -> None:
    base = tiny_base(vocab_size=VOCAB)
    own = KangarooConfig(exit_layer=1, depth=DEPTH, threshold=0.5)
    drafter = noisy(new_head(Kangaroo, own, "kangaroo", base, 0), 0.1).eval()
    texts = [probed(base, drafter, p, DEPTH, HOW, 10, 0) for p in PROMPTS]
    stats = {name: decoded(base, drafter, spec, HOW) for name, spec in SPECS.items()}
    assert not all(same(replayed(texts, kept_by(s, DEPTH), DEPTH), stats[n]) for n, s in SPECS.items() if s.paths)
    optimiser = Optimiser(base, drafter, DEPTH, {**HOW, "repeats": 1}, [4, 8], {})
    assert not optimiser.replayable
    for name in ("chain 3", "bushy", "eagle2 14"):
        counts = optimiser.counts(SPECS[name], texts, PROMPTS)
        assert (counts.steps, counts.tokens) == (stats[name].steps, stats[name].emitted)
        assert counts.by_depth == stats[name].accepted_by_depth
    never = noisy(new_head(Kangaroo, KangarooConfig(1, DEPTH, 0.0), "kangaroo", base, 0), 0.1).eval()
    texts = [probed(base, never, p, DEPTH, HOW, 10, 40) for p in PROMPTS]
    for spec in SPECS.values():
        assert same(replayed(texts, kept_by(spec, DEPTH), DEPTH), decoded(base, never, spec, HOW)), spec


@pytest.mark.parametrize("name", ["medusa", "eagle3", "kangaroo"])
def test_probing_leaves_the_text_as_it_is(name: str, head: Any) -> None:
    base, drafter = head(name)
    plain = generate(base, PROMPTS[1], **HOW).tokens
    probing: Any = Probing(drafter, [*PROMPTS[1], *plain], 2, lambda truth: TrueRanks(truth, 4))
    out = generate(base, PROMPTS[1], drafter=probing, shape=tree.chain(0), **HOW)
    assert out.tokens == plain
    assert len(probing.found) == out.steps == len(plain) - 1


def test_a_tree_grows_by_what_is_kept_most_often() -> None:
    """The classic rule, step by step: of all children of nodes that are there, the one that is kept most often."""
    random = torch.Generator().manual_seed(0)
    ranks = [
        tuple(
            int(r) for r in torch.randint(0, 4, (int(torch.randint(0, 4, (1,), generator=random)),), generator=random)
        )
        for _ in range(300)
    ]
    found = grown(ranks, [2, 5, 9, 30, 1000], 3)
    assert [*found] == [2, 5, 9, 30]
    nodes: set[tuple[int, ...]] = {()}
    for n in range(2, 31):
        edge = [(*path, r) for path in nodes for r in range(4) if (*path, r) not in nodes and len(path) < 3]
        gain = {path: sum(own[: len(path)] == path for own in ranks) for path in edge}
        nodes.add(max(edge, key=lambda path: (gain[path], -len(path), *(-r for r in path))))
        if n in found:
            assert {tuple(path) for path in found[n]} == nodes - {()}
    assert max(map(len, grown(ranks, [30], 2).get(30, [[0]]))) <= 2


def test_replaying_by_hand() -> None:
    """Positions 0, 1, … of one text; a step that keeps a drafts goes on a + 1 positions further."""
    text = [
        Position((0, 1)),
        Position((2,)),
        Position((0, 0, 0), ((2,), (2, 3), (2, 3, 5))),
        Position(()),
        Position((1, 0)),
    ]
    for spec, steps, by_depth in (
        (TreeSpec("chain", 1), 3, [2, 0, 0]),  # roots at 0, 2, 4
        (TreeSpec("chain", 3), 2, [2, 1, 1]),  # 0, 2: past the end
        (TreeSpec("static", paths=[[0], [0, 1]]), 3, [1, 1, 0]),  # 0, 3, 4
        (TreeSpec("eagle2", 3, nodes=4), 3, [1, 1, 0]),  # 0, 1, 2
        (TreeSpec("eagle2", 3, nodes=5), 3, [1, 1, 1]),
        (TreeSpec("eagle2", 1, nodes=5), 4, [1, 0, 0]),
    ):
        counts = replayed([text], kept_by(spec, 3), 3)
        assert (counts.tokens, counts.by_depth) == (6, by_depth)
        assert counts.steps == steps
        assert counts.tokens_per_step == 1 + sum(by_depth) / counts.steps


def call(step: float, steps: int, load: float, prefill: float = 0.5) -> tuple[float, Stats]:
    parts = {"draft_seconds": 0.25, "verify_seconds": 0.5, "other_seconds": 0.25}
    spent = {name: load * step * steps * part for name, part in parts.items()}
    return load * (step * steps + prefill), Stats(steps=steps, prefill_seconds=load * prefill, **spent)


def test_costs_are_what_they_are_on_a_quiet_machine() -> None:
    """Sweeps at very different loads, and a single call that was disturbed."""
    true = {"autoregressive": 1.0, "a": 1.5, "b": 2.0}
    loads = [1.0, 7.0, 1.0, 3.0, 0.9, 1.0, 5.0, 1.1, 1.0]
    sweeps = [{name: call(step, 10, load) for name, step in true.items()} for load in loads]
    sweeps[4]["a"] = call(60.0, 10, 1.0)
    found = costs_of(sweeps)
    for name, step in true.items():
        assert found[name].step == pytest.approx(step, rel=0.12)
        assert found[name].step / found["b"].step == pytest.approx(step / 2)
        assert found[name].draft + found[name].verify + found[name].other == pytest.approx(found[name].step)
        assert found[name].prompt == pytest.approx(0.5, rel=0.12)
    assert Cost(2.0, 0, 0, 0, 1.0).rate(Counts(10, 46, []), 3) == 2.0


def test_noise_does_not_choose() -> None:
    def candidate(name: str, nodes: int) -> Candidate:
        return Candidate(name, TreeSpec("chain", 1), nodes, 1, Counts())

    three = [candidate("large", 64), candidate("small", 4), candidate("middle", 8)]
    assert smallest_of_the_best(three, [100.0, 98.5, 99.0]).name == "small"
    assert smallest_of_the_best(three, [100.0, 97.0, 99.0]).name == "middle"
    assert smallest_of_the_best(three, [100.0, 90.0, 90.0]).name == "large"
    assert smallest_of_the_best([candidate("a", 4), candidate("b", 4)], [99.0, 99.5]).name == "b"


PUBLISHED = {
    "wide": TreeSpec("static", paths=[[r] for r in range(10)] + [[0, 0], [0, 0, 0], [0, 0, 0, 0]]),
    "wide_too": TreeSpec("static", paths=[[r] for r in range(10)] + [[0, 0], [0, 0, 0]]),
}


@pytest.fixture
def optimiser(head: Any) -> Callable[..., Optimiser]:
    def of(name: str, **told: Any) -> Optimiser:
        base, drafter = head(name)
        return Optimiser(base, drafter, DEPTH, {**HOW, "repeats": 1, **told}, [2, 8, 16], PUBLISHED)

    return of


def test_the_candidates(optimiser: Any) -> None:
    one_shot = optimiser("medusa")
    texts = [probed(one_shot.base, one_shot.drafter, p, DEPTH, HOW, 10, 16) for p in PROMPTS]
    found = one_shot.candidates(texts, PROMPTS)
    names = [c.name for c in found]
    assert names[:3] == ["chain 1", "chain 2", "chain 3"]
    assert {"eagle2 8", "eagle2 16", "grown 8", "grown 16", "wide"} <= set(names)
    assert "wide_too" not in names  # the same once it is cut
    assert not [name for name in names if "deep" in name]
    by_name = {c.name: c for c in found}
    assert (by_name["wide"].depth, by_name["wide"].nodes, by_name["wide"].published) == (3, 13, True)
    assert by_name["wide"].spec.paths == optimise.paths_of(PUBLISHED["wide_too"].shape(3))
    for c in found:
        shape = c.spec.shape(DEPTH)
        assert (c.nodes, c.depth) == (shape.nodes, shape.depth)
    level_by_level = optimiser("hydra")
    names = [c.name for c in level_by_level.candidates(texts, PROMPTS)]
    assert "grown 8, 2 deep" in names
    assert "eagle2 8, 1 deep" in names


def test_costs_decide_the_size(optimiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nodes cost nothing a large tree is chosen, where they cost much a small one; and nothing beats plain
    decoding where a step costs ten plain ones."""
    own = optimiser("medusa")
    for step, per_node, least, most in ((1.0, 0.0, 8, 64), (1.0, 0.3, 2, 3), (10.0, 0.0, 8, 64)):

        def told(
            self: Any, candidates: Any, prompts: Any, tokens: int, step: float = step, per: float = per_node
        ) -> Any:
            costs = {c.name: Cost(step + per * c.nodes, 0, 0, 0, 0.0) for c in candidates}
            return {"autoregressive": Cost(1.0, 0, 0, 0, 0.0), **costs}

        monkeypatch.setattr(Optimiser, "costs", told)
        choice = own.choose(PROMPTS)
        assert least <= choice.best.nodes <= most
        best = next(row for row in choice.table if row["name"] == choice.best.name)
        assert best["timed_again"]
        assert best["speedup"] >= 0.98 * max(row["speedup"] for row in choice.table if row["timed_again"])
        assert best["speedup"] > 1 if (step, per_node) == (1.0, 0.0) else best["speedup"] < 1
        assert best["speedup"] == pytest.approx(57 / choice.best.counts.steps / (step + per_node * choice.best.nodes))
        assert choice.chain.name == "chain 3"
        assert choice.published is not None
        assert choice.published.name == "wide"
        assert set(choice.compared) >= {choice.best.name, "wide", "chain 3"}
        assert {row["name"] for row in choice.table if row["timed_again"]} >= set(choice.compared)


def test_it_runs_whole_and_its_shares_add_up(optimiser: Any) -> None:
    for name, drafts in (("medusa", "static"), ("hydra", "eagle2"), ("kangaroo", "chain")):
        own = optimiser(name, max_new_tokens=8)
        choice = own.choose(PROMPTS)
        predicted, measured = own.predicted(choice, PROMPTS[:2]), own.measured(choice, PROMPTS[:2])
        assert set(predicted) == set(measured) == set(choice.compared)
        for tree_name, told in measured.items():
            assert told["tokens_per_step"] == pytest.approx(predicted[tree_name]["tokens_per_step"])
            assert [told["speedup"]] == told["speedups"]
        of_kind = next(row for row in choice.table if row["kind"] == drafts)
        texts = [probed(own.base, own.drafter, p, DEPTH, own.of_text(n), 10, 16) for n, p in enumerate(PROMPTS)]
        candidate = next(c for c in own.candidates(texts, PROMPTS) if c.name == of_kind["name"])
        shares = own.shares(candidate, PROMPTS)
        assert sum(s["share"] for s in shares) == pytest.approx(candidate.counts.tokens_per_step - 1)
        assert ("path" in shares[0]) == (drafts != "eagle2")


def test_a_grown_tree_is_a_tree() -> None:
    ranks = [(0, 0), (1,), (0, 1, 0), (0, 0, 0)]
    for paths in grown(ranks, range(2, 8), 3).values():
        assert optimise.paths_of(tree.from_paths(paths)) == sorted(paths, key=lambda path: (len(path), path))
    with pytest.raises(ConfigError, match="no parent"):
        tree.from_paths([[0, 1]])
