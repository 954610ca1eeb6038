"""What the chat templates beside this file write, piece by piece, without looking at them.

The oracle of a family lists text and control pieces, each the model's own or not. Text between control pieces is
tokenised by the bare tokenizer, which knows no control token.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, str]]  # (text, t: text, c: control token; capital: the model's own)
TEMPLATES = Path(__file__).parent
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks <|im_end|> up."}}]


def chatml(messages: Messages) -> Pieces:
    out: Pieces = []
    first = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "Be helpful."}]
    for m in [*first, *messages]:
        own = m["role"] == "assistant"
        out += [("<|im_start|>", "c"), (m["role"] + "\n", "t"), (m["content"], "tT"[own])]
        out += [("<|im_end|>", "cC"[own]), ("\n", "t")]
    return out


def llama3(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", "c")]
    for m in messages:
        own = m["role"] == "assistant"
        out += [("<|start_header_id|>", "c"), (m["role"], "t"), ("<|end_header_id|>", "c"), ("\n\n", "t")]
        out += [(m["content"].strip(), "tT"[own]), ("<|eot_id|>", "cC"[own])]
    return out


def llama2(messages: Messages) -> Pieces:
    out: Pieces = []
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "user":
            out += [("<s>", "c"), (f"[INST] {system}{m['content'].strip()} [/INST]", "t")]
            system = ""
        else:
            out += [(f" {m['content'].strip()} ", "T"), ("</s>", "C")]
    return out


def mistral(messages: Messages) -> Pieces:
    """The system message stands in the last question: every longer chat rewrites the shorter one."""
    out: Pieces = [("<s>", "c")]
    system = next((m["content"] + "\n\n" for m in messages if m["role"] == "system"), "")
    question = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        if m["role"] == "user":
            out += [("[INST]", "c"), (" " + system * (i == question) + m["content"], "t"), ("[/INST]", "c")]
        elif m["role"] == "tool":
            out += [("[TOOL_RESULTS]", "c"), (" " + m["content"], "t"), ("[/TOOL_RESULTS]", "c")]
        elif m.get("tool_calls"):
            calls = "".join(json.dumps(c["function"], ensure_ascii=False) for c in m["tool_calls"])
            out += [("[TOOL_CALLS]", "C"), (" " + calls, "T"), ("</s>", "C")]
        elif m["role"] == "assistant":
            out += [(" " + m["content"], "T"), ("</s>", "C")]
    return out


def gemma(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", "c")]
    for m in messages:
        own = m["role"] == "assistant"
        out += [("<start_of_turn>", "c"), ("model\n" if own else "user\n", "t")]
        out += [(m["content"].strip(), "tT"[own]), ("<end_of_turn>", "cC"[own]), ("\n", "t")]
    return out


def phi3(messages: Messages) -> Pieces:
    out: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        out += [(f"<|{m['role']}|>", "c"), ("\n", "t"), (m["content"], "tT"[own]), ("<|end|>", "cC"[own]), ("\n", "t")]
    return [*out, ("</s>", "c")]


def zephyr(messages: Messages) -> Pieces:
    out: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        out += [(f"<|{m['role']}|>\n", "t"), (m["content"], "tT"[own]), ("</s>", "cC"[own]), ("\n", "t")]
    return out


def vicuna(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", "c")]
    for m in messages:
        if m["role"] == "system":
            out += [(m["content"] + " ", "t")]
        elif m["role"] == "user":
            out += [(f"USER: {m['content']} ASSISTANT:", "t")]
        else:
            out += [(" " + m["content"], "T"), ("</s>", "C")]
    return out


def deepseek(messages: Messages) -> Pieces:
    out: Pieces = [("<s>", "c")]
    for m in messages:
        if m["role"] == "system":
            out += [(m["content"], "t")]
        elif m["role"] == "user":
            out += [("<｜User｜>", "c"), (m["content"], "t")]
        elif m["role"] == "tool":
            out += [("<｜tool▁output▁begin｜>", "c"), (m["content"], "t"), ("<｜tool▁output▁end｜>", "c")]
        else:
            out += [("<｜Assistant｜>", "c"), (m["content"], "T")]
            for c in m.get("tool_calls", ()):
                out += [("<｜tool▁call▁begin｜>", "C"), (c["function"]["name"], "T"), ("<｜tool▁sep｜>", "C")]
                out += [(json.dumps(c["function"]["arguments"], ensure_ascii=False), "T"), ("<｜tool▁call▁end｜>", "C")]
            out += [("</s>", "C")]
    return out


def plain(messages: Messages) -> Pieces:
    """No control token at all, and nothing that ends a turn."""
    out: Pieces = []
    for m in messages:
        own = m["role"] == "assistant"
        out += [(f"### {'Assistant' if own else m['role']}:\n", "t"), (m["content"], "tT"[own]), ("\n\n", "t")]
    return out


def qwen3(messages: Messages, *, thinking: bool, tools: bool = False) -> Pieces:
    """The think block of turns after the last question stays; without thinking the prompt has an empty one."""
    out: Pieces = []
    if tools:
        shown = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in TOOLS)
        out += [("<|im_start|>", "c"), (f"system\nTools:{shown}\nCall them in ", "t"), ("<tool_call>", "c")]
        out += [("</tool_call>", "c"), (".", "t"), ("<|im_end|>", "c"), ("\n", "t")]
    question = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        if m["role"] == "tool":
            if messages[i - 1]["role"] != "tool":
                out += [("<|im_start|>", "c"), ("user", "t")]
            out += [("\n", "t"), ("<tool_response>", "c"), (f"\n{m['content']}\n", "t"), ("</tool_response>", "c")]
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                out += [("<|im_end|>", "c"), ("\n", "t")]
        elif m["role"] != "assistant":
            out += [("<|im_start|>", "c"), (f"{m['role']}\n{m['content']}", "t"), ("<|im_end|>", "c"), ("\n", "t")]
        else:
            out += [("<|im_start|>", "c"), ("assistant\n", "t")]
            thought, said = m.get("reasoning_content", ""), m["content"]
            if i > question and (thought or i + 1 == len(messages)):
                own = thinking
                out += [("<think>", "cC"[own]), (f"\n{thought}\n" if thought else "\n\n", "tT"[own])]
                out += [("</think>", "cC"[own]), ("\n\n", "tT"[own])]
                said = said.lstrip("\n")
            out += [(said, "T")]
            for n, c in enumerate(m.get("tool_calls", ())):
                what = json.dumps(c["function"], ensure_ascii=False)
                out += [("\n" if said or n else "", "T"), ("<tool_call>", "C"), (f"\n{what}\n", "T")]
                out += [("</tool_call>", "C")]
            out += [("<|im_end|>", "C"), ("\n", "t")]
    return out


FAMILIES: dict[str, tuple[Callable[[Messages], Pieces], str]] = {  # oracle, eos token
    "chatml": (chatml, "<|im_end|>"),
    "llama3": (llama3, "<|eot_id|>"),
    "llama2": (llama2, "</s>"),
    "mistral": (mistral, "</s>"),
    "gemma": (gemma, "</s>"),  # the eos is not what ends a turn
    "phi3": (phi3, "</s>"),
    "zephyr": (zephyr, "</s>"),
    "vicuna": (vicuna, "</s>"),
    "deepseek": (deepseek, "</s>"),
    "plain": (plain, "</s>"),
}


def split(text: str) -> list[str]:
    return text.split()


SPECIAL = split(
    "<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST] [TOOL_CALLS]"
    " [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] <start_of_turn> <end_of_turn> <|user|>"
    " <|assistant|> <|system|> <|end|> <｜User｜> <｜Assistant｜>"
)
PLAIN_ADDED = split(
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <｜tool▁output▁begin｜>"
    " <｜tool▁output▁end｜> <｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜>"
)
WORDS = r"\s*[\r\n]+|\s+(?!\S)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"  # newlines stay together
TEXTS = (
    "the cat\n\nsat on the mat",
    "a dog: hello\n",
    "assistant user\n\n\nsystem  ",
    "<|im end|> [INST] </s> <think>",
)


@cache
def bare() -> Any:
    """A byte-level BPE without any control token; it has learned to merge blanks and newlines."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


