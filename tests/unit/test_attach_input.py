"""What attach() refuses, and pictures that are encoded before."""

from __future__ import annotations

import pytest
import torch
from transformers import MllamaConfig, Pipeline

from budwood.errors import AttachError, InputError, UnsupportedModelError
from budwood.prune import METHODS, attach, encode
from budwood.prune.methods.adav import AdaV
from budwood.prune.methods.adav_official import AdaVOfficial
from budwood.prune.methods.baselines import Random
from budwood.prune.methods.cdpruner import CDPruner
from budwood.prune.methods.t2i import T2I
from tests.contract import models
from tests.contract.models import words

GREEDY = {"max_new_tokens": 3, "do_sample": False}


class Asking(Pipeline):
    """A pipeline, without the pieces that one needs to run."""

    def __init__(self, model):
        self.model = model

    _sanitize_parameters = preprocess = _forward = postprocess = None


@pytest.fixture(scope="module")
def case():
    return models.llava()


def test_wrappers_say_what_to_pass(case):
    with pytest.raises(UnsupportedModelError, match="Asking is not .*pass its .model$"):
        attach(Asking(case.model))
    with pytest.raises(UnsupportedModelError, match="DataParallel is not .*pass its .module$"):
        attach(torch.nn.DataParallel(case.model))


def test_a_family_is_suggested_only_if_the_name_is_near():
    class Other(torch.nn.Module):
        config = MllamaConfig()

    with pytest.raises(UnsupportedModelError, match="'mllama'; known: .*llava, llava"):
        attach(Other())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_a_range(case, seed):
    for make in (lambda: attach(case.model, seed=seed), lambda: Random(seed=seed)):
        with pytest.raises(InputError, match=f"seed={seed} is out of range.*4294967295"):
            make()
    assert "generate" not in vars(case.model)


@pytest.mark.parametrize(
    "build", [models.llava, models.llava_next, models.qwen2_5_vl, models.qwen3_vl]
)
def test_pictures_encoded_once_serve_many_calls(build, monkeypatch):
    case = build()
    batch = case.batch([words(3, 1), 0, words(5, 2), 1], [2, words(6, 5)])
    methods = [METHODS.get(name) for name in METHODS]
    if build in (models.qwen2_5_vl, models.qwen3_vl):
        methods = [method for method in methods if not method.whole_crops]
    expected = {}
    for method in methods:
        with attach(case.model, method=method(), keep=10) as session:
            output = case.model.generate(**batch, **GREEDY)
        expected[method] = output, [image.kept for image in session.report]
    forms = {method.whole_crops: method() for method in methods}
    encoded = {whole: encode(case.model, batch, method) for whole, method in forms.items()}

    def fail(*args, **kwargs):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(type(case.model.model), "get_image_features", fail)
    for method in methods:
        pictures = encoded[method.whole_crops]
        with attach(case.model, method=method(), keep=10, encoded=pictures) as session:
            output = case.model.generate(**batch, **GREEDY)
        assert torch.equal(output, expected[method][0])
        assert all(map(torch.equal, expected[method][1], [image.kept for image in session.report]))


def test_pictures_can_be_arranged(case):
    encoded = encode(case.model, case.batch([0, words(2, 1)], [1, words(2, 1)]))
    with attach(case.model, keep=5, encoded=encoded.pick([1, 0, 1])) as session:
        case.model.generate(**case.batch([1, 0, 1, words(4, 3)]), **GREEDY)
        kept = [image.kept for image in session.report]
    with attach(case.model, keep=5) as session:
        case.model.generate(**case.batch([1, 0, 1, words(4, 3)]), **GREEDY)
    assert all(map(torch.equal, kept, [image.kept for image in session.report]))


def test_other_pictures_say_so():
    case = models.llava_next()
    encoded = encode(case.model, case.batch([0, words(4, 3)]))
    with (
        attach(case.model, keep=5, encoded=encoded),
        pytest.raises(InputError, match="2 pictures are not the 1 encoded ones"),
    ):
        case.model.generate(**case.batch([0, 0, words(4, 3)]), **GREEDY)
    with pytest.raises(AttachError, match="method='adav-official'"):
        attach(case.model, method="adav-official", keep=5, encoded=encoded)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"processor": "folder"}, "processor is a str; give the model's processor"),
        ({"processor": object()}, "processor is a object; give"),
        ({"encoded": 5}, "encoded is a int; give what encode"),
    ],
)
def test_something_else_says_so(case, given, reason):
    with pytest.raises(InputError, match=reason):
        attach(case.model, keep=2, **given)


def test_nothing_to_encode_says_so(case):
    with pytest.raises(InputError, match="no pictures to encode"):
        encode(case.model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    ("method", "parameter", "value"),
    [
        (AdaV, "temperature", "x"),
        (AdaV, "temperature", 10**400),
        (AdaV, "reserve", True),
        (T2I, "temperature", 10**30),
        (CDPruner, "negated", "false"),
        (AdaVOfficial, "n_crops", float("nan")),
    ],
)
def test_parameters_of_another_kind_say_so(method, parameter, value):
    with pytest.raises(InputError, match=f"{parameter}={value!r}"):
        method(**{parameter: value})
