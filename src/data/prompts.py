"""What people give us to answer: JSON lines of chats or plain prompts, read strictly, named by file:row."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts import fingerprint
from draftsmith.data import synthetic
from draftsmith.errors import ConfigError, DataError

OPENING = 300  # characters of natural text to go on from
SOURCES = 10_000_000  # bytes of library source that openings are cut from
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from: a file, and then nothing else; or so many made-up ones."""

    path: str | None = None  # JSON lines with `messages` or `prompt`
    synthetic: int = 0  # instead: this many templated chats
    seed: int = 0  # of the synthetic chats
    text: int = 0  # and this many openings of natural text (this Python's own library sources)

    def __post_init__(self) -> None:
        if self.synthetic < 0 or self.text < 0:
            raise ConfigError("synthetic, text: counts cannot be negative")
        if self.path is None and self.synthetic + self.text == 0:
            raise ConfigError("path, synthetic, text: give a file of prompts, or how many to make up")


@dataclass(frozen=True)
class Prompt:
    """Either chat messages or plain text to go on from. `where` is file:row or a synthetic name."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def id(self) -> str:
        """Content hash: equal prompts have equal ids."""
        return fingerprint([list(self.messages), self.text])[:16]


def json_lines(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:row, object) for every line; DataError names the line that is not one JSON object."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as f:
        for number, raw in enumerate(f, start=1):
            where = f"{path}:{number}"
            try:
                value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as e:
                raise DataError(f"{where}: not UTF-8 ({e.reason} at byte {e.start})") from None
            except json.JSONDecodeError as e:
                raise DataError(f"{where}: not JSON ({e.msg} at column {e.colno}); mend or delete the line") from None
            except RecursionError:
                raise DataError(f"{where}: not JSON that anyone wrote (nested too deeply)") from None
            if b"\\u" in raw and not _encodable(value):
                raise DataError(f"{where}: half a surrogate pair, which is no character; mend or delete the line")
            if not isinstance(value, dict):
                raise DataError(f"{where}: a {type(value).__name__}, not an object; one JSON object per line")
            yield where, value


def _encodable(value: Any) -> bool:
    try:
        return bool(json.dumps(value, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def check_messages(messages: Any, where: str) -> list[Message]:
    """The chat as plain role/content pairs: known roles, text content, system first, users and assistants
    in turn, a user first. Nothing is guessed: DataError says what is wrong."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages: give a non-empty list of role/content objects")
    clean: list[Message] = []
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            raise DataError(f"{where}: messages[{i}]: needs a text `role` and a text `content`")
        if m["role"] not in ROLES:
            raise DataError(f"{where}: messages[{i}]: role '{m['role']}'; known roles are {', '.join(ROLES)}")
        clean.append({"role": m["role"], "content": m["content"]})
    turns = clean[1:] if clean[0]["role"] == "system" else clean
    for i, m in enumerate(turns):
        want = ("user", "assistant")[i % 2]
        if m["role"] != want:
            raise DataError(f"{where}: turn {i + 1} is the {m['role']}'s where the {want}'s is due")
    return clean


def read_prompts(path: Path | str) -> Iterator[Prompt]:
    """Prompts of a JSON-lines file: `messages` (a chat) or `prompt` (text to go on from)."""
    for where, value in json_lines(path):
        if "messages" in value:
            yield Prompt(where, messages=tuple(check_messages(value["messages"], where)))
        elif isinstance(value.get("prompt"), str) and value["prompt"]:
            yield Prompt(where, text=value["prompt"])
        else:
            raise DataError(f"{where}: has neither `messages` nor a text `prompt`; keys: {sorted(value)}")


def make_up(config: PromptsConfig, exclude: frozenset[str]) -> list[Prompt]:
    """config.synthetic chats, then config.text openings of natural text, all distinct.

    exclude: keys (`user_turns`) that no made-up prompt may have: this is how prompts are held out.
    """
    chats = synthetic.prompts(config.synthetic, config.seed, exclude=exclude) if config.synthetic else []
    made = [Prompt(f"synthetic:{config.seed}:{i}", messages=tuple(m)) for i, m in enumerate(chats)]
    texts = [t for t in _openings(config.seed) if _key(t) not in exclude] if config.text else []
    if len(texts) < config.text:
        raise DataError(f"prompts.text={config.text}: only {len(texts)} openings are left; ask for fewer")
    return made + [Prompt(f"text:{config.seed}:{i}", text=t) for i, t in enumerate(texts[: config.text])]


def user_turns(prompts: Iterable[Prompt]) -> frozenset[str]:
    """The keys of everything a user said in these prompts, for holding others out."""
    return frozenset(
        _key(said)
        for p in prompts
        for said in ([p.text] if p.text else [m["content"] for m in p.messages if m["role"] == "user"])
    )


def _key(said: str) -> str:
    return synthetic.prompt_key([{"role": "user", "content": said}])


def _openings(seed: int) -> list[str]:
    """First lines of library source chunks, about 300 characters each, in an order that the seed gives."""
    openings = [chunk[:OPENING].rpartition("\n")[0] or chunk[:OPENING] for chunk in synthetic.source_texts(SOURCES)]
    random.Random(f"openings/{seed}").shuffle(openings)
    return list(dict.fromkeys(openings))
