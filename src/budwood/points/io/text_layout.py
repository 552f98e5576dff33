"""How a text file of points is laid out: its separator, its header, its columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from budwood.errors import InputError
from budwood.points.io.cloud import are_columns
from budwood.points.io.fields import LON_LAT, letter_of, named, no_coordinates

TEXT = "utf-8-sig"  # UTF-8 with or without a byte-order mark, which spreadsheets write
_DECIMAL_COMMA = re.compile(r"(?:^|[;\s])-?\d+,\d+(?:[;\s]|$)")


@dataclass(frozen=True)
class Layout:
    """How a text file is laid out.

    Attributes:
        separator: between values; None for blanks.
        skip: lines to skip.
        columns: letters of the columns, as given or by the header; None without either.
        n_points: how many the first line declares; None if it does not.
        has_names: whether the columns are named in the file.
        has_words: whether other columns may hold text, so that only those with letters are read.
        has_header: whether a line that is no comment names the columns; # may then be data.
        width: columns before a separator at the end of each row; None without one.
    """

    separator: str | None
    skip: int
    columns: str | None = None
    n_points: int | None = None
    has_names: bool = False
    has_words: bool = False
    has_header: bool = False
    width: int | None = None

    @property
    def used(self) -> list[int] | None:
        """The columns to read; None for all."""
        if self.has_words and self.columns is not None:
            return [at for at, letter in enumerate(self.columns) if letter != "_"]
        return None if self.width is None else list(range(self.width))

    @property
    def letters(self) -> str | None:
        """Letters of the columns that are read."""
        return self.columns.replace("_", "") if self.has_words and self.columns else self.columns


def layout_of(path: Path, columns: str | None) -> Layout:
    """Find out the layout of a text file by its first lines.

    Args:
        path: the file.
        columns: letters of its columns; None: by its header.

    Raises:
        InputError: it is no table, its header names no coordinates, or has no header and words.
    """
    head = _head(path)
    separator = _separator(head.first)
    fields = head.fields(head.first, separator)
    numbers = [_is_number(field) for field in fields]
    if len(fields) == 1 and fields[0].isdecimal():
        return Layout(separator, head.skip + 1, columns, int(fields[0]))
    names = None if columns else _commented(head.comment, len(fields))
    if separator == "," and _counts_columns(fields, head.second):
        return Layout(separator, head.skip + 1, columns)
    if all(numbers):
        width = len(fields) if separator and head.first.endswith(separator) else None
        return Layout(
            separator, head.skip, columns or names, has_names=names is not None, width=width
        )
    if any(numbers):
        if columns is None and names is None:
            raise _no_numbers(path, head.first)
        if columns is not None and len(columns) != len(fields):
            raise InputError(
                f"{path} has {len(fields)} columns, columns={columns!r} names {len(columns)}"
            )
        return Layout(
            separator, head.skip, columns or names, has_names=columns is None, has_words=True
        )
    return _below_header(path, head, separator, columns)


def _below_header(path: Path, head: _Head, separator: str | None, columns: str | None) -> Layout:
    """The layout of a table whose first line names its columns."""
    if columns is not None:
        return Layout(separator, head.skip + 1, columns)
    if _DECIMAL_COMMA.search(head.first):
        raise _no_numbers(path, head.first)
    if "\t" in head.first and separator is None:
        separator = "\t"  # names may hold blanks
    names = head.fields(head.first, separator)
    columns = _header(path, head.first, names)
    layout = Layout(
        separator, head.before_second, columns, has_names=True, has_words=True, has_header=True
    )
    values = head.fields(head.second, separator)
    if len(values) == 1 and values[0].isdecimal():  # as CloudCompare writes it
        return replace(layout, skip=head.before_second + 1, n_points=int(values[0]))
    if not head.second:
        return layout
    if len(values) != len(names):
        raise InputError(
            f"{path}: its header names {len(names)} columns, and its first row has {len(values)}; "
            "correct it, or name the columns with columns='xyz_rgb'"
        )
    if not all(_is_number(values[at]) for at in layout.used or ()):
        raise _no_numbers(path, head.second)
    return layout


def _counts_columns(fields: list[str], row: str) -> bool:
    """Whether 0, 1, 2, … stand above decimals, as pandas writes a table without names."""
    return fields == [str(i) for i in range(len(fields))] and len(fields) > 2 and "." in row


def _separator(line: str) -> str | None:
    """What is between values; a comma beside semicolons is a decimal one."""
    return next((mark for mark in ";," if mark in line), None)


def _no_numbers(path: Path, row: str) -> InputError:
    """The error for a row with other values than numbers."""
    if _DECIMAL_COMMA.search(row):
        return InputError(f"{path}: its row {row[:60]!r} has decimal commas; write decimal points")
    return InputError(
        f"{path}: its row {row[:60]!r} has values that are no numbers, and no header above it "
        "names the columns; add one, or name them with columns='xyz_' (_ for what to leave out)"
    )


@dataclass(frozen=True)
class _Head:
    """The beginning of a text file.

    Attributes:
        skip: lines before the first that is no comment.
        first: that line; "" if there is none.
        second: the next such line.
        before_second: lines before it.
        comment: the last comment up to the first line.
    """

    skip: int
    first: str
    second: str
    before_second: int
    comment: str

    @staticmethod
    def fields(line: str, separator: str | None) -> list[str]:
        """Values or names of a line; a separator at its end separates nothing."""
        if separator is not None:
            line = line.removesuffix(separator)
        return [field.strip() for field in line.split(separator)]


def _head(path: Path) -> _Head:
    lines: list[str] = []
    skip, at, comment = 0, 0, ""
    with path.open(encoding=TEXT, errors="replace") as file:
        for line in file:
            if "\0" in line:
                raise InputError(f"{path} is binary, not a table of numbers")
            plain, _, remark = line.partition("#")
            if plain := plain.strip() or (_as_row(line, lines[0]) if lines else ""):
                lines.append(plain)
            if len(lines) == 2:
                break
            at += 1
            if not lines or (len(lines) == 1 and plain):
                comment = remark.strip() or comment
            skip += not lines
    first, second = (*lines, "", "")[:2]
    return _Head(skip, first, second, at, comment)


def _as_row(line: str, header: str) -> str:
    """A line that begins with #, where it has as many fields as the header; else an empty one."""
    mark = _separator(header) or "\t"
    return line.strip() if line.count(mark) == header.count(mark) > 0 else ""


def _header(path: Path, first: str, fields: list[str]) -> str:
    """Letters of the columns that a header names."""
    columns = "".join(letter_of(field) or "_" for field in fields)
    if all(named(fields, spellings) for spellings in LON_LAT):
        raise no_coordinates(fields, str(path))
    if not all(letter in columns for letter in "xyz"):
        raise InputError(f"{path}: its header {first[:60]!r} names no columns x, y and z")
    if not are_columns(columns):
        raise InputError(
            f"{path}: its header {first[:60]!r} must name x, y, z once and r, g, b once or not at "
            "all; correct it, or name the columns with columns='xyz_rgb'"
        )
    return columns


def _commented(comment: str, width: int) -> str | None:
    """Letters of the columns that a comment above the rows names; None if it names none."""
    names = re.split(r"[\s,;]+", comment)
    columns = "".join(letter_of(name) or "_" for name in names)
    return columns if len(names) == width and are_columns(columns) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
