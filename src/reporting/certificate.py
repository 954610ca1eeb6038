"""A certificate as a page for people, and as lines for a terminal. Everything in them is in certificate.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHOWN = 20  # differences per table; certificate.json has all
CAPTION = """Each cell: the p-value that the counts with and without drafts come from one distribution / that the
counts come from the base's own, computed in fp64. `-`: no token but one is drawn often enough there to tell anything.
**Bold**: does not fit."""


def lines(told: Mapping[str, Any]) -> str:
    """One or more lines per head."""
    found = []
    for name, head in told["heads"].items():
        found.append(f"{name}: {'certified' if head['certified'] else 'NOT certified'}")
        if head["tests"] != "not run":
            greedy, tests = list(head["greedy"].values()), list(_tests(head))
            found[-1] += (
                f"; {greedy[0]['tokens']:,} tokens of {greedy[0]['prompts']} prompts,"
                f" {sum(g['mismatches'] for g in [*greedy, head['batch']])} mismatches,"
                f" {sum(g['near_ties'] for g in [*greedy, head['batch']])} near ties; {len(tests)} counts of sampled"
                f" tokens, {sum(t['rejected'] for t in tests)} do not fit"
            )
        found += [f"{name}: {reason}" for reason in head["reasons"]]
    return "\n".join(found)


def page(told: Mapping[str, Any]) -> str:
    """certificate.md."""
    c, base = told["compared"], told["base"]
    names = " and ".join(f"`{name}`" for name in told["heads"])
    parts = [
        "# Certificate",
        f"Does decoding with {names} return what the base `{base['path']}` returns by itself? Found on {told['date']}.",
        _table(("head", "result", "because"), [_verdict(name, head) for name, head in told["heads"].items()]),
        "## What was tested",
        _tested(c, told),
    ]
    for name, head in told["heads"].items():
        parts += [f"## {name}", *_head(head, told)]
    plain = told["autoregressive"]
    if plain is not None:
        parts += [
            "## Without a head",
            "The engine's plain decoding, which the heads are compared with. Its counts are tested against the base's"
            " own distribution only.",
            *_greedy({f"against {who}": g for who, g in plain["greedy"].items()}),
            _sampling({"plain": plain["sampling"]}),
        ]
    parts += ["## What it is of", _identity(told), "## Again", _again(told)]
    return "\n\n".join(parts) + "\n"


def _verdict(name: str, head: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        "**certified**" if head["certified"] else "**not certified**",
        "; ".join(head["reasons"]) or "every test passed",
    )


def _tested(c: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    if told["autoregressive"] is None:
        return "Nothing: what may change the text has nothing to be compared with."
    cut = "".join(f", top_{k} {c[f'top_{k}']}" for k, none in (("k", None), ("p", 1.0)) if c[f"top_{k}"] != none)
    alone = f"{c['alpha'] / max(c['p_values'], 1):.1e}"
    return f"""- **Greedy**: {c["prompts"]} prompts, at most {c["max_new_tokens"]} new tokens each, compared token by
  token with the engine's plain decoding and with Hugging Face `generate`; and in batches of {c["batch_size"]} with one
  by one. At a difference the base is asked in fp64: it is a near tie if its best logit is above the emitted token's
  by at most {c["near_tie"]:g} of the largest, else a mismatch; then decoding goes on from the reference's text. No
  mismatch may be, and one near tie per {c["tokens_per_near_tie"]:,} tokens (one in fewer).
