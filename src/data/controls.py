"""Control tokens that somebody typed in text stay text: the ids of a text, and the text of ids."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
import weakref
from collections.abc import Sequence
from typing import Any

from draftsmith.errors import RowError

TYPED, WRITTEN, PRIVATE = 0xF0000, 0x100000, re.compile("[\U000f0000-\U0010ffff]")  # the private-use planes

BESIDE = "control tokens beside private-use characters; drop the row"


class Controls:
    """A tokenizer's control tokens: the special ones, and the added ones that its model has not learned from text,
    that the template writes or that look so. Other added ones ("\\n\\n", "<table>" in Gemma) are ordinary text.

    Typed ones become private-use characters before the template runs. Behind it the roles are swapped: a second
    tokenizer, equal but for the names of its control tokens, which are private-use characters, sees the
    template's own tokens under those names and the typed ones as they were typed, that is, as text. One
    tokenisation of the whole, so blanks in front of pieces fall as they ordinarily do.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = weakref.ref(tokenizer)
        special, backend = set(tokenizer.all_special_tokens), getattr(tokenizer, "backend_tokenizer", None)
        learned = backend.get_vocab_size(with_added_tokens=False) if backend else 0
        names = {
            t.content: i
            for i, t in tokenizer.added_tokens_decoder.items()
            if t.special
            or t.content in special
            or (t.content.strip() and (i >= learned or t.content in template or t.content.startswith(("<|", "<｜"))))
        }
        self.names, self.id_set, self.size = names, frozenset(names.values()), len(tokenizer)
        self.index = {name: k for k, name in enumerate(names)}
        longest = sorted(names, key=len, reverse=True)  # as the tokenizer matches: leftmost, then longest
        self.pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._shadow: tuple[Any, dict[int, int]] | None = None

    def protect(self, text: str, where: str) -> tuple[str, bool]:
        """(the text without typed control tokens, whether there were any)."""
        safe = self.pattern.sub(lambda m: chr(TYPED + self.index[m.group()]), text)
        if safe != text and PRIVATE.search(text):
            raise RowError(where, "control", BESIDE)
        return safe, safe != text

    def ids(self, text: str, typed: bool, where: str) -> list[int]:
        """Ids of a protected text, no specials added; typed: whether anything in the row was protected."""
        tokenizer = self.tokenizer()
        assert tokenizer is not None
        ids = self._retyped(tokenizer, text, where) if typed else tokenizer(text, add_special_tokens=False)["input_ids"]
        # more of them than the text spells: two texts met, or the tokenizer's normaliser made them (full-width "＜")
        if sum(i in self.id_set for i in ids if i != tokenizer.unk_token_id) > len(self.pattern.findall(text)):
            raise RowError(where, "control", "text that this tokenizer turns into control tokens; drop the row")
        return list(ids)

    def _retyped(self, tokenizer: Any, text: str, where: str) -> list[int]:
        """Ids of a text with protected control tokens, these as text."""
        names = list(self.names)
        plain = PRIVATE.sub(lambda m: names[ord(m.group()) - TYPED], text)
        swapped = self.pattern.sub(lambda m: chr(WRITTEN + self.index[m.group()]), text)
        swapped = re.sub("[\U000f0000-\U000fffff]", lambda m: names[ord(m.group()) - TYPED], swapped)
        ids: list[int] = []
        with contextlib.suppress(Exception):  # no fast tokenizer, or one that cannot be rebuilt
            self._shadow = self._shadow or self._build(tokenizer)
            shadow, back = self._shadow
            ids = [back.get(i, i) for i in shadow.encode(swapped, add_special_tokens=False).ids]
        escaped = "\\udb80" in text.lower()  # the template has escaped our characters as JSON
        if escaped or _squeeze(decode(tokenizer, ids)) != _squeeze(plain):
            raise RowError(where, "control", "this tokenizer cannot write the control tokens in the text as text")
        return ids

    def _build(self, tokenizer: Any) -> tuple[Any, dict[int, int]]:
        """(the tokenizer under swapped names, its control ids to ours)."""
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        new = {name: chr(WRITTEN + k) for name, k in self.index.items()}
        for token in state["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = state["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {new.get(name, name): i for name, i in vocab.items()}
        else:
            model["vocab"] = [[new.get(name, name), score] for name, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
        state["post_processor"] = None
        shadow: Any = Tokenizer.from_str(json.dumps(state))
        return shadow, {shadow.token_to_id(new[name]): i for name, i in self.names.items()}


_KNOWN: weakref.WeakKeyDictionary[Any, dict[str, Controls]] = weakref.WeakKeyDictionary()


def controls(tokenizer: Any, template: str) -> Controls:
    known = _KNOWN.setdefault(tokenizer, {})
    if template not in known or known[template].size != len(tokenizer):
        known[template] = Controls(tokenizer, template)
    return known[template]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens and blanks as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def form(text: str) -> str:
    """The text as texts are compared: many tokenizers normalise theirs (NFC, NFKC)."""
    return unicodedata.normalize("NFKC", text)


def _squeeze(text: str) -> str:
    """Without blanks: tokenizers put them in front of pieces, and some control tokens swallow them."""
    return "".join(form(text).replace("▁", " ").split())
