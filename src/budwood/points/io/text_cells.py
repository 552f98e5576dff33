"""Cells of a line of text: values and names, in quotes or not, with their units in brackets."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

import numpy as np

EMPTY = ("", "na", "n/a", "null", "none")
"""Cells without a value, in small letters, as pandas and R write them."""
_NAME = re.compile(r"[^\s(\[]+(?:\s*[(\[][^)\]]*[)\]])?")  # "X (m) Y (m)"
_TITLE = re.compile(r"^(?:(?:columns?|fields?|format|names?)\s|[\w ]+[:=]\s)\s*", re.IGNORECASE)


def separator_of(line: str) -> str | None:
    """What is between values, None for blanks; a comma beside semicolons is a decimal one."""
    return next((mark for mark in ";," if mark in line), None)


def cells_of(line: str, separator: str | None) -> list[str]:
    """The cells of a line, without quotes around them and blanks."""
    if separator is None:
        return [cell.strip('"') for cell in line.split()]
    try:
        (row,) = csv.reader([line], delimiter=separator, skipinitialspace=True)
    except csv.Error:  # a cell of more than 131,072 characters
        row = line.split(separator)
    return [cell.strip() for cell in row]


def names_of(line: str, separator: str | None) -> Iterator[list[str]]:
    """The ways to split a line into names of columns: as the rows are first, then any other.

    Args:
        line: a header, or a comment, which may begin with words such as ``Columns:``.
        separator: of the rows.
    """
    for text in dict.fromkeys((line, _TITLE.sub("", line, count=1))):
        for mark in dict.fromkeys((separator, ",", ";", "\t")):
            if mark is not None and mark in text:
                yield cells_of(text, mark)
        yield _NAME.findall(text)


def is_number(text: str) -> bool:
    """Whether a cell is a number, NaN and infinity among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_empty(text: str) -> bool:
    """Whether a cell has no value."""
    return text.lower() in EMPTY


def number_of(text: str) -> float:
    """The number in a cell; NaN for one without a value.

    Raises:
        ValueError: it is no number.
    """
    text = text.strip().strip('"').strip()
    return np.nan if is_empty(text) else float(text)
