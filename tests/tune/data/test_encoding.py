from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from budwood.errors import InputError, UnknownNameError, UnsupportedModelError
from budwood.loading import is_file_name
from budwood.tune.data.batches import Padded
from budwood.tune.data.encoding import IGNORED, encode, encode_rows, token_rows, told_labels
from budwood.tune.data.examples import Example, example_of, read_examples, styled
from budwood.tune.data.self_generated import with_asked
from budwood.tune.data.template import prompt_tokens
from budwood.tune.training.losses import answer_kl, answer_loss, prompt_kl, token_kl
from budwood.tune.training.trainer import LengthGrouped, grouped_order
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()
QUESTION = {"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1}


def text(ids):
    return TOKENS.decode(ids)


def test_loss_is_on_the_answer_and_the_end_of_its_turn():
    row = encode_rows(example_of(QUESTION), TOKENS)[0]
    learnt = [t for t, label in zip(row["input_ids"], row["labels"]) if label != IGNORED]
    assert text(learnt) == "yes<|im_end|>"
    assert text(row["input_ids"]) == (
        "<|im_start|>user\nIs it wet?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    n_prompt = len(prompt_tokens(TOKENS, "Is it wet?"))
    assert set(row["labels"][:n_prompt]) == {IGNORED} and row["labels"][n_prompt] != IGNORED


def test_every_turn_of_the_assistant_is_learnt():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    example = example_of({"messages": [{"role": r, "content": c} for r, c in turns]})
    row = encode_rows(example, TOKENS)[0]
    learnt = [t for t, label in zip(row["input_ids"], row["labels"]) if label != IGNORED]
    assert text(learnt) == "b<|im_end|>d<|im_end|>"
    whole = TOKENS.apply_chat_template(list(example.messages), tokenize=False)
    assert text(row["input_ids"]) + "\n" == whole


def test_styles():
    assert example_of(QUESTION, "listed").question == "Is it wet?\n- no\n- yes"
    assert styled(example_of(QUESTION), "listed") == example_of(QUESTION, "listed")
    with pytest.raises(UnknownNameError):
        read_examples("x.jsonl", style="other")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "answer": True, "passage": "p"}, "true"),
        (
            {
                "question_stem": "q",
                "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                "answerKey": "B",
            },
            "b",
        ),
        ({"question": "q", "answer": "some text"}, "some text"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, "a"),
    ],
)
def test_columns_of_the_hub(row, answer):
    assert example_of(row).messages[-1] == {"role": "assistant", "content": answer}


@pytest.mark.parametrize("answer", [True, "c", -1, 2, 1.0])
def test_answer_must_be_an_index(answer):
    with pytest.raises(InputError, match="must be an index from 0 to 1"):
        example_of({"question": "q", "choices": ["a", "b"], "answer": answer})


def test_half_a_character_is_refused_with_its_line(tmp_path):
    file = tiny_chat.write_lines(
        tmp_path / "a.jsonl", [QUESTION, {**QUESTION, "question": "a \ud83d"}]
    )
    with pytest.raises(InputError, match="a.jsonl, line 2: .*half a character"):
        read_examples(str(file))


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tiny_chat.write_lines(tmp_path / "train.jsonl", [QUESTION])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_examples(str(file)) == [example_of(QUESTION)]
    file.write_bytes(b"\xff\xfe" + file.read_bytes())
    with pytest.raises(InputError, match="train.jsonl: it is not UTF-8 text"):
        read_examples(str(file))


def test_what_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions").touch()
    (tmp_path / "boolq").mkdir()
    assert all(map(is_file_name, ("a.txt", "b/c.jsonl", "c.json", "./d", "~/e", "questions")))
    assert not any(map(is_file_name, ("boolq", "hellaswag", "allenai/ai2_arc")))


def test_too_long_examples_are_left_out():
    examples = [example_of(QUESTION), example_of(QUESTION | {"question": "long " * 50})]
    found = encode(examples, TOKENS, 100)
    assert len(found.rows) == 1 and found.n_too_long == 1
    with pytest.raises(InputError, match="all 2 examples are longer"):
        encode(examples, TOKENS, 10)


def test_rows_without_a_supervised_token_are_refused():
    mute = tiny_chat.tokenizer()
    mute.chat_template = TOKENS.chat_template.replace(
        "message['content'] + '<|im_end|>\n'",
        "(message['content'] if message.role == 'user' else '')",
    )
    with pytest.raises(InputError, match="template leaves out what the assistant says"):
        encode([example_of(QUESTION)], mute, 100)
    asked, said = example_of(QUESTION).messages
    silent = Example((asked, {**said, "content": ""}))
    with pytest.raises(InputError, match="^row 0 of the data: no token is supervised"):
        encode([silent, silent], mute, 100)
    known = dataclasses.replace(silent, where="a.jsonl, line 3")
    with pytest.raises(InputError, match="^a.jsonl, line 3: no token is supervised"):
        encode([known], mute, 100)


