"""Checks of counts that users give."""

from __future__ import annotations

from budwood.errors import InputError


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