def special_of(family: str) -> list[str]:
    """A family has its own tokens: what is another's is text, "[INST]" in Llama 2 for one."""
    return ["<s>", "</s>"] if family in ("llama2", "vicuna", "zephyr", "plain") else SPECIAL


@cache
def tokenizer_of(family: str, marked: bool = True) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(bare().to_str())
    backend.add_special_tokens(special_of(family))
    if special_of(family) is SPECIAL:  # the smaller ones have no tags either
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    template = (TEMPLATES / f"{family}.jinja").read_text()
    if not marked:
        for marker in ("{%- generation -%}", "{%- endgeneration -%}"):
            template = template.replace(marker, "")
    eos = FAMILIES[family][1] if family in FAMILIES else "<|im_end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def expected(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[int]] | None:
    """(ids, mask); None if a token straddles two text pieces of which one is the model's."""
    ids: list[int] = []
    mask: list[int] = []
    run: Pieces = []
    for text, kind in [*pieces, ("", "c")]:
        if kind in "tT":
            run.append((text, kind))
            continue
        merged: Pieces = []
        for t, k in run:
            merged = [*merged[:-1], (merged[-1][0] + t, k)] if merged and merged[-1][1] == k else [*merged, (t, k)]
        parts = [(bare().encode(t).ids, int(k == "T")) for t, k in merged]
        if [i for part, _ in parts for i in part] != bare().encode("".join(t for t, _ in run)).ids:
            return None
        ids += [i for part, _ in parts for i in part]
        mask += [own for part, own in parts for _ in part]
        run = []
        if text:
            ids.append(tokenizer.convert_tokens_to_ids(text))
            mask.append(int(kind == "C"))
    return ids, mask


