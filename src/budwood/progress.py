"""How slow functions report their progress."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """Called after each unit of work, such as a training step or a question."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report progress.

        Args:
            done: units finished so far.
            total: units in all.
            note: a few words to show beside the bar.
        """


ProgressBar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar with a title."""


def silent(done: int, total: int, note: str = "") -> None:
    """Report nothing; the default of functions that take a :class:`Progress`."""
