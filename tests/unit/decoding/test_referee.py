"""The referee's findings: everything evaluation.json promises is there, adds up, and tells what is not the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from draftsmith.contracts import Needs
from draftsmith.decoding import measure
from draftsmith.decoding.breakdown import Label
from draftsmith.decoding.company import BaselinesConfig
from draftsmith.decoding.drafters.layer_skip import LayerSkipConfig
from draftsmith.decoding.drafters.prompt_lookup import PromptLookup, PromptLookupConfig
from draftsmith.decoding.drafters.token_recycling import TokenRecyclingConfig
from draftsmith.decoding.measure import Contender
from draftsmith.decoding.policies.by_probability import ByProbability
from draftsmith.decoding.referee import DecodingConfig, Referee
from draftsmith.decoding.tree import TreeSpec, chain
from draftsmith.drafting import fill
from draftsmith.errors import ConfigError

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [3, 4, 5, 6, 7, 8, 9, 10], [20, 30, 40]]
LABELS = [Label("maths", 1, 0), Label("maths", 2, 0), Label("code", 1, 1), Label("maths", 1, 2)]
NEW = 12
TERMS = {
    "tokens_per_step", "verify_cost", "draft_cost", "overhead", "plain_overhead", "plain_forward_seconds",
    "predicted_speedup",
}  # fmt: skip
GAIN = {"speedup", "predicted_speedup", "terms"}
FIGURES = {
    "tokens_per_step", "tokens_per_step_interval", "accepted_drafts_per_step", "acceptance_by_depth", "steps",
    "tokens_per_second", "speedup", "terms", "time",
}  # fmt: skip


class Copying:
    """Its tokens are those of the base's own text, some one in `wrong` not; where it draws, it is sure of them."""

    gated = runs_base = lossy = False

    def __init__(self, text: Sequence[int], wrong: int, vocabulary: int) -> None:
        self.text, self.wrong, self.vocabulary, self.needs, self.max_depth = text, wrong, vocabulary, Needs(), 8

    def propose(self, base: Any, state: Any) -> Any:
        def after(place: int) -> torch.Tensor:
            token = self.text[place] if place < len(self.text) else 0
            token = (token + ((place + token) % self.wrong == 0)) % self.vocabulary
            return torch.nn.functional.one_hot(torch.tensor([token]), self.vocabulary) * 9.0

        place = len(state.tokens)

        def deeper(level: Any, tokens_C: torch.Tensor) -> Any:
            nonlocal place
            place += 1
            return after(place), torch.zeros(1, 1)

        return fill(state, after(place)[0], torch.zeros(1), deeper)


def copying(base: Any, wrong: int, depth: int = 3) -> Contender:
    return Contender(lambda p, a: Copying([*p, *a], wrong, base.spec.vocab_size), chain(depth))  # type: ignore[arg-type]


def referee(base: Any, rescorer: Any = None, **changes: Any) -> Referee:
    decoding = DecodingConfig(max_new_tokens=NEW, **changes.pop("decoding", {}))
    given: dict[str, Any] = {
        "baselines": BaselinesConfig(token_recycling=TokenRecyclingConfig()),
        "eos_ids": frozenset(),
        "hugging_face": lambda p: base.generate([list(p)], max_new_tokens=NEW)[0],
        "rescore": rescorer(base) if rescorer else None,
        "repeats": 2,
        **changes,
    }
    return Referee(base, decoding, **given)


@pytest.fixture(scope="module")
def own(tiny_base: Any) -> dict[str, Contender]:
    base = tiny_base()
    return {"right": copying(base, 999), "often": copying(base, 3, depth=2)}


@pytest.fixture(scope="module")
def greedy(tiny_base: Any, rescorer: Any, own: dict[str, Contender]) -> dict[str, Any]:
    judge = referee(tiny_base(), rescorer, batch_sizes=(1, 2, 3), batch_prompts=3)
    return judge.evaluate(own, PROMPTS, LABELS)


