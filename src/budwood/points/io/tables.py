"""Tables and arrays: .npy, .npz, .xyz, .txt, .csv, .pts. Bare float32 tables are in ``bins``."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from budwood.errors import InputError, first_line
from budwood.points.io.cloud import Cloud, ReadOptions, make_cloud
from budwood.points.io.columns import no_effect, split_columns
from budwood.points.io.fields import (
    RGB_NAMES,
    XYZ_NAMES,
    colors_of,
    from_fields,
    is_survey,
    letters_of,
    named,
    no_coordinates,
)
from budwood.points.io.text_cells import number_of
from budwood.points.io.text_layout import TEXT, Layout, layout_of
from budwood.points.io.units import with_named_units

LEICA_COLUMNS = {7: "xyz_rgb"}


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
    cloud = with_named_units(cloud, [*letters_of(fields).values()])
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
        cloud = with_named_units(cloud, [*letters_of(names).values()])
        return cloud.noting(no_effect(options.columns, "arrays with names"))
    if rgb is None or data[name].dtype.names is not None:
        return cloud_of(data[name], str(path), options.columns, options.invalid)
    xyz, _, columns, _ = split_columns(data[name], options.columns, str(path))
    return make_cloud(xyz, rgb, source=str(path), invalid=options.invalid, columns=columns)


def read_text(path: Path, options: ReadOptions) -> Cloud:
    """Read rows of numbers, separated by blanks, commas or semicolons; # starts a comment.

    A header, in a comment or not, names the columns and perhaps their units. Empty cells
    are NaN. An integer alone in the first line is the number of rows, as in some .xyz files.
    """
    layout = layout_of(path, options.columns)
    table = _table(path, path, layout, layout.skip)
    _check_count(path, layout.n_points, table)
    cloud = cloud_of(table, str(path), layout.letters, options.invalid).noting(layout.note)
    if layout.names is None:
        return cloud
    cloud = with_named_units(cloud, layout.names).assuming(columns=None)
    return cloud.assuming(up="z") if is_survey(layout.names) else cloud


def read_pts(path: Path, options: ReadOptions) -> Cloud:
    """Read .pts: Leica's scans, a number of rows before each, z up; or ShapeNet's bare rows."""
    layout = layout_of(path, options.columns)
    if layout.n_points is None:
        return read_text(path, options)
    counts: list[int] = []
    with path.open(encoding=TEXT) as file:
        table = _table(path, _rows(file, counts), layout)
    _check_count(path, sum(counts), table)
    columns = options.columns or LEICA_COLUMNS.get(table.shape[1])
    return cloud_of(table, str(path), columns, options.invalid).assuming(up="z", units="m")


def _table(
    path: Path, rows: Path | Iterator[str], layout: Layout, skip: int = 0
) -> NDArray[np.float64]:
    """The used columns, as they are, or else with quotes and empty cells, which is slower."""
    ways: list[dict[str, Any]] = [{}]
    if isinstance(rows, Path):
        ways.append({"quotechar": '"'})
        if layout.separator is not None:
            ways.append({"quotechar": '"', "converters": number_of})
    load = functools.partial(
        np.loadtxt,
        rows,
        delimiter=layout.separator,
        skiprows=skip,
        usecols=layout.used,
        ndmin=2,
        encoding=TEXT,
        comments=None if layout.has_header else "#",
    )
    for way in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns of a file without data: checked below
                table = load(**way)
        except ValueError as error:  # UnicodeDecodeError is one
            reason = first_line(error).partition("; use `usecols`")[0]
            continue
        if way:
            _check_quotes(path, layout, skip, table)
        if table.size == 0:
            raise InputError(f"{path} has no points")
        return table
    raise InputError(f"{path} is not a table of numbers: {reason}")


def _check_quotes(path: Path, layout: Layout, skip: int, table: NDArray[Any]) -> None:
    """Refuse a table in which a quote that is not closed has joined rows."""
    with path.open(encoding=TEXT) as file:
        lines = itertools.islice(file, skip, None)
        if not layout.has_header:
            lines = (line.partition("#")[0] for line in lines)
        n_rows = sum(1 for line in lines if line.strip())
    if len(table) != n_rows:
        raise InputError(
            f"{path} has {n_rows} rows, and {len(table)} if read with quotes: one is not closed"
        )


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
