"""How a text file of points is laid out: its separator, its header, its columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from budwood.errors import InputError
from budwood.points.io.cloud import are_columns
from budwood.points.io.fields import LON_LAT, header_letters, named, no_coordinates
from budwood.points.io.text_cells import cells_of, is_empty, is_number, names_of, separator_of

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
        names: of the columns, if they come from the file.
        has_words: whether other columns may hold text, so that only those with letters are read.
        has_header: whether a line that is no comment names the columns; # may then be data.
        width: columns before a separator at the end of each row; None without one.
        note: for the user, on a header that is not used.
    """

    separator: str | None
    skip: int
    columns: str | None = None
    n_points: int | None = None
    names: tuple[str, ...] | None = None
    has_words: bool = False
    has_header: bool = False
    width: int | None = None
    note: str | None = None

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
    separator = separator_of(head.first)
    cells = cells_of(head.first, separator)
    if len(cells) == 1 and cells[0].isdecimal():
        return Layout(separator, head.skip + 1, columns, int(cells[0]))
    if separator == "," and _counts_columns(cells, head.second):
        return Layout(separator, head.skip + 1, columns)
    numbers = [is_number(cell) for cell in cells if not is_empty(cell)]
    if any(numbers) or not numbers:
        return _below_comments(path, head, separator, columns)
    return _below_header(path, head, columns)


def _below_comments(path: Path, head: _Head, separator: str | None, columns: str | None) -> Layout:
    """The layout of a table whose first line is a row; a comment may name its columns."""
    cells = cells_of(head.first, separator)
    names, note = None, None
    if columns is None:
        names, note = _commented(path, head.comments, separator, cells)
    letters = header_letters(names) if names else columns
    layout = Layout(separator, head.skip, letters, names=names, note=note)
    second = cells_of(head.second, separator)
    wanted = letters or (second if second and second[-1] else "")
    n_columns = _n_columns(cells, len(wanted))
    if all(is_number(cell) or is_empty(cell) for cell in cells):
        return layout if n_columns == len(cells) else replace(layout, width=n_columns)
    if letters is None:
        raise _no_numbers(path, head.first)
    if len(letters) != n_columns:
        raise InputError(
            f"{path} has {n_columns} columns, columns={letters!r} names {len(letters)}"
        )
    return replace(layout, has_words=True)


def _below_header(path: Path, head: _Head, columns: str | None) -> Layout:
    """The layout of a table whose first line names its columns."""
    declared = int(head.second) if head.second.isdecimal() else None  # as CloudCompare writes it
    row = head.first if declared is not None or not head.second else head.second
    separator = separator_of(row)
    if "\t" in head.first and separator is None:
        separator = "\t"  # names may hold blanks
    values = cells_of(row, separator)
    if columns is not None:
        n_columns = _n_columns(values, len(columns))
        width = None if n_columns == len(values) else n_columns
        return Layout(separator, head.skip + 1, columns, width=width)
    if _DECIMAL_COMMA.search(head.first):
        raise _no_numbers(path, head.first)
    names = next(_fitting(head.first, separator, values), None)
    if names is None:
        raise _unequal(path, head, separator, values)
    layout = Layout(
        separator,
        head.before_second + (declared is not None),
        _header(path, head.first, names),
        n_points=declared,
        names=tuple(names),
        has_words=True,
        has_header=True,
    )
    used = [values[at] for at in layout.used or ()]
    if (
        head.second
        and declared is None
        and not all(is_number(cell) or is_empty(cell) for cell in used)
    ):
        raise _no_numbers(path, head.second)
    return layout


def _n_columns(cells: Sequence[str], wanted: int) -> int:
    """How many columns a row has.

    A separator at its end separates nothing, but where as many columns are wanted.
    """
    at_end = any(cells) and not cells[-1]
    return len(cells) - (at_end and len(cells) != wanted)


