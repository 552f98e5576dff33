"""Rows and files as other tools write them."""

from __future__ import annotations

import json

import datasets
import pytest

from budwood.errors import InputError
from budwood.tune.data.encoding import IGNORED, encode, encode_rows
from budwood.tune.data.examples import example_of, examples_of, read_examples
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()
CALL = {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def chat(*turns):
    return tuple({"role": role, "content": content} for role, content in turns)


ASKED = chat(("user", "Is ice cold?"), ("assistant", "Yes."))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Is ice cold?", "output": "Yes."},
        {"instruction": "Is ice cold?", "input": "", "output": "Yes.", "text": "### …"},
        {"instruction": "Is ice cold?", "context": "", "response": "Yes.", "category": "open"},
        {"query": "Is ice cold?", "response": "Yes.", "type": "GSM", "original_question": "?"},
        {"prompt": "Is ice cold?", "response": "Yes."},
        {
            "conversations": [
                {"from": "human", "value": "Is ice cold?"},
                {"from": "gpt", "value": "Yes."},
            ]
        },
        {
            "messages": [
                {"from": "user", "value": "Is ice cold?", "weight": None},
                {"from": "assistant", "value": "Yes."},
            ]
        },
    ],
)
def test_single_questions(row):
    assert example_of(row).messages == ASKED


def test_what_belongs_to_a_question():
    row = {"instruction": "Shorten.", "input": "A long text.", "output": "Text.", "system": "Be."}
    assert example_of(row).messages == chat(
        ("system", "Be."), ("user", "Shorten.\n\nA long text."), ("assistant", "Text.")
    )


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["no", "yes"], "B", 1),
        (["no", "yes"], "b)", 1),
        (["no", "yes"], "yes", 1),
        (["no", "yes"], 0, 0),
        ({"text": ["no", "yes"], "label": ["1", "2"]}, "2", 1),
        (["x", "y", "z"], "C.", 2),
        (["1", "2"], "2", 1),
        # A number is a label where labels are numbers, and else an index.
        ({"text": ["ice", "fire", "sun"], "label": [1, 2, 3]}, 1, 0),
        ({"text": ["ice", "fire", "sun"], "label": ["1", "2", "3"]}, 1, 0),
        ({"text": ["ice", "fire", "sun"], "label": [1, 2, 3]}, "3.", 2),
        ({"text": ["2", "1"], "label": ["1", "2"]}, 1, 0),
        ({"text": ["2", "1"], "label": ["1", "2"]}, "1", 0),
        ({"text": ["ice", "fire"], "label": [0, 1]}, 1, 1),
        ({"text": ["ice", "fire"], "label": ["A", "B"]}, 1, 1),
        ({"text": ["8", "6"], "label": [1, 2]}, 8, 0),
    ],
)
def test_the_right_choice(choices, answer, index):
    example = example_of({"question": "q", "choices": choices, "answer": answer})
    assert example.answer == index and example.messages[-1]["content"] == example.choices[index]


def test_choices_in_columns_of_their_own():
    row = {"question": "Is ice cold?", "A": "no", "B": "yes", "answer": "B"}
    assert example_of(row) == example_of(
        {"question": "Is ice cold?", "choices": ["no", "yes"], "answer": 1}
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "index from 0 to 1, the letter"),
        (
            {"question": "q", "A": "x", "B": "y", "answer": "C"},
            "0 to 1, one of the labels A, B, or",
        ),
        ({"question": "q", "choices": ["B", "A"], "answer": "A"}, "more than one choice"),
        (
            {"question": "q", "choices": {"text": ["a", "b"], "label": [1, 2]}, "answer": 0},
            "^answer 0 must be one of the labels 1, 2, or the text of a choice$",
        ),
        (
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "1"]}, "answer": 1},
            "give each choice a label of its own",
        ),
        ({"question": "q", "answr": "y"}, "are question, answr; did you mean 'answr'"),
        ({"question": "q", "correct_answer": "y"}, "did you mean 'correct_answer'"),
        ({"question": "q", "choices": ["a", "b"], "answers": [0]}, "did you mean 'answers'"),
        ({"question": "q", "reply": "y", "answer": None}, "are question, reply; give it in"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "TRL's DPOTrainer"),
        ({"prompt": "p", "completion": "a", "rejected": "b"}, "TRL's DPOTrainer"),
        ({"question": "p", "completions": ["a"], "labels": [True]}, "train a reward model"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "the whole conversation"),
        ({"instruction": "a"}, "has the keys instruction; give"),
        ({"instruction": ["a"], "output": "b"}, "instruction must be a text"),
        ({"instruction": "a", "output": ""}, "content of the assistant message must be a text"),
        ({"conversations": [{"from": "who", "value": "a"}]}, "a message needs a role"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools need messages"),
        ({"messages": list(ASKED), "tools": "[{"}, "tools are not JSON"),
        ({"messages": list(ASKED), "tools": [7]}, "list of JSON schemas"),
    ],
)
def test_refuses(row, message):
    with pytest.raises(InputError, match=message) as error:
        example_of(row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [False, True, 0, 1.0, "false", "True", "0"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is ice cold?", "completion": " No."},
        {"prompt": list(ASKED[:1]), "completion": list(ASKED[1:])},
        {"question": "Is ice cold?", "answer": "No."},
        {"instruction": "Is ice cold?", "output": "No."},
        {"messages": list(ASKED)},
    ],
)
def test_answers_with_a_verdict_are_refused(row, label):
    with pytest.raises(InputError, match=f"label={label!r}, which says .* TRL's KTOTrainer"):
        example_of({**row, "label": label})
    assert example_of({**row, "label": None}) == example_of(row)


