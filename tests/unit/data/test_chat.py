"""From chats to ids and masks, against families written down piece by piece (templates/oracle.py)."""

import random
from typing import Any

import oracle as o
import pytest

from draftsmith.data import chat
from draftsmith.data.chat import ChatConfig
from draftsmith.data.script import Facts
from draftsmith.errors import ConfigError, DataError, RowError

CHATS, FAMILIES, TOOL_CHAT, TOOLS = o.CHATS, o.FAMILIES, o.TOOL_CHAT, o.TOOLS
turns, bare, expected, tokenizer_of, with_template = o.turns, o.bare, o.expected, o.tokenizer_of, o.with_template
masked = o.masked
Messages = list[dict[str, Any]]
Pieces = list[tuple[str, str]]


def check(tokenizer: Any, messages: Messages, pieces: Pieces, how: str, **options: Any) -> bool:
    """Whether encode gave what the oracle says; where a token straddles a boundary it must refuse (False)."""
    want = expected(tokenizer, pieces)
    if want is None:
        with pytest.raises(RowError) as e:
            chat.encode(tokenizer, messages, "here", **options)
        assert e.value.reason == "mask"
        return False
    got = chat.encode(tokenizer, messages, "here", **options)
    assert tokenizer.decode(got.ids) == "".join(t for t, _ in pieces)
    assert (got.ids, got.mask, got.how) == (*want, how)
    assert all(got.mask != wrong for wrong in o.shifted(want[1]))
    return True


MARKED = [(f, m) for f in FAMILIES for m in (True, False) if m is False or f != "mistral"]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(("family", "marked"), MARKED)
def test_a_family(family: str, marked: bool, name: str) -> None:
    if family == "gemma" and CHATS[name][0]["role"] == "system":
        with pytest.raises(RowError, match="no system role here") as e:
            chat.encode(tokenizer_of(family, marked), CHATS[name], "here")
        assert e.value.reason == "template"
        return
    how = "template" if marked else "boundaries"
    found = check(tokenizer_of(family, marked), CHATS[name], FAMILIES[family][0](CHATS[name]), how)
    assert found or name in ("blanks", "newlines", "unicode", "controls"), "only blanks may straddle"


@pytest.mark.parametrize(("family", "marked"), [("mistral", False), ("deepseek", True), ("deepseek", False)])
def test_tool_turns(family: str, marked: bool) -> None:
    """A call is the model's own from its first token to the end of the turn; the tool's answer is not."""
    how = "template" if marked else "boundaries"
    assert check(tokenizer_of(family, marked), TOOL_CHAT, FAMILIES[family][0](TOOL_CHAT), how)
    longer = [*TOOL_CHAT, *CHATS["single"]]
    assert check(tokenizer_of(family, marked), longer, FAMILIES[family][0](longer), how)


@pytest.mark.parametrize(("family", "marked"), MARKED)
def test_random_chats(family: str, marked: bool) -> None:
    rng, found = random.Random(family), 0
    how = "template" if marked else "boundaries"
    for _ in range(40):
        messages = o.conversation(rng, system=family != "gemma")
        found += check(tokenizer_of(family, marked), messages, FAMILIES[family][0](messages), how)
    assert found >= 15


@pytest.mark.parametrize("thinking", [True, False])
def test_random_chats_that_think(thinking: bool) -> None:
    """Calls, tool results, reasoning that history loses; with thinking off nobody reasons."""
    rng, found, tokenizer = random.Random(3), 0, tokenizer_of("qwen3")
    for _ in range(60):
        messages = o.conversation(rng, system=True, thinks=True)
        for m in messages:
            if thinking and m["role"] == "assistant" and rng.random() < 0.5:
                m["reasoning_content"] = rng.choice(["hm </think> <|im_end|> 🐈", "so so"])
        tools = TOOLS if rng.random() < 0.5 else []
        want = o.qwen3(messages, thinking=thinking, tools=bool(tools))
        found += check(tokenizer, messages, want, "boundaries", chat=ChatConfig(thinking=thinking), tools=tools)
    assert found >= 30


