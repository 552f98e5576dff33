"""Checks of numbers that users give."""

from __future__ import annotations

from budwood.errors import InputError

HIGHEST_SEED = 2**32 - 1
"""NumPy's limit; that of torch is higher."""


def need_at_least(least: int, **values: int) -> None:
    """Refuse counts that are too low.

    Args:
        least: the lowest that is allowed.
        values: name → value.

    Raises:
        InputError: a value is lower; the message has its name.
    """
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}={value} is below {least}; give at least {least}")


def need_seed(seed: int) -> None:
    """Refuse a seed that a random number generator does not take.

    Raises:
        InputError: it is outside 0 to 2**32 − 1.
    """
    if not 0 <= seed <= HIGHEST_SEED:
        raise InputError(
            f"seed={seed} is out of range; give a whole number from 0 to {HIGHEST_SEED}"
        )
