"""docs/reference.md from what the configuration is made of: every verb, group, key, type and default, with the comment
that stands beside the key in its yaml, or else beside the field in its dataclass.

    python -m draftsmith.reference docs/reference.md
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from draftsmith import config, schemas
from draftsmith.cli import VERBS

COMMAND = "python -m draftsmith.reference docs/reference.md"
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
LONGEST = 60  # characters of a value in a table; a longer one is told as {…} or […]
HEADER = f"""# Reference

Every verb, group and key, generated from the dataclasses in `src/` and the yamls in `conf/` by
`{COMMAND}`; a test compares this page with them. A key is given as `key=value`
behind the verb, a choice of a group as `group=choice` ([configuration.md](configuration.md)); `draftsmith VERB --help`
shows the values in force.
"""


def main() -> None:
    if len(sys.argv) != 2:
        print(f"usage: {COMMAND}", file=sys.stderr)
        sys.exit(2)
    Path(sys.argv[1]).write_text(page())


def page() -> str:
    """The whole of docs/reference.md."""
    parts = [HEADER, "## Verbs\n"]
    parts += [_verb(name) for name in VERBS]
    parts.append("## Groups\n")
    parts += [_group(name) for name in schemas.choices()]
    return "\n".join(parts)


def _verb(name: str) -> str:
    text = _yaml(name)
    groups = schemas.defaults_of(name)
    node = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    assert isinstance(node, dict)
    said, top = comments(text), schemas.TOP.get(name)
    fields = typing.get_type_hints(top) if top else {}
    inner = {key: schema for (verb, key), schema in schemas.OWN.items() if verb == name}
    rows = []
    for key, value in ((str(k), v) for k, v in node.items()):
        if key in inner:
            rows += list(_rows(inner[key], f"{key}.", value, said))
        elif key != "defaults" and key not in groups:
            kind = _type(fields[key]) if key in fields else _type(type(value)) if value not in (None, "???") else ""
            rows.append((key, kind, _value(value), said.get(key, "")))
        elif isinstance(value, Mapping):  # what this verb says of a group
            rows += [(f"{key}.{k}", "", _value(v), said.get(f"{key}.{k}", "")) for k, v in value.items()]
    chosen = [f"[`{g}`](#group-{g})" + (f"={_chosen(g, n)}" if n else "") for g, n in groups.items()]
    lines = [f"### Verb {name}\n", f"`draftsmith {name}`: {VERBS[name]}.\n"]
    if chosen:
        lines.append(f"Groups, with what is chosen if nothing is said: {', '.join(chosen)}.\n")
    return "\n".join([*lines, *_table(rows)])


def _chosen(group: str, names: list[str]) -> str:
    return f"[{','.join(names)}]" if group == "head" else names[0]


def _group(name: str) -> str:
    lines = [f"### Group {name}\n"]
    verbs = [f"[{verb}](#verb-{verb})" for verb in VERBS if name in schemas.defaults_of(verb)]
    lines.append(f"Offered by {', '.join(verbs)}.\n")
    found = schemas.choices()[name]
    if name in schemas.TARGETED:
        for one in found:
            lines += _targeted(name, one)
        return "\n".join(lines)
    lines += ["| choice | |", "|---|---|"]
    heads = {one: header(_yaml(f"{name}/{one}")) for one in found}
    if name == "experiment":  # recipes.md has the rest
        heads = {one: text.split(". ")[0].removesuffix(".") + "." for one, text in heads.items()}
    lines += [f"| `{one}` | {_cell(text)} |" for one, text in heads.items()]
    lines.append("")
    if name in schemas.SCHEMAS:
        shown = (
            OmegaConf.to_container(OmegaConf.load(io.StringIO(_yaml(f"{name}/default")))) if "default" in found else {}
        )
        key = schemas.INSIDE.get(name, name)
        lines += _table(list(_rows(schemas.SCHEMAS[name], f"{key}.", shown, _said())))
    return "\n".join(lines)


@functools.cache
def _said() -> dict[str, str]:
    """dotted key -> its comment in the yamls of the groups; `default` has the last word in its group."""
    found: dict[str, str] = {}
    for group, names in schemas.choices().items():
        for one in sorted(names, key=lambda n: n == "default"):
            key = schemas.INSIDE.get(group, group)
            found |= {f"{key}.{k}": v for k, v in comments(_yaml(f"{group}/{one}")).items()}
    return found


def _targeted(group: str, name: str) -> list[str]:
    text = _yaml(f"{group}/{name}")
    node = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    cls = config.target(node, f"{group}.{name}")
    key = f"heads.{name}" if group == "head" else group
    said = {f"{key}.{k}": v for k, v in comments(text).items()}
    return [f"#### {group}={name}\n", f"{header(text)}\n", *_table(list(_rows(cls.Config, f"{key}.", node, said)))]


def _rows(schema: type, prefix: str, shown: Any, said: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, what) of a dataclass's fields and of those inside them; shown: the yaml's own values."""
    hints, beside = typing.get_type_hints(schema), field_comments(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        inner = _dataclass_in(hint)
        value = shown.get(field.name, _default(field)) if isinstance(shown, Mapping) else _default(field)
        what = said.get(key) or beside.get(field.name, "")
        if inner is None:
            yield key, _type(hint), _value(value), what
            continue
        several = typing.get_origin(hint) is dict
        if several or type(None) in typing.get_args(hint):
            yield key, "by name" if several else "group or null", _value(value), what
        if not several and value is None:
            value = {}
        yield from _rows(inner, f"{key}.{'<name>.' * several}", {} if several else value, said)


def comments(text: str) -> dict[str, str]:
    """dotted key -> the comment beside it in a yaml, with the comment lines below that go on with it."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # (indent, key) of the mappings that a line is in
    last, edge = "", 0
    for line in text.splitlines():
        entry = re.match(r"( *)([\w.]+):(?: |$)", line)
        bare = re.match(r"( *)# ?(.*)", line)
        if bare and last and len(bare[1]) > edge:
            found[last] = f"{found[last]} {bare[2].strip()}"
            continue
        if not entry:
            last = ""
            continue
        edge = len(entry[1])
        above = [(indent, key) for indent, key in above if indent < edge]
        name = ".".join([*(key for _, key in above), entry[2]])
        above.append((edge, entry[2]))
        comment = _comment(line)
        last = name if comment else ""
        if comment:
            found[name] = comment
    return found


def _comment(line: str) -> str:
    quoted = re.match(r"""(?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*?\s#\s?(.*)$""", line)
    return quoted[1].strip() if quoted else ""


def header(text: str) -> str:
    """The comment at a yaml's top, as one paragraph."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def field_comments(schema: type) -> dict[str, str]:
    """field -> the comment beside it in the source of the dataclass, or of the one it comes from; else the comment
    lines right above it."""
    found: dict[str, str] = {}
    for one in reversed(schema.__mro__):
        if dataclasses.is_dataclass(one):
            found |= _own_comments(one)
    return found


def _own_comments(schema: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    written = {
        t.start[0]: (t.start[1], t.string.removeprefix("#").strip()) for t in tokens if t.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    bare = {n for n in written if lines[n - 1].lstrip().startswith("#")}
    found: dict[str, str] = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        end = node.end_lineno or node.lineno
        told = [written[n][1] for n in range(node.lineno, end + 1) if n in written]
        line = node.lineno - 1
        above: list[str] = []
        while not told and line in bare and written[line][0] == node.col_offset:
            above.insert(0, written[line][1])
            line -= 1
        if told or above:
            found[node.target.id] = " ".join(told or above)
    return found


def _dataclass_in(hint: Any) -> type | None:
    several = isinstance(hint, types.UnionType) or typing.get_origin(hint) is dict
    options = typing.get_args(hint) if several else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _type(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        return " or ".join(_type(one) for one in inside)
    if origin is typing.Literal:
        return " or ".join(f"`{one}`" for one in inside)
    if origin in (list, tuple):
        return f"list of {_type(inside[0])}s" if inside[0] in (int, float, str) else "list"
    if origin is dict or hint is dict:
        return "group"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made
    return "???"


def _value(value: Any) -> str:
    """A default as one types it; "" where it must be given."""
    if value == "???":
        return "must be given"
    if isinstance(value, str):
        return f"`{value}`" if value else "`''`"
    text = json.dumps(value, ensure_ascii=False).replace('"', "") if not isinstance(value, float) else f"{value:g}"
    if len(text) > LONGEST:
        text = "{…}" if isinstance(value, Mapping) else "[…]"
    return f"`{text}`"


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    if not rows:
        return ["It has no keys.\n"]
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {_cell(kind)} | {_cell(value)} | {_cell(what)} |" for key, kind, value, what in rows]
    return [*lines, ""]


def _cell(text: str) -> str:
    """As a cell of a table: no bar that ends it, and outside of `code` nothing that reads as HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _yaml(name: str) -> str:
    return schemas.CONF.joinpath(*f"{name}.yaml".split("/")).read_text()


if __name__ == "__main__":
    main()
