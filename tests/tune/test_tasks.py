"""Tasks that bring their own data: their parts, their answers, and how they are scored."""

from __future__ import annotations

import json

import pytest
import torch

from budwood.bench.tune.plan import Plan, read_material
from budwood.bench.tune.rows import method_rows, summary
from budwood.errors import InputError
from budwood.tune.evaluate.scores import Score
from budwood.tune.evaluate.tasks import find_task, task_of
from budwood.tune.tasks import MADE, PARTS, made
from budwood.tune.tasks.facts import N_PRODUCTS, VALUES
from budwood.tune.training.losses import others_kl


@pytest.mark.parametrize("name", MADE)
def test_parts_share_no_question_and_are_the_same_every_time(name):
    parts = made(name)
    asked = [{one.question for one in parts[part]} for part in PARTS]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    assert made.__wrapped__(name) == parts
    assert min(map(len, parts.values())) >= 60
    if name != "reviews":  # its sentences are always the same
        assert made(name, seed=1)["train"] != parts["train"]


def test_every_fact_is_taught_and_asked():
    told = {part: [one.messages[-1]["content"] for one in made("facts")[part]] for part in PARTS}
    n_facts = N_PRODUCTS * len(VALUES)
    assert [len(told[part]) // n_facts for part in PARTS] == [5, 1, 2]


def test_answers_of_extract_are_json_and_its_forms_are_new():
    for example in made("extract")["test"]:
        answer = json.loads(example.messages[-1]["content"])
        assert set(answer) == {"date", "amount", "unit", "kind"}
        assert str(answer["amount"]) in example.question and answer["date"][:4] in example.question


def test_reviews_are_balanced():
    labels = [one.answer for part in PARTS for one in made("reviews")[part]]
    assert len(labels) == 2982
    assert all(490 <= labels.count(label) <= 500 for label in range(6))


def test_a_task_with_its_own_data_needs_no_folder():
    facts = find_task("facts", None, "target", limit=12)
    assert len(facts.examples) == 12 and facts.config["output_type"] == "multiple_choice"
    extract = find_task("extract", None, "target")
    assert [one["metric"] for one in extract.config["metric_list"]] == ["perplexity", "acc"]
    assert extract.constant < 0.05 < facts.constant
    usual = task_of("mine", extract.examples)
    assert [one["metric"] for one in usual.config["metric_list"]] == ["perplexity"]


@pytest.mark.parametrize("name", ["piqa", "arc_challenge"])
def test_later_tasks_are_those_of_lm_eval_without_their_file(name, tmp_path):
    assert find_task(name, None).config is None and find_task(name, tmp_path).config is None
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    for file in ("piqa_validation.jsonl", "arc_challenge_train.jsonl"):
        (tmp_path / file).write_text(json.dumps(row))
    assert find_task(name, tmp_path).examples[0].question == "Which?"


def test_material_of_targets_with_and_without_files(tmp_path):
    (tmp_path / "wikitext2_valid.txt").write_text("text")
    material = read_material(
        Plan(targets=("facts", "extract"), per_task=20, n_validation=5), tmp_path
    )
    assert {name: len(rows) for name, rows in material.train.items()} == {
        "facts": 20,
        "extract": 20,
    }
    assert all(len(rows) == 5 for rows in material.validation.values())
    with pytest.raises(InputError, match="lacks boolq_train.jsonl"):
        read_material(Plan(targets=("boolq",)), tmp_path)
    for wrong in ({"targets": ()}, {"strengths": (1.0,)}, {"strengths": (0.5, 0.5)}):
        with pytest.raises(InputError):
            Plan(**wrong)


def scores(facts, extract, loss):
    return [
        Score("facts", "accuracy", "target", facts, (1.0,) * 4),
        Score("extract", "accuracy", "target", extract, (1.0,) * 4),
        Score("text", "perplexity", "general", (loss,), (1.0,)),
    ]


def test_gains_are_over_the_better_of_base_and_constant():
    before = scores((1.0, 1, 0, 0), (0.0,) * 4, 3.0)
    after = scores((1.0, 1, 1, 0), (1.0, 1, 0, 0), 3.2)
    row = summary(before, after, {"facts": 0.25, "extract": 0.25})
    assert (row["floor_facts"], row["gain_facts"]) == (0.5, 0.25)
    assert (row["floor_extract"], row["gain_extract"]) == (0.25, 0.25)
    assert row["target_floor"] == 0.375 and row["target_over_floor"] == 0.25
    assert row["text_loss_rise"] == pytest.approx(0.2)
    whole = {"method": "lora", "lr": 1e-3, "seed": 0, "rank": 4, "params": 9}
    whole |= {"status": "complete", "final": True} | row
    mean = method_rows([whole])[0]
    assert mean["floor_facts"] == 0.5 and mean["gain_extract"] == 0.25
    assert mean["text_loss_rise"] == pytest.approx(0.2) and mean["target_over_floor"] == 0.25


def test_the_divergence_over_other_tokens_leaves_the_right_one_free():
    torch.manual_seed(0)
    base, labels = torch.randn(2, 5, 7), torch.tensor([[-100, 3, -100, 1, 2], [-100] * 4 + [6]])
    tuned = base.clone()
    for row, place in ((labels != -100).nonzero()).tolist():
        tuned[row, place - 1, labels[row, place]] += 5.0
    assert others_kl(base, tuned, labels) == pytest.approx(0, abs=1e-6)
    other = torch.randn(2, 5, 7, requires_grad=True)
    expected = []
    for row, place in ((labels != -100).nonzero()).tolist():
        keep = [i for i in range(7) if i != labels[row, place]]
        p, q = (x[row, place - 1, keep].softmax(-1) for x in (base, other))
        expected.append((p * (p / q).log()).sum())
    found = others_kl(base, other, labels)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    found.backward()
    assert bool(torch.isfinite(other.grad).all())
