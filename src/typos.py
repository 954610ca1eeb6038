"""What to say of overrides that Hydra cannot read, in one line that names the one at fault."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

from hydra.errors import MissingConfigException
from omegaconf.errors import MissingMandatoryValue

# What Hydra reads as something else than the name of a choice, or a list of them.
NO_CHOICE = re.compile(r"null|true|false|nan|[-+]?inf|[-+]?[\d_.]+(e[-+]?\d+)?|\{.*\}", re.IGNORECASE)


def unread(e: Exception, overrides: Sequence[str]) -> str:
    """What Hydra says of overrides that it does not foresee, such as a number for a choice."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key and NO_CHOICE.fullmatch(value) and (options := choices(key)):
            return f"{override}: no such choice; there are {', '.join(options)}"
    at = next((o for o in overrides if not re.match(r"[-+~]*[\w.@/$]+", o)), " ".join(overrides))
    why = ": ".join(first_line(one) for one in (e, e.__cause__) if isinstance(one, Exception))
    return f"{at}: no override that Hydra can read ({why}); write key=value"


def choices(group: str) -> list[str]:
    """The yamls of a folder of conf; none where there is no such folder."""
    folder = resources.files("draftsmith.conf").joinpath(*group.split("/"))
    if not group.strip("/.") or not folder.is_dir():
        return []
    return sorted(p.stem for p in map(Path, map(str, folder.iterdir())) if p.suffix == ".yaml")


def first_line(e: Exception) -> str:
    return next((line for line in str(getattr(e, "msg", None) or e).splitlines() if line.strip()), repr(e))


def explain(e: Exception, leaves: Callable[[], Sequence[str]]) -> str:
    """Hydra's message as one line that names the nearest valid spelling. leaves: gives the keys that there are."""
    if isinstance(e, MissingConfigException) and e.missing_cfg_file:
        group, _, name = str(e.missing_cfg_file).rpartition("/")
        options = e.options or choices(group)  # Hydra tells none of a list, head=[…]
        return f"{group}: no such choice '{name}'{nearest(name, options)}; there are {', '.join(options)}"
    if isinstance(e, MissingMandatoryValue):
        return f"{e.full_key}: must be given, as {e.full_key}=…"
    text = first_line(e)
    missing = getattr(e.__cause__, "full_key", None) or getattr(e, "full_key", None)
    if missing and "not in struct" in f"{text} {e.__cause__}":
        known = {".".join(k.split(".")[: i + 1]) for k in leaves() for i in range(k.count(".") + 1)}
        return f"{missing}: no such key{nearest(str(missing), sorted(known))}"
    if override := getattr(e, "override", None):
        return f"{override}: no override that Hydra can read ({text}); write key=value, in quotes"
    return f"{missing}: {text}" if missing and str(missing) not in text else text


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
