"""Chats through the templates of published models that TRL ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl

from budwood.errors import InputError, UnsupportedModelError
from budwood.tune.data.encoding import IGNORED, encode, encode_rows
from budwood.tune.data.examples import Example, example_of
from budwood.tune.data.template import render
from tests import tiny_chat

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if "training" not in file.stem)
BEGINS_OTHERWISE = {"deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning"} | {
    f"nemotron_3_{size}" for size in ("nano", "super", "ultra")
}
"""They begin a reply with thoughts that the finished turn does not have."""
CHANGE_EARLIER_TURNS = {"gptoss", "phi3", "phi3_5", "qwen3", "qwen3_6"} | {
    f"qwen3_5_{kind}" for kind in ("think", "nothink")
}
WITHOUT_CALLS = {"cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3"} | {
    *("llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
}
"""They have no place for calls of tools, or refuse the tool's turn."""
CHAT = {
    "messages": [
        {"role": "user", "content": "is it hot"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "is it cold"},
        {"role": "assistant", "content": "yes"},
    ]
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"day": 1}}}
SCHEMA = {
    "name": "weather",
    "description": "Of a day.",
    "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}},
}
CALLED = {
    "messages": [
        {"role": "user", "content": "is it hot"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "cold"},
        {"role": "assistant", "content": "no"},
    ],
    "tools": [{"type": "function", "function": SCHEMA}],
}


def tokenizer_of(name):
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer


def supervised(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_of_a_chat_is_supervised_once_and_no_request(name):
    tokenizer, example = tokenizer_of(name), example_of(CHAT)
    if name in BEGINS_OTHERWISE:
        with pytest.raises(UnsupportedModelError, match="begins a reply with"):
            encode([example], tokenizer, 4000)
        return
    encoded = encode([example], tokenizer, 4000)
    assert encoded.n_split == (name in CHANGE_EARLIER_TURNS) == bool(encoded.note)
    assert len(encoded.rows) == 1 + encoded.n_split
    learnt = "".join(supervised(tokenizer, row) for row in encoded.rows)
    assert learnt.count("no") == learnt.count("yes") == 1
    assert "hot" not in learnt and "cold" not in learnt


@pytest.mark.parametrize("name", sorted(CHANGE_EARLIER_TURNS))
def test_a_split_chat_is_what_generation_sees(name):
    tokenizer, example = tokenizer_of(name), example_of(CHAT)
    for row, n_before in zip(encode_rows(example, tokenizer), (1, 3), strict=True):
        prompt = render(tokenizer, example.messages[:n_before], True)
        whole = render(tokenizer, example.messages[: n_before + 1], False)
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(prompt) and whole.startswith(text)
        assert text.removeprefix(prompt) == supervised(tokenizer, row)


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_tools_are_supervised_or_refused(name):
    tokenizer, example = tokenizer_of(name), example_of(CALLED)
    if name in BEGINS_OTHERWISE | WITHOUT_CALLS:
        with pytest.raises((InputError, UnsupportedModelError), match="template"):
            encode_rows(example, tokenizer)
        return
    learnt = "".join(supervised(tokenizer, row) for row in encode_rows(example, tokenizer))
    assert "weather" in learnt and "cold" not in learnt and learnt.count("no") == 1


def test_arguments_are_text_for_templates_that_take_nothing_else():
    tokenizer = tiny_chat.tokenizer()
    shown = "{{ message.role + message.content }}"
    called = "{{ '<call>' + call.function.name + call.function.arguments + '</call>' }}"
    tokenizer.chat_template = (
        f"{{% for message in messages %}}{shown}{{% for call in message.tool_calls or [] %}}"
        f"{called}{{% endfor %}}{{% endfor %}}{{{{ tools|length if tools else '' }}}}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    messages = example_of(CALLED).messages[:2]
    assert '<call>weather{"day": 1}</call>' in render(tokenizer, messages, False)


def test_contents_are_parts_for_templates_that_take_nothing_else():
    tokenizer, plain = tokenizer_of("smolvlm"), Example((*example_of(CHAT).messages[:2],))
    (row,) = encode_rows(plain, tokenizer)
    assert "is it hot" in tokenizer.decode(row["input_ids"])
    assert supervised(tokenizer, row).strip().startswith("no")