def _fitting(line: str, separator: str | None, row: Sequence[str]) -> Iterator[list[str]]:
    """The ways to split a line into as many names as a row has columns."""
    for names in names_of(line, separator):
        if len(names) > 1 and not names[-1] and len(names) == len(row) + 1:
            names = names[:-1]
        if _n_columns(row, len(names)) == len(names):
            yield names


def _unequal(path: Path, head: _Head, separator: str | None, row: Sequence[str]) -> InputError:
    """The error for a header with more or fewer names than the first row has values."""
    names = next(names_of(head.first, separator))
    letters = header_letters(names)
    if all(named(names, spellings) for spellings in LON_LAT) or not set("xyz") <= set(letters):
        return _no_names(path, head.first, names)
    if _DECIMAL_COMMA.search(head.second):
        return _no_numbers(path, head.second)
    return InputError(
        f"{path}: its header names {len(names)} columns, and its first row has {len(row)}; "
        "correct it, or name the columns with columns='xyz_rgb'"
    )


def _counts_columns(cells: list[str], row: str) -> bool:
    """Whether 0, 1, 2, … stand above decimals, as pandas writes a table without names.

    The index of the rows has no name.
    """
    counts = cells[1:] if not cells[0] else cells
    return counts == [str(i) for i in range(len(counts))] and len(counts) > 2 and "." in row


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
        comments: up to the first line.
    """

    skip: int
    first: str
    second: str
    before_second: int
    comments: tuple[str, ...]


def _head(path: Path) -> _Head:
    lines: list[str] = []
    comments: list[str] = []
    skip, at = 0, 0
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
            if (not lines or plain) and (remark := remark.strip("# \t\r\n")):
                comments.append(remark)
            skip += not lines
    first, second = (*lines, "", "")[:2]
    return _Head(skip, first, second, at, tuple(comments))


def _as_row(line: str, header: str) -> str:
    """A line that begins with #, where it has as many fields as the header; else an empty one."""
    mark = separator_of(header) or "\t"
    return line.strip() if line.count(mark) == header.count(mark) > 0 else ""


def _header(path: Path, first: str, names: Sequence[str]) -> str:
    """Letters of the columns that a header names."""
    letters = header_letters(names)
    if all(named(names, spellings) for spellings in LON_LAT) or not set("xyz") <= set(letters):
        raise _no_names(path, first, names)
    if not are_columns(letters):
        raise InputError(
            f"{path}: its header {first[:60]!r} must name x, y, z once and r, g, b once or not at "
            "all; correct it, or name the columns with columns='xyz_rgb'"
        )
    return letters


def _no_names(path: Path, first: str, names: Sequence[str]) -> InputError:
    """The error for a header without the names of coordinates."""
    if all(named(names, spellings) for spellings in LON_LAT):
        return no_coordinates(names, str(path))
    return InputError(f"{path}: its header {first[:60]!r} names no columns x, y and z")


def _commented(
    path: Path, comments: Sequence[str], separator: str | None, row: Sequence[str]
) -> tuple[tuple[str, ...] | None, str | None]:
    """Names of the columns by the last comment that has as many, x, y and z among them.

    Returns:
        The names, and a note on a comment that names x, y and z, but not as many columns as there
        are; None for each if there is none.

    Raises:
        InputError: it names a coordinate twice, or longitude and latitude.
    """
    for comment in reversed(comments):
        for names in _fitting(comment, separator, row):
            on_earth = all(named(names, spellings) for spellings in LON_LAT)
            if on_earth or set("xyz") <= set(header_letters(names)):
                _header(path, comment, names)
                return tuple(names), None
    for comment in reversed(comments):
        if any(are_columns(header_letters(names)) for names in names_of(comment, separator)):
            return None, (
                f"the comment {comment[:60]!r} names other columns than the {len(row)} that its "
                "rows have, so it is not used; name the columns with columns='xyz_rgb' (--columns)"
            )
    return None, None