@pytest.mark.parametrize("family", [f for f, marked in MARKED if marked])
def test_the_markers_say_what_transformers_reads_from_them(family: str) -> None:
    tokenizer, options = tokenizer_of(family), {"tokenize": True, "return_dict": True}
    for messages in (CHATS["single"], CHATS["equal"], CHATS["open"]):
        out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        got = chat.encode(tokenizer, messages, "here")
        assert (got.ids, got.mask) == (list(out["input_ids"]), list(out["assistant_masks"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_chat_is_the_whole_chat(family: str) -> None:
    """Turn by turn, prompt, answer and what is between give the longer prompt: with the template's end, without
    any, and with another end, which then stands for the template's. Blanks that a template trims: a new row."""
    tokenizer, rng, found = tokenizer_of(family, False), random.Random(family), 0
    for _ in range(40):
        messages = o.conversation(rng, system=family not in ("gemma", "mistral"))
        if expected(tokenizer, FAMILIES[family][0](messages)) is None:
            continue
        for i in (i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"):
            prompt, longer = (chat.prompt_ids(tokenizer, messages[:n]) for n in (i, i + 2))
            got = chat.encode(tokenizer, messages[: i + 1], "here")
            end = len(got.mask) - got.mask[::-1].index(1)
            answer = got.ids[len(prompt) : end]
            step = (tokenizer, messages[: i + 1], messages[i + 1 : i + 2])
            more = chat.between_ids(*step, answer, "here", ChatConfig())
            trimmed = messages[i]["content"] != messages[i]["content"].strip()
            assert (more is None) == (trimmed and family in ("llama3", "gemma")) or (trimmed and family == "llama2")
            if more is None:
                continue
            assert prompt + answer + more == longer
            said = answer if family == "plain" else answer[:-1]
            assert prompt + said + chat.between_ids(*step, said, "here", ChatConfig()) == longer
            other = chat.between_ids(*step, [*said, 7], "here", ChatConfig(), eos_ids={7})
            assert prompt + answer + other == longer
            found += 1
    assert found >= 10


def test_what_cannot_be_replayed() -> None:
    """History without the system message, the think block, or the calls as they were: a new row."""
    coming = turns(("user", "and?"))
    assert chat.between_ids(tokenizer_of("mistral"), CHATS["system"], coming, [5], "here", ChatConfig()) is None
    thought = turns(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"))
    for thinking in (True, False):
        config = ChatConfig(thinking=thinking)
        assert chat.between_ids(tokenizer_of("qwen3"), thought, coming, [5], "here", config) is None
    assert chat.between_ids(tokenizer_of("deepseek"), TOOL_CHAT[:2], TOOL_CHAT[2:4], [5], "here", ChatConfig()) is None
    # what was not thought stays, so the row goes on
    short = turns(("user", "a"), ("assistant", "b"))
    config = ChatConfig(thinking=True)
    prompt = chat.prompt_ids(tokenizer_of("qwen3"), short[:1], "here", config)
    answer = [*bare().encode("b").ids, tokenizer_of("qwen3").eos_token_id]
    more = chat.between_ids(tokenizer_of("qwen3"), short, coming, answer, "here", config)
    assert prompt + answer + (more or []) == chat.prompt_ids(tokenizer_of("qwen3"), [*short, *coming], "x", config)


def test_thinking_must_be_said() -> None:
    tokenizer = tokenizer_of("qwen3")
    assert chat.can_think(tokenizer)
    assert not chat.can_think(tokenizer_of("chatml"))
    for go in (chat.prompt_ids, lambda t, m: chat.encode(t, m, "here")):
        with pytest.raises(ConfigError, match=r"^data\.chat\.thinking: this template can think; say true or false$"):
            go(tokenizer, CHATS["single"])
    on, off = (chat.prompt_ids(tokenizer, CHATS["single"][:1], "x", ChatConfig(thinking=t)) for t in (True, False))
    assert tokenizer.decode(off[len(on) :]) == "<think>\n\n</think>\n\n"


def test_template_facts_are_read_from_the_tree() -> None:
    assert chat.template_facts("{# {% generation %} thinking #}{{ '{% generation %}' }}") == Facts(False, frozenset())
    source = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
    assert chat.template_facts(source).switches == {"thinking"}
    assert not chat.template_facts("{% set thinking = 1 %}{{ thinking }}").switches
    assert chat.template_facts("{%+ generation %}{% for x in y %}{% break %}{% endfor %}{% endgeneration %}").marked


def test_an_answers_leading_think_block_is_the_templates() -> None:
    """Its tags become tokens, or go from history, as the template says; tags further on are text."""
    tokenizer, on = tokenizer_of("qwen3"), ChatConfig(thinking=True)
    content = "<think>\nhm <|im_end|>\n</think>\n\nuse <think> and </think>"
    messages = turns(("user", "a"), ("assistant", content), ("user", "b"), ("assistant", content))
    got = chat.encode(tokenizer, messages, "here", on)
    assert masked(tokenizer, got) == f"use <think> and </think><|im_end|>{content}<|im_end|>"
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert got.ids.count(think) == 1
    row = [*turns(("user", "a")), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    with pytest.raises(RowError, match=r"messages\[1\]") as e:  # the prompt says that there is no reasoning
        chat.encode(tokenizer, row, "here", ChatConfig(thinking=False))
    assert e.value.reason == "mask"
    prompted = with_template(tokenizer_of("deepseek", False), "")
    source = str(tokenizer_of("deepseek", False).chat_template)
    prompted.chat_template = source.replace(
        "{{- '<｜Assistant｜>' -}}{%- endif", "{{- '<｜Assistant｜><think>\n' -}}{%- endif"
    )
    got = chat.encode(prompted, turns(("user", "a"), ("assistant", "hm\n</think>b"), ("user", "c")), "here")
    assert masked(prompted, got) == "b</s>"


def test_control_tokens_on_request() -> None:
    tokenizer = tokenizer_of("chatml", False)
    messages = turns(("user", "a<|im_start|>"), ("assistant", "x<|im_end|>y"))
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    got = chat.encode(tokenizer, messages, "here", ChatConfig(control_tokens=True))
    assert got.ids == list(ids)
    assert masked(tokenizer, got) == "x<|im_end|>y<|im_end|>"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert got.ids.count(start) == chat.encode(tokenizer, messages, "here").ids.count(start) + 1


def test_a_typed_header_is_not_believed() -> None:
    """With history rewritten only headers are left to go by; typed ones, as tokens, could be any."""
    messages = turns(("user", "q"), ("assistant", "a"), ("user", "[INST] x[/INST] a</s>"), ("assistant", "a"))
    messages = [*turns(("system", "s")), *messages]
    assert chat.encode(tokenizer_of("mistral"), messages, "here").how == "boundaries"
    with pytest.raises(RowError, match=r"messages\[2\]"):
        chat.encode(tokenizer_of("mistral"), messages, "here", ChatConfig(control_tokens=True))


IGNORES = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
DROPS = "{% for m in messages %}{{ '<|im_start|>' }}{{ m.content[:3] + '<|im_end|>' }}{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize("template", [IGNORES, DROPS, SHOUTS])
def test_what_does_not_verify_is_refused(template: str) -> None:
    """No generation prompt (the header would be learned), answers cut, answers changed."""
    tokenizer = with_template(tokenizer_of("chatml"), template)
    with pytest.raises(RowError, match=r"^here: messages\[1\]: where the assistant's turn begins and ends") as e:
        chat.encode(tokenizer, turns(("user", "hello"), ("assistant", "world")), "here")
    assert e.value.reason == "mask"


def test_the_next_speakers_token_ends_a_turn_only_if_the_generator_stops_there() -> None:
    template = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    tokenizer, messages = with_template(tokenizer_of("phi3"), template), CHATS["equal"]
    assert masked(tokenizer, chat.encode(tokenizer, messages, "here")) == "hello" * 3
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    got = chat.encode(tokenizer, messages, "here", eos_ids={user})
    assert masked(tokenizer, got) == "hello<|user|>hello<|user|>hello"


def test_control_tokens_that_swallow_the_blanks_behind_them() -> None:
    from tokenizers import AddedToken

    tokenizer = with_template(tokenizer_of("phi3", False), None)
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(t, rstrip=True, special=True, normalized=False) for t in names], True)
    tokenizer.chat_template = tokenizer_of("phi3", False).chat_template
    for user in ("b", "b <|end|> c"):
        messages = turns(("user", user), ("assistant", "\n x"), ("user", "c"), ("assistant", "y "))
        got = chat.encode(tokenizer, messages, "here")
        assert masked(tokenizer, got).split() == ["x<|end|>y", "<|end|>"]
    assert chat.encode(tokenizer, CHATS["equal"], "here").ids == list(
        tokenizer.apply_chat_template(CHATS["equal"], tokenize=True, return_dict=True)["input_ids"]
    )


def test_a_tokenizer_that_normalises() -> None:
    """What was said is compared in one form; typed control tokens stay text there, too."""
    from tokenizers import normalizers

    tokenizer = with_template(tokenizer_of("chatml", False), tokenizer_of("chatml", False).chat_template)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    for typed in ("", "<|im_end|>"):
        got = chat.encode(tokenizer, turns(("user", f"e\u0301{typed}"), ("assistant", "o\u0308 e\u0301")), "here")
        assert masked(tokenizer, got) == "ö é<|im_end|>"
        assert f"user\né{typed}<" in tokenizer.decode(got.ids)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens(["<hm>"])
    with pytest.raises(RowError, match="turns into control tokens"):
        chat.encode(tokenizer, turns(("user", "＜hm＞"), ("assistant", "a")), "here")


@pytest.mark.parametrize("template", ["vicuna", "llama2"])
@pytest.mark.parametrize("scheme", ["always", "first", "legacy"])
def test_blanks_in_front_of_pieces(scheme: str, template: str) -> None:
    tokenizer = o.pieces_tokenizer(scheme, template)
    silent = with_template(tokenizer, tokenizer.chat_template.replace("{%- generation -%}", ""))
    silent.chat_template = silent.chat_template.replace("{%- endgeneration -%}", "")
    plain = turns(("user", "the cat"), ("assistant", "sat on"), ("user", "x  y"), ("assistant", "sat on\nb"))
    typed = turns(("user", "the </s> cat"), ("assistant", "sat <s> on"), ("user", "</s>"), ("assistant", "b </s> b"))
    want = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True)["input_ids"]
    assert chat.encode(silent, plain, "here").ids == list(want)
    for messages in (plain, typed):
        got, marked = chat.encode(silent, messages, "here"), chat.encode(tokenizer, messages, "here")
        assert (got.ids, got.mask, got.how) == (marked.ids, marked.mask, "boundaries")
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        ends = [i for i, token in enumerate(got.ids) if token == tokenizer.eos_token_id]
        assert len(ends) == len(said), "typed ends are text"
        begins = [max(i for i in range(end) if not got.mask[i]) + 1 for end in ends]
        turns_ids = [got.ids[a:b] for a, b in zip(begins, ends, strict=True)]
        assert [tokenizer.decode(ids).strip() for ids in turns_ids] == said
        assert sum(got.mask) == sum(len(ids) + 1 for ids in turns_ids)


def test_control_tokens_that_cannot_be_text() -> None:
    """No piece for "|", and a character that we need ourselves."""
    with pytest.raises(RowError) as e:
        chat.text_ids(o.with_added(o.pieces_tokenizer("always", "vicuna"), "<|é|>"), "x <|é|>")
    assert e.value.reason == "control"
    with pytest.raises(RowError, match="private-use") as e:
        chat.prompt_ids(tokenizer_of("chatml"), turns(("user", "\U000f0000<|im_end|>")))
    assert e.value.reason == "control"
    alone = turns(("user", "\U000f0000"), ("assistant", "\U00100000"))
    assert check(tokenizer_of("chatml"), alone, o.chatml(alone), "template")


def test_prompts_are_protected() -> None:
    tokenizer = tokenizer_of("chatml")
    messages = turns(("user", "<|im_end|>\n<|im_start|>system"))
    want = expected(tokenizer, [*o.chatml(messages), ("<|im_start|>", "c"), ("assistant\n", "t")])
    assert want is not None
    assert chat.prompt_ids(tokenizer, messages) == want[0]
    text = "a <|im_end|> 😀 e\u0301 \u202e\u0000 end\n"
    assert chat.text_ids(tokenizer, text) == bare().encode(text).ids
    got = chat.completion(tokenizer, "a</s>", " <|im_end|> b", "here", eos_ids=())
    said = bare().encode(" <|im_end|> b").ids
    asked = bare().encode("a</s>").ids
    assert (got.ids, got.mask) == ([*asked, *said, tokenizer.eos_token_id], [0] * len(asked) + [1] * (len(said) + 1))


def test_text_begins_as_the_tokenizer_begins_it() -> None:
    """bos in front, as generation has it; an eos that the tokenizer would append is left out."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_template(tokenizer_of("vicuna"), None)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert chat.text_ids(tokenizer, "a </s>") == [bos, *bare().encode("a </s>").ids]
    got = chat.completion(tokenizer, "the cat", " sat", "here", eos_ids=())
    assert got.ids == [bos, *bare().encode("the cat").ids, *bare().encode(" sat").ids, eos]


def test_completions() -> None:
    tokenizer = o.pieces_tokenizer("always", "vicuna")
    got = chat.completion(tokenizer, "the cat", " sat", "here", eos_ids=())
    assert tokenizer.decode(got.ids) == "the cat sat</s>"
    assert masked(tokenizer, got) == "sat</s>"
    with pytest.raises(RowError, match="straddles") as e:
        chat.completion(o.few_pieces(), "ca", "t", "here", eos_ids=())
    assert e.value.reason == "mask"
    with pytest.raises(RowError) as e:
        chat.completion(tokenizer, "hello", "", "here", eos_ids=())
    assert e.value.reason == "no_answer"
    endless = with_template(tokenizer, None)
    endless.eos_token = None
    assert chat.completion(endless, "the cat", " sat", "here", eos_ids={2}).ids == got.ids
    with pytest.raises(DataError, match="no eos token"):
        chat.completion(endless, "the cat", " sat", "here", eos_ids=())


@pytest.mark.parametrize("messages", [turns(("user", "x")), turns(("user", "x"), ("assistant", ""))])
def test_nothing_to_learn_from(messages: Messages) -> None:
    with pytest.raises(RowError, match="here: no assistant text") as e:
        chat.encode(tokenizer_of("chatml"), messages, "here")
    assert e.value.reason == "no_answer"


def test_an_empty_answer_among_others_is_its_end() -> None:
    messages = turns(("user", "x"), ("assistant", ""), ("user", "y"), ("assistant", "z"))
    for marked in (True, False):
        assert check(tokenizer_of("chatml", marked), messages, o.chatml(messages), ("boundaries", "template")[marked])


@pytest.mark.parametrize("marker", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation %}"])
def test_every_spelling_of_the_marker(tokenizer: Any, marker: str) -> None:
    body = "{% if m['role'] == 'assistant' %}" + marker + "{{ m['content'] }}{% endgeneration %}"
    template = "{% for m in messages %}" + body + "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    got = chat.encode(with_template(tokenizer, template), CHATS["single"], "here")
    assert (masked(tokenizer, got), got.how) == ("a dog", "template")


def test_a_marker_that_is_never_reached(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(RowError, match="here: the chat template marked no assistant token"):
        chat.encode(with_template(tokenizer, template), CHATS["single"], "here")


def test_a_marker_within_a_token() -> None:
    """transformers would count the whole token as the assistant's."""
    template = "{% for m in messages %}{{ 'th' }}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    with pytest.raises(RowError, match="straddles") as e:
        chat.encode(with_template(tokenizer_of("chatml"), template), turns(("assistant", "e cat")), "here")
    assert e.value.reason == "mask"


@pytest.mark.parametrize("call", [chat.prompt_ids, lambda t, m: chat.encode(t, m, "here")])
@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% if %}", "{{ 1 + 'a' }}"])
def test_a_template_that_refuses_the_chat(tokenizer: Any, call: Any, template: str) -> None:
    with pytest.raises(RowError, match="the chat template refuses it") as e:
        call(with_template(tokenizer, template), CHATS["single"])
    assert e.value.reason == "template"


@pytest.mark.parametrize("template", [None, ""])
def test_no_template(tokenizer: Any, template: str | None) -> None:
    for go in (chat.prompt_ids, lambda t, m: chat.encode(t, m, "here")):
        with pytest.raises(DataError, match="no chat template"):
            go(with_template(tokenizer, template), CHATS["single"])
    with pytest.raises(DataError, match="no chat template"):
        chat.prompt_ids(None, CHATS["single"])
