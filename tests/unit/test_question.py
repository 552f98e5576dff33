"""Which tokens count as the question, on rows written out by hand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from budwood.errors import InputError, UnknownNameError
from budwood.prune import attach
from budwood.prune.question import Question, Scaffold
from tests.contract import models
from tests.contract.models import words

BOS, END, OPEN, CLOSE, IMAGE = 1, 2, 4, 5, 3
WRAPPING = (OPEN, CLOSE, IMAGE)


def ask(row, image, rule="turn", stop=None, answers=(), scaffold=None):
    question = Question(rule, {BOS, END, OPEN}, WRAPPING, scaffold)
    found = question.positions(torch.tensor(row), image, stop or len(row), answers)
    return [row[i] for i in found]


def test_turn_ends_at_the_first_special_token():
    row = [BOS, 20, IMAGE, IMAGE, 30, 31, END, 40, 41]
    assert ask(row, (2, 4)) == [30, 31]
    assert ask(row, (2, 4), rule="all") == [30, 31, END, 40, 41]


def test_tokens_around_an_image_are_no_text_and_end_nothing():
    row = [BOS, 20, OPEN, IMAGE, CLOSE, 30, OPEN, IMAGE, IMAGE, CLOSE, 31, END, 40]
    assert ask(row, (3, 4)) == [30, 31]
    assert ask(row, (7, 9)) == [31]
    assert ask(row, (3, 4), rule="all") == [30, 31, END, 40]


def test_images_before_one_text_share_it():
    row = [BOS, IMAGE, IMAGE, IMAGE, 30, 31, END]
    assert ask(row, (1, 2)) == ask(row, (2, 4)) == [30, 31]


@pytest.mark.parametrize("rule", ["turn", "all"])
def test_without_text_after_it_an_image_gets_the_text_before(rule):
    row = [BOS, 20, END, 21, 22, OPEN, IMAGE, CLOSE]
    assert ask(row, (6, 7), rule) == [21, 22]
    assert ask([BOS, IMAGE, END], (1, 2)) == []


def test_padding_on_the_right_is_no_text():
    row = [BOS, IMAGE, 30, 0, 0]
    assert ask(row, (1, 2), rule="all", stop=3) == [30]


def test_supervised_tokens_are_answers_unless_all_are():
    row = [BOS, IMAGE, 30, 31, 40, 41]
    assert ask(row, (1, 2), answers={4, 5}) == [30, 31]
    assert ask(row, (1, 2), answers=set(range(6))) == [30, 31, 40, 41]


def test_scaffold_is_cut_off_on_both_sides():
    scaffold = Scaffold((10,), (50, 51))
    row = [BOS, IMAGE, 10, 30, 50, 31, 50, 51, 60, END, IMAGE, 10, 32]
    assert ask(row, (1, 2), scaffold=scaffold) == [30, 50, 31]
    assert ask([BOS, IMAGE, 30, 10], (1, 2), scaffold=scaffold) == [30, 10]


class Words:
    """A tokenizer with a word a token, and special tokens."""

    chat_template = None
    unk_token_id = 9
    all_special_ids = (0, BOS, END, 9)

    def __init__(self):
        self.ids = {"<s>": BOS, "</s>": END, "<image>": IMAGE, "<open>": OPEN, "<close>": CLOSE}

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens  # the template has them
        parts = re.findall(r"<[^>]*>|\n|[^\s<]+", text)
        ids = [self.ids.setdefault(part, 20 + len(self.ids)) for part in parts]
        return SimpleNamespace(input_ids=ids)


class Chat:
    """A processor with a chat template in which no special token ends the user's turn."""

    chat_template = "there is one"

    def __init__(self, form="<s>USER: <open><image><close>\n{} ASSISTANT: now"):
        self.tokenizer = Words()
        self.form = form

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        (message,) = chat
        image, text = message["content"]
        assert (message["role"], image["type"], text["type"]) == ("user", "image", "text")
        assert add_generation_prompt and not tokenize
        return self.form.format(text["text"])


