"""The parts of talking to servers, without a network: what is said, what is understood, when to ask again."""

import random
from typing import Any

import pytest

from draftsmith.data.breaker import Breaker, backoff, meaning, retry_after
from draftsmith.data.openai_api import NonsenseError, PromptError, ServerConfig, read_answer, said
from draftsmith.errors import ConfigError, RowError

from .test_server import setting


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("http://user:canary@host/v1", "password"),
        ("http://host/v1?key=canary", "password"),
        ("http://host/v1#canary", "password"),
        ("127.0.0.1:8000/v1", "write it like"),
        ("ftp://host/v1", "write it like"),
        ("http://", "write it like"),
        ("http://host:port/v1", "not an address"),
    ],
)
def test_addresses(url: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        ServerConfig(urls=["http://127.0.0.1:1/v1", url])
    assert "canary" not in str(caught.value)
    assert "urls[1]" in str(caught.value)


def test_a_key_goes_over_https_or_stays_here() -> None:
    with pytest.raises(ConfigError, match="https"):
        ServerConfig(urls=["http://example.org/v1"], api_key_env="K")
    for url in ("https://example.org/v1", "http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8000/v1"):
        assert ServerConfig(urls=[url], api_key_env="K").urls == [url]


@pytest.mark.parametrize(
    ("status", "after", "what"),
    [
        *[(200, None, "ok"), (301, None, "stop"), (400, None, "refused"), (401, None, "stop"), (404, None, "stop")],
        *[(408, None, "down"), (422, None, "refused"), (429, None, "busy"), (500, None, "down"), (503, None, "down")],
        *[(503, 2.0, "busy"), (500, 2.0, "down"), (402, None, "stop"), (529, None, "down")],
    ],
)
def test_meaning(status: int, after: float | None, what: str) -> None:
    assert meaning(status, after) == what


def test_retry_after() -> None:
    assert retry_after(None, 0) is None
    assert retry_after("7", 0) == 7
    assert retry_after(" 0.5 ", 0) == 0.5
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40.0) == 60
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 400.0) == 0
    assert retry_after("soon", 0) is None
    assert retry_after("-3", 0) is None


def test_backoff_doubles_to_its_limit_and_is_drawn_from_zero() -> None:
    assert [backoff(n, 1.0, 10.0, lambda: 1.0) for n in (1, 2, 3, 4, 5, 2000)] == [1, 2, 4, 8, 10, 10]
    rng = random.Random(0)
    drawn = [backoff(3, 1.0, 10.0, rng.random) for _ in range(200)]
    assert 0 <= min(drawn) < 0.5
    assert 3.5 < max(drawn) <= 4


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_breaker() -> None:
    clock = Clock()
    b = Breaker(3, 1.0, 4.0, clock, lambda: 1.0)
    for _ in range(2):
        b.failed()
    b.answered()
    for _ in range(2):
        b.failed()
    assert b.admits()
    assert b.troubled() == 0
    b.failed()
    assert (b.state, b.admits(), b.probe_due()) == ("open", False, True)
    waits = []
    for _ in range(4):
        b.probed(False)
        assert not b.probe_due()
        waits.append(b._until - clock.now)
        clock.now = b._until
        assert b.probe_due()
    assert waits == [1, 2, 4, 4]
    b.probed(True)
    assert (b.state, b.admits()) == ("trial", True)
    b.sent()
    assert not b.admits()
    b.failed()
    assert (b.state, b.admits(), b.probe_due()) == ("open", False, False)
    assert b.troubled() == 11
    clock.now += 4
    b.probed(True)
    b.sent()
    b.answered()
    assert (b.state, b.admits(), b.troubled()) == ("closed", True, 0)


def test_a_throttled_server_pauses_and_is_no_failure() -> None:
    clock = Clock()
    b = Breaker(1, 1.0, 4.0, clock, lambda: 1.0)
    b.throttled(5)
    b.answered()  # an answer that was under way does not end the pause
    assert not b.admits()
    clock.now += 5
    assert b.admits()
    b.throttled(5)
    clock.now += 7
    assert b.troubled() == 0


def test_an_obeyed_pause_is_followed_by_a_request() -> None:
    """Trouble counts from the end of the first pause, and only as far as the server's last word."""
    clock = Clock()
    b = Breaker(1, 1.0, 4.0, clock, lambda: 1.0)
    b.throttled(10)
    for passed in (5, 4.9, 0.2, 20):
        assert b.admits() == (passed == 20)
        clock.now += passed
        assert b.troubled() == 0
    assert b.admits()  # 30.1 s later nobody has asked again, so nobody can say that it is still in trouble
    b.sent()
    clock.now += 1
    b.throttled(10)
    assert b.troubled() == pytest.approx(21.1)
    clock.now += 50
    assert b.troubled() == pytest.approx(21.1)
    b.answered()
    assert b.troubled() == 0


