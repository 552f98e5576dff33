"""Clouds in arrays and tables: .npy, .npz, .bin, .xyz, .txt, .csv."""

from __future__ import annotations

import itertools
import warnings
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError
from budwood.points.io.cloud import Cloud, make_cloud
from budwood.points.io.options import ReadOptions

KITTI_COLUMNS = 4
AUTOMATIC = {3: "xyz", 4: "xyz_"}
XYZ_KEYS = ("xyz", "points", "pc", "pointcloud", "coords", "arr_0")
RGB_KEYS = ("rgb", "colors", "color", "colours")
HEADERS = {"x": "x", "y": "y", "z": "z", "red": "r", "green": "g", "blue": "b"}


def split_columns(table: NDArray[Any], columns: str | None, source: str) -> tuple[Any, Any]:
    """Coordinates and colours of a table.

    Args:
        table: shape (n_points, n_columns).
        columns: one letter a column: x, y, z, r, g, b, and ``_`` for one to leave out. None takes
            3 as xyz, 4 as xyz and an intensity, 6 as xyzrgb unless a value of the last three is
            negative: then they are normals, and left out.
        source: for messages.

    Returns:
        xyz and rgb (or None), shape (n_points, 3).

    Raises:
        InputError: another number of columns, or letters that do not fit it.
    """
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
    """An array of shape (n_points, n_columns); pickled objects are refused."""
    return _from_table(_load_numpy(path), path, options)


def read_npz(path: Path, options: ReadOptions) -> Cloud:
    """Arrays under one of the names in `XYZ_KEYS`, and colours under one in `RGB_KEYS`."""
    if not zipfile.is_zipfile(path):  # numpy would leave such a file open
        raise InputError(f"{path} is truncated or no .npz file")
    with _load_numpy(path) as arrays:
        name = next((key for key in XYZ_KEYS if key in arrays), None)
        if name is None:
            known = ", ".join(XYZ_KEYS)
            raise InputError(f"{path} holds {', '.join(arrays.files)}; expected one of {known}")
        color = next((key for key in RGB_KEYS if key in arrays), None)
        try:
            table, rgb = arrays[name], None if color is None else arrays[color]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} is truncated or damaged: {_first_line(error)}") from None
    if rgb is None:
        return _from_table(table, path, options)
    xyz, _ = split_columns(table, options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def read_bin(path: Path, options: ReadOptions) -> Cloud:
    """KITTI: float32 x, y, z, reflectance, one after the other."""
    width = KITTI_COLUMNS if options.columns is None else len(options.columns)
    size = path.stat().st_size
    if size % (4 * width):
        raise InputError(
            f"{path} has {size} bytes, no multiple of {4 * width} ({width} float32 a point): "
            "truncated, or of other columns"
        )
    return _from_table(np.fromfile(path, dtype="<f4").reshape(-1, width), path, options)


def read_text(path: Path, options: ReadOptions) -> Cloud:
    """Rows of numbers, separated by blanks, commas or semicolons; # starts a comment."""
    separator, header, skip = _layout(path)
    columns = options.columns or header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of a file without data: checked below
            table = np.loadtxt(path, delimiter=separator, skiprows=skip, ndmin=2, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no table of numbers: {_first_line(error)}") from None
    if table.size == 0:
        raise InputError(f"{path} has no points")
    return _from_table(table, path, replace(options, columns=columns))


def _layout(path: Path) -> tuple[str | None, str | None, int]:
    """Separator, columns by the header, and lines to skip."""
    with path.open(encoding="utf-8", errors="replace") as file:
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
    if all(_is_number(field) for field in fields):
        # A lone integer above the rows counts the points, as in some .xyz files.
        return separator, None, skip + (len(fields) == 1)
    names = [HEADERS.get(field.removeprefix("//"), field) for field in fields]
    columns = "".join(name if name in tuple("xyzrgb") else "_" for name in names)
    if not all(letter in columns for letter in "xyz"):
        raise InputError(f"{path}: its header {first[:60]!r} names no columns x, y and z")
    return separator, columns, skip + 1


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _from_table(table: NDArray[Any], path: Path, options: ReadOptions) -> Cloud:
    if table.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {table.dtype}, expected numbers")
    xyz, rgb = split_columns(table, options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid)


def _load_numpy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        text = _first_line(error)
        if "allow_pickle" in text:
            text = "it holds pickled objects, which could run code; save plain arrays"
        raise InputError(f"{path} is truncated or no NumPy file: {text}") from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