def test_the_scaffold_is_read_off_the_template():
    processor = Chat()
    scaffold = Scaffold.of(processor, IMAGE)
    ids = processor.tokenizer.ids
    assert scaffold.prefix == (CLOSE, ids["\n"])
    assert scaffold.suffix == (ids["ASSISTANT:"], ids["now"])
    prompt = processor.form.format("what is ASSISTANT: here")
    row = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    start = row.index(IMAGE)
    found = ask(row, (start, start + 1), scaffold=scaffold)
    assert found == [ids[word] for word in ("what", "is", "ASSISTANT:", "here")]


def test_without_a_template_there_is_no_scaffold():
    assert Scaffold.of(Words(), IMAGE) == Scaffold()
    assert Scaffold.of(Chat("<s>USER: {}"), IMAGE) == Scaffold()


def test_attach_reads_the_processor():
    case = models.llava()
    processor = Chat("<s>USER: <image>\n{} ASSISTANT: now")
    ids = processor.tokenizer.ids
    Scaffold.of(processor, IMAGE)
    text = words(4, 1)
    row = [ids["USER:"], 0, ids["\n"], *text, ids["ASSISTANT:"], ids["now"]]
    # `0` is the image; ids of words are above 20 and stay far below the vocabulary's 61.
    batch = case.batch([[row[0]], 0, row[2:]])
    with attach(case.model, keep=3, question="turn", processor=processor) as session:
        case.model.generate(**batch, max_new_tokens=1)
    found = batch["input_ids"][0, list(session.report[0].question)]
    assert found.tolist() == text
    with attach(case.model, keep=3, question="turn") as session:
        case.model.generate(**batch, max_new_tokens=1)
    assert batch["input_ids"][0, list(session.report[0].question)].tolist() == row[2:]


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda found: slice(found[0], found[-1] + 1)])
def test_a_function_says_which_positions(kind):
    row = [BOS, 20, IMAGE, IMAGE, 30, 31, 32]

    def rule(ids, start, stop):
        assert ids.tolist() == row
        assert (start, stop) == (2, 4)
        return kind([stop, stop + 1])

    assert ask(row, (2, 4), rule=rule) == [30, 31]


def test_a_function_may_return_a_mask_and_positions_in_any_order():
    row = [BOS, 20, IMAGE, IMAGE, 30, 31, 32]
    assert ask(row, (2, 4), rule=lambda ids, *_: ids == 31) == [31]
    assert ask(row, (2, 4), rule=lambda *_: [6, 4, 6]) == [30, 32]
    assert ask(row, (2, 4), rule=lambda *_: []) == []


@pytest.mark.parametrize("found", [None, "x", [1.5], [True], torch.ones(5, 2).bool(), [[1], "x"]])
def test_a_function_that_returns_something_else_says_so(found):
    with pytest.raises(InputError, match="question function returned .*return positions"):
        ask([BOS, IMAGE, 30, 31, 32], (1, 2), rule=lambda *_: found)


def test_positions_outside_the_row_say_so():
    with pytest.raises(InputError, match="5 tokens.*-1 to 7"):
        ask([BOS, IMAGE, 30, 31, 32], (1, 2), rule=lambda *_: [7, -1])


def test_an_unknown_rule_says_so():
    with pytest.raises(UnknownNameError, match="'turns'"):
        Question("turns")


def test_no_question_at_all_is_legal():
    """An image alone: AdaV then goes by saliency."""
    case = models.llava()
    batch = case.batch([0])
    with attach(case.model, keep=3) as session:
        case.model.generate(**batch, max_new_tokens=1)
    image = session.report[0]
    assert image.question == ()
    assert torch.equal(image.kept, image.saliency.topk(3).indices.sort().values)


# The current turn of a chat


