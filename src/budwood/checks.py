"""Checks of numbers that users give."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from budwood.errors import InputError

HIGHEST_SEED = 2**32 - 1
"""NumPy's limit; that of torch is higher."""


def need_at_least(least: int, **values: int) -> None:
    """Refuse counts that are too low or no whole numbers.

    Args:
        least: the lowest that is allowed.
        values: name → value.

    Raises:
        InputError: a value is lower or no whole number; the message has its name.
    """
    for name, value in values.items():
        if not _is_whole(value):
            raise InputError(f"{name}={value!r}; give a whole number of at least {least}")
        if value < least:
            raise InputError(f"{name}={value} is below {least}; give at least {least}")


def need_seed(seed: int) -> None:
    """Refuse a seed that a random number generator does not take.

    Raises:
        InputError: it is outside 0 to 2**32 − 1, or no whole number.
    """
    if not _is_whole(seed) or not 0 <= seed <= HIGHEST_SEED:
        raise InputError(
            f"seed={seed!r} is out of range; give a whole number from 0 to {HIGHEST_SEED}"
        )


def need_positive(**values: float) -> None:
    """Refuse values that are no finite numbers above 0.

    Args:
        values: name → value.

    Raises:
        InputError: a value is 0 or lower, infinite or no number; the message has its name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise InputError(f"{name}={value!r} must be a number above 0")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