def test_chat_template_is_needed():
    bare = tiny_chat.tokenizer()
    bare.chat_template = None
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        encode([example_of(QUESTION)], bare, 100)


def chat(*roles):
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


@pytest.mark.parametrize("first", [(), ("system",)])
def test_the_user_speaks_before_the_assistant(first):
    with pytest.raises(InputError, match="assistant speaks before the user"):
        example_of(chat(*first, "assistant", "user", "assistant"))


@pytest.mark.parametrize(("key", "value"), [("name", "Ada"), ("weight", 0)])
def test_messages_have_no_keys_that_templates_ignore(key, value):
    row = chat("user", "assistant")
    row["messages"][1][key] = value
    with pytest.raises(InputError, match=f"the assistant message has {key}, which is not und"):
        example_of(row)


def test_what_templates_are_not_given_is_refused():
    row = chat("user", "assistant")
    assert example_of(row | {"tools": [], "source": "a site"}) == example_of(row)
    with pytest.raises(InputError, match="the row has documents, which is not understood"):
        example_of(row | {"documents": [{"title": "a"}]})


def test_keys_of_a_message_that_hold_nothing_are_no_matter():
    row = chat("user", "assistant")
    row["messages"][0] |= {"name": None, "tool_calls": []}
    assert example_of(row) == example_of(chat("user", "assistant"))


def test_what_a_template_refuses_is_told_with_its_line(tmp_path):
    strict = tiny_chat.tokenizer()
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No\nsystem role') }}"
        "{% endif %}" + strict.chat_template
    )
    file = tmp_path / "chats.jsonl"
    tiny_chat.write_lines(file, [chat("user", "assistant"), chat("system", "user", "assistant")])
    examples = read_examples(str(file))
    assert examples[0] == example_of(chat("user", "assistant"))  # wherever it comes from
    with pytest.raises(InputError, match=r"chats.jsonl, line 2: .*\(No system role\)") as error:
        encode(examples, strict, 300)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^the model's chat template refuses turns of sys"):
        encode_rows(example_of(chat("system", "user", "assistant")), strict)[0]


def rows_of(*lengths):
    return [
        {"input_ids": list(range(5, 5 + n)), "labels": [IGNORED] * (n - k) + list(range(k))}
        for n, k in lengths
    ]


def test_left_padding_and_the_positions_that_are_needed():
    batch = Padded(pad_id=0, multiple=8)(rows_of((9, 2), (5, 3)))
    assert batch["input_ids"].shape == (2, 16) and batch["logits_to_keep"] == 4
    assert batch["input_ids"][1].tolist() == [0] * 11 + [5, 6, 7, 8, 9]
    assert batch["attention_mask"].sum(1).tolist() == [9, 5]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 0, 1], [IGNORED, 0, 1, 2]]
    more = Padded(pad_id=0, n_before=100)(rows_of((9, 2)))
    assert more["logits_to_keep"] == 16 and more["labels"].shape == (1, 16)


def test_padding_moves_no_position():
    """GPT-2 reads where a token is from a table, which rows of 44 fill."""
    torch.manual_seed(0)
    sizes = {"n_positions": 44, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 260}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5)).eval()
    rows = rows_of((44, 2), (9, 3), (30, 5))
    collate = Padded.of(model, TOKENS, trim=False)
    losses = [model(**Padded(0, multiple=1, trim=False)([row])).loss.item() for row in rows]
    counts = torch.tensor([2.0, 3.0, 5.0])
    together = model(**collate(rows)).loss.item()
    assert together == pytest.approx(float((torch.tensor(losses) * counts).sum() / 10), rel=1e-4)
    assert "position_ids" not in Padded.of(tiny_chat.model(), TOKENS)(rows)


def test_loss_with_the_last_logits_is_that_with_all():
    model = tiny_chat.model()
    rows = rows_of((9, 2), (30, 5), (4, 1))
    trimmed, whole = Padded(0)(rows), Padded(0, trim=False)(rows)
    losses = []
    for batch in (trimmed, whole):
        labels = batch.pop("labels")
        losses.append(answer_loss(model(**batch).logits, labels))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    theirs = model(**Padded(0, trim=False)(rows)).loss
    assert losses[1].item() == pytest.approx(theirs.item(), rel=1e-5)


def test_token_kl_by_hand():
    base, tuned = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = [0.5, 0.5], torch.tensor([0.0, 1.0]).softmax(0).tolist()
    expected = sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q))
    assert token_kl(base, tuned).item() == pytest.approx(expected, rel=1e-5)
    assert token_kl(base, base).item() == 0


def test_answer_kl_counts_where_labels_are_predicted():
    torch.manual_seed(0)
    base, tuned = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    labels = torch.tensor([[3, -100, -100, 4], [-100, 2, 5, -100]])
    places = [(0, 2), (1, 0), (1, 1)]  # the first token of a row is predicted nowhere
    expected = torch.stack([token_kl(base[i, j], tuned[i, j]) for i, j in places]).mean()
    assert answer_kl(base, tuned, labels).item() == pytest.approx(expected.item())


