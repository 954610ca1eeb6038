"""The report of one run and of several: what is in it, what is said where something is missing, and that nothing a run
says is more than text."""

import copy
import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from draftsmith import report as verb
from draftsmith.errors import ConfigError, DataError
from draftsmith.reporting import report_page, report_run, report_training
from draftsmith.reporting.leaderboard import LOOKS

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">'
CANARY = "canary-5f1d9"
TERMS = {"tokens_per_step": 2.5, "verify_cost": 1.2, "draft_cost": 0.5, "overhead": 0.1, "predicted_speedup": 1.4}
HEAD: dict[str, Any] = {
    "parameters": 1234,
    "tokens_per_step": 2.5,
    "tokens_per_step_interval": [2.3, 2.7],
    "accepted_drafts_per_step": 1.5,
    "acceptance_by_depth": [0.9, 0.7],
    "tokens_per_second": 150.0,
    "speedup": 1.5,
    "terms": TERMS,
    "time": {"prefill": 0.1, "draft": 0.3, "verify": 0.5, "bookkeeping": 0.1},
    "by_context": {"0-63": {"steps": 3, "tokens_per_step": 2.8}, "64-127": {"steps": 9, "tokens_per_step": 2.4}},
    "by_source": {"chats": {"prompts": 4, "steps": 12, "tokens_per_step": 2.5, "interval": None}},
    "by_turn": {},
    "by_batch": {"4": {"speedup": 1.2, "predicted_speedup": 1.25, "terms": TERMS, "tokens_per_step": 2.5}},
    "tree": {"nodes": 3, "depth": 2},
    "lossless": {
        "prompts": 4, "tokens": 512, "mismatches": 0, "near_ties": 1, "ok": True, "against": ["autoregressive"]
    },
    "weights_sha256": "ab" * 32,
    "samples": [
        {
            "prompt": "Say hello.",
            "steps": [
                {"accepted": [], "own": "Hello", "rejected": []},
                {"accepted": [" my", " dear"], "own": " friend", "rejected": ["\n"]},
                {"accepted": [], "own": "", "rejected": []},
            ],
        }
    ],
}  # fmt: skip
GATE = {
    "threshold": 0.7,
    "min_depth": 1,
    "by_length": {
        name: {"tokens_per_step": 2.0, "drafts_per_step": 3.0, "tokens_per_second": 100.0, "speedup": 1.25}
        for name in ("fixed_1", "gate", "oracle")
    },
    "best_fixed": "fixed_1",
    "over_best_fixed": 1.1,
    "calibration": {
        "drafts": 10, "accepted": 0.6, "auc": 0.8, "ece": 0.03, "brier": 0.1,
        "curve": [{"count": 10, "predicted": 0.7, "accepted": 0.6}],
    },
}  # fmt: skip
PROVENANCE = {
    "command": ["train.py", "head=[medusa]", f"data.generation.server.urls=[http://me:{CANARY}@host/v1]"],
    "seed": 0,
    "identity": "cd" * 32,
    "git": "0123456789abcdef",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "rows": 90,
    "funnel": {"in": 120, "kept": 100, "validation": 10, "quarantined": {"role": 20}},
    "sha256": {"base": "ef" * 32},
}
EVENTS = [
    {"time": "2026-01-02T03:04:05+00:00", "event": "started", "step": 0, "of": 40, "processes": 1},
    {"time": "2026-01-02T03:05:05+00:00", "event": "started", "step": 20, "of": 40, "processes": 2},
    {"time": "2026-01-02T03:06:05+00:00", "event": "complete", "step": 40, "seconds": {"base": 10.0, "heads": 30.0}},
]


def metrics(steps: int = 4) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * n,
            "train/medusa/loss": 8.0 / n,
            "train/medusa/top1/1": 0.1 * n,
            "train/medusa/tokens_per_step": 1 + 0.1 * n,
            "validation/medusa/loss": 9.0 / n,
            "lr": 1e-3,
            "tokens_per_second": 1000.0,
        }
        for n in range(1, steps + 1)
    ]


