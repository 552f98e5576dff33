"""Warnings about what a user gave, at the line where the user gave it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from budwood.errors import InputWarning

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn_user(message: str) -> None:
    """Warn (:class:`InputWarning`) at the nearest line outside the package.

    A fixed ``stacklevel`` would show a line of the package where a generator is run by another.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, InputWarning, stacklevel=level)
