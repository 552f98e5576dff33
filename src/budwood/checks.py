"""Checks of numbers that users give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from budwood.errors import InputError

HIGHEST_SEED = 2**32 - 1
"""NumPy's limit; that of torch is higher."""


def need_at_least(least: int, **values: int) -> None:
    """Refuse counts that are too low, or not whole numbers.

    Args:
        least: the lowest that is allowed.
        values: name → value.

    Raises:
        InputError: a value is lower, or not a whole number; the message has its name.
    """
    for name, value in values.items():
        if not _is_whole(value):
            raise InputError(f"{name}={value!r}; give a whole number of at least {least}")
        if value < least:
            raise InputError(f"{name}={value} is below {least}; give at least {least}")


def need_int(least: int | None, **values: object) -> None:
    """Refuse what is not an int, or is too low.

    Args:
        least: the lowest that is allowed; None for any.
        values: name → value.

    Raises:
        InputError: a value is of another type, such as a bool, or lower; the message has its name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            allowed = "" if least is None else f" of at least {least}"
            raise InputError(f"{name}={value!r}; give an int{allowed}")
        if least is not None:
            need_at_least(least, **{name: value})


def need_number(allowed: Callable[[float], bool], what: str, **values: Any) -> None:
    """Refuse what is not a number, or is outside its range.

    Args:
        allowed: whether a number is in the range.
        what: the range in words, such as ``"number above 0"``.
        values: name → value.

    Raises:
        InputError: a value is of another type, such as a bool, or outside; the message has its
            name.
    """
    for name, value in values.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        try:
            fits = is_number and allowed(float(value))
        except OverflowError:  # an int above all floats
            fits = False
        if not fits:
            raise InputError(f"{name}={value!r}; give a {what}")


def need_bool(**values: object) -> None:
    """Refuse what is neither True nor False, such as the word "no".

    Raises:
        InputError: a value is something else; the message has its name.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise InputError(f"{name}={value!r}; give True or False")


def need_kind(kinds: type | tuple[type, ...], what: str, **values: object) -> None:
    """Refuse values of another type; None is of any.

    Args:
        kinds: types that are allowed.
        what: these in words, such as ``"file"``.
        values: name → value.

    Raises:
        InputError: a value is of another type; the message has its name.
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, kinds):
            article = "an" if what[0] in "aeiou" else "a"
            raise InputError(f"{name} is of type {type(value).__name__}; give {article} {what}")


def need_seed(seed: int) -> None:
    """Refuse a seed that a random number generator does not take.

    Raises:
        InputError: it is outside 0 to 2**32 − 1, or not a whole number.
    """
    if not _is_whole(seed) or not 0 <= seed <= HIGHEST_SEED:
        raise InputError(
            f"seed={seed!r} is out of range; give a whole number from 0 to {HIGHEST_SEED}"
        )


def need_positive(**values: Any) -> None:
    """Refuse values that are not finite numbers above 0; errors as in :func:`need_number`."""
    need_number(lambda value: 0 < value < math.inf, "number above 0", **values)


def need_scale(**values: Any) -> None:
    """Refuse factors and divisors of scores that are not above 0, or that overflow float32.

    Raises:
        InputError: as in :func:`need_number`.
    """
    need_number(lambda value: 1e-9 <= value <= 1e9, "number above 0, from 1e-9 to 1e9", **values)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