def evaluation(**more: Any) -> dict[str, Any]:
    return {
        "base": {"family": "llama", "path": "org/base", "num_layers": 2, "hidden_size": 8, "dtype": "float32"},
        "decoding": {"temperature": 0.0, "max_new_tokens": 64, "repeats": 3, "prompts": {"count": 4, "trained_on": 0}},
        "autoregressive": {"tokens_per_second": 100.0},
        "hf_generate": {"tokens_per_second": 80.0},
        "baselines": {"token_recycling": {"tokens_per_step": 1.2, "tokens_per_second": 90.0, "speedup": 0.9}},
        "heads": {"medusa": {**copy.deepcopy(HEAD), **more}},
    }


def make(folder: Path, **files: Any) -> Path:
    """A run directory with these files; lists become JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        path = folder / {"metrics": "metrics.jsonl", "events": "events.jsonl"}.get(name, f"{name}.json")
        if name == "config":
            path = folder / "config.yaml"
            path.write_text(OmegaConf.to_yaml(OmegaConf.create(value)))
        elif isinstance(value, list):
            path.write_text("".join(json.dumps(line) + "\n" for line in value))
        else:
            path.write_text(json.dumps(value))
    return folder


def whole(folder: Path, **more: Any) -> Path:
    files = {"metrics": metrics(), "events": EVENTS, "evaluation": evaluation(), "provenance": PROVENANCE}
    made = make(folder, **{**files, "config": {"seed": 0, "data": {"loss_on": "assistant"}}, "COMPLETE": {}, **more})
    head = made / "heads" / "medusa"
    head.mkdir(parents=True, exist_ok=True)
    (head / "config.json").write_text(json.dumps({"role": "drafter", "lossy": False, "base": {}, "tuned": {}}))
    (head / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": "12" * 32}}}))
    return made


def told(*folders: Path, out: Path | None = None) -> tuple[str, str]:
    """(html, markdown) that the verb writes for the last of what it writes."""
    cfg = OmegaConf.create({"run_dirs": [str(f) for f in folders], "out": out and str(out)})
    last = verb.run(cfg)[-1]
    return (last / "report.html").read_text(), (last / "report.md").read_text()


class Seen(HTMLParser):
    """Elements, what they would load, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "srcset", "href", "xlink:href", "data", "action", "poster") and not str(value).startswith(
                "#"
            ):
                self.loads.append(f"{tag} {key}={value}")
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_whole_run_has_every_part(tmp_path: Path) -> None:
    html, markdown = told(whole(tmp_path / "run", evaluation=evaluation(gate=GATE)))
    for part in (
        "At a glance", "Acceptance", "Speedup", "Training", "The draft tree", "Gates", "Where the time went", "Data",
        "A sample", "Starts and resumes", "To have it again",
    ):  # fmt: skip
        assert f"<h2>{part}</h2>" in html
        assert f"\n## {part}\n" in markdown
    for text in (html, markdown):
        for figure in ("2.50", "1.50×", "512 tokens of 4 prompts", "0 mismatches, 1 near ties", "lossless", "1,234"):
            assert figure in text
        for figure in ("killed; went on from step 20", "2026-01-02 03:05:05", "12" * 32, "ab" * 32, "0123456789abcdef"):
            assert figure in text
        assert "draftsmith train" in text
        assert "not fit: role" in text
    assert "<svg" not in markdown
    assert "By batch size" in html
    assert html.count('<svg viewBox="0 0 460') >= 9


def test_it_is_one_file_that_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    html, _ = told(whole(tmp_path / "run"))
    seen = Seen(html)
    assert seen.loads == []
    assert seen.handlers == []
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(seen.tags)
    assert not re.search(r"url\(|@import", html)
    assert [tag for tag in re.findall(r"<[^>]*>", html) if "//" in tag] == []
    assert "default-src 'none'" in html
    assert len(html) < 120_000


