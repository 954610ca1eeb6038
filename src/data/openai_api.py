"""What is said to an OpenAI-compatible server (vLLM, SGLang, TGI …), and what its answers mean; no network here.

A row needs the ids that the base emitted. vLLM (0.10.2 and later) returns them on `return_token_ids`, the token
that ended the answer included, and they are kept as they are. Where a server returns text alone, the text is cut
into tokens again and the row is refused unless those decode to that very text and are as many as the server
counted.

Sampling is spelt out in full: vLLM would otherwise take top-k, penalties and more from the checkpoint's
generation_config, and a row would not be the base's own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from draftsmith.errors import ConfigError, RowError

if TYPE_CHECKING:
    from draftsmith.data.generate import Conversation, Setting

APIS = ("auto", "completions", "chat")
PATHS = {"auto": "/completions", "completions": "/completions", "chat": "/chat/completions"}
SAID = 200  # characters kept of what a server says
LARGEST = 2**31  # no vocabulary has so many ids
ENDED = ("stop", "eos_token")  # finish_reason of an answer that ended itself; the second is TGI's


@dataclass(frozen=True)
class ServerConfig:
    urls: list[str] = field(default_factory=list)  # each up to and including /v1; conversations are spread over them
    model: str | None = None  # as the server calls it; null: the only one it serves
    api: str = "auto"  # completions: our own prompt ids are sent; chat: the server renders; auto: see GenerationConfig
    api_key_env: str | None = None  # the NAME of the environment variable that holds the key
    concurrency: int = 16  # conversations in flight, per process
    timeout: float = 600.0  # seconds for one answer, from the first byte sent to the last received
    attempts: int = 6  # per request, before the row is left for the next run
    backoff: float = 1.0  # seconds before the first retry; doubles, with jitter
    backoff_limit: float = 60.0
    breaker: int = 8  # failures in a row after which a server is only probed, until it answers again
    patience: float = 600.0  # seconds without any answer before the run gives up; also the longest Retry-After

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ConfigError(f"api='{self.api}': choose one of {', '.join(APIS)}")
        for name in ("concurrency", "attempts", "breaker"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1")
        for name in ("timeout", "backoff", "backoff_limit"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give a positive number of seconds")
        if self.patience < 0:
            raise ConfigError(f"patience={self.patience}: seconds cannot be negative")
        for n, url in enumerate(self.urls):
            _check_url(f"urls[{n}]", url, keyed=self.api_key_env is not None)


def key_of(config: ServerConfig) -> str | None:
    """The API key, from the environment variable that the configuration names."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(f"api_key_env: the environment variable {config.api_key_env} is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"api_key_env: {config.api_key_env} holds something that cannot be a key")
    return key


def _check_url(name: str, url: str, *, keyed: bool) -> None:
    """An address that may carry a secret is never quoted."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{name}: not an address; write it like http://127.0.0.1:8000/v1") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{name}: holds a password or a query; put the key into an environment variable and its name"
            " into api_key_env"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{name}='{url}': write it like http://127.0.0.1:8000/v1")
    if keyed and parts.scheme != "https" and not is_loopback(url):
        raise ConfigError(f"{name}='{url}': a key would travel in the open; use https")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class NonsenseError(Exception):
    """The server said 200 and something that is no answer. kind: `nonsense`, or `ids` where ids are missing. It may
    quote the server at length and with the key in it; said() makes it fit to be written down."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class PromptError(Exception):
    """The server went on from other ids than those that were asked."""


@dataclass(frozen=True)
class Answer:
    """ids: what the base emitted, the token that ended it included; cut: the length ended it instead."""

    ids: list[int]
    cut: bool


def request_body(c: Conversation, ids: list[int], model: str | None, api: str) -> dict[str, Any]:
    """The JSON to send so that the base goes on from `ids` (api=chat: from c.messages, which must render to them)."""
    setting = c.setting
    g = setting.generation
    body: dict[str, Any] = {"model": model} if model is not None else {}
    if api == "chat":
        body["messages"] = c.messages
        if setting.chat.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": setting.chat.thinking}
    else:
        body |= {"prompt": ids, "add_special_tokens": False}
    body |= {"max_tokens": g.max_new_tokens, "temperature": g.temperature, "top_p": g.top_p}
    if g.temperature > 0:
        body["seed"] = c.turn_seed
    body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    if setting.eos_ids:
        body["stop_token_ids"] = sorted(setting.eos_ids)
    return body | {"return_token_ids": True}


