"""Comparisons of tuning methods: their plan, choice of rates, rows and pictures."""

from __future__ import annotations

import pytest

from budwood.bench.tune.plan import Plan, Trial, read_material, split
from budwood.bench.tune.rows import best_rates, method_rows
from budwood.errors import InputError, UnknownNameError
from budwood.tune import plots
from budwood.tune.data import STYLES, example_of
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


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (("kl_chat", "kl_text", "perplexity"), ["KL to the base model on its replies", "perp"]),
        (("kl_text", "perplexity"), ["KL to the base model on text", "perp"]),
        (("kl_chat", "perplexity_of_replies"), ["KL to the base model on its replies"]),
    ],
)
def test_pictures_show_what_was_measured(keys, labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    rows = [
        {"method": "base", "lr": None, "status": "complete", "validation": 0.3},
        {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4},
        {"method": "lora", "lr": 1e-2, "status": "diverged"},
    ]
    for row in rows[:2]:
        row |= dict.fromkeys((*keys, "validation_loss"), 1.5)
    plots.plot_front(rows, tmp_path / "front.png")
    plots.plot_curves({"lora": [{"step": 2, "probe": rows[1]}, {"step": 3}]}, tmp_path / "c.png")
    front, curves = ([axis.get_xlabel() for axis in figure.axes] for figure in drawn)
    assert len(front) == len(labels) and all(a.startswith(b) for a, b in zip(front, labels))
    assert len(curves) == 3 and [len(axis.lines) for axis in drawn[1].axes] == [1, 1, 1]
    assert drawn[1].axes[2].get_ylabel() == front[0]


@pytest.mark.parametrize("base", [[], [{"method": "base", "lr": None, "validation": 0.35}]])
def test_runs_below_the_base_model_lie_outside(base, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    runs = [(1e-3, 0.4, 0.5), (3e-3, 0.5, 2.0), (1e-2, 0.3, 900.0)]
    shared = {"method": "lora", "status": "complete"}
    rows = [shared | {"lr": lr, "validation": v, "kl_chat": kl} for lr, v, kl in runs]
    plots.plot_front([*base, *rows], tmp_path / "front.png")
    axis = drawn[0].axes[0]
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert 0.4 < low < 0.5 and bottom < 0.4 and 0.5 < top < 0.55
    assert 2 < high < 3 if base else high > 900
    assert len(axis.lines[0].get_xdata()) == 3  # a line leads there


def test_a_picture_of_nothing_is_refused(tmp_path):
    row = {"method": "lora", "lr": 1e-3, "status": "complete", "validation": 0.4}
    with pytest.raises(InputError, match="measured on no text"):
        plots.plot_front([row], tmp_path / "front.png")


@pytest.mark.parametrize("style", STYLES)
def test_validation_questions_are_left_for_the_suite_to_style(style, tmp_path):
    data = tiny_chat.save_data(tmp_path)
    material = read_material(Plan(n_validation=6, style=style), data)
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
