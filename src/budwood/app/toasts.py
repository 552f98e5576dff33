"""Around the functions of events: errors as toasts, and sliders that were left as they were."""

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


def if_moved(gr: Any, function: Callable[..., tuple[Any, ...]], slider: int) -> Any:
    """Wrap a function for the release of a slider, which a browser also sends as focus leaves it.

    Args:
        gr: the module gradio.
        function: of the event; its last output is the slider's value.
        slider: the place of its value among the inputs.

    Returns:
        The same with one more input before the others: the last output of an earlier call. If the
        slider still has that value, nothing is done.
    """

    def wrapped(earlier: float, *values: Any) -> Any:
        return gr.skip() if values[slider] == earlier else function(*values)

    return wrapped


def _line(message: object) -> str:
    return escape(" ".join(str(message).split()), quote=False)