@pytest.mark.parametrize("where", ["prompt", "own", "config", "command", "folder", "head", "source", "event"])
def test_what_a_run_says_is_text_and_never_markup(where: str, tmp_path: Path) -> None:
    found, provenance, config, events = evaluation(), copy.deepcopy(PROVENANCE), {"seed": 0}, copy.deepcopy(EVENTS)
    sample = found["heads"]["medusa"]["samples"][0]
    if where == "prompt":
        sample["prompt"] = EVIL
    elif where == "own":
        sample["steps"][1] = {"accepted": [EVIL], "own": EVIL, "rejected": [EVIL]}
    elif where == "config":
        config["experiment"] = EVIL  # type: ignore[assignment]
    elif where == "command":
        provenance["command"] = ["train.py", EVIL]
    elif where == "head":
        found["heads"][EVIL] = found["heads"].pop("medusa")
    elif where == "source":
        found["heads"]["medusa"]["by_source"] |= {EVIL: {"prompts": 1, "steps": 1, "tokens_per_step": 1.0}}
    elif where == "event":
        events[0]["time"] = EVIL
    name = "<b>run" if where == "folder" else "run"
    made = whole(tmp_path / name, evaluation=found, provenance=provenance, config=config, events=events)
    html, markdown = told(made)
    seen = Seen(html)
    assert not {"script", "img", "b"} & set(seen.tags)
    assert seen.handlers == []
    assert ("<b>run" if where == "folder" else "<script>") in seen.text or where == "head"
    assert "<script" not in markdown.replace("`" * 3, "") or where in ("config", "command")
    if where in ("config", "command"):  # only as code
        assert "<script" not in re.sub(r"(`{3,})\n.*?\n\1", "", markdown, flags=re.DOTALL)


def test_secrets_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-of-the-environment")
    config = {
        "seed": 0,
        "secret_plan": CANARY,
        "data": {
            "path": f"https://me:{CANARY}@host/rows",
            "generation": {"server": {"urls": [CANARY]}},
            "hf_token": CANARY,
        },
        "base": {"path": "b", "recipe": {"api_key": CANARY, "max_new_tokens": 17}},
    }
    provenance = {**PROVENANCE, "command": [*PROVENANCE["command"], f"x.api_key={CANARY}", f"+hf_token={CANARY}"]}  # type: ignore[misc]
    events = [{**EVENTS[0], "password": CANARY}, *EVENTS[1:]]
    made = whole(tmp_path / "run", config=config, provenance=provenance, events=events)
    found = evaluation()
    found["base"]["path"] = f"https://me:{CANARY}@hub/base"
    make(made, evaluation=found)
    for text in (*told(made), *told(made, whole(tmp_path / "other"), out=tmp_path / "both")):
        assert CANARY not in text
    html, _ = told(made)
    assert "max_new_tokens: 17" in html
    assert "token_recycling" in html


def test_keys_that_only_sound_like_secrets_stay() -> None:
    value = {"max_new_tokens": 5, "tokenizer_sha256": "aa", "token_recycling": {"x": "y"}, "control_tokens": "no"}
    assert report_run.clean(value) == value
    assert report_run.clean({"HF_TOKEN": "x", "a.api-key": "y", "password": ["z"]}) == {
        "HF_TOKEN": "***", "a.api-key": "***", "password": "***"
    }  # fmt: skip


def test_a_run_that_was_only_trained_says_what_is_missing(tmp_path: Path) -> None:
    made = make(tmp_path / "run", metrics=metrics(), config={"seed": 0})
    html, markdown = told(made)
    for text in (html, markdown):
        assert "not evaluated" in text
        assert "There is no events.jsonl here" in text
        assert "No provenance.json" in text
        assert "Training is not complete" in text
        assert "~1.40" in text  # the estimate of the last step
    assert "<h2>A sample</h2>" not in html


def test_a_run_that_was_only_evaluated_says_what_is_missing(tmp_path: Path) -> None:
    html, _ = told(make(tmp_path / "run", evaluation=evaluation(samples=[], by_batch={})))
    assert "There is no metrics.jsonl here" in html
    assert "Only single prompts were decoded" in html
    assert "evaluation.json holds no sample" in html
    assert "No config.yaml here" in html
    assert "Training is not complete" not in html


