"""`budwood compare`: several methods on one picture."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from budwood.errors import InputError
from budwood.prune.compare import compare_methods

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
        ("adav,adav", "--methods has one twice"),
        (",", "give at least one"),
        ("adav,none", "unknown method 'none'"),
    ],
)
def test_bad_methods(budwood, picture, model_dir, methods, said):
    result = budwood("compare", picture, "What ?", "--model", model_dir, "--methods", methods)
    assert result.exit_code == 2 and said in result.stderr
    assert result.stderr.count("\n") == 1


def test_methods_are_a_list():
    with pytest.raises(InputError, match="methods='adav' is a string; give a list"):
        compare_methods(None, None, Image.new("RGB", (9, 9)), "What ?", "adav", {})
