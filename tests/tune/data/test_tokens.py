"""Parts of texts as tokens: what is trained on is what a tokenizer makes of the whole text."""

from __future__ import annotations

import pytest
import torch

from budwood.tune.data.encoding import IGNORED, encode_rows
from budwood.tune.data.examples import example_of
from budwood.tune.data.self_generated import in_forms_of, with_asked
from budwood.tune.data.template import around_request, prompt_tokens, tokens_before_request
from budwood.tune.data.tokens import Part, tokens_behind
from budwood.tune.evaluate.harness import run_tasks
from budwood.tune.evaluate.tasks import find_task
from tests import tiny_chat
from tests import tiny_sentencepiece as sentencepiece

SAID = ("is it the sun?", "the moon is it", "is ice a stone", "no, it is not")
CHAT = {
    "messages": [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, SAID)
    ]
}
ALL = [(kind, template) for kind in sentencepiece.KINDS for template in sentencepiece.TEMPLATES]


def words(tokens, row, key):
    """The tokens that a row marks, as words."""
    none = IGNORED if key == "labels" else 0
    marked = [token for token, mark in zip(row["input_ids"], row[key]) if mark != none]
    return tokens.convert_ids_to_tokens(marked)


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_a_chat_has_the_tokens_of_its_whole_text(kind, template):
    tokens = sentencepiece.tokenizer(kind, template)
    row = encode_rows(example_of(CHAT), tokens)[0]
    whole = tokens.apply_chat_template(CHAT["messages"], tokenize=True)["input_ids"]
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    # What follows the end of the last turn is left out.
    assert len(whole) - len(row["input_ids"]) <= (2 if template == "zephyr" else 0)
    space = "▁" if template == "llama-2" else ""
    said = "".join(words(tokens, row, "labels")).split("</s>")
    ends = "▁" if template == "llama-2" else ""
    assert said == [f"{space}{one.replace(' ', '▁')}{ends}" for one in SAID[1::2]] + [""]
    asked = "".join(words(tokens, row, "asked")).lstrip("▁").replace("▁", " ")
    between = " " if template == "llama-2" else ""
    assert asked == SAID[0] + between + SAID[2]


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_generation_sees_the_prompt_that_was_trained(kind, template):
    tokens = sentencepiece.tokenizer(kind, template)
    row = encode_rows(example_of({"question": SAID[0], "answer": SAID[1]}), tokens)[0]
    n_prompt = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["input_ids"][:n_prompt] == prompt_tokens(tokens, SAID[0])


@pytest.mark.parametrize("kind", sentencepiece.KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("is it", " the sun"), ("is it\n", "the sun"), ("a <", "the> b"), ("Q?", " A")],
)
def test_a_completion_is_tokenised_behind_its_prompt_as_trl_does(kind, prompt, completion):
    data_utils = pytest.importorskip("trl.data_utils")
    tokens = sentencepiece.tokenizer(kind)
    row = encode_rows(example_of({"prompt": prompt, "completion": completion}), tokens)[0]
    whole = tokens(prompt + completion + tokens.eos_token)["input_ids"]
    assert row["input_ids"] == whole
    n_prompt = data_utils.common_prefix_length(tokens(prompt)["input_ids"], whole)
    assert row["labels"] == [IGNORED] * n_prompt + whole[n_prompt:]