def test_a_directory_that_tells_nothing_and_no_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of metrics\.jsonl"):
        told(tmp_path)
    with pytest.raises(ConfigError, match="run_dirs: empty"):
        told()
    run = make(tmp_path / "run", metrics=metrics())
    with pytest.raises(ConfigError, match="twice"):
        told(run, tmp_path / "run" / ".." / "run")


@pytest.mark.parametrize(
    ("more", "kind", "mark"),
    [
        ({}, "lossless", "lossless"),
        ({"lossless": {**HEAD["lossless"], "mismatches": 2, "ok": False}}, "wrong", "NOT lossless"),
        ({"lossless": None, "lossy": True}, "lossy", "LOSSY"),
        ({"lossless": None, "lossy": False, "same_text_as_plain": 3}, "exact", "exact sampling"),
    ],
)
def test_the_verdict_is_at_the_top(more: dict[str, Any], kind: str, mark: str, tmp_path: Path) -> None:
    html, markdown = told(whole(tmp_path / "run", evaluation=evaluation(**more)))
    assert f'<span class="badge {kind}">{mark}</span>' in html
    assert f"**{mark}**" in markdown


def test_a_primer_is_marked_lossy(tmp_path: Path) -> None:
    costs = {"64": {"over_base": 0.5, "flops_over_base": 0.4}}
    own = {"agreement": 0.9, "perplexity": 3.0, "by_length": costs, "auxiliary": {}}
    found = evaluation() | {"heads": {}, "primers": {"base": {"by_length": {"64": {}}}, "primers": {"medusa": own}}}
    html, _ = told(whole(tmp_path / "run", evaluation=found))
    assert '<span class="badge lossy">LOSSY</span>' in html
    assert "90.0%" in html


def test_numbers_that_are_none_and_torn_lines_are_left_out_and_told(tmp_path: Path) -> None:
    lines = metrics()
    lines[1]["train/medusa/loss"], lines[2]["train/medusa/loss"] = math.nan, math.inf
    made = whole(tmp_path / "run", metrics=lines)
    with open(made / "metrics.jsonl", "a") as f:
        f.write('[1]\n{"step": 50, "train/me')
    html, _ = told(made)
    assert "2 lines of metrics.jsonl could not be read" in html
    assert "2 values that are no finite numbers are left out" in html
    assert not re.search(r'd="[^"]*(nan|inf)', html)


def test_ten_thousand_lines_of_metrics_are_a_small_page(tmp_path: Path) -> None:
    html, markdown = told(whole(tmp_path / "run", metrics=metrics(10_000)))
    assert len(html) < 150_000
    assert len(markdown) < 20_000
    assert "10,000 measured steps" in html


def test_the_sample_shows_who_said_what(tmp_path: Path) -> None:
    html, markdown = told(whole(tmp_path / "run"))
    assert '<span class="own">Hello</span><ins> my dear</ins><del>↵</del><span class="own"> friend</span>' in html
    assert "Hello<b> my dear</b><del>↵</del> friend" in markdown
    assert "2 steps: 2 drafted tokens accepted, 1 rejected" in html


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("a=1", "a=1"),
        ("head=[a,b]", "'head=[a,b]'"),
        ("evaluate=['a=1']", """"evaluate=['a=1']\""""),
        ("a='$x'", """'a='"'"'$x'"'"''"""),
    ],
)
def test_the_command_can_be_typed_again(argument: str, shown: str) -> None:
    command = report_training._command(["train.py", argument])
    assert command == f"draftsmith train {shown}"
    assert shlex.split(command)[2:] == [argument]


def test_starts_are_paired_with_their_ends() -> None:
    run = report_run.Run("r", Path("r"), events=[*EVENTS[:2], {"event": "failed", "step": 25}, EVENTS[1]])
    assert [end and end["event"] for _, end in report_training.starts(run)] == [None, "failed", None]
    stray = report_run.Run("r", Path("r"), events=[{"event": "complete", "step": 3}])
    assert report_training.starts(stray) == []


def test_a_killed_run_says_so_with_its_last_measured_step(tmp_path: Path) -> None:
    html, _ = told(whole(tmp_path / "run", events=EVENTS[:1]))
    assert "no closing line: killed, or still running" in html
    assert "the last measured step is 40" in html


