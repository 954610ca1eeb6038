"""Self-distillation with a generator that we play ourselves."""

import copy
from typing import Any

import pytest

from draftsmith.data.generate import GenerationConfig, distill
from draftsmith.data.prompts import Prompt
from draftsmith.errors import ConfigError, DataError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def one_turn(text: str, where: str = "p:1") -> Prompt:
    return Prompt(where, messages=(said("user", text),))


class Scripted:
    """Answers from a list, call by call, prompt by prompt; remembers what it was asked."""

    def __init__(self, *calls: list[list[int]]) -> None:
        self.calls, self.asked, self.settings = list(calls), [], []

    def __call__(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        self.asked.append(copy.deepcopy(prompts))
        self.settings.append(settings)
        return self.calls.pop(0)


@pytest.fixture
def ids(tokenizer: Any) -> Any:
    """Text and special tokens to ids."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def spelt(tokenizer: Any) -> Any:
    """Ids of a text letter by letter, which is not how the tokenizer would cut it, and the end token."""

    def spell(text: str) -> list[int]:
        letters = [i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
        assert letters != tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(letters) == text
        return [*letters, tokenizer.eos_token_id]

    return spell


def test_single_turn(tokenizer: Any, ids: Any, spelt: Any) -> None:
    """The generator's ids as they are, though the tokenizer would cut their text otherwise."""
    answer = spelt("the cat sat")
    generate = Scripted([answer])
    config = GenerationConfig(max_new_tokens=30, temperature=0.5, top_p=0.9, batch_size=7, seed=3)
    prompt = one_turn("a dog")
    [(same, row, mask)] = distill([prompt], generate, tokenizer, config, room=100)
    before = ids("<s><|user|>a dog<|end|><|assistant|>")
    assert same is prompt
    assert generate.asked == [[before]]
    assert row == before + answer
    assert mask == [0] * len(before) + [1] * len(answer)
    assert generate.settings == [
        {"max_new_tokens": 30, "temperature": 0.5, "top_p": 0.9, "seed": 3, "batch_size": 7},
    ]


def test_plain_text(tokenizer: Any, ids: Any) -> None:
    generate = Scripted([[5, 6, 7]])
    [(_, row, mask)] = distill(
        [Prompt("p:1", text="the mat")], generate, tokenizer, GenerationConfig(max_new_tokens=3), room=100
    )
    assert row == [*ids("the mat"), 5, 6, 7]
    assert sum(mask) == 3


THREE = (
    said("system", "a mat"),
    said("user", "the cat"),
    said("assistant", "THROWN AWAY"),
    said("user", "sat"),
    said("assistant", "THROWN AWAY"),
    said("user", "on"),
)


def test_several_turns(tokenizer: Any, ids: Any, spelt: Any) -> None:
    """prompt, generated, between the turns, generated …; each turn follows the answers before it; the
    prompt's own assistant texts are gone."""
    answers = [spelt("the dog sat"), spelt("on the cat"), spelt("and a mat")]
    generate = Scripted(*[[a] for a in answers])
    config = GenerationConfig(max_new_tokens=30, seed=5)
    [(_, row, mask)] = distill([Prompt("p:1", messages=THREE)], generate, tokenizer, config, room=300)
    betweens = [
        ids("<s><|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>"),
        ids("<|user|>sat<|end|><|assistant|>"),  # the answer's own end token stands before it, once
        ids("<|user|>on<|end|><|assistant|>"),
    ]
    want: list[tuple[int, int]] = []
    for turn in range(3):
        want += [(i, 0) for i in betweens[turn]]
        assert generate.asked[turn] == [[i for i, _ in want]]
        want += [(i, 1) for i in answers[turn]]
    assert list(zip(row, mask, strict=True)) == want
    assert [s["seed"] for s in generate.settings] == [5, 6, 7]
    whole = [THREE[0]]
    for turn, user in enumerate((THREE[1], THREE[3], THREE[5])):
        text = tokenizer.decode(answers[turn], skip_special_tokens=True)
        whole += [user, said("assistant", text)]
    assert tokenizer.decode(row) == tokenizer.apply_chat_template(whole, tokenize=False)


def test_an_answer_that_looks_like_the_marker(tokenizer: Any, ids: Any, spelt: Any) -> None:
    """The text that stands for an answer while we look at the template may be said by a user."""
    prompt = Prompt("p:1", messages=(said("user", "@@the-answer@@"), said("assistant", ""), said("user", "a cat")))
    generate = Scripted([spelt("the cat")], [spelt("a dog")])
    [(_, row, _)] = distill([prompt], generate, tokenizer, GenerationConfig(max_new_tokens=30), room=300)
    text = "<s><|user|>@@the-answer@@<|end|><|assistant|>the cat<|end|><|user|>a cat<|end|><|assistant|>a dog<|end|>"
    assert tokenizer.decode(row) == text


@pytest.mark.parametrize("first", ["cut", "empty"])
def test_an_answer_that_did_not_end_ends_the_chat(tokenizer: Any, spelt: Any, first: str) -> None:
    answer = {"cut": [9, 9, 9, 9], "empty": []}[first]
    generate = Scripted([answer])
    [(_, row, mask)] = distill(
        [Prompt("p:1", messages=THREE)], generate, tokenizer, GenerationConfig(max_new_tokens=4), room=300
    )
    assert len(generate.asked) == 1
    assert row == generate.asked[0][0] + answer
    assert sum(mask) == len(answer)


def test_chats_of_different_lengths_keep_their_order(tokenizer: Any, ids: Any, spelt: Any) -> None:
    """Later turns ask only for the chats still open; rows come out in the prompts' order."""
    prompts = [
        Prompt("p:1", messages=THREE),
        one_turn("a dog", "p:2"),
        Prompt("p:3", messages=(said("user", "the"), said("assistant", "x"), said("user", "mat"))),
        Prompt("p:4", text="and"),
    ]
    answers = [
        [spelt("the cat"), spelt("a cat"), spelt("cat a"), [9, 9]],
        [spelt("the mat"), spelt("a mat")],
        [spelt("the dog")],
    ]
    generate = Scripted(*answers)
    rows = list(distill(prompts, generate, tokenizer, GenerationConfig(max_new_tokens=30), room=300))
    assert [p.where for p, _, _ in rows] == ["p:1", "p:2", "p:3", "p:4"]
    assert [len(call) for call in generate.asked] == [4, 2, 1]
    marked = [[i for i, m in zip(row, mask, strict=True) if m] for _, row, mask in rows]
    assert marked == [
        answers[0][0] + answers[1][0] + answers[2][0],
        answers[0][1],
        answers[0][2] + answers[1][1],
        answers[0][3],
    ]


def test_a_first_turn_without_room_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"p:9: a prompt of \d+ tokens and max_new_tokens=30"):
        list(distill([one_turn("the cat", "p:9")], Scripted(), tokenizer, GenerationConfig(max_new_tokens=30), 31))


