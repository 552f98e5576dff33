"""Tables and arrays: .npy, .npz, .bin, .xyz, .txt, .csv."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError, first_line
from budwood.points.io.cloud import Cloud, ReadOptions, are_columns, make_cloud

KITTI_COLUMNS = 4
TEXT = "utf-8-sig"  # UTF-8 with or without a byte-order mark, which spreadsheets write
AUTOMATIC = {3: "xyz", 4: "xyz_"}
XYZ_KEYS = ("xyz", "points", "pc", "pointcloud", "coords", "arr_0")
RGB_KEYS = ("rgb", "colors", "color", "colours")
HEADERS = {"x": "x", "y": "y", "z": "z", "red": "r", "green": "g", "blue": "b"}


def split_columns(table: NDArray[Any], columns: str | None, source: str) -> tuple[Any, Any]:
    """Split a table into coordinates and colours.

    Args:
        table: shape (n_points, n_columns).
        columns: one letter a column: x, y, z, r, g, b, or ``_`` for a column to leave out. None: 3
            columns are xyz, 4 are xyz and an intensity, 6 are xyzrgb; if one of the last three
            has negative values, they are normals and left out.
        source: for messages.

    Returns:
        xyz and rgb (or None), shape (n_points, 3).

    Raises:
        InputError: no numbers, or a number of columns that ``columns`` does not fit.
    """
    if table.dtype.kind not in "fiu":
        raise InputError(f"{source} holds {table.dtype}, expected numbers")
    if table.ndim != 2:
        raise InputError(f"{source} has shape {table.shape}, expected (n_points, n_columns)")
    width = table.shape[1]
    if columns is None:
        if width == 6:
            columns = "xyz___" if (table[:, 3:] < 0).any() else "xyzrgb"
        elif width not in AUTOMATIC:
            raise InputError(
                f"{source} has {width} columns; 3 (xyz), 4 (xyz, intensity) and 6 (xyz, rgb or "
                "normals) are understood, name others with columns='xyz_rgb'"
            )
        else:
            columns = AUTOMATIC[width]
    if len(columns) != width:
        raise InputError(f"{source} has {width} columns, columns={columns!r} names {len(columns)}")
    xyz = table[:, [columns.index(letter) for letter in "xyz"]]
    colored = all(letter in columns for letter in "rgb")
    return xyz, table[:, [columns.index(letter) for letter in "rgb"]] if colored else None


def read_npy(path: Path, options: ReadOptions) -> Cloud:
    """Read an array of shape (n_points, n_columns); pickled objects are refused."""
    with _numpy_errors(path):
        table = np.load(path, allow_pickle=False)
    if not isinstance(table, np.ndarray):
        table.close()
        raise InputError(f"{path} is an archive of arrays, not one array; rename it to .npz")
    return _from_table(table, path, options)


def read_npz(path: Path, options: ReadOptions) -> Cloud:
    """Read the array under a name in ``XYZ_KEYS``, and colours under one in ``RGB_KEYS``."""
    if not zipfile.is_zipfile(path):  # numpy would leave such a file open
        raise InputError(f"{path} is truncated or no .npz file")
    with _numpy_errors(path), np.load(path, allow_pickle=False) as arrays:
        name = next((key for key in XYZ_KEYS if key in arrays), None)
        if name is None:
            known = ", ".join(XYZ_KEYS)
            raise InputError(f"{path} holds {', '.join(arrays.files)}; expected one of {known}")
        color = next((key for key in RGB_KEYS if key in arrays), None)
        table, rgb = arrays[name], None if color is None else arrays[color]
    if rgb is None:
        return _from_table(table, path, options)
    xyz, _ = split_columns(table, options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def read_bin(path: Path, options: ReadOptions) -> Cloud:
    """Read KITTI's format: float32 x, y, z, reflectance, point after point."""
    width = KITTI_COLUMNS if options.columns is None else len(options.columns)
    size = path.stat().st_size
    if size % (4 * width):
        raise InputError(
            f"{path} has {size} bytes, not a multiple of {4 * width} ({width} float32 a point): "
            "truncated, or of other columns"
        )
    return _from_table(np.fromfile(path, dtype="<f4").reshape(-1, width), path, options)


def read_text(path: Path, options: ReadOptions) -> Cloud:
    """Read rows of numbers, separated by blanks, commas or semicolons; # starts a comment.

    An integer alone in the first line is the number of rows, as in some .xyz files.
    """
    layout = _layout(path, options.columns)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of a file without data: checked below
            table = np.loadtxt(
                path,
                delimiter=layout.separator,
                skiprows=layout.skip,
                ndmin=2,
                encoding=TEXT,
            )
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of numbers: {first_line(error)}") from None
    if table.size == 0:
        raise InputError(f"{path} has no points")
    if layout.n_points is not None and len(table) != layout.n_points:
        raise InputError(
            f"{path} declares {layout.n_points} points in its first line and has {len(table)}: "
            "truncated, or of another format"
        )
    return _from_table(table, path, replace(options, columns=layout.columns))


@dataclass(frozen=True)
class _Layout:
    """How a text file is laid out.

    Attributes:
        separator: between values; None for blanks.
        skip: lines to skip.
        columns: letters of the columns, as given or by the header; None without either.
        n_points: how many the first line declares; None if it does not.
    """

    separator: str | None
    skip: int
    columns: str | None = None
    n_points: int | None = None


def _layout(path: Path, columns: str | None) -> _Layout:
    with path.open(encoding=TEXT, errors="replace") as file:
        head = list(itertools.islice(file, 100))
    if any("\0" in line for line in head):
        raise InputError(f"{path} is binary, not a table of numbers")
    skip = 0
    first = ""
    for line in head:
        first = line.split("#")[0].strip()
        if first:
            break
        skip += 1
    separator = next((mark for mark in ",;" if mark in first), None)
    fields = [field.strip().strip("\"'").lower() for field in first.split(separator)]
    if len(fields) == 1 and fields[0].isdecimal():
        return _Layout(separator, skip + 1, columns, int(fields[0]))
    if all(_is_number(field) for field in fields):
        return _Layout(separator, skip, columns)
    if columns is not None:
        return _Layout(separator, skip + 1, columns)
    names = [HEADERS.get(field.removeprefix("//"), field) for field in fields]
    columns = "".join(name if name in tuple("xyzrgb") else "_" for name in names)
    if not all(letter in columns for letter in "xyz"):
        raise InputError(f"{path}: its header {first[:60]!r} names no columns x, y and z")
    if not are_columns(columns):
        raise InputError(
            f"{path}: its header {first[:60]!r} must name x, y, z once and r, g, b once or not at "
            "all; correct it, or name the columns with columns='xyz_rgb'"
        )
    return _Layout(separator, skip + 1, columns)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_table(table: NDArray[Any], path: Path, options: ReadOptions) -> Cloud:
    xyz, rgb = split_columns(table, options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


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
