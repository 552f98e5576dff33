"""The tiny random Llama with a tokenizer and a chat template, and files of questions."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests import tiny_llm

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that shows tools and their calls."""
FILES = {
    "openbookqa_test": 12,
    "boolq_test": 12,
    "arc_easy_test": 12,
    "openbookqa_train": 30,
    "boolq_train": 30,
    "arc_easy_train": 30,
    "social_iqa_validation": 12,
}
THINGS = ["moon", "river", "stone", "oak tree", "iron", "cloud", "bird"]


def tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Bytes, so that any text has tokens, and joined pairs of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *letters, *pairs])}
    inner = Tokenizer(models.BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def model(**changes) -> LlamaForCausalLM:
    sizes = {"vocab_size": len(tokenizer()), "max_position_embeddings": 1024}
    return tiny_llm.llama(initializer_range=0.1, tie_word_embeddings=True, **{**sizes, **changes})


def save(folder: Path, **changes) -> Path:
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def question(draw: random.Random, n_choices: int) -> dict:
    choices = draw.sample(THINGS, n_choices)
    answer = draw.randrange(n_choices)
    asked = f"Which is {choices[answer]} {draw.randrange(10_000)}?"
    return {"question": asked, "choices": choices, "answer": answer}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_data(folder: Path) -> Path:
    """Files by the names of the shipped tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, n in FILES.items():
        n_choices = 2 if name.startswith("boolq") else 3
        write_lines(folder / f"{name}.jsonl", [question(draw, n_choices) for _ in range(n)])
    blanks = [
        {"question": f"The {a} is near the {b} so the _ is far.", "choices": [a, b], "answer": i}
        for i, (a, b) in enumerate([("bird", "moon"), ("iron", "stone")])
    ]
    write_lines(folder / "winogrande_validation.jsonl", blanks * 4)
    sums = [
        {"question": f"{n} and {n}?", "answer": f"<<{n}+{n}>>{2 * n}\n#### {2 * n}"}
        for n in range(8)
    ]
    write_lines(folder / "gsm8k_test_part.jsonl", sums)
    (folder / "wikitext2_valid.txt").write_text(" ".join(draw.choices(THINGS, k=600)))
    return folder