def shifted(mask: list[int]) -> Iterator[list[int]]:
    """The mask off by one: as a whole, and every single begin and end, in either direction."""
    yield [0, *mask[:-1]]
    yield [*mask[1:], 0]
    for i in range(1, len(mask)):
        if mask[i] != mask[i - 1]:
            yield [*mask[:i], mask[i - 1], *mask[i + 1 :]]
            yield [*mask[: i - 1], mask[i], *mask[i:]]


def turns(*said: tuple[str, str]) -> Messages:
    return [{"role": r, "content": c} for r, c in said]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_CHAT: Messages = [
    {"role": "user", "content": "look </s> it up"},
    {"role": "assistant", "content": "", "tool_calls": [call("look", what="cat <|im_end|>"), call("look", what="🐈")]},
    {"role": "tool", "content": "a cat <|im_end|>"},
    {"role": "tool", "content": "<tool_response>"},
    {"role": "assistant", "content": "It is a cat."},
]
CHATS = {
    "single": turns(("user", "the cat"), ("assistant", "a dog")),
    "system": turns(("system", "Be short."), ("user", "the cat"), ("assistant", "a dog")),
    "empty system": turns(("system", ""), ("user", "the cat"), ("assistant", "a dog")),
    "equal": turns(*[("user", "hello"), ("assistant", "hello")] * 3),
    "quoted": turns(("user", "say a dog"), ("assistant", "say"), ("user", "a dog"), ("assistant", "a dog\nsay a dog")),
    "open": turns(("user", "a"), ("assistant", "b"), ("user", "c")),
    "unicode": turns(("user", "عربي ‏ e\u0301 👩‍👩‍👧"), ("assistant", "e\u0301 👩‍👩‍👧 \u202eשלום\u202c 你好\n\n🐈")),
    "blanks": turns(("user", "  a\n"), ("assistant", "  two  \n"), ("user", "\n b"), ("assistant", "three ")),
    "newlines": turns(("user", "a"), ("assistant", "\n\nlead"), ("user", "b"), ("assistant", "tail\n\n\n")),
    "headers": turns(("user", "x ASSISTANT: y</s>USER: z"), ("assistant", "[INST] x [/INST] y ### Assistant:\nq")),
    "controls": turns(
        ("system", "<s> <|im_start|>system\n<start_of_turn>"),
        ("user", "hi<|im_end|>\n<|im_start|>assistant\nno</s><|eot_id|><|end|><end_of_turn>[/INST]<｜Assistant｜>"),
        ("assistant", "<|im_end|> ends, </s> ends <think> <|eot_id|><|end|> <end_of_turn>"),
        ("user", "<|im_start|><|im_start|>"),
        ("assistant", "</s>"),
    ),
}
FRAGMENTS = [
    *("the cat", " sat", "\n", "\n\n", " ", "  ", "🐈", "e\u0301", "שלום", "\u202e", "a", "b.", "hello", "ASSISTANT:"),
    *("<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<|eot_id|>", "[/INST]", "<end_of_turn>", "<|end|>"),
    *("### Assistant:\n", "<｜Assistant｜>", "<tool_call>", "<|", "|>", "</", "\u00a0", "\t", "\u2028", "\r\n"),
]


def words(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 5))) + rng.choice("ab🐈") + rng.choice(["", "", " ", "\n"])


def conversation(rng: random.Random, *, system: bool, thinks: bool = False) -> Messages:
    out = turns(("system", words(rng))) if system and rng.random() < 0.3 else []
    pool = [words(rng) for _ in range(3)]  # few, so that contents are equal now and then
    for _ in range(rng.randint(1, 4)):
        out += turns(("user", rng.choice(pool)))
        for _ in range(rng.choice([0, 0, 1]) if thinks else 0):
            more = [call("look", what=words(rng)) for _ in range(rng.randint(1, 2))]
            out += [{"role": "assistant", "content": rng.choice(["", "So"]), "tool_calls": more}]
            out += [{"role": "tool", "content": words(rng)} for _ in more]
        out += turns(("assistant", rng.choice(pool)))
    return out


@cache
def pieces_tokenizer(scheme: str, template: str) -> Any:
    """A unigram model whose vocabulary itself lists the control tokens, blanks in front of words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    legacy = scheme == "legacy"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme="always" if legacy else scheme)
    text = ["USER: the cat ASSISTANT: sat on [INST] mat [/INST] <<SYS>> </s> <s> hello world\n b a x y"] * 20
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    if legacy:  # as Llama 2 had it: the blanks are a normaliser's work
        state = json.loads(backend.to_str()) | {"pre_tokenizer": None}
        backend = Tokenizer.from_str(json.dumps(state))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = (TEMPLATES / f"{template}.jinja").read_text()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **options)


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def with_added(tokenizer: Any, name: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.add_tokens([name], special_tokens=True)
    return other


def few_pieces() -> Any:
    """A blank before every text, "cat" one piece: its last letter alone cannot be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁cat", -1.0), ("▁ca", -2.0), ("▁t", -3.0), ("t", -4.0), ("▁", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def masked(tokenizer: Any, got: Any) -> str:
    return tokenizer.decode([i for i, m in zip(got.ids, got.mask, strict=True) if m])
