"""No secret in what others see, and nothing but the parts of a configuration that are named."""

from typing import Any

import pytest

from draftsmith import shown

CANARY = "canary-5f1d9c27"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setenv("PASSWORD", f"{CANARY}-2")
    monkeypatch.setenv("SHORT_TOKEN", "abc")  # may be part of any word: nobody's secret


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"key {CANARY} here", "key *** here"),
        ("http://user:hunter22@host:80/v1 and more", "http://***@host:80/v1 and more"),
        ("https://token@host", "https://***@host"),
        ("mail me@host", "mail me@host"),
        ("http://host/a?b@c", "http://host/a?b@c"),
        ("logger.api_key=hunter22", "logger.api_key=***"),
        ("{password: hunter22}", "{password: ***}"),
        ("http://user:p@ssw0rd@host/v1", "http://***@host/v1"),
        ("http://user:a/b@host/v1", "http://***@host/v1"),
        ("{api_key:sk-1, lr: 1}", "{api_key:*** lr: 1}"),  # what follows a secret without quotes may belong to it
        ('{"api_key": "sk 1", "lr": 1}', '{"api_key": ***, "lr": 1}'),
        ("api_key='a,b c' lr=1", "api_key=*** lr=1"),
        ("Authorization: Bearer sk-1 sent", "Authorization: *** sent"),
        ("api_key_env=MY_KEY", "api_key_env=MY_KEY"),  # the name of a variable is no secret
        ("max_new_tokens=64 tokens_per_step: 3", "max_new_tokens=64 tokens_per_step: 3"),
        ("alphabet abc", "alphabet abc"),
    ],
)
def test_clean(text: str, want: str) -> None:
    assert shown.clean(text) == want


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"x{CANARY}", "the value of $SOME_API_KEY"),
        ("http://u:p@host", "an address with a password in it"),
        ("http://host/v1", ""),
        ("MY_KEY", ""),
    ],
)
def test_secret_in(text: str, why: str) -> None:
    assert shown.secret_in(text) == why


def test_only_named_parts_are_shown() -> None:
    config: dict[str, Any] = {
        "seed": 3,
        "heads": {"medusa": {"num_heads": 3, "names": [f"a {CANARY}", "b"]}},
        "data": {"path": "http://u:p@host/rows", "generation": {"seed": 1, "server": {"urls": ["http://inside"]}}},
        "strategy": {"name": "zero2", "timeout": 5, "deepspeed": {"tensorboard": {"path": "x"}}},
        "hydra": {"job": 1},
        "run_dir": "somewhere",
        "experiment": None,
    }
    assert shown.of(config) == {
        "seed": 3,
        "heads": {"medusa": {"num_heads": 3, "names": ["a ***", "b"]}},
        "data": {"path": "http://***@host/rows", "generation": {"seed": 1}},
        "strategy": {"name": "zero2"},
    }
