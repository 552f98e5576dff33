"""Checks of what users give: counts, seeds, and optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from budwood.errors import InputError, MissingPackageError

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


def need_package(package: str, purpose: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        package: name of its module.
        purpose: what needs it, such as ``"reading .las"``.
        extra: the extra of budwood that installs it.

    Returns:
        The module.

    Raises:
        MissingPackageError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackageError(
            f"{purpose} needs {package}: pip install 'budwood[{extra}]'"
        ) from None