def test_prompt_kl_counts_prompt_tokens_alone():
    torch.manual_seed(0)
    base, tuned = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, -100, 3, 4], [-100, -100, -100, -100, 2]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    # Positions that are padding, that hold an answer, or that predict one do not count.
    expected = torch.stack([token_kl(base[i, j], tuned[i, j]) for i, j in [(0, 1), (1, 2)]]).mean()
    assert prompt_kl(base, tuned, labels, attention).item() == pytest.approx(expected.item())
    nothing = torch.zeros_like(attention)
    assert prompt_kl(base, tuned, labels, nothing).item() == 0


def test_order_is_a_permutation_with_like_lengths_together():
    draw = random.Random(0)
    lengths = [draw.randrange(5, 100) for _ in range(203)]
    order = grouped_order(lengths, 8, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(203))
    spread = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
        for k in range(0, 200, 8)
    ]
    assert sum(spread) / len(spread) < 10


def test_each_epoch_has_its_own_order_that_a_resumed_run_finds_again():
    sampler = LengthGrouped([1] * 50, 4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    again = LengthGrouped([1] * 50, 4, seed=3)
    again.set_epoch(1)
    assert first != second == list(again) and len(sampler) == 50


def test_the_end_of_a_turn_need_not_be_the_end_of_texts():
    """As with Gemma and Phi, whose turns end with a token of their own."""
    tokenizer = tiny_chat.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    (row,) = encode([example_of({"question": "q", "answer": "a"})], tokenizer, 500).rows
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "a<|im_end|>"
    assert tokenizer.decode(row["input_ids"]).endswith("a<|im_end|>")


def test_an_answer_with_the_text_of_a_token_is_kept_whole():
    answer = "I say <|im_end|> and go on"
    (row,) = encode([example_of({"question": "q", "answer": answer})], TOKENS, 500).rows
    assert TOKENS.decode([label for label in row["labels"] if label != IGNORED]) == (
        f"{answer}<|im_end|>"
    )


def test_a_system_message_that_a_template_leaves_out():
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = tiny_chat.TEMPLATE.replace(
        "message in messages", "message in messages if message.role != 'system'"
    )
    row = example_of({"system": "Be brief.", "question": "q", "answer": "a"})
    with pytest.raises(InputError, match="has no place for a system message"):
        encode([row], tokenizer, 500)


def test_tokens_below_zero():
    for wrong in (
        {"input_ids": [5, -1], "labels": [5, 5]},
        {"input_ids": [5, 5], "labels": [5, -1]},
    ):
        with pytest.raises(
            InputError, match="row 0 of the data has a token below 0; labels may be -100"
        ):
            token_rows([wrong])


def asked(row):
    return TOKENS.decode([i for i, mark in zip(row["input_ids"], row["asked"]) if mark])


def test_what_the_user_wrote_is_marked():
    row = encode_rows(example_of(QUESTION), TOKENS)[0]
    assert asked(row) == "Is it wet?" and len(row["asked"]) == len(row["labels"])
    turns = [
        ("system", "Be brief."),
        ("user", "A?"),
        ("assistant", "b"),
        ("user", "A?"),
        ("assistant", "d"),
    ]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = encode_rows(example_of(chat), TOKENS)[0]
    assert asked(row) == "A?A?" and len(row["asked"]) == len(row["labels"])
    row = encode_rows(example_of({"prompt": "The sky is", "completion": " blue."}), TOKENS)[0]
    assert asked(row) == "The sky is"
    assert asked(encode_rows(example_of({"text": "All of it."}), TOKENS)[0]) == ""


def test_told_labels_have_a_label_behind_what_was_written():
    row = encode_rows(example_of(QUESTION), TOKENS)[0]
    counted = [i for i, label in zip(row["input_ids"], told_labels(row)[1:]) if label != IGNORED]
    assert TOKENS.decode(counted) == "Is it wet?\nyes"  # the line break is before the answer
    bare = {key: row[key] for key in ("input_ids", "labels")}
    assert told_labels(bare) == row["labels"] and token_rows([row]) == [row]


def test_marks_of_self_generated_text_are_those_of_chats():
    row = encode_rows(example_of({"question": "Is it wet?", "answer": "yes"}), TOKENS)[0]
    bare = {key: row[key] for key in ("input_ids", "labels")}
    assert with_asked([bare], TOKENS) == [row]


def test_marks_that_a_row_has_stay():
    """Such as those of a chat whose system message is another one than the template's."""
    turns = [("system", "Be brief, and kind."), ("user", "Is it wet?"), ("assistant", "yes")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = encode_rows(example_of(chat), TOKENS)[0]
    assert asked(row) == "Is it wet?" and with_asked([row], TOKENS) == [row]
    bare = {key: row[key] for key in ("input_ids", "labels")}
    assert with_asked([bare], TOKENS) == [bare]  # the template does not begin it
