"""`budwood compare`: several methods on one picture."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from budwood.errors import InputError
from budwood.prune.chat import check_question
from budwood.prune.compare import compare, compare_methods

METHODS = "adav,adav-official,visionzip,uniform"


def test_each_method_answers_as_by_itself(budwood, picture, next_dir):
    asked = [picture, "What colour ?", "--model", next_dir, "--keep", 12, "--seed", 3, "--json"]
    result = budwood("compare", *asked, "--methods", METHODS)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["methods"]] == METHODS.split(",")
    for row in found["methods"]:
        alone = json.loads(budwood("prune", *asked, "--method", row["method"]).stdout)
        assert row["kept"] == alone["kept"] and row["answer"] == alone["answer"]
        assert (row["n_kept"], row["n_visual"]) == (alone["n_kept"], alone["n_visual"])
        assert row["n_fixed"] == alone["n_fixed"]
        assert found["answer_full"] == alone["answer_full"]


def test_a_method_may_have_a_seed_of_its_own(budwood, picture, model_dir):
    asked = ["compare", picture, "What ?", "--model", model_dir, "--keep", 5, "--json"]
    found = json.loads(budwood(*asked, "--methods", "random,random:seed=1").stdout)
    other = json.loads(budwood(*asked, "--methods", "random", "--seed", 1).stdout)
    draws = [row["kept"] for row in found["methods"]]
    assert draws[0] != draws[1] == other["methods"][0]["kept"]


def test_all_tokens_are_those_that_the_model_sees(budwood, next_dir, tmp_path):
    """adav-official counts whole crops, padding included."""
    narrow = tmp_path / "narrow.png"
    Image.new("RGB", (90, 30)).save(narrow)
    asked = ["compare", narrow, "What ?", "--model", next_dir, "--keep", 12]
    first = []
    for methods in ("adav-official,adav", "adav,adav-official"):
        table = budwood(*asked, "--methods", methods).stdout.splitlines()
        first.append(next(line.split() for line in table if "all tokens" in line))
    assert first[0] == first[1]


def test_everything_kept_is_said(budwood, picture, model_dir):
    asked = ["compare", picture, "What ?", "--model", model_dir, "--keep", 5000]
    assert "so all were kept" in budwood(*asked, "--methods", "adav,uniform").stderr


def test_table_and_picture(budwood, picture, model_dir, tmp_path):
    file = tmp_path / "compared.png"
    command = ["compare", picture, "What ?", "--model", model_dir, "--keep", 5, "--out", file]
    result = budwood(*command, "--methods", METHODS)
    assert result.exit_code == 0 and f"wrote {file}" in result.stderr
    assert "all tokens" in result.stdout and "visionzip" in result.stdout
    with Image.open(file) as drawn:  # three panels in the first row, one in the second
        assert drawn.width == 3 * (420 + 16) + 16
        assert drawn.height > 2 * 300
    again = budwood(*command)
    assert again.exit_code == 2 and "exists; choose another name" in again.stderr


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("adav,adav", "adav is given twice; give each method once"),
        (
            "adav:reserve=0.2,adav:reserve=.20",
            "adav:reserve=.20 is given twice, also as adav:reserve=0.2",
        ),
        ("adav,uniform:", "'uniform:' ends in a colon"),
        ("adav:rserve=0.1", "has no parameter 'rserve'"),
        (",", "give at least one"),
        ("adav,none", "unknown method 'none'"),
        ("adav,fastv", "method 'fastv' prunes inside the LLM"),
    ],
)
def test_bad_methods(budwood, picture, model_dir, methods, said):
    result = budwood("compare", picture, "What ?", "--model", model_dir, "--methods", methods)
    assert result.exit_code == 2 and said in result.stderr
    assert result.stderr.count("\n") == 1


def test_bad_parameters_are_refused_before_the_model_is_loaded(budwood, picture, not_loaded):
    result = budwood("compare", picture, "What ?", "--methods", "adav:rserve=0.1")
    assert result.exit_code == 2 and "has no parameter 'rserve'" in result.stderr


@pytest.mark.parametrize("command", [("compare", "--methods", "uniform"), ("prune",)])
def test_questions_beyond_the_context(budwood, picture, model_dir, command):
    name, *options = command
    result = budwood(name, picture, "What ? " * 20_000, "--model", model_dir, *options)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "tokens and the answer up to 32, and the model was made for" in result.stderr


def test_what_is_no_question_or_picture():
    image = Image.new("RGB", (9, 9))
    with pytest.raises(InputError, match="image is a str; give a PIL.Image"):
        compare_methods(None, None, "picture.png", "What ?", ["adav"], {})
    with pytest.raises(InputError, match="repeats=0 is below 1"):
        compare(None, None, image, "What ?", {}, repeats=0)
    with pytest.raises(InputError, match="question is a int; give text"):
        check_question(3)


def test_methods_are_a_list():
    with pytest.raises(InputError, match="methods='adav' is a string; give a list"):
        compare_methods(None, None, Image.new("RGB", (9, 9)), "What ?", "adav", {})
    with pytest.raises(InputError, match="nothing to compare"):
        compare_methods(None, None, Image.new("RGB", (9, 9)), "What ?", [], {})