def test_labels_that_are_no_verdict():
    row = {"question": "Is ice cold?", "answer": "Yes."}
    assert example_of({**row, "label": "physics", "score": 0.1}) == example_of(row)
    choice = {"question": "Is ice cold?", "choices": ["no", "yes"], "answer": 1}
    assert example_of({**choice, "label": 1}) == example_of(choice)
    judged = {"question": "Is ice cold?", "answer": True, "label": 1}
    assert example_of(judged).messages[-1]["content"] == "true"


@pytest.mark.parametrize("column", ["label", "summary", "target", "prompt"])
def test_texts_with_answers_beside_them_are_refused(column):
    with pytest.raises(InputError, match=f"is a text beside {column}"):
        example_of({"text": "Ice.", column: "cold"})
    assert example_of({"text": "Ice.", "source": "a book"}) == example_of({"text": "Ice."})


@pytest.mark.parametrize(
    "options",
    [
        {"options": ["fire", "ice"]},  # MMLU-Pro
        {"options": {"A": "fire", "B": "ice"}},  # MedQA
        {"option_a": "fire", "option_b": "ice"},
        {"A": "fire", "B": "ice"},
    ],
)
@pytest.mark.parametrize("answer", ["B", "ice"])
def test_choices_under_other_names(options, answer):
    example = example_of({"question": "What is cold?", "answer": answer, **options})
    assert example.choices == ("fire", "ice") and example.answer == 1
    assert example.messages[-1]["content"] == "ice"


def test_an_article_stands_above_its_question():
    race = {"article": "Ice is cold.", "question": "Is it?", "options": ["no", "yes"]}
    assert example_of({**race, "answer": "B"}).question == "Ice is cold.\n\nIs it?"


# --- calls of tools -------------------------------------------------------------------------------