- **Sampled**: after {len(told["prefixes"])} prefixes, each a prompt and some of the base's own text, {c["draws"]} times
  with drafts and {c["draws"]} times without, at temperature {c["temperature"]:g}{cut}, every time with a seed of its
  own. The prefixes are where the base is least sure of the next token, or of the one after the likeliest next token, so
  that counts tell something. The {c["p_values"]} p-values are held against alpha = {c["alpha"]:g} together (Holm's
  method: the least of them against {alone})."""


def _head(head: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    if head["tests"] == "not run":
        yield "; ".join(head["reasons"]) + "."
        return
    tree = head["tree"]
    yield f"A {head['role']} ({head['kind']}). It drafts a tree of this kind: {_tree(tree)}."
    size = head["batch"]["batch_size"]
    rows = {f"against {who}": g for who, g in head["greedy"].items()}
    yield from _greedy({**rows, f"batches of {size} against one by one": head["batch"]})
    ways = [
        (way, _tree(r["tree"]), f"{r['accepted_drafts_per_step']:.2f}", str(len(r["tests"])),
         f"{min(_p_values(r['tests'])):.3g}", str(sum(t["rejected"] for t in r["tests"])))
        for way, r in head["sampling"].items()
    ]  # fmt: skip
    yield _table(("drafts", "tree", "kept per step", "counts", "least p", "do not fit"), ways)
    yield _sampling({way: r["tests"] for way, r in head["sampling"].items()})
    yield CAPTION


def _greedy(compared: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield _table(
        ("greedy", "prompts", "tokens", "mismatches", "near ties"),
        [
            (who, str(g["prompts"]), f"{g['tokens']:,}", str(g["mismatches"]), str(g["near_ties"]))
            for who, g in compared.items()
        ],
    )
    listed = [(who, d) for who, g in compared.items() for d in g["differences"]]
    if listed:
        header = (
            "",
            "",
            "prompt",
            "position",
            "expected",
            "its logit",
            "emitted",
            "its logit",
            "gap",
            "of the largest",
        )
        yield _table(header, [_difference(who, d) for who, d in listed[:SHOWN]])
    if len(listed) > SHOWN:
        yield f"… and {len(listed) - SHOWN} more in certificate.json."


def _difference(who: str, d: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    kind = "near tie" if d["near_tie"] else "mismatch"
    tokens = ["ended" if d[key] is None else str(d[key]) for key in ("expected", "emitted")]
    logits = [number(d[key], ".9g") for key in ("expected_logit", "emitted_logit")]
    gap = number(d["gap"], ".2e"), number(d["relative"], ".1e")
    return kind, who, str(d["prompt"]), str(d["position"]), tokens[0], logits[0], tokens[1], logits[1], *gap


def _sampling(by_way: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row per prefix and token, a column per way of drafting."""
    found: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for way, tests in by_way.items():
        for test in tests:
            found.setdefault((test["prefix"], test["token"]), {})[way] = test
    rows = [
        (f"{prefix}", f"{'first' if token == 1 else 'second'}", f"{max(t['cells'] for t in of.values())}",
         *(_cell(of.get(way)) for way in by_way))
        for (prefix, token), of in sorted(found.items())
    ]  # fmt: skip
    return _table(("prefix", "token", "cells", *by_way), rows)


def _cell(test: Mapping[str, Any] | None) -> str:
    if test is None or test["cells"] < 2:
        return "-"
    text = " / ".join(f"{p:.3g}" for p in _p_values([test]))
    return f"**{text}**" if test["rejected"] else text


def _identity(told: Mapping[str, Any]) -> str:
    base, device = told["base"], told["device"]
    rows = [
        ("base", f"`{base['path']}`" + (f" at {base['revision']}" if base["revision"] else "")),
        ("dtype", base["dtype"]),
    ]
    rows += [(f"base, {k.removesuffix('_sha256')}", f"`{v}`") for k, v in base.items() if k.endswith("_sha256") and v]
    for name, head in told["heads"].items():
        rows.append((f"{name}, weights", f"`{head['weights_sha256']}`"))
        if head.get("drafter"):
            rows.append((f"{name}, its drafter", f"{head['drafter']['kind']} `{head['drafter']['sha256']}`"))
    rows.append(("prompts", f"`{told['compared']['prompts_sha256']}`"))
    rows.append(("versions", ", ".join(f"{name} {v}" for name, v in told["versions"].items() if v)))
    rows.append(("platform", f"{told['platform']}; {device['type']} ({device['name']}), {device['threads']} threads"))
    return _table(("", "sha256, or what"), rows)


def _again(told: Mapping[str, Any]) -> str:
    return (
        f"```bash\n{' '.join(told['command'])}\n```\n\n`…` stands for your own folders. prompts.seed was"
        f" {told['seeds']['prompts']}, decoding.seed {told['seeds']['decoding']}; the seeds of the"
        f" {told['seeds']['draws']:,} draws follow from the latter. certificate.json has every setting, count and"
        " difference."
    )


def _tests(head: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for way in head["sampling"].values():
        yield from way["tests"]


def _p_values(tests: Sequence[Mapping[str, Any]]) -> list[float]:
    return [t[key] for t in tests for key in ("two_sample", "exact") if t[key] is not None]


def _tree(tree: Mapping[str, Any]) -> str:
    return f"{tree['kind']}, {tree['nodes']} nodes, {tree['depth']} deep"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    told = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in told)
