"""Seeded chats, natural text and a tokenizer for the base that is made on this machine, without downloads.

The chats are templates with slots: the wording of a question fixes the answer's template, and names, numbers
and words are copied or looked up from the question. So a base of half a million weights masters them in
seconds, yet no answer is known without its prompt. A small base trained on natural text loops instead, and
prompt look-up then beats every trained head; watch that number beside the tokens per step of a head.

    documents = list(corpus(dialogues=8000, source_bytes=0, seed=0))
    tokenizer = train_tokenizer(documents, 1024)
    blocks_NT = token_blocks(tokenizer, documents, 256)
    mask_NT = learned_mask(tokenizer, blocks_NT)

A *document* is a list of messages (a chat) or a string (plain text).
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
Document = str | Messages


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


# Short words, each in many templates, so that the tokenizer makes one token of most of them: a base of two
# layers learns to copy such a word in seconds, and a word of four pieces hardly ever.
NAMES = _split("Adam Ali Ben Eva Finn Gus Ida Jan Kai Leo Max Mia Nora Otto Ron Tom")
CITIES = _split("Bern Bonn Cork Kiel Lima Nice Oslo Rome")
ITEMS = _split("bags beds boxes cups hats lamps pens shirts")
TOPICS = _split("the budget,the garden,the printer,the report,the party,the tickets", ",")
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SERVICES = _split("billing search upload mail worker archive")
COLOURS = _split("red blue green black white")
ONES = _split("zero one two three four five six seven eight nine")
TENS = _split("twenty thirty forty fifty sixty seventy eighty ninety")
OPERATIONS = {"adds": ("add", "+"), "subtracts": ("subtract", "-"), "multiplies by": ("times", "*")}
TERMS = {
    "cache": "a small store that keeps the last results close at hand",
    "queue": "a line of work in which the first to come is the first to be served",
    "mutex": "a lock that lets one worker at a time change the shared data",
    "parser": "a reader that turns a line of letters into a tree",
    "router": "a box that sends every message on its way to another network",
    "ledger": "a record of numbers to which lines are only added",
    "sensor": "a device that turns heat or light into numbers",
    "branch": "a copy of the work that keeps each change apart until it is checked",
}
TURNS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)  # few long ones: an earlier turn's names are what a tiny base mixes in

# Q: the wordings of a question, A: its answer, up to the line of dashes. The fields are those of _slots.
TASKS_TEXT = """\
Q: Make a JSON record for {name}, aged {n}, from {city}.
Q: {name} is {n} years old and lives in {city}. As JSON, please.
A: ```json
{{
  "name": "{name}",
  "age": {n},
  "city": "{city}",
  "checked": false,
  "source": "chat"
}}
```

This is a valid JSON record. Change the fourth line as soon as the data is checked.
---
Q: Write a Python function for {name} that {verb} {m}.
Q: {name} needs Python code: a function that {verb} {m}.
A: This is a small Python function that {verb} {m}:

```python
def {function}(number: int) -> int:
    \"\"\"Return another number.\"\"\"
    return number {sign} {m}
```

It reads one number and changes nothing else, so {name} can check it line by line.
---
Q: Explain to {name} how a {term} is not a {rival}.
Q: {name} asks: is a {term} the same as a {rival}?
A: Hello {name}, this is the short answer. A {term} is {gloss}. A {rival} is not the same, because it is \
{rival_gloss}. Both keep your work in order, but each in its own way.
---
Q: {name} bought {n} {item} in {city} on {day}. Write a summary.
Q: Summary, please: on {day}, {name} went to {city} for {n} {item}.
A: Summary of the order: {name} went to {city} on {day} and came home with {n} {item}. Each of them was \
packed in a box, the price was paid at once, and the receipt is at the end of this message. There is nothing \
else to be done.
---
Q: Write an email from {name} to {friend} about {topic}.
Q: {name} has to write to {friend} about {topic}.
A: Subject: A question about {topic}

Dear {friend},

I hope this message finds you well. Before we change anything, I would like to hear your answer about \
{topic}. Could we find the time for a short call this week?

Kind regards,
{name}
---
Q: {name} works in {city} on {day} only. When is the next free day?
Q: The shop of {name} in {city} is open until {day}. When is it closed?
A: Let us look at the week in {city}. The day after {day} is {next_day}, so the answer for {name} is \
{next_day}. Please keep in mind that a week has seven days, and that the shared data may change at any time. If \
in doubt, ask again on the evening before.
---
Q: How does {name} write the number {n} in letters?
Q: Spell the number {n} for {name}, please.
A: In letters, the number is {words}. It is harder to change letters than numbers, so a bank asks for both. \
Put a line after the last letter, write the day below it, and hand the paper to {name}. \
The bank keeps it for ten years.
---
Q: Count from {n} to {n6} for {name}.
Q: {name} needs the numbers from {n} to {n6}.
A: These are the numbers for {name} in order: {count}. There are seven of them in this line, because the first \
and the last number are both part of the answer. If you need more, ask for a longer line.
---
Q: Turn this into a list for {name}: {item}, {colour} paint, {other}.
Q: {name} needs a list of {item}, {colour} paint and {other}.
A: Here is the list:

1. {item}
2. {colour} paint
3. {other}

There are three lines in it, and each line has its own number. Nothing was left out, and the order is the same \
as in your message, so {name} can pack them one by one.
---
Q: A table, please: {name} has {n} {item}, {friend} has {m} {other}.
Q: Write a table of {n} {item} for {name} and {m} {other} for {friend}.
A: | name | item | number |
|---|---|---|
| {name} | {item} | {n} |
| {friend} | {other} | {m} |

This table has two lines below the first one, and a bar after each part of a line. The numbers are in the last part.
---
Q: Write SQL to find {colour} {item} in {city} with a price above {n}.
Q: SQL, please: the {colour} {item} in {city} with a price over {n}.
A: ```sql
SELECT name, price
FROM {item}
WHERE city = '{city}'
  AND colour = '{colour}'
  AND price > {n}
ORDER BY price
LIMIT 10;
```

This keeps the first ten lines only. Put an index on the price to make it fast.
---
Q: How can {name} send {n} {item} to {city}?
Q: {name} has to pack {n} {item} for {city}. How?
A: 1. Put the {n} {item} into a box, one by one.
2. Turn the box on its side to check that nothing can move.
3. Close it with a rope and write {city} on the paper.

This way they come home in good order, and {name} has nothing else to do.
---
Q: Plan a {day} in {city} for {name} and {friend}.
Q: {name} and {friend} are in {city} on {day}. Make a plan, please.
A: This is a plan for {day} in {city}:

- Morning: a short walk to the market with {friend}.
- Noon: bread, soup and a hot tea in the open.
- Evening: a good book and an early night.

Have a good time, {name}!
---
Q: Write a YAML file for the {service} service with {n} workers in {city}.
Q: YAML, please: service {service}, {n} workers, city {city}.
A: ```yaml
service: {service}
city: {city}
workers: {n}
restart: always
message:
  level: warning
  source: network
```

