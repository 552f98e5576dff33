"""The errors that budwood raises on bad input.

Each one is a :class:`BudwoodError` and also the builtin exception that a user would expect, so
both ``except BudwoodError`` and ``except ValueError`` work. A message is one line: what was given,
what is allowed, what to do.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class BudwoodError(Exception):
    """Base of every error that budwood raises on purpose."""


class UnsupportedModelError(BudwoodError, ValueError):
    """The model has no family file, or lacks a part (such as vision) that the job needs."""


class UnknownNameError(BudwoodError, ValueError):
    """A name is not in its registry; the message suggests the nearest known one."""


class ShapeError(BudwoodError, ValueError):
    """A tensor has the wrong shape, dtype or device; the message gives both."""


class BudgetError(BudwoodError, ValueError):
    """``keep`` is neither a count ≥ 1 nor a fraction in (0, 1], or exceeds the tokens there are."""


class InputError(BudwoodError, ValueError):
    """Unusable data or parameters: a file that is not an image, an empty question, NaN features."""


class OptionError(InputError, TypeError):
    """There is no such option; the message names the one that was meant."""


class InputWarning(UserWarning):
    """Data that can be used, but may give wrong results: coordinates in degrees, for example."""


class OutputError(BudwoodError, OSError):
    """A result cannot be written, or would overwrite what is there."""


class DivergedError(BudwoodError, ArithmeticError):
    """Training met a NaN or infinite loss, gradient or input, and stopped before using it."""


class MissingPackageError(BudwoodError, ImportError):
    """An optional package is not installed; the message has the line that installs it."""


class AttachError(BudwoodError, RuntimeError):
    """A model is already attached to, or a session is used in the wrong state."""


class MergeError(BudwoodError, ValueError):
    """A mixture of experts can't be merged into the base weights."""
