"""Errors of the library as toasts, with the same one-line messages."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

from budwood.errors import BudwoodError, InputWarning


def toasting(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an event's function: bad input becomes a toast, and warnings do as well.

    Args:
        gr: the module gradio.
        function: of the event.
    """

    @functools.wraps(function)
    def wrapped(*values: Any) -> Any:
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always", InputWarning)
                result = function(*values)
        except BudwoodError as error:
            raise gr.Error(_line(error), title="budwood", print_exception=False) from error
        for warning in noted:
            if issubclass(warning.category, InputWarning):
                gr.Warning(_line(warning.message))
        return result

    return wrapped


def _line(message: object) -> str:
    return escape(" ".join(str(message).split()), quote=False)
