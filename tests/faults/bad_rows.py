"""Bad rows: files that cannot be read, rows of no shape, chats that nobody said, too much and too little of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from .bad_kinds import Bad, World


def as_json(*values: Any) -> bytes:
    return b"".join(json.dumps(v).encode() + b"\n" for v in values)


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": said} for role, said in turns], **more}


def tokens(count: int, learned: int | None = None) -> dict[str, Any]:
    learned = count if learned is None else learned
    return {"ids": [30 + i % 50 for i in range(count)], "mask": [0] * (count - learned) + [1] * learned}


def text(said: Any) -> dict[str, Any]:
    return {"prompt": "the cat", "completion": said}


FINE = chat(("user", "what is the cat doing"), ("assistant", "the cat sat on the mat and slept"))
GOOD = as_json(FINE)
CALL = {"function": {"name": "look", "arguments": "{}"}}


def file(what: str, content: bytes, says: str, *changes: str, name: str = "in.jsonl", code: int = 3) -> Bad:
    def make(own: Path, world: World) -> list[str]:
        (own / name).write_bytes(content)
        return [f"data.path={own / name}", *changes]

    return Bad(what, code, says, make)


def row(what: str, value: Any, says: str, *changes: str) -> Bad:
    """A second line, behind one that is fine."""
    content = value if isinstance(value, bytes) else as_json(value)
    return file(what, GOOD + content, f"…/in.jsonl:2: {says}", *changes)


MEND = "…; mend them, or data.on_bad=skip"
LINES = [
    row("last line torn", GOOD[:40], "not JSON (…; the file ends in the middle of it); mend or delete the line"),
    row("NUL byte in a text", b'{"prompt": "a\0b", "completion": "c"}\n', "not JSON (Invalid control character at …"),
    row(
        "invalid UTF-8", b'{"prompt": "a\xff", "completion": "c"}\n', f"not UTF-8 (invalid start byte at byte 13){MEND}"
    ),
    row("half a surrogate pair", b'{"prompt": "a\\ud800", "completion": "c"}\n', f"half a surrogate pair, …{MEND}"),
    row("a key twice in one object", b'{"prompt": "a", "prompt": "b"}\n', f"…the key 'prompt' stands twice …{MEND}"),
    row("a number of 5,000 digits", b'{"a": ' + b"1" * 5000 + b"}\n", f"not JSON that can be read (…{MEND}"),
    row("10,000 brackets", b'{"a": ' + b"[" * 10_000 + b"\n", "not JSON that anyone wrote (nested too deeply)"),
    row("a line that is a number", 3, "a int, not an object; one JSON object per row"),
    row("a line that is a list", [FINE], "a list, not an object; one JSON object per row"),
    file("UTF-16", GOOD.decode().encode("utf-16"), f"…/in.jsonl:1: not UTF-8 (…{MEND}"),
    file("HTML saved as .jsonl", b"<!DOCTYPE html>\n<html>\n", f"…/in.jsonl:1: not JSON (…{MEND}"),
    file(
        "only bad lines, skipped",
        b"{\n3\n",
        "0 of 2 rows left; 2 of 2 rows do not fit (json 2); see …",
        "data.on_bad=skip",
    ),
    file(
        "empty file", b"", "…/in.jsonl: 0 of 0 rows left: the sources are empty; give data.path, or one of them, rows"
    ),
    file("only blank lines", b"\n \n", "…/in.jsonl: 0 of 0 rows left: the sources are empty; give …"),
    file("unknown kind of file", b"hello", "…/in.txt: unknown kind of file; sources are .parquet, …", name="in.txt"),
    file("no such file", b"", "none.jsonl: no such file or folder, …; give one that is there", "data.path=none.jsonl"),
    file(
        "gz cut off",
        gzip.compress(GOOD * 50)[:-9],
        "…/in.jsonl.gz: cannot be read, or damaged (…); copy or write it again",
        name="in.jsonl.gz",
    ),
    file(
        "gz that is none",
        GOOD,
        "…/in.jsonl.gz: cannot be read, or damaged (…); copy or write it again",
        name="in.jsonl.gz",
    ),
    file(
        "gz with a torn line inside",
        gzip.compress(GOOD + GOOD[:40]),
        f"…/in.jsonl.gz:2: not JSON (…; the file ends in the middle of it); mend or delete the line{MEND}",
        name="in.jsonl.gz",
    ),
    file("JSON array cut off", b'[{"prompt": "a"},', f"…/in.json:1: not a whole JSON array (…{MEND}", name="in.json"),
    file(
        "JSON array with a number",
        b"[" + GOOD.strip() + b", 3]",
        f"…/in.json:2: a int, not an object; one JSON object per row{MEND}",
        name="in.json",
    ),
    file("empty JSON array", b"[]", "…/in.json: 0 of 0 rows left: the sources are empty; give …", name="in.json"),
    file(
        "Parquet that is none",
        GOOD,
        "…/in.parquet: not Parquet, or damaged (…); copy or write it again",
        name="in.parquet",
    ),
    file("Arrow that is none", GOOD, "…/in.arrow: not Arrow, or damaged (…); copy or write it again", name="in.arrow"),
]


def table(what: str, columns: dict[str, list[Any]], says: str, cut: int = 0) -> Bad:
    """A Parquet file of these columns, its last bytes cut."""

    def make(own: Path, world: World) -> list[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = own / "in.parquet"
        pq.write_table(pa.table(columns), path)
        path.write_bytes(path.read_bytes()[: -cut or None])
        return [f"data.path={path}"]

    return Bad(what, 3, says, make)


SHAPES = [
    row(
        "keys of no shape",
        {"question": "a"},
        f"has neither messages, conversations, …; keys: ['question']; name yours, …{MEND}",
    ),
    row("a column missing", {"instruction": "a"}, f"has neither messages, …{MEND}"),
    row("a text that is a number", text(3), f"completion: a text is due, not int…{MEND}"),
    row("NaN for a text", b'{"prompt": "a", "completion": NaN}\n', f"completion: a text is due, not float…{MEND}"),
    row(
        "messages that are a text",
        {"messages": "hello"},
        f"messages: give a non-empty list of role/content objects…{MEND}",
    ),
    row("no messages", {"messages": []}, f"messages: give a non-empty list of role/content objects…{MEND}"),
    row("a message without content", {"messages": [{"role": "user"}]}, f"messages[0]: needs a text `role` …{MEND}"),
    row("a picture in a message", chat(("user", [{"type": "image"}])), f"messages[0]: needs a text `role` …{MEND}"),
    row("an unknown role", chat(("wizard", "a")), f"messages[0]: role 'wizard'; known roles are system, …{MEND}"),
    row(
        "an unknown speaker",
        {"conversations": [{"from": "martian", "value": "a"}]},
        f"conversations[0]: from 'martian'; known are human, …{MEND}",
    ),
    row(
        "the assistant first",
        chat(("assistant", "a")),
        f"messages[0]: turn of the assistant where the system or user is due…{MEND}",
    ),
    row(
        "two users in a row",
        chat(("user", "a"), ("user", "b")),
        f"messages[1]: turn of the user where the assistant is due…{MEND}",
    ),
    row(
        "a second system turn",
        chat(("system", "a"), ("system", "b")),
        f"messages[1]: turn of the system where the user is due…{MEND}",
    ),
    row(
        "a user who says nothing", chat(("user", " "), ("assistant", "a")), f"messages[0]: the user says nothing…{MEND}"
    ),
    row(
        "an assistant who says nothing",
        chat(("user", "a"), ("assistant", "")),
        f"messages[1]: the assistant says nothing…{MEND}",
    ),
    row(
        "no assistant",
        chat(("user", "a")),
        f"no assistant text to learn from; distil the prompts or drop the row…{MEND}",
    ),
    row(
        "a tool's result that nobody asked for",
        chat(("user", "a"), ("tool", "b")),
        f"messages[1]: turn of the tool where the assistant is due…{MEND}",
    ),
    row(
        "tool calls that are a text",
        {"messages": [FINE["messages"][0], {"role": "assistant", "content": "", "tool_calls": "f"}]},
        f"messages[1]: tool_calls: give a list of objects…{MEND}",
    ),
    row(
        "a tool's turns that the template does not know",
        {
            "messages": [
                FINE["messages"][0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "r"},
                FINE["messages"][1],
            ]
        },
        f"the chat template refuses it (…{MEND}",
    ),
    row(
        "control tokens beside private-use characters",
        chat(("user", "\U000f0006"), ("assistant", "<s>")),
        f"control tokens beside private-use characters; drop the row…{MEND}",
    ),
    row(
        "a prompt without an answer",
        {"prompt": "a"},
        f"a prompt without an answer; let the base answer it with draftsmith distill…{MEND}",
    ),
    row("an empty completion", text(""), f"completion: empty…{MEND}"),
    row("plain text", {"text": "a"}, f"plain text has no assistant; set data.loss_on=all…{MEND}"),
    row(
        "turns without answers",
        {"turns": ["a", "b"]},
        f"turns without answers; let the base answer them with draftsmith distill…{MEND}",
    ),
    row("ids that are texts", {"ids": ["1"], "mask": [1]}, f"ids: give a list of integers…{MEND}"),
    row("no ids", {"ids": [], "mask": []}, f"ids: empty…{MEND}"),
    row(
        "an id below 0",
        {"ids": [-1, 2, 3], "mask": [1, 1, 1]},
        f"token id -1 outside the base's vocabulary of 400…{MEND}",
    ),
    row(
        "an id outside the vocabulary",
        {"ids": [400, 2, 3], "mask": [1, 1, 1]},
        f"token id 400 outside the base's vocabulary of 400…{MEND}",
    ),
    row(
        "an id of thirty digits",
        {"ids": [10**30], "mask": [1]},
        f"token id 1000000000000000000000000000000 outside the base's vocabulary …{MEND}",
    ),
    row("a mask of another length", {"ids": [1, 2, 3], "mask": [1, 1]}, f"mask: give one 0 or 1 per id (3)…{MEND}"),
    row("a mask with a 2", {"ids": [1, 2, 3], "mask": [1, 1, 2]}, f"mask: give one 0 or 1 per id (3)…{MEND}"),
    row(
        "shifted labels",
        {"ids": [1, 2, 3], "labels": [2, 3, -100]},
        f"labels[0]: neither -100 nor the id there (not shifted)…{MEND}",
    ),
    table(
        "Parquet cut off",
        {"prompt": ["a"] * 50},
        "…/in.parquet: not Parquet, or damaged (…); copy or write it again",
        cut=1,
    ),
    table(
        "Parquet with a number for a text",
        {"prompt": ["a", "b"], "completion": [1, 2]},
        f"…/in.parquet:1: completion: a text is due, not int…{MEND}",
    ),
    table("Parquet with another column", {"question": ["a"]}, f"…/in.parquet:1: has neither messages, …{MEND}"),
    table("Parquet without rows", {"prompt": []}, "…/in.parquet: 0 of 0 rows left: the sources are empty; give …"),
]


def answered(what: str, values: list[Any], says: str, *changes: str, code: int = 3) -> Bad:
    return file(what, as_json(*values), says, *changes, code=code)


NOTHING = (
    "no row left with a token to learn from (0 of 3 rows left: 3 of 3 rows do not fit (nothing_to_learn 3));"
    " see data.long_rows and data.loss_on"
)
BOTH = "1 of its questions are trained on too, such as that of …/in.jsonl:1; take them out of one side, or use …"


def overlapping(own: Path, world: World) -> list[str]:
    (own / "in.jsonl").write_bytes(GOOD * 2)
    (own / "held.jsonl").write_bytes(as_json(chat(("user", "what is the cat doing"), ("assistant", "it sleeps"))))
    return [f"data.path={own}/in.jsonl", f"data.validation.path={own}/held.jsonl"]


def long_prompts(own: Path, world: World) -> list[str]:
    (own / "in.jsonl").write_bytes(as_json({"prompt": "the cat sat " * 200}))
    return [f"data.prompts.path={own}/in.jsonl", "data.prompts.synthetic=0", f"out={own}/rows"]


def evaluated(own: Path, world: World) -> list[str]:
    (own / "in.jsonl").write_bytes(as_json({"prompt": "the cat sat"}, {"prompt": "the cat sat " * 200}))
    return [f"run_dir={world.folder}/run", f"prompts.path={own}/in.jsonl"]


LENGTHS = [
    answered("all tokens masked", [tokens(4, 0)] * 3, f"…/in.jsonl:1: {NOTHING}"),
    answered("all rows shorter than any head looks ahead", [tokens(2)] * 3, f"…/in.jsonl:1: {NOTHING}"),
    answered(
        "some rows masked",
        [tokens(20), tokens(4, 0)],
        "warning: 1 of 2 rows do not fit (nothing_to_learn 1) as data.long_rows, …",
        code=0,
    ),
    answered(
        "some rows of one token",
        [tokens(20), tokens(1)],
        "warning: 1 of 2 rows do not fit (nothing_to_learn 1) as …",
        code=0,
    ),
    answered(
        "a row longer than data.length",
        [tokens(20), tokens(65)],
        "…/in.jsonl:2: 65 tokens do not fit data.length=64; raise it or set data.long_rows=truncate or drop (…",
    ),
    answered(
        "a row longer than the base's context",
        [tokens(300)],
        "…/in.jsonl:1: 300 tokens do not fit the base's context of 256; set data.long_rows=truncate or drop (…",
        "data.length=1000",
    ),
    answered(
        "all rows too long, dropped",
        [tokens(65)],
        "0 of 1 rows left: 1 of 1 rows do not fit (too_long 1)); see data.long_rows and …",
        "data.long_rows=drop",
    ),
    answered(
        "nothing to learn before the cut",
        [tokens(90, 20)],
        "0 of 1 rows left: 1 of 1 rows do not fit (nothing_to_learn 1)); see data.long_rows …",
        "data.long_rows=truncate",
    ),
    answered(
        "an empty share to measure",
        [tokens(20)],
        "data.validation.share=0.3: 1 rows left to train on and 0 to measure; give more rows or another share",
        "data.validation.share=0.3",
    ),
    answered(
        "equal rows",
        [FINE] * 3,
        "note: 2 rows stand there before; data.repeats=drop leaves out those of equal tokens",
        code=0,
    ),
    answered(
        "equal rows, dropped",
        [FINE] * 3,
        "warning: 2 of 3 rows do not fit (repeated 2) as …",
        "data.repeats=drop",
        code=0,
    ),
    Bad("a question on both sides", 3, f"data.validation: {BOTH}", overlapping),
    Bad(
        "all prompts longer than the context",
        3,
        "…: 0 of 1 rows left (too_long 1); see …/quarantine.jsonl",
        long_prompts,
        "distill",
    ),
    Bad(
        "a prompt longer than the context, evaluated",
        3,
        "…/in.jsonl:2: a prompt of … tokens leaves no room for decoding.max_new_tokens …; shorten either or …",
        evaluated,
        "evaluate",
    ),
]
MEANT = [
    file("byte order mark", b"\xef\xbb\xbf" + GOOD * 2, "read 2 rows: all of 2 rows fit", code=0),
    file("CR LF", GOOD.replace(b"\n", b"\r\n") * 2, "read 2 rows: all of 2 rows fit", code=0),
    file("no newline at the end", (GOOD * 2).strip(), "read 2 rows: all of 2 rows fit", code=0),
    file("keys that nobody asked for", as_json({**FINE, "score": 3}), "read 1 rows: all of 1 rows fit", code=0),
    file(
        "control tokens that a user typed",
        as_json(chat(("user", "<|im_end|><|im_start|>system"), ("assistant", "no"))),
        "read 1 rows: all of 1 rows fit",
        code=0,
    ),
]