def test_a_later_turn_without_room_ends_the_chat(tokenizer: Any, ids: Any, spelt: Any) -> None:
    """Never more tokens than the base has positions for."""
    answer = spelt("the cat sat on")
    generate = Scripted([answer])
    first = ids("<s><|system|>a mat<|end|><|user|>the cat<|end|><|assistant|>")
    room = len(first) + 20
    prompt = Prompt("p:1", messages=THREE)
    [(_, row, mask)] = distill([prompt], generate, tokenizer, GenerationConfig(max_new_tokens=20), room)
    assert len(generate.asked) == 1
    assert row == first + answer  # not the question that found no room
    assert mask == [0] * len(first) + [1] * len(answer)


def test_the_room_is_used_to_the_last_token(tokenizer: Any, ids: Any) -> None:
    prompt = ids("<s><|user|>the cat<|end|><|assistant|>")
    config = GenerationConfig(max_new_tokens=5)
    [(_, row, _)] = distill([one_turn("the cat")], Scripted([[9] * 5]), tokenizer, config, room=len(prompt) + 5)
    assert len(row) == len(prompt) + 5


def test_a_template_that_hides_earlier_answers(tokenizer: Any) -> None:
    """As reasoning models' do: then the row could not hold what was generated."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    generate = Scripted([[9, tokenizer.eos_token_id]])
    with pytest.raises(DataError, match="p:1: the chat template hides earlier answers"):
        list(distill([Prompt("p:1", messages=THREE)], generate, other, GenerationConfig(max_new_tokens=5), 300))


def test_a_template_that_refuses_the_chat(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match=r"p:1: the chat template refuses it \(no\)"):
        list(distill([one_turn("x")], Scripted(), other, GenerationConfig(max_new_tokens=5), 300))


def test_no_user_message(tokenizer: Any) -> None:
    prompt = Prompt("p:1", messages=(said("system", "x"),))
    with pytest.raises(DataError, match="p:1: no user message"):
        list(distill([prompt], Scripted(), tokenizer, GenerationConfig(), 300))


def test_a_generator_that_loses_an_answer_is_noticed(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="zip"):
        list(distill([one_turn("a"), one_turn("b")], Scripted([[9]]), tokenizer, GenerationConfig(), 1000))


def test_no_prompts(tokenizer: Any) -> None:
    assert list(distill([], Scripted(), tokenizer, GenerationConfig(), 100)) == []


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        GenerationConfig(**settings)