def test_a_throttled_server_that_dies_is_in_trouble() -> None:
    clock = Clock()
    b = Breaker(1, 1.0, 4.0, clock, lambda: 1.0)
    b.throttled(10)
    clock.now += 2
    b.failed()
    assert (b.state, b.troubled()) == ("open", 0)
    clock.now += 18
    assert b.troubled() == 10


def reply(**changes: Any) -> dict[str, Any]:
    choice = {"text": "cat", "finish_reason": "stop", **changes}
    return {"choices": [choice], "usage": {"completion_tokens": changes.get("counted")}}


def test_ids_are_taken_as_they_are(tokenizer: Any) -> None:
    end, s = tokenizer.eos_token_id, setting(tokenizer)
    whole = read_answer(reply(token_ids=[70, 71, end], counted=3), [1], s, "w")
    assert (whole.ids, whole.cut) == ([70, 71, end], False)
    cut = read_answer(reply(token_ids=[70, 71], counted=2, finish_reason="length"), [1], s, "w")
    assert (cut.ids, cut.cut) == ([70, 71], True)
    # vLLM stops at an eos of its own too; the ids are the base's all the same
    assert read_answer(reply(token_ids=[70, 71], counted=2), [1], s, "w").ids == [70, 71]
    assert not read_answer(reply(token_ids=[70, end], counted=2, finish_reason="length"), [1], s, "w").cut


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"token_ids": [70], "counted": 2}, "ids"),
        ({"token_ids": []}, "ids"),
        ({"token_ids": [True]}, "ids"),
        ({"token_ids": [-1]}, "ids"),
        ({"token_ids": "70"}, "ids"),
        ({"token_ids": list(range(70, 80))}, "ids"),
        ({"text": None}, "nonsense"),
        ({"text": 3}, "nonsense"),
        ({"finish_reason": None}, "nonsense"),
        ({"finish_reason": "abort"}, "nonsense"),
    ],
)
def test_nonsense(tokenizer: Any, changes: dict[str, Any], kind: str) -> None:
    with pytest.raises(NonsenseError) as caught:
        read_answer(reply(**changes), [1], setting(tokenizer), "w")
    assert caught.value.kind == kind


@pytest.mark.parametrize("body", [None, [], b"<html>", "x", {}, {"choices": None}, {"choices": [3]}])
def test_no_answer_at_all(tokenizer: Any, body: Any) -> None:
    with pytest.raises(NonsenseError):
        read_answer(body, [1], setting(tokenizer), "w")


def test_the_prompt_must_be_ours(tokenizer: Any) -> None:
    read_answer(reply(token_ids=[70], prompt_token_ids=[1, 2]), [1, 2], setting(tokenizer), "w")
    read_answer({**reply(token_ids=[70]), "prompt_token_ids": [1, 2]}, [1, 2], setting(tokenizer), "w")
    with pytest.raises(PromptError, match="3 ids where ours are 2, the first other one at 0"):
        read_answer(reply(token_ids=[70], prompt_token_ids=[0, 1, 2]), [1, 2], setting(tokenizer), "w")


def test_text_alone_is_cut_again_and_verified(tokenizer: Any) -> None:
    s = setting(tokenizer)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    for counted in (None, len(ids), len(ids) + 1):
        assert read_answer(reply(text="the cat", counted=counted), [1], s, "w").ids == [*ids, tokenizer.eos_token_id]
    cut = read_answer(reply(text="the cat", counted=len(ids), finish_reason="length"), [1], s, "w")
    assert (cut.ids, cut.cut) == (ids, True)
    assert read_answer(reply(text=""), [1], s, "w").ids == []


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "the cat", "counted": 9},
        {"text": "the cat", "counted": 1},
        {"text": "the cat", "counted": 3, "finish_reason": "length"},
        {"text": "<|end|>"},
    ],
)
def test_text_that_does_not_verify(tokenizer: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        read_answer(reply(**changes), [1], setting(tokenizer), "w")
    assert caught.value.reason == "unverified"


def test_said() -> None:
    assert said({"error": {"message": "a\nb"}}) == "a b"
    assert said(b'{"detail": "x"}') == "x"
    assert said(b"\xff<html>") == "\ufffd<html>"
    assert said("key is abc, abc", "abc") == "key is ***, ***"
    assert len(said("x" * 999)) == 200


@pytest.mark.parametrize("at", range(180, 210))
def test_a_key_is_crossed_out_before_the_text_is_cut(at: int) -> None:
    key = "canary-1234"
    for value in ("x" * at + key, {"a": "x" * at, "b": key}, [{"error": key}] * 30):
        assert "c" not in said(value, key)
    quoted = 'can"ary\\'
    assert "can" not in said({"x" * at: quoted}, quoted)


def test_what_is_quoted_is_cut_by_whoever_knows_the_key(tokenizer: Any) -> None:
    """NonsenseError quotes all of it: cut there, half a key would stay."""
    body = {"choices": [], "x": "x" * 170, "key": "canary-1234"}
    with pytest.raises(NonsenseError) as caught:
        read_answer(body, [1], setting(tokenizer), "w")
    assert "canary-1234" in str(caught.value)
    assert "can" not in said(str(caught.value), "canary-1234")
