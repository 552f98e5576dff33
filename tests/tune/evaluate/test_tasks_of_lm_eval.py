"""Tasks that are lm-eval's own: its groups and tags, and which answer it takes for right."""

from __future__ import annotations

import json

import pytest

from budwood.errors import InputError, UnknownNameError
from budwood.tune.evaluate import harness, tasks
from budwood.tune.evaluate.tasks import find_tasks, leaf_tasks
from tests import tiny_chat

TOKENS = tiny_chat.tokenizer()
LETTERS = [
    {"question": "Which is wet?", "options": ["stone", "river"], "answerKey": "B"},
    {"question": "Which is hard?", "options": ["stone", "river"], "answerKey": "A"},
]
METRIC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def of_letters(name, file, **changes):
    """A task as lm-eval's commonsense_qa is: the answers are letters, and so is the target."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}} A. {{options[0]}} B. {{options[1]}}",
        "doc_to_target": "answerKey",
        "doc_to_choice": ["A", "B"],
        "metric_list": METRIC,
        **changes,
    }


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """Makes lm-eval know these tasks and groups, and no others."""
    from lm_eval.tasks import TaskManager

    def know(*configs):
        folder = tmp_path / "tasks"
        folder.mkdir()
        for i, config in enumerate(configs):  # JSON is YAML
            (folder / f"{i}.yaml").write_text(json.dumps(config))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        for module in (harness, tasks):
            monkeypatch.setattr(module, "task_manager", lambda: manager)

    return know


@pytest.fixture
def file(tmp_path):
    return tiny_chat.write_lines(tmp_path / "letters.jsonl", LETTERS)


def run(*names):
    model = tiny_chat.model()
    found = harness.run_tasks(model, TOKENS, find_tasks(names, (), None, 0, 0))
    return {one.key: one.values for one in found}


def nats(letter, row):
    """The loss of a letter, by one plain pass."""
    question = "{question} A. {options[0]} B. {options[1]}".format(**row)
    turns = [{"role": "user", "content": question}]
    prompt = TOKENS.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = TOKENS(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = tiny_chat.model()(ids).logits[0, -1].log_softmax(-1)
    return -logits[TOKENS.convert_tokens_to_ids(letter)].item()


@pytest.mark.parametrize(
    "target", ["answerKey", "{{['A', 'B'].index(answerKey)}}", "{{[['A', 'B'].index(answerKey)]}}"]
)
def test_the_right_answer_is_that_of_lm_eval(lm_eval, file, target):
    lm_eval(of_letters("letters", file, doc_to_target=target))
    expected = [nats("B", LETTERS[0]), nats("A", LETTERS[1])]
    assert run("letters")["letters", "loss"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("target", ["{{'C'}}", "{{7 if answerKey == 'A' else 1}}", "{{[0, 1]}}"])
def test_no_loss_where_the_right_answer_is_not_known(lm_eval, file, target):
    lm_eval(of_letters("letters", file, doc_to_target=target))
    assert set(run("letters")) == {("letters", "accuracy")}


def test_groups_and_tags_are_their_tasks(lm_eval, file):
    tagged = of_letters("third", file, tag="few")
    lm_eval(
        *(of_letters("first", file), of_letters("second", file), tagged),
        {"group": "inner", "task": ["second", "few"], "aggregate_metric_list": METRIC},
        {"group": "outer", "task": [{"group": "some", "task": ["first"]}, "inner"]},
        {"group": "shots", "task": [{"task": "first", "num_fewshot": 5}]},
    )
    assert leaf_tasks("first") == ["first"] and leaf_tasks("few") == ["third"]
    assert leaf_tasks("outer") == ["first", "second", "third"]
    with pytest.raises(InputError, match="'shots' of lm-eval changes num_fewshot .*: first$"):
        leaf_tasks("shots")
    assert set(run("first", "inner")) == {
        (task, metric) for task in ("first", "second", "third") for metric in ("accuracy", "loss")
    }
    with pytest.raises(InputError, match="2 tasks are called 'third'"):
        find_tasks(["inner"], ["third"], None, 0, 0)
    with pytest.raises(UnknownNameError, match="unknown task 'fourth'; give a file, one of arc_"):
        find_tasks(["fourth"], (), None, 0, 0)