The file is read at the start only, so restart the service after each change. A wrong level is not \
an error, it only makes the log longer.
---
Q: Spell the name {name} for {friend} in {city}.
Q: {friend} from {city} asks how the name {name} is spelled.
A: The name is spelled like this: {letters}. Say one letter at a time, and wait a little after each of them. Let \
{friend} say the name at the end of the call, so that you can hear whether every letter was \
right. If it was not, start again from the first.
---
Q: The {service} service in {city} ends with error {n}. What now?
Q: Error {n} from the {service} service in {city}. What can {name} do?
A: Error {n} is a message from the {service} service: it has waited for an answer, and there was none in \
time. Open the file of the day, look for the first warning and not for the last, and call the team in \
{city}. Until they answer, leave everything as it is.
"""


def _tasks() -> Iterator[tuple[list[str], str]]:
    for block in TASKS_TEXT.rstrip("\n").split("\n---\n"):
        questions, answer = block.split("\nA: ", 1)
        yield questions.removeprefix("Q: ").split("\nQ: "), answer


TASKS = tuple(_tasks())

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] in ['system', 'user'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "turtledemo", "pydoc_data"}
CHUNK_BYTES = 2048


def _words(n: int) -> str:
    """English for 20 <= n < 100."""
    return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")


def _slots(rng: random.Random) -> dict[str, Any]:
    """One value for every field that a task may use."""
    (name, friend), (item, other), (term, rival) = (rng.sample(s, 2) for s in (NAMES, ITEMS, list(TERMS)))
    n, day, verb = rng.randint(20, 59), rng.randrange(7), rng.choice(list(OPERATIONS))
    slots: dict[str, Any] = {"name": name, "friend": friend, "item": item, "other": other}
    slots |= {"term": term, "rival": rival, "gloss": TERMS[term], "rival_gloss": TERMS[rival]}
    slots |= {"n": n, "n6": n + 6, "count": ", ".join(str(n + i) for i in range(7)), "words": _words(n)}
    slots |= {"m": rng.randint(20, 59), "day": DAYS[day], "next_day": DAYS[(day + 1) % 7]}
    slots |= {"letters": "-".join(name.upper()), "verb": verb}
    slots |= {"function": OPERATIONS[verb][0], "sign": OPERATIONS[verb][1]}
    choices = {"city": CITIES, "topic": TOPICS, "service": SERVICES, "colour": COLOURS}
    return slots | {field: rng.choice(values) for field, values in choices.items()}


def _dialogue(seed: int, index: int) -> Messages:
    """1 to 3 turns; no task occurs twice in one dialogue (it would hand its answer to prompt look-up)."""
    rng = random.Random(f"dialogue/{seed}/{index}")
    messages: Messages = []
    for questions, answer in rng.sample(TASKS, rng.choice(TURNS)):
        slots = _slots(rng)
        messages.append({"role": "user", "content": rng.choice(questions).format_map(slots)})
        messages.append({"role": "assistant", "content": answer.format_map(slots)})
    return messages


def dialogues(count: int, seed: int) -> Iterator[Messages]:
    """`count` chats; the i-th is a function of (seed, i) alone, so a larger count only appends."""
    return (_dialogue(seed, index) for index in range(count))


def prompt_key(messages: Messages) -> str:
    """What makes two prompts the same: the text of the last user turn, without case and runs of spaces."""
    return " ".join(next(m["content"] for m in reversed(messages) if m["role"] == "user").casefold().split())


def prompts(count: int, seed: int, *, exclude: Collection[str] = frozenset()) -> list[Messages]:
    """`count` distinct prompts, each the messages up to a user turn, a part of them after earlier turns.

    exclude: keys (prompt_key) that *no* user turn of a returned prompt has. To hold prompts out of training,
    give the keys of all user turns trained on. DataError when the templates cannot yield so many.
    """
    found: list[Messages] = []
    taken: set[str] = set()
    for messages in dialogues(100 + 20 * count, seed):
        prompt = messages[:-1]
        keys = {prompt_key([m]) for m in prompt if m["role"] == "user"}
        if len(found) < count and not any(key in exclude or key in taken for key in keys):
            taken |= keys
            found.append(prompt)
        if len(found) == count:
            return found
    raise DataError(f"prompts: only {len(found)} of {count} are left after excluding {len(exclude)}; ask for fewer")


def _source_files(root: str) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)  # in place: os.walk goes on with these
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def source_texts(limit_bytes: int) -> Iterator[str]:
    """This Python's own library sources, `limit_bytes` of UTF-8 at most, in chunks that end with a line.

    Chunks hold about 2 kB. The text depends on the Python version (and on nothing else of the machine).
    """
    left = limit_bytes
    for path in _source_files(sysconfig.get_path("stdlib")) if limit_bytes else ():
        chunk, size = "", 0
        for line in [*path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), ""]:
            length = len(line.encode())
            if chunk and (not line or size + length > CHUNK_BYTES):
                if size > left:
                    return
                yield chunk
                left, chunk, size = left - size, "", 0
            chunk, size = chunk + line, size + length


def corpus(dialogues: int, source_bytes: int, seed: int) -> Iterator[Document]:
    """The documents a base learns from: so many chats, then so many bytes of natural text."""
    yield from (_dialogue(seed, index) for index in range(dialogues))
    yield from source_texts(source_bytes)


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens (fewer if the text has fewer pairs) with a chat template.

    `<|end|>` ends every turn and is the eos; in the template it belongs to what the assistant says. Any text
    round-trips. ConfigError if vocab_size cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(SPECIAL_TOKENS):
        raise ConfigError(f"vocab_size: {vocab_size} is below the {len(alphabet)} bytes plus special tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = (text for d in documents for text in ([d] if isinstance(d, str) else [m["content"] for m in d]))
    bpe.train_from_iterator(texts, trainer)
    pad, bos, eos, *roles = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def token_blocks(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document], length: int) -> Tensor:
    """All documents behind one another, each opened by bos, cut into blocks: int64 [N, length].

    Only the tail that fills no block is lost. DataError if there is not even one block.
    """
    import torch

    bos = tokenizer.bos_token
    texts = [f"{bos}{d}" if isinstance(d, str) else tokenizer.apply_chat_template(d, tokenize=False) for d in documents]
    ids = [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row] if texts else []
    count = len(ids) // length
    if not count:
        raise DataError(f"token_blocks: {len(ids)} tokens do not fill one block of {length}; use more documents")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def learned_mask(tokenizer: PreTrainedTokenizerFast, blocks_NT: Tensor) -> Tensor:
    """Bool [N, T]: which tokens of token_blocks' result a base should learn to predict.

    Those are all of a plain text, and of a chat the assistant's, end tokens included, unless the block's edge
    cut off their question. Questions are random and half an answer is guesswork: both would only add noise.
    """
    import torch

    flat, at = blocks_NT.flatten(), torch.arange(blocks_NT.numel())

    def latest(*tokens: str) -> Tensor:
        """For each position the last one before it that holds one of the tokens, or -1."""
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)))
        return torch.cat([at.new_tensor([-1]), torch.where(torch.isin(flat, ids), at, -1).cummax(0).values[:-1]])

    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    opening, question, answer, end = latest(bos), latest("<|system|>", "<|user|>"), latest("<|assistant|>"), latest(eos)
    text = opening > torch.stack([question, answer, end]).amax(0)
    whole = question >= at - at % blocks_NT.shape[1]
    answers = whole & (answer > torch.stack([opening, question, end]).amax(0))
    markers = torch.isin(flat, torch.tensor([i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]))
    return ((text | answers) & ~markers).view_as(blocks_NT)