def test_a_static_tree_without_counts_is_drawn_and_a_moving_one_is_told(tmp_path: Path) -> None:
    found = evaluation(tree={"nodes": 4, "depth": 2})
    found["decoding"] |= {"paths": [[0], [1], [0, 0]]}
    assert "medusa: 4 nodes, 2 deep, static" in told(whole(tmp_path / "a", evaluation=found))[0]
    found["decoding"] |= {"paths": None, "tree": {"kind": "eagle2"}}
    assert "another tree at every step, so there is none to draw" in told(whole(tmp_path / "b", evaluation=found))[0]


def test_several_runs_are_compared_and_each_has_its_own(tmp_path: Path) -> None:
    slow = whole(tmp_path / "slow")
    fast = whole(tmp_path / "fast", evaluation=evaluation(tokens_per_step=3.1, speedup=2.0), config={"seed": 1})
    bare = make(tmp_path / "bare", metrics=metrics(), config={"seed": 0})
    html, markdown = told(slow, fast, bare, out=tmp_path / "both")
    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td class="left">medusa</td>', html)
    assert rows == ["fast", "slow"]
    for text in (html, markdown):
        assert "Not evaluated: bare." in text
        assert "3 runs compared" in text
    assert "All were decoded alike" in html
    assert re.search(r"<th scope=\"row\">seed</th>(<td class=\"left\">\d</td>){3}", html)
    assert html.count('class="line c') >= 7
    for folder in (slow, fast, bare):
        assert (folder / "report.html").is_file()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    html, _ = told(whole(tmp_path / "a" / "run"), whole(tmp_path / "b" / "run"), out=tmp_path / "both")
    assert "a/run" in html
    assert "b/run" in html
    assert "hold the same values" in html


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    assert told(whole(tmp_path / "a" / "run")) == told(whole(tmp_path / "b" / "run"))


def test_half_a_character_is_no_reason_to_have_no_report(tmp_path: Path) -> None:
    found = evaluation()
    found["heads"]["medusa"]["samples"][0]["prompt"] = "half \ud83d"
    assert "half ?" in told(whole(tmp_path / "run", evaluation=found))[0]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_words_and_lines_stand_out_from_their_ground(tmp_path: Path) -> None:
    """4.5 : 1 for words in light and dark (WCAG 2.1, 1.4.3); 3 : 1 for lines on dark. On white two of Okabe and Ito's
    colours are fainter than that, so every line has marks of its own shape too."""
    html, _ = told(whole(tmp_path / "run"))
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-fA-F]{6})", part)) for part in html.split("@media")[:2])
    for colours in (light, dark):
        for ink, ground in (
            ("ink", "paper"), ("ink", "card"), ("quiet", "paper"), ("quiet", "card"), ("link", "paper"),
            ("good", "good-paper"), ("bad", "bad-paper"), ("warn", "warn-paper"), ("ink", "kept"), ("refused", "card"),
        ):  # fmt: skip
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for n in range(len(LOOKS)):
        assert contrast(dark[f"c{n}"], dark["paper"]) >= 4.5
        bar = light["on-dark-bar" if n in (0, 6) else "on-light-bar"]
        assert contrast(light[f"c{n}"], bar) >= 4.5
        assert contrast(dark[f"c{n}"], dark["on-light-bar"]) >= 4.5


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert report_page.fence("a ```` b") == "`" * 5
    assert report_page.plain("<b>*a*`c`&") == "&lt;b&gt;\\*a\\*\\`c\\`&amp;"
    assert report_page.cell("a|b\nc") == "a\\|b c"


def test_the_verb_that_writes_a_report_at_its_end_does_not_fail_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from draftsmith import report as verb

    def never(*_: object) -> str:
        raise OverflowError("too wide")

    monkeypatch.setattr(verb.report, "page", never)
    (tmp_path / "metrics.jsonl").write_text("")
    verb.write(tmp_path)
    assert "warning: no report (OverflowError: too wide)" in capsys.readouterr().out
