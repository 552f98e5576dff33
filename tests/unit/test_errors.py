"""Errors are budwood's own and also what a user would expect."""

from __future__ import annotations

import inspect

import pytest

import budwood
from budwood import errors

BUILTINS = {
    "UnsupportedModelError": ValueError,
    "UnknownNameError": ValueError,
    "ShapeError": ValueError,
    "BudgetError": ValueError,
    "InputError": ValueError,
    "OptionError": TypeError,
    "OutputError": OSError,
    "DivergedError": ArithmeticError,
    "MissingPackageError": ImportError,
    "AttachError": RuntimeError,
    "MergeError": ValueError,
}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_each_error_is_also_a_builtin(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, errors.BudwoodError) and issubclass(error, builtin)
    assert str(error("one line")) == "one line"
    assert getattr(budwood, name) is error


def test_no_error_is_forgotten_here():
    defined = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert defined == {*BUILTINS, "BudwoodError", "InputWarning"}