@pytest.mark.parametrize("kind", sentencepiece.KINDS)
def test_a_token_across_the_seam_is_cut(kind):
    """The whole text has the token ▁the; generation goes on from the space."""
    tokens = sentencepiece.tokenizer(kind)
    row = encode_rows(example_of({"prompt": "is it ", "completion": "the sun"}), tokens)[0]
    assert words(tokens, row, "labels") == ["the", "▁", "s", "u", "n", "</s>"]
    prompt = tokens("is it ")["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt
    assert tokens.decode(row["input_ids"], skip_special_tokens=True) == "is it the sun"


def test_line_breaks_across_the_seam_are_cut():
    tokens = tiny_chat.tokenizer(("Ċ", "Ċ"), ("Ġ", "Ġ"))
    for prompt, completion in (("Q\n", "\nyes"), ("Q\n\n", "yes"), ("Q ", " yes"), ("Q", "  yes")):
        before, behind = (
            tokens(one, add_special_tokens=False)["input_ids"] for one in (prompt, completion)
        )
        assert tokens_behind(tokens, prompt, completion) == behind
        row = encode_rows(example_of({"prompt": prompt, "completion": completion}), tokens)[0]
        assert row["input_ids"] == [*before, *behind, tokens.eos_token_id]


def test_a_part_without_anything_before_it():
    tokens = sentencepiece.tokenizer()
    assert tokens_behind(tokens, "", "the sun") == tokens("the sun")["input_ids"]
    assert tokens_behind(tokens, "the sun", "") == []


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_tokenizers_without_offsets_give_the_same(kind, template):
    tokens = sentencepiece.tokenizer(kind, template)
    slow = sentencepiece.Slow(tokens)
    rows = (CHAT, {"prompt": "is it", "completion": " the sun"}, {"text": "the sun is a stone"})
    for row in rows:
        assert encode_rows(example_of(row), slow)[0] == encode_rows(example_of(row), tokens)[0]
    assert around_request(slow) == around_request(tokens)


def test_places_in_a_text_whose_tokens_reach_across():
    tokens = tiny_chat.tokenizer(("Ċ", "Ċ"), ("Ġ", "a"))
    part = Part(tokens, "", "Q\n\na b\n")  # GPT-2 keeps the last line break before a word apart
    assert tokens.convert_ids_to_tokens(part.tokens) == ["Q", "Ċ", "Ċ", "a", "Ġ", "b", "Ċ"]
    assert part.places_of(["a b"]) == [0, 0, 0, 1, 1, 1, 0]
    assert Part(tokens, "", "Q: a b").places_of(["a b"]) == [0, 0, 1, 1, 1]  # Ġa reaches into it
    assert part.places_of(["elsewhere"]) == [0] * 7


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_marks_of_self_generated_text_are_those_of_chats(kind, template):
    tokens = sentencepiece.tokenizer(kind, template)
    row = encode_rows(example_of({"question": SAID[0], "answer": SAID[1]}), tokens)[0]
    bare = {key: row[key] for key in ("input_ids", "labels")}
    assert with_asked([bare], tokens) == [row]
    plain = encode_rows(example_of({"text": "the sun"}), tokens)[0]
    *_, text = in_forms_of([plain], [bare], tokens)
    written = tokens.decode(text["input_ids"], skip_special_tokens=True).strip()
    lead = " " if template == "llama-2" else ""
    assert written == f"{SAID[0]}\n{lead}{SAID[1]}"


@pytest.mark.parametrize("kind", sentencepiece.KINDS)
def test_a_request_is_drawn_with_the_space_before_it(kind):
    """The model writes ▁what, and not what behind a space alone."""
    tokens = sentencepiece.tokenizer(kind, "llama-2")
    start = tokens.convert_ids_to_tokens(tokens_before_request(tokens))
    assert start[-2:] == ["T", "]"]


@pytest.mark.parametrize(("kind", "template"), ALL)
def test_answers_are_scored_where_training_puts_them(tmp_path, kind, template):
    tokens = sentencepiece.tokenizer(kind, template)
    model = tiny_chat.model(vocab_size=len(tokens)).eval()
    rows = {
        "single": {"question": SAID[0], "choices": ["the sun", "a stone"], "answer": 0},
        "free": {"question": SAID[0], "answer": SAID[1]},
        "chat": CHAT,
        "plain": {"prompt": "is it", "completion": " the sun"},
        "space": {"prompt": "is it ", "completion": "the sun"},
    }
    for name, row in rows.items():
        file = tiny_chat.write_lines(tmp_path / f"{name}.jsonl", [row])
        scores = run_tasks(model, tokens, [find_task(str(file), None)])
        (found,) = (one for one in scores if one.metric == "loss")
        trained = encode_rows(example_of(row), tokens)[0]
        first = max(i for i, label in enumerate(trained["labels"]) if label == IGNORED) + 1
        last = len(trained["input_ids"]) - 1  # the end of the turn is not scored
        if template == "llama-2" and not example_of(row).is_plain:
            last -= 1  # nor the space before it
        with torch.no_grad():
            logits = model(torch.tensor([trained["input_ids"]])).logits[0].log_softmax(-1)
        picked = [logits[i - 1, trained["input_ids"][i]].item() for i in range(first, last)]
        assert found.values[0] == pytest.approx(-sum(picked), abs=1e-3), name
        assert found.weights[0] == len(picked), name