def called(arguments=CALL["arguments"]):
    call = {"id": "1", "type": "function", "function": {**CALL, "arguments": arguments}}
    return [
        {"role": "user", "content": "Is it cold in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "-3"},
        {"role": "assistant", "content": "Yes, -3 degrees."},
    ]


def with_tools():
    tokens = tiny_chat.tokenizer()
    tokens.chat_template = tiny_chat.WITH_TOOLS
    return tokens


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("arguments", [CALL["arguments"], '{"city": "Oslo"}'])
def test_calls_of_tools_are_learnt(tools, arguments):
    tokens = with_tools()
    row = encode_rows(example_of({"messages": called(arguments), "tools": tools}), tokens)[0]
    learnt = tokens.decode([x for x, y in zip(row["input_ids"], row["labels"]) if y != IGNORED])
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert learnt == f"<call>{call}</call><|im_end|>Yes, -3 degrees.<|im_end|>"
    text = tokens.decode(row["input_ids"])
    assert text.startswith(
        '<|im_start|>system\n[{"type": "function", "function": {"name": "weather"'
    )
    assert "<|im_start|>tool\n-3<|im_end|>" in text


def test_a_prompt_with_tools_and_its_completion():
    messages = called()
    row = {"prompt": messages[:3], "completion": messages[3:], "tools": [TOOL]}
    encoded = encode_rows(example_of(row), with_tools())[0]
    learnt = [x for x, y in zip(encoded["input_ids"], encoded["labels"]) if y != IGNORED]
    assert with_tools().decode(learnt) == "Yes, -3 degrees.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": list(ASKED), "tools": [TOOL]}, "tools"),
        ({"messages": called()}, "tool_calls"),
        ({"messages": [*ASKED[:1], {**ASKED[1], "thinking": "Ice is frozen."}]}, "thinking"),
    ],
)
def test_a_template_without_a_place_is_refused(row, what):
    with pytest.raises(InputError, match=f"^row 0 of the data: .*has no place for {what}"):
        encode(examples_of([row]), TOKENS, 1000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {"arguments": {}}}, "needs a function with a name"),
        ({"function": {"name": "f", "arguments": "{"}}, "are not JSON"),
        ({"function": {"name": "f", "arguments": [1]}}, "are a list; give an object"),
        ("f()", "needs a function with a name"),
    ],
)
def test_refuses_calls(call, message):
    row = {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(InputError, match=message):
        example_of(row)


# --- files ----------------------------------------------------------------------------------------

ROWS = [
    {"question": "Is ice, cold?", "A": "no", "B": "yes", "answer": "B"},
    {"question": 'Is "fire"\ncold?', "A": "no", "B": "yes", "answer": "A"},
]


@pytest.fixture(params=["csv", "tsv", "parquet", "json", "jsonl"])
def file(request, tmp_path):
    path = tmp_path / f"train.{request.param}"
    table = datasets.Dataset.from_list(ROWS)
    if request.param in ("csv", "tsv"):
        table.to_csv(path, sep="," if request.param == "csv" else "\t", index=False)
    elif request.param == "parquet":
        table.to_parquet(path)
    elif request.param == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_every_kind_of_file(file):
    assert read_examples(str(file)) == [example_of(row) for row in ROWS]


def test_a_bad_row_is_named(file, tmp_path):
    path = tmp_path / f"bad{file.suffix}"
    path.write_bytes(file.read_bytes().replace(b"answer", b"anwser"))
    if file.suffix == ".parquet":
        datasets.Dataset.from_list([{**ROWS[0], "answer": "Z"}]).to_parquet(path)
    place = {".jsonl": "line 1", ".csv": "line 2", ".tsv": "line 2"}.get(file.suffix, "row 0")
    with pytest.raises(InputError, match=f"bad{file.suffix}, {place}: ") as error:
        read_examples(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "no parquet", "cannot read .*a.parquet: "),
        ("a.csv", 'question,answer\n"a', "cannot read .*a.csv, line 2: "),
        ("a.csv", "", "a.csv is empty"),
        (
            "a.csv",
            'question,answer\nq,a\nq,"b\nq,c\nq,d\n',
            "line 3: .* opens there is never closed",
        ),
        ("a.csv", "question,answer,answer\nq,a,b\n", "has the column 'answer' more than once"),
        ("a.csv", "question,answer\nq,a,b\n", "line 2: has 3 fields, and the header 2"),
        ("a.csv", "question,A,B,answer\nq,x,,A\n", "line 2: choices must be a list of two"),
        ("a.jsonl", "[" * 100_000, "begins with . and is no JSON array"),
        ("a.jsonl", '{"a":' * 100_000, "line 1: is not JSON"),
        ("a.csv", "question,answer\n", "a.csv is empty"),
        ("a.json", "[{]", "begins with \\[ and is no JSON array"),
        ("a.json", "[]", "a.json is empty"),
        ("a.json", '{\n "messages": []\n}', "line 1: is not JSON"),
        ("b.csv", None, "cannot read .*b.csv: "),
    ],
)
def test_refuses_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_examples(str(path))
    assert "\n" not in str(error.value)