def test_what_is_told_of_a_head(greedy: dict[str, Any]) -> None:
    for name, depth, nodes in (("right", 3, 4), ("often", 2, 3)):
        head = greedy["heads"][name]
        assert set(head) == FIGURES | {"by_context", "by_source", "by_turn", "tree", "lossless", "by_batch"}
        assert set(head["terms"]) == TERMS
        assert head["tree"] == {"nodes": nodes, "depth": depth}
        assert head["accepted_drafts_per_step"] == pytest.approx(head["tokens_per_step"] - 1)
        tau, product = 1.0, 1.0
        for a in head["acceptance_by_depth"]:
            product *= a
            tau += product
        assert head["tokens_per_step"] == pytest.approx(tau)
        assert head["tokens_per_step_interval"] is None  # four prompts say too little
        plain = greedy["autoregressive"]["tokens_per_second"]
        assert head["speedup"] == pytest.approx(head["tokens_per_second"] / plain)
    assert greedy["heads"]["right"]["tokens_per_step"] == 4
    assert 1 < greedy["heads"]["often"]["tokens_per_step"] < 3


def test_shares_of_time_are_of_all_of_it(greedy: dict[str, Any]) -> None:
    for told in [*greedy["heads"].values(), *greedy["baselines"].values()]:
        assert set(told["time"]) == {"prefill", "draft", "verify", "bookkeeping"}
        assert sum(told["time"].values()) == pytest.approx(1)
        assert min(told["time"].values()) > 0


def test_it_is_broken_down_by_source_turn_and_context(greedy: dict[str, Any]) -> None:
    head = greedy["heads"]["often"]
    assert {k: v["prompts"] for k, v in head["by_source"].items()} == {"maths": 3, "code": 1}
    assert {k: v["prompts"] for k, v in head["by_turn"].items()} == {"1": 3, "2": 1}
    assert list(head["by_context"]) == ["0-63"]
    for kind in ("by_source", "by_turn", "by_context"):
        parts = head[kind].values()
        assert sum(p["steps"] for p in parts) == head["steps"]
        assert sum(p["steps"] * p["tokens_per_step"] for p in parts) == pytest.approx(
            head["steps"] * head["tokens_per_step"]
        )
    assert head["by_source"]["code"]["interval"] is None


def test_nothing_is_told_by_labels_that_nobody_gave(tiny_base: Any, rescorer: Any, own: dict[str, Contender]) -> None:
    head = referee(tiny_base(), rescorer, repeats=1).evaluate(own, PROMPTS[:2])["heads"]["right"]
    assert "by_source" not in head
    assert "by_turn" not in head
    assert head["by_batch"] == {}
    assert set(head["by_context"]) == {"0-63"}


def test_batches_are_of_real_prompts_that_differ(
    tiny_base: Any, own: dict[str, Contender], greedy: dict[str, Any]
) -> None:
    """Rows of different lengths that accept differently: what each says and keeps is what it would alone."""
    base, some = tiny_base(), PROMPTS[:3]
    how: dict[str, Any] = {"max_new_tokens": NEW, "eos_ids": frozenset(), "repeats": 1}
    alone = measure.measure(base, some, own, {}, **how)
    for name in own:
        assert set(greedy["heads"][name]["by_batch"]) == {"2", "3"}  # 1 is the rest of what is told
        for told in greedy["heads"][name]["by_batch"].values():
            assert set(told) == GAIN | {"tokens_per_step", "prompts", "same_text_as_alone"}
            assert told["tokens_per_step"] == alone[name].stats.tokens_per_step
            assert (told["prompts"], told["same_text_as_alone"]) == (3, 3)
            assert told["predicted_speedup"] == told["terms"]["predicted_speedup"] > 0
            assert told["speedup"] > 0
    assert len({s.tokens_per_step for s in alone["often"].each}) > 1