def read_answer(body: Any, asked: list[int], setting: Setting, where: str) -> Answer:
    """The answer in a server's 200. NonsenseError: ask again. PromptError: it answered something else. RowError
    `unverified`: the text's ids cannot be known."""
    choice, text, finish = _choice(body)
    seen = choice.get("prompt_token_ids", body.get("prompt_token_ids"))
    if isinstance(seen, list) and seen != asked:
        at = next((i for i, (a, b) in enumerate(zip(seen, asked, strict=False)) if a != b), min(len(seen), len(asked)))
        raise PromptError(f"it went on from {len(seen)} ids where ours are {len(asked)}, the first other one at {at}")
    usage = body.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    counted = counted if isinstance(counted, int) else None
    ids = choice.get("token_ids")
    if ids is None:
        ids = _cut_again(text, finish == "stop", counted, setting, where)
    else:
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < LARGEST for i in ids):
            raise NonsenseError("ids", "its token_ids are no ids")
        if len(ids) < (counted or bool(text)):
            raise NonsenseError("ids", f"{len(ids)} token ids where it counts {counted or 'some'}")
    if len(ids) > setting.generation.max_new_tokens + 1:
        raise NonsenseError("ids", f"{len(ids)} token ids, more than max_new_tokens")
    return Answer(ids, cut=finish == "length" and not (ids and ids[-1] in setting.eos_ids))


def _choice(body: Any) -> tuple[dict[str, Any], str, str]:
    """(the only choice, its text, `stop` or `length`)."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NonsenseError("nonsense", f"200 without choices: {_line(body)}")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if text is None and choice.get("token_ids") is not None:
        text = ""  # a reasoning parser may have moved all of it elsewhere; the ids are whole
    if not isinstance(text, str):
        raise NonsenseError("nonsense", "200 with a choice without text")
    finish = choice.get("finish_reason")
    if finish not in (*ENDED, "length"):
        raise NonsenseError("nonsense", f"finish_reason {_line(finish)}")  # such as `abort`: a server shutting down
    return choice, text, "length" if finish == "length" else "stop"


def _cut_again(text: str, ended: bool, counted: int | None, setting: Setting, where: str) -> list[int]:
    """Ids of a text that came alone, the end token added where the answer ended itself."""
    if not text:
        return []
    ids = list(setting.tokenizer(text, add_special_tokens=False)["input_ids"])
    spelt = not set(ids).isdisjoint(setting.tokenizer.all_special_ids)  # a server leaves real ones out of its text
    if spelt or setting.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise RowError(where, "unverified", "the server returns text alone, and its tokens do not give it back")
    if counted is not None and counted - len(ids) not in ((0, 1) if ended else (0,)):
        told = f"the server counts {counted} tokens, its text has {len(ids)}; its ids cannot be known"
        raise RowError(where, "unverified", told)
    if ended and setting.eos_ids:
        ids.append(_end_id(setting, where))
    return ids


def _end_id(setting: Setting, where: str) -> int:
    """What ends an answer: the eos that the chat template puts behind one, else the tokenizer's."""
    tokenizer = setting.tokenizer
    ends: list[int] = []
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError:
            text = ""
        after = tokenizer(text.rpartition("b")[2], add_special_tokens=False)["input_ids"] if text else []
        ends = [i for i in after if i in setting.eos_ids][:1]
    for known in (*ends, tokenizer.eos_token_id, *(setting.eos_ids if len(setting.eos_ids) == 1 else ())):
        if known in setting.eos_ids:
            return known
    raise RowError(where, "unverified", "the server returns text alone, and several tokens may have ended it")


def said(value: Any, secret: str | None = None) -> str:
    """One short line of what a server said; the key, should it echo it, crossed out."""
    text = _line(value)
    if secret:  # before the text is cut: half a key at its end would be found by nobody
        for spelt in (json.dumps(secret)[1:-1], secret):
            text = text.replace(spelt, "***")
    return text if len(text) <= SAID else text[: SAID - 1] + "…"


def _line(value: Any) -> str:
    """What a server said, in one line, whole."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return " ".join(text.split())


def chosen_model(wanted: str | None, served: list[str], url: str) -> str:
    """The model to ask for by name; ConfigError if the server does not serve it, or several and none is wanted."""
    if wanted is None and len(served) == 1:
        return served[0]
    if wanted is None or wanted not in served:
        what = "give one" if wanted is None else f"'{wanted}' is not served"
        raise ConfigError(f"server.model: {what}; {url} serves {', '.join(served) or 'none'}")
    return wanted
