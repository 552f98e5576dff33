"""Comparisons of tuning methods: their plan, choice of rates, rows and pictures."""

from __future__ import annotations

import pytest

from budwood.bench.tune.plan import Plan, Trial, read_material, split
from budwood.bench.tune.rows import best_rates, method_rows
from budwood.errors import InputError, UnknownNameError
from budwood.tune.data.examples import STYLES, example_of
from budwood.tune.evaluate.suite import by_layer
from tests import tiny_chat


def test_split_keeps_a_question_on_one_side():
    examples = [
        example_of({"question": f"q{i % 20}", "choices": ["a", "b"], "answer": 0})
        for i in range(40)
    ]
    validation, train = split(examples, 5, 20, "t")
    assert not {x.question for x in validation} & {x.question for x in train}
    assert len(validation) == 5 and len(train) == 20
    assert split(examples, 5, 20, "t") == (validation, train)
    with pytest.raises(InputError, match="needs more than"):
        split(examples, 20, 0, "t")


def run(method, lr, validation, loss=1.0, status="complete"):
    row = {"validation": validation, "validation_loss": loss, "status": status}
    return Trial(method, lr, 0), row


def test_best_rate_is_chosen_on_validation():
    found = dict(
        [
            run("a", 1e-3, 0.5),
            run("a", 1e-2, 0.6),
            run("b", 1e-3, 0.5, loss=2.0),
            run("b", 1e-2, 0.5, loss=1.0),
            run("b", 1e-1, 0.9, status="diverged"),
        ]
    )
    assert best_rates(found) == {"a": 1e-2, "b": 1e-2}
    with pytest.raises(InputError, match="every run diverged"):
        best_rates(dict([run("a", 1.0, 0.0, status="diverged")]))


def test_method_rows():
    def final(method, seed, target, kl):
        row = {"method": method, "lr": 1e-3, "seed": seed, "rank": 4, "params": 9}
        row |= {"status": "complete", "final": True, "target": target, "target_before": 0.3}
        row |= {"loss_gsm8k": 5 + kl, "loss_val_boolq": 1.0, "accuracy_boolq": target}
        return row | {"kl_chat": kl, "perplexity": 20 + kl, "perplexity_before": 20.0}

    rows = [final("base", None, 0.3, 0.0), final("lora", 0, 0.4, 1.0), final("lora", 1, 0.6, 3.0)]
    rows.append(final("slim", 0, 0.5, 0.2))
    found = {row["method"]: row for row in method_rows(rows)}
    assert found["lora"]["target"] == 0.5 and found["lora"]["n_seeds"] == 2
    assert found["lora"]["target_gain"] == pytest.approx(0.2)
    assert found["lora"]["target_std"] == pytest.approx(0.02**0.5)
    assert found["slim"]["kl_chat_ratio"] == pytest.approx(0.1)
    assert found["slim"]["perplexity_rise_ratio"] == pytest.approx(0.1)
    assert found["lora"]["loss_gsm8k"] == 7 and found["lora"]["loss_rise_gsm8k"] == 2
    assert found["slim"]["loss_rise_gsm8k_ratio"] == pytest.approx(0.1)
    assert found["base"]["loss_rise_gsm8k"] == 0 and found["lora"]["accuracy_boolq"] == 0.5
    assert not any("val_" in key for key in found["slim"])


@pytest.mark.parametrize("style", STYLES)
def test_validation_questions_are_left_for_the_suite_to_style(style, tmp_path):
    data = tiny_chat.save_data(tmp_path)
    material = read_material(Plan(n_validation=6, style=style, targets=("boolq",)), data)
    assert all("\n" not in one.question for one in material.validation["boolq"])
    listed = ["\n- " in one.question for one in material.train["boolq"]]
    assert listed == [style == "listed"] * 24


def test_layers_are_means_of_their_projections():
    rows = [
        {"layer": f"m.layers.{n}.mlp.{p}", "identity_share": s, "bypassed_share": 0, "distance": 1}
        for n, p, s in [(10, "up", 0.2), (2, "up", 0.4), (10, "down", 0.4)]
    ]
    found = by_layer(rows)
    assert [row["layer"] for row in found] == [2, 10]
    assert found[1]["identity_share"] == pytest.approx(0.3)


def test_plan_refuses():
    for wrong in (
        {"seeds": (0, 0)},
        {"seeds": (0, -1)},
        {"lrs": (1e-3, 1e-3)},
        {"rank": 0},
        {"lrs": (-1.0,)},
        {"limit": -1},
    ):
        with pytest.raises(InputError):
            Plan(**wrong)
    with pytest.raises(UnknownNameError):
        Plan(methods=("lore",))
