"""Tables and arrays: .npy, .npz, .xyz, .txt, .csv, .pts. Bare float32 tables are in ``bins``."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError, first_line
from budwood.points.io.cloud import Cloud, ReadOptions, are_columns, make_cloud
from budwood.points.io.columns import no_effect, split_columns
from budwood.points.io.fields import (
    LON_LAT,
    RGB_NAMES,
    XYZ_NAMES,
    colors_of,
    from_fields,
    letter_of,
    letters_of,
    named,
    no_coordinates,
)

TEXT = "utf-8-sig"  # UTF-8 with or without a byte-order mark, which spreadsheets write
LEICA_COLUMNS = {7: "xyz_rgb"}
_DECIMAL_COMMA = re.compile(r"(?:^|[;\s])-?\d+,\d+(?:[;\s]|$)")


def cloud_of(
    table: NDArray[Any], source: str, columns: str | None = None, invalid: str = "error"
) -> Cloud:
    """Make a cloud of an array.

    Args:
        table: shape (n_points, n_columns), or structured with named fields.
        source: for messages.
        columns: letters of the columns; None: by the names of the fields, or by the values.
        invalid: as in :func:`make_cloud`.

    Raises:
        InputError: no coordinates, a column too many or few, or as :func:`make_cloud`.
    """
    if table.dtype.names is None:
        xyz, rgb, columns, note = split_columns(table, columns, source)
        cloud = make_cloud(xyz, rgb, source=source, invalid=invalid, columns=columns)
        return cloud.noting(note)
    flat = table.ravel()
    fields = {name: flat[name] for name in table.dtype.names}
    xyz, rgb = from_fields(fields, source)
    cloud = make_cloud(xyz[:, :3], rgb, source=source, invalid=invalid)
    return cloud.noting(no_effect(columns, "fields with names"))


def read_npy(path: Path, options: ReadOptions) -> Cloud:
    """Read an array, plain or structured; pickled objects are refused."""
    with _numpy_errors(path):
        table = np.load(path, allow_pickle=False)
    if not isinstance(table, np.ndarray):
        table.close()
        raise InputError(f"{path} is an archive of arrays, not one array; rename it to .npz")
    return cloud_of(table, str(path), options.columns, options.invalid)


def read_npz(path: Path, options: ReadOptions) -> Cloud:
    """Read the array under a name in ``XYZ_NAMES``, or arrays x, y and z, with their colours.

    An archive of a single array needs no such name.
    """
    if not zipfile.is_zipfile(path):  # numpy would leave such a file open
        raise InputError(f"{path} is truncated or no .npz file")
    with _numpy_errors(path), np.load(path, allow_pickle=False) as arrays:
        names = arrays.files
        letters = set(letters_of(names))
        name = names[0] if len(names) == 1 else named(names, XYZ_NAMES)
        if name is None and not set("xyz") <= letters:
            raise no_coordinates(names, str(path))
        color = named(names, RGB_NAMES)
        wanted = [*letters_of(names).values(), color, name]
        data = {key: arrays[key] for key in wanted if key is not None}
    rgb = colors_of(data, str(path))
    if name is None:
        xyz, _ = from_fields(data, str(path))
        cloud = make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)
        return cloud.noting(no_effect(options.columns, "arrays with names"))
    if rgb is None or data[name].dtype.names is not None:
        return cloud_of(data[name], str(path), options.columns, options.invalid)
    xyz, _, columns, _ = split_columns(data[name], options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid, columns=columns)


def read_text(path: Path, options: ReadOptions) -> Cloud:
    """Read rows of numbers, separated by blanks, commas or semicolons; # starts a comment.

    A header, in a comment or not, names the columns. An integer alone in the first line is the
    number of rows, as in some .xyz files.
    """
    layout = _layout(path, options.columns)
    table = _table(path, path, layout, layout.skip)
    _check_count(path, layout.n_points, table)
    cloud = cloud_of(table, str(path), layout.letters, options.invalid)
    return cloud.assuming(columns=None) if layout.has_names else cloud


def read_pts(path: Path, options: ReadOptions) -> Cloud:
    """Read .pts: Leica's scans, a number of rows before each, z up; or ShapeNet's bare rows."""
    layout = _layout(path, options.columns)
    if layout.n_points is None:
        return read_text(path, options)
    counts: list[int] = []
    with path.open(encoding=TEXT) as file:
        table = _table(path, _rows(file, counts), layout)
    _check_count(path, sum(counts), table)
    columns = options.columns or LEICA_COLUMNS.get(table.shape[1])
    return cloud_of(table, str(path), columns, options.invalid).assuming(up="z", units="m")


def _table(
    path: Path, rows: Path | Iterator[str], layout: _Layout, skip: int = 0
) -> NDArray[np.float64]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of a file without data: checked below
            table = np.loadtxt(
                rows,
                delimiter=layout.separator,
                skiprows=skip,
                usecols=layout.used,
                ndmin=2,
                encoding=TEXT,
                comments=None if layout.has_header else "#",
            )
    except (ValueError, UnicodeDecodeError) as error:
        reason = first_line(error).partition("; use `usecols`")[0]
        raise InputError(f"{path} is not a table of numbers: {reason}") from None
    if table.size == 0:
        raise InputError(f"{path} has no points")
    return table


def _check_count(path: Path, declared: int | None, table: NDArray[Any]) -> None:
    if declared is not None and len(table) != declared:
        raise InputError(
            f"{path} declares {declared} points in its first line and has {len(table)}: "
            "truncated, or of another format"
        )


def _rows(file: TextIO, counts: list[int]) -> Iterator[str]:
    """The lines of a .pts file but for those that count rows, which go to ``counts``."""
    for line in file:
        if line.strip().isdecimal():
            counts.append(int(line))
        else:
            yield line


@dataclass(frozen=True)
class _Layout:
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


def _layout(path: Path, columns: str | None) -> _Layout:
    head = _head(path)
    separator = _separator(head.first)
    fields = head.fields(head.first, separator)
    numbers = [_is_number(field) for field in fields]
    if len(fields) == 1 and fields[0].isdecimal():
        return _Layout(separator, head.skip + 1, columns, int(fields[0]))
    names = None if columns else _commented(head.comment, len(fields))
    if separator == "," and _counts_columns(fields, head.second):
        return _Layout(separator, head.skip + 1, columns)
    if all(numbers):
        width = len(fields) if separator and head.first.endswith(separator) else None
        return _Layout(
            separator, head.skip, columns or names, has_names=names is not None, width=width
        )
    if any(numbers):
        if columns is None and names is None:
            raise _no_numbers(path, head.first)
        if columns is not None and len(columns) != len(fields):
            raise InputError(
                f"{path} has {len(fields)} columns, columns={columns!r} names {len(columns)}"
            )
        return _Layout(
            separator, head.skip, columns or names, has_names=columns is None, has_words=True
        )
    return _below_header(path, head, separator, columns)


def _below_header(path: Path, head: _Head, separator: str | None, columns: str | None) -> _Layout:
    """The layout of a table whose first line names its columns."""
    if columns is not None:
        return _Layout(separator, head.skip + 1, columns)
    if _DECIMAL_COMMA.search(head.first):
        raise _no_numbers(path, head.first)
    if "\t" in head.first and separator is None:
        separator = "\t"  # names may hold blanks
    names = head.fields(head.first, separator)
    columns = _header(path, head.first, names)
    layout = _Layout(
        separator, head.skip + 1, columns, has_names=True, has_words=True, has_header=True
    )
    values = head.fields(head.second, separator)
    if len(values) == 1 and values[0].isdecimal():  # as CloudCompare writes it
        return replace(layout, skip=head.skip + 2, n_points=int(values[0]))
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
        comment: the last comment up to the first line.
    """

    skip: int
    first: str
    second: str
    comment: str

    @staticmethod
    def fields(line: str, separator: str | None) -> list[str]:
        """Values or names of a line; a separator at its end separates nothing."""
        if separator is not None:
            line = line.removesuffix(separator)
        return [field.strip() for field in line.split(separator)]


def _head(path: Path) -> _Head:
    lines: list[str] = []
    skip, comment = 0, ""
    with path.open(encoding=TEXT, errors="replace") as file:
        for line in file:
            if "\0" in line:
                raise InputError(f"{path} is binary, not a table of numbers")
            plain, _, remark = line.partition("#")
            if plain := plain.strip():
                lines.append(plain)
            if len(lines) == 2:
                break
            if not lines or (len(lines) == 1 and plain):
                comment = remark.strip() or comment
            skip += not lines
    first, second = (*lines, "", "")[:2]
    return _Head(skip, first, second, comment)


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


@contextlib.contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    """Turn what NumPy raises for a damaged file into an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # zip, zlib and NumPy's parsers raise errors of any kind
        text = first_line(error)
        if "allow_pickle" in text:
            text = "it holds pickled objects, which could run code; save plain arrays"
        raise InputError(f"{path} is truncated or no NumPy file: {text}") from None
