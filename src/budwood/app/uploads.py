"""Files that visitors send: what is refused, and messages without directories of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from budwood.errors import BudwoodError

MAX_FILE = "50mb"
"""Largest upload."""


@contextmanager
def uploaded(file: str) -> Iterator[None]:
    """Name an uploaded file in messages as its sender does, without its folder.

    Raises:
        BudwoodError: as inside the block, in other words.
    """
    try:
        yield
    except BudwoodError as error:
        path = Path(file)
        raise type(error)(str(error).replace(str(path), path.name)) from error
