import itertools

import pytest
import torch

from draftsmith.data import synthetic
from draftsmith.data.synthetic import (
    corpus,
    dialogues,
    learned_mask,
    prompt_key,
    prompts,
    source_texts,
    token_blocks,
    train_tokenizer,
)
from draftsmith.errors import ConfigError, DataError

ODD_TEXT = "naïve café — 東京 🙂🏽\n\ttab  two spaces \r\n<br>'s 12345 \u200d end "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(dialogues(300, seed=0), 600)


def test_dialogues_depend_on_seed_and_index_alone():
    few, many = list(dialogues(20, seed=3)), list(dialogues(60, seed=3))
    assert many[:20] == few
    assert list(dialogues(20, seed=4)) != few


def test_roles_alternate_over_one_to_three_turns():
    turns = set()
    for messages in dialogues(200, seed=0):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] and "{name}" not in m["content"] for m in messages)
        turns.add(len(messages) // 2)
    assert turns == {1, 2, 3}


def test_questions_rarely_repeat_and_fix_their_answer():
    pairs = [(d[i]["content"], d[i + 1]["content"]) for d in dialogues(3000, seed=0) for i in range(0, len(d), 2)]
    questions = {question for question, _ in pairs}
    assert len(questions) > 0.92 * len(pairs)
    assert len(set(pairs)) == len(questions)


def test_every_task_has_two_wordings_and_no_other_markers():
    assert len(synthetic.TASKS) == 16
    for questions, answer in synthetic.TASKS:
        assert len(questions) == 2
        assert not any("\n" in q or "Q: " in q for q in questions)
        assert not any(mark in answer for mark in ("Q: ", "A: ", "---\n---"))


def test_number_words():
    assert [synthetic._words(n) for n in (20, 41, 59, 90)] == ["twenty", "forty-one", "fifty-nine", "ninety"]


def test_prompts_are_distinct_end_with_a_user_and_honour_exclude():
    train = prompts(300, seed=1)
    assert {m[-1]["role"] for m in train} == {"user"}
    assert {len(m) for m in train} == {1, 3, 5}
    assert len({prompt_key(m) for m in train}) == 300
    exclude = {prompt_key([turn]) for m in train for turn in m if turn["role"] == "user"}
    held_out = prompts(100, seed=1, exclude=exclude)  # the same seed: every early candidate is excluded
    assert not {prompt_key([t]) for m in held_out for t in m if t["role"] == "user"} & exclude


def test_prompts_say_how_many_are_left_when_all_are_excluded():
    class Everything(frozenset):
        def __contains__(self, key):
            return True

    with pytest.raises(DataError, match="only 0 of 2"):
        prompts(2, seed=0, exclude=Everything())


def test_prompt_key_ignores_case_and_spaces_and_earlier_turns():
    def turn(text):
        return {"role": "user", "content": text}

    assert prompt_key([turn("old"), turn(" Hello\n  There ")]) == prompt_key([turn("hello there")])


def test_source_texts_are_bounded_line_chunks_and_deterministic():
    chunks = list(source_texts(50_000))
    sizes = [len(c.encode()) for c in chunks]
    assert 40_000 < sum(sizes) <= 50_000
    assert all(c.endswith("\n") for c in chunks)
    assert max(sizes) <= 2 * synthetic.CHUNK_BYTES
    assert chunks == list(source_texts(50_000))
    assert list(source_texts(0)) == []


def test_corpus_is_chats_then_text():
    kinds = [type(d) for d in corpus(dialogues=5, source_bytes=9000, seed=0)]
    assert kinds[:5] == [list] * 5
    assert set(kinds[5:]) == {str}


def test_tokenizer_round_trips_any_text(tokenizer):
    assert tokenizer.decode(tokenizer(ODD_TEXT, add_special_tokens=False)["input_ids"]) == ODD_TEXT
    assert len(tokenizer) == 600
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_tokenizer_is_a_function_of_its_documents(tokenizer):
    again = train_tokenizer(list(dialogues(300, seed=0)), 600)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(["text"], 200)


def slow_template(tokenizer, messages):
    """Ids and mask, one turn at a time."""
    ids, mask = [tokenizer.bos_token_id], [0]
    for m in messages:
        text = tokenizer(m["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{m['role']}|>"), *text]
        mask += [0] + [int(m["role"] == "assistant")] * len(text)
    return ids, mask


def chats():
    yield from dialogues(40, seed=7)
    roles = ("system", "user", "assistant", "user", "assistant")
    yield [{"role": role, "content": ODD_TEXT} for role in roles]
    yield [{"role": role, "content": ""} for role in roles]


def test_template_mask_covers_exactly_what_the_assistant_says(tokenizer):
    for messages in chats():
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (list(out["input_ids"]), list(out["assistant_masks"])) == slow_template(tokenizer, messages)


def test_generation_prompt_continues_as_the_assistant(tokenizer):
    messages = next(iter(dialogues(1, seed=0)))[:2]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_unknown_role_raises(tokenizer):
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = next(iter(dialogues(1, seed=0)))
    assert loaded.apply_chat_template(messages)["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert loaded.eos_token == tokenizer.eos_token


def test_token_blocks_lose_only_the_tail(tokenizer):
    documents = [*dialogues(12, seed=0), "plain\ntext " * 30, ODD_TEXT]
    expected = []
    for d in documents:
        if isinstance(d, str):
            expected += [tokenizer.bos_token_id, *tokenizer(d, add_special_tokens=False)["input_ids"]]
        else:
            expected += slow_template(tokenizer, d)[0]
    blocks_NT = token_blocks(tokenizer, documents, 64)
    assert blocks_NT.dtype == torch.int64
    assert blocks_NT.flatten().tolist() == expected[: len(expected) // 64 * 64]


def test_too_few_documents_for_a_block(tokenizer):
    for documents in ([], ["x"]):
        with pytest.raises(DataError, match="do not fill one block"):
            token_blocks(tokenizer, documents, 64)


def test_learned_mask_is_answers_with_their_question_and_plain_text(tokenizer):
    documents = list(itertools.chain(dialogues(15, seed=2), ["some text\n" * 20, "more"], dialogues(5, seed=3)))
    blocks_NT = token_blocks(tokenizer, documents, 128)
    mask_NT = learned_mask(tokenizer, blocks_NT)
    names = {tokenizer.convert_tokens_to_ids(t): t for t in synthetic.SPECIAL_TOKENS}
    state, question_row = "", -1
    for row, (ids, mask) in enumerate(zip(blocks_NT.tolist(), mask_NT.tolist(), strict=True)):
        for token, learned in zip(ids, mask, strict=True):
            name = names.get(token)
            said = state == "<|assistant|>" and question_row == row
            assert learned == ((state == "<s>" or said) and name in (None, "<|end|>"))
            state = name or state
            question_row = row if name == "<|user|>" else question_row
    assert 0.2 < mask_NT.float().mean() < 0.9