class Turns(Chat):
    """A template for any number of turns, without special tokens around the user's."""

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        said = []
        for message in chat:
            text = message["content"][-1]["text"]
            picture = "<image>\n" if message["content"][0]["type"] == "image" else ""
            is_user = message["role"] == "user"
            said.append(f"USER: {picture}{text} " if is_user else f"ASSISTANT: {text} </s> ")
        return "".join(["<s>", *said, "ASSISTANT:"])


def test_the_current_turn_with_a_template():
    processor = Turns()
    scaffold = Scaffold.of(processor, IMAGE)
    ids = processor.tokenizer.ids
    assert scaffold.later == (END, ids["USER:"])

    def asked(prompt, **options):
        row = processor.tokenizer(prompt, add_special_tokens=False).input_ids
        start = row.index(IMAGE)
        found = ask(row, (start, start + 1), "current", scaffold=scaffold, **options)
        names = {number: word for word, number in ids.items()}
        return " ".join(names[i] for i in found)

    first = "<s>USER: <image>\nwhat is it ASSISTANT:"
    assert asked(first) == "what is it"
    assert asked(f"{first} a cat </s> USER: where ASSISTANT:") == "where"
    third = f"{first} a cat </s> USER: where ASSISTANT: there </s> USER: how many ASSISTANT:"
    assert asked(third) == "how many"


def test_the_current_turn_before_a_supervised_answer():
    processor = Turns()
    scaffold = Scaffold.of(processor, IMAGE)
    prompt = "<s>USER: <image>\nwhat is it ASSISTANT: a cat </s> USER: where ASSISTANT: over there"
    row = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    start = row.index(IMAGE)
    where = processor.tokenizer.ids["where"]
    n = len(row)
    for answers in ({n - 1, n - 2}, {n - 1, n - 2, *range(start + 6, start + 8)}):
        found = ask(row, (start, start + 1), "current", answers=answers, scaffold=scaffold)
        assert found == [where]


def test_the_current_turn_without_a_template():
    chat = [BOS, 20, IMAGE, 30, 31, 32, 33, END]  # <bos>user<image>…<end><bos>assistant…
    assert ask([*chat, BOS, 50], (2, 3), "current") == [30, 31, 32, 33]
    later = [*chat, BOS, 50, 60, 61, 62, 63, END, BOS, 20, 40, 41, 42, END, BOS, 50]
    assert ask(later, (2, 3), "current") == [20, 40, 41, 42]
    assert ask(later, (2, 3), "turn") == [30, 31, 32, 33]
    assert ask([BOS, IMAGE, 30], (1, 2), "current") == [30]
    assert ask([BOS, 20, 21, IMAGE], (3, 4), "current") == [20, 21]


def test_a_fully_supervised_row_has_a_current_turn():
    row = [BOS, 20, IMAGE, 30, 31]
    assert ask(row, (2, 3), "current", answers=set(range(5))) == [30, 31]


def test_the_current_turn_is_the_default():
    case = models.llava()
    processor = Turns()
    first = processor.tokenizer(
        "USER: <image>\nwhat is it ASSISTANT: a cat </s> USER: where ASSISTANT:",
        add_special_tokens=False,
    ).input_ids
    start = first.index(IMAGE)
    batch = case.batch([first[:start], 0, first[start + 1 :]])
    with attach(case.model, keep=3, processor=processor) as session:
        case.model.generate(**batch, max_new_tokens=1)
    found = batch["input_ids"][0, list(session.report[0].question)].tolist()
    assert found == [processor.tokenizer.ids["where"]]


def test_a_template_that_cannot_be_rendered_is_as_none():
    class Broken(Chat):
        def apply_chat_template(self, chat, tokenize, add_generation_prompt):
            raise ValueError("content must be text")

    assert Scaffold.of(Broken(), IMAGE) == Scaffold()
    case = models.llava()
    with attach(case.model, keep=3, processor=Broken(), question=lambda *_: [0]) as session:
        case.model.generate(**case.batch([0, words(3, 1)]), max_new_tokens=1)
    assert session.report[0].question == (0,)