TABLE = [
    ("question,answer", "What is 2+2?,4", {"question": "What is 2+2?", "answer": "4"}),
    ("question,answer", "Its code?,007", {"question": "Its code?", "answer": "007"}),
    ("question,answer", "When?,2024-01-01", {"question": "When?", "answer": "2024-01-01"}),
    ("question,answer", "Is it wet?,True", {"question": "Is it wet?", "answer": True}),
    ("instruction,output", "Its state?,NA", {"instruction": "Its state?", "output": "NA"}),
    (
        "question,A,B,answer",
        "Is it given?,NA,yes,B",
        {"question": "Is it given?", "choices": ["NA", "yes"], "answer": 1},
    ),
    (
        "question,A,B,C,answer",
        "What is 1+1?,1,2,3,B",
        {"question": "What is 1+1?", "choices": ["1", "2", "3"], "answer": 1},
    ),
    (
        "question,A,B,answer",
        "Is it wet?,no,yes,1",
        {"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1},
    ),
    (
        "question,context,answer",
        "Is it wet?,,yes",
        {"question": "Is it wet?", "answer": "yes"},
    ),
]


def test_choices_that_are_true_and_false(tmp_path):
    (tmp_path / "a.csv").write_text("question,A,B,C,answer\nq,true,false,,true\nq,x,,z,C\n")
    first, second = read_examples(str(tmp_path / "a.csv"))
    assert (first.choices, first.answer) == (("true", "false"), 0)
    assert (second.choices, second.answer) == (("x", "z"), 1)


def test_a_long_field_and_a_folder(tmp_path):
    (tmp_path / "a.csv").write_text(f"question,answer\nq,{'x' * 3_000_000}\n")
    (one,) = read_examples(str(tmp_path / "a.csv"))
    assert len(one.messages[-1]["content"]) == 3_000_000
    with pytest.raises(InputError, match=r"is a folder; give its files, such as .*jsonl"):
        read_examples(str(tmp_path))


@pytest.mark.parametrize(("header", "line", "row"), TABLE)
def test_tables_without_types_have_texts(tmp_path, header, line, row):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\n{line}\n")
    assert read_examples(str(path)) == [example_of(row)]


def test_a_truth_value_among_texts_is_a_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nIs it wet?,true\nIs it blue?,partly\n")
    assert [one.messages[-1]["content"] for one in read_examples(str(path))] == ["true", "partly"]


def test_a_table_that_is_no_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nf\xfcr,ja\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot read .*a.csv: it is not UTF-8 text"):
        read_examples(str(path))


@pytest.mark.parametrize("key", ["context", "input"])
def test_a_context_stands_below_every_question(key):
    asked = "Is it wet?\n\nIt rains."
    free = example_of({"question": "Is it wet?", key: "It rains.", "answer": "yes"})
    assert free.messages[0]["content"] == asked
    row = {"question": "Is it wet?", key: "It rains.", "choices": ["no", "yes"], "answer": 1}
    assert example_of(row).question == asked
    with pytest.raises(InputError, match=f"the row has {key}, which is not understood"):
        example_of({"prompt": "Is it wet?", key: "It rains.", "completion": " yes"})


def test_a_system_column_comes_first():
    turns = [{"from": "human", "value": "Is it wet?"}, {"from": "gpt", "value": "yes"}]
    messages = [{"role": "user", "content": "Is it wet?"}, {"role": "assistant", "content": "yes"}]
    system = {"role": "system", "content": "Be brief."}
    for row in (
        {"conversations": turns},
        {"messages": messages},
        {"question": "Is it wet?", "answer": "yes"},
    ):
        assert example_of({"system": "Be brief.", **row}).messages == (system, *messages)
    for row, reason in (
        ({"messages": [system, *messages]}, "beside a system message"),
        ({"question": "Is it wet?", "choices": ["no", "yes"], "answer": 1}, "with choices has"),
        ({"prompt": "Is it wet?", "completion": " yes"}, "the row has system"),
    ):
        with pytest.raises(InputError, match=reason):
            example_of({"system": "Be brief.", **row})


def test_tables_of_pandas():
    table = datasets.Dataset.from_list(ROWS).to_pandas()
    assert examples_of(table) == [example_of(row) for row in ROWS]


@pytest.mark.parametrize("form", ["numpy", "torch", None])
def test_rows_of_arrays_and_tuples(form):
    table = datasets.Dataset.from_list([{"question": "q", "choices": ["a", "b"], "answer": 1}] * 2)
    (first, second) = examples_of(table.with_format(form))
    assert first == second == example_of({"question": "q", "choices": ("a", "b"), "answer": 1})
    assert first.answer == 1 and first.choices == ("a", "b")
    assert len(examples_of([table, table])) == 4
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert example_of({"messages": turns}) == example_of({"messages": list(turns)})


def test_of_two_equal_choices_the_first_counts():
    """As accuracy does, which asks which choice is most probable."""
    assert example_of({"question": "q", "choices": ["b", "a", "a"], "answer": 2}).answer == 1


def test_a_table_without_answers_names_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answr\nIs it wet?,yes\n")
    with pytest.raises(InputError, match="line 2: has no answer, .* did you mean 'answr'"):
        read_examples(str(tmp_path / "a.csv"))
