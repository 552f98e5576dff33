"""Checks of counts and seeds that users give."""

from __future__ import annotations

from budwood.errors import InputError

MOST_SEED = 2**63 - 1
"""The largest seed that every random generator in use takes."""


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
    """Refuse a seed that random generators do not take.

    Raises:
        InputError: it is outside 0…``MOST_SEED``.
    """
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"seed={seed} is outside 0…{MOST_SEED}; choose another")
