"""Libraries that read formats: importing them, and naming the file that one failed on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from budwood.errors import InputError, first_line


def need(module: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        InputError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} needs {module}: pip install 'budwood[points]'") from None


def damaged(path: Path, error: BaseException) -> InputError:
    """The error for a file that a library failed on."""
    return InputError(f"{path} is truncated or damaged: {first_line(error)}")
