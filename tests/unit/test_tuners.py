"""Tuning methods by name: their options, and what they ask of training."""

from __future__ import annotations

import pytest
import torch

from budwood.errors import InputError, UnknownNameError
from budwood.tune.fitting import N_TEXTS
from budwood.tune.methods import attach, fit_rank, n_trainable, parse_tuner
from tests import tiny_chat


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("lora", {"weight_decay": 0.0, "kl": 0.0}),
        ("lora-wd:weight_decay=3", {"weight_decay": 3}),
        ("lora-kl:kl=0.5+alpha=1", {"kl": 0.5, "alpha": 1}),
        ("slim:distance=max+beta=2", {"extra": {"distance": "max", "beta": 2}}),
    ],
)
def test_parse_tuner(text, fields):
    tuner = parse_tuner(text)
    assert {name: getattr(tuner, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("text", "n"),
    [
        *(("slim", N_TEXTS), ("slim:texts=3", 3), ("slim:texts=0", 0)),
        *(
            ("slim-no-yielding", 0),
            ("slim-whitened", 0),
            ("slim-rms", 0),
            ("slim-paper", 0),
            ("moe", 0),
        ),
        *(("lora", 0), ("lora-kl", 0), ("lora-own", N_TEXTS), ("lora-own:texts=3", 3)),
    ],
)
def test_only_methods_that_take_it_have_text_written(text, n):
    assert parse_tuner(text).n_own == n


BAD = (
    *("slim:texts=1.5", "lora-own:texts=0", "lora-own:texts=2.5"),
    *("slim:strength=0", "lora:strength=1.1", "lora:strength=nan", "lora:strength=half"),
)


@pytest.mark.parametrize(
    ("n_learnt", "n", "distance"), [(1279, 0, "whitened"), (1280, N_TEXTS, "discriminant")]
)
def test_few_tokens_to_learn_mean_no_other_text(n_learnt, n, distance):
    found = parse_tuner("slim").fitted_to(n_learnt)
    assert found.n_own == n and found.config(1, None, 0).distance == distance
    assert parse_tuner("slim:texts=8").fitted_to(n_learnt).n_own == 8
    assert parse_tuner("slim:texts=0").fitted_to(n_learnt).config(1, None, 0).distance == "whitened"
    asked = parse_tuner("slim:distance=discriminant").fitted_to(n_learnt)
    assert asked.n_own == N_TEXTS and asked.config(1, None, 0).distance == "discriminant"


@pytest.mark.parametrize(
    ("text", "margin"),
    [("slim", 1.0), ("slim:texts=0", 1.5), ("slim:margin=0", 0), ("slim-rms", 1.5)],
)
def test_the_margin_at_inference_goes_with_the_distance(text, margin):
    config = parse_tuner(text).config(1, None, 0)
    assert config.margin_of(training=False) == margin
    assert config.margin_of(training=True) == (0 if margin == 0 else 1.5)


def test_the_plain_reading_has_nothing_of_ours():
    plain = parse_tuner("slim-paper")
    assert plain.config(1, None, 0).margin == 0 and plain.strength == 1
    assert parse_tuner("moe").strength == parse_tuner("lora").strength == 1
    assert parse_tuner("slim").strength == parse_tuner("slim-no-l1").strength == 0.7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora-wd:weight_decay=3", {"weight_decay": 3, "kl": 0, "held": (), "strength": 1}),
        ("lora-kl", {"weight_decay": 0, "kl": 1, "held": (), "strength": 1}),
        ("lora-own:kl=2", {"weight_decay": 0, "kl": 2, "held": ["text"], "strength": 1}),
        ("slim", {"weight_decay": 0, "kl": 0, "held": (), "strength": 0.7}),
    ],
)
def test_what_training_gets(text, expected):
    assert parse_tuner(text).training(["text"]) == expected


def test_parse_tuner_refuses():
    with pytest.raises(UnknownNameError, match="did you mean 'dora'"):
        parse_tuner("dara")
    for wrong in ("lora:alpha", "lora:=3", "lora:kl=-1", "slim:texts=-1", *BAD):
        with pytest.raises(InputError):
            parse_tuner(wrong)


def test_fit_rank():
    assert fit_rank(lambda rank: 100 * rank, 720) == 7
    assert fit_rank(lambda rank: 50 + 100 * rank, 1040) == 10
    with pytest.raises(InputError, match="no rank gives"):
        fit_rank(lambda rank: 100 * rank, 150)


def test_adapters_leave_the_base_as_it_was():
    model = tiny_chat.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("lora", "dora", "lora-attn"):
        adapted = attach(parse_tuner(name), model, 3, seed=0)
        assert n_trainable(adapted) > 0
        adapted.unload()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(("n_learnt", "expected"), [(0, 8), (160, 16), (1_000_000, 128)])
def test_directions_follow_the_amount_of_data(n_learnt, expected):
    assert parse_tuner("slim").fitted_to(n_learnt).config(2, None, 0).n_directions == expected
    given = parse_tuner("slim-paper:n_directions=5").fitted_to(n_learnt)
    assert given.config(2, None, 0).n_directions == 5
    assert parse_tuner("lora").fitted_to(n_learnt) == parse_tuner("lora")