def test_a_text_that_changes_in_a_batch_is_counted(
    tiny_base: Any, own: dict[str, Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = measure.measure

    def spoilt(*given: Any, batch_size: int = 1, **how: Any) -> Any:
        found = inner(*given, batch_size=batch_size, **how)
        if batch_size == 2:
            found["often"].tokens[1] = [0]
        return found

    monkeypatch.setattr(measure, "measure", spoilt)
    judge = referee(tiny_base(), repeats=1, batch_sizes=(2,), baselines=BaselinesConfig(None), decoding=SAMPLED)
    told = {name: head["by_batch"]["2"] for name, head in judge.evaluate(own, PROMPTS[:3])["heads"].items()}
    assert {name: (t["prompts"], t["same_text_as_alone"]) for name, t in told.items()} == {
        "right": (3, 3),
        "often": (3, 2),
    }


def test_proofs_of_heads_baselines_and_of_plain_decoding(greedy: dict[str, Any]) -> None:
    clean = {"prompts": 4, "tokens": 4 * NEW, "mismatches": 0, "near_ties": 0, "ok": True}
    for head in greedy["heads"].values():
        assert head["lossless"] == {**clean, "against": ["autoregressive", "hf_generate"]}
    assert list(greedy["baselines"]) == ["prompt_lookup", "token_recycling", "oracle"]
    for told in greedy["baselines"].values():
        assert set(told) == FIGURES | {"lossless"}
        assert told["lossless"] == {**clean, "against": ["autoregressive"]}
    assert greedy["baselines"]["oracle"]["tokens_per_step"] == 4  # as deep as the deepest head
    assert greedy["hf_generate"]["lossless"] == {**clean, "against": ["hf_generate"]}
    assert greedy["hf_generate"]["tokens_per_second"] > 0
    assert greedy["autoregressive"]["tokens"] == 4 * NEW
    assert 0 < greedy["autoregressive"]["distinct_4"] <= 1


def test_a_text_that_is_not_the_bases_shows(
    tiny_base: Any, rescorer: Any, own: dict[str, Contender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of several comparisons the worst is told."""
    inner = measure.measure

    def spoilt(base: Any, *given: Any, **how: Any) -> Any:
        found, vocabulary = inner(base, *given, **how), base.spec.vocab_size
        for name, places in (("often", (2, 7)), ("prompt_lookup", (5,)), ("hf_generate", (NEW - 1,))):
            for place in places:
                found[name].tokens[1][place] = (found[name].tokens[1][place] + 1) % vocabulary
        return found

    monkeypatch.setattr(measure, "measure", spoilt)
    told = referee(tiny_base(), rescorer, repeats=1).evaluate(own, PROMPTS[:2])
    counts = {
        name: (e["lossless"]["mismatches"], e["lossless"]["near_ties"], e["lossless"]["ok"])
        for name, e in [*told["heads"].items(), *told["baselines"].items(), ("hf_generate", told["hf_generate"])]
    }
    assert counts == {
        "right": (0, 1, True),  # Hugging Face said another token than the base's best: no fault of ours
        "often": (1, 1, False),  # after the first difference it was decoded anew, so the second is gone
        "prompt_lookup": (1, 0, False),
        "token_recycling": (0, 0, True),
        "oracle": (0, 0, True),
        "hf_generate": (0, 1, True),
    }


def test_what_was_chosen_for_a_baseline_is_told_with_it(
    tiny_base: Any, rescorer: Any, own: dict[str, Contender]
) -> None:
    told = BaselinesConfig(None, layer_skip=LayerSkipConfig(skip=[1]))
    found = referee(tiny_base(), rescorer, baselines=told, repeats=1).evaluate(own, PROMPTS[:1])["baselines"]
    assert found["layer_skip"]["skipped_blocks"] == [1]
    assert found["layer_skip"]["selection_seconds"] > 0
    assert set(found) == {"layer_skip", "oracle"}


# Sampled text

SAMPLED = {"temperature": 1.0, "top_k": 8}


def judged(base: Any, own: dict[str, Contender], prompts: Any = PROMPTS, **decoding: Any) -> dict[str, Any]:
    """(There is no token-by-token proof of sampled text, so that nobody rescores.)"""
    told = referee(base, repeats=1, decoding={**SAMPLED, "seed": 3, **decoding}).evaluate(own, prompts)
    assert "hf_generate" not in told
    assert "oracle" not in told["baselines"]
    assert all(head["lossless"] is None for head in told["heads"].values())
    assert not any("lossless" in baseline for baseline in told["baselines"].values())
    return told


@pytest.mark.parametrize("drafts", [None, "best"])
def test_sampled_text_with_chosen_drafts_is_plain_decodings(
    tiny_base: Any, own: dict[str, Contender], drafts: str | None
) -> None:
    told = judged(tiny_base(), own, drafts=drafts)
    everybody = [*told["heads"].values(), *told["baselines"].values()]
    assert {(e["same_text_as_plain"], e["lossy"]) for e in everybody} == {(len(PROMPTS), False)}
    assert told["heads"]["right"]["tokens_per_step"] > 3  # it was told the sampled text


def test_sampled_text_with_drawn_drafts_is_another_of_the_same_distribution(
    tiny_base: Any, own: dict[str, Contender]
) -> None:
    told = judged(tiny_base(), own, drafts="iid")
    assert told["heads"]["often"]["lossy"] is False
    assert told["heads"]["often"]["same_text_as_plain"] < len(PROMPTS)
    assert told["baselines"]["prompt_lookup"]["same_text_as_plain"] == len(PROMPTS)  # never draws


def test_typical_acceptance_is_marked_lossy(tiny_base: Any, own: dict[str, Contender]) -> None:
    told = judged(tiny_base(), own, accept="typical", epsilon=0.01)
    everybody = [*told["heads"].values(), *told["baselines"].values()]
    assert {e["lossy"] for e in everybody} == {True}
    assert min(e["same_text_as_plain"] for e in everybody) < len(PROMPTS)


def test_the_seed_is_the_texts(tiny_base: Any, own: dict[str, Contender], monkeypatch: pytest.MonkeyPatch) -> None:
    texts, inner = [], measure.measure

    def kept(*given: Any, **how: Any) -> Any:
        found = inner(*given, **how)
        texts.append(found["autoregressive"].tokens)
        return found

    monkeypatch.setattr(measure, "measure", kept)
    for seed in (3, 3, 4):
        judged(tiny_base(), {"right": own["right"]}, PROMPTS[:1], seed=seed)
    assert texts[0] == texts[1] != texts[2]


# Trees and settings


def test_a_contender_has_the_tree_that_was_asked_for(tiny_base: Any) -> None:
    drafter, tuned = PromptLookup(PromptLookupConfig(depth=5)), TreeSpec("eagle2", nodes=9)

    def shape(decoding: dict[str, Any], depth: int | None = None, tuned: TreeSpec | None = tuned) -> Any:
        return referee(tiny_base(), decoding=decoding).contender(drafter, depth, tuned=tuned).shape

    assert shape({}) == ByProbability(9, 5)  # nobody asked: what was found best
    assert shape({}, 2) == ByProbability(9, 2)
    assert (shape({}, tuned=None).depth, shape({}, 3, None).depth, shape({}, 8, None).depth) == (5, 3, 5)
    assert shape({"depth": 2}).nodes == 3
    assert shape({"paths": [[0], [1]]}).nodes == 3
    assert shape({"tree": TreeSpec("chain")}).nodes == 6
    contender = referee(tiny_base()).contender(drafter, gate="gate")  # type: ignore[arg-type]
    assert contender.gate == "gate"
    assert contender.make([1], [2]) is drafter


def test_how_everything_is_measured(tiny_base: Any) -> None:
    decoding = {"temperature": 0.5, "top_p": 0.9, "drafts": "iid", "accept": "spectr", "seed": 4}
    how = referee(tiny_base(), decoding=decoding, eos_ids=frozenset({7})).how
    rules = how.pop("rules")
    assert how == {"max_new_tokens": NEW, "eos_ids": {7}, "repeats": 2, "seed": 4}
    assert (rules.warp.temperature, rules.warp.top_p, rules.drafts, rules.accept) == (0.5, 0.9, "iid", "spectr")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: give at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0: give 0"),
        ({"drafts": "some"}, "drafts='some': choose best"),
        ({"accept": "typical"}, "accept=typical: .*temperature above 0"),
        ({"accept": "spectr", "temperature": 1.0}, "give drafts=iid"),
        ({"depth": 2, "paths": [[0]]}, "set only one"),
        ({"depth": 2, "tree": TreeSpec("eagle2")}, "set only one"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DecodingConfig(**settings)


def test_nobody_to_judge_is_no_mistake(tiny_base: Any, rescorer: Any) -> None:
    """A primer has no contender; the rest is told all the same, an oracle of four drafts with it."""
    told = referee(tiny_base(), rescorer, repeats=1).evaluate({}, PROMPTS[:2])
    assert told["heads"] == {}
    assert told["baselines"]["oracle"]["tokens_per_step"] == 5
